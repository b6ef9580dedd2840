"""The text probe, on real files: a tokenizer written twice is one, every difference that reaches the model is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from penstock.common.messages import WorkerInfo
from penstock.common.text_probe import TextProbe
from penstock.common.tokenizer import Tokenizer
from tests.common.test_hash_probe import worker
from tests.tiny_tokenizers import SETTINGS, byte_level_backend


def write(folder: Path, spec: dict[str, Any], settings: dict[str, Any], indent: int | None = None) -> TextProbe:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec, indent=indent))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=indent))
    return TextProbe.of(Tokenizer.load(str(folder)))


def announced(probe: TextProbe) -> WorkerInfo:
    return msgspec.structs.replace(worker(4), tokenizer_probe=probe.tokenizer, template_probe=probe.template)


@pytest.fixture
def spec() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(byte_level_backend().to_str())
    return found


def test_one_tokenizer_written_in_two_ways_is_one(tmp_path: Path, spec: dict[str, Any]) -> None:
    ours = write(tmp_path / "a", spec, SETTINGS)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in spec["model"]["merges"]]
    older = {**spec, "model": {**spec["model"], "merges": merges}}  # as files were written until 2024
    older["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    settings = {name: value for name, value in SETTINGS.items() if name != "chat_template"}
    theirs_folder = tmp_path / "b"
    theirs_folder.mkdir()
    (theirs_folder / "chat_template.jinja").write_text(SETTINGS["chat_template"])
    (theirs_folder / "tokenizer.json").write_text(json.dumps(older, indent=2))
    (theirs_folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    theirs = TextProbe.of(Tokenizer.load(str(theirs_folder)))
    assert ours == theirs and ours.tokenizer and ours.template
    assert ours.refusal(announced(theirs)) == ours.warning(announced(theirs)) == ""


def _swapped(backend: tokenizers.Tokenizer) -> None:
    """Two tokens of one length, as after another training, have each other's ids."""
    model = json.loads(backend.to_str())["model"]
    vocab = dict(model["vocab"])
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    backend.model = models.BPE(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]])


def _fewer_merges(backend: tokenizers.Tokenizer) -> None:
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"] if pair != ["h", "e"] and pair != ["Ġ", "t"]]
    backend.model = models.BPE(vocab=model["vocab"], merges=merges)


def _composed(backend: tokenizers.Tokenizer) -> None:
    backend.normalizer = normalizers.NFC()


def _split_otherwise(backend: tokenizers.Tokenizer) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, level])


def _begun(backend: tokenizers.Tokenizer) -> None:
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])


@pytest.mark.parametrize("change", [_swapped, _fewer_merges, _composed, _split_otherwise, _begun])
def test_another_tokenizer_is_refused(
    tmp_path: Path, spec: dict[str, Any], change: Callable[[tokenizers.Tokenizer], None]
) -> None:
    ours = write(tmp_path / "a", spec, SETTINGS)
    changed = tokenizers.Tokenizer.from_str(json.dumps(spec))
    change(changed)
    theirs = write(tmp_path / "b", json.loads(changed.to_str()), SETTINGS)
    reason = ours.refusal(announced(theirs))
    assert "its tokenizer is another" in reason and "--tokenizer" in reason
    assert ours.warning(announced(theirs)) == "", "the template is the same"


def test_a_setting_beside_the_tokenizer_counts(tmp_path: Path, spec: dict[str, Any]) -> None:
    ours = write(tmp_path / "a", spec, SETTINGS)
    theirs = write(tmp_path / "b", spec, {**SETTINGS, "add_bos_token": True})
    assert ours.refusal(announced(theirs))


@pytest.mark.parametrize(
    "settings",
    [
        {**SETTINGS, "chat_template": SETTINGS["chat_template"].replace("\n", "")},
        {**SETTINGS, "eos_token": "<s>"},
        {**SETTINGS, "chat_template": [{"name": "tool_use", "template": SETTINGS["chat_template"]}]},
    ],
)
def test_another_template_is_said(tmp_path: Path, spec: dict[str, Any], settings: dict[str, Any]) -> None:
    ours = write(tmp_path / "a", spec, SETTINGS)
    theirs = write(tmp_path / "b", spec, settings)
    assert ours.refusal(announced(theirs)) == ""
    assert "chat template" in ours.warning(announced(theirs)) and "--chat-template" in ours.warning(announced(theirs))


def test_what_is_missing_or_passed_over_is_not_compared(tmp_path: Path, spec: dict[str, Any]) -> None:
    ours = write(tmp_path / "a", spec, SETTINGS)
    bare = write(tmp_path / "b", spec, {"eos_token": "<|im_end|>"})
    assert bare.template == "" and ours.warning(announced(bare)) == ""
    assert ours.refusal(announced(TextProbe())) == TextProbe().refusal(announced(ours)) == ""
    told_otherwise = TextProbe.of(Tokenizer.load(str(tmp_path / "a")), with_template=False)
    assert (told_otherwise.tokenizer, told_otherwise.template) == (ours.tokenizer, "")
