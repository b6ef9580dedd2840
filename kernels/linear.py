"""Linear layers as method objects: how x @ weight.T + bias is computed is the object's business, not the model's.

`make_linear` picks the method for a weight. Quantised and parallel layers will be further classes with this call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.gated_activation import silu_mul
from penstock.kernels.launch import use_triton
from penstock.kernels.small_linear import LinearWorkspace, small_linear, tiles_for

# oneDNN lays a weight out for a number of rows. 16 is within noise of the best layout for 1 and for 128 rows too, and
# avoids the slow one that a hint of 128 gives short batches (1.0 against 0.3 ms for [1536, 1024] and 16 rows).
_ROWS_HINT = 16


class Linear(ABC):
    """A linear layer, its weight included."""

    @abstractmethod
    def __call__(self, x: Tensor, adapter: Tensor | None = None) -> Tensor:
        """x [T, in_features] -> [T, out_features]; adapter: int64 [T], which adapter each token uses, or None."""

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor | None:
        """Add the layer's result for x to `residual` in place and return None; or return it, still to be added."""
        return self(x)

    def gated(self, x: Tensor) -> Tensor:
        """silu(gate) * up, [T, out_features / 2]: the first half of the layer's result is the gate."""
        return silu_mul(self(x))


class PlainLinear(Linear):
    """A dense weight [out_features, in_features] as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor, adapter: Tensor | None = None) -> Tensor:
        _reject(adapter)
        return F.linear(x, self._weight, self._bias)


class CudaLinear(PlainLinear):
    """A dense weight in half precision on CUDA: our own kernel for few rows where that is faster, else the library."""

    def __init__(self, weight: Tensor, bias: Tensor | None, workspace: LinearWorkspace) -> None:
        super().__init__(weight, bias)
        self._workspace = workspace
        self._outputs, self._columns = weight.shape

    def __call__(self, x: Tensor, adapter: Tensor | None = None) -> Tensor:
        tiles = tiles_for(x.shape[0], self._outputs, self._columns, False)
        if tiles is None:
            return super().__call__(x, adapter)
        _reject(adapter)
        return small_linear(x, self._weight, self._bias, self._workspace, tiles)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor | None:
        tiles = tiles_for(x.shape[0], self._outputs, self._columns, False)
        if tiles is None:
            return super().__call__(x)
        small_linear(x, self._weight, self._bias, self._workspace, tiles, residual=residual)
        return None

    def gated(self, x: Tensor) -> Tensor:
        tiles = tiles_for(x.shape[0], self._outputs // 2, self._columns, True)
        if tiles is None:
            return silu_mul(super().__call__(x))
        return small_linear(x, self._weight, self._bias, self._workspace, tiles, gated=True)


class PackedLinear(Linear):
    """A dense weight in oneDNN's blocked layout: at 1 to 16 rows a third to two thirds faster than the plain one."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        self._bias = bias

    def __call__(self, x: Tensor, adapter: Tensor | None = None) -> Tensor:
        _reject(adapter)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


def make_linear(weight: Tensor, bias: Tensor | None, workspace: LinearWorkspace | None = None) -> Linear:
    """The fastest layer for a weight where it lies. The weight may be copied: drop yours to free its memory.

    workspace: shared by the layers of a model, which run one after the other; without one, no kernels of ours are used.
    """
    if can_pack(weight):
        return PackedLinear(weight, bias)
    if workspace is not None and use_triton(weight) and weight.dtype in (torch.bfloat16, torch.float16):
        return CudaLinear(weight, bias, workspace)
    return PlainLinear(weight, bias)


def can_pack(weight: Tensor) -> bool:
    """Whether this processor's oneDNN computes in the weight's type at full speed."""
    if not weight.is_cpu or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32


def _reject(adapter: Tensor | None) -> None:
    if adapter is not None:
        raise ValueError("this layer has no adapters")
