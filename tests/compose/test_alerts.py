"""The alert rules and the dashboard's queries: what Prometheus' own tester says of the rules over made-up series."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.common.worker_metrics import worker_metric_families
from tests.system.prometheus import PROMTOOL, RULES, needs_prometheus

ROUTERS = ("router-a:8000", "router-b:8000")


def by_every_router(metric: str, values: str, **labels: str) -> dict[str, str]:
    """One series a router."""
    shown = {"model_name": "tiny", **labels}
    text = ",".join(f'{name}="{value}"' for name, value in shown.items())
    return {f'{metric}{{instance="{router}",{text}}}': values for router in ROUTERS}


def waiting(requests: int) -> dict[str, str]:
    return by_every_router("vllm:num_requests_waiting", f"{requests}x30", engine="decode-0")


def handoffs(failures_a_minute: int) -> dict[str, str]:
    """100 hand-offs a minute, as the workers count them."""
    return {
        **by_every_router("penstock:handoffs_total", "0+100x30", engine="decode-0"),
        **by_every_router("penstock:handoffs_total", "0x30", engine="prefill-0"),
        **by_every_router("penstock:handoff_failures_total", f"0+{failures_a_minute}x30", engine="decode-0"),
        **by_every_router("penstock:handoff_failures_total", "0x30", engine="prefill-0"),
    }


UP = by_every_router("up", "1x30", job="penstock")
LOST = "penstock:workers_lost_total"


@needs_prometheus
@pytest.mark.parametrize(
    ("alert", "series", "fires"),
    [
        ("PenstockQueueGrows", waiting(60), False),
        ("PenstockQueueGrows", waiting(101), True),
        ("PenstockHandoffsFail", handoffs(4), False),
        ("PenstockHandoffsFail", handoffs(6), True),
        ("PenstockWorkersLost", by_every_router(LOST, "0x20 2x10", engine="router"), False),
        ("PenstockWorkersLost", by_every_router(LOST, "0x20 3x10", engine="router"), True),
        ("PenstockNoRouter", UP, False),
        ("PenstockNoRouter", by_every_router("up", "0x30", job="penstock"), True),
        ("PenstockNoRouter", by_every_router("up", "1x30", job="penstock-workers"), True),
        ("PenstockNoRouter", {}, True),
        ("PenstockDown", UP, False),
    ],
)
def test_when_it_fires(tmp_path: Path, alert: str, series: dict[str, str], fires: bool) -> None:
    """Two routers tell of the same workers."""
    assert PROMTOOL is not None
    case: dict[str, Any] = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": "25m", "alertname": alert, "exp_alerts": []}],
    }
    tests = {"rule_files": [str(RULES / "alerts.yml")], "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(
        [PROMTOOL, "test", "rules", str(tmp_path / "tests.yml")], capture_output=True, text=True, check=False
    )
    told = done.stdout + done.stderr
    assert (done.returncode == 0) != fires, told
    assert len(re.findall(f'alertname="{alert}"', told)) == fires  # once, however many routers there are


def queries() -> list[str]:
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    panels = json.loads((RULES.parent / "grafana" / "dashboards" / "penstock.json").read_text())["panels"]
    rules = [rule["expr"] for group in groups for rule in group["rules"]]
    return rules + [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_a_workers_figure_is_taken_once_however_many_routers_show_it() -> None:
    names = "|".join(family.name for family in worker_metric_families("", []))
    figure = rf"(?:{names})(?:_total|_bucket|_sum|_count)?(?![\w:])"
    once = rf"(?:max|min)(?: by \((?:\w+, )*engine(?:, \w+)*\))? \((?:(?:rate|increase)\()?{figure}"
    counts = [(len(re.findall(once, query)), len(re.findall(figure, query)), query) for query in queries()]
    assert sum(shown for _, shown, _ in counts) > 20
    assert [query for taken_once, shown, query in counts if taken_once != shown] == []
