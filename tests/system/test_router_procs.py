"""Router processes that share a port: connections spread over them, figures of all from any, deaths cost little."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.fleet import Fleet
from tests.system.fleets import assert_idle, fleet, router, router_metric, wait_restarted

pytestmark = pytest.mark.system
PROCS = 3
REQUESTS = 40


@pytest.fixture(scope="module")
def running(checkpoints: dict[str, Path]) -> Iterator[Fleet]:
    with fleet(checkpoints["llama"], router_procs=PROCS, api_key=("sk-test",), cpu_threads=1) as one:
        yield one


def ask(running: Fleet, path: str, port: int = 0) -> httpx.Response:
    """One request on a connection of its own, so that the kernel deals it out anew."""
    headers = {"Authorization": "Bearer sk-test", "Connection": "close"}
    url = running.url if not port else f"http://127.0.0.1:{port}"
    return httpx.get(url + path, headers=headers, timeout=60, verify=False)


def complete(running: Fleet) -> Any:
    fields = {"model": "tiny", "prompt": [5, 6, 7, 8], "max_tokens": 3, "temperature": 0.0, "ignore_eos": True}
    headers = {"Authorization": "Bearer sk-test", "Connection": "close"}
    answer = httpx.post(f"{running.url}/v1/completions", json=fields, headers=headers, timeout=60, verify=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def answered(running: Fleet, port: int = 0) -> dict[str, float]:
    """Choices that ended, by process."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(ask(running, "/metrics", port).text):
        for sample in family.samples:
            if sample.name == "vllm:request_success_total":
                process = sample.labels.get("process", "")
                found[process] = found.get(process, 0.0) + sample.value
    return found


def test_every_process_takes_part_and_any_tells_of_all(running: Fleet) -> None:
    texts = {complete(running)["choices"][0]["text"] for _ in range(REQUESTS)}
    assert len(texts) == 1
    for _ in range(6):  # whoever is asked
        by_process = answered(running)
        assert by_process.keys() == {"0", "1", "2"} and sum(by_process.values()) == REQUESTS
        assert all(by_process.values()), "the kernel deals connections out to all of them"
        router = ask(running, "/fleet").json()["router"]
        assert router["finished"] == router["requests"] == REQUESTS and router["processes"] == PROCS
        deadline = time.monotonic() + 60
        while ask(running, "/load").json() != {"server_load": 0}:  # a client may have its answer before that is noted
            assert time.monotonic() < deadline
    metrics = ask(running, "/metrics").text
    assert metrics.count("# TYPE vllm:num_requests_running ") == 1
    workers = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{")]
    assert len(workers) == 1 and "process=" not in workers[0], "a worker's figures are there once"


def test_a_process_that_dies_is_replaced_and_the_others_serve_on(running: Fleet) -> None:
    pids = running.group.pids()
    assert [name for name in pids if name.startswith("router")] == ["router-0", "router-1", "router-2"]
    before = answered(running)
    running.kill("router-1", signal.SIGKILL)
    deadline = time.monotonic() + 60
    while running.group.pids().get("router-1") == pids["router-1"]:  # until it is gone, and its sockets with it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(20):  # the dead one is dealt no connection, nor is the new one before it knows its workers
        complete(running)
    wait_restarted(running, "router-1", pids["router-1"])
    deadline = time.monotonic() + 60
    while answered(running).get("1", 0.0) < 2:
        assert time.monotonic() < deadline, "the new one is dealt connections"
        complete(running)
    after = answered(running)
    assert after["0"] >= before["0"] and after["2"] >= before["2"]
    assert_idle(running)


def test_each_process_speaks_for_itself_at_its_admin_port(running: Fleet) -> None:
    by_process = answered(running)
    specs = {spec.name: spec for spec in running.specs}
    for index in range(PROCS):
        config = json.loads(specs[f"router-{index}"].stdin)
        assert answered(running, config["admin_port"]) == {"": by_process[str(index)]}
        assert ask(running, "/health", config["admin_port"]).status_code == 200


def test_a_response_in_the_background_is_everybodys(running: Fleet) -> None:
    """Made by the first process, followed at the second, ended at the third."""
    specs = {spec.name: spec for spec in running.specs}
    ports = [json.loads(specs[f"router-{index}"].stdin)["admin_port"] for index in range(PROCS)]
    headers = {"Authorization": "Bearer sk-test"}
    one, two, three = (httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) for port in ports)
    body = {"model": "tiny", "input": "a", "background": True, "ignore_eos": True, "temperature": 0}
    with one, two, three:
        response = one.post("/v1/responses", json=body).json()
        path = f"/v1/responses/{response['id']}"
        deadline = time.monotonic() + 60
        while two.get(path).json()["status"] == "queued":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ended = three.post(f"{path}/cancel")
        status = two.get(path).json()["status"]
        if ended.status_code == 200:
            assert ended.json()["status"] == status == "cancelled"
        else:  # it was quicker
            assert ended.status_code == 400 and status in ("completed", "incomplete")
        short = {**body, "background": False, "max_output_tokens": 4}
        first = one.post("/v1/responses", json=short).json()
        second = two.post("/v1/responses", json={**short, "previous_response_id": first["id"]})
        assert second.status_code == 200 and second.json()["previous_response_id"] == first["id"]
        assert three.delete(path).status_code == 200 and one.get(path).status_code == 404


def test_a_group_of_routers_can_be_started_alone(running: Fleet) -> None:
    with router(running.config.redis_url, Path(running.config.model), api_server_count=2) as url:
        deadline = time.monotonic() + 60
        while httpx.get(f"{url}/fleet", timeout=60, verify=False).json()["router"]["processes"] != 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_router_that_reads_text_otherwise_uses_no_worker_or_says_so(
    running: Fleet, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Started apart, with files of its own: another tokenizer is refused, another template is counted."""
    model = checkpoints["llama"]
    for name in ("words", "template"):
        (tmp_path / name).mkdir()
        for file in model.glob("*.json"):
            (tmp_path / name / file.name).write_text(file.read_text())
    words = json.loads((model / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(words))
    (tmp_path / "template" / "chat_template.jinja").write_text("{{ messages[0].content }}")

    url = running.config.redis_url
    with router(url, tmp_path / "words", status=503) as other:
        deadline = time.monotonic() + 60
        while router_metric(other, "penstock:workers_refused_total") != 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        told = httpx.get(f"{other}/health", timeout=60)
        assert told.status_code == 503 and told.json()["reason"] == "no worker fits this router: its log says why"
    with router(url, tmp_path / "template") as other:
        assert router_metric(other, "penstock:template_mismatches_total") == 1
    with router(url, model) as other:
        assert router_metric(other, "penstock:template_mismatches_total") == 0
        assert router_metric(other, "penstock:workers_refused_total") == 0
