"""What an installation holds: declared dependencies, the files of wheel and sdist, a router without torch."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ROUTER_FOLDERS = ("common", "router")
WORKER_FOLDERS = ("decode_worker", "engine", "kernels", "kv_transfer", "models", "prefill_worker")
DEMO_MODEL = ("checkpoint/config.json", "checkpoint/model.safetensors", "checkpoint/tokenizer.json")


@cache
def _project() -> dict[str, Any]:
    parsed: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return parsed


def _declared(*extras: str) -> set[str]:
    """Names of the distributions that the core and these extras ask for."""
    lines = list(_project()["dependencies"])
    for extra in extras:
        lines += _project()["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def _tracked() -> list[str]:
    """Every file of the checkout, the links in penstock/ as such."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)]


def _third_party(paths: Iterable[Path]) -> dict[str, str]:
    """Top-level modules of others that the files import, with the file that does."""
    found = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found |= {name.split(".")[0]: str(path.relative_to(ROOT)) for name in names}
    ours = {"penstock", "tests", "benchmarks", "demo_text"}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names and name not in ours}


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (ROUTER_FOLDERS, ("otel",)),
        (WORKER_FOLDERS, ("worker",)),
        (("penstock",), ("worker", "demo", "plot")),
        (("tests", "scripts", "benchmarks"), ("worker", "dev", "contract")),
    ],
    ids=["router", "worker", "penstock", "development"],
)
def test_what_is_imported_is_declared(folders: tuple[str, ...], extras: tuple[str, ...]) -> None:
    owners = importlib.metadata.packages_distributions()
    declared = _declared(*extras)
    undeclared = [
        f"{path} imports {name}"
        for name, path in _third_party(p for folder in folders for p in (ROOT / folder).rglob("*.py")).items()
        if not declared & {canonicalize_name(owner) for owner in owners.get(name, [name])}
    ]
    assert not undeclared


def test_constraints_pin_what_is_declared() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned: dict[str, list[Requirement]] = {}
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.]+(; python_version (<|>=) '3\.11')?", line), line
        pinned.setdefault(canonicalize_name(Requirement(line).name), []).append(Requirement(line))
    for text in [line for extra in _project()["optional-dependencies"].values() for line in extra]:
        wish = Requirement(text)
        if wish.name != "penstock":
            for pin in pinned[canonicalize_name(wish.name)]:
                assert wish.specifier.contains(str(pin.specifier).removeprefix("==")), f"{pin} against {wish}"
    assert _declared() <= pinned.keys()


def test_the_router_asks_for_nothing_heavy() -> None:
    closure = _closure(_declared())
    assert {"starlette", "uvicorn", "pyzmq"} <= closure
    assert not closure & {"torch", "transformers", "triton", "numpy", "safetensors", "nixl-cu13"}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), built from a copy of the checkout so that nothing is written into it."""
    source = tmp_path_factory.mktemp("source")
    for name in _tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to((ROOT / name).readlink())
        else:
            (source / name).write_bytes((ROOT / name).read_bytes())
    program = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = (source / "dist").glob("*.whl"), (source / "dist").glob("*.tar.gz")
    return wheel, sdist


def _expected_files() -> set[str]:
    """The sources under the names they are imported by, and the data they need."""
    names = {name for name in _tracked() if name.split("/")[0] in ("penstock", *ROUTER_FOLDERS, *WORKER_FOLDERS)}
    sources = {name if name.startswith("penstock/") else f"penstock/{name}" for name in names if name.endswith(".py")}
    return sources | {"penstock/py.typed"} | {f"penstock/demo_model/{name}" for name in DEMO_MODEL}


def test_the_wheel_holds_every_source_and_nothing_else_at_the_top(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[0]) as wheel:
        names = set(wheel.namelist())
        assert _expected_files() <= names
        assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"penstock"}
        for name in ("common/config.py", "router/policy.py"):
            assert wheel.read(f"penstock/{name}") == (ROOT / name).read_bytes()


def test_the_sdist_holds_files_in_place_of_links(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[1]) as sdist:
        files = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    assert _expected_files() <= files
    assert "LICENSE" in files


def _closure(names: Iterable[str]) -> set[str]:
    """These distributions and all that they need, as installed here."""
    closure: set[str] = set()
    waiting = {canonicalize_name(name) for name in names}
    while waiting:
        name = waiting.pop()
        closure.add(name)
        requirements = map(Requirement, importlib.metadata.requires(name) or [])
        needed = {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
        waiting |= {canonicalize_name(other) for other in needed} - closure
    return closure


@pytest.fixture(scope="module")
def router_python(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel and its core dependencies, nothing else; the latter are links to ours."""
    home = tmp_path_factory.mktemp("router")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    (packages,) = home.glob("lib/python*/site-packages")
    for name in _closure(_declared()):
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(distribution.locate_file(top)))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", "--quiet"]
    done = subprocess.run([*pip, str(archives[0])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return python


def _run(command: list[str], cwd: Path) -> str:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PENSTOCK_"))}
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_router_runs_without_torch(router_python: Path, tmp_path: Path) -> None:
    modules = [
        "penstock." + str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for folder in ROUTER_FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "tracing.py"
    ]
    program = (
        "import importlib, importlib.util as u\n"
        "assert not [n for n in ('torch', 'transformers', 'numpy') if u.find_spec(n)]\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "import penstock.router.app; print(penstock.router.app.__file__)\n"
        "try: penstock.router.app._tracing('http://localhost:4318')\n"
        "except penstock.router.app.ConfigError as error: assert 'penstock[otel]' in str(error)\n"
        "else: raise AssertionError('tracing without its extra')"
    )
    assert "site-packages" in _run([str(router_python), "-c", program], tmp_path)
    assert "--redis-url" in _run([str(router_python.with_name("penstock")), "router", "--help"], tmp_path)


def test_the_installed_demo_model_is_whole(router_python: Path, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from penstock.demo_model import make_demo_model\n"
        "print(*sorted(p.name for p in make_demo_model(Path('model')).iterdir()))"
    )
    written = set(_run([str(router_python), "-c", program], tmp_path).split())
    assert written >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
