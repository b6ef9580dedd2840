"""The command line: what it answers by itself, what it passes on, and how mistakes look."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock import __version__, cli
from penstock.cli import main
from penstock.common.config import ServeConfig

CHECKOUT = Path(__file__).parents[2]
FLEET = ["--workers", "2", "--pages-per-worker", "99"]
PROMISED = """
prefill-workers decode-workers prefill-devices decode-devices host port api-key redis-url dtype max-model-len
max-num-seqs max-num-batched-tokens block-size gpu-memory-utilization kv-cache-memory-bytes enable-prefix-caching
no-enable-prefix-caching kv-transport kv-checksum served-model-name generation-config seed config
"""


@pytest.fixture(autouse=True)
def no_options_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PENSTOCK_")]:
        monkeypatch.delenv(name)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} MODEL" in text for command in ("serve", "router", "prefill", "decode"))
    assert "  bench NAME " in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"penstock {__version__}\n"
    assert main([]) == 2


def test_a_reader_that_leaves_ends_a_command_quietly() -> None:
    command = [sys.executable, "-m", "penstock", "collect-env"]
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=100, cwd=CHECKOUT)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.parametrize("argv", [["--version"], ["simulate", "generated:9", *FLEET]])
def test_a_full_disk_is_one_line(argv: list[str]) -> None:
    command = [sys.executable, "-m", "penstock", *argv]
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=100, cwd=CHECKOUT)
    assert (ended.returncode, ended.stderr) == (1, b"penstock: error: [Errno 28] No space left on device\n")


def test_closed_streams_lead_to_nowhere() -> None:
    """A console on them, and what is opened next: it must not be where libraries write."""
    program = (
        "import os, sys; from penstock.standard_streams import open_standard_streams; open_standard_streams()\n"
        "from penstock.console import Console; Console().line('decode-0', 'up')\n"
        "print('?'); assert not sys.stdin.read()\n"
        "assert os.path.samestat(os.stat(os.devnull), os.fstat(2))\n"
        "assert os.open(os.devnull, os.O_RDONLY) > 2"
    )
    command = ["/bin/sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program]
    assert subprocess.run(command, timeout=100, cwd=CHECKOUT).returncode == 0


def test_a_closed_output_is_no_mistake() -> None:
    command = ["/bin/sh", "-c", '"$@" >&-', "sh", sys.executable, "-m", "penstock", "simulate", "generated:9", *FLEET]
    ended = subprocess.run(command, stderr=subprocess.PIPE, timeout=100, cwd=CHECKOUT)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_serve_help_lists_the_promised_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help"])
    assert caught.value.code == 0
    words = capsys.readouterr().out.replace(",", " ").replace("]", " ").split()
    listed = {word.lstrip("[") for word in words}
    assert {f"--{name}" for name in PROMISED.split()} - listed == set()
    assert "--worker-id" not in listed


@pytest.mark.parametrize(
    "argv, words",
    [
        (["sevre"], "unknown command 'sevre'; did you mean serve?"),
        (["x"], "unknown command 'x'; there are serve, router, prefill, decode, top, bench"),
        (["serve"], "MODEL is missing"),
        (["serve", "tiny", "--prot", "1"], "unknown option --prot; did you mean --port?"),
        (["serve", "tiny", "--decode-workers", "0"], "decode_workers must be at least 1"),
        (["decode", "tiny"], "--redis-url is missing"),
        (["prefill", "--redis-url", "redis://localhost"], "MODEL is missing"),
        (["router", "tiny"], "--redis-url is missing"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("penstock: error: ")
    assert words in err
    assert err.count("\n") == 1


def test_ctrl_c_is_an_exit_status_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "simulate", interrupted)
    assert main(["simulate", "trace"]) == 130


def test_serve_passes_its_configuration_to_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServeConfig] = []

    def launch(config: ServeConfig) -> int:
        seen.append(config)
        return 7

    monkeypatch.setattr("penstock.launcher.launch", launch)
    monkeypatch.setenv("PENSTOCK_API_KEY", "sk-1")
    assert main(["serve", "tiny", "--prefill-workers", "2", "--no-enable-prefix-caching"]) == 7
    assert seen == [ServeConfig(model="tiny", prefill_workers=2, enable_prefix_caching=False, api_key=("sk-1",))]


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["serve", "--help"], ["decode", "--help"], ["bench", "latency", "--help"]]
)
def test_quick_answers_import_nothing_heavy(argv: list[str]) -> None:
    program = "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); import penstock.cli\n"
    program += f"sys.exit(penstock.cli.main({argv!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0
    heavy = {
        "torch",
        "numpy",
        "starlette",
        "redis",
        "zmq",
        "msgspec",
        "tokenizers",
        "yaml",
        "tqdm",
        "asyncio",
        "transformers",
    }
    assert heavy & set(done.stderr.split()) == set()


def test_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "penstock", "serve"], cwd=CHECKOUT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("penstock: error: MODEL is missing")


@pytest.mark.system
def test_a_broken_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "penstock", "decode", str(tmp_path), "--redis-url", "redis://127.0.0.1:1"]
    done = subprocess.run(
        argv, cwd=CHECKOUT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("penstock: error: ")
    assert "config.json" in last
    assert "Traceback" not in done.stderr
