"""The shape of the house: which folder may import which, no cycles, no torch in the router, no heaps."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "common": set(),
    "kernels": set(),
    "models": {"kernels"},
    "kv_transfer": {"common", "kernels"},
    "engine": {"common", "kernels", "models"},
    "prefill_worker": {"common", "engine", "kv_transfer"},
    "decode_worker": {"common", "engine", "kv_transfer"},
    "router": {"common"},
}
WITHOUT_TORCH = ("common", "router")
HEAVY = ("torch", "transformers", "triton", "numpy", "safetensors", "nixl")
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80  # Triton kernels may be longer


@dataclass(frozen=True)
class Module:
    """One source file under the name it is imported by."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def folder(self) -> str:
        """The source folder, or "" for the files of penstock/ itself."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 2 and parts[1] in MAY_IMPORT else ""


def _read_modules() -> list[Module]:
    modules = []
    for folder in (*MAY_IMPORT, "penstock"):
        for path in sorted((ROOT / folder).rglob("*.py")):  # rglob does not follow the links in penstock/
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "penstock" else ("penstock", *parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules.append(Module(name, path, ast.parse(path.read_text(), str(path))))
    return modules


MODULES = _read_modules()
NAMES = {module.name for module in MODULES}


def _imports(node: ast.AST, package: str) -> list[str]:
    """Dotted names that one import statement reaches for; `from a import b` counts as a.b where that is a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            outer = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*outer, *([base] if base else [])])
        dotted = [f"{base}.{alias.name}" for alias in node.names]
        return [name if name in NAMES or base == "penstock" else base for name in dotted]
    return []


def _all_imports(module: Module) -> set[str]:
    """Everything a module imports anywhere, in functions and for type checkers too."""
    package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
    return {name for node in ast.walk(module.tree) for name in _imports(node, package)}


def _imports_when_loaded(module: Module) -> set[str]:
    """What importing the module imports: not what stands in functions or under TYPE_CHECKING."""
    package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for statement in body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
                yield from statements(statement.orelse)
                continue
            yield statement
            for part in ("body", "orelse", "finalbody"):
                yield from statements(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from statements(handler.body)

    return {name for statement in statements(module.tree.body) for name in _imports(statement, package)}


def test_every_folder_has_sources() -> None:
    assert {module.folder for module in MODULES} == {"", *MAY_IMPORT}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folder_imports_only_what_its_layer_may(folder: str) -> None:
    allowed = {folder, "__version__", *MAY_IMPORT[folder]}
    forbidden = [
        f"{module.path.relative_to(ROOT)} imports {name}"
        for module in MODULES
        if module.folder == folder
        for name in sorted(_all_imports(module))
        if name.split(".")[0] == "penstock" and not set(name.split(".")[1:2]) & allowed
    ]
    assert not forbidden


def test_sources_are_imported_through_penstock() -> None:
    bare = [
        f"{module.path.relative_to(ROOT)} imports {name}"
        for module in MODULES
        for name in sorted(_all_imports(module))
        if name.split(".")[0] in MAY_IMPORT
    ]
    assert not bare


def test_no_import_cycle() -> None:
    graph = {module.name: {n for n in _imports_when_loaded(module) if n in NAMES} - {"penstock"} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("folder", WITHOUT_TORCH)
def test_folder_names_no_heavy_library(folder: str) -> None:
    heavy = [
        f"{module.path.relative_to(ROOT)} imports {name}"
        for module in MODULES
        if module.folder == folder
        for name in sorted(_all_imports(module))
        if name.split(".")[0] in HEAVY
    ]
    assert not heavy


def test_router_and_common_load_without_heavy_libraries() -> None:
    names = [module.name for module in MODULES if module.folder in WITHOUT_TORCH] + ["penstock", "penstock.cli"]
    program = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_source_folders_are_links_without_init() -> None:
    """A regular package called `kernels` at the root would shadow Hugging Face's; penstock/ links to the folders."""
    for folder in MAY_IMPORT:
        assert not (ROOT / folder / "__init__.py").exists(), folder
        link = ROOT / "penstock" / folder
        assert link.is_symlink(), folder
        assert link.readlink() == Path("..") / folder


def test_no_file_is_a_heap() -> None:
    too_long = [
        f"{module.path.relative_to(ROOT)}: {lines} lines"
        for module in MODULES
        if (lines := len(module.path.read_text().splitlines())) > MAX_FILE_LINES
    ]
    vague = [str(module.path) for module in MODULES if module.path.stem in ("utils", "helpers", "misc")]
    assert not too_long
    assert not vague


def test_no_function_is_a_heap() -> None:
    too_long = []
    for module in MODULES:
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES and not any("triton" in ast.unparse(d) for d in node.decorator_list):
                too_long.append(f"{module.path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not too_long


def test_every_module_says_what_it_is() -> None:
    silent = [str(m.path.relative_to(ROOT)) for m in MODULES if m.tree.body and not ast.get_docstring(m.tree)]
    assert not silent
