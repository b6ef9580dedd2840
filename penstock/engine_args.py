"""Keyword arguments of `LLM` and `AsyncLLM`: names of Penstock's options, and what of vLLM's says nothing new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from typing import Any

from penstock.common.config import EngineConfig, ServeConfig
from penstock.common.config_loader import nearest
from penstock.common.vllm_options import VALUES, foreign_option

FLEET_ONLY = frozenset(f.name for f in fields(ServeConfig)) - {f.name for f in fields(EngineConfig)}
"""Options that say how a fleet is made, not an engine."""
_OF_LLM = ("tokenizer", "generation_config", "skip_tokenizer_init", "chat_template")


class EngineArgs:
    """The arguments of an `LLM`, checked: for vLLM's `from_engine_args`.

    Raises:
        ValueError: an option that does not exist, or cannot be had; the message says why.
    """

    def __init__(self, model: str | PathLike[str], **options: Any) -> None:
        self.model = model
        self.options = {name: value for name, value in options.items() if name in _OF_LLM}
        self.options |= supported({name: value for name, value in options.items() if name not in _OF_LLM})


AsyncEngineArgs = EngineArgs


def supported(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options in Penstock's words, without those of vLLM's that ask for what is the case anyway.

    Raises:
        ValueError: as `EngineArgs`.
    """
    known = {f.name for f in fields(ServeConfig)}
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name in known:
            if value is None:
                continue  # the default, as in vLLM
            key = name, str(value).lower()
            if key not in VALUES:
                found[name] = str(value) if name == "device" else value  # torch has a type for it
            elif VALUES[key] is not None:
                found[name] = VALUES[key]
        elif foreign := foreign_option(name.replace("_", "-")):
            if value is not None and (refusal := foreign.refusal(str(value))):
                raise ValueError(f"{name}={value!r} is {refusal}")
        else:
            engine = ", ".join(sorted(f.name for f in fields(EngineConfig)))
            raise ValueError(f"unknown option {name}{nearest(name, known) or f'; known are {engine}'}")
    return found
