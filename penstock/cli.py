"""The `penstock` command: reads the configuration and starts what was asked for.

Nothing heavy is imported before it is needed, so that --help and mistakes are answered at once. A mistake in the
set-up (ConfigError, ModelError) is one line on stderr and exit status 2.
"""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable, Sequence

from penstock import __version__
from penstock.common import logs
from penstock.common.config import EngineConfig, FleetConfig, RouterConfig, ServeConfig, WorkerConfig
from penstock.common.config_loader import Config, load_config, nearest
from penstock.common.errors import ConfigError, ModelError
from penstock.interrupt import INTERRUPTED, raise_interrupts
from penstock.models.errors import ModelError as CheckpointError
from penstock.standard_streams import open_standard_streams

USAGE = """\
usage: penstock COMMAND [options]

Serves large language models with prefill and decode in separate workers.

commands:
  serve MODEL    a whole fleet on this machine: Redis, workers and router
  router MODEL   one router: the OpenAI API in front of the workers it finds in Redis
  prefill MODEL  one prefill worker
  decode MODEL   one decode worker (it also runs whole requests by itself)
  chat           a conversation with a running server; `--quick TEXT` asks once
  complete       continues texts on a running server, likewise
  doctor         what this machine has and lacks for serving: software, devices, links, Redis, ports, limits
  collect-env    what a bug report should say of this machine
  drain WORKER   a worker gives its requests, with their pages, to the others, and leaves
  tap            what passes on the bus of a running fleet, a line a message
  top            a running fleet in the terminal: workers, pages, hit rates, queues, rates
  simulate TRACE routing policies on virtual workers: hit ratios, balance, latency, how many workers
  run-batch      answers the requests of an OpenAI batch file
  bench NAME     a benchmark: latency, throughput or serve (also: penstock benchmark)

options:
  -h, --help     this text; `penstock COMMAND --help` lists the options of a command
  --version      the version

Every option can also stand in a file (--config FILE) or in the environment: PENSTOCK_MAX_MODEL_LEN=32K for processes
and the engine, PENSTOCK_CLIENT_URL=http://host:8000 for the commands that ask a running server.
"""
_PROCESSES = ("serve", "router", "prefill", "decode")  # handle SIGINT once there is something to end in order
# The launcher decides these for each of its workers.
_NOT_FOR_SERVE = ("worker_id", "bus_port", "metrics_port", "kv_port", "memory_share", "group_ports")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: the process's arguments) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_standard_streams()
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_cut():
            raise
        return 141  # what it says of one that wrote to a reader that has left: `penstock collect-env | head`
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _forget_stdout()
        print(f"{logs.ERROR_PREFIX}{error}", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    if arguments[:1] in ([], ["-h"], ["--help"], ["help"]):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V", "-v"):
        print(f"penstock {__version__}")
        return 0
    try:
        if arguments[0] not in _COMMANDS:
            near = nearest(arguments[0], _COMMANDS) or f"; there are {', '.join(_COMMANDS)}"
            raise ConfigError(f"unknown command {arguments[0]!r}{near}")
        if arguments[0] not in _PROCESSES:
            raise_interrupts()
        return _COMMANDS[arguments[0]](arguments[1:])
    except (ConfigError, ModelError, CheckpointError) as error:
        print(f"{logs.ERROR_PREFIX}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def _stdout_is_cut() -> bool:
    """Nobody reads what is printed any more."""
    stdout = select.poll()
    stdout.register(sys.stdout.fileno(), 0)
    cut = any(events & select.POLLERR for _, events in stdout.poll(0))
    if cut:
        _forget_stdout()
    return cut


def _forget_stdout() -> None:
    """What was not printed yet goes nowhere; the interpreter need not find out once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _serve(arguments: list[str]) -> int:
    config = _load(ServeConfig, "serve", "Start Redis, workers and router on this machine.", arguments, _NOT_FOR_SERVE)
    _need_model(config)
    from penstock.launcher import launch

    return launch(config)


def _router(arguments: list[str]) -> int:
    config = _load(RouterConfig, "router", "Start one router.", arguments, ("group_ports",))
    _need_redis(config)
    if config.router_procs > 1 and not config.group_ports:
        from penstock.launcher import launch_routers

        return launch_routers(config)
    _set_up_logs("router", config)
    from penstock.router.server import serve

    serve(config)
    return 0


def _prefill(arguments: list[str]) -> int:
    config = _load(WorkerConfig, "prefill", "Start one prefill worker.", arguments, role="prefill")
    _prepare_worker(config)
    from penstock.prefill_worker.worker import main as run_prefill_worker

    run_prefill_worker(config)
    return 0


def _decode(arguments: list[str]) -> int:
    config = _load(WorkerConfig, "decode", "Start one decode worker.", arguments, role="decode")
    _prepare_worker(config)
    from penstock.decode_worker.worker import main as run_decode_worker

    run_decode_worker(config)
    return 0


def _bench(arguments: list[str]) -> int:
    from penstock.bench.command import run

    return run(arguments)


def _run_batch(arguments: list[str]) -> int:
    from penstock.process_group import LaunchError
    from penstock.run_batch import main as run

    try:
        return run(arguments)
    except LaunchError as error:
        print(f"{logs.ERROR_PREFIX}{error}", file=sys.stderr)
        return error.exit_status


def _chat(arguments: list[str]) -> int:
    from penstock.talk import chat

    return chat(arguments)


def _complete(arguments: list[str]) -> int:
    from penstock.talk import complete

    return complete(arguments)


def _collect_env(arguments: list[str]) -> int:
    from penstock.collect_env import main as run

    return run(arguments)


def _doctor(arguments: list[str]) -> int:
    from penstock.doctor.command import run

    return run(arguments)


def _drain(arguments: list[str]) -> int:
    from penstock.drain import main as run

    return run(arguments)


def _tap(arguments: list[str]) -> int:
    from penstock.tap import main as run

    return run(arguments)


def _top(arguments: list[str]) -> int:
    from penstock.top import main as run

    return run(arguments)


def _simulate(arguments: list[str]) -> int:
    from penstock.simulate.command import run

    return run(arguments)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve,
    "router": _router,
    "prefill": _prefill,
    "decode": _decode,
    "top": _top,
    "bench": _bench,
    "benchmark": _bench,
    "run-batch": _run_batch,
    "chat": _chat,
    "complete": _complete,
    "collect-env": _collect_env,
    "simulate": _simulate,
    "doctor": _doctor,
    "drain": _drain,
    "tap": _tap,
}


def _load(
    config_class: type[Config],
    command: str,
    description: str,
    arguments: Sequence[str],
    hidden: Sequence[str] = (),
    **fixed: object,
) -> Config:
    prog = f"penstock {command}"
    return load_config(
        config_class, arguments, os.environ, prog=prog, description=description, hidden=hidden, fixed=fixed
    )


def _prepare_worker(config: WorkerConfig) -> None:
    _need_model(config)
    _need_redis(config)
    _set_up_logs(config.worker_id or config.role, config)


def _set_up_logs(name: str, config: FleetConfig) -> None:
    logs.setup(name, config.log_level, config.log_format, log_requests=config.enable_log_requests)


def _need_model(config: EngineConfig) -> None:
    if not config.model:
        raise ConfigError("MODEL is missing: a Hugging Face directory or hub id")


def _need_redis(config: FleetConfig) -> None:
    if not config.redis_url:
        raise ConfigError("--redis-url is missing: a process that is started alone finds its fleet there")
