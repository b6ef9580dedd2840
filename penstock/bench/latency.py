"""`penstock bench latency`: how long one batch of equal requests takes, prompts included."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from tqdm import trange

from penstock.bench.config import LatencyConfig
from penstock.bench.profiling import profile
from penstock.bench.result import build, check_length, percentiles, sampling, write_json
from penstock.common.beam_search import BeamSearchParams

HIGHEST_ID = 10000  # as in vLLM: random token ids below it


def run_latency(config: LatencyConfig) -> dict[str, Any] | None:
    """Measure, print and write; the result has vLLM's keys (seconds). None after a profile.

    Raises:
        ConfigError: the requests are longer than the engine's context.
    """
    llm = build(config)
    try:
        check_length(llm, config.input_len, config.output_len)
        params = sampling(config, config.output_len)
        beams = BeamSearchParams(beam_width=config.n, max_tokens=config.output_len, ignore_eos=True)
        ids = range(min(HIGHEST_ID, llm.vocab_size))
        generator = random.Random(config.seed)
        prompts = [generator.choices(ids, k=config.input_len) for _ in range(config.batch_size)]

        def once() -> float:
            begun = time.perf_counter()
            if config.use_beam_search:
                llm.beam_search(prompts, beams)
            else:
                llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - begun

        for _ in trange(config.num_iters_warmup, desc="Warm-up"):
            once()
        if config.profile:
            print(profile(llm, once))
            return None
        latencies = [once() for _ in trange(config.num_iters, desc="Measuring")]
    finally:
        llm.close()
    average = statistics.fmean(latencies)
    tokens = config.batch_size * config.n * config.output_len
    result = {"avg_latency": average, "latencies": latencies, "percentiles": percentiles(latencies)}
    print(f"Average latency: {average:.4f} s ({tokens / average:.1f} output tokens/s)")
    for percentage, seconds in percentiles(latencies).items():
        print(f"{percentage:>3} % of runs: {seconds:.4f} s or less")
    write_json(config.output_json, result)
    return result
