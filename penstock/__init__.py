"""Penstock: a serving system for large language models with prefill and decode in separate workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock.common.version import __version__

if TYPE_CHECKING:
    from penstock.common.beam_search import BeamSearchParams
    from penstock.common.sampling import SamplingParams
    from penstock.common.structured_outputs import StructuredOutputsParams
    from penstock.llm import LLM
    from penstock.results import CompletionOutput, RequestOutput

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import on first use: the router and `penstock --help` must not pay for torch."""
    if name == "SamplingParams":
        from penstock.common.sampling import SamplingParams

        return SamplingParams
    if name == "StructuredOutputsParams":
        from penstock.common.structured_outputs import StructuredOutputsParams

        return StructuredOutputsParams
    if name == "BeamSearchParams":
        from penstock.common.beam_search import BeamSearchParams

        return BeamSearchParams
    if name in __all__:
        from penstock import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")
