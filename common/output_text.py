"""The text of one choice: detokenising, stop strings and the count of kept tokens in one object.

The router (one per streamed choice) and `LLM` push what the worker sent and show what comes back. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from penstock.common.detokenizer import Detokenizer
from penstock.common.messages import Finish
from penstock.common.sampling import SamplingParams
from penstock.common.stop_strings import StopStrings
from penstock.common.tokenizer import Tokenizer


class OutputText:
    """Tokens of one choice in, text out.

    After each push: `num_tokens` is the number of tokens kept so far (those after a stop string are discarded and not
    counted), `kept` how many of the last push were, `finish_reason` is set at the end ("stop", "length", "abort",
    "error"), `stop_reason` the string or token id that matched. With `track_offsets`, `offsets[i]` is where the text of
    kept token i of the last push begins, in characters of the whole output.
    """

    __slots__ = (
        "_chars", "_detokenizer", "_min_tokens", "_show_stop_token", "_stops", "_track",
        "finish_reason", "kept", "num_tokens", "offsets", "stop_reason",
    )  # fmt: skip

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        prompt_ids: Sequence[int] = (),
        track_offsets: bool = False,
        shown_ids: Set[int] = frozenset(),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, sampling.skip_special_tokens, prompt_ids, shown_ids)
        self._stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output) if sampling.stop else None
        self._min_tokens = sampling.min_tokens
        self._show_stop_token = sampling.include_stop_str_in_output
        self._track = track_offsets
        self._chars = 0  # characters decoded so far, those held back for stop strings included
        self.num_tokens = 0
        self.kept = 0
        self.offsets: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    def push(self, token_ids: Sequence[int], finish: Finish | None = None) -> str:
        """Text that may be shown now. With `finish`, everything held back comes too.

        A token that ended the output (finish.reason "stop") is the last of its push; it is counted, but not shown
        unless `include_stop_str_in_output`.
        """
        if self.finish_reason is not None:
            self.kept = 0
            return ""
        shown: Sequence[int] = token_ids
        if finish is not None and finish.reason == "stop" and not self._show_stop_token:
            shown = token_ids[:-1]
        if self._stops is None and not self._track:
            self.kept = len(token_ids)
            text = self._detokenizer.push(shown)
        else:
            text = self._push_one_by_one(token_ids, len(shown))
        self.num_tokens += self.kept
        if finish is not None and self.finish_reason is None:
            text += self._finish()
            if self.finish_reason is None:
                self.finish_reason, self.stop_reason = finish.reason, finish.stop_reason
        return text

    def _push_one_by_one(self, token_ids: Sequence[int], num_shown: int) -> str:
        pieces = []
        self.kept = 0
        self.offsets = []
        for position, token_id in enumerate(token_ids):
            self.kept += 1
            self.offsets.append(self._chars)
            if position < num_shown:
                text = self._detokenizer.push((token_id,))
                self._chars += len(text)
                pieces.append(self._search(text, self.num_tokens + self.kept))
            if self.finish_reason is not None:
                break
        return "".join(pieces)

    def _search(self, text: str, num_tokens: int) -> str:
        """As in vLLM, no stop string ends in the text of the first min_tokens tokens; it may begin there."""
        if self._stops is None:
            return text
        text, matched = self._stops.push(text, searched=num_tokens > self._min_tokens)
        if matched is not None:
            self.finish_reason, self.stop_reason = "stop", matched
        return text

    def _finish(self) -> str:
        rest = self._search(self._detokenizer.finish(), self.num_tokens)
        return rest if self._stops is None or self.finish_reason is not None else rest + self._stops.finish()
