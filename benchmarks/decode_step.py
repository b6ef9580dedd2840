"""A decode step on random weights, in several forms of which one can be compared with another.

step_breakdown.py and tune_linear.py use it. A `DecodeStep` is the engine's own step (engine/decode_graphs.py) for one
batch, over pages in random order. `form(change)` captures it as it is while `change` is in force: with a stage left
out, say, or a product cut up otherwise. `compare` replays forms in turn, the unchanged one before and after each other
one: under load a card's clock sinks by per cents within seconds, more than most of what there is to see.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.shapes import BYTES, Shape
from penstock.engine.batch_state import BatchState
from penstock.engine.decode_graphs import DecodeGraphs
from penstock.engine.kv_pool import KVLayout
from penstock.kernels import launch, linear
from penstock.kernels.sample import SampleWorkspace
from penstock.models.decoder import CausalLM
from penstock.models.spec import parse_spec
from penstock.models.weights import dummy_weights

MAX_CONTEXT = 32768  # what a captured step allows for, whatever the contexts are
MOST_STEPS = 32  # of a window; the contexts grow by so many tokens in it, and start anew with the next
LEAST_STEPS = 8
WINDOW_US = 20_000.0  # about so long is a window of steps

Change = Callable[[], AbstractContextManager[object]]
"""Makes what is in force while a form of a step is captured. What its `__enter__` gives is kept as long as the form."""


@dataclass(frozen=True)
class Batch:
    """Sequences that decode one token each."""

    sequences: int
    context: int  # tokens in the cache at a window's start

    def __str__(self) -> str:
        return f"{self.sequences}x{self.context}"

    @classmethod
    def parse(cls, text: str) -> Batch:
        """From SEQUENCESxCONTEXT. Raises ValueError for anything else."""
        sequences, _, context = text.partition("x")
        batch = cls(int(sequences), int(context))
        if batch.sequences < 1 or batch.context < 1:
            raise ValueError(f"{text}: both must be positive")
        return batch

    def pages(self, page_size: int) -> int:
        """Of a sequence, to a window's end."""
        return -(-(self.context + MOST_STEPS) // page_size)


def dtype_on(device: torch.device) -> torch.dtype:
    """bfloat16, but for Triton's interpreter, which multiplies matrices of it wrongly: numpy has no such type."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def make_model(shape: Shape, device: torch.device) -> CausalLM:
    """A model of a shape with random weights."""
    spec = parse_spec(shape.config())
    return CausalLM(spec, dummy_weights(CausalLM.parameters(spec), dtype_on(device), device, None))


def page_layout(shape: Shape, page_size: int, device: torch.device) -> KVLayout:
    return KVLayout(shape.layers, shape.kv_heads, shape.head_dim, page_size, dtype_on(device))


def page_memory(shape: Shape, batch: Batch, page_sizes: Sequence[int], size_bytes: int, device: torch.device) -> Tensor:
    """Random keys and values, [elements]: room for the batch in any of the page sizes, or size_bytes if that is more.

    Pages of every size can be laid over it, so that sizes are compared over the same bytes.
    """
    page_bytes = {size: page_layout(shape, size, device).page_bytes for size in page_sizes}
    needed = max(batch.sequences * batch.pages(size) * page_bytes[size] for size in page_sizes)
    return torch.empty(max(size_bytes, needed) // BYTES, dtype=dtype_on(device), device=device).normal_()


class Form:
    """One form of some work, to be replayed: a graph, or on CPU, where times mean nothing, the calls themselves.

    Must be made and used in one stream that is not the default one, see `measuring`.
    """

    def __init__(
        self,
        call: Callable[[], object],
        device: torch.device,
        pool: Any = None,
        *,
        change: Change = nullcontext,
        rewind: Callable[[], object] = lambda: None,
        least: int = LEAST_STEPS,
        most: int = MOST_STEPS,
        window_us: float = WINDOW_US,
    ) -> None:
        """The call as it is while what `change` makes is in force. Raises what a launch raises.

        pool: of `torch.cuda.graph_pool_handle`, shared by forms that are compared.
        rewind: undoes what calls have changed; called before each window of `least` to `most` calls.
        """
        self._rewind, self._change = rewind, change
        self._replay = call
        self._device = device
        self._calls = 1  # of a window
        if device.type != "cuda":
            return
        graph = torch.cuda.CUDAGraph()
        with change() as held:
            rewind()
            call()  # compiles, and allocates what outlives the call
            torch.cuda.current_stream().synchronize()
            graph.capture_begin(pool=pool)
            try:
                call()
            finally:
                graph.capture_end()
        self._replay = graph.replay
        self._held = (call, held)  # the graph reads and writes what they own
        self._change = nullcontext
        self._calls = least - 1
        self._calls = max(least, min(most, round(window_us / self.mean_us()))) - 1

    def mean_us(self) -> float:
        """Mean time of a call in one window, in microseconds on the device."""
        self._rewind()
        with self._change():
            if self._device.type != "cuda":
                begin_s = time.perf_counter()
                self._replay()
                return (time.perf_counter() - begin_s) * 1e6
            self._replay()  # while it runs, launches get ahead
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(self._calls):
                self._replay()
            end.record()
            end.synchronize()
            elapsed_ms: float = begin.elapsed_time(end)
            return elapsed_ms * 1e3 / self._calls


class DecodeStep:
    """The step of one batch: its state and its pages. `base` is its unchanged form."""

    def __init__(self, model: CausalLM, shape: Shape, batch: Batch, page_size: int, memory: Tensor) -> None:
        """memory: of `page_memory`; the batch's pages are scattered over all of it. Raises what a launch raises."""
        self._batch, self._device = batch, memory.device
        self._model, self._page_size = model, page_size
        self._max_context = min(MAX_CONTEXT, shape.max_position)
        layout = page_layout(shape, page_size, self._device)
        num_pages = memory.nbytes // layout.page_bytes
        pages = memory[: num_pages * layout.page_bytes // BYTES].view(num_pages, *layout.page_shape)
        self._kv = [(pages[:, :, layer, 0], pages[:, :, layer, 1]) for layer in range(shape.layers)]
        count, each = batch.sequences, batch.pages(page_size)
        state = self._state = BatchState(count, -(-self._max_context // page_size), shape.vocab, self._device)
        state.tables[:, :each] = torch.randperm(num_pages, device=self._device)[: count * each].view(count, each)
        state.last_tokens.random_(shape.vocab)
        state.rows.copy_(torch.arange(count))
        self._workspace = SampleWorkspace.allocate(count, shape.vocab, self._device)
        self._tokens_out = torch.zeros(1, count, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        # Kept, not only for comparisons: a pool of graphs cannot be used again after the last graph in it has gone.
        self.base = self.form()

    def form(self, change: Change = nullcontext) -> Form:
        """The step as it is while what `change` makes is in force. Raises what a launch raises."""
        count = self._batch.sequences
        # Made anew: what was planned for the step as it was (splits of attention, say) must not be used again.
        graphs = DecodeGraphs(
            self._model, self._kv, self._state, self._workspace, self._tokens_out, self._page_size, count,
            self._max_context,
        )  # fmt: skip
        return Form(lambda: graphs.run(count), self._device, self._pool, change=change, rewind=self._rewind)

    def _rewind(self) -> None:
        """Every sequence has the batch's context again."""
        self._state.lengths.fill_(self._batch.context)


@dataclass(frozen=True)
class Compared:
    """Forms beside the unchanged one; microseconds a call."""

    windows_us: list[float]  # the unchanged form's windows, in the order of time
    saved_us: dict[str, list[float]]  # each other form's: mean of the unchanged one's before and after, less its own

    @property
    def base(self) -> float:
        return statistics.median(self.windows_us)

    @property
    def base_spread(self) -> float:
        return max(self.windows_us) - min(self.windows_us)

    def saved(self, name: str) -> float:
        return statistics.median(self.saved_us[name])

    def spread(self, name: str) -> float:
        return max(self.saved_us[name]) - min(self.saved_us[name])


def compare(base: Form, others: Mapping[str, Form], rounds: int) -> Compared:
    """Replay base, the first of the others, base, the second, base and so on, `rounds` times."""
    base.mean_us()
    windows = [base.mean_us()]
    saved: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(rounds):
        for name, form in others.items():
            took = form.mean_us()
            windows.append(base.mean_us())
            saved[name].append((windows[-2] + windows[-1]) / 2 - took)
        if not others:
            windows.append(base.mean_us())
    return Compared(windows, saved)


def cut(shape: Shape, layers: int | None) -> Shape:
    """The shape with so many layers, at most its own; None: all of them."""
    return replace(shape, layers=min(shape.layers, layers or shape.layers))


def layers(text: str) -> int | None:
    """A command's number of layers: a number, or "all", which is None. Raises ValueError for anything else."""
    if text == "all":
        return None
    if int(text) < 1:
        raise ValueError(f"{text} layers")
    return int(text)


@contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """Around everything: a stream of its own; on CPU, which only tests use, the GPU's code in Triton's interpreter.

    Raises:
        SystemExit: on CPU without TRITON_INTERPRET=1.
    """
    if device.type == "cuda":
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(device)):
            yield
        return
    if not launch.INTERPRETED:
        raise SystemExit("without a GPU this needs TRITON_INTERPRET=1, and its times mean nothing")
    with (
        torch.inference_mode(),
        patch.object(launch, "interpret_ops", True),
        patch.object(linear, "can_pack", lambda weight: False),
    ):
        yield
