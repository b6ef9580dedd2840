"""How to run a child that is one of our own commands: its options on standard input, penstock importable."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import penstock
from penstock.child_process import ProcessSpec
from penstock.common.config import FleetConfig
from penstock.common.config_loader import ENV_PREFIX, VLLM_ENV, explicit_values
from penstock.common.logs import SUPERVISED_ENV
from penstock.supervisor import Member

# A child must not import from the working directory, as `python -m` does and the console script does not: a heapq.py
# there would end it. From Python 3.11 on PYTHONSAFEPATH sees to that.
BY_NAME = ("-m", "penstock")
BY_CODE = (
    "-c",
    "import sys; sys.path = [path for path in sys.path if path]; from penstock.__main__ import run; sys.exit(run())",
)
_PENSTOCK = BY_NAME if sys.version_info >= (3, 11) else BY_CODE


def own_process(
    member: Member,
    command: str,
    config: FleetConfig,
    ready: Callable[[int], bool],
    environ: Mapping[str, str] | None = None,
) -> ProcessSpec:
    """`penstock COMMAND` with these options; `environ` is added to ours."""
    return ProcessSpec(
        member=member,
        command=(sys.executable, *_PENSTOCK, command, "--config", "-"),
        stdin=json.dumps(explicit_values(config)),
        environ=_child_environ() | dict(environ or {}),
        ready=ready,
    )


def _child_environ() -> dict[str, str]:
    """Our environment without our own options (a child's come on its standard input), with penstock importable."""
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX) and name not in VLLM_ENV
    }
    environ[SUPERVISED_ENV] = "1"
    environ["PYTHONUNBUFFERED"] = "1"
    environ["PYTHONSAFEPATH"] = "1"
    checkout = Path(penstock.__file__).parent.parent
    if checkout.name not in ("site-packages", "dist-packages"):
        paths = [str(checkout), environ.get("PYTHONPATH", "")]
        environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environ
