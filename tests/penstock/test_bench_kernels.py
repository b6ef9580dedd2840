"""benchmarks/kernels.py without a GPU: every call runs in Triton's interpreter, counts and rows add up."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks import kernel_cases
from benchmarks.kernel_cases import FULL, Case, Place, Sizes, all_cases, page_tables
from benchmarks.kernels import chosen, copies_of, line, main, row, time_us
from benchmarks.shapes import H200, SHAPES, Card
from penstock.kernels import launch

TINY = Sizes(
    decodes=((2, 9),),
    mixtures={"b2/3": (3, 0, 9)},
    prompts=((1, 0, 5), (2, 6, 3)),
    rows=(1, 3),
    tokens=(2, 5),
    batches=(2,),
    page_size=4,
)
BF16 = Place(torch.device("cpu"), torch.bfloat16)


@pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here")
def test_every_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpret_ops", True)
    monkeypatch.setattr(kernel_cases, "MAX_DECODES", 4)
    place = Place(torch.device("cpu"), torch.float32)
    shape = replace(SHAPES["tiny"], hidden=32, mlp=24, heads=2, kv_heads=1, vocab=50)
    ran = Counter[str]()
    for case in all_cases(shape, TINY, place):
        calls = case.build(2)
        assert 1 <= len(calls) <= 4, case.name
        for call in calls:
            result = call()
            assert result is None or (isinstance(result, torch.Tensor) and not result.isnan().any()), case.name
        ran[case.kernel.split()[0]] += 1
    assert ran.keys() == {
        *("decode_attention", "prefill_attention", "add_rms_norm", "rotary_store", "silu_mul"),
        *("linear", "linear.gated", "linear.add_to", "torch", "sample"),
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_case_is_timed_on_a_gpu() -> None:
    place = Place(torch.device("cuda"), torch.bfloat16)
    with torch.inference_mode():
        for case in all_cases(SHAPES["tiny"], TINY, place):
            if case.kernel != "torch cudnn attention":  # has shapes of its own that it refuses
                assert time_us(case.build(2), 3) > 0, case.name


def test_bytes_and_operations_are_those_of_the_shape() -> None:
    found = {case.name: case for name in ("llama8b", "qwen1b5") for case in all_cases(SHAPES[name], FULL, BF16)}
    decode = found["decode_attention 32/8x128 b64 c4096"]
    assert decode.size_bytes == 64 * 4096 * 4096 + 2 * 64 * 8192  # 4 KiB of KV a token and layer; q and out
    prefill = found["prefill_attention AUTO 32/8x128 1x8192"]
    assert prefill.flops == pytest.approx(2 * 8192**2 * 4096, rel=1e-3)  # half of the square
    over = found["prefill_attention AUTO 32/8x128 1x8192 over 8192"]
    assert over.flops == pytest.approx(3 * prefill.flops, rel=1e-3)
    head = found["linear qwen1b5 head 256x1536x151936"]
    assert head.flops == 2 * 256 * 1536 * 151936 and head.size_bytes > 2 * 1536 * 151936
    assert "linear qwen1b5 head 8192x1536x151936" not in found
    assert found["sample greedy 256x128256"].size_bytes == 2 * 256 * 128256
    layers = sum(found[f"linear llama8b {name}"].flops for name in _FIRST_ROWS)
    assert layers == 2 * SHAPES["llama8b"].layer_weights / SHAPES["llama8b"].layers


_FIRST_ROWS = ("qkv 1x4096x6144", "o 1x4096x4096", "gate_up 1x4096x28672", "down 1x14336x4096")


def test_copies_are_more_than_the_cache_holds() -> None:
    def copies(size_bytes: int) -> int:
        return copies_of(Case("k", "s", size_bytes, 0.0, lambda copies: []))

    assert copies(1 << 30) == 1 and copies(50 << 20) == 6 and copies(1000) == 64


def test_a_row_is_floor_over_time() -> None:
    case = Case("k", "s", 4_300_000_000, 787e9 / 2, lambda copies: [])  # 1 ms of memory, 0.5 ms of arithmetic
    found = row(case, 1250.0, Card(bytes_s=H200.bytes_s / 2, flops=H200.flops))
    assert (found["bound"], found["floor_us"], found["share"], found["share_of_this"]) == ("memory", 1000.0, 0.8, 1.6)
    assert "3.44 TB/s" in line(found) and "80.0%" in line(found)
    product = row(replace(case, flops=787e9), 2000.0, H200)
    assert product["bound"] == "memory" and row(replace(case, flops=788e9), 2000.0, H200)["bound"] == "arithmetic"
    assert "394 TF/s" in line(row(replace(case, flops=788e9), 2000.0, H200))


def test_cases_are_chosen_by_kernel_shape_or_both(capsys: pytest.CaptureFixture[str]) -> None:
    cases = list(all_cases(SHAPES["llama8b"], FULL, BF16))
    assert [c.shape for c in chosen(cases, ["add_rms_norm"])] == ["1x4096", "64x4096", "256x4096", "8192x4096"]
    assert [c.kernel for c in chosen(cases, ["32/8x128 b64 c4096"])] == ["decode_attention"]
    assert len(chosen(cases + cases, ["*"])) == len(cases) == len({case.name for case in cases})
    assert main(["--list", "--models", "qwen1b5", "--only", "sample top-p *"]) == 0
    assert capsys.readouterr().out.split("\n")[0] == "sample top-p 1x151936"


def test_pages_are_scattered_and_used_once() -> None:
    tables, pages = page_tables([9, 4, 1], 4)
    used = [page for table, count in zip(tables, (3, 1, 1), strict=True) for page in table[:count]]
    assert sorted(used) == list(range(pages)) == list(range(5)) and used != sorted(used)
    assert all(len(table) == 3 for table in tables) and math.prod(len(table) for table in tables) == 27
