"""Fuzzing a live fleet: mutated bodies (tests/system/fuzz.py runs more of them), and schemathesis on the document."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from penstock.fleet import Fleet
from penstock.router.openapi import OPERATIONS
from tests.system.fleets import assert_idle, fleet
from tests.system.fuzz import FLEET, POSTED, run
from tests.system.fuzz_bodies import VALID

pytestmark = pytest.mark.system

BODIES = 200
EXAMPLES = 5  # of each operation
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def running(checkpoints: dict[str, Path]) -> Iterator[Fleet]:
    with fleet(checkpoints["qwen2"], prefill_workers=1, **FLEET) as running:
        yield running


def test_what_is_mutated_is_valid(running: Fleet) -> None:
    assert VALID.keys() == POSTED.keys()
    for path, bodies in VALID.items():
        for body in bodies:
            answer = httpx.post(running.url + path, json=body, timeout=60)
            assert answer.status_code == 200, (path, body, answer.text)


def test_mutated_bodies(running: Fleet) -> None:
    seed = int(os.environ.get("FUZZ_SEED", time.time() // 86400))
    print(f"fuzz seed {seed}: repeat with FUZZ_SEED={seed}")
    report = run(seed, BODIES, running)
    assert sum(sum(statuses.values()) for statuses in report.answers.values()) == BODIES
    assert report.error_types and report.streams


def test_the_document_is_kept_to(running: Fleet) -> None:
    """What schemathesis makes of the OpenAPI document, valid and not, is answered as the document says."""
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) == len(OPERATIONS)
    for operation in operations:

        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            case.call_and_validate(timeout=60, checks=CHECKS)

        check()
    assert_idle(running)
