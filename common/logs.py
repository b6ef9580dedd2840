"""Logging of every process: one line an event, with time, level, process name, and the request id where one is given.

`setup` is called once at the start of a process. `report_progress` tells whoever started the process how far loading
is: a supervised child writes marked lines that the launcher turns into bars, a process on its own logs start and end.
Give a request's id as `logger.info("...", extra={"request_id": request_id})`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass, field

SUPERVISED_ENV = "PENSTOCK_SUPERVISED"  # set by the launcher, which prefixes every line with the process name itself
ERROR_PREFIX = "penstock: error: "  # the one line a process prints on stderr before it exits because of a bad set-up
_PROGRESS_PREFIX = "@progress "

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units (files, tensors, shapes; 0 of 0 when not countable) of a start-up stage."""

    stage: str
    done: int
    total: int


def setup(name: str, level: str = "info") -> None:
    """Send this process's log to stderr as `time LEVEL name [request] message`.

    Args:
        name: "router", or the worker id. Left out of the lines of a supervised child.
        level: debug, info, warning or error. Other libraries are shown from warning on (from info on with debug).
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter("" if supervised() else name))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO if level == "debug" else logging.WARNING)
    logging.getLogger("penstock").setLevel(level.upper())


def supervised() -> bool:
    """True in a child of the launcher."""
    return os.environ.get(SUPERVISED_ENV) == "1"


def report_progress(stage: str, done: int, total: int) -> None:
    """Tell people how far `stage` is. Cheap enough to call for each file or tensor; call it first with done=0."""
    if supervised():
        sys.stderr.write(progress_line(stage, done, total) + "\n")
        sys.stderr.flush()
    elif done >= total:
        logger.info("%s: done", stage)
    elif done == 0:
        logger.info("%s ...", stage)


def progress_line(stage: str, done: int, total: int) -> str:
    """The marked line that carries a `Progress` from a child to the launcher."""
    return _PROGRESS_PREFIX + json.dumps([stage, done, total])


def parse_progress(line: str) -> Progress | None:
    """The progress in a line of a child's output, or None when it is an ordinary line."""
    if not line.startswith(_PROGRESS_PREFIX):
        return None
    try:
        stage, done, total = json.loads(line[len(_PROGRESS_PREFIX) :])
        return Progress(str(stage), int(done), int(total))
    except (ValueError, TypeError):
        return None


@dataclass
class WarningLimiter:
    """Logs a warning of one kind at most every `interval_s` seconds and counts those left out in between."""

    interval_s: float = 10.0
    _next: dict[str, float] = field(default_factory=dict)
    _left_out: dict[str, int] = field(default_factory=dict)

    def warn(self, log: logging.Logger, kind: str, message: str, now: float) -> None:
        """Log `message` at time `now` (seconds), or count it when `kind` was logged less than an interval ago."""
        if now < self._next.get(kind, now):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._next[kind] = now + self.interval_s
        left_out = self._left_out.pop(kind, 0)
        log.warning("%s%s", message, f" ({left_out} more like this were not shown)" if left_out else "")


class _LineFormatter(logging.Formatter):
    """`2026-01-31 12:00:00.123 INFO decode-0 [request] message`; a traceback follows on its own lines."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = f" {name}" if name else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        time = self.formatTime(record, "%Y-%m-%d %H:%M:%S")
        request_id = getattr(record, "request_id", "")
        request = f" [{request_id}]" if request_id else ""
        return f"{time}.{record.msecs:03.0f} {record.levelname}{self._name}{request} {record.message}"
