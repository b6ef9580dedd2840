"""The Hopper kernel: it compiles for the card without one, and on one it equals the plain reference.

Gluon has no interpreter, so on CPU only its compilation is tested.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from penstock.kernels import prefill_hopper
from penstock.kernels.prefill_attention import prefill_attention_reference
from penstock.kernels.prefill_hopper import prefill_attention_hopper, supports_hopper
from tests.kernels.test_prefill_attention import Case, Sequences, close

on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

COMPILE = """
import sys

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from penstock.kernels.prefill_hopper import kernel_constants, shared_layout
from penstock.kernels.prefill_hopper_kernel import hopper_kernel as kernel

constants = kernel_constants(4, 16, True, True, True, 1, 32, 128, bool(int(sys.argv[1]))) | {"PDL": True}
types = dict.fromkeys(kernel.arg_names, "i32")
types |= dict.fromkeys(constants, "constexpr")
types |= dict.fromkeys(("q_ptr", "sinks_ptr"), "*bf16")
types |= {"masses_ptr": "*fp32", "out_ptr": "*fp32" if constants["SPLITS"] else "*bf16"}
types |= dict.fromkeys(("tables_ptr", "table_rows_ptr", "query_starts_ptr", "contexts_ptr"), "*i32")
types |= {"scale": "fp32", "soft_cap": "fp32", "kv_desc": f"tensordesc<bf16[16, 128],{shared_layout(128)!r}>"}
source = GluonASTSource(kernel, types, constexprs=constants)
compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": 168})
assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
assert "wgmma.mma_async" in compiled.asm["ptx"]
assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
"""


@pytest.mark.parametrize("splits", [False, True])
def test_compiles_for_hopper(splits: bool) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", COMPILE, str(int(splits))], check=True, env=environment)


def test_what_it_supports_is_never_a_cpu_tensor() -> None:
    assert not supports_hopper(torch.empty(1, 4, 128, dtype=torch.bfloat16), 16)


@pytest.fixture(params=[1, 2, 7])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every row's context."""
    monkeypatch.setattr(prefill_hopper, "splits_for", lambda *sizes: request.param)


def both(case: Case, **options: object) -> None:
    expected = case.run(prefill_attention_reference, "cuda", **options)  # type: ignore[arg-type]
    got = case.run(prefill_attention_hopper, "cuda", **options)  # type: ignore[arg-type]
    close(got, expected.double(), 2e-2)


MIXTURE: Sequences = [(0, 300), (1000, 130), (77, 1), (0, 0), (3, 640), (513, 5)]


@pytest.mark.usefixtures("splits")
class TestOnAGPU:
    pytestmark = on_hopper

    @pytest.mark.parametrize("page_size", [8, 16, 64, 128, 256])
    @pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 128), (7, 1, 64), (2, 2, 128)])
    def test_ragged_mixture(self, heads: int, kv_heads: int, dim: int, page_size: int) -> None:
        both(Case(MIXTURE, page_size, heads, kv_heads, dim, torch.bfloat16))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("window", [1, 100, 128, 300, 5000])
    def test_sliding_window(self, window: int, dtype: torch.dtype) -> None:
        both(Case(MIXTURE, 16, 4, 2, 128, dtype), window=window)

    @pytest.mark.parametrize("scale", [0.05, 0.0625, 64**-0.5, 0.11, 128**-0.5, 0.17, 0.25])
    def test_rows_that_see_nothing_at_first_count_for_nothing(self, scale: float) -> None:
        both(Case(MIXTURE, 16, 4, 2, 128, torch.bfloat16), scale=scale, window=130)

    @pytest.mark.parametrize(
        ("window", "soft_cap", "sinks"), [(None, 1.5, False), (None, None, True), (70, None, True), (90, 0.8, True)]
    )
    def test_soft_cap_and_sinks(self, window: int | None, soft_cap: float | None, sinks: bool) -> None:
        both(Case(MIXTURE, 32, 6, 2, 64, torch.bfloat16), window=window, soft_cap=soft_cap, sinks=sinks)

    def test_a_sequence_without_context_is_skipped(self) -> None:
        case = Case([(50, 40), (9, 200), (0, 70)], 16, 4, 2, 128, torch.bfloat16)
        case.contexts[1] = 0
        both(case)
