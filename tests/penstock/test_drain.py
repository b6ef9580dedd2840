"""`penstock drain`: options that cannot be, and a worker that was never told. What it does is in tests/system."""

from __future__ import annotations

import pytest

from penstock.cli import main
from penstock.common.errors import ConfigError
from penstock.drain import drain
from tests.conftest import free_port


@pytest.mark.parametrize("argv", [["--timeout", "nan"], ["--timeout", "-1"], ["--url", "http://["]])
def test_mistakes(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", "decode-0", *argv]) == 2
    assert f"argument {argv[0]}: " in capsys.readouterr().err


def test_a_worker_that_was_not_told_to_leave_is_not_merely_still_there() -> None:
    with pytest.raises(ConfigError, match="has not answered"):
        drain(f"tcp://127.0.0.1:{free_port()}", "d1", "", timeout_s=0.0)
