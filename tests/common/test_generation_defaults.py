"""generation_config.json as defaults: read, switched off, elsewhere, broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.common.errors import ConfigError
from penstock.common.generation_defaults import GenerationDefaults

CONFIG = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "do_sample": True,
    "eos_token_id": [1, 2],
    "max_new_tokens": 77,
}


def test_the_models_file_is_read_unless_switched_off(tmp_path: Path) -> None:
    assert GenerationDefaults.load(str(tmp_path)).sampling() == {}
    (tmp_path / "generation_config.json").write_text(json.dumps(CONFIG))
    defaults = GenerationDefaults.load(str(tmp_path))
    assert defaults.sampling() == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    assert defaults.max_new_tokens == 77
    assert GenerationDefaults.load(str(tmp_path), "vllm") == GenerationDefaults()
    assert GenerationDefaults.load("anything", str(tmp_path)) == defaults


@pytest.mark.parametrize("content", ["{", '{"temperature": "hot"}', '{"top_p": 3.0}'])
def test_a_broken_file_is_a_config_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        GenerationDefaults.load(str(tmp_path))


def test_a_named_folder_must_have_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no generation_config"):
        GenerationDefaults.load("anything", str(tmp_path))
