"""Pictures of simulated runs, a panel for each figure and a bar for each policy. Needs the extra `penstock[plot]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.common.errors import ConfigError
from penstock.simulate.result import PolicyResult

# (title, field, whether the axis is logarithmic)
_PANELS = (
    ("prompt tokens that hit", "hit_ratio", False),
    ("most loaded worker / mean", "max_over_mean_load", True),
    ("p99 time to first token, ms", "ttft_p99_ms", True),
    ("requests within SLOs a second", "goodput", False),
)


def need_matplotlib() -> None:
    """Say so before a long run, not after it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'penstock[plot]'") from None


def draw(groups: Mapping[str, Sequence[PolicyResult]], path: Path) -> None:
    """Write a PNG with a group of bars for each fleet or trace, by the name of the group.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 + 1.6 * len(groups), 3 * len(_PANELS)), layout="constrained")
    panels: Any = figure.subplots(len(_PANELS), 1, squeeze=False)[:, 0]
    policies = list(dict.fromkeys(result.policy for results in groups.values() for result in results))
    width = 0.8 / len(policies)
    for panel, (title, name, logarithmic) in zip(panels, _PANELS, strict=True):
        for place, policy in enumerate(policies):
            bars = [
                (group + (place + 0.5) * width - 0.4, getattr(result, name))
                for group, results in enumerate(groups.values())
                for result in results
                if result.policy == policy
            ]
            panel.bar([x for x, _ in bars], [height for _, height in bars], width, label=policy)
        if name == "hit_ratio":
            for group, results in enumerate(groups.values()):
                level = results[0].oracle_hit_ratio
                label = "oracle" if group == 0 else None
                panel.hlines(level, group - 0.4, group + 0.4, colors="black", linestyles="dashed", label=label)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xticks(range(len(groups)), list(groups), fontsize=8)
        if logarithmic:
            panel.set_yscale("log")
    panels[0].legend(fontsize=8, ncols=len(policies) + 1, loc="lower left", bbox_to_anchor=(0, 1.12))
    try:
        figure.savefig(path, format="png", dpi=100)
    except OSError as error:
        raise ConfigError(f"cannot write the plot {path}: {error}") from error
