"""One small offline `LLM` for all tests of a module."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock import LLM
from tests.penstock.offline import OPTIONS, assert_empty


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with sampling defaults and a second end-of-text id, the way chat models have them."""
    path = tmp_path_factory.mktemp("llm") / "model"
    shutil.copytree(checkpoints["qwen2"], path)
    settings = {"temperature": 0.0, "top_k": 7, "repetition_penalty": 1.25}
    (path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [1]}))
    return path


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[LLM]:
    llm = LLM(str(model), **OPTIONS)
    yield llm
    llm.close()


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The shared `LLM`, whose engine must be empty when the test ends."""
    yield shared
    assert_empty(shared)
