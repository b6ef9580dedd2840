"""Loading: whole, sharded, converted; in little memory; and every way in which a checkpoint can be broken."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.models.decoder import CausalLM
from penstock.models.errors import ModelError
from penstock.models.registry import load_model
from penstock.models.safetensors_file import SafetensorsFile
from penstock.models.spec import read_spec
from penstock.models.weights import dummy_weights, load_weights
from tests.models.paged_loop import PagedLoop
from tests.tiny_models import make_checkpoint, random_prompts, reference_tokens

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint of one's own, to break."""
    return Path(shutil.copytree(checkpoints["llama"], tmp_path / "llama"))


def shard(path: Path) -> None:
    """Split model.safetensors over two files with an index."""
    tensors = load_file(path / "model.safetensors")
    halves = (dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2]))
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for file, half in zip(files, halves, strict=True):
        save_file(half, path / file)
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "model.safetensors").unlink()


def load(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return load_weights(path, CausalLM.parameters(read_spec(path)), dtype, CPU, None)


def test_joined_weights_hold_the_checkpoints_rows(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    attention = "model.layers.1.self_attn."
    expected = torch.cat([stored[f"{attention}{name}_proj.weight"] for name in "qkv"])
    weights = load(checkpoint)
    assert torch.equal(weights["layers.1.qkv.weight"], expected)
    assert torch.equal(weights["head.weight"], stored["lm_head.weight"])
    assert sum(weight.numel() for weight in weights.values()) == sum(tensor.numel() for tensor in stored.values())


def test_sharded_checkpoint(checkpoint: Path) -> None:
    whole = load(checkpoint)
    shard(checkpoint)
    parts = load(checkpoint)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_converted(checkpoint: Path, stored: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    save_file(tensors, checkpoint / "model.safetensors")
    assert torch.equal(load(checkpoint)["norm.weight"], tensors["model.norm.weight"].float())


def test_tensors_larger_than_the_buffer(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(checkpoint)
    monkeypatch.setattr("penstock.models.weights._BUFFER_BYTES", 1001)
    pieces = load(checkpoint)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_progress_counts_every_byte(checkpoint: Path) -> None:
    calls: list[tuple[int, int]] = []
    spec = read_spec(checkpoint)
    load_model(
        checkpoint, spec, dtype=torch.bfloat16, device=CPU, progress=lambda done, total: calls.append((done, total))
    )
    total = sum(tensor.nbytes for tensor in load_file(checkpoint / "model.safetensors").values())
    assert calls == sorted(set(calls))
    assert calls[-1] == (total, total)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
STORED_HEADS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "the same": (lambda t: t.update({HEAD: t[EMBEDDING].clone()}), ""),
    "the same in a wider type": (lambda t: t.update({HEAD: t[EMBEDDING].double()}), ""),
    "alone": (lambda t: t.update({HEAD: t.pop(EMBEDDING)}), ""),
    "another": (lambda t: t.update({HEAD: t[EMBEDDING].roll(5, 0)}), f"{HEAD} and {EMBEDDING} differ"),
}


@pytest.mark.parametrize("kind", STORED_HEADS)
def test_a_tied_head_that_is_stored_counts_as_in_transformers(
    checkpoints: dict[str, Path], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, told = STORED_HEADS[kind]
    path = Path(shutil.copytree(checkpoints["qwen2"], tmp_path / "qwen2"))
    edit(change)(path)
    model = load_model(path, read_spec(path), dtype=torch.float32, device=CPU)
    assert told in caplog.text and bool(told) == bool(caplog.text)
    assert PagedLoop(model, 16).generate(random_prompts([9]), 8, 64) == reference_tokens(path, random_prompts([9]), 8)


@pytest.mark.parametrize("size_bytes", [8, 1001, 1 << 20])
def test_tensors_are_compared_to_their_last_element(checkpoint: Path, size_bytes: int) -> None:
    save_file(
        {"a": torch.zeros(300), "b": torch.zeros(300).double(), "c": torch.cat([torch.zeros(299), torch.ones(1)])},
        checkpoint / "model.safetensors",
    )
    stored = SafetensorsFile(checkpoint / "model.safetensors").tensors
    buffer = torch.empty(size_bytes, dtype=torch.uint8)
    assert stored["a"].equals(stored["b"], torch.float32, buffer)
    assert not stored["b"].equals(stored["c"], torch.float32, buffer)


def test_dummy_weights_need_no_files_and_are_always_the_same(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    spec = read_spec(checkpoint)
    first, second = (dummy_weights(CausalLM.parameters(spec), torch.bfloat16, CPU, None) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["layers.0.qkv.weight"], first["layers.1.qkv.weight"])
    model = load_model(checkpoint, spec, dtype=torch.float32, device=CPU, load_format="dummy")
    logits = PagedLoop(model, 16).step(random_prompts([20]), [0], [[]])
    assert logits.isfinite().all() and logits.std() > 0.01


def edit(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return apply


def cut(path: Path, size_bytes: int) -> None:
    os.truncate(path / "model.safetensors", size_bytes)


def lose_shard(path: Path) -> None:
    shard(path)
    (path / "model-00002-of-00002.safetensors").unlink()


def break_index(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text('{"metadata": {}}')


def name_no_files(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": 1, "model.norm.weight": "a"}}'
    )


BREAKS: list[tuple[Callable[[Path], object], str]] = [
    (edit(lambda t: t.pop("model.layers.2.mlp.up_proj.weight")), r"lacks model\.layers\.2\.mlp\.up_proj\.weight$"),
    (edit(lambda t: t.pop("lm_head.weight")), r"lacks lm_head\.weight$"),
    (edit(lambda t: [t.pop(name) for name in list(t) if "layers.1" in name]), "and 1 more$"),
    (
        edit(lambda t: t.update({"model.norm.weight": torch.zeros(5)})),
        r"norm\.weight in .* has shape \[5\], not \[64\]",
    ),
    (edit(lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)})), "norm.weight has type I8"),
    (lambda path: (path / "model.safetensors").unlink(), "neither model.safetensors nor"),
    (lose_shard, r"lacks the files model-00002-of-00002\.safetensors"),
    (break_index, "no readable weight_map"),
    (name_no_files, "index.json has no readable weight_map"),
    (lambda path: cut(path, 300_000), "is cut off: .* reaches past its 300000 bytes"),
    (lambda path: cut(path, 500), "is cut off or no safetensors file"),
    (lambda path: cut(path, 3), "is cut off or no safetensors file"),
    (lambda path: (path / "model.safetensors").write_bytes(b"\x05" + bytes(7) + b"hello"), "is no safetensors file"),
    (lambda path: (path / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"[]"), "header is no JSON object"),
]


@pytest.mark.parametrize(("damage", "message"), BREAKS, ids=[message[:30] for _, message in BREAKS])
def test_broken_checkpoints_say_what_is_broken(
    checkpoint: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(checkpoint)
    with pytest.raises(ModelError, match=message) as caught:
        load(checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_a_header_that_lies_about_sizes(checkpoint: Path) -> None:
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 100]}}).encode()
    (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(256))
    with pytest.raises(ModelError, match=r"shape \[64\] cannot have 100 bytes"):
        load(checkpoint)


def test_ignored_tensors_are_logged(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))(checkpoint)
    load(checkpoint)
    assert "ignored model.layers.0.self_attn.q_proj.bias" in caplog.text


MEASURE = """
import sys
from pathlib import Path
import torch
from penstock.models.registry import load_model
from penstock.models.spec import read_spec

def memory(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

torch.set_num_threads(1)
dtype, *paths = getattr(torch, sys.argv[1]), *map(Path, sys.argv[2:])
for path in paths:  # a tiny one first: libraries take tens of MB when they are first needed, whatever the model
    before = memory("VmRSS:")
    model = load_model(path, read_spec(path), dtype=dtype, device=torch.device("cpu"))
print(memory("VmHWM:") - before, memory("VmRSS:") - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_little_more_than_the_model(tmp_path: Path, dtype: str) -> None:
    """About 300 MB of float32 zeros in a sparse file, loaded by a fresh process."""
    big = {"num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 8000}
    config = json.loads((make_checkpoint("llama", tmp_path) / "config.json").read_text()) | big | {"head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    header: dict[str, object] = {}
    offset = 0
    for parameter in CausalLM.parameters(read_spec(tmp_path)):
        for name, rows in zip(parameter.sources, parameter.rows, strict=True):
            shape = parameter.shape_of(rows)
            end = offset + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / "model.safetensors", 8 + len(text) + offset)

    tiny = make_checkpoint("llama", tmp_path / "tiny")
    command = [sys.executable, "-c", MEASURE, dtype, str(tiny), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=100, cwd=Path(__file__).parents[2]
    )
    peak_bytes, final_bytes = map(int, done.stdout.split())
    model_bytes = offset * getattr(torch, dtype).itemsize // 4
    assert model_bytes > 130e6
    assert 0.9 * model_bytes < final_bytes
    assert peak_bytes < 1.3 * model_bytes
