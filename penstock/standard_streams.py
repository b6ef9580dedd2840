"""Standard streams that are closed (`2>&-`, some init scripts) lead to /dev/null: the command line expects all three.

Else a socket or file of ours would get the descriptor, and whatever a library writes to "stderr" would go into it.
"""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Call it before anything else is opened."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    # Python has None for one that was closed when it started. They are never closed by us: the descriptors stay.
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
