"""How many files and connections a process may have open: routers, workers and fleets of a program begin by raising it.

A shell gives 1024, for programs that use `select`, and lets each process raise that to its hard limit, which is usually
hundreds of times as much. A router holds a descriptor for each client and about five for each worker.
"""

from __future__ import annotations

import logging
import resource
import sys

log = logging.getLogger(__name__)


def raise_open_files_limit() -> int:
    """Raise this process's limit, which its children inherit, to the hard one. Returns what it is now; a second call
    changes nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # the system's own limit may be lower than the hard one
        log.warning("at most %d files and connections can be open: %s", soft, error)
        return soft
    return hard


def most_clients() -> int:
    """Connections of clients that a router may hold: a quarter of what it may open is for workers, Redis and files."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit * 3 // 4
