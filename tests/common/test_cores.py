"""Cores: what the container allows."""

from __future__ import annotations

from pathlib import Path

from penstock.common.cores import available_cores


def test_cores_respect_the_containers_quota(tmp_path: Path) -> None:
    everything = available_cores(tmp_path / "absent")
    quota = tmp_path / "cpu.max"
    quota.write_text("150000 100000\n")
    assert available_cores(quota) == 1
    quota.write_text("max 100000\n")
    assert available_cores(quota) == everything >= 1
