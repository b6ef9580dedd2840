"""The forms of an op that a test of kernels goes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet

from penstock.kernels.launch import INTERPRETED


def variants(op: Callable[..., Any], kernel: Callable[..., Any]) -> list[ParameterSet]:
    """(function, device) of the op on CPU, of its Triton launcher in the interpreter, and of the op on a GPU."""
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    compiled = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
    return [
        pytest.param(op, "cpu", id="reference"),
        pytest.param(kernel, "cpu", id="interpreter", marks=compiled),
        pytest.param(op, "cuda", id="cuda", marks=[pytest.mark.gpu, no_gpu]),
    ]
