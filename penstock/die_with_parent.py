"""A script: `die_with_parent.py PARENT_PID COMMAND...` becomes COMMAND, which is killed when its parent is gone.

So nothing outlives a launcher that was killed with SIGKILL. The kernel's request (PR_SET_PDEATHSIG, prctl(2)) survives
exec, which is why a wrapper will do for any program and no code has to run between fork and exec in the launcher. The
"parent" is the thread that started us: start children from a thread that outlives them. Imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Does not return."""
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent_pid:  # it died before we asked
            sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
