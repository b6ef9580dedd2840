"""The device sampler against the engine's: the same tokens for every mix of parameters, tiles and lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.common.sampling import SamplingParams
from penstock.engine.sampler import SamplingRow, noise_seed
from penstock.engine.sampler import sample as sample_on_host
from penstock.kernels.sample import (
    COUNT_MASK,
    ENDS,
    IN_PROMPT,
    SampleWorkspace,
    SamplingColumns,
    sample,
    sample_reference,
    sample_triton,
)
from tests.kernels.variants import variants

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]
NEVER = float("-inf")


def fill(columns: SamplingColumns, slot: int, row: SamplingRow) -> None:
    """A slot as the engine writes it when a sequence joins."""
    s = row.sampling
    columns.temperature[slot] = s.temperature
    columns.top_k[slot] = max(s.top_k, 0)
    columns.top_p[slot] = s.top_p
    columns.min_p[slot] = s.min_p
    columns.repetition[slot] = s.repetition_penalty
    columns.frequency[slot] = s.frequency_penalty
    columns.presence[slot] = s.presence_penalty
    columns.seeds[slot] = row.noise_seed
    columns.min_position[slot] = row.prompt_len + s.min_tokens
    columns.uses_tokens[slot] = int(row.needs_logits_changed)
    state = columns.token_state[slot]
    state.zero_()
    state[list(row.tokens[: row.prompt_len])] |= IN_PROMPT
    state[list(row.forbidden_until_min)] |= ENDS
    for token in row.tokens[row.prompt_len :]:
        state[token] += 1


class Batch:
    """Rows of a step, their slots in an order of their own, with padding between them."""

    def __init__(self, rows: Sequence[SamplingRow], vocab: int, device: str, padding: int = 0) -> None:
        total = len(rows) + padding
        self.columns = SamplingColumns.allocate(total + 1, vocab, device)
        self.slots = torch.full((total,), -1, dtype=torch.int32, device=device)
        self.positions = torch.zeros(total, dtype=torch.int32, device=device)
        for i, row in enumerate(rows):
            fill(self.columns, total - i, row)
            self.slots[i] = total - i
            self.positions[i] = len(row.tokens)
        self.vocab, self.device, self.padding = vocab, device, padding

    def draw(self, logits: Tensor, *, tile: int = 32, capacity: int = 64, finish_tile: int = 128) -> list[int]:
        workspace = SampleWorkspace.allocate(len(self.slots), self.vocab, self.device, capacity=capacity)
        for scratch in vars(workspace).values():
            scratch.fill_(7)  # what an earlier step left
        self.workspace = workspace
        padded = torch.cat([logits, torch.full((self.padding, self.vocab), torch.nan).to(logits.dtype)])
        tokens = sample_triton(
            padded.to(self.device),
            self.slots,
            self.positions,
            self.columns,
            workspace,
            tile=tile,
            finish_tile=finish_tile,
        ).tolist()
        assert tokens[len(logits) :] == [0] * self.padding
        tokens = tokens[: len(logits)]
        last = self.columns.last_tokens.tolist()
        assert [last[slot] for slot in self.slots[: len(logits)].tolist()] == tokens
        return tokens


def normal(rows: int, vocab: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


@st.composite
def sampling(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.01, 0.6, 1.0, 1.7, 100.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 7, 40, 5000])),
        top_p=draw(st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.9, 0.999])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.02, 0.4, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5, -1.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.8, -2.0])),
        seed=draw(st.integers(0, 2**40)),
        min_tokens=draw(st.sampled_from([0, 0, 3])),
    )


@st.composite
def row(draw: st.DrawFn, vocab: int) -> SamplingRow:
    params = draw(sampling())
    prompt = draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=4))
    output = draw(st.lists(st.integers(0, vocab - 1), max_size=5))
    ends = tuple(draw(st.sets(st.integers(0, vocab - 1), max_size=3)))
    return SamplingRow(params, noise_seed(params.seed, 0), [*prompt, *output], len(prompt), ends)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=18, deadline=None, derandomize=True)
@given(data=st.data())
def test_tokens_equal_the_hosts_sampler(device: str, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([50, 131]))
    rows = data.draw(st.lists(row(vocab), min_size=1, max_size=2))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    logits = normal(len(rows), vocab, data.draw(st.integers(0, 1000)), data.draw(st.sampled_from([0.05, 1.0, 4.0])))
    logits = logits.to(dtype)
    capacity = data.draw(st.sampled_from([4, 16, 1024]))  # the first two are often too small
    expected, _ = sample_on_host(logits.float(), rows)
    batch = Batch(rows, vocab, device, padding=data.draw(st.integers(0, 1)))
    before = batch.columns.token_state.clone()
    if device == "cpu":
        twin = Batch(rows, vocab, device)
        assert sample_reference(logits, twin.slots, twin.positions, twin.columns).tolist() == expected
    assert batch.draw(logits, tile=data.draw(st.sampled_from([64, 256])), capacity=capacity) == expected
    for i, (item, token) in enumerate(zip(rows, expected, strict=True)):
        if item.needs_logits_changed:
            before[len(batch.slots) - i, token] += 1
    assert torch.equal(batch.columns.token_state, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capacity", [32, 4096])
def test_long_rows_in_many_splits(device: str, capacity: int) -> None:
    """Lists that hold what is kept, that hold the boundary only, and that hold nothing of use."""
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_k=900),
        SamplingParams(seed=3, top_p=0.8),
        SamplingParams(seed=4, min_p=0.01),
        SamplingParams(seed=5, top_k=700, top_p=0.95),
        SamplingParams(seed=6, top_p=0.5, min_p=0.001, temperature=3.0),
    ]
    rows = [SamplingRow(p, noise_seed(p.seed, 0), range(100 + i), 100, ()) for i, p in enumerate(params)]
    logits = normal(len(rows), 1003, 3, 1.0)
    expected, _ = sample_on_host(logits, rows)
    batch = Batch(rows, 1003, device)
    assert batch.draw(logits, tile=256, capacity=capacity, finish_tile=512) == expected
    filtered = slice(2, None)
    listed, above = batch.workspace.listed[filtered, 0], batch.workspace.num_above[filtered, 0]
    if capacity == 4096:
        assert not above.any()
    else:
        assert (listed > capacity).any()
        assert ((listed <= capacity) & (above > 0)).any()


def tied(device: str, params: dict[str, float], logits: Tensor, capacity: int = 64) -> set[int]:
    """The tokens that some seeds draw; each must be the host's."""
    seeds = range(2 if device == "cpu" else 100)
    all_params = [SamplingParams(seed=seed, **params) for seed in seeds]  # type: ignore[arg-type]
    rows = [SamplingRow(p, noise_seed(p.seed, 0), range(5), 5, ()) for p in all_params]
    logits = logits.expand(len(rows), -1)
    expected, _ = sample_on_host(logits, rows)
    assert Batch(rows, logits.shape[-1], device).draw(logits, capacity=capacity, tile=64) == expected
    return set(expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capacity", [4, 256])
def test_of_equal_tokens_the_first_ids_stay(device: str, capacity: int) -> None:
    equal = torch.full((1, 131), -2.5)
    assert tied(device, {"top_k": 3}, equal, capacity) <= {0, 1, 2}
    assert tied(device, {"top_p": 3.5 / 131}, equal, capacity) <= {0, 1, 2, 3}
    steps = torch.arange(131).remainder(4)[None].float()  # 3 is the best of each four
    assert tied(device, {"top_k": 5}, steps, capacity) <= {3, 7, 11, 15, 19}
    assert tied(device, {"top_k": 32, "top_p": 4.5 / 32}, steps, capacity) <= {3, 7, 11, 15, 19}


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_takes_the_lowest_of_the_best_ids(device: str) -> None:
    logits = torch.zeros(4, 131, dtype=torch.bfloat16)
    logits[1, [40, 99]] = 2.0
    logits[2] = NEVER
    logits[3, :-1] = NEVER
    greedy = SamplingParams(temperature=0.0, top_k=3)
    rows = [SamplingRow(greedy, 0, [1], 1, ())] * 4
    assert Batch(rows, 131, device).draw(logits) == [0, 40, 0, 130]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("params", [{}, {"min_p": 0.9}, {"top_k": 4, "top_p": 0.5}, {"top_k": 500, "top_p": 0.9}])
def test_forbidden_logits_are_never_drawn(device: str, params: dict[str, float]) -> None:
    logits = torch.full((1, 131), NEVER)
    assert tied(device, params, logits) == {0}
    logits[0, 77] = -1000.0
    assert tied(device, params, logits) == {77}
    logits[0, [5, 130]] = -1000.0
    assert tied(device, params, logits) <= {5, 77, 130}
    mixed = torch.tensor([0.0, -0.0, 0.0, -0.0, NEVER]).repeat(20)[None]  # both zeros are one value
    assert all(token % 5 != 4 for token in tied(device, params, mixed))


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_draws_the_same_alone(device: str) -> None:
    params = [SamplingParams(seed=seed, temperature=0.5 + seed, frequency_penalty=0.1 * seed) for seed in range(3)]
    rows = [SamplingRow(p, noise_seed(p.seed, 0), [4, 5, 5, 6], 2, ()) for p in params]
    logits = normal(3, 300, 9)
    together = Batch(rows, 300, device, padding=1).draw(logits)
    assert together == sample_on_host(logits, rows)[0]
    for i in range(3):
        assert Batch(rows[i : i + 1], 300, device).draw(logits[i : i + 1], tile=16 << i) == [together[i]]


@pytest.mark.parametrize("device", DEVICES)
def test_drawn_tokens_count_in_the_next_step(device: str) -> None:
    """Steps of one slot: each repeats less, as the host's sampler says from the tokens themselves."""
    params = SamplingParams(temperature=0.0, frequency_penalty=1.1, presence_penalty=0.7, min_tokens=4)
    logits = normal(1, 50, 4, 0.3)
    best = int(logits.argmax())
    logits[0, best] += 2.0
    tokens = [3, 9]
    batch = Batch([SamplingRow(params, 0, tokens, 2, (best,))], 50, device)
    for _ in range(8):
        expected, _ = sample_on_host(logits, [SamplingRow(params, 0, tokens, 2, (best,))])
        batch.positions[0] = len(tokens)
        assert batch.draw(logits) == expected
        tokens += expected
    assert best in tokens[6:]
    assert best not in tokens[2:6]
    state = batch.columns.token_state[1].cpu()
    assert torch.equal(state & COUNT_MASK, torch.bincount(torch.tensor(tokens[2:]), minlength=50).int())
    assert state[best] & ENDS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_draws_follow_the_distribution() -> None:
    """Chi-squared of one seed over positions, every draw a row of one batch, whose rows have a stride."""
    count, device = 8192, "cuda"
    logits = normal(1, 16, 2, 1.0)
    columns = SamplingColumns.allocate(count, 16, device)
    for values, value in ((columns.temperature, 1.0), (columns.top_k, 6), (columns.top_p, 0.9)):
        values.fill_(value)
    columns.seeds.fill_(noise_seed(5, 0))
    slots = torch.arange(count, dtype=torch.int32, device=device)
    wide = torch.zeros(count, 20, device=device)
    wide[:, :16] = logits.to(device)
    tokens = sample_triton(wide[:, :16], slots, slots + 1, columns, SampleWorkspace.allocate(count, 16, device))
    ordered, order = logits[0].double().softmax(-1).sort(descending=True)
    ordered[6:] = 0
    ordered /= ordered.sum()
    ordered[(ordered.cumsum(0) - ordered) >= 0.9] = 0
    expected = torch.zeros(16).double().scatter(0, order, ordered / ordered.sum()) * count
    observed = torch.bincount(tokens.cpu(), minlength=16).double()
    assert observed[expected == 0].sum() == 0
    kept = expected > 0
    assert kept.sum() > 2
    assert ((observed - expected)[kept] ** 2 / expected[kept]).sum() < 30  # at most 5 degrees of freedom: p about 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("vocab", "spread"), [(128256, 2.5), (151936, 0.8), (32000, 6.0)])
def test_models_shapes_in_a_graph(vocab: int, spread: float, dtype: torch.dtype) -> None:
    """One captured graph draws for batches of other rows, as the reference does on the same device."""
    params = [
        SamplingParams(temperature=0.0, repetition_penalty=1.2),
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.2, top_k=40),
        SamplingParams(seed=3, top_p=0.9),
        SamplingParams(seed=4, temperature=0.6, top_k=20, top_p=0.95, min_p=0.01),
        SamplingParams(seed=5, min_p=0.05, presence_penalty=1.0),
        SamplingParams(seed=6, temperature=1.5, top_p=0.5),
        SamplingParams(seed=7, top_k=1000, frequency_penalty=0.5),
    ]
    rows = [SamplingRow(p, noise_seed(p.seed, 0), range(50 + i), 20, (3,)) for i, p in enumerate(params * 8)]
    batch = Batch(rows, vocab, "cuda")
    workspace = SampleWorkspace.allocate(len(rows), vocab, "cuda")
    logits = (torch.randn(len(rows), vocab, device="cuda") * spread).to(dtype)
    arguments = (logits, batch.slots, batch.positions, batch.columns, workspace)
    sample_triton(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample_triton(*arguments)
    for step in range(3):
        logits.copy_(torch.randn(len(rows), vocab, device="cuda") * spread)
        batch.slots.copy_(batch.slots.roll(step))
        batch.slots[step] = -1
        batch.positions.add_(1)
        before = batch.columns.token_state.clone()
        expected = sample_reference(logits, batch.slots, batch.positions, batch.columns)
        counted = batch.columns.token_state.clone()
        batch.columns.token_state.copy_(before)
        graph.replay()
        differ = tokens != expected
        assert differ.sum() <= 1  # a token at the very boundary of top-p, whose probability is 1e-5
        if not differ.any():
            assert torch.equal(batch.columns.token_state, counted)


def test_a_batch_larger_than_the_workspace_is_refused() -> None:
    batch = Batch([SamplingRow(SamplingParams(), 0, [1], 1, ())] * 2, 50, "cpu")
    workspace = SampleWorkspace.allocate(1, 50, "cpu")
    with pytest.raises(ValueError, match="2 rows"):
        sample_triton(normal(2, 50, 0), batch.slots, batch.positions, batch.columns, workspace)
    workspace = SampleWorkspace.allocate(2, 50, "cpu")
    with pytest.raises(ValueError, match="2 rows, there is room for 1"):
        sample_triton(
            normal(2, 50, 0), batch.slots, batch.positions, batch.columns, workspace, out=torch.empty(1).long()
        )


@pytest.mark.parametrize(("op", "device"), variants(sample, sample_triton))
def test_tokens_are_left_for_the_host_in_their_turn(op: Callable[..., Tensor], device: str) -> None:
    """In pinned memory, where a step's tokens stay until its turn comes again."""
    out = torch.full((3, 6), -7, dtype=torch.int64, pin_memory=device == "cuda")
    turn = torch.zeros(1, dtype=torch.int32, device=device)
    batch = Batch([SamplingRow(SamplingParams(temperature=0.0), 0, [1], 1, ())] * 2, 50, device, padding=1)
    workspace = SampleWorkspace.allocate(3, 50, device)
    expected = out.tolist()
    for step, now in enumerate((1, 2, 0, 1)):
        logits = normal(3, 50, step)
        turn.fill_(now)
        op(logits.to(device), batch.slots, batch.positions, batch.columns, workspace, out=out, turn=turn)
        if device == "cuda":
            torch.cuda.synchronize()
        expected[now][:3] = [*logits[:2].argmax(-1).tolist(), 0]
        assert out.tolist() == expected
