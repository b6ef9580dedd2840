"""The `penstock` command, and `python -m penstock`, which is the same."""

from __future__ import annotations

import sys

from penstock.interrupt import leave_at_once


def run() -> int:
    """Run the command in the process's arguments and return its exit status."""
    leave_at_once()
    from penstock.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
