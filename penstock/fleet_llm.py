"""`LLM(model, prefill_workers=1, decode_workers=1)`: the same class over a fleet that runs in the background."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

from penstock.common.config import EngineConfig, ServeConfig
from penstock.common.grammar import Grammars
from penstock.engine.core import Engine
from penstock.engine_run import Run
from penstock.fleet_thread import FleetRun, FleetThread
from penstock.llm import LLM

QUIET = {"log_level": "warning"}  # a program has its own output


class FleetLLM(LLM):
    """An `LLM` whose engines are in worker processes. `close`, the object's end and the program's end stop them."""

    thread: FleetThread

    def _start(self, fleet_options: Mapping[str, Any]) -> None:
        self._one_call = nullcontext()
        engine = {f.name: getattr(self.config, f.name) for f in fields(EngineConfig)}
        self.thread = FleetThread(
            ServeConfig(**{**engine, **QUIET, **fleet_options, "tokenizer": self._tokenizer_path, "port": 0})
        )
        self._ending = weakref.finalize(self, self.thread.close)
        self._forms = Grammars(self.get_tokenizer, self.vocab_size, self.eos_token_ids, masks=False)
        self._forms.prepare()

    @property
    def max_model_len(self) -> int:
        return self.thread.model.max_model_len

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.thread.model.eos_token_ids

    @property
    def vocab_size(self) -> int:
        return self.thread.model.vocab_size

    @property
    def engine(self) -> Engine:
        raise ValueError("the engines of a fleet are in its workers")

    @property
    def on_gpu(self) -> bool:
        return any(placement.device != "cpu" for placement in self.thread.fleet.placements)

    def describe(self) -> str:
        places = ", ".join(f"{placement.worker_id} on {placement.device}" for placement in self.thread.fleet.placements)
        return f"{places}, context {self.max_model_len}"

    def close(self) -> None:
        """Stop every process; the object cannot be used afterwards."""
        self._ending()
        self._forms.close()

    @property
    def _grammars(self) -> Grammars:
        return self._forms

    def check_open(self) -> None:
        """Raises ValueError after `close`, and in a fork of the process that made it."""
        self.thread.check_open()

    def _begin(self) -> Run:
        return FleetRun(self.thread)
