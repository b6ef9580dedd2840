"""vLLM's options that Penstock lacks: which of their values ask for nothing new, and why the others cannot be had.

config_loader.py asks here about every option that no configuration has, in flags and in files, so that a vLLM command
line either means what it says or is refused with a reason. An option that Penstock gets is found in its configuration
first, and its line here should go. Names are those of vLLM 0.22.1 and a few older ones that command lines still have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# vLLM's short forms.
SHORT = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-dpn": "--data-parallel-rank",
    "-dpr": "--data-parallel-start-rank",
    "-dpl": "--data-parallel-size-local",
    "-dpa": "--data-parallel-address",
    "-dpp": "--data-parallel-rpc-port",
    "-dpb": "--data-parallel-backend",
    "-dph": "--data-parallel-hybrid-lb",
    "-dpe": "--data-parallel-external-lb",
    "-dpm": "--data-parallel-multi-port-external-lb",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-ep": "--enable-expert-parallel",
    "-asc": "--api-server-count",
    "-n": "--nnodes",
    "-r": "--node-rank",
    "-q": "--quantization",
    "-sc": "--speculative-config",
    "-cc": "--compilation-config",
    "-ac": "--attention-config",
}
# Options that both have under different names.
RENAMED: Mapping[str, str] = {"api-server-count": "router-procs"}
# Values of options that both have: ours, None for the default.
VALUES: Mapping[tuple[str, str], str | None] = {
    ("dtype", "half"): "float16",
    ("dtype", "float"): "float32",
    ("max_model_len", "auto"): None,
    ("max_model_len", "-1"): None,
    ("load_format", "safetensors"): "auto",
    ("load_format", "hf"): "auto",
}
# What Penstock does anyway: these values are taken, and say nothing new. "": any.
_ANYWAY: Mapping[str, tuple[str, ...]] = {
    "tensor-parallel-size": ("1",),
    "pipeline-parallel-size": ("1",),
    "data-parallel-size": ("1",),
    "prefill-context-parallel-size": ("1",),
    "decode-context-parallel-size": ("1",),
    "nnodes": ("1",),
    "distributed-executor-backend": ("mp", "uni"),
    "enable-chunked-prefill": ("true",),
    "enable-expert-parallel": ("false",),
    "enable-lora": ("false",),
    "async-scheduling": ("true",),
    "scheduling-policy": ("fcfs", "priority"),
    "stream-interval": ("1",),
    "tokenizer-mode": ("auto", "hf"),
    "runner": ("auto", "generate"),
    "task": ("auto", "generate"),
    "convert": ("auto", "none"),
    "model-impl": ("auto",),
    "config-format": ("auto", "hf"),
    "kv-cache-dtype": ("auto",),
    "quantization": ("none",),
    "cpu-offload-gb": ("0",),
    "swap-space": ("0",),
    "max-logprobs": ("20",),
    "logprobs-mode": ("raw_logprobs",),
    "performance-mode": ("balanced",),
    "response-role": ("assistant",),
    "chat-template-content-format": ("auto", "string"),
    "enable-request-id-headers": ("true",),
    "enable-log-requests": ("false",),
    "disable-log-requests": ("true",),
    "disable-log-stats": ("true",),
    "disable-uvicorn-access-log": ("true",),
    "disable-cascade-attn": ("true",),
    "disable-custom-all-reduce": ("true",),
    "trust-remote-code": ("true", "false"),  # no code of a checkpoint is run, so nothing has to be trusted
}
_SWITCH_NAMES = """
    aggregate-engine-logging allow-credentials allow-deprecated-quantization async-scheduling calculate-kv-scales
    cudagraph-metrics data-parallel-external-lb data-parallel-hybrid-lb data-parallel-multi-port-external-lb
    disable-cascade-attn disable-chunked-mm-input disable-custom-all-reduce disable-fastapi-docs
    disable-frontend-multiprocessing disable-hybrid-kv-cache-manager disable-log-requests disable-log-stats
    disable-nccl-for-dp-synchronization disable-sliding-window disable-uvicorn-access-log enable-auto-tool-choice
    enable-chunked-prefill enable-cumem-allocator enable-dbo enable-elastic-ep enable-ep-weight-filter enable-eplb
    enable-expert-parallel enable-flash-late-interaction enable-flashinfer-autotune enable-force-include-usage
    enable-layerwise-nvtx-tracing enable-log-deltas enable-log-outputs enable-log-requests
    enable-logging-iteration-details enable-lora enable-mamba-cache-stochastic-rounding enable-mfu-metrics
    enable-mixed-moe-lora-format enable-mm-embeds enable-offline-docs enable-prompt-embeds
    enable-prompt-tokens-details enable-request-id-headers enable-return-routed-experts
    enable-server-load-tracking enable-sleep-mode enable-ssl-refresh enable-tokenizer-info-endpoint
    enable-tower-connector-lora exclude-tools-when-tool-choice-none fail-on-environ-validation fully-sharded-loras
    grpc headless interleave-mm-strings kv-cache-metrics kv-sharing-fast-prefill language-model-only
    log-error-stack mm-encoder-only numa-bind ray-workers-use-nsight return-tokens-as-token-ids
    scheduler-reserve-full-isl skip-mm-profiling skip-tokenizer-init specialize-active-lora tokens-only
    trust-remote-code trust-request-chat-template use-fp64-gumbel use-tqdm-on-load use-v2-block-manager
    worker-use-ray
"""
_SWITCHES = frozenset(_SWITCH_NAMES.split())
_WHY_NOT: Mapping[str, str] = {
    "one worker uses one device: --prefill-workers and --decode-workers say how many there are": """
        tensor-parallel-size pipeline-parallel-size data-parallel-* prefill-context-parallel-size
        decode-context-parallel-size dcp-* cp-kv-cache-interleave-size distributed-executor-backend
        distributed-timeout-seconds cpu-distributed-timeout-seconds master-addr master-port nnodes node-rank headless
        disable-custom-all-reduce disable-nccl-for-dp-synchronization dp-supervisor-* max-parallel-loading-workers
        ray-workers-use-nsight worker-use-ray worker-cls worker-extension-cls""",
    "models with experts are not supported": """
        enable-expert-parallel enable-ep-weight-filter all2all-backend enable-eplb eplb-config
        expert-placement-strategy enable-elastic-ep enable-dbo dbo-* ubatch-size moe-backend
        enable-return-routed-experts""",
    "LoRA adapters are not supported": """
        enable-lora lora-* max-loras max-lora-rank max-cpu-loras fully-sharded-loras default-mm-loras
        specialize-active-lora enable-tower-connector-lora enable-mixed-moe-lora-format""",
    "quantised weights are not supported": "quantization quantization-config allow-deprecated-quantization",
    "KV pages have the type of the model": "kv-cache-dtype kv-cache-dtype-skip-layers calculate-kv-scales",
    "speculative decoding is not supported": "speculative-config spec-method spec-model spec-tokens",
    "images, audio and video are not supported": """
        limit-mm-per-prompt mm-* media-io-kwargs interleave-mm-strings language-model-only enable-mm-embeds
        skip-mm-profiling video-pruning-rate disable-chunked-mm-input allowed-local-media-path allowed-media-domains
        ec-transfer-config""",
    "only text generation is supported": "runner convert task pooler-config enable-flash-late-interaction",
    "state-space models are not supported": """
        mamba-* enable-mamba-cache-stochastic-rounding gdn-prefill-backend disable-hybrid-kv-cache-manager""",
    "prefill and decode workers of a fleet find each other: give --prefill-workers and --decode-workers": """
        kv-transfer-config kv-events-config tokens-only""",
    "KV pages stay on their devices": """
        kv-offloading-size kv-offloading-backend cpu-offload-gb cpu-offload-params offload-* swap-space
        kv-sharing-fast-prefill""",
    "weights are those of the checkpoint and stay where they are": """
        enable-sleep-mode enable-cumem-allocator weight-transfer-config""",
    "steps are captured as CUDA graphs in sizes of their own; --enforce-eager turns that off": """
        compilation-config optimization-level cudagraph-capture-sizes max-cudagraph-capture-size performance-mode
        kernel-config ir-op-priority max-seq-len-to-capture enable-flashinfer-autotune linear-backend""",
    "--attention-backend says what computes prompts' attention": """
        attention-config disable-cascade-attn override-attention-dtype disable-sliding-window""",
    "give the folder of a downloaded snapshot (the hub's tools take HF_TOKEN and HF_HOME)": """
        revision code-revision tokenizer-revision hf-token hf-config-path hf-overrides download-dir config-format
        ignore-patterns""",
    "weights are read from safetensors files": """
        safetensors-* model-loader-extra-config pt-load-map-location use-tqdm-on-load""",
    "models are Penstock's own implementations": "model-impl trust-remote-code logits-processors io-processor-plugin",
    "tokenizers are those of tokenizer.json": "tokenizer-mode skip-tokenizer-init renderer-num-workers",
    "prompts are text or token ids": "enable-prompt-embeds",
    "the scheduler has one form": """
        enable-chunked-prefill async-scheduling scheduling-policy scheduler-cls scheduler-reserve-full-isl
        num-scheduler-steps use-v2-block-manager""",
    "--mixed-chunk-tokens bounds the prompt tokens in a step that also decodes": """
        max-num-partial-prefills max-long-partial-prefills long-prefill-token-threshold""",
    "page hashes are the same in every process, and there is one kind": "prefix-caching-hash-algo",
    "--kv-cache-memory-bytes says how large the pool is": "num-gpu-blocks-override",
    "it is the router's: give it to penstock serve or penstock router": """
        enable-auto-tool-choice tool-call-parser tool-parser-plugin reasoning-parser reasoning-parser-plugin
        otlp-traces-endpoint chat-template-content-format default-chat-template-kwargs""",
    "docs/tools.md has what there is": "tool-server exclude-tools-when-tool-choice-none reasoning-config",
    "structured output has no options": "structured-outputs-config guided-decoding-backend",
    "write it into a generation_config.json and give its folder as --generation-config": "override-generation-config",
    "20 logprobs a token, of the model's own distribution": "max-logprobs logprobs-mode use-fp64-gumbel",
    "put a proxy before the router": """
        uds ssl-* enable-ssl-refresh root-path middleware allow-credentials allowed-origins allowed-methods
        allowed-headers""",
    "--log-level, --log-format and --enable-log-requests are the choices": """
        uvicorn-log-level log-config-file max-log-len enable-log-* log-error-stack enable-logging-iteration-details
        disable-log-requests disable-log-stats disable-uvicorn-access-log disable-access-log-for-endpoints
        aggregate-engine-logging""",
    "/metrics has what there is": """
        kv-cache-metrics kv-cache-metrics-sample cudagraph-metrics enable-mfu-metrics show-hidden-metrics-for-version
        enable-server-load-tracking""",
    "a trace has the spans of docs/observability.md": "collect-detailed-traces enable-layerwise-nvtx-tracing",
    "the server is not profiled over HTTP": "profiler-config",
    "--drain-s says how long running requests are waited for": "shutdown-timeout",
    "--router-procs says how many processes serve HTTP": "disable-frontend-multiprocessing",
    "there is HTTP only": "grpc",
    "requests say it for themselves": """
        enable-force-include-usage return-tokens-as-token-ids stream-interval enable-prompt-tokens-details""",
    "templates are the tokenizer's, or the file of --chat-template": """
        trust-request-chat-template response-role""",
    "answers have the routes and fields of docs/http.md": """
        enable-tokenizer-info-endpoint enable-request-id-headers disable-fastapi-docs enable-offline-docs
        fingerprint-mode fingerprint-value""",
    "workers bind to no NUMA node by themselves: start them with numactl": "numa-bind numa-bind-*",
    "it is not Penstock's": "additional-config fail-on-environ-validation",
}


@dataclass(frozen=True)
class ForeignOption:
    """An option of vLLM's that Penstock does not have."""

    name: str  # with dashes, without the leading two
    reason: str

    @property
    def is_switch(self) -> bool:
        return self.name in _SWITCHES

    def refusal(self, value: str) -> str:
        """Why `value` cannot be had, or "" where it asks for what is the case anyway."""
        return "" if value.lower() in _ANYWAY.get(self.name, ()) else f"not supported: {self.reason}"


def foreign_option(name: str) -> ForeignOption | None:
    """What is known of an option that Penstock does not have, by its name with dashes; None for nothing."""
    for reason, names in _WHY_NOT.items():
        for known in names.split():
            if known == name or (known.endswith("*") and name.startswith(known[:-1])):
                return ForeignOption(name, reason)
    return None


def foreign_flags(arguments: Iterable[str], known: Iterable[str]) -> tuple[list[str], str]:
    """(the arguments without those of vLLM's that say nothing new, why the first other one cannot be had or "").

    Args:
        known: flags that Penstock has, which stay as they are.
    """
    ours = set(known)
    kept: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        given, equals, value = argument.partition("=")
        flag = re.sub(r"^(-O)(\d)$", "--optimization-level", given.partition(".")[0])
        flag = SHORT.get(flag, flag)
        renamed = "--" + RENAMED.get(flag[2:], "")
        if renamed in ours:
            kept.append(renamed + equals + value)
            continue
        option, negated = None, False
        if flag.startswith("--") and flag not in ours:
            option = foreign_option(flag[2:])
            if option is None and flag.startswith("--no-"):
                option, negated = foreign_option(flag[5:]), True
        if option is None:
            kept.append(argument)
            continue
        if not equals and not option.is_switch and not negated and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        if not equals and option.is_switch:
            value = "false" if negated else "true"
        if refusal := option.refusal(value):
            shown = given if option.is_switch or not value else f"{given} {value}"
            return kept, f"{shown} is {refusal}"
    return kept, ""
