"""What people see: prefixed lines, progress without a terminal, and bars on one (a real pseudo-terminal)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import pty
import re
import struct
import termios
from datetime import datetime

import pytest

from penstock.common import logs
from penstock.common.logs import Progress, WarningLimiter, parse_progress, progress_line, report_progress
from penstock.console import Console


def test_lines_carry_the_name_of_their_process() -> None:
    output = io.StringIO()
    console = Console(output)
    console.line("prefill-0", "one")
    console.line("decode-0", "two")
    assert output.getvalue() == "prefill-0  | one\ndecode-0   | two\n"


def test_progress_without_a_terminal_is_a_line_a_quarter() -> None:
    output = io.StringIO()
    console = Console(output)
    for done in range(101):
        console.progress("decode-0", Progress("loading weights", done, 100))
    console.progress("decode-0", Progress("warming up", 0, 0))
    shown = [line.split(" | ")[1] for line in output.getvalue().splitlines()]
    assert shown == [*(f"loading weights {percent} %" for percent in (0, 25, 50, 75, 100)), "warming up"]


def read_to_the_end(master: int) -> bytes:
    """All that was written to the terminal behind `master`, which is closed: the kernel hands it over in parts."""
    shown = b""
    while True:
        try:
            part = os.read(master, 100_000)
        except OSError as error:
            if error.errno != errno.EIO:  # Linux says so when the other side is closed and all is read
                raise
            return shown
        shown += part


def test_a_terminal_gets_bars_and_colours() -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(slave, "w") as terminal:
        console = Console(terminal)
        console.progress("decode-0", Progress("loading weights", 1, 4))
        console.line("decode-0", "between")
        console.progress("decode-0", Progress("loading weights", 4, 4))
        console.forget("decode-0")
        console.line("decode-0", "after")
        console.close()
    shown = read_to_the_end(master).decode()
    os.close(master)
    assert "decode-0 loading weights" in shown
    assert re.search(r"25%.*1/4", shown)
    assert "\x1b[36mdecode-0   | \x1b[0mbetween" in shown
    assert "\x1b[36mdecode-0   | \x1b[0mafter" in shown


def test_what_nobody_can_see_any_more_is_no_error() -> None:
    reader, writer = os.pipe()
    master, slave = pty.openpty()
    streams = [os.fdopen(writer, "w"), os.fdopen(slave, "w")]
    consoles = [Console(stream) for stream in streams]
    consoles[1].progress("prefill-0", Progress("loading weights", 1, 4))  # a bar stands when the terminal is closed
    os.close(reader)
    os.close(master)
    for console in consoles:
        for done in range(3):
            console.line("decode-0", "a line")
            console.progress("decode-0", Progress("loading weights", done, 2))
        console.forget("decode-0")
        console.close()
    for stream in streams:
        with pytest.raises(OSError):
            print("indeed it is gone", file=stream, flush=True)
        with contextlib.suppress(OSError):  # what it still has to write
            stream.close()


def test_progress_survives_the_way_through_a_pipe() -> None:
    assert parse_progress(progress_line("loading weights", 3, 7)) == Progress("loading weights", 3, 7)
    assert parse_progress("loading weights") is None
    assert parse_progress("@progress [1, 2") is None
    assert parse_progress('@progress ["a", 2]') is None


def test_a_supervised_process_reports_marked_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(logs.SUPERVISED_ENV, "1")
    report_progress("loading weights", 3, 7)
    assert parse_progress(capsys.readouterr().err.strip()) == Progress("loading weights", 3, 7)


def test_a_process_on_its_own_logs_start_and_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(logs.SUPERVISED_ENV, raising=False)
    with caplog.at_level(logging.INFO, "penstock"):
        for done in range(4):
            report_progress("loading weights", done, 3)
    assert caplog.messages == ["loading weights ...", "loading weights: done"]


def test_log_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(logs.SUPERVISED_ENV, raising=False)
    root, ours = logging.getLogger(), logging.getLogger("penstock")
    before = root.handlers[:], root.level, ours.level
    try:
        logs.setup("decode-0", "info")
        ours.getChild("test").info("admitted", extra={"request_id": "cmpl-1"})
        ours.getChild("test").debug("not shown")
        logging.getLogger("library").info("not shown")
        logging.getLogger("library").warning("shown")
    finally:
        root.handlers, root.level = before[0], before[1]
        ours.setLevel(before[2])
    lines = capsys.readouterr().err.splitlines()
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
    assert re.fullmatch(time + r" INFO decode-0 \[cmpl-1\] admitted", lines[0])
    assert re.fullmatch(time + r" WARNING decode-0 shown", lines[1])
    assert len(lines) == 2


def test_repeated_warnings_are_counted_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    limiter = WarningLimiter(interval_s=10)
    log = logging.getLogger("penstock.test")
    for now in (0.0, 1.0, 9.9, 10.0, 25.0):
        limiter.warn(log, "redis", "Redis is away", now)
    limiter.warn(log, "other", "something else", 9.0)
    assert caplog.messages == [
        "Redis is away",
        "Redis is away (2 more like this were not shown)",
        "Redis is away",
        "something else",
    ]


def test_json_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("uvicorn", "uvicorn.error"):  # as in our servers: a test may have run one with uvicorn's own set-up
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    root, ours = logging.getLogger(), logging.getLogger("penstock")
    handlers, levels = root.handlers[:], (root.level, ours.level, logs.requests.level)
    try:
        logs.setup("decode-0", "info", "json", log_requests=True)
        logging.getLogger("penstock.test").info("hand-off %d failed", 7, extra={"request_id": "abc", "choice": 1})
        logs.requests.info("ended")
        try:
            raise ValueError("Größe\nzwei Zeilen")
        except ValueError:
            logging.getLogger("uvicorn.error").exception("a crash")
        logs.setup("decode-0", "info", "json")
        logs.requests.info("not asked for")
    finally:
        for handler in root.handlers[:]:
            root.removeHandler(handler)
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
        logs.requests.setLevel(levels[2])
    first, second, third = map(json.loads, capsys.readouterr().err.splitlines())
    assert datetime.fromisoformat(first.pop("time").replace("Z", "+00:00")).tzinfo is not None
    assert first == {
        "level": "INFO", "process": "decode-0", "message": "hand-off 7 failed", "logger": "penstock.test",
        "request_id": "abc", "choice": 1,
    }  # fmt: skip
    assert (second["logger"], second["message"]) == ("penstock.requests", "ended")
    assert (third["process"], third["logger"], third["level"]) == ("decode-0", "uvicorn.error", "ERROR")
    assert "ValueError: Größe\nzwei Zeilen" in third["exception"]


def test_a_console_of_json_wraps_what_is_not() -> None:
    output = io.StringIO()
    console = Console(output, json_lines=True)
    console.line("decode-0", '{"message": "as it is"}')
    console.line("redis", "# Ready to accept connections")
    console.progress("decode-0", Progress("loading weights", 1, 2))
    lines = list(map(json.loads, output.getvalue().splitlines()))
    assert lines[0] == {"message": "as it is"}
    assert (lines[1]["process"], lines[1]["message"]) == ("redis", "# Ready to accept connections")
    assert (lines[2]["process"], lines[2]["message"]) == ("decode-0", "loading weights 50 %")
