"""Builds an engine from its configuration: checkpoint, dtype, pool size, scheduler.

Called by the workers and by `LLM`. Everything that two workers must agree on to exchange pages ends in `fingerprint`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import wait as wait_for
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

import torch

from penstock.common.config import ATTENTION_BACKENDS, EngineConfig
from penstock.common.cores import available_cores
from penstock.common.errors import ConfigError
from penstock.common.grammar import Grammars
from penstock.common.tokenizer import Tokenizer
from penstock.engine.compile import compile_steps
from penstock.engine.constraints import Constraints
from penstock.engine.core import Engine
from penstock.engine.decode_graphs import batch_sizes
from penstock.engine.device_runner import DeviceRunner
from penstock.engine.kv_pool import KVLayout, KVPool
from penstock.engine.memory import Limits, pool_size_bytes
from penstock.engine.pages import PageManager
from penstock.engine.plan import Executor
from penstock.engine.policy import BatchPolicy
from penstock.engine.runner import ModelRunner
from penstock.engine.scheduler import Scheduler
from penstock.kernels.page_checksum import checksum_name
from penstock.models.decoder import CausalLM
from penstock.models.registry import load_model, resolve_checkpoint
from penstock.models.spec import ModelSpec, read_spec

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GPU_PAGE_SIZE, CPU_PAGE_SIZE = 64, 16
"""By measurement (docs/performance.md): fewer address translations, and half a page a sequence is wasted."""
DIGEST_BLOCKS = 16
DIGEST_BLOCK_BYTES = 64 << 10


@dataclass(frozen=True)
class BuiltEngine:
    """An engine and the facts about it that a worker announces."""

    engine: Engine
    spec: ModelSpec
    pool: KVPool
    max_model_len: int
    hash_scope: str
    fingerprint: str


def build_engine(
    config: EngineConfig,
    policy: BatchPolicy,
    *,
    name: str = "penstock",
    memory_share: float = 1.0,
    progress: Callable[[str, int, int], None] | None = None,
    tokenizer: Callable[[], Tokenizer] | None = None,
) -> BuiltEngine:
    """Load the model and make an engine around it. `name` ends in the pool's memfd name, for peers to check.

    `tokenizer` is called for the first output that has to take a form; without, the model's own is loaded then.
    `progress` is told (stage, done, in all) while weights are loaded, kernels compiled and steps captured.

    Raises:
        ModelError: the checkpoint is unsupported, broken, or cannot be had.
        ConfigError: the options do not fit the model or the machine.
    """
    path = resolve_checkpoint(config.model)
    spec = read_spec(path)
    if config.max_model_len is not None and config.max_model_len > spec.max_position:
        raise ConfigError(f"max_model_len {config.max_model_len} exceeds the model's context of {spec.max_position}")
    device = resolve_device(config.device)
    dtype = DTYPES[spec.dtype if config.dtype == "auto" else config.dtype]
    if device.type == "cpu":
        torch.set_num_threads(config.cpu_threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or available_cores())
    load_tokenizer = tokenizer or partial(Tokenizer.load, config.model)
    grammars = Grammars(load_tokenizer, spec.vocab_size, spec.eos_token_ids)
    vocabulary = grammars.prepare()  # beside the weights
    model = load_model(
        path,
        spec,
        dtype=dtype,
        device=device,
        load_format=config.load_format,
        attention_backend=attention_backend(config.attention_backend),
        progress=progress and partial(progress, "loading weights"),
    )
    page_size = config.block_size or (GPU_PAGE_SIZE if device.type == "cuda" else CPU_PAGE_SIZE)
    layout = KVLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim, page_size, dtype)
    limits = limits_of(config, policy, spec.max_position, on_gpu=device.type == "cuda")
    if device.type == "cuda":
        told = progress and partial(progress, "compiling kernels")
        compile_steps(model, layout, limits, device, largest_only=config.enforce_eager, progress=told)
    num_pages = pool_size_bytes(config, model, layout, limits, device, memory_share) // layout.page_bytes
    max_model_len = _context(config, spec, num_pages, page_size)
    checkpoint = checkpoint_digest(path, config.load_format)
    pool = _pool(layout, num_pages, device, name)
    hash_scope = f"{checkpoint}|{dtype}|{page_size}"
    scheduler = Scheduler(
        PageManager(num_pages, page_size, caching=config.enable_prefix_caching),
        policy,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=max_model_len,
        hash_scope=hash_scope,
    )
    exchanged = f"{checkpoint}|{layout.describe()}|tp1|{checksum_name(device)}"
    fingerprint = blake2b(exchanged.encode(), digest_size=16).hexdigest()
    size_gib = num_pages * layout.page_bytes / 2**30
    logger.info("%d pages of %d tokens (%.2f GiB), context %d", num_pages, page_size, size_gib, max_model_len)
    executor = _executor(config, model, pool, replace(limits, max_model_len=max_model_len), progress)
    engine = Engine(scheduler, executor, constraints=Constraints(grammars))
    wait_for([vocabulary])  # else the first steps would stand still; who demands a form is told what it raised
    return BuiltEngine(engine, spec, pool, max_model_len, hash_scope, fingerprint)


def limits_of(config: EngineConfig, policy: BatchPolicy, max_position: int, *, on_gpu: bool) -> Limits:
    """What a step of an engine may hold, and usually holds; max_position: the model's longest context."""
    step_tokens = config.max_num_batched_tokens or (8192 if on_gpu else 2048)
    return Limits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=step_tokens,
        max_model_len=config.max_model_len or max_position,
        mixed_chunk_tokens=policy.prefill_budget(step_tokens, 1),
        prompt_step_tokens=policy.prefill_budget(step_tokens, 0),
    )


def _pool(layout: KVLayout, num_pages: int, device: torch.device, name: str) -> KVPool:
    try:
        return KVPool(layout, num_pages, device, name)
    except torch.OutOfMemoryError as error:
        size_gib = num_pages * layout.page_bytes / 2**30
        raise ConfigError(f"{device} has no {size_gib:.1f} GiB left for KV pages: ask for fewer") from error


def _executor(
    config: EngineConfig,
    model: CausalLM,
    pool: KVPool,
    limits: Limits,
    progress: Callable[[str, int, int], None] | None,
) -> Executor:
    if pool.device.type != "cuda":
        return ModelRunner(model, pool)
    runner = DeviceRunner(model, pool, **asdict(limits))
    if not config.enforce_eager:
        largest = batch_sizes(limits.max_num_seqs)[-1]
        if largest < limits.max_num_seqs:
            logger.info("decode steps of more than %d sequences are launched op by op", largest)
        runner.capture(progress and partial(progress, "capturing steps"))
    return runner


def attention_backend(wanted: str) -> str:
    """AUTO, HOPPER, CUDNN or TRITON: what is wanted, or what VLLM_ATTENTION_BACKEND asks for if that is left open.

    vLLM's names stand for the nearest that is here: FlashAttention for our kernel of that design.

    Raises:
        ConfigError: the variable holds an unknown name.
    """
    if wanted == "AUTO":
        wanted = os.environ.get("VLLM_ATTENTION_BACKEND") or "AUTO"
    nearest = {"FLASH_ATTN": "HOPPER", "FLASHINFER": "AUTO", "TRITON_ATTN": "TRITON", "XFORMERS": "TRITON"}
    if wanted not in ATTENTION_BACKENDS:
        raise ConfigError(f"VLLM_ATTENTION_BACKEND {wanted} is not known: use {', '.join(ATTENTION_BACKENDS)}")
    return nearest.get(wanted, wanted)


def resolve_device(device: str) -> torch.device:
    """`auto` is the first GPU if there is one.

    Raises:
        ConfigError: not a device, or not on this machine.
    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not known: use cpu, cuda or cuda:N") from error
    if resolved.type == "cuda":
        if not torch.cuda.is_available() or (resolved.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device {device}: this machine shows {torch.cuda.device_count()} CUDA devices to torch")
        return torch.device("cuda", resolved.index or 0)
    return resolved


def checkpoint_digest(path: Path, load_format: str = "auto") -> str:
    """Names a checkpoint by its content, cheaply: config.json, and a sample of every weight file.

    The sample is the name, the size, the safetensors header, and `DIGEST_BLOCKS` blocks spread evenly from the header
    to the end (1 MiB a file, so milliseconds). A retrained checkpoint differs in nearly every block; one that was
    edited by hand in a few tensors may pass for the original.
    """
    digest = blake2b((path / "config.json").read_bytes(), digest_size=16)
    if load_format != "dummy":
        for file in sorted(path.glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"|{file.name}:{size}".encode())
            with file.open("rb") as weights:
                length = weights.read(8)  # of the header
                digest.update(length + weights.read(int.from_bytes(length, "little")))
                begin, last = weights.tell(), max(weights.tell(), size - DIGEST_BLOCK_BYTES)
                for block in range(DIGEST_BLOCKS):
                    weights.seek(begin + (last - begin) * block // (DIGEST_BLOCKS - 1))
                    digest.update(weights.read(DIGEST_BLOCK_BYTES))
    return digest.hexdigest()


def _context(config: EngineConfig, spec: ModelSpec, num_pages: int, page_size: int) -> int:
    """Longest request, in tokens: what was asked for, else what model and pool allow."""
    room = num_pages * page_size
    if config.max_model_len is not None:
        if config.max_model_len > room:
            raise ConfigError(
                f"max_model_len {config.max_model_len} does not fit the KV pool: {num_pages} pages of "
                f"{page_size} tokens hold {room}; give it more memory or a shorter context"
            )
        return config.max_model_len
    if room < spec.max_position:
        logger.warning("context shortened from %d to %d tokens to fit the KV pool", spec.max_position, room)
    if room < 2:
        raise ConfigError("the KV pool has no room for a single page: raise kv_cache_memory_bytes")
    return min(room, spec.max_position)
