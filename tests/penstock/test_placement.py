"""Where workers run: devices in turn, shares of a GPU's memory, threads within the cores."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.config import ServeConfig
from penstock.placement import place_workers, visible_gpus


def devices(config: ServeConfig, gpus: int) -> list[tuple[str, str, float]]:
    return [(p.worker_id, p.device, p.memory_share) for p in place_workers(config, gpus, cores=8)]


def test_one_gpu_is_shared() -> None:
    config = ServeConfig(prefill_workers=1, decode_workers=1)
    assert devices(config, gpus=1) == [("prefill-0", "cuda:0", 0.5), ("decode-0", "cuda:0", 0.5)]


def test_given_devices_are_used_in_turn() -> None:
    config = ServeConfig(prefill_workers=3, decode_workers=2, prefill_devices=("0", "1"), decode_devices=("1",))
    assert devices(config, gpus=2) == [
        ("prefill-0", "cuda:0", 1 / 2),
        ("prefill-1", "cuda:1", 1 / 3),
        ("prefill-2", "cuda:0", 1 / 2),
        ("decode-0", "cuda:1", 1 / 3),
        ("decode-1", "cuda:1", 1 / 3),
    ]


def test_without_a_list_workers_go_round_the_gpus() -> None:
    config = ServeConfig(prefill_workers=1, decode_workers=2)
    assert [device for _, device, _ in devices(config, gpus=2)] == ["cuda:0", "cuda:1", "cuda:0"]


@pytest.mark.parametrize("asked, gpus, device", [("auto", 0, "cpu"), ("cpu", 4, "cpu"), ("cuda:3", 4, "cuda:3")])
def test_a_single_device(asked: str, gpus: int, device: str) -> None:
    assert devices(ServeConfig(device=asked), gpus) == [("decode-0", device, 1.0)]


def test_cpu_workers_keep_their_whole_pool() -> None:
    config = ServeConfig(prefill_workers=1, decode_workers=1)
    assert [share for _, _, share in devices(config, gpus=0)] == [1.0, 1.0]


def test_threads_given_by_hand() -> None:
    assert place_workers(ServeConfig(cpu_threads=3), gpus=0, cores=2)[0].cpu_threads == 3


@given(prefill=st.integers(0, 5), decode=st.integers(1, 5), gpus=st.integers(0, 4), cores=st.integers(1, 64))
def test_nothing_is_given_out_twice(prefill: int, decode: int, gpus: int, cores: int) -> None:
    places = place_workers(ServeConfig(prefill_workers=prefill, decode_workers=decode), gpus, cores)
    assert len({place.worker_id for place in places}) == prefill + decode
    assert sum(place.cpu_threads for place in places) <= max(cores, len(places))
    for device in {place.device for place in places} - {"cpu"}:
        assert sum(place.memory_share for place in places if place.device == device) == pytest.approx(1.0)


def test_worker_configuration() -> None:
    fleet = ServeConfig(model="tiny", prefill_workers=1, max_num_seqs=3, bus_port=5, kv_transport="shm")
    config = place_workers(fleet, gpus=0, cores=5)[0].config(fleet)
    assert (config.role, config.worker_id, config.device, config.cpu_threads) == ("prefill", "prefill-0", "cpu", 2)
    assert (config.model, config.max_num_seqs, config.bus_port, config.kv_transport) == ("tiny", 3, 0, "shm")


def test_gpus_are_counted_from_device_files(tmp_path: Path) -> None:
    assert visible_gpus({}, tmp_path) == 0
    for name in ("nvidia0", "nvidia1", "nvidia-uvm", "nvidiactl"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == 2
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, tmp_path) == 1


def test_wsl_shows_one_device(tmp_path: Path) -> None:
    (tmp_path / "dxg").touch()
    assert visible_gpus({}, tmp_path) == 1
