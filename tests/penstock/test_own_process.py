"""How our own commands run as children: without what lies in the working directory, by either way to start them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock import own_process
from penstock.common.config import RouterConfig
from penstock.own_process import BY_CODE, BY_NAME
from penstock.supervisor import Member


@pytest.mark.parametrize(
    "way, safe_path",
    [
        pytest.param(BY_NAME, True, marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="not by name there")),
        (BY_CODE, True),
        (BY_CODE, False),  # all that there is before Python 3.11
    ],
)
def test_a_child_imports_nothing_from_the_working_directory(
    way: tuple[str, ...], safe_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("argparse", "dataclasses", "heapq", "json", "penstock", "runpy", "statistics"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('from the working directory')")
    monkeypatch.setattr(own_process, "_PENSTOCK", way)
    spec = own_process.own_process(Member("router"), "router", RouterConfig(port=1), lambda pid: True)
    environ = {name: value for name, value in spec.environ.items() if safe_path or name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        spec.command, input=spec.stdin, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("penstock: error: --redis-url is missing")
