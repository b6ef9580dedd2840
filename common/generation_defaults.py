"""Sampling defaults that a model brings along in generation_config.json.

`--generation-config auto` reads the model's folder, `vllm` means neutral values, anything else is a folder. Used by
the router and by `LLM` for fields that a request leaves out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from penstock.common.errors import ConfigError
from penstock.common.sampling import SamplingParams
from penstock.common.tokenizer import model_folder


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Values for absent fields; None where the model does not say. `max_new_tokens` caps only an open `max_tokens`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    @classmethod
    def load(cls, model: str, source: str = "auto") -> GenerationDefaults:
        """Defaults of `model` as `--generation-config SOURCE` asks.

        Raises:
            ConfigError: the file cannot be parsed or holds a value out of range, or a named folder has no such file.
        """
        if source == "vllm":
            return cls()
        folder = model_folder(model) if source == "auto" else Path(source)
        path = folder / "generation_config.json"
        if not path.is_file():
            if source != "auto":
                raise ConfigError(f"--generation-config: {folder} has no generation_config.json")
            return cls()
        try:
            defaults = msgspec.json.decode(path.read_bytes(), type=cls)
            SamplingParams(**defaults.sampling(), max_tokens=defaults.max_new_tokens)
        except (msgspec.DecodeError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from error
        return defaults

    def sampling(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that the model sets."""
        named = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        return {name: value for name, value in named.items() if value is not None}
