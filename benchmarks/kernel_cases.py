"""What kernels.py times: for each kernel and shape the calls to make, and the bytes and operations they cannot avoid.

Each function yields the cases of one kernel. A case is built when its turn comes: its `build(copies)` returns that many
calls, each on memory of its own, so that what a call reads has left the cache since the call before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.shapes import Shape
from penstock.kernels.decode_attention import DecodePlan, decode_attention
from penstock.kernels.gated_activation import silu_mul
from penstock.kernels.linear import make_linear
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.prefill_attention import prefill_attention
from penstock.kernels.rms_norm import add_rms_norm
from penstock.kernels.rotary import rotary_factors
from penstock.kernels.rotary_store import Heads, rotary_store
from penstock.kernels.sample import SampleWorkspace, SamplingColumns, sample
from penstock.kernels.small_linear import LinearWorkspace

Call = Callable[[], object]
MAX_POOL_BYTES = 40 << 30
MAX_DECODES = 256  # more tokens are one prompt
MIN_LAYERS = 4  # of a pool: pages are not contiguous for one layer


@dataclass(frozen=True)
class Case:
    """A kernel at a shape."""

    kernel: str
    shape: str
    size_bytes: int  # read once and written once
    flops: float
    build: Callable[[int], list[Call]]

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.shape}"


@dataclass(frozen=True)
class Sizes:
    """Which shapes are timed."""

    decodes: tuple[tuple[int, int], ...]  # (sequences, context)
    mixtures: dict[str, tuple[int, ...]]  # contexts of sequences that are not alike; 0: room that is not used
    prompts: tuple[tuple[int, int, int], ...]  # (sequences, cached tokens, new tokens)
    rows: tuple[int, ...]  # of matrix products
    tokens: tuple[int, ...]  # of elementwise kernels
    batches: tuple[int, ...]  # of sampling
    page_size: int = 64


FULL = Sizes(
    decodes=tuple(product((1, 64, 256), (1024, 4096, 8192))),
    mixtures={
        "b4/16 c8320": (8320,) * 4 + (0,) * 12,
        "b64 60 of c500, 4 of c8000": ((500,) * 15 + (8000,)) * 4,
        "b40 c317 to c8101": tuple(197 * i % 8000 + 317 for i in range(40)),
    },
    prompts=((1, 0, 2048), (1, 0, 8192), (8, 0, 1024), (1, 8176, 16), (1, 8192, 8192), (1, 0, 31744)),
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 8192),
    tokens=(1, 64, 256, 8192),
    batches=(1, 64, 256),
)


@dataclass(frozen=True)
class Place:
    """Where tensors are, and of which type."""

    device: torch.device
    dtype: torch.dtype

    def noise(self, *size: int, std: float = 1.0) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.device).normal_(std=std)

    def integers(self, values: list[int] | list[list[int]], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def all_cases(shape: Shape, sizes: Sizes, place: Place) -> Iterator[Case]:
    """Every case of a model's shape."""
    for cases in (decode_cases, prefill_cases, norm_cases, rotary_cases, silu_cases, linear_cases, sample_cases):
        yield from cases(shape, sizes, place)


def heads_of(shape: Shape) -> str:
    return f"{shape.heads}/{shape.kv_heads}x{shape.head_dim}"


def pool(shape: Shape, pages: int, page_size: int, layers: int, place: Place) -> list[tuple[Tensor, Tensor]]:
    """Per layer (k_pages, v_pages) of a pool in the engine's layout."""
    memory = place.noise(pages, shape.kv_heads, layers, 2, page_size, shape.head_dim)
    return [(memory[:, :, layer, 0], memory[:, :, layer, 1]) for layer in range(layers)]


def page_tables(contexts: list[int], page_size: int) -> tuple[list[list[int]], int]:
    """Tables of scattered pages, and how many pages there are."""
    counts = [-(-context // page_size) for context in contexts]
    ids = random.Random(1).sample(range(sum(counts)), sum(counts))
    width = max(counts)
    return [[ids.pop() for _ in range(count)] + [0] * (width - count) for count in counts], sum(counts)


def decode_cases(shape: Shape, sizes: Sizes, place: Place) -> Iterator[Case]:
    """Paged decode attention, one new token a sequence; copies are layers of one pool."""
    alike = {f"b{sequences} c{context}": (context,) * sequences for sequences, context in sizes.decodes}
    for name, contexts in (alike | sizes.mixtures).items():
        kv_bytes = 2 * sum(contexts) * shape.kv_heads * shape.head_dim * place.dtype.itemsize
        q_bytes = 2 * sum(map(bool, contexts)) * shape.heads * shape.head_dim * place.dtype.itemsize
        flops = 4.0 * sum(contexts) * shape.heads * shape.head_dim
        build = partial(_decode, shape, sizes.page_size, place, list(contexts), kv_bytes)
        yield Case("decode_attention", f"{heads_of(shape)} {name}", kv_bytes + q_bytes, flops, build)


def _decode(shape: Shape, page_size: int, place: Place, contexts: list[int], kv_bytes: int, copies: int) -> list[Call]:
    layers = max(1, min(max(copies, MIN_LAYERS), MAX_POOL_BYTES // kv_bytes))
    tables, pages = page_tables(contexts, page_size)
    sequences = len(contexts)
    plan = DecodePlan.allocate(sequences, 1, shape.kv_heads, shape.head_dim, None, place.device)
    plan.lay_out(place.integers(list(range(sequences))), place.integers(contexts))
    q = place.noise(sequences, shape.heads, shape.head_dim)
    told = place.integers(tables)
    options = {"scale": shape.head_dim**-0.5, "plan": plan, "out": torch.empty_like(q)}
    return [
        partial(decode_attention, q, k, v, told, **options) for k, v in pool(shape, pages, page_size, layers, place)
    ]


def prefill_cases(shape: Shape, sizes: Sizes, place: Place) -> Iterator[Case]:
    """Causal attention of a prompt over pages, by each backend; and torch's own, on contiguous K and V."""
    for sequences, cached, new in sizes.prompts:
        flops = 4.0 * sequences * (new * cached + new * (new + 1) / 2) * shape.heads * shape.head_dim
        heads = 2 * (cached + new) * shape.kv_heads + 2 * new * shape.heads
        size_bytes = sequences * heads * shape.head_dim * place.dtype.itemsize
        text = f"{heads_of(shape)} {sequences}x{new}" + (f" over {cached}" if cached else "")
        for backend in PREFILL_BACKENDS:
            paged = partial(_paged_prefill, shape, sizes.page_size, place, sequences, cached, new, backend)
            yield Case(f"prefill_attention {backend}", text, size_bytes, flops, paged)
        if cached == 0 and place.device.type == "cuda":
            for label, library in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
                dense = partial(_dense_prefill, shape, place, sequences, new, library)
                yield Case(f"torch {label} attention", text, size_bytes, flops, dense)


PREFILL_BACKENDS = ("AUTO", "HOPPER", "CUDNN", "TRITON")


def _paged_prefill(
    shape: Shape, page_size: int, place: Place, sequences: int, cached: int, new: int, backend: str, copies: int
) -> list[Call]:
    contexts = [cached + new] * sequences
    tables, pages = page_tables(contexts, page_size)
    batch = PagedBatch.build([new] * sequences, contexts, tables, page_size, place.device)
    q = place.noise(sequences * new, shape.heads, shape.head_dim)
    out = torch.empty_like(q)
    [(k, v), *_] = pool(shape, pages, page_size, MIN_LAYERS, place)
    scale = shape.head_dim**-0.5
    return [partial(prefill_attention, q, k, v, batch, 0, scale=scale, sliding_window=None, backend=backend, out=out)]


def _dense_prefill(
    shape: Shape, place: Place, sequences: int, new: int, library: SDPBackend, copies: int
) -> list[Call]:
    q, k, v = (place.noise(sequences, n, new, shape.head_dim) for n in (shape.heads, shape.kv_heads, shape.kv_heads))

    def call() -> Tensor:
        with sdpa_kernel(library):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return [call]


def norm_cases(shape: Shape, sizes: Sizes, place: Place) -> Iterator[Case]:
    """Residual addition and RMSNorm: two tensors in, two out."""
    for tokens in sizes.tokens:
        size_bytes = 4 * tokens * shape.hidden * place.dtype.itemsize
        build = partial(_norm, shape, place, tokens)
        yield Case("add_rms_norm", f"{tokens}x{shape.hidden}", size_bytes, 0, build)


def _norm(shape: Shape, place: Place, tokens: int, copies: int) -> list[Call]:
    weight = place.noise(shape.hidden)
    # What is added is small: a residual that takes it thousands of times must not overflow.
    pairs = ((place.noise(tokens, shape.hidden, std=1e-3), place.noise(tokens, shape.hidden)) for _ in range(copies))
    return [partial(add_rms_norm, x, residual, weight, 1e-5) for x, residual in pairs]


def rotary_cases(shape: Shape, sizes: Sizes, place: Place) -> Iterator[Case]:
    """Rotation and KV store: the joined projection in; queries, and keys and values in pages, out."""
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    for tokens in sizes.tokens:
        size_bytes = tokens * (2 * width * place.dtype.itemsize + 4 * shape.head_dim)  # the factors are float32
        build = partial(_rotary, shape, sizes.page_size, place, tokens)
        yield Case("rotary_store", f"{heads_of(shape)} {tokens}", size_bytes, 0, build)


def _rotary(shape: Shape, page_size: int, place: Place, tokens: int, copies: int) -> list[Call]:
    decodes = tokens <= MAX_DECODES
    contexts = [1024] * tokens if decodes else [tokens]
    tables, pages = page_tables(contexts, page_size)
    batch = PagedBatch.build([1] * tokens if decodes else [tokens], contexts, tables, page_size, place.device)
    frequencies = torch.logspace(0, -4, shape.head_dim // 2, device=place.device)
    factors = rotary_factors(batch.positions, frequencies, 1.0, place.dtype)
    layers = pool(shape, pages, page_size, MIN_LAYERS, place)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    store = partial(rotary_store, heads=Heads(shape.heads, shape.kv_heads))
    return [
        partial(store, place.noise(tokens, width), factors, *layers[copy % MIN_LAYERS], batch) for copy in range(copies)
    ]


def silu_cases(shape: Shape, sizes: Sizes, place: Place) -> Iterator[Case]:
    """Gated activation: gate and up in, one out."""
    for tokens in sizes.tokens:
        size_bytes = 3 * tokens * shape.mlp * place.dtype.itemsize
        yield Case("silu_mul", f"{tokens}x{shape.mlp}", size_bytes, 0, partial(_silu, shape, place, tokens))


def _silu(shape: Shape, place: Place, tokens: int, copies: int) -> list[Call]:
    return [partial(silu_mul, place.noise(tokens, 2 * shape.mlp)) for _ in range(copies)]


def linear_cases(shape: Shape, sizes: Sizes, place: Place) -> Iterator[Case]:
    """Every product of the model: the engine's, alone and with what follows it in a layer, and torch's."""
    for (name, (outputs, inputs)), rows in product(shape.linears.items(), sizes.rows):
        if name == "head" and rows > MAX_DECODES:
            continue  # only what is sampled goes through the head
        size_bytes = (outputs * inputs + rows * (inputs + outputs)) * place.dtype.itemsize
        text = f"{shape.name} {name} {rows}x{inputs}x{outputs}"
        flops = 2.0 * rows * outputs * inputs
        for kernel in ("linear", *FOLLOWED.get(name, ()), "torch linear"):
            build = partial(_linear, shape, name, place, rows, kernel)
            yield Case(kernel, text, size_bytes, flops, build)


FOLLOWED = {"gate_up": ("linear.gated",), "o": ("linear.add_to",), "down": ("linear.add_to",)}


def _linear(shape: Shape, name: str, place: Place, rows: int, kernel: str, copies: int) -> list[Call]:
    outputs, inputs = shape.linears[name]
    x, bias = place.noise(rows, inputs), _bias(shape, name, place)
    # What is added to a residual thousands of times is small, or it would overflow.
    std = (1e-3 if kernel == "linear.add_to" else 1.0) * inputs**-0.5
    weights = (place.noise(outputs, inputs, std=std) for _ in range(copies))
    if kernel == "torch linear":
        return [partial(F.linear, x, weight, bias) for weight in weights]
    workspace = LinearWorkspace.allocate(place.device)
    layers = [make_linear(weight, bias, workspace) for weight in weights]
    if kernel == "linear.gated":
        return [partial(layer.gated, x) for layer in layers]
    if kernel == "linear.add_to":
        residual = place.noise(rows, outputs)
        return [partial(layer.add_to, residual, x) for layer in layers]
    return [partial(layer, x) for layer in layers]


def _bias(shape: Shape, name: str, place: Place) -> Tensor | None:
    has_bias = name == "qkv" and shape.architecture == "Qwen2ForCausalLM"
    return place.noise(shape.linears[name][0]) if has_bias else None


def sample_cases(shape: Shape, sizes: Sizes, place: Place) -> Iterator[Case]:
    """One token a row from logits: greedy and plain temperature are one pass, top-p needs its threshold first."""
    kinds = (("greedy", 0.0, 1.0), ("temperature", 0.8, 1.0), ("top-p", 0.8, 0.9))
    for rows, (label, temperature, top_p) in product(sizes.batches, kinds):
        size_bytes = rows * shape.vocab * place.dtype.itemsize
        build = partial(_sample, shape, place, rows, temperature, top_p)
        yield Case(f"sample {label}", f"{rows}x{shape.vocab}", size_bytes, 0, build)


def _sample(shape: Shape, place: Place, rows: int, temperature: float, top_p: float, copies: int) -> list[Call]:
    columns = SamplingColumns.allocate(rows, shape.vocab, place.device)
    columns.temperature.fill_(temperature)
    columns.top_p.fill_(top_p)
    columns.seeds.copy_(torch.arange(rows))
    workspace = SampleWorkspace.allocate(rows, shape.vocab, place.device)
    slots, positions = place.integers(list(range(rows))), place.integers([1024] * rows)
    out = torch.empty(rows, dtype=torch.int64, device=place.device)
    draw = partial(sample, out=out)
    logits = (place.noise(rows, shape.vocab, std=3.0) for _ in range(copies))
    return [partial(draw, x, slots, positions, columns, workspace) for x in logits]
