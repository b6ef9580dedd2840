"""`penstock` with workers that run a step ahead, as on a GPU."""

from __future__ import annotations

from typing import Any

from penstock.cli import main
from penstock.engine.core import Engine
from tests.engine.late import Late

_init = Engine.__init__


def _init_late(self: Engine, *args: Any, **options: Any) -> None:
    _init(self, *args, **options)
    self.executor = Late(self.executor, 1)


if __name__ == "__main__":
    Engine.__init__ = _init_late  # type: ignore[method-assign]
    raise SystemExit(main())
