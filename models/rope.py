"""Rotary frequencies and their scalings: default, linear, dynamic NTK, llama3 and YaRN.

Sources: Su et al. 2021; position interpolation, Chen et al. 2023; YaRN and dynamic NTK, Peng et al. 2023; the Llama 3.1
report. Field names are those of config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.models.config_fields import ROPE_FIELDS, check_fields
from penstock.models.errors import ModelError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary parameters; those that `kind` does not use keep their defaults."""

    base: float
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0  # the context the model was first trained for
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0  # YaRN's attention factor: multiplies sine and cosine

    def longest_context(self, max_position: int) -> int:
        """The context that the scaling reaches, in tokens; `max_position` is what config.json says."""
        if self.kind in ("linear", "dynamic"):
            return int(max_position * self.factor)
        if self.kind == "yarn":
            return max(max_position, int(self.original_max_position * self.factor))
        return max_position

    def frequencies(self, head_dim: int, device: torch.device) -> Tensor:
        """float32 [head_dim / 2], in radians a token. For dynamic NTK: those of the original context."""
        plain = _plain(self.base, head_dim, device)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            return _llama3(self, plain)
        if self.kind == "yarn":
            return _yarn(self, plain, head_dim)
        return plain

    def frequencies_at(self, positions: Tensor, head_dim: int) -> Tensor:
        """Dynamic NTK: float32 [T, head_dim / 2], what a text that ends at each position asks for.

        A prompt longer than the original context is thus turned as if it had been decoded token by token: its keys do
        not depend on the prompt's length, so chunks and shared prefixes stay exact.
        """
        lengths = (positions + 1).clamp_min(self.original_max_position).double()
        stretch = self.factor * lengths / self.original_max_position - (self.factor - 1)
        bases = self.base * stretch ** (head_dim / (head_dim - 2))
        return (1.0 / bases[:, None] ** _exponents(head_dim, positions.device).double()).float()


def read_rope(config: Mapping[str, Any]) -> RopeSpec:
    """Rotary parameters of a config.json of either style.

    Raises:
        ModelError: a scaling kind without support, or a parameter it needs is missing or wrong.
    """
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    check_fields(given, ROPE_FIELDS)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in KINDS:
        raise ModelError(f"rope scaling {kind} is not supported; supported are {', '.join(KINDS)}")
    if (given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("partial_rotary_factor other than 1 is not supported")
    max_position = config.get("max_position_embeddings", 0)
    original = given.get("original_max_position_embeddings") or max_position
    needed = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ("factor",))
    if kind == "yarn" and given.get("factor") is None:
        given["factor"] = max_position / original
    if missing := [name for name in needed if given.get(name) is None]:
        raise ModelError(f"rope scaling {kind} needs {', '.join(missing)}")
    return RopeSpec(
        base=float(given.get("rope_theta") or config.get("rope_theta") or 10000.0),
        kind=kind,
        factor=float(given.get("factor") or 1.0),
        original_max_position=max_position if kind == "dynamic" else original,
        low_freq_factor=float(given.get("low_freq_factor") or 1.0),
        high_freq_factor=float(given.get("high_freq_factor") or 4.0),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=bool(given.get("truncate", True)),
        amplitude=_yarn_amplitude(given) if kind == "yarn" else 1.0,
    )


def _exponents(head_dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, head_dim, 2, device=device).float() / head_dim


def _plain(base: float, head_dim: int, device: torch.device) -> Tensor:
    return 1.0 / (base ** _exponents(head_dim, device))


def _llama3(rope: RopeSpec, plain: Tensor) -> Tensor:
    """Long waves are stretched, short ones kept, those between blended by how often they fit the old context."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeSpec, plain: Tensor, head_dim: int) -> Tensor:
    """Dimensions that turn more than beta_fast times over the old context are kept, below beta_slow interpolated."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    interpolated = ((torch.arange(len(plain), device=plain.device) - low) / width).clamp(0, 1)
    return plain / rope.factor * interpolated + plain * (1 - interpolated)


def _yarn_amplitude(given: Mapping[str, Any]) -> float:
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(given["factor"]) + 1.0 if given["factor"] > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return magnitude(given["mscale"]) / magnitude(given["mscale_all_dim"])
    return magnitude(1.0)
