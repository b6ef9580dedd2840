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
from penstock.kernels.rms_norm import Normed, as_tensor
from penstock.kernels.row_linear import RowProduct, row_linear, row_tiles_for
from penstock.kernels.small_linear import LinearWorkspace, Tiles, small_linear, tiles_for

# oneDNN lays a weight out for a number of rows. 16 is within noise of the best layout for 1 and for 128 rows too, and
# avoids the slow one that a hint of 128 gives short batches (1.0 against 0.3 ms for [1536, 1024] and 16 rows).
_ROWS_HINT = 16


class Linear(ABC):
    """A linear layer, its weight included. A `Normed` x is computed by the call: give it to one only."""

    @abstractmethod
    def __call__(self, x: Tensor | Normed, adapter: Tensor | None = None) -> Tensor:
        """x [T, in_features] -> [T, out_features]; adapter: int64 [T], which adapter each token uses, or None."""

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor | None:
        """Add the layer's result for x to `residual` in place and return None; or return it, still to be added."""
        return self(x)

    def gated(self, x: Tensor | Normed) -> Tensor:
        """silu(gate) * up, [T, out_features / 2]: the first half of the layer's result is the gate."""
        return silu_mul(self(x))

    def row(self, x: Tensor | Normed, *, gated: bool = False, rotated: bool = False) -> RowProduct | None:
        """What a launch of row_linear.py computes of x, for callers that have more for it to do; None: it cannot."""
        return None


class PlainLinear(Linear):
    """A dense weight [out_features, in_features] as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor | Normed, adapter: Tensor | None = None) -> Tensor:
        _reject(adapter)
        return F.linear(as_tensor(x), self._weight, self._bias)


class CudaLinear(PlainLinear):
    """A dense weight on CUDA: our own kernels for one row, and in half precision for few; else the library."""

    def __init__(self, weight: Tensor, bias: Tensor | None, workspace: LinearWorkspace) -> None:
        super().__init__(weight, bias)
        self._workspace = workspace
        self._outputs, self._columns = weight.shape

    def row(self, x: Tensor | Normed, *, gated: bool = False, rotated: bool = False) -> RowProduct | None:
        if isinstance(x, Normed):
            if x.delta is not None:
                return None
            values, norm, eps = x.residual, x.weight, x.eps
        else:
            values, norm, eps = x, None, 0.0
        if values.shape[0] != 1:
            return None
        outputs = self._outputs // 2 if gated else self._outputs
        tiles = row_tiles_for(outputs, self._columns, gated=gated, rotated=rotated)
        return None if tiles is None else RowProduct(values, self._weight, self._bias, tiles, norm, eps)

    def __call__(self, x: Tensor | Normed, adapter: Tensor | None = None) -> Tensor:
        _reject(adapter)
        row = self.row(x)
        if row is not None:
            return row_linear(row)
        x = as_tensor(x)
        tiles = self._tiles(x, gated=False)
        if tiles is None:
            return super().__call__(x)
        return small_linear(x, self._weight, self._bias, self._workspace, tiles)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor | None:
        row = self.row(x)
        if row is not None:
            row_linear(row, residual=residual)
            return None
        tiles = self._tiles(x, gated=False)
        if tiles is None:
            return super().__call__(x)
        small_linear(x, self._weight, self._bias, self._workspace, tiles, residual=residual)
        return None

    def gated(self, x: Tensor | Normed) -> Tensor:
        row = self.row(x, gated=True)
        if row is not None:
            return row_linear(row, gated=True)
        x = as_tensor(x)
        tiles = self._tiles(x, gated=True)
        if tiles is None:
            return silu_mul(super().__call__(x))
        return small_linear(x, self._weight, self._bias, self._workspace, tiles, gated=True)

    def _tiles(self, x: Tensor, *, gated: bool) -> Tiles | None:
        if x.dtype == torch.float32:
            return None
        return tiles_for(x.shape[0], self._outputs // 2 if gated else self._outputs, self._columns, gated)


class PackedLinear(Linear):
    """A dense weight in oneDNN's blocked layout: at 1 to 16 rows a third to two thirds faster than the plain one."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        self._bias = bias

    def __call__(self, x: Tensor | Normed, adapter: Tensor | None = None) -> Tensor:
        _reject(adapter)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(as_tensor(x), self._weight, self._bias, "none", [], "")
        return out


def make_linear(weight: Tensor, bias: Tensor | None, workspace: LinearWorkspace | None = None) -> Linear:
    """The fastest layer for a weight where it lies. The weight may be copied: drop yours to free its memory.

    workspace: shared by the layers of a model, which run one after the other; without one, no kernels of ours are used.
    """
    if can_pack(weight):
        return PackedLinear(weight, bias)
    if workspace is not None and use_triton(weight):
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
