"""Tilings of the products with few rows: each alone and inside a decode step, beside what `tiles_for` takes today.

    python benchmarks/tune_linear.py
    python benchmarks/tune_linear.py --models llama8b --rows 1 --products gate_up --tiles 16,512,2,4,1,0,7 --prefetch

For every product of a layer: candidates that fit the weight and the card, each first checked against float32 on inputs
of its own; then timed alone (weights take turns, so that memory serves them, not the level-2 cache) and in the engine's
own decode step, where other kernels come between and dependent launch hides what it can. What counts is the layer: a
tiling may win alone that loses there. The library is a candidate, too. Everything is compared in turn with the same
work as it is today. No new product is begun after --seconds. Tilings are written as the fields of `Tiles`.
Figures go into benchmarks/results/tune_linear-COMMIT.json: microseconds; `saved` is what a layer's time sinks by.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.decode_step import (
    Batch,
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
from benchmarks.linear_cases import PRODUCTS, Product, Tiling, candidates, parse_tiles, taken
from benchmarks.record import RESULTS, commit, file_name, machine, merge
from benchmarks.shapes import SHAPES
from penstock.kernels import linear
from penstock.kernels.gated_activation import silu_mul
from penstock.kernels.row_linear import RowProduct, RowTiles, row_linear, row_tiles_for
from penstock.kernels.small_linear import MAX_ROWS, LinearWorkspace, Tiles, small_linear, tiles_for
from penstock.kernels.small_linear import small_linear_reference as reference

CONTEXT = 1024  # of the steps
PAGE_SIZE = 16
CACHE_BYTES = 4 * (64 << 20)  # of weights that lie between two uses of one
MAX_COPIES = 64
ALONE_US = 8_000.0  # a window
MAX_ERROR = 6e-3  # relative, of bfloat16 results
COMPILERS = 12
PREFETCHES = (0, 4, 8, 16, 32)


class Bench:
    """A product's inputs on the device, and what is done with them."""

    def __init__(self, product: Product, device: torch.device) -> None:
        self.product, self.device = product, device
        p, copies = product, max(1, min(MAX_COPIES, -(-CACHE_BYTES // product.weight_bytes)))
        # What is added to a residual thousands of times is small, or it would overflow.
        std = (1e-3 if p.adds else 1.0) * p.columns**-0.5
        self._weights = [self._noise(p.weight_rows, p.columns).mul_(std) for _ in range(copies)]
        self._bias = self._noise(p.weight_rows) if p.has_bias else None
        self._workspace = LinearWorkspace.allocate(device)
        self._x = self._noise(p.rows, p.columns)
        self._residual = self._noise(p.rows, p.outputs) if p.adds else None
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def _noise(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=dtype_on(self.device), device=self.device)

    def reject(self, tiles: Tiling) -> str | None:
        """Why not to use a tiling: it does not compile, does not fit, or its result is wrong. None: all is well."""
        p, weight = self.product, self._weights[0]
        # Inputs of its own: memory that was not written could still hold another tiling's right result.
        x = self._noise(p.rows, p.columns)
        residual = None if self._residual is None else self._noise(p.rows, p.outputs).mul_(1e-3)
        bias = None if self._bias is None else self._bias.float()
        before = None if residual is None else residual.float()
        expected = reference(x.float(), weight.float(), bias, gated=p.gated, residual=before)
        try:
            out = self._product(tiles, x, residual)(weight)
        except Exception as error:  # the compiler's, the driver's, or our own
            return " ".join(f"{type(error).__name__}: {error}".split())[:120]
        wrong = ((out.float() - expected).norm() / expected.norm()).item()
        return None if wrong < MAX_ERROR else f"relative error {wrong:.1e}"

    def _product(self, tiles: Tiling, x: Tensor, residual: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The product so cut up, of a weight."""
        gated = self.product.gated
        if isinstance(tiles, RowTiles):
            return lambda weight: row_linear(RowProduct(x, weight, self._bias, tiles), gated=gated, residual=residual)
        return lambda weight: small_linear(
            x, weight, self._bias, self._workspace, tiles, gated=gated, residual=residual
        )

    def reject_all(self, tilings: Sequence[Tiling]) -> dict[Tiling, str]:
        """Those to be rejected, and why; compiles several at a time."""
        stream = torch.cuda.current_stream() if self.device.type == "cuda" else None

        def reject(tiles: Tiling) -> str | None:
            with torch.inference_mode(), torch.cuda.stream(stream) if stream is not None else nullcontext():
                return self.reject(tiles)

        if stream is None:  # the interpreter knows one thread
            found = [reject(tiles) for tiles in tilings]
        else:
            with ThreadPoolExecutor(COMPILERS) as threads:
                found = list(threads.map(reject, tilings))
        return {tiles: why for tiles, why in zip(tilings, found, strict=True) if why is not None}

    def alone(self, tiles: Tiling | None) -> Form:
        """The product with each of the weights in turn; None: the library's, and the activation after it."""
        p = self.product
        if tiles is None:
            one: Callable[[Tensor], Tensor] = partial(F.linear, self._x, bias=self._bias)
            each = (lambda weight: silu_mul(one(weight))) if p.gated else one
        else:
            each = self._product(tiles, self._x, self._residual)

        def call() -> None:
            for weight in self._weights:
                each(weight)

        return Form(call, self.device, self._pool, least=2, most=100, window_us=ALONE_US)

    def alone_us(self, tilings: Sequence[Tiling | None], rounds: int) -> dict[Tiling | None, float]:
        """Times of one product; the first tiling is what the others are compared with."""
        first, *others = tilings
        base = self.alone(first)
        found: dict[Tiling | None, float] = {}
        for tiles in others:
            compared = compare(base, {"": self.alone(tiles)}, rounds)
            found[tiles] = (compared.base - compared.saved("")) / len(self._weights)
        return {first: compare(base, {}, rounds).base / len(self._weights)} | found


@contextmanager
def taking(tiles: Tiling | None, product: Product) -> Iterator[None]:
    """While this is in force, the layers' products of this shape are cut up so; None: left to the library.

    Raises:
        RuntimeError: on leaving, if no product asked: the engine has changed, and figures would be wrong.
    """
    asked = False
    mine = (product.outputs, product.columns, product.gated)

    def rule(rows: int, outputs: int, columns: int, gated: bool) -> Tiles | None:
        nonlocal asked
        if (outputs, columns, gated) != mine:
            return tiles_for(rows, outputs, columns, gated)
        asked = True
        return tiles if isinstance(tiles, Tiles) else None

    def row_rule(outputs: int, columns: int, *, gated: bool = False, rotated: bool = False) -> RowTiles | None:
        nonlocal asked
        if (outputs, columns, gated) != mine or rotated != (product.name == "qkv"):
            return row_tiles_for(outputs, columns, gated=gated, rotated=rotated)
        asked = True
        return tiles if isinstance(tiles, RowTiles) else None

    # The layers know no other way to be told: a seam for it would be there for this alone.
    with patch.object(linear, "tiles_for", rule), patch.object(linear, "row_tiles_for", row_rule):
        yield
    if not asked:
        raise RuntimeError(f"no product of the step is a {product}")


def tune(
    product: Product, step: DecodeStep, num_layers: int, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """A product's figures, as the result file has them."""
    today = taken(product)
    wanted: list[Tiling | None] = [today, None, *(options.tiles or candidates(product))]
    bench = Bench(product, device)
    rejected = bench.reject_all([tiles for tiles in dict.fromkeys(wanted) if tiles is not None])
    if today in rejected:
        raise RuntimeError(f"{product}: what is taken, {today}, is no good: {rejected[today]}")
    tilings = [tiles for tiles in dict.fromkeys(wanted) if tiles not in rejected]
    alone_us = bench.alone_us(tilings, options.rounds)
    saved_us: dict[Tiling | None, float] = {}
    spread_us = 0.0

    def in_layer(tried: Sequence[Tiling | None]) -> None:
        nonlocal spread_us
        for tiles in tried:
            found = compare(step.base, {"": step.form(partial(taking, tiles, product))}, options.rounds)
            saved_us[tiles] = found.saved("") / num_layers
            spread_us = max(spread_us, found.spread("") / num_layers)

    in_layer(tilings)
    if options.prefetch:
        best = [tiles for tiles in ranked(saved_us) if isinstance(tiles, Tiles)][:2]
        other = [tiles._replace(prefetch=lines) for tiles in best for lines in PREFETCHES if tiles.prefetch != lines]
        new = [tiles for tiles in dict.fromkeys(other) if tiles not in saved_us]
        unfit = bench.reject_all(new)
        rejected |= unfit
        in_layer([tiles for tiles in new if tiles not in unfit])
    return {
        "floor_us": round(product.floor_us, 2),
        "today": text(today),
        "saved_within_us": round(spread_us, 2),
        "tilings_us": {
            text(tiles): {"saved": round(saved_us[tiles], 2)}
            | ({"alone": round(alone_us[tiles], 2)} if tiles in alone_us else {})
            for tiles in ranked(saved_us)
        },
        "rejected": {text(tiles): why for tiles, why in rejected.items()},
    }


def ranked(saved_us: Mapping[Tiling | None, float]) -> list[Tiling | None]:
    """The best in the layer first."""
    return sorted(saved_us, key=lambda tiles: -saved_us[tiles])


def text(tiles: Tiling | None) -> str:
    return "library" if tiles is None else ",".join(map(str, tiles))


def show(title: str, found: Mapping[str, Any], most: int = 6) -> None:
    """A product's figures for people: the best in the layer, the library, and what is taken today."""
    today = found["today"]
    print(f"{title}: floor {found['floor_us']:.1f} us; what is saved varies by {found['saved_within_us']:.2f}")
    for place, (name, figures) in enumerate(found["tilings_us"].items()):
        if place < most or name in (today, "library"):
            alone = f"{figures['alone']:.2f}" if "alone" in figures else "-"
            mark = "  today" if name == today else ""
            print(f"  {name:<24} alone {alone:>8} us, saves {figures['saved']:+7.2f} us a layer{mark}")
    for name, why in found["rejected"].items():
        print(f"  {name:<24} rejected: {why}")
    sys.stdout.flush()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["llama8b", "qwen1b5"], choices=sorted(SHAPES), metavar="NAME")
    add("--rows", nargs="+", type=int, default=[1, 16, 64], metavar="N", help=f"of the products, 1 to {MAX_ROWS}")
    add("--products", nargs="+", default=list(PRODUCTS), choices=PRODUCTS, metavar="NAME")
    add("--tiles", nargs="+", type=parse_tiles, metavar="N,N,...", help="candidates instead of our lists")
    add("--prefetch", action="store_true", help="try other prefetch lengths of the two best")
    add("--seconds", type=float, default=500.0, help="begin no product after so long")
    add("--layers", type=layers, default=8, metavar="N", help='of the step, or "all"')
    add("--rounds", type=int, default=3, help="comparisons of each candidate, of which the median counts")
    add("--out", type=Path, help="result file (default: benchmarks/results/tune_linear-COMMIT.json)")
    add("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not all(1 <= rows <= MAX_ROWS for rows in options.rows):
        parser.error(f"--rows: 1 to {MAX_ROWS}, more are left to the library")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options, begin_s = parse(arguments), time.monotonic()
    at_commit, found_on, device = commit(), machine(), torch.device(options.device)
    path = options.out or RESULTS / file_name("tune_linear", at_commit)
    failed = 0
    with measuring(device):
        for name in options.models:
            shape = cut(SHAPES[name], options.layers)
            model = make_model(shape, device)
            for rows in options.rows:
                batch = Batch(rows, CONTEXT)
                memory = page_memory(shape, batch, [PAGE_SIZE], 0, device)
                step = DecodeStep(model, shape, batch, PAGE_SIZE, memory)
                for product in (Product.of(shape, part, rows) for part in options.products):
                    if time.monotonic() - begin_s > options.seconds:
                        print(f"out of time: {name} {product} left out", flush=True)
                        continue
                    try:
                        found = tune(product, step, shape.layers, options, device)
                    except Exception:  # the other products are still worth having
                        failed += 1
                        print(f"{name} {product} failed:\n{traceback.format_exc(limit=-3)}", flush=True)
                        continue
                    show(f"{name} {product}", found)
                    merge(path, found_on, at_commit, {name: {str(product): found}})
            del model
    print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
