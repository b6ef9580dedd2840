"""From names to checkpoints and classes."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch

from penstock.models import registry, spec
from penstock.models.decoder import CausalLM
from penstock.models.errors import ModelError
from penstock.models.registry import load_model, register, resolve_checkpoint
from penstock.models.spec import Traits, read_spec


def test_a_directory_is_its_own_checkpoint(checkpoints: dict[str, Path]) -> None:
    assert resolve_checkpoint(str(checkpoints["llama"])) == checkpoints["llama"]


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve_checkpoint(str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such/directory", "someone/no-such-model-here"])
def test_what_cannot_be_had_is_named(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=f"{model} is no directory, and could not be had from the hub"):
        resolve_checkpoint(model)


def test_a_hub_id_brings_only_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "penstock")
    calls: list[tuple[str, list[str]]] = []

    def download(model: str, allow_patterns: list[str]) -> str:
        calls.append((model, allow_patterns))
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_checkpoint("someone/model") == tmp_path
    ((model, patterns),) = calls
    assert model == "someone/model"
    assert "downloaded from the Hugging Face hub" in caplog.text, "it may take long"
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".pth", ".gguf", "*")) for pattern in patterns)


def test_an_architecture_can_be_added(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Novel(CausalLM):
        pass

    config = (checkpoints["qwen3"] / "config.json").read_text().replace("Qwen3ForCausalLM", "NovelForCausalLM")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match="NovelForCausalLM is not supported"):
        read_spec(tmp_path)
    monkeypatch.setattr(spec, "TRAITS", spec.TRAITS.copy())
    monkeypatch.setattr(registry, "TRAITS", spec.TRAITS)
    monkeypatch.setattr(registry, "_CLASSES", registry._CLASSES.copy())
    register("NovelForCausalLM", Novel, Traits(qk_norm=True))
    novel = read_spec(tmp_path)
    model = load_model(checkpoints["qwen3"], novel, dtype=torch.float32, device=torch.device("cpu"))
    assert type(model) is Novel


def test_load_format_is_checked(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["llama"]
    with pytest.raises(ValueError, match="load_format must be auto or dummy, got 'gguf'"):
        load_model(path, read_spec(path), dtype=torch.float32, device=torch.device("cpu"), load_format="gguf")
