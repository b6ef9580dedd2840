"""The file for a benchmark's result: looked at before the run, so that no finished run is lost for it."""

from __future__ import annotations

import os
from pathlib import Path

from penstock.common.errors import ConfigError


def prepare(path: Path) -> None:
    """Make its folder, and see that the file can be written.

    Raises:
        ConfigError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError("permission denied")
    except (OSError, ValueError) as error:  # ValueError: a path that cannot be
        raise ConfigError(f"cannot write {path}: {error}") from error


def write(path: Path, text: str, *, append: bool = False) -> None:
    """Write it and say so.

    Raises:
        ConfigError: the disk is full, say.
    """
    try:
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    print(f"Result: {path}")
