"""What names a checkpoint: workers exchange pages, and a router joins them, only when their digests agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.engine.build import checkpoint_digest


def checkpoint(folder: Path, weights: dict[str, torch.Tensor], config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("rows", [8, 4096], ids=["smaller than the sample", "larger than the sample"])
def test_checkpoints_of_one_shape_differ_by_their_weights(tmp_path: Path, rows: int) -> None:
    weights = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1))
    base = checkpoint_digest(checkpoint(tmp_path / "base", {"w": weights}))
    assert checkpoint_digest(checkpoint(tmp_path / "copy", {"w": weights.clone()})) == base
    assert checkpoint_digest(checkpoint(tmp_path / "permuted", {"w": weights.flip(0).contiguous()})) != base
    assert checkpoint_digest(checkpoint(tmp_path / "tuned", {"w": weights * 1.001})) != base
    assert checkpoint_digest(checkpoint(tmp_path / "renamed", {"v": weights})) != base
    assert checkpoint_digest(checkpoint(tmp_path / "configured", {"w": weights}, config="{ }")) != base


def test_every_byte_of_a_small_file_and_the_end_of_a_large_one_count(tmp_path: Path) -> None:
    for name, rows in (("small", 400), ("large", 4096)):
        weights = torch.zeros(rows, 512)
        base = checkpoint_digest(checkpoint(tmp_path / name, {"w": weights}))
        for row in range(0, rows, 37) if name == "small" else (0, rows - 1):
            changed = weights.clone()
            changed[row, -1] = 1.0
            assert checkpoint_digest(checkpoint(tmp_path / f"{name}-{row}", {"w": changed})) != base, row


def test_random_weights_are_named_by_their_configuration(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one", {"w": torch.zeros(4)})
    two = checkpoint(tmp_path / "two", {"w": torch.ones(4)})
    assert checkpoint_digest(one, "dummy") == checkpoint_digest(two, "dummy")
