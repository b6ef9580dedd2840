"""benchmarks/step_breakdown.py and tune_linear.py without a GPU: what is replaced, compared, tried and written.

Whole runs go through Triton's interpreter on a shape smaller than tiny, and compiled where there is a GPU.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode_step, step_breakdown, tune_linear
from benchmarks.decode_step import Batch, DecodeStep, Form, compare, cut, make_model, measuring, page_memory
from benchmarks.linear_cases import FEW_ROWS, PRODUCTS, Product, candidates, fits, parse_tiles, taken
from benchmarks.shapes import SHAPES, Shape, floor, parse_work
from penstock.engine import decode_graphs
from penstock.kernels import attention_inputs, decode_attention, linear
from penstock.kernels.rms_norm import Normed
from penstock.kernels.row_linear import RowTiles, row_tiles_for
from penstock.kernels.small_linear import Tiles, small_linear, tiles_for
from penstock.models import decoder
from penstock.models.decoder import CausalLM

CPU = torch.device("cpu")
SMALL = replace(SHAPES["tiny"], hidden=32, mlp=24, heads=2, kv_heads=1, vocab=50, layers=1, max_position=64)
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, not interpreted")),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, not interpreted")
# numpy says so where 32-bit products wrap, as they shall
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


@pytest.fixture
def model() -> Iterator[CausalLM]:
    with measuring(CPU):
        yield make_model(SMALL, CPU)


def make_step(model: CausalLM, page_size: int = 4, extra_bytes: int = 0, sequences: int = 2) -> DecodeStep:
    batch = Batch(sequences, 5)
    return DecodeStep(model, SMALL, batch, page_size, page_memory(SMALL, batch, [page_size], extra_bytes, CPU))


# ------------------------------------------------------------ comparing


class Played(Form):
    """Its windows take what they are told."""

    def __init__(self, windows: list[float], order: list[str], name: str) -> None:
        self._windows, self._order, self._name = windows, order, name

    def mean_us(self) -> float:
        self._order.append(self._name)
        return self._windows.pop(0)


def test_a_form_is_compared_with_the_unchanged_one_before_and_after_it() -> None:
    """The card slows down by 10 a window; that must not count."""
    order: list[str] = []
    base = Played([999.0, 100.0, 120.0, 140.0, 160.0, 180.0], order, "base")
    less, more = Played([110.0 - 7, 150.0 - 9], order, "less"), Played([130.0 + 4, 170.0 + 6], order, "more")
    found = compare(base, {"less": less, "more": more}, 2)
    assert order == ["base", "base", "less", "base", "more", "base", "less", "base", "more", "base"]
    assert found.saved_us == {"less": [7.0, 9.0], "more": [-4.0, -6.0]}
    assert (found.saved("less"), found.spread("less"), found.saved("more")) == (8.0, 2.0, -5.0)
    assert (found.base, found.base_spread) == (140.0, 80.0)
    alone = compare(Played([1.0, 5.0, 7.0, 6.0], [], "base"), {}, 2)
    assert alone.windows_us == [5.0, 7.0, 6.0] and alone.base == 6.0


def test_batches_and_layers_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert Batch.parse("32x8192") == Batch(32, 8192) and str(Batch(32, 8192)) == "32x8192"
    assert Batch(1, 1024).pages(16) == 66, "two pages for a window's tokens"
    llama = SHAPES["llama8b"]
    assert cut(llama, decode_step.layers("all")).layers == 32
    assert cut(llama, decode_step.layers("8")).layers == 8 and cut(SMALL, 8).layers == 1
    options = step_breakdown.parse(["--tiles", "32x2x5x3", "--layers", "all", "--page-size", "16", "64"])
    assert (options.tiles, options.layers, options.page_size) == ([(32, 2, 5, 3)], None, [16, 64])
    wrong: tuple[list[str], ...]
    wrong = (["--batches", "32"], ["--batches", "0x8"], ["--tiles", "48x2x5x3"], ["--layers", "0"], ["--stages", "mlp"])
    for arguments in wrong:
        with pytest.raises(SystemExit):
            step_breakdown.parse(arguments)
    for arguments in (["--rows", "65"], ["--tiles", "16,64,2"]):
        with pytest.raises(SystemExit):
            tune_linear.parse(arguments)
    assert "--rows: 1 to 64" in capsys.readouterr().err


# ------------------------------------------------------------ the step


@interpreted
def test_pages_are_scattered_over_the_pool_and_used_once(model: CausalLM) -> None:
    """Ten pages each (5 tokens and 32 of a window) of 4 tokens; the pool has room for 100."""
    page_bytes = 1 * 1 * 2 * 4 * 16 * 2
    step = make_step(model, extra_bytes=100 * page_bytes)
    used = step._state.tables[:, :10].flatten().tolist()
    assert len(set(used)) == 20 and all(0 <= page < 100 for page in used) and max(used) >= 20
    assert [k.shape for k, _ in step._kv] == [(100, 1, 4, 16)]


def count_calls(ran: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Count what runs of a step, below what is replaced by a form of it."""

    def count(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            ran[name] += 1
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    count(linear, "small_linear")
    count(linear, "row_linear")
    count(decode_graphs, "sample")
    count(decoder, "paged_attention")
    count(Normed, "tensor")
    count(attention_inputs, "rotary_store")
    count(attention_inputs, "row_rotary_store")


@interpreted
@pytest.mark.parametrize(
    ("sequences", "stage"),
    [(sequences, stage) for sequences in (1, 2) for stage in step_breakdown.stages_of(Batch(sequences, 5))],
)
def test_a_stage_is_left_out_and_put_back(
    model: CausalLM, sequences: int, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = Counter[str]()
    count_calls(ran, monkeypatch)
    owners = (model, model._layers[0], decoder, decode_graphs, attention_inputs, Normed)
    originals = [dict(vars(owner)) for owner in owners]
    step = make_step(model, sequences=sequences)
    step.form(lambda: step_breakdown.left_out(stage, model, SMALL, sequences)).mean_us()
    product = "row_linear" if sequences == 1 else "small_linear"
    # To know whether it adds to the residual itself, the product that is left out was asked once before.
    asked = Counter({product: int(stage in ("o", "down"))})
    name, times = LEFT_OUT[sequences].get(stage, (product, 1))
    assert ran == WHOLE[sequences] - Counter({name: times}) + asked
    assert [dict(vars(owner)) for owner in owners] == originals


# Calls of a step of one layer, by its sequences; and which of them are a stage.
WHOLE = {
    1: Counter(row_linear=4, row_rotary_store=1, paged_attention=1, tensor=1, sample=1),
    2: Counter(small_linear=5, paged_attention=1, tensor=3, rotary_store=1, sample=1),
}
LEFT_OUT = {
    sequences: {"attention": ("paged_attention", 1), "sampling": ("sample", 1)} | others
    for sequences, others in {
        1: {"norms": ("tensor", 1), "qkv": ("row_rotary_store", 1)},
        2: {"norms": ("tensor", 3), "rotary_store": ("rotary_store", 1)},
    }.items()
}


@interpreted
@pytest.mark.parametrize("sequences", [1, 2])
def test_a_whole_step_is_compared_with(model: CausalLM, sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above subtracts from."""
    ran = Counter[str]()
    count_calls(ran, monkeypatch)
    make_step(model, sequences=sequences).base.mean_us()
    assert ran == WHOLE[sequences]


@interpreted
@pytest.mark.parametrize("stage", ["attention", "down"])
def test_a_stage_that_the_step_does_not_have_is_said(model: CausalLM, stage: str) -> None:
    with (
        pytest.raises(RuntimeError, match=f"no {stage} to leave out"),
        step_breakdown.left_out(stage, model, SMALL, 2),
    ):
        pass
    with pytest.raises(RuntimeError, match="no tiles"), step_breakdown.cut_so(decode_attention.Tiles(16, 4, 3, 2)):
        pass


@pytest.mark.parametrize("rows", [1, 2])
def test_a_product_that_the_step_does_not_have_is_said(rows: int) -> None:
    product = Product.of(SHAPES["llama8b"], "qkv", rows)
    rules = vars(linear)
    with (
        pytest.raises(RuntimeError, match=f"no product of the step is a qkv {rows}x4096x6144"),
        tune_linear.taking(None, product),
    ):
        assert rules["tiles_for"](rows, 4096, 4096, False) == tiles_for(rows, 4096, 4096, False)
        assert rules["row_tiles_for"](4096, 4096) == row_tiles_for(4096, 4096)
        assert rules["row_tiles_for"](6144, 4096) == row_tiles_for(6144, 4096), "not rotated: another product"
    with tune_linear.taking(RowTiles(2, 4), product):
        assert rules["tiles_for"](rows, 6144, 4096, False) is None
        assert rules["row_tiles_for"](6144, 4096, rotated=True) == RowTiles(2, 4)
    with tune_linear.taking(Tiles(16, 64, 2, 2, 1, 0), product):
        assert rules["tiles_for"](rows, 6144, 4096, False) == Tiles(16, 64, 2, 2, 1, 0)
        assert rules["row_tiles_for"](6144, 4096, rotated=True) is None
    assert rules["tiles_for"] is tiles_for and rules["row_tiles_for"] is row_tiles_for


@pytest.mark.parametrize("key", ["decode_b1_c1024_ms", "decode_b64_c1024_ms", "decode_b256_c1024_ms"])
@pytest.mark.parametrize("name", ["llama8b", "qwen1b5"])
def test_floors_of_the_stages_add_up_to_the_steps(name: str, key: str) -> None:
    """That of shapes.py grows by 128 tokens, ours by 32."""
    shape, work = SHAPES[name], parse_work(key)
    assert work is not None
    whole_ms = floor(shape, work, ())
    batch = Batch(work.requests, 1024)
    found = {stage: step_breakdown.floor_us(stage, shape, batch) for stage in step_breakdown.STAGES}
    step_us = sum(us * (1 if stage == "head" else shape.layers) for stage, us in found.items() if us is not None)
    assert whole_ms == pytest.approx(step_us / 1e3, rel=0.03)
    assert [stage for stage, us in found.items() if us is None] == ["norms", "rotary_store", "sampling"]


# ------------------------------------------------------------ candidates


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("name", ["llama8b", "qwen1b5"])
def test_candidates_fit_and_so_does_what_is_taken_today(name: str, rows: int) -> None:
    for product in (Product.of(SHAPES[name], part, rows) for part in PRODUCTS):
        tried = candidates(product)
        assert len(tried) >= 4 and len(set(tried)) == len(tried), product
        assert all(isinstance(tiles, RowTiles) == (rows == 1) for tiles in tried)
        assert all(tiles.strips == 1 or tiles.parts == 1 for tiles in tried if isinstance(tiles, Tiles))
        today = taken(product)
        assert today is None or fits(today, product), product


def test_what_does_not_fit_is_not_tried() -> None:
    down, o = (Product.of(SHAPES["qwen1b5"], name, 1) for name in ("down", "o"))
    assert (down.outputs, down.columns, down.adds, o.columns) == (1536, 8960, True, 1536)
    deep, wide = Tiles(16, 512, 2, 3, 4, 8), Tiles(32, 256, 4, 7, 1, 8)
    assert fits(deep, down) and not fits(deep, o), "a part would have less than a tile"
    assert not fits(wide, o), "48 programs"
    assert not fits(Tiles(16, 1024, 4, 5, 1, 8), down), "four tiles of 64 KiB"
    gate_up = Product.of(SHAPES["qwen1b5"], "gate_up", 1)
    assert (gate_up.weight_rows, gate_up.outputs, gate_up.gated) == (17920, 8960, True)
    assert gate_up.floor_us == pytest.approx(12.8, abs=0.05)
    assert not fits(Tiles(16, 256, 2, 4, 1, 0, 10), gate_up), "56 programs"
    assert parse_tiles(FEW_ROWS.split()[0]) == Tiles(16, 256, 2, 4, 1, 8, 1)


@interpreted
def test_a_wrong_tiling_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    product = Product("qkv", 3, 40, 48, False, False, True)
    with measuring(CPU):
        bench = tune_linear.Bench(product, CPU)
        good, refused = Tiles(16, 16, 1, 2, 1, 0), Tiles(16, 16, 1, 2, 2, 0, 2)
        assert bench.reject_all([good, refused]).keys() == {refused}

        def unwritten(x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
            """Writes nothing: what lies there is another call's right result."""
            return small_linear(torch.ones_like(x), *rest, **named)

        monkeypatch.setattr(tune_linear, "small_linear", unwritten)
        why = bench.reject_all([good])[good]
        assert why.startswith("relative error")


# ------------------------------------------------------------ the whole of both


@pytest.fixture
def shape(monkeypatch: pytest.MonkeyPatch) -> Shape:
    monkeypatch.setitem(SHAPES, "tiny", SMALL)
    monkeypatch.setattr(tune_linear, "CONTEXT", 5)
    monkeypatch.setattr(tune_linear, "MAX_COPIES", 2)
    return SMALL


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_is_taken_apart(device: str, shape: Shape, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    stages = ["--stages", "attention", "down"] if device == "cpu" else []
    command = ["--models", "tiny", "--batches", "2x5", "--page-size", "4", "8", "--rounds", "1", "--tiles", "16x4x3x2"]
    before = decode_attention.tiles_for
    assert step_breakdown.main([*command, *stages, "--device", device, "--out", str(path)]) == 0
    assert decode_attention.tiles_for is before
    found = json.loads(path.read_text())["tiny"]
    assert found.keys() == {"b2_c5_l1_p4", "b2_c5_l1_p8", "b2_c5_l1_page_sizes"}
    for page_size in (4, 8):
        taken = found[f"b2_c5_l1_p{page_size}"]
        assert taken["layers"] == 1 and taken["step_us"] > 0
        assert taken["down_us"].keys() == {"saved", "plus_minus", "floor"}
        assert {"attention_us", "tiles_16x4x3x2_us"} <= taken.keys()
        assert ("rest_us" in taken) == (device != "cpu"), "only where all stages were left out"
    assert found["b2_c5_l1_page_sizes"].keys() == {"p4_step_us", "p8_step_us", "spread_us"}
    out = capsys.readouterr().out
    assert "tiny 2x5, pages of 8: step of 1 layers" in out and "step with pages of 4 tokens" in out


@pytest.mark.parametrize("device", DEVICES)
def test_tilings_are_compared(
    device: str, shape: Shape, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    monkeypatch.setattr(tune_linear, "PREFETCHES", (0,))
    command = ["--models", "tiny", "--rows", "2", "--products", "down", "--rounds", "1", "--prefetch"]
    tiles = ["--tiles", "16,16,1,2,1,0", "16,16,1,2,2,0,2"]
    assert tune_linear.main([*command, *tiles, "--device", device, "--out", str(path)]) == 0
    found = json.loads(path.read_text())["tiny"]["down 2x24x32"]
    today = tiles_for(2, 32, 24, False)
    assert found["today"] == tune_linear.text(today) and today is not None
    other = tune_linear.text(today._replace(prefetch=0))
    assert found["tilings_us"].keys() == {"library", "16,16,1,2,1,0,1", found["today"], other}
    assert {name for name, figures in found["tilings_us"].items() if "alone" in figures} == {
        *("library", "16,16,1,2,1,0,1", found["today"])
    }
    assert "several strips" in found["rejected"]["16,16,1,2,2,0,2"]
    assert "today" in capsys.readouterr().out


def test_what_fails_is_said_and_the_others_go_on(
    shape: Shape, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tune(product: Product, *rest: Any) -> dict[str, Any]:
        if product.name == "o":
            raise RuntimeError("no such luck")
        return {"floor_us": 1.0, "today": "library", "saved_within_us": 0.0, "tilings_us": {}, "rejected": {}}

    monkeypatch.setattr(tune_linear, "tune", tune)
    path = tmp_path / "out.json"
    with monkeypatch.context() as patched:
        patched.setattr(tune_linear, "measuring", lambda device: torch.inference_mode())
        patched.setattr(tune_linear, "DecodeStep", lambda *arguments: None)
        arguments = ["--models", "tiny", "--rows", "1", "--device", "cpu", "--out", str(path)]
        assert tune_linear.main(arguments) == 1
        assert tune_linear.main([*arguments, "--seconds", "-1"]) == 0
    out = capsys.readouterr().out
    assert "tiny o 1x32x32 failed" in out and "no such luck" in out
    assert out.count("left out") == 4
    assert set(json.loads(path.read_text())["tiny"]) == {"qkv 1x32x64", "gate_up 1x32x48", "down 1x24x32"}
