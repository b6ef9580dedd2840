"""What a reader counts, as it travels in `WorkerLoad`."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.common.histogram import READ_BYTES, READ_PAGES, READ_SECONDS, Histogram


@dataclass
class ReaderCounters:
    """Since the start of the worker; as in `WorkerLoad`."""

    handoffs: int = 0
    handoff_failures: int = 0
    transfer_pages: int = 0
    checksum_failures: int = 0
    asked_tokens: int = 0
    received_tokens: int = 0
    fetches: int = 0
    fetch_failures: int = 0
    fetched_tokens: int = 0

    def load(self) -> dict[str, int]:
        """Fields of `WorkerLoad`."""
        return dict(vars(self))


@dataclass
class ReadHistograms:
    """Of the tickets that have been read."""

    read_s: Histogram = field(default_factory=lambda: Histogram(READ_SECONDS))
    read_bytes: Histogram = field(default_factory=lambda: Histogram(READ_BYTES))
    read_pages: Histogram = field(default_factory=lambda: Histogram(READ_PAGES))

    def read(self, seconds: float, size_bytes: int, num_pages: int) -> None:
        """A ticket's pages have arrived."""
        self.read_s.observe(seconds)
        self.read_bytes.observe(size_bytes)
        self.read_pages.observe(num_pages)

    def packed(self) -> dict[str, list[float]]:
        """As they travel in `WorkerLoad`."""
        return {name: histogram.packed() for name, histogram in vars(self).items()}
