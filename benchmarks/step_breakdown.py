"""Where a decode step goes: the step's time, and what it saves to leave out one of its stages.

    python benchmarks/step_breakdown.py
    python benchmarks/step_breakdown.py --models llama8b --batches 32x8192 --layers all --page-size 16 32 64
    python benchmarks/step_breakdown.py --batches 1x1024 --stages attention --tiles 64x4x3x3 32x2x7x4

The step is the engine's own, captured as a CUDA graph, on the first layers of a model with random weights. A profile
would mislead: under dependent launch a kernel's time there begins when it starts, though it then waits for the one
before it. So one stage at a time is replaced by a result that lies there already, and the difference of replays counts,
the whole step before and after each other one. Stages that hide each other's latency save less than they take, so that
"the rest" (embedding, laying the step and its attention out, gaps) is only what the differences leave over.

--layers all makes pages as large as they are in the engine (a page holds all layers: 2 MiB for llama8b at 16 tokens),
which address translation may notice; --pool-gib scatters them over a pool as large as the engine's.
Figures go into benchmarks/results/step_breakdown-COMMIT.json: microseconds, a layer or a step as the key says.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

import torch
from torch import Tensor

from benchmarks.decode_step import (
    MOST_STEPS,
    Batch,
    Compared,
    DecodeStep,
    Form,
    compare,
    cut,
    dtype_on,
    layers,
    make_model,
    measuring,
    page_memory,
)
from benchmarks.record import RESULTS, commit, file_name, machine, merge
from benchmarks.shapes import BYTES, H200, SHAPES, Shape
from penstock.engine import decode_graphs
from penstock.kernels import attention_inputs, decode_attention
from penstock.kernels.decode_attention import Tiles
from penstock.kernels.linear import Linear
from penstock.kernels.rms_norm import Normed, as_tensor
from penstock.kernels.rotary_store import Heads
from penstock.models import decoder
from penstock.models.decoder import CausalLM

PRODUCTS = {"qkv": "_qkv", "o": "_output", "gate_up": "_gate_up", "down": "_down", "head": "_head"}
STAGES = ("qkv", "o", "gate_up", "down", "attention", "norms", "rotary_store", "head", "sampling")
FUNCTIONS = {
    "attention": (decoder, "paged_attention"),
    "norms": (Normed, "tensor"),
    "rotary_store": (attention_inputs, "rotary_store"),
    "attention's inputs": (decoder, "attention_inputs"),
    "sampling": (decode_graphs, "sample"),
}
ONCE = ("head", "sampling")  # a step; the others are once a layer


def stages_of(batch: Batch, among: Sequence[str] = STAGES) -> list[str]:
    """Those that a batch's step has as launches of their own: one row is rotated and stored by q/k/v's product."""
    return [stage for stage in among if stage != "rotary_store" or batch.sequences > 1]


class Ready(Linear):
    """Stands in for a product: its result is there already."""

    def __init__(self, result: Tensor, adds: bool) -> None:
        """adds: whether what it stands in for adds to the residual itself, and does not leave that to the next norm."""
        self._result, self._adds, self.used = result, adds, False
        self._gated = result[:, : result.shape[1] // 2].contiguous()

    def __call__(self, x: Tensor | Normed, adapter: Tensor | None = None) -> Tensor:
        self._take(x)
        return self._result

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor | None:
        self.used = True
        return None if self._adds else self._result

    def gated(self, x: Tensor | Normed) -> Tensor:
        self._take(x)
        return self._gated

    def _take(self, x: Tensor | Normed) -> None:
        self.used = True
        if len(self._result) > 1:  # the norm of one row is a part of the product
            as_tensor(x)


class StandIn:
    """Stands in for a function, and knows whether it was called."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function, self.used = function, False

    def __call__(self, *arguments: Any, **named: Any) -> object:
        self.used = True
        return self._function(*arguments, **named)


@contextmanager
def left_out(stage: str, model: CausalLM, shape: Shape, rows: int) -> Iterator[object]:
    """While this is in force, steps of so many rows do without the stage; gives what must live as long as such a step.

    Raises:
        RuntimeError: on leaving, if nothing called what stood in: the engine has changed, and figures would be wrong.
    """
    # What is replaced is private: a seam for it in the model would be there for this alone.
    stand_in: Ready | StandIn
    owners: Sequence[object]
    if stage == "qkv" and rows == 1:
        stage = "attention's inputs"
    if stage in PRODUCTS:
        owners, name = [model] if stage == "head" else model._layers, PRODUCTS[stage]
        outputs, inputs = shape.linears[stage]
        adds = False
        if stage in ("o", "down"):
            original: Linear = getattr(owners[0], name)
            adds = original.add_to(_noise(model, rows, outputs), _noise(model, rows, inputs)) is None
        stand_in = Ready(_noise(model, rows, outputs), adds)
    else:
        module, name = FUNCTIONS[stage]
        owners, stand_in = [module], StandIn(_functions(model, rows, shape)[stage])
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(patch.object(owner, name, stand_in))
        yield stand_in
    if not stand_in.used:
        raise RuntimeError(f"the step has no {stage} to leave out")


@contextmanager
def cut_so(tiles: Tiles) -> Iterator[None]:
    """While this is in force, attention cuts its keys up so.

    Raises:
        RuntimeError: on leaving, if nothing asked for the tiles.
    """
    rule = StandIn(lambda head_dim: tiles)
    with patch.object(decode_attention, "tiles_for", rule):
        yield
    if not rule.used:
        raise RuntimeError("the step's attention has no tiles")


def _noise(model: CausalLM, rows: int, columns: int) -> Tensor:
    """As large as what a norm or a product gives: never zeros, which let a card clock higher."""
    device = model._embedding.device
    return torch.randn(rows, columns, dtype=dtype_on(device), device=device)


def _functions(model: CausalLM, rows: int, shape: Shape) -> dict[str, Callable[..., Tensor]]:
    """What stands in for each of FUNCTIONS."""
    normalised = _noise(model, rows, shape.hidden)

    def attention(q: Tensor, *rest: Any, **named: Any) -> Tensor:
        return q

    def norm(*rest: Any) -> Tensor:
        return normalised

    queries = _noise(model, rows, shape.heads * shape.head_dim).view(rows, shape.heads, -1)

    def inputs(*rest: Any, **named: Any) -> Tensor:
        return queries

    def rotary_store(qkv: Tensor, *rest: Any) -> Tensor:
        heads: Heads = rest[-1]
        return qkv.view(len(qkv), heads.in_a_row, -1)[:, : heads.num_heads]

    def sample(logits: Tensor, *rest: Any, out: Tensor, **named: Any) -> Tensor:
        # Once, before the step is captured: with equal tokens in all rows the products would have equal rows, too.
        return out if out.is_cuda and torch.cuda.is_current_stream_capturing() else out.random_(logits.shape[1])

    return {
        "attention": attention,
        "norms": norm,
        "rotary_store": rotary_store,
        "attention's inputs": inputs,
        "sampling": sample,
    }


def floor_us(stage: str, shape: Shape, batch: Batch) -> float | None:
    """Least time on an H200, of a layer or of a step; None: next to nothing."""
    if stage in PRODUCTS:
        outputs, inputs = shape.linears[stage]
        flops = 2.0 * outputs * inputs * batch.sequences
        return 1e6 * max(outputs * inputs * BYTES / H200.bytes_s, flops / H200.flops)
    if stage == "attention":
        tokens = batch.sequences * (batch.context + MOST_STEPS / 2)
        return 1e6 * tokens * shape.kv_bytes / shape.layers / H200.bytes_s
    return None


def figures(shape: Shape, batch: Batch, found: Compared, stages: Sequence[str]) -> dict[str, Any]:
    """A batch's figures, as the result file has them. `plus_minus`: half of what the rounds differ by."""
    record: dict[str, Any] = {
        "layers": shape.layers,
        "step_us": round(found.base, 1),
        "spread_us": round(found.base_spread, 1),
    }
    rest = found.base
    for name in found.saved_us:
        times = 1 if name in ONCE else shape.layers
        least = floor_us(name, shape, batch)
        record[f"{name}_us"] = {
            "saved": round(found.saved(name) / times, 2),
            "plus_minus": round(found.spread(name) / times / 2, 2),
            **({} if least is None else {"floor": round(least, 2)}),
        }
        rest -= found.saved(name) if name in stages else 0.0
    if set(stages_of(batch)) <= set(stages):
        record["rest_us"] = round(rest, 1)
    return record


def show(title: str, record: dict[str, Any]) -> None:
    """A batch's figures for people."""
    print(f"{title}: step of {record['layers']} layers {record['step_us']:.1f} us, spread {record['spread_us']:.1f}")
    for key, value in record.items():
        if isinstance(value, dict):
            name = key.removesuffix("_us")
            least = f"  floor {value['floor']:8.2f}" if "floor" in value else ""
            per = "step" if name in ONCE else "layer"
            print(f"  {name:<16}{value['saved']:9.2f} +- {value['plus_minus']:<5.2f} us a {per:<5}{least}")
    if "rest_us" in record:
        print(f"  {'the rest':<16}{record['rest_us']:9.2f}          us a step")
    sys.stdout.flush()


def measure(
    model: CausalLM, shape: Shape, batch: Batch, options: argparse.Namespace, take: Callable[[str, Any], None]
) -> None:
    """Take one batch's step apart in every page size, then compare the page sizes; `take` gets key and figures."""
    device = torch.device(options.device)
    memory = page_memory(shape, batch, options.page_size, round(options.pool_gib * 2**30), device)
    bases: dict[int, Form] = {}
    for page_size in options.page_size:
        step = DecodeStep(model, shape, batch, page_size, memory)
        bases[page_size] = step.base
        stages = stages_of(batch, options.stages)
        changes = {name: partial(left_out, name, model, shape, batch.sequences) for name in stages}
        forms = {name: step.form(change) for name, change in changes.items()}
        for tiles in options.tiles:
            forms["tiles_" + "x".join(map(str, tiles))] = step.form(partial(cut_so, tiles))
        record = figures(shape, batch, compare(bases[page_size], forms, options.rounds), stages)
        show(f"{shape.name} {batch}, pages of {page_size}", record)
        take(f"b{batch.sequences}_c{batch.context}_l{shape.layers}_p{page_size}", record)
    if len(bases) > 1:
        first, *others = options.page_size
        found = compare(bases[first], {str(size): bases[size] for size in others}, options.rounds)
        sizes = {first: found.base} | {size: found.base - found.saved(str(size)) for size in others}
        shown = ", ".join(f"of {size} tokens {step_us:.1f} us" for size, step_us in sizes.items())
        print(f"{shape.name} {batch}, step with pages {shown}; spread {found.base_spread:.1f}", flush=True)
        record = {f"p{size}_step_us": round(step_us, 1) for size, step_us in sizes.items()}
        record["spread_us"] = round(found.base_spread, 1)
        take(f"b{batch.sequences}_c{batch.context}_l{shape.layers}_page_sizes", record)


def _tiles(text: str) -> Tiles:
    """TOKENSxWARPSxSTAGESxPROGRAMS. Raises ValueError for anything else, or tokens that are no power of 2."""
    numbers = [int(part) for part in text.split("x")]
    if len(numbers) != 4 or min(numbers) < 1 or numbers[0] < 16 or numbers[0] & (numbers[0] - 1):
        raise ValueError(f"{text}: 16, 32, 64 or so tokens, warps, stages and programs of a multiprocessor")
    return Tiles(*numbers)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    batches = [Batch(1, 1024), Batch(64, 1024), Batch(256, 1024), Batch(32, 8192)]
    add = parser.add_argument
    add("--models", nargs="+", default=["llama8b", "qwen1b5"], choices=sorted(SHAPES), metavar="NAME")
    add("--batches", nargs="+", type=Batch.parse, default=batches, metavar="BxC", help="sequences and their context")
    add("--layers", type=layers, default=8, metavar="N", help='of the model, or "all"')
    add("--stages", nargs="*", default=list(STAGES), choices=STAGES, metavar="NAME", help="to leave out, one by one")
    add("--tiles", nargs="+", type=_tiles, default=[], metavar="TxWxSxP", help="of attention: see decode_attention.py")
    add("--page-size", nargs="+", type=int, default=[16], metavar="TOKENS", help="several are compared")
    add("--pool-gib", type=float, default=0.0, metavar="GIB", help="of the pool, if the batch needs less")
    add("--rounds", type=int, default=3, help="comparisons of each form, of which the median counts")
    add("--out", type=Path, help="result file (default: benchmarks/results/step_breakdown-COMMIT.json)")
    add("--device", default="cuda", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    at_commit, found_on = commit(), machine()
    path = options.out or RESULTS / file_name("step_breakdown", at_commit)
    failed = 0
    with measuring(torch.device(options.device)):
        for name in options.models:
            shape = cut(SHAPES[name], options.layers)
            model = make_model(shape, torch.device(options.device))

            def take(key: str, value: Any, name: str = name) -> None:
                merge(path, found_on, at_commit, {name: {key: value}})

            for batch in options.batches:
                try:
                    measure(model, shape, batch, options, take)
                except Exception:  # the other batches are still worth having
                    failed += 1
                    print(f"{name} {batch} failed:\n{traceback.format_exc(limit=-3)}", flush=True)
                torch.cuda.empty_cache()
            del model
    print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
