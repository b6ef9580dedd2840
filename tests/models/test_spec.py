"""config.json in both styles, and everything that must be refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from penstock.models.errors import ModelError
from penstock.models.rope import RopeSpec, read_rope
from penstock.models.spec import parse_spec, read_spec
from tests.tiny_models import FAMILIES, make_checkpoint

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 4, "sliding_window": 32}


def test_defaults_of_a_bare_config() -> None:
    spec = parse_spec(LLAMA)
    assert (spec.num_kv_heads, spec.head_dim, spec.rms_eps, spec.dtype) == (4, 16, 1e-6, "float32")
    assert spec.rope == RopeSpec(base=10000.0, original_max_position=512)
    assert spec.sliding_windows == (None, None)
    assert spec.eos_token_ids == ()
    assert not (spec.qkv_bias or spec.output_bias or spec.mlp_bias or spec.qk_norm or spec.tie_word_embeddings)


def test_both_styles_of_config_mean_the_same() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 256
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": "bfloat16", "eos_token_id": [1, 2]}
    new = LLAMA | {"rope_parameters": scaling | {"rope_theta": 5e5}, "dtype": "bfloat16", "eos_token_id": [1, 2]}
    assert parse_spec(old) == parse_spec(new)
    assert parse_spec(old).rope.base == 5e5
    assert parse_spec(old).dtype == "bfloat16"
    assert parse_spec(old).eos_token_ids == (1, 2)


def test_null_is_as_good_as_absent() -> None:
    names = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "partial_rotary_factor", "layer_types")
    assert parse_spec(LLAMA | dict.fromkeys(names)) == parse_spec(LLAMA)
    sliding = QWEN2 | {"use_sliding_window": True}
    assert parse_spec(sliding | {"max_window_layers": None}) == parse_spec(sliding)


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_writes(tmp_path: Path, family: str) -> None:
    spec = read_spec(make_checkpoint(family, tmp_path))
    assert spec.architecture.lower().startswith(family)
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads) == (3, 64, 4, 2)
    assert spec.head_dim == {"llama": 16, "mistral": 24, "qwen2": 16, "qwen3": 32}[family]
    assert spec.sliding_windows == ((24,) * 3 if family == "mistral" else (None,) * 3)
    assert (spec.qkv_bias, spec.qk_norm, spec.tie_word_embeddings) == (
        family == "qwen2",
        family == "qwen3",
        family == "qwen2",
    )


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({}, (None, None, None, None)),
        ({"use_sliding_window": True}, (None, None, None, None)),  # max_window_layers is 28 by default
        ({"use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 32)),
        ({"use_sliding_window": True, "max_window_layers": 0}, (32, 32, 32, 32)),
        ({"use_sliding_window": False, "max_window_layers": 0}, (None, None, None, None)),
        (
            {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2},
            (None, 32, None, 32),
        ),
    ],
)
def test_windows_of_qwen(change: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert parse_spec(QWEN2 | change).sliding_windows == windows


def test_qwens_that_name_no_window_have_the_one_of_transformers() -> None:
    config = {name: value for name, value in QWEN2.items() if name != "sliding_window"}
    assert parse_spec(config | {"use_sliding_window": True, "max_window_layers": 3}).sliding_windows[3] == 4096
    assert parse_spec(config).sliding_windows == (None,) * 4


def test_mistral_without_a_window() -> None:
    spec = parse_spec(LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": None})
    assert spec.sliding_windows == (None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, Mis",
        ),
        ({"architectures": None}, "none given"),
        ({"hidden_size": None}, "hidden_size must be a positive whole number, got None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number, got 0"),
        ({"num_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn"),
        (
            {"rope_scaling": {"type": "longrope"}},
            "rope scaling longrope is not supported; supported are default, linear",
        ),
        ({"rope_scaling": {"type": "linear"}}, "linear needs factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs low_freq_factor, high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"max_position_embeddings": None, "rope_scaling": {"type": "yarn"}}, "max_position_embeddings must be"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number, got '1e-6'"),
        ({"num_key_value_heads": "4"}, "num_key_value_heads must be a whole number, got '4'"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of texts"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor must be a number, got '2'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": float("inf")}}, "factor must be a number, got inf"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method awq"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    with pytest.raises(ModelError, match=message) as caught:
        read_spec(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "no JSON object")]
)
def test_unreadable_config(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("config_ids", "generation_ids", "expected"),
    [
        (1, None, (1,)),  # no generation_config.json
        (1, {}, (1,)),
        (1, {"eos_token_id": 1}, (1,)),
        (1, {"eos_token_id": 2}, (1, 2)),
        (3, {"eos_token_id": [1, 2, 3]}, (3, 1, 2)),  # Llama 3 Instruct
        ([1, 2], {"eos_token_id": None}, (1, 2)),
        (None, {"eos_token_id": [7, 8]}, (7, 8)),
        ([1, -1], {"eos_token_id": [2, LLAMA["vocab_size"]]}, (1, 2)),  # the tokenizer may have more
    ],
)
def test_end_of_text_is_in_both_files(
    tmp_path: Path, config_ids: Any, generation_ids: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": config_ids}))
    if generation_ids is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_ids))
    assert read_spec(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ('{"eos_token_id": ["</s>"]}', "eos_token_id must")]
)
def test_broken_generation_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=f"generation_config.json: .*{message}"):
        read_spec(tmp_path)


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 20.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.8, "truncate": False},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_frequencies_equal_hugging_face(scaling: dict[str, Any], head_dim: int) -> None:
    given = scaling | {"rope_theta": 20000.0}
    if scaling["rope_type"] != "linear":
        given["original_max_position_embeddings"] = 1024
    config = LlamaConfig(max_position_embeddings=8192, head_dim=head_dim, rope_parameters=dict(given))
    expected, amplitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    rope = read_rope({"max_position_embeddings": 8192, "rope_parameters": given})
    torch.testing.assert_close(rope.frequencies(head_dim, torch.device("cpu")), expected, rtol=1e-6, atol=0)
    assert rope.amplitude == pytest.approx(amplitude)


def test_dynamic_frequencies_are_those_of_the_text_so_far() -> None:
    given = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = LlamaConfig(max_position_embeddings=64, head_dim=16, rope_parameters=dict(given))
    rope = read_rope({"max_position_embeddings": 64, "rope_parameters": given})
    positions = torch.tensor([0, 63, 64, 200])
    for row, position in zip(rope.frequencies_at(positions, 16), positions.tolist(), strict=True):
        expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=position + 1)
        torch.testing.assert_close(row, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 512),
        ({"type": "linear", "factor": 4.0}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 512),
    ],
)
def test_longest_context(scaling: dict[str, Any] | None, longest: int) -> None:
    assert parse_spec(LLAMA | {"rope_scaling": scaling}).max_position == longest
