"""The repository as a newcomer finds it: links that resolve, commands that exist, nothing of one machine in it."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("setup", "demo", "test", "check")

# Folders of one machine and addresses of package servers: whoever clones this has neither.
_LOCAL = re.compile(
    r"(?<![\w.])/(?:work|root|tmp/venv)/|/home/(?!penstock\b)\w|(?:pypi|pythonhosted|npmjs|download\.pytorch)\.(?:org|io|com)"
)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_CODE_LINK = re.compile(r"\[`([A-Za-z_][\w.]*)`\]\(([^)#\s]+\.py)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINES = re.compile(r"L(\d+)(?:-L(\d+))?")
_SCRIPT = re.compile(r"(?<![\w/.-])(\.?/?(?:scripts|benchmarks|\.ci)/[\w./-]*\w)")


@cache
def _files() -> tuple[Path, ...]:
    """Every file that git tracks, or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = {ROOT / name for name in listed.stdout.decode().split("\0") if name}
    return tuple(sorted(path for path in paths if path.is_file() and not path.is_symlink()))


def _documents() -> list[Path]:
    return [path for path in _files() if path.suffix == ".md"]


def _anchors(document: Path) -> set[str]:
    """Anchors of a Markdown file's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ +(.+?) *$", _FENCE.sub("", document.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def _broken(document: Path, target: str) -> str | None:
    """Why a link of a document does not resolve, or None."""
    if re.match(r"[a-z]+:", target):
        return None
    name, _, anchor = target.partition("#")
    path = (document.parent / name).resolve() if name else document
    if not path.exists():
        return f"no such file: {name}"
    if not path.is_relative_to(ROOT):
        return f"outside the repository: {name}"
    if not anchor:
        return None
    lines = _LINES.fullmatch(anchor)
    if lines:
        last = int(lines[2] or lines[1])
        return f"{name} has no line {last}" if last > len(path.read_text().splitlines()) else None
    if path.suffix == ".md":
        return None if anchor in _anchors(path) else f"no heading #{anchor} in {path.name}"
    return f"an anchor in {name} that is not a line"


def test_links_in_documents_resolve() -> None:
    broken = [
        f"{document.relative_to(ROOT)}: {target}: {reason}"
        for document in _documents()
        for match in _LINK.finditer(_FENCE.sub("", document.read_text()))
        if (reason := _broken(document, target := match[1] or match[2]))
    ]
    assert not broken


def test_names_in_links_are_in_the_files_they_lead_to() -> None:
    """[`Scheduler.plan`](engine/scheduler.py) leads to that class and method; a file may go by its own name."""
    missing = []
    for document in _documents():
        for name, target in _CODE_LINK.findall(document.read_text()):
            path = document.parent / target
            defined = set(re.findall(r"^ *(?:async )?(?:def|class) (\w+)", path.read_text(), re.MULTILINE))
            if name not in (path.name, path.stem) and not defined.issuperset(name.split(".")):
                missing.append(f"{document.name}: {name}")
    assert not missing


def test_commands_in_documents_exist() -> None:
    missing = [
        f"{document.relative_to(ROOT)}: {name}"
        for document in _documents()
        for name in _SCRIPT.findall(document.read_text())
        if not (ROOT / name).exists()
    ]
    assert not missing


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_needs_no_other_before_it(name: str) -> None:
    script = ROOT / "scripts" / name
    assert os.access(script, os.X_OK)
    assert name == "setup" or re.search(r"^scripts/setup$", script.read_text(), re.MULTILINE)


def test_the_readme_names_the_commands_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    run = re.findall(r"^(scripts/\w+)", ci.read_text(), re.MULTILINE)
    assert run == ["scripts/check", "scripts/test"]
    for command in ("scripts/demo", *run):
        assert command in readme, command


def test_nothing_of_one_machine_is_tracked() -> None:
    found = []
    for path in _files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {match[0]}"
            for number, line in enumerate(text.splitlines(), 1)
            if (match := _LOCAL.search(line))
        ]
    assert not found


def test_no_large_file_is_tracked() -> None:
    """But the embedded model: tests/penstock/test_demo.py says how large that may be."""
    large = {str(path.relative_to(ROOT)) for path in _files() if path.stat().st_size > 5_000_000}
    assert large <= {"penstock/demo_model/checkpoint/model.safetensors"}


def test_benchmarks_say_that_they_use_helpers_of_the_tests() -> None:
    """Helpers alone: a file of tests is nobody's library."""
    imported = {
        path.name: re.findall(r"^from (tests[\w.]*) import", path.read_text(), re.MULTILINE)
        for path in (ROOT / "benchmarks").glob("*.py")
    }
    assert not [name for names in imported.values() for name in names if ".test_" in name]
    told = re.findall(
        r"`python benchmarks/(\w+\.py)[^|]*\|[^|]*\| tests\b", (ROOT / "benchmarks" / "README.md").read_text()
    )
    assert sorted(told) == sorted(name for name, names in imported.items() if names)
