"""What a vLLM user types, with only the name and the model's path changed: command lines, the client, curl, `LLM`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from penstock import LLM, SamplingParams
from penstock.cli import main
from penstock.common.config import ServeConfig
from penstock.entrypoints.openai.api_server import main as api_server
from tests.conftest import free_port

KEY = "token-abc123"
PROMPTS = ["The river runs", "A water mill is", "The gate of the dam"]

# Command lines that serve, and what they must come to mean (beside model="M").
SERVING: list[tuple[str, dict[str, Any]]] = [
    ("serve M", {}),
    ("serve M --dtype auto --api-key token-abc123", {"api_key": (KEY,)}),
    ("serve M --host 0.0.0.0 --port 8080", {"host": "0.0.0.0", "port": 8080}),
    (
        "serve M --tensor-parallel-size 1 --gpu-memory-utilization 0.95 --max-model-len 4096",
        {"gpu_memory_utilization": 0.95, "max_model_len": 4096},
    ),
    ("serve M --served-model-name small tiny --trust-remote-code", {"served_model_name": ("small", "tiny")}),
    (
        "serve M --enforce-eager --max-num-seqs 64 --max-num-batched-tokens 4096 --enable-chunked-prefill",
        {"enforce_eager": True, "max_num_seqs": 64, "max_num_batched_tokens": 4096},
    ),
    ("serve M --enable-prefix-caching --block-size 16 --seed 42", {"block_size": 16, "seed": 42}),
    ("serve M --dtype half --max-model-len 8k --generation-config vllm --disable-log-requests",
     {"dtype": "float16", "max_model_len": 8000, "generation_config": "vllm"}),
    ("serve M --chat-template ./template.jinja --uvicorn-log-level warning", {}),
    ("python -m M.api_server --model M --port 8000", {}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), SERVING)
def test_command_lines_that_serve(
    line: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[ServeConfig] = []
    monkeypatch.setattr("penstock.launcher.launch", lambda config: seen.append(config) or 0)
    for name in [name for name in os.environ if name.startswith(("PENSTOCK_", "VLLM_"))]:
        monkeypatch.delenv(name)
    arguments = shlex.split(line)
    status = api_server(arguments[3:]) if arguments[0] == "python" else main(arguments)
    if "--uvicorn-log-level" in arguments:  # not ours: told so, and what to say instead
        assert status == 2 and "--log-format and --enable-log-requests are the choices" in capsys.readouterr().err
    else:
        assert status == 0 and seen == [ServeConfig(model="M", **expected)]


class Served:
    """A server that a command line of vLLM's started."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model
        self.port = url.rpartition(":")[2]

    def command(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run `penstock LINE`, with MODEL and PORT filled in, as a user with the key in the environment."""
        arguments = shlex.split(line.replace("MODEL", self.model).replace("PORT", self.port))
        done = subprocess.run(
            [sys.executable, "-m", "penstock", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "OPENAI_API_KEY": KEY},
        )
        assert done.returncode == 0, done.stderr
        return done


@pytest.fixture(scope="module")
def served(checkpoints: dict[str, Path]) -> Iterator[Served]:
    model, port = str(checkpoints["llama"]), free_port()
    line = f"serve {model} --port {port} --dtype auto --api-key {KEY} --max-model-len 1k --tensor-parallel-size 1"
    command = [sys.executable, "-m", "penstock", *shlex.split(line), "--kv-cache-memory-bytes", "16MiB"]
    with subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().startswith("Penstock is ready: "), "it did not start"
            yield Served(f"http://127.0.0.1:{port}", model)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def offline(checkpoints: dict[str, Path]) -> list[str]:
    """The quick start of the Python class: its greedy answers to PROMPTS."""
    sampling_params = SamplingParams(temperature=0.0, top_p=0.95, max_tokens=8)
    llm = LLM(model=str(checkpoints["llama"]), max_model_len=1024, kv_cache_memory_bytes=16 << 20, device="cpu")
    outputs = llm.generate(PROMPTS, sampling_params)
    assert [output.prompt for output in outputs] == PROMPTS
    texts = [output.outputs[0].text for output in outputs]
    messages = [{"role": "system", "content": "You help."}, {"role": "user", "content": "Why does it fill?"}]
    (chat,) = llm.chat(messages, sampling_params, use_tqdm=False)
    llm.close()
    return [*texts, chat.outputs[0].text]


@pytest.mark.system
def test_the_quick_start_with_the_openai_client(served: Served, offline: list[str]) -> None:
    with OpenAI(api_key=KEY, base_url=f"{served.url}/v1") as client:
        (model,) = client.models.list().data
        assert model.id == served.model
        for prompt, expected in zip(PROMPTS, offline, strict=False):
            completion = client.completions.create(model=model.id, prompt=prompt, max_tokens=8, temperature=0)
            assert completion.choices[0].text == expected
        answer = client.chat.completions.create(
            model=served.model,
            messages=[
                {"role": "system", "content": "You help."},
                {"role": "user", "content": "Why does it fill?"},
            ],
            max_tokens=8,
            temperature=0,
        )
        assert answer.choices[0].message.content == offline[-1]


@pytest.mark.system
def test_the_quick_start_with_curl(served: Served, offline: list[str]) -> None:
    body = json.dumps({"model": served.model, "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0})
    headers = ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}"]
    done = subprocess.run(
        ["curl", "-sS", f"{served.url}/v1/completions", *headers, "-d", body], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["choices"][0]["text"] == offline[0]
    refused = subprocess.run(["curl", "-sS", f"{served.url}/v1/models"], capture_output=True, check=True)
    assert "error" in json.loads(refused.stdout)


@pytest.mark.system
def test_command_lines_that_ask_a_server(served: Served, offline: list[str], tmp_path: Path) -> None:
    asked = served.command(f'complete --url http://localhost:PORT/v1 --max-tokens 8 --temperature 0 -q "{PROMPTS[0]}"')
    assert asked.stdout.rstrip("\n") == offline[0].rstrip("\n")
    flags = '--system-prompt "You help." --max-tokens 8 --temperature 0 --quick "Why does it fill?"'
    asked = served.command(f"chat --url http://localhost:PORT/v1 {flags}")
    assert asked.stdout.rstrip("\n") == offline[-1].rstrip("\n")
    load = "--dataset-name random --random-input-len 16 --random-output-len 4 --num-prompts 3 --request-rate inf"
    served.command(
        f"bench serve --backend vllm --model MODEL --endpoint /v1/completions --port PORT {load} --ignore-eos "
        f"--save-result --result-dir {tmp_path} --result-filename r.json"
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (3, 12)
    body = {"model": served.model, "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 3}
    line = {"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    served.command(f"run-batch -i {tmp_path}/in.jsonl -o {tmp_path}/out.jsonl --base-url {served.url}")
    assert json.loads((tmp_path / "out.jsonl").read_text())["response"]["status_code"] == 200


@pytest.mark.system
@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("bench latency --model M --input-len 8 --output-len 4 --batch-size 2 --num-iters-warmup 0 --num-iters 1",
         "avg_latency"),
        ("bench throughput --backend vllm --model M --dataset-name random --input-len 8 --output-len 4 --num-prompts 3",
         "tokens_per_second"),
    ],
    ids=["latency", "throughput"],
)  # fmt: skip
def test_command_lines_that_measure_offline(line: str, key: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    arguments = [str(checkpoints["llama"]) if part == "M" else part for part in shlex.split(line)]
    engine = ["--max-model-len", "64", "--enforce-eager", "--kv-cache-memory-bytes", "4MiB", "--device", "cpu"]
    assert main([*arguments, *engine, "--output-json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())[key] > 0
