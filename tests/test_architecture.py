"""The rules of the house, held by reading the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "covercal": {"covercal"},
    "storage": {"storage"},
    "tasks": {"tasks", "covercal", "storage"},
    "flows": {"flows", "tasks", "covercal", "storage"},
    "deployments": set(),
}
SOURCES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    """Return every module that a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_down_only(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {module.split(".")[0] for module in imported_modules(path)} & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[package]


@pytest.mark.parametrize("package", ["covercal", "storage"])
def test_prefect_is_known_to_flows_and_tasks_alone(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not any(module.split(".")[0] == "prefect" for module in imported_modules(path)), path


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCES}
    graph = {name: {m for m in imported_modules(path) if m in names} - {name} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_dependency_is_used() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    modules = {m.split(".")[0] for path in SOURCES for m in imported_modules(path)}
    renamed = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
    # Prefect's server needs fastapi and sqlalchemy, listed to keep them to versions that work; transformers reads GGUF
    # with accelerate.
    indirect = {"fastapi", "sqlalchemy", "accelerate"}
    for line in project["dependencies"]:
        name = line.split(">")[0].split("<")[0].split("=")[0].strip()
        module = renamed.get(name, name.replace("-", "_"))
        assert name in indirect or module in modules, f"{name} is a dependency and nothing imports it"
