"""`python -m penstock.entrypoints.openai.api_server --model MODEL`: `penstock serve`, by the name that vLLM has."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from penstock.cli import main as run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped; the exit status."""
    return run_command(["serve", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
