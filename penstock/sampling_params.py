"""Sampling parameters under the module name that vLLM has for them."""

from penstock.common.sampling import SamplingParams
from penstock.common.structured_outputs import StructuredOutputsParams

__all__ = ["SamplingParams", "StructuredOutputsParams"]
