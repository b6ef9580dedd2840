"""What people see of a fleet: each child's lines behind its name, and loading progress (bars on a terminal).

Written to by process_group.py from several threads. Where nobody can see it any more (the terminal is closed, the disk
full) it is lost: the fleet goes on.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from threading import Lock
from typing import Any, TextIO

from penstock.common.logs import Progress, json_record

_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)  # ANSI foregrounds that read well on dark and on light


class Console:
    """Prefixed lines and progress on `stream` (default: stderr), which gets colours and bars if it is a terminal.

    `json_lines`: children write JSON, which passes as it is; everything else becomes a record of its own.
    """

    def __init__(self, stream: TextIO | None = None, *, json_lines: bool = False) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._json = json_lines
        self._terminal = self._stream.isatty() and not json_lines
        self._lock = Lock()
        self._prefixes: dict[str, str] = {}
        self._bars: dict[str, Any] = {}  # tqdm bars
        self._shown: dict[str, Progress] = {}

    def line(self, name: str, text: str) -> None:
        """Show a line of process `name`."""
        with self._lock, suppress(OSError):
            self._write_line(name, text)

    def progress(self, name: str, progress: Progress) -> None:
        """Show how far process `name` is: its bar, or without a terminal a line a quarter."""
        with self._lock, suppress(OSError):
            if self._terminal:
                self._move_bar(name, progress)
                return
            last = self._shown.get(name)
            if last is None or last.stage != progress.stage or _quarter(last) != _quarter(progress):
                self._shown[name] = progress
                share = f" {100 * progress.done // progress.total} %" if progress.total else ""
                self._write_line(name, f"{progress.stage}{share}")

    def forget(self, name: str) -> None:
        """Process `name` is loaded or gone: take its bar away."""
        with self._lock, suppress(OSError):
            self._shown.pop(name, None)
            if name in self._bars:
                self._bars.pop(name).close()

    def close(self) -> None:
        """Take all bars away."""
        for name in list(self._bars):
            self.forget(name)

    def _move_bar(self, name: str, progress: Progress) -> None:
        from tqdm import tqdm

        if name not in self._bars:
            self._bars[name] = tqdm(file=self._stream, leave=False, dynamic_ncols=True)
        bar = self._bars[name]
        if bar.total != (progress.total or None) or progress.done < bar.n:
            bar.reset(progress.total or None)
        bar.set_description_str(f"{name} {progress.stage}", refresh=False)
        bar.update(progress.done - bar.n)
        bar.refresh()

    def _write_line(self, name: str, text: str) -> None:
        if not self._json:
            text = f"{self._prefix(name)}{text}"
        elif not (text.startswith("{") and text.endswith("}")):
            text = json.dumps(json_record(name, text, "INFO", time.time()), ensure_ascii=False)
        self._write(text)

    def _write(self, text: str) -> None:
        if self._bars:
            next(iter(self._bars.values())).write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _prefix(self, name: str) -> str:
        if name not in self._prefixes:
            colour = _COLOURS[len(self._prefixes) % len(_COLOURS)]
            plain = f"{name:<10} | "
            self._prefixes[name] = f"\x1b[{colour}m{plain}\x1b[0m" if self._terminal else plain
        return self._prefixes[name]


def _quarter(progress: Progress) -> int:
    return 4 * progress.done // progress.total if progress.total else 0
