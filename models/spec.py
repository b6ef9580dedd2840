"""What a checkpoint's config.json says of its decoder, in one frozen record. Read by the engine and the decoder.

Both spellings of config.json are understood: transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5
(rope_parameters, dtype). The ids that end a text stand in generation_config.json, too: chat models name more of them
there. Whatever the decoder cannot do is refused here, by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penstock.models.config_fields import FIELDS, check_fields
from penstock.models.errors import ModelError
from penstock.models.rope import RopeSpec, read_rope

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int  # longest context in tokens, rope scaling included
    rms_eps: float
    rope: RopeSpec
    sliding_windows: tuple[int | None, ...]  # a layer's window in tokens, or None: it sees everything
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: str  # torch's name of the checkpoint's type
    eos_token_ids: tuple[int, ...]  # below vocab_size


@dataclass(frozen=True)
class Traits:
    """What an architecture's name implies and config.json does not repeat."""

    qkv_bias: bool | None = None  # None: config.json's attention_bias, which then covers the output projection too
    qk_norm: bool = False
    mlp_bias: bool = False  # whether config.json's mlp_bias counts
    windows: str = "none"  # which layers slide: none, all, or upper (use_sliding_window and max_window_layers)
    head_dim: int | None = None  # where config.json gives none; None: hidden_size / num_attention_heads


_WINDOW = 4096  # where config.json does not say, as in transformers; null there is none

TRAITS: dict[str, Traits] = {
    "LlamaForCausalLM": Traits(mlp_bias=True),
    "MistralForCausalLM": Traits(qkv_bias=False, windows="all"),
    "Qwen2ForCausalLM": Traits(qkv_bias=True, windows="upper"),
    "Qwen3ForCausalLM": Traits(qk_norm=True, windows="upper", head_dim=128),
}


def read_spec(path: Path) -> ModelSpec:
    """Read `path`/config.json, and the end-of-text ids of generation_config.json if there is one.

    Raises:
        ModelError: no readable config.json, an architecture or a feature without support, a field missing or wrong.
    """
    file = path / "config.json"
    try:
        spec = parse_spec(_read_object(file))
        file = path / "generation_config.json"
        if not file.exists():
            return spec
        ids = spec.eos_token_ids + _eos_token_ids(_read_object(file), spec.vocab_size)
        return replace(spec, eos_token_ids=tuple(dict.fromkeys(ids)))
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error


def parse_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The record of a parsed config.json; errors as `read_spec`."""
    check_fields(config, FIELDS)
    names = config.get("architectures") or ["(none given)"]
    traits = TRAITS.get(names[0])
    if traits is None:
        raise ModelError(f"architecture {names[0]} is not supported; supported are {', '.join(sorted(TRAITS))}")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"quantised checkpoints are not supported (quant_method {method})")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"activation {config['hidden_act']} is not supported; silu is")
    num_layers, hidden_size = _count(config, "num_hidden_layers"), _count(config, "hidden_size")
    num_heads = _count(config, "num_attention_heads")
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ModelError(f"{num_heads} attention heads are no multiple of {num_kv_heads} key-value heads")
    max_position = _count(config, "max_position_embeddings")
    rope = read_rope(config)
    attention_bias = bool(config.get("attention_bias", False)) and traits.qkv_bias is None
    return ModelSpec(
        architecture=names[0],
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=_count(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.get("head_dim") or traits.head_dim or hidden_size // num_heads,
        vocab_size=_count(config, "vocab_size"),
        max_position=rope.longest_context(max_position),
        rms_eps=float(1e-6 if config.get("rms_norm_eps") is None else config["rms_norm_eps"]),
        rope=rope,
        sliding_windows=_windows(config, traits.windows, num_layers),
        qkv_bias=attention_bias if traits.qkv_bias is None else traits.qkv_bias,
        output_bias=attention_bias,
        mlp_bias=traits.mlp_bias and bool(config.get("mlp_bias", False)),
        qk_norm=traits.qk_norm,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=_dtype(config),
        eos_token_ids=_eos_token_ids(config, _count(config, "vocab_size")),
    )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError("holds no JSON object")
    return found


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{name} must be a positive whole number, got {value!r}")
    return value


def _windows(config: Mapping[str, Any], rule: str, num_layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window", _WINDOW)
    if rule == "none" or window is None or (rule == "upper" and not config.get("use_sliding_window", False)):
        return (None,) * num_layers
    if rule == "all":
        return (window,) * num_layers
    first = 28 if config.get("max_window_layers") is None else config["max_window_layers"]
    kinds = config.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (num_layers - first)
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ModelError(f"layer_types {', '.join(sorted(unknown))} are not supported")
    if len(kinds) < num_layers:
        raise ModelError(f"layer_types names {len(kinds)} of {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:num_layers])


def _dtype(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"dtype {name} is not supported; supported are {', '.join(DTYPES)}")
    return name


def _eos_token_ids(config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Those that the model can draw: some checkpoints name tokens that only their tokenizer has."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise ModelError(f"eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)
