"""Reading safetensors: an 8-byte length, a JSON header of that length, then the tensors' bytes.

Format: https://github.com/huggingface/safetensors. Read here, rather than by the `safetensors` package, because that
one maps the file, and the mapped pages would double the memory in use while a model loads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.models.errors import ModelError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    def copy_to(self, target: Tensor, buffer: Tensor) -> None:
        """Copy into the flat `target` of any type and device, by way of `buffer` (uint8, at least one element)."""
        start = 0
        for piece in self._pieces(buffer):
            target[start : start + len(piece)].copy_(piece)
            start += len(piece)

    def equals(self, other: StoredTensor, dtype: torch.dtype, buffer: Tensor) -> bool:
        """Whether both are the same tensor once they are of type `dtype`; `buffer` as for `copy_to`."""
        if self.shape != other.shape:
            return False
        count = buffer.nbytes // max(self.dtype.itemsize, other.dtype.itemsize)
        mine = self._pieces(buffer[: count * self.dtype.itemsize])
        theirs = other._pieces(torch.empty(count * other.dtype.itemsize, dtype=torch.uint8))
        return all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in zip(mine, theirs, strict=True))

    def _pieces(self, buffer: Tensor) -> Iterator[Tensor]:
        """The elements in order, as many at a time as fit into `buffer`, where each piece gives way to the next."""
        step = buffer.nbytes // self.dtype.itemsize
        staging = buffer[: step * self.dtype.itemsize].view(self.dtype)
        window = memoryview(buffer.numpy().data)
        left = math.prod(self.shape)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while left:
                count = min(step, left)
                self._fill(file, window[: count * self.dtype.itemsize])
                yield staging[:count]
                left -= count

    def _fill(self, file: Any, window: memoryview) -> None:
        filled = 0
        while filled < len(window):
            read = file.readinto(window[filled:])
            if not read:
                raise ModelError(f"{self.file} ends inside {self.name}")
            filled += read


class SafetensorsFile:
    """The header of one file, checked against the file's size.

    Raises:
        ModelError: the file cannot be read, is cut off, or its header is broken or names an unsupported type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size_bytes = path.stat().st_size
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                if header_bytes > min(_MAX_HEADER_BYTES, size_bytes - 8):
                    raise ModelError(f"{path} is cut off or no safetensors file: its header does not fit")
                header = json.loads(file.read(header_bytes))
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ModelError(f"{path} is no safetensors file: {error}") from error
        if not isinstance(header, dict):
            raise ModelError(f"{path} is no safetensors file: its header is no JSON object")
        header.pop("__metadata__", None)
        self.tensors = {name: self._entry(name, entry, 8 + header_bytes) for name, entry in header.items()}
        for stored in self.tensors.values():
            if stored.offset + stored.size_bytes > size_bytes:
                raise ModelError(f"{path} is cut off: {stored.name} reaches past its {size_bytes} bytes")

    def _entry(self, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
        try:
            dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            first, last = entry["data_offsets"]
            size_bytes = last - first
        except (TypeError, KeyError, ValueError) as error:
            raise ModelError(f"{self.path}: the header's entry of {name} is broken") from error
        if dtype is None:
            raise ModelError(f"{self.path}: {name} has type {entry['dtype']}; supported are {', '.join(_DTYPES)}")
        if first < 0 or size_bytes != math.prod(shape) * dtype.itemsize:
            raise ModelError(f"{self.path}: {name} of shape {list(shape)} cannot have {size_bytes} bytes")
        return StoredTensor(self.path, name, dtype, shape, start + first, size_bytes)
