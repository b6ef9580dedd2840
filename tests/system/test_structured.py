"""Outputs with a form from real fleets (see structured.py): refused, or exactly followed, whoever dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.structured import check, run

SCHEMAS = 25

pytestmark = pytest.mark.system


def test_outputs_follow_their_schemas_in_every_fleet(checkpoints: dict[str, Path]) -> None:
    one_worker = run(checkpoints["llama"], "one worker", SCHEMAS)
    assert check(one_worker)["stop"] >= SCHEMAS // 3
    assert run(checkpoints["llama"], "a decode worker killed", SCHEMAS) == one_worker
