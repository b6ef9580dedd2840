"""Penstock: a serving system for large language models with prefill and decode in separate workers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from penstock.common.version import __version__

if TYPE_CHECKING:
    from penstock.async_llm import AsyncLLM, AsyncLLMEngine
    from penstock.common.beam_search import BeamSearchParams
    from penstock.common.sampling import SamplingParams
    from penstock.common.structured_outputs import StructuredOutputsParams
    from penstock.engine_args import AsyncEngineArgs, EngineArgs
    from penstock.llm import LLM
    from penstock.results import CompletionOutput, RequestOutput

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineArgs",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


_HOMES = {
    "AsyncEngineArgs": "engine_args",
    "AsyncLLM": "async_llm",
    "AsyncLLMEngine": "async_llm",
    "BeamSearchParams": "common.beam_search",
    "CompletionOutput": "results",
    "EngineArgs": "engine_args",
    "LLM": "llm",
    "RequestOutput": "results",
    "SamplingParams": "common.sampling",
    "StructuredOutputsParams": "common.structured_outputs",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the router and `penstock --help` must not pay for torch."""
    if name in _HOMES:
        return getattr(import_module(f"penstock.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")
