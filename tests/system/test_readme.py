"""The commands of README.md and docs/http.md, run as they are written.

Changed is only what differs from machine to machine: where the interpreter is, which model, which port, which GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

import pytest

from penstock.demo_model import CHECKPOINT
from tests.conftest import free_port

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "docs/http.md")
COMMAND = f"{shlex.quote(sys.executable)} -m penstock"
STARTS_S = 60.0


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language ("" for shell commands) in the documents."""
    texts = [(ROOT / name).read_text() for name in DOCUMENTS]
    return [
        block for text in texts for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def commands() -> list[str]:
    """Every command in the shell blocks: continued lines joined, comments cut off."""
    shell = "".join(blocks("") + blocks("sh") + blocks("bash") + blocks("console")).replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in shell.splitlines()]
    return [line for line in lines if line]


SERVE = [command for command in commands() if " serve " in command]
CURL = [command for command in commands() if command.startswith("curl ")]


def here(command: str, port: int) -> str:
    """The command for this machine: our interpreter, the demo model, a free port, no GPU."""
    command = re.sub(r"^(?:\.venv/bin/)?penstock\b", COMMAND, command)
    command = re.sub(r" --(?:prefill|decode)-devices \S+", "", command)
    command = command.replace("localhost:8000", f"127.0.0.1:{port}")
    if " serve " in command:
        command = command.replace(" MODEL", f" {CHECKPOINT} --served-model-name MODEL") + f" --port {port}"
    return command


def environment(**extra: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return ours | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | extra


@contextlib.contextmanager
def served(command: str, cwd: Path) -> Iterator[str]:
    """Run a serve command from any folder; gives its ready line, then stops it as Ctrl-C does."""
    process = subprocess.Popen(
        shlex.split(command), cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: Queue[str] = Queue()
    assert process.stdout
    reader = Thread(target=lambda: [lines.put(line) for line in process.stdout or ()])
    reader.start()
    seen = [""]
    try:
        while not seen[-1].startswith("Penstock is ready"):
            try:
                seen.append(lines.get(timeout=STARTS_S))
            except Empty:
                raise AssertionError("not ready: " + "".join(seen)) from None
        yield seen[-1]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def test_every_shell_command_is_run_here() -> None:
    assert len(SERVE) == 2 and len(CURL) == 1
    assert sorted(commands()) == sorted(SERVE + CURL), "a command that no test runs"


@pytest.mark.parametrize("command", SERVE, ids=lambda command: f"{len(command.split())}-words")
def test_serve_answers_the_curl_commands(command: str, tmp_path: Path) -> None:
    port = free_port()
    with served(here(command, port), tmp_path) as ready:
        assert f"http://127.0.0.1:{port} | MODEL | " in ready
        assert ("1 prefill + 1 decode worker" in ready) == ("--prefill-workers 1" in command)
        for curl in CURL:
            done = subprocess.run(
                [*shlex.split(here(curl, port)), "--silent", "--show-error", "--noproxy", "*"],
                capture_output=True,
                text=True,
                check=True,
            )
            answer = json.loads(done.stdout)
            assert answer["model"] == "MODEL"
            assert answer["choices"][0]["text"]
            assert 1 <= answer["usage"]["completion_tokens"] <= 20


@pytest.mark.parametrize("snippet", blocks("python"), ids=["README"])
def test_python_prints_a_text_for_each_prompt(snippet: str, tmp_path: Path) -> None:
    program = snippet.replace('"MODEL"', repr(str(CHECKPOINT)))
    assert program != snippet
    counted = textwrap.dedent("""
        import builtins
        printed = []
        def print(text):
            printed.append(text)
    """)
    done = subprocess.run(
        [sys.executable, "-c", f"{counted}\n{program}\nbuiltins.print(len(printed), any(printed))"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "2 True\n"), done.stderr


def test_every_command_named_has_its_help() -> None:
    text = "".join((ROOT / name).read_text() for name in DOCUMENTS)
    named = set(re.findall(r"`penstock ([\w-]+)", text)) | {"serve"}
    assert named >= {"serve", "router", "prefill", "decode", "doctor", "tap", "top", "bench", "run-batch"}
    for name in sorted(named):
        argv = [*shlex.split(COMMAND), name, "--help"]
        done = subprocess.run(argv, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith(f"usage: penstock {name} "), done.stderr


def test_every_option_named_exists() -> None:
    """Options and PENSTOCK_ variables in the documents, against the help of the commands they speak of."""
    text = "".join((ROOT / name).read_text() for name in DOCUMENTS)
    helps = [
        subprocess.run(
            [*shlex.split(COMMAND), name, "--help"], env=environment(), capture_output=True, text=True, check=True
        ).stdout
        for name in ("serve", "router", "prefill", "decode", "chat", "complete", "run-batch")
    ]
    known = set(re.findall(r"--[a-z][a-z-]+", " ".join(helps)))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    variables = {f"--{name.lower().replace('_', '-')}" for name in re.findall(r"PENSTOCK_([A-Z_]+)", text)}
    assert len(named) >= 5 and variables
    assert (named | variables) - known == set()
