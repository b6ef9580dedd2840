"""The GPU's executor against Hugging Face and against the CPU's: graphs, run-ahead, chunks, preemption, sampling.

Without a GPU one small run goes through Triton's interpreter: the same code but for the capture.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from penstock.common.errors import ConfigError
from penstock.common.sampling import SamplingParams
from penstock.engine import build
from penstock.engine.batch_state import BatchState
from penstock.engine.build import BuiltEngine, attention_backend
from penstock.engine.decode_graphs import batch_sizes
from penstock.engine.device_runner import DeviceRunner, Event
from penstock.engine.memory import Limits, largest_step
from penstock.engine.mixed_steps import MAX_PROMPTS, Chunk, Shape, captured_shapes, choose_shape, crowds, lay_out
from penstock.engine.plan import SequenceStart
from penstock.kernels import launch
from penstock.kernels.sample import ENDS, IN_PROMPT
from tests.engine.engines import make_engine, request, run
from tests.tiny_models import FAMILIES, random_prompts, reference_tokens

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, not interpreted")


def _greedy(count: int, **fields: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **fields)  # type: ignore[arg-type]


@pytest.fixture
def interpreted() -> Iterator[None]:
    launch.interpret_ops = True
    yield
    launch.interpret_ops = False


def _on_device(built: BuiltEngine, max_num_seqs: int) -> BuiltEngine:
    """The same engine, but its steps go through the GPU's executor."""
    model = built.engine.executor.model  # type: ignore[attr-defined]
    built.engine.executor = DeviceRunner(
        model, built.pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=12, max_model_len=built.max_model_len
    )
    return built


@interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy says so where 32-bit products wrap, as they shall
def test_equals_hugging_face_in_the_interpreter(checkpoints: dict[str, Path], interpreted: None) -> None:
    path = checkpoints["llama"]
    prompts = random_prompts([5, 17, 1])
    expected = reference_tokens(path, prompts, 4)
    built = _on_device(make_engine(path, max_num_batched_tokens=12, max_num_seqs=2), 2)
    sampling = [_greedy(4), _greedy(4, logprobs=2), _greedy(4, min_tokens=2, stop_token_ids=[expected[2][0]])]
    tokens, _ = run(built, [(i, request(str(i), p, sampling[i])) for i, p in enumerate(prompts)])
    assert [tokens["0"], tokens["1"]] == expected[:2]
    assert tokens["2"][0] != expected[2][0], "a token that would end the request was forbidden"
    built.engine.close()


MODES = [
    {},
    {"max_num_batched_tokens": 7, "block_size": 16},
    {"enforce_eager": True},
    {"pages": 40, "enable_prefix_caching": False},
    {"max_num_seqs": 3},
    {"attention_backend": "CUDNN"},
]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_greedy_equals_hugging_face(checkpoints: dict[str, Path], family: str, mode: dict[str, object]) -> None:
    path = checkpoints[family]
    prompts = random_prompts(random.Random(2).choices((1, 2, 3, 5, 8, 17, 31, 40, 64, 90), k=24))
    expected = reference_tokens(path, prompts, 12)
    built = make_engine(path, device="cuda", **mode)  # type: ignore[arg-type]
    chooser = random.Random(2)
    arrivals = [(chooser.randrange(40), request(str(i), p, _greedy(12))) for i, p in enumerate(prompts)]
    for _ in range(2):  # the second time from the prefix cache
        tokens, _ = run(built, arrivals)
        assert [tokens[str(i)] for i in range(len(prompts))] == expected
    if "pages" in mode:
        assert built.engine.scheduler.counters.preemptions > 0
    built.engine.close()


@pytest.mark.gpu
@gpu
def test_sampling_equals_the_cpu(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["qwen3"]
    prompts = random_prompts([5, 40, 17, 64, 33, 1, 28, 40])
    sampling = [
        SamplingParams(temperature=0.9, seed=1),
        SamplingParams(temperature=0.7, top_k=20, seed=2),
        SamplingParams(temperature=1.1, top_p=0.8, seed=3),
        SamplingParams(temperature=1.0, min_p=0.05, seed=4),
        SamplingParams(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, seed=5),
        SamplingParams(temperature=0.0, logprobs=3),
        SamplingParams(temperature=0.0, min_tokens=6, stop_token_ids=list(range(0, 400, 2))),
        SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, logprobs=0, seed=6),
    ]
    arrivals = [(i, request(str(i), p, s)) for i, (p, s) in enumerate(zip(prompts, sampling, strict=True))]
    results = []
    for device in ("cpu", "cuda"):
        built = make_engine(path, device=device)
        results.append(run(built, arrivals))
        built.engine.close()
    assert results[0] == results[1]


@pytest.mark.gpu
@gpu
def test_logits_in_bfloat16_are_within_its_error(checkpoints: dict[str, Path]) -> None:
    """Tokens may differ by near-ties; logprobs of a prompt's next token may not differ by more than bf16's error."""
    path = checkpoints["llama"]
    prompt = random_prompts([64])[0]
    found = []
    for dtype in ("float32", "bfloat16"):
        built = make_engine(path, device="cuda", dtype=dtype)
        built.engine.add(request("a", prompt, _greedy(1, logprobs=20)))
        outputs = []
        while built.engine.has_work():
            outputs += built.engine.step().outputs
        assert outputs[0].logprobs is not None
        at = outputs[0].logprobs[0]
        found.append(dict(zip(at.top_ids, at.top_logprobs, strict=True)))
        built.engine.close()
    exact, rough = found
    common = exact.keys() & rough.keys()
    assert len(common) >= 12
    # Logits of these models spread over some 100; bf16 has 8 bits, through three layers.
    assert max(abs(exact[token] - rough[token]) for token in common) < 2.0


def test_sizes_hold_every_batch() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(100)[-2:] == [96, 100]
    assert batch_sizes(256)[-1] == 256
    assert batch_sizes(4096) == batch_sizes(512) and batch_sizes(512)[-2:] == [448, 512]


def test_layout_of_a_step_with_room_to_spare() -> None:
    chunks = [Chunk(7, (-1,), 30, True), Chunk(3, (11, 12, 13), 5, False), Chunk(9, (21, 22), 2, True)]
    exact = [array.tolist() for array in lay_out(chunks, Shape(1, 5, 2))]
    assert exact == [
        [0, 1, 1, 1, 2, 2],  # owners
        [-1, 11, 12, 13, 21, 22],
        [7, 3, 9],  # slots
        [7, 3, 9],
        [30, 5, 2],  # contexts
        [0, 1, 4, 6],  # first tokens
        [7, -1, 9],  # those that are sampled from
        [0, 3, 5],  # last tokens
    ]
    roomy = [array.tolist() for array in lay_out(chunks, Shape(2, 8, 4))]
    assert roomy == [
        [0, -1, 2, 2, 2, 3, 3, -1, -1, -1],
        [-1, 0, 11, 12, 13, 21, 22, 0, 0, 0],
        [7, -1, 3, 9, -1, -1],
        [7, 0, 3, 9, 0, 0],
        [30, 0, 5, 2, 0, 0],
        [0, 1, 2, 5, 7, 7, 7],
        [7, -1, -1, 9, -1, -1],
        [0, 0, 4, 6, 0, 0],
    ]


def test_captured_shapes_are_within_the_limits() -> None:
    shapes = captured_shapes(256, 8192, 0, 0)
    assert Shape(0, 16, 1) in shapes
    assert Shape(256, 1024, MAX_PROMPTS) in shapes
    assert all(shape.tokens <= 40 for shape in captured_shapes(8, 32, 16, 32))
    assert Shape(64, 256, 16).holds(Shape(3, 200, 16))
    assert not Shape(64, 256, 16).holds(Shape(3, 20, 17))
    chunks = set(captured_shapes(24, 8192, 152, 0)) - set(captured_shapes(24, 8192, 0, 0))
    assert chunks == {Shape(4, 152, 4), Shape(8, 152, 4), Shape(16, 176, 4), Shape(24, 200, 4)}
    for seqs in (256, 257, 512):
        twice = captured_shapes(seqs, 8192, 128, 1024)
        assert len(twice) == len(set(twice)) and Shape(64, 128, 16) in shapes
    assert captured_shapes(256, 8192, 2048, 8192) == shapes, "long steps are launched op by op"
    full = [Shape(0, tokens, 16) for tokens in (1280, 1536, 1792, 2048)]
    assert captured_shapes(256, 8192, 0, 2048) == [*shapes, *full]
    assert Shape(0, 608, 16) in captured_shapes(256, 8192, 152, 608) and Shape(0, 608, 3) in captured_shapes(
        3, 700, 152, 608
    )
    assert captured_shapes(1, 8192, 0, 1024) == captured_shapes(1, 8192, 0, 0)


def test_a_step_runs_in_the_shape_with_the_least_padding() -> None:
    captured = captured_shapes(256, 8192, 152, 2048)
    for exact, expected in (
        (Shape(0, 5, 1), Shape(0, 16, 1)),
        (Shape(0, 5, 2), Shape(64, 64, 16)),
        (Shape(5, 150, 2), Shape(8, 152, 4)),
        (Shape(0, 1024, 1), Shape(0, 1024, 1)),
        (Shape(0, 1025, 1), Shape(0, 1280, 16)),
        (Shape(0, 1793, 16), Shape(0, 2048, 16)),
        (Shape(0, 2048, 17), None),
        (Shape(0, 2049, 1), None),
        (Shape(1, 1025, 1), None),
    ):
        assert choose_shape(captured, exact) == expected, exact
    large = [Shape(0, 2000, 16)]
    assert choose_shape(large, Shape(0, 1600, 1)) == large[0]
    assert choose_shape(large, Shape(0, 1599, 1)) is None, "padding takes longer than launching"


def test_crowds_are_one_for_each_block_of_prompts() -> None:
    assert crowds(128, 8192) == []
    assert crowds(256, 8192) == [Shape(0, 1024, 256)]
    assert crowds(300, 8192) == [Shape(0, 1024, 256), Shape(0, 1024, 300)]
    assert crowds(300, 200) == [Shape(0, 200, 200)]


def test_of_an_address_set_twice_the_last_value_counts() -> None:
    state = BatchState(2, 3, 10, torch.device("cpu"))
    state.set_rows([1, 0])
    state.set_rows([0])
    addresses, values = state.take_changes()
    assert len(set(addresses)) == len(addresses) == 2
    assert sorted(zip(addresses, values, strict=True))[0][1] == 0
    assert sorted(zip(addresses, values, strict=True))[1][1] == -1
    assert state.take_changes() == ([], [])


def test_penalised_sequences_start_with_their_tokens_counted() -> None:
    state = BatchState(2, 3, 10, torch.device("cpu"))
    sampling = SamplingParams(repetition_penalty=1.2, min_tokens=2, stop_token_ids=[9, 12])
    state.start(1, SequenceStart("a", (3, 4, 4, 5, 5), 3, sampling, 0, (7,)))
    row = state.columns.token_state[1].tolist()
    assert row == [0, 0, 0, IN_PROMPT, IN_PROMPT, 2, 0, ENDS, 0, ENDS]
    assert state.columns.token_state[0].count_nonzero() == 0


def test_the_largest_step_is_within_its_limits() -> None:
    plan = largest_step(Limits(max_num_seqs=8, max_num_batched_tokens=100, max_model_len=64), 16)
    assert len(plan.work) == 8
    assert plan.work[-1].start + plan.work[-1].num_tokens == 63
    assert plan.num_tokens <= 100
    plan = largest_step(Limits(max_num_seqs=256, max_num_batched_tokens=100, max_model_len=4096), 16)
    assert plan.num_tokens == 100


def test_a_pool_that_does_not_fit_is_an_error_of_configuration(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(build, "KVPool", full)
    with pytest.raises(ConfigError, match=r"no 0\.0 GiB left for KV pages"):
        make_engine(checkpoints["llama"])


def test_vllm_names_of_attention_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "XFORMERS")
    assert attention_backend("AUTO") == "TRITON"
    assert attention_backend("FLASH_ATTN") == "HOPPER"
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "NONSENSE")
    with pytest.raises(ConfigError, match="VLLM_ATTENTION_BACKEND NONSENSE is not known"):
        attention_backend("AUTO")


def test_a_step_is_waited_for_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that waits does nothing else with CUDA, whose current device in it is the first one."""
    current, waited = [0], []

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(synchronize=lambda: waited.append(current[0])))
    Event(torch.device("cuda", 1)).wait()
    Event(torch.device("cpu")).wait()
    assert (waited, current) == ([1], [0])


COMPILES_FIRST = """
import json, sys
from pathlib import Path
import triton
from tests.engine.engines import make_engine, request, run
from penstock.engine import build

compiled, first = [], []
original, compile_steps = triton.JITFunction._do_compile, build.compile_steps

def counted(kernel, *arguments, **named):
    compiled.append(kernel.fn.__name__)
    return original(kernel, *arguments, **named)

def noted(*arguments, **named):
    seen = []
    compile_steps(*arguments, **{**named, "progress": lambda *counts: seen.append(counts)})
    first.extend([len(compiled), seen[-1]])

triton.JITFunction._do_compile = counted
build.compile_steps = noted
built = make_engine(Path(sys.argv[1]), device="cuda", dtype="bfloat16")
run(built, [(0, request("a", [1, 2, 3])), (2, request("b", [4] * 9))])
built.engine.close()
print(json.dumps({"first": first, "later": compiled[first[0]:]}))
"""


@pytest.mark.gpu
@gpu
def test_nothing_is_left_to_compile_when_the_first_step_runs(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own, which has compiled nothing."""
    command = [sys.executable, "-c", COMPILES_FIRST, str(checkpoints["qwen2"])]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(command, check=True, timeout=240, env=environment, stdout=subprocess.PIPE, text=True)
    record = json.loads(found.stdout.splitlines()[-1])
    compiled, (done, total) = record["first"]
    assert compiled >= total > 20 and done == total
    assert record["later"] == []


WAITS_ON_THE_SECOND = """
import threading, torch
from penstock.engine.device_runner import Event
device = torch.device("cuda", 1)
with torch.cuda.device(device):
    event = Event(device)
    torch.zeros(1, device=device)
    event.record()
thread = threading.Thread(target=event.wait)
thread.start()
thread.join()
assert event.query() and torch._C._cuda_hasPrimaryContext(1) and not torch._C._cuda_hasPrimaryContext(0)
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_who_waits_for_a_step_of_the_second_device_leaves_the_first_alone() -> None:
    subprocess.run([sys.executable, "-c", WAITS_ON_THE_SECOND], check=True, timeout=120)
