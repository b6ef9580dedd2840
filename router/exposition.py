"""The text of /metrics: written from metric families, and put together from the texts of several processes.

Of 64 workers that takes 60 ms and more. So the event loop only takes a `Scrape` (metrics.py), and another thread makes
the text of it while the loop counts on (group.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.common.messages import WorkerInfo, WorkerLoad
from penstock.common.worker_metrics import LABELS, worker_metric_families
from penstock.router.health import WorkerState

_HEAD = b"# HELP "


@dataclass(frozen=True)
class Scrape:
    """What a router knows at one moment. Nothing of it changes any more."""

    counted: Sequence[Metric]  # by this router
    model_name: str
    loads: Sequence[tuple[WorkerInfo, WorkerLoad]]
    states: Mapping[str, WorkerState]  # of these workers, by incarnation

    def of_router(self) -> Iterator[Metric]:
        """What this process says of itself; so do python_* and process_*."""
        yield from self.counted
        yield from REGISTRY.collect()

    def of_workers(self) -> Iterator[Metric]:
        """What all processes that are linked to the same workers say alike."""
        help = "1 if the worker is sent requests; 0: it is stalled or broken."
        family = GaugeMetricFamily("penstock:worker_usable", help, labels=LABELS)
        for worker, _ in self.loads:
            usable = self.states[worker.incarnation].state not in ("stalled", "broken")
            family.add_metric([self.model_name, worker.worker_id], float(usable))
        yield family
        yield from worker_metric_families(self.model_name, self.loads)

    def text(self) -> bytes:
        """All of it."""
        return written([*self.of_router(), *self.of_workers()])


def written(families: Iterable[Metric]) -> bytes:
    """The families in Prometheus' text format."""
    return generate_latest(_Families(families))  # nothing but `collect` is called


def labelled(families: Iterable[Metric], label: str, value: str) -> Iterator[Metric]:
    """The families with one more label on every sample."""
    for family in families:
        one = Metric(family.name, family.documentation, family.type, family.unit)
        one.samples = [sample._replace(labels={**sample.labels, label: value}) for sample in family.samples]
        yield one


def together(texts: Iterable[bytes]) -> bytes:
    """One text with the samples of all: those of a family must follow each other, under one head.

    A head is two lines, its HELP and its TYPE, as `written` writes it; nothing else is looked at.
    """
    families: dict[bytes, list[bytes]] = {}
    for text in texts:
        for family in (b"\n" + text.rstrip()).split(b"\n" + _HEAD)[1:]:
            name = family.partition(b" ")[0]
            help, type, *samples = family.split(b"\n", 2)
            families.setdefault(name, [help, type]).extend(samples)
    return b"".join(_HEAD + b"\n".join(lines) + b"\n" for lines in families.values())


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
