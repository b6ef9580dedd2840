"""One fleet of each kind for all clients of this folder, and what Hugging Face says of their model."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tokenizers

from tests.system.fleets import fleet
from tests.system.openai_servers import CONTEXT, END_IDS, KEY, MODES, PAGE, Reference, Server


@pytest.fixture(scope="package")
def model(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("client") / "model"
    shutil.copytree(checkpoints["qwen2"], path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(END_IDS)}))
    return path


@pytest.fixture(scope="package")
def servers(model: Path) -> Iterator[dict[str, Server]]:
    options: dict[str, dict[str, Any]] = {
        "one-phase": {},
        # Round-robin hands every long prompt off, whatever that costs on a busy machine.
        "pair": {
            "prefill_workers": 1,
            "decode_workers": 1,
            "routing_policy": "round-robin",
            "api_key": (KEY, "sk-second"),
        },
    }
    with contextlib.ExitStack() as stack:
        found = {}
        for mode in MODES:
            running = stack.enter_context(
                fleet(model, max_model_len=CONTEXT, block_size=PAGE, max_num_batched_tokens=16, **options[mode])
            )
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=60)
            http = httpx.Client(base_url=running.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
            found[mode] = Server(running, stack.enter_context(client), stack.enter_context(http))
        yield found


@pytest.fixture(params=MODES)
def server(servers: dict[str, Server], request: pytest.FixtureRequest) -> Server:
    return servers[request.param]


@pytest.fixture(scope="package")
def tokenizer(model: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest.fixture(scope="package")
def reference(model: Path) -> Reference:
    return Reference(model)
