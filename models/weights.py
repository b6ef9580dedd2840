"""Filling a model's weights from safetensors files, or with random numbers, in a stream.

Peak host memory is the model plus one buffer: bytes are read into the buffer and copied from there to their place in a
joined weight, on whatever device and in whatever type. Files are not mapped, since mapped pages count as ours while
they are read.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from penstock.models.errors import ModelError
from penstock.models.safetensors_file import SafetensorsFile, StoredTensor

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_BUFFER_BYTES = 16 << 20
_DUMMY_STD = 0.02


@dataclass(frozen=True)
class Parameter:
    """A weight of the model: the checkpoint's tensors `sources`, with `rows[i]` rows each, stacked."""

    name: str
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int | None = None  # None: a vector
    tied_to: str | None = None  # the checkpoint's tensor that serves for this one, unless both are there and differ

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shape_of(sum(self.rows))

    def shape_of(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.columns is None else (rows, self.columns)


def load_weights(
    path: Path, parameters: Iterable[Parameter], dtype: torch.dtype, device: torch.device, progress: Progress | None
) -> dict[str, Tensor]:
    """Read the parameters from the checkpoint in `path`; `progress` gets (bytes read, bytes to read).

    The result lacks a parameter that is tied, unless the checkpoint gives it values of its own.

    Raises:
        ModelError: a file or tensor is missing, a tensor has another shape, a file is cut off or broken.
    """
    stored = _open_checkpoint(path)
    wanted = [parameter for parameter in parameters if not _is_tied(path, stored, parameter, dtype)]
    if missing := [name for parameter in wanted for name in parameter.sources if name not in stored]:
        raise ModelError(f"{path} lacks {_some(missing)}")
    for parameter in wanted:
        for name, rows in zip(parameter.sources, parameter.rows, strict=True):
            shape = stored[name].shape
            if shape != parameter.shape_of(rows):
                raise ModelError(f"{name} in {path} has shape {list(shape)}, not {list(parameter.shape_of(rows))}")
    used = {name for parameter in wanted for name in parameter.sources}
    if ignored := sorted(name for name in stored if name not in used and not name.endswith("rotary_emb.inv_freq")):
        logger.warning("%s: ignored %s", path, _some(ignored))

    total_bytes = sum(stored[name].size_bytes for name in used)
    done_bytes = 0
    buffer = torch.empty(min(_BUFFER_BYTES, max(stored[name].size_bytes for name in used)), dtype=torch.uint8)
    weights: dict[str, Tensor] = {}
    for parameter in wanted:
        weight = weights[parameter.name] = torch.empty(parameter.shape, dtype=dtype, device=device)
        for name, part in zip(parameter.sources, weight.split(parameter.rows), strict=True):
            stored[name].copy_to(part.view(-1), buffer)
            done_bytes += stored[name].size_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
    return weights


def dummy_weights(
    parameters: Iterable[Parameter], dtype: torch.dtype, device: torch.device, progress: Progress | None
) -> dict[str, Tensor]:
    """Random weights without files: the same in every process on the same kind of device, norms at one."""
    wanted = [parameter for parameter in parameters if parameter.tied_to is None]
    total_bytes = sum(math.prod(parameter.shape) * dtype.itemsize for parameter in wanted)
    done_bytes = 0
    weights: dict[str, Tensor] = {}
    for parameter in wanted:
        weight = weights[parameter.name] = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.name.endswith("norm.weight"):
            weight.fill_(1.0)
        else:
            generator = torch.Generator(device).manual_seed(crc32(parameter.name.encode()))
            weight.normal_(0.0, _DUMMY_STD, generator=generator)
        done_bytes += weight.nbytes
        if progress is not None:
            progress(done_bytes, total_bytes)
    return weights


def _open_checkpoint(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of a single or sharded checkpoint lies; the headers of all files are read and checked."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} has no readable weight_map") from error
    elif (path / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        raise ModelError(f"{path} holds neither model.safetensors nor model.safetensors.index.json")
    if absent := [name for name in names if not (path / name).exists()]:
        raise ModelError(f"{path} lacks the files {_some(absent)} named in {index.name}")
    stored: dict[str, StoredTensor] = {}
    for name in names:
        stored |= SafetensorsFile(path / name).tensors
    return stored


def _is_tied(path: Path, stored: dict[str, StoredTensor], parameter: Parameter, dtype: torch.dtype) -> bool:
    """Whether another tensor serves for the parameter; `stored` then lists the two as one, by that one's name.

    As in transformers 5: either of two tied tensors may be missing (safetensors' save_model keeps the first
    by name), and if they differ it is config.json that is wrong.
    """
    if parameter.tied_to is None:
        return False
    (name,) = parameter.sources
    if name not in stored:
        return True
    if parameter.tied_to not in stored:
        stored[parameter.tied_to] = stored.pop(name)
        return True
    if not stored[name].equals(stored[parameter.tied_to], dtype, torch.empty(_BUFFER_BYTES, dtype=torch.uint8)):
        logger.warning("%s: %s and %s differ, so they are not tied", path, name, parameter.tied_to)
        return False
    del stored[name]
    return True


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
