"""One pre-norm decoder with grouped-query attention and a gated MLP; `ModelSpec` says which. Llama, Mistral, Qwen 2, 3.

The engine calls `forward` with a step's tokens and `logits` with the rows it samples from, under torch.inference_mode.
Weights come as a dictionary that `models.weights` filled after the plan of `CausalLM.parameters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

from torch import Tensor

from penstock.kernels.attention_inputs import attention_inputs
from penstock.kernels.embedding import embed
from penstock.kernels.launch import use_triton
from penstock.kernels.linear import Linear, make_linear
from penstock.kernels.paged_attention import begin_attention, paged_attention
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.rms_norm import Normed
from penstock.kernels.rotary import rotary_factors
from penstock.kernels.rotary_store import Heads
from penstock.kernels.small_linear import LinearWorkspace
from penstock.models.spec import ModelSpec
from penstock.models.weights import Parameter


class CausalLM:
    """A decoder with its weights.

    The weight dictionary is emptied on the way: each tensor may be repacked, and is freed before the next one.
    """

    def __init__(self, spec: ModelSpec, weights: dict[str, Tensor], *, attention_backend: str = "AUTO") -> None:
        self.spec = spec
        self._embedding = weights.pop("embedding.weight")
        self._norm = weights.pop("norm.weight")
        self._frequencies = spec.rope.frequencies(spec.head_dim, self._embedding.device)
        workspace = LinearWorkspace.allocate(self._embedding.device) if use_triton(self._embedding) else None
        shared = _Shared(spec, workspace, attention_backend)
        self._layers = [_Layer(shared, index, weights) for index in range(spec.num_layers)]
        # On CPU a tied head is repacked beside the table that tokens are looked up in: one matrix more in memory, for a
        # third of the head's time, and the head is the largest matrix of a small model.
        head = weights.pop("head.weight", self._embedding)
        self._head = make_linear(head, None, workspace)

    @classmethod
    def parameters(cls, spec: ModelSpec) -> Iterator[Parameter]:
        """Every weight: its name here, and the checkpoint's tensors that are stacked to make it."""
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        hidden, mlp = spec.hidden_size, spec.intermediate_size
        yield Parameter("embedding.weight", ("model.embed_tokens.weight",), (spec.vocab_size,), hidden)
        for index in range(spec.num_layers):
            ours, theirs = f"layers.{index}", f"model.layers.{index}"
            qkv = tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv")
            gate_up = tuple(f"{theirs}.mlp.{name}_proj" for name in ("gate", "up"))
            yield from _linear(f"{ours}.qkv", qkv, (q_size, kv_size, kv_size), hidden, spec.qkv_bias)
            yield from _linear(f"{ours}.output", (f"{theirs}.self_attn.o_proj",), (hidden,), q_size, spec.output_bias)
            yield from _linear(f"{ours}.gate_up", gate_up, (mlp, mlp), hidden, spec.mlp_bias)
            yield from _linear(f"{ours}.down", (f"{theirs}.mlp.down_proj",), (hidden,), mlp, spec.mlp_bias)
            yield Parameter(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",), (hidden,))
            yield Parameter(f"{ours}.mlp_norm.weight", (f"{theirs}.post_attention_layernorm.weight",), (hidden,))
            if spec.qk_norm:
                for name in "qk":
                    source = f"{theirs}.self_attn.{name}_norm.weight"
                    yield Parameter(f"{ours}.{name}_norm.weight", (source,), (spec.head_dim,))
        yield Parameter("norm.weight", ("model.norm.weight",), (hidden,))
        tied_to = "model.embed_tokens.weight" if spec.tie_word_embeddings else None
        yield Parameter("head.weight", ("lm_head.weight",), (spec.vocab_size,), hidden, tied_to)

    def one_of_each_layer(self) -> CausalLM:
        """The same weights, but only the first layer of each kind, and the last: their kernels are those of all."""
        windows = self.spec.sliding_windows
        last = len(windows) - 1
        kept = sorted({windows.index(window) for window in windows[:last]} | {last})
        few = copy(self)
        few._layers = [self._layers[index] for index in kept]
        few.spec = replace(self.spec, num_layers=len(kept), sliding_windows=tuple(windows[index] for index in kept))
        return few

    def forward(
        self,
        token_ids: Tensor,
        batch: PagedBatch,
        kv: Sequence[tuple[Tensor, Tensor]],
        last_tokens: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, hidden] of the step's tokens [T], final norm applied; their K/V go into the pages.

        Args:
            kv: a layer's keys and values, each a view [num_pages, num_kv_heads, page_size, head_dim] of the pool.
            last_tokens: int [S], which tokens are their sequences' last. The result is theirs only, [S, hidden], and
                the last layer computes nothing of the others but their K/V: 3 % of a long prompt's work for llama8b.
        """
        spec = self.spec
        frequencies = self._frequencies
        if spec.rope.kind == "dynamic":
            frequencies = spec.rope.frequencies_at(batch.positions, spec.head_dim)
        # Embedding comes last: it lets the first layer start, and has then waited for all of these (kernels/launch.py).
        factors = rotary_factors(batch.positions, frequencies, spec.rope.amplitude, self._embedding.dtype)
        ends, windows = None, spec.sliding_windows
        if last_tokens is not None:
            ends = last_tokens, batch.at_ends(last_tokens)
            begin_attention(ends[1], windows[-1:], spec.num_kv_heads, spec.head_dim)
            windows = windows[:-1]
        begin_attention(batch, windows, spec.num_kv_heads, spec.head_dim)
        residual = embed(token_ids, self._embedding)
        delta: Tensor | None = None
        for layer, (k_pages, v_pages) in zip(self._layers[:-1], kv[:-1], strict=True):
            residual, delta = layer(delta, residual, factors, batch, k_pages, v_pages)
        residual, delta = self._layers[-1](delta, residual, factors, batch, *kv[-1], ends)
        return Normed(residual, self._norm, spec.rms_eps, delta).tensor()

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [N, vocab], in the model's type, of the tokens that may follow hidden states [N, hidden]."""
        return self._head(hidden)


@dataclass(frozen=True)
class _Shared:
    """What the layers of a model have in common."""

    spec: ModelSpec
    workspace: LinearWorkspace | None
    attention_backend: str


class _Layer:
    """Attention and MLP of one layer."""

    def __init__(self, shared: _Shared, index: int, weights: dict[str, Tensor]) -> None:
        def linear(name: str) -> Linear:
            prefix = f"layers.{index}.{name}"
            weight, bias = weights.pop(f"{prefix}.weight"), weights.pop(f"{prefix}.bias", None)
            return make_linear(weight, bias, shared.workspace)

        def norm(name: str) -> Tensor:
            return weights.pop(f"layers.{index}.{name}.weight")

        spec = shared.spec
        self._scale = spec.head_dim**-0.5
        self._eps = spec.rms_eps
        self._window = spec.sliding_windows[index]
        self._backend = shared.attention_backend
        self._qkv, self._output = linear("qkv"), linear("output")
        self._gate_up, self._down = linear("gate_up"), linear("down")
        self._attention_norm, self._mlp_norm = norm("attention_norm"), norm("mlp_norm")
        q_norm, k_norm = (norm("q_norm"), norm("k_norm")) if spec.qk_norm else (None, None)
        self._heads = Heads(spec.num_heads, spec.num_kv_heads, q_norm, k_norm, spec.rms_eps)

    def __call__(
        self,
        delta: Tensor | None,
        residual: Tensor,
        factors: tuple[Tensor, Tensor],
        batch: PagedBatch,
        k_pages: Tensor,
        v_pages: Tensor,
        ends: tuple[Tensor, PagedBatch] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Adds `delta`, which the layer before left, and its own results to `residual`; returns it and what is left.

        `residual` is changed in place. `ends`: the tokens that go on after K/V have been stored, and the step of these.
        """
        q = attention_inputs(
            self._qkv,
            Normed(residual, self._attention_norm, self._eps, delta),
            factors,
            k_pages,
            v_pages,
            batch,
            self._heads,
        )
        if ends is not None:
            last_tokens, batch = ends
            q, residual = q.index_select(0, last_tokens), residual.index_select(0, last_tokens)
        out = paged_attention(
            q, k_pages, v_pages, batch, scale=self._scale, sliding_window=self._window, backend=self._backend
        )
        delta = self._output.add_to(residual, out.view(len(out), -1))
        x = Normed(residual, self._mlp_norm, self._eps, delta)
        return residual, self._down.add_to(residual, self._gate_up.gated(x))


def _linear(
    name: str, sources: tuple[str, ...], rows: tuple[int, ...], columns: int, has_bias: bool
) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", tuple(f"{source}.weight" for source in sources), rows, columns)
    if has_bias:
        yield Parameter(f"{name}.bias", tuple(f"{source}.bias" for source in sources), rows)
