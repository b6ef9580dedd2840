"""`penstock` whose readers wait for a source as long as it takes: on a busy machine it may say nothing for seconds."""

from __future__ import annotations

from penstock.cli import main
from penstock.kv_transfer import reading


def wait_for_sources() -> None:
    """Give up no fetch of this process because its source is slow."""
    reading.PATIENCE_S = 60.0


if __name__ == "__main__":
    wait_for_sources()
    raise SystemExit(main())
