"""What fields of a config.json may hold. `spec` and `rope` ask here first and then read them without further care."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from penstock.models.errors import ModelError

_KINDS: dict[str, Callable[[Any], bool]] = {
    "a whole number": lambda value: type(value) is int and value >= 0,
    "a number": lambda value: type(value) in (int, float) and 0 <= value < math.inf,
    "an object": lambda value: isinstance(value, dict),
    "a list of texts": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
}
FIELDS = {
    "a whole number": ("num_key_value_heads", "head_dim", "sliding_window", "max_window_layers"),
    "a number": ("rms_norm_eps", "rope_theta", "partial_rotary_factor"),
    "an object": ("quantization_config", "rope_scaling", "rope_parameters"),
    "a list of texts": ("architectures", "layer_types"),
}
ROPE_FIELDS = {
    "a whole number": ("original_max_position_embeddings",),
    "a number": (
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "partial_rotary_factor",
    ),
}


def check_fields(config: Mapping[str, Any], fields: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ModelError unless every one of the fields is of its kind, null or absent."""
    for kind, names in fields.items():
        for name in names:
            value = config.get(name)
            if value is not None and not _KINDS[kind](value):
                raise ModelError(f"{name} must be {kind}, got {value!r}")
