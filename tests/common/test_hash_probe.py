"""The hashing probe: fixed, the engine's hashing passes it, and every difference that matters fails it."""

from __future__ import annotations

import msgspec
import pytest

from penstock.common.hash_probe import mismatch, probe_digest
from penstock.common.messages import GenerateRequest, WorkerInfo
from penstock.common.page_hash import page_hashes, root_hash
from penstock.common.sampling import SamplingParams
from penstock.engine.request import Request
from tests.worker_info import worker_info


def engine_hashes(scope: str, page_size: int, tokens: list[int], salt: str) -> list[bytes]:
    source = GenerateRequest(
        request_id="p", prompt_token_ids=tokens, sampling=SamplingParams(max_tokens=1), cache_salt=salt
    )
    return Request(source, 0.0).extend_hashes(scope, page_size, len(tokens))


def worker(page_size: int) -> WorkerInfo:
    return worker_info(
        page_size=page_size,
        hash_scope="scope",
        hash_probe=probe_digest(page_size, lambda tokens, salt: engine_hashes("scope", page_size, tokens, salt)),
    )


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
def test_engine_and_router_agree(page_size: int) -> None:
    assert mismatch(worker(page_size)) == ""
    assert mismatch(msgspec.structs.replace(worker(page_size), hash_probe="")) == ""


@pytest.mark.parametrize("change", [{"hash_scope": "other"}, {"page_size": 8}, {"hash_probe": "00"}])
def test_another_scope_page_size_or_code_is_said(change: dict[str, object]) -> None:
    reason = mismatch(msgspec.structs.replace(worker(4), **change))
    assert "hashes prompts differently" in reason and "same version" in reason


def test_a_salt_that_is_left_out_is_noticed() -> None:
    ours = worker(4)
    unsalted = probe_digest(4, lambda tokens, salt: list(page_hashes(root_hash("scope"), tokens, 4)))
    assert unsalted != ours.hash_probe and mismatch(msgspec.structs.replace(ours, hash_probe=unsalted))
