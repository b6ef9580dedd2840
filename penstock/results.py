"""What `LLM.generate` and `LLM.chat` return: vLLM's names and fields, those that nothing here fills included."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """One candidate at one position; rank 1 is the most likely token."""

    logprob: float
    rank: int
    decoded_token: str | None  # None without a tokenizer


@dataclass
class CompletionOutput:
    """One of the `n` outputs of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    routed_experts: None = None
    lora_request: None = None

    def finished(self) -> bool:
        """Nothing more comes of it."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A prompt and what was generated from it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: None = None  # vLLM's other fields, as it has them for a plain prompt
    lora_request: None = None
    encoder_prompt: None = None
    encoder_prompt_token_ids: None = None
    kv_transfer_params: None = None
