"""Logging of every process: one line an event, with time, level, process name, and the request id where one is given.

`setup` is called once at the start of a process. `report_progress` tells whoever started the process how far loading
is: a supervised child writes marked lines that the launcher turns into bars, a process on its own logs start and end.
A record that concerns a request has `extra=about(request)`, or `extra={"request_id": ...}` where there is only the id;
as JSON (`--log-format json`) a record has every field of its `extra`. What is logged of every request, if asked for
(`--enable-log-requests`), goes to `requests`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Protocol

SUPERVISED_ENV = "PENSTOCK_SUPERVISED"  # set by the launcher, which prefixes every line with the process name itself
ERROR_PREFIX = "penstock: error: "  # the one line a process prints on stderr before it exits because of a bad set-up
_PROGRESS_PREFIX = "@progress "

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")

logger = logging.getLogger(__name__)
requests = logging.getLogger("penstock.requests")


class Numbered(Protocol):
    """A request, or a message about one."""

    @property
    def request_id(self) -> str: ...
    @property
    def choice(self) -> int: ...
    @property
    def attempt(self) -> int: ...


def about(source: Numbered, **facts: object) -> dict[str, object]:
    """The `extra` of a record that concerns a request's choice; of a request, not a message, with its trace's id."""
    known = {"request_id": source.request_id, "choice": source.choice, "attempt": source.attempt}
    return known | trace_id(getattr(source, "traceparent", "")) | facts


def trace_id(traceparent: str) -> dict[str, object]:
    """The field `trace_id` for a record, of a W3C traceparent; none of one that is not valid."""
    match = _TRACEPARENT.fullmatch(traceparent)
    return {"trace_id": match[1]} if match else {}


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units (files, tensors, shapes; 0 of 0 when not countable) of a start-up stage."""

    stage: str
    done: int
    total: int


def setup(name: str, level: str = "info", format: str = "text", *, log_requests: bool = False) -> None:
    """Send this process's log to stderr as `time LEVEL name [request] message`, or as JSON.

    Args:
        name: "router", or the worker id. Left out of the lines of a supervised child, whose launcher prefixes them.
        level: debug, info, warning or error. Other libraries are shown from warning on (from info on with debug).
        format: text or json.
        log_requests: show what is logged of every request.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter(name) if format == "json" else _LineFormatter("" if supervised() else name))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO if level == "debug" else logging.WARNING)
    logging.getLogger("penstock").setLevel(level.upper())
    requests.setLevel(logging.NOTSET if log_requests else logging.WARNING)


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
    """Logs one kind of warning, or error, at most every `interval_s` seconds and counts those left out in between."""

    interval_s: float = 10.0
    _next: dict[str, float] = field(default_factory=dict)
    _left_out: dict[str, int] = field(default_factory=dict)

    def warn(
        self, log: logging.Logger, kind: str, message: str, now: float, error: BaseException | None = None
    ) -> None:
        """Log `message` at time `now` (seconds), or count it when `kind` was logged less than an interval ago.

        With `error` it is one, and is logged with its traceback.
        """
        if now < self._next.get(kind, now):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._next[kind] = now + self.interval_s
        left_out = self._left_out.pop(kind, 0)
        more = f" ({left_out} more like this were not shown)" if left_out else ""
        log.log(logging.WARNING if error is None else logging.ERROR, "%s%s", message, more, exc_info=error)


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


class _JsonFormatter(logging.Formatter):
    """One JSON object a record: time (UTC), level, process, logger, message, `extra`'s fields, exception."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        fields = json_record(self._name, record.getMessage(), record.levelname, record.created)
        fields |= {"logger": record.name}
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        return json.dumps(fields, default=str, ensure_ascii=False)


def json_record(process: str, message: str, level: str, time_s: float) -> dict[str, object]:
    """What every JSON record begins with; `time_s` is since the epoch."""
    time = datetime.fromtimestamp(time_s, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"time": time, "level": level, "process": process, "message": message}
