"""What each cached step is made of, read from the source, so that no step changes behind its version.

A step counts as changed when its build function changed, or anything that this function reaches: functions, whole
classes with their bases, and module-level names of our own packages, through any number of modules. Docstrings,
comments, formatting and type annotations do not count. How references are found:

* by the names that a body reads, through imports at the top of a module or inside a function, also `import x` and
  `x.name`; a module that is used as a value counts whole;
* by string constants, so that a registry reaches its members: `pkg.module`, `pkg.module:name` and `pkg.module.name`
  count as the whole module, `pkg.sub.` (the beginning of a name that is put together) as every module below;
* by the annotations of a step's inputs, and of the fields of classes: an object that was made elsewhere brings the
  methods of its class. The annotation itself does not count, only the classes that it names;
* statements at the top of a module that are no definition (`torch.set_num_threads(1)`) belong to all of its names.

Not found: a subclass that only its base is named for, a member that registers itself when it is imported, names that
are put together in other ways.

    python -m tests.stage_sources                                   records the present state, refuses silent changes
    python -m tests.stage_sources --cannot-alter-results STAGE ...  records changes that give the same bytes (or `all`)
"""

import argparse
import ast
import copy
import hashlib
import json
import symtable
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).with_name("stage_sources.json")
COMMAND = "python -m tests.stage_sources"
PACKAGES = ("covercal", "storage", "tasks", "flows")
STEPS = "tasks"

# What a build function reaches and what cannot alter the content of its artifact. Everything else counts, among it
# `storage.arrays`, `storage.tables` and `storage.manifest.library_versions`, whose result the checkpoint holds.
PLUMBING = {
    "tasks.cached": "says when a step runs, where its folder is and what its key is, never what it writes there",
    "tasks.progress": "tells a display how far a step is",
    "storage.artifacts.ArtifactStore": "finds and commits folders as they are; a step reads only their paths",
    "storage.manifest.Ref": "a name of an artifact; its fields are given, not computed",
}

TOP_LEVEL = "(top level)"
# Left out of a dump: they differ between versions of Python (or with formatting) and mean nothing here.
SILENT_FIELDS = frozenset({"ctx", "kind", "type_comment", "type_ignores", "type_params"})

Place = tuple[str, str]  # (module, name in it)


class SourceError(Exception):
    """The source is written in a way that this module cannot follow."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: its version, the hash of each definition it depends on by dotted name, and the file that has it."""

    version: int
    sources: Mapping[str, str]
    file: str = ""


# --- one module ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Module:
    """The names of one module: definitions by name, and imports as the dotted path that each name stands for."""

    name: str
    file: str = ""
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)
    type_imports: dict[str, str] = field(default_factory=dict)


def read_module(name: str, file: str, source: str) -> Module:
    module = Module(name, file)
    _read_statements(module, ast.parse(source).body)
    return module


def _read_statements(module: Module, statements: Iterable[ast.stmt]) -> None:
    for node in statements:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module.imports |= imported(node, module.name)
        elif isinstance(node, ast.If) and _last_name(node.test) == "TYPE_CHECKING":
            for each in node.body:
                module.type_imports |= _imported_within(each, module.name)
            _read_statements(module, node.orelse)
        elif not (_is_text(node) or _is_main_guard(node)):
            for name in _names_of(node):
                module.definitions.setdefault(name, []).append(node)
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                module.imports |= _imported_within(node, module.name)


def _names_of(statement: ast.stmt) -> list[str]:
    """Return the names that a statement at the top of a module defines; what is no plain definition has one more."""
    plain = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)
    names = _bound_names(statement)
    return names if names and isinstance(statement, plain) else [TOP_LEVEL, *names]


def _bound_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Name):
        return [node.id] if isinstance(node.ctx, ast.Store) else []
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return []  # its variables stay inside
    return [name for child in ast.iter_child_nodes(node) for name in _bound_names(child)]


def imported(node: ast.Import | ast.ImportFrom, where: str) -> dict[str, str]:
    """Return the dotted path of every name that an import binds."""
    if isinstance(node, ast.Import):
        return {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names}
    if node.level or any(a.name == "*" for a in node.names):
        raise SourceError(f"{where}, line {node.lineno}: write imports absolute and name by name, to be followed.")
    return {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}


def _imported_within(node: ast.AST, where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in ast.walk(node):
        if isinstance(each, ast.Import | ast.ImportFrom):
            found |= imported(each, where)
    return found


def _last_name(node: ast.expr) -> str:
    """Return `c` of `c` or `a.b.c`, and nothing for any other expression."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and "__name__" in _paths(node.test)


# --- one definition ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Definition:
    """One definition: the hash of what it does, and what it refers to."""

    digest: str
    references: frozenset[Place]


class _Bare(ast.NodeTransformer):
    """Takes away what cannot alter results: texts as statements, annotations, and the decorator `cached`."""

    in_class = False

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == []:
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def visit_Expr(self, node: ast.Expr) -> Any:
        return None if _is_text(node) else self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        return self._within(node, in_class=True)

    def visit_FunctionDef(self, node: Any) -> Any:
        node.returns = None
        node.decorator_list = [d for d in node.decorator_list if _cached_call(d) is None]
        return self._within(node, in_class=False)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815  # the name that ast calls

    def visit_arg(self, node: ast.arg) -> Any:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        self.generic_visit(node)
        if self.in_class:  # a field of a dataclass: that it is there, and where, does count
            node.annotation = ast.Constant(None)
            return node
        return ast.copy_location(ast.Assign([node.target], node.value), node) if node.value else None

    def _within(self, node: ast.AST, *, in_class: bool) -> ast.AST:
        outside, self.in_class = self.in_class, in_class
        node = self.generic_visit(node)
        self.in_class = outside
        return node


def bare(node: ast.stmt) -> ast.Module:
    """Return a copy of a statement without what cannot alter results."""
    tree: ast.Module = _Bare().visit(ast.Module([copy.deepcopy(node)], []))
    return tree


def dump(value: Any) -> str:
    """Return a syntax tree as text, the same on every version of Python (`ast.dump` and `ast.unparse` differ)."""
    if isinstance(value, ast.JoinedStr):
        return f"JoinedStr({dump(_merged(value.values))})"
    if isinstance(value, ast.AST):
        fields = sorted((name, each) for name, each in ast.iter_fields(value) if name not in SILENT_FIELDS)
        told = [f"{name}={dump(each)}" for name, each in fields if each is not None and each != []]
        return f"{type(value).__name__}({', '.join(told)})"
    return f"[{', '.join(map(dump, value))}]" if isinstance(value, list) else repr(value)


def _merged(parts: Sequence[ast.expr]) -> list[Any]:
    """Return the parts of an f-string with neighbouring texts as one and without empty ones."""
    merged: list[Any] = []
    for part in parts:
        if not isinstance(part, ast.Constant):
            merged.append(part)
        elif merged and isinstance(merged[-1], str):
            merged[-1] += str(part.value)
        elif part.value:
            merged.append(str(part.value))
    return merged


def _paths(node: ast.AST) -> list[str]:
    """Return every name that occurs, with the attributes that are read of it: `torch.nn.Linear`, `site`."""
    attributes: list[str] = []
    inner = node
    while isinstance(inner, ast.Attribute):
        attributes.insert(0, inner.attr)
        inner = inner.value
    if isinstance(inner, ast.Name):
        return [".".join([inner.id, *attributes])]
    return [path for child in ast.iter_child_nodes(node) for path in _paths(child)]


def _free_names(tree: ast.Module) -> set[str]:
    """Return the names that a statement takes from its module, and not from its own parameters and variables."""
    found: set[str] = set()
    tables = [symtable.symtable(ast.unparse(tree), "definition", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        is_module = table.get_type() == "module"
        found |= {s.get_name() for s in table.get_symbols() if s.is_global() or (is_module and s.is_referenced())}
    return found


def _cached_call(decorator: ast.expr) -> ast.Call | None:
    is_cached = isinstance(decorator, ast.Call) and _last_name(decorator.func) == "cached"
    return decorator if isinstance(decorator, ast.Call) and is_cached else None


# --- all modules ---------------------------------------------------------------------------------------------------


class Sources:
    """The modules of some packages below a folder, and what each of their definitions depends on."""

    def __init__(
        self, root: Path, packages: Sequence[str] = PACKAGES, plumbing: Iterable[str] = tuple(PLUMBING)
    ) -> None:
        self.plumbing = frozenset(plumbing)
        self.modules: dict[str, Module] = {}
        self._known: dict[Place, Definition] = {}
        for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
            file = path.relative_to(root)
            name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
            self.modules[name] = read_module(name, file.as_posix(), path.read_text(encoding="utf-8"))

    def stages(self) -> dict[str, Stage]:
        """Return all steps by the name of their stage."""
        found: dict[str, Stage] = {}
        for module in self.modules.values():
            if module.name.split(".")[0] != STEPS:
                continue
            for name, nodes in module.definitions.items():
                for call in (c for d in getattr(nodes[-1], "decorator_list", ()) if (c := _cached_call(d))):
                    stage, version = _declared(call, f"{module.file}, line {call.lineno}")
                    if stage in found:
                        raise SourceError(f"Stage {stage} is declared in {found[stage].file} and in {module.file}.")
                    found[stage] = Stage(version, self.closure((module.name, name)), module.file)
        return dict(sorted(found.items()))

    def closure(self, build: Place) -> dict[str, str]:
        """Return the hash of everything that a build function depends on, itself included, by dotted name."""
        found: dict[str, str] = {}
        module = self.modules[build[0]]
        waiting = [build, *self._classes(module, _input_annotations(module.definitions[build[1]][-1]))]
        while waiting:
            place = waiting.pop()
            name = ".".join(place)
            if name not in found and not self._is_plumbing(name):
                definition = self.definition(place)
                found[name] = definition.digest
                waiting += definition.references
        return dict(sorted(found.items()))

    def definition(self, place: Place) -> Definition:
        """Return the hash and the references of one definition."""
        if place not in self._known:
            module = self.modules[place[0]]
            nodes = module.definitions[place[1]]
            trees = [bare(node) for node in nodes]
            references = {each for tree in trees for each in self._references(module, tree)}
            for node in nodes:
                references |= self._classes(module, _field_annotations(node))
            if TOP_LEVEL in module.definitions:
                references.add((module.name, TOP_LEVEL))
            digest = hashlib.sha256("\n".join(map(dump, trees)).encode()).hexdigest()[:16]
            self._known[place] = Definition(digest, frozenset(references))
        return self._known[place]

    def resolve(self, path: str) -> list[Place]:
        """Return the definition that a dotted path leads to, all of a module, or none when it is not ours."""
        head, *rest = path.split(".")
        if head not in self.modules:
            return []
        module = self.modules[head]
        while rest:
            name = rest.pop(0)
            below = f"{module.name}.{name}"
            if name in module.definitions:
                return [(module.name, name)]
            if name in module.imports:
                return self.resolve(".".join([module.imports[name], *rest]))
            if below in self.modules:
                module = self.modules[below]
            elif name.startswith("__"):
                return []
            else:
                raise SourceError(f"{path} is used, and {module.name} defines no {name}.")
        return [(module.name, name) for name in module.definitions]

    def _references(self, module: Module, tree: ast.Module) -> Iterator[Place]:
        inner = _imported_within(tree, module.name)
        free = _free_names(tree)
        for path in _paths(tree):
            head, _, rest = path.partition(".")
            if head in inner:
                yield from self.resolve(".".join(filter(None, [inner[head], rest])))
            elif head in free and (head in module.definitions or head in module.imports):
                yield from self.resolve(f"{module.name}.{path}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
                yield from self._named(node.value)

    def _named(self, text: str) -> Iterator[Place]:
        """Yield what a string constant refers to, if it is the name of a module of ours or the beginning of one."""
        name = text.partition(":")[0]
        above, _, last = name.rpartition(".")
        if name in self.modules:
            names = [name]
        elif above in self.modules and not last:
            names = [each for each in self.modules if each.startswith(name)]
        else:
            names = [above] if above in self.modules and last in self.modules[above].definitions else []
        for each in names:
            yield from self.resolve(each)

    def _classes(self, module: Module, annotations: Iterable[ast.expr]) -> set[Place]:
        """Return the classes of ours that annotations name, directly or through aliases."""
        found: set[Place] = set()
        waiting = [(module, annotation) for annotation in annotations]
        followed: set[Place] = set()
        while waiting:
            where, annotation = waiting.pop()
            for place in (each for path in _annotated_paths(annotation) for each in self._annotated(where, path)):
                node = self.modules[place[0]].definitions[place[1]][-1]
                if isinstance(node, ast.ClassDef):
                    found.add(place)
                elif isinstance(node, ast.Assign) and place not in followed:
                    followed.add(place)
                    waiting.append((self.modules[place[0]], node.value))
        return found

    def _annotated(self, module: Module, path: str) -> list[Place]:
        head, _, rest = path.partition(".")
        if head in module.type_imports:
            return self.resolve(".".join(filter(None, [module.type_imports[head], rest])))
        known = head in module.definitions or head in module.imports
        return self.resolve(f"{module.name}.{path}") if known else []

    def _is_plumbing(self, name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:count]) in self.plumbing for count in range(1, len(parts) + 1))


def _declared(call: ast.Call, where: str) -> tuple[str, int]:
    given = dict(zip(("stage", "version"), call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}
    stage, version = (getattr(given.get(name), "value", None) for name in ("stage", "version"))
    if not isinstance(stage, str) or not isinstance(version, int):
        raise SourceError(f"{where}: write stage and version of a step as a plain string and a plain number.")
    return stage, version


def _input_annotations(node: ast.stmt) -> list[ast.expr]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg)
    return [each.annotation for each in every if each is not None and each.annotation is not None]


def _field_annotations(node: ast.stmt) -> list[ast.expr]:
    if not isinstance(node, ast.ClassDef):
        return []
    return [each.annotation for each in node.body if isinstance(each, ast.AnnAssign)]


def _annotated_paths(annotation: ast.expr) -> list[str]:
    """Return the names in an annotation, also in one that is quoted."""
    paths = _paths(annotation)
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                paths += _paths(ast.parse(node.value, mode="eval"))
            except SyntaxError:
                continue  # a value of `Literal`, which names no class
    return paths


# --- the record ----------------------------------------------------------------------------------------------------


class Verdict(StrEnum):
    """What became of a stage since it was recorded."""

    SAME = "same"
    NEW = "new"
    RAISED = "raised"
    CHANGED = "changed"
    LOWERED = "lowered"


@dataclass(frozen=True, slots=True)
class Finding:
    """One stage as it is, beside the record of it."""

    name: str
    present: Stage
    recorded: Stage | None

    @property
    def verdict(self) -> Verdict:
        if self.recorded is None:
            return Verdict.NEW
        if self.present.version != self.recorded.version:
            return Verdict.RAISED if self.present.version > self.recorded.version else Verdict.LOWERED
        return Verdict.SAME if self.present.sources == self.recorded.sources else Verdict.CHANGED

    def differences(self) -> list[str]:
        """Return a line for each definition that changed, appeared or vanished."""
        now, before = self.present.sources, self.recorded.sources if self.recorded is not None else {}
        told = [f"  changed   {name}" for name in now if name in before and now[name] != before[name]]
        told += [f"  appeared  {name}" for name in now if name not in before]
        return told + [f"  vanished  {name}" for name in before if name not in now]

    def message(self) -> str:
        """Return what is wrong and what would be right."""
        version, file = self.present.version, self.present.file
        if self.recorded is None:
            return f"Stage {self.name} ({file}) is new: record it with `{COMMAND}`."
        if self.verdict is Verdict.RAISED:
            return f"Stage {self.name} ({file}) has a new version, {version}: record it with `{COMMAND}`."
        if self.verdict is Verdict.LOWERED:
            return (
                f"Stage {self.name} went down from version {self.recorded.version} to {version}, where caches hold "
                f"other results; give it a higher `version` in {file}."
            )
        return "\n".join(
            [
                f"Stage {self.name} changed and its version, {version}, did not:",
                *self.differences(),
                f"If results can differ, raise `version` in {file} and run `{COMMAND}`; if this change cannot alter "
                f"results, run `{COMMAND} --cannot-alter-results {self.name}`.",
            ]
        )


def read_record(path: Path) -> dict[str, Stage]:
    """Return the recorded stages; none when there is no record yet."""
    if not path.exists():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    return {name: Stage(each["version"], each["sources"]) for name, each in value.items()}


def write_record(path: Path, stages: Mapping[str, Stage]) -> None:
    value = {name: {"version": each.version, "sources": dict(each.sources)} for name, each in stages.items()}
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def compare(present: Mapping[str, Stage], recorded: Mapping[str, Stage]) -> list[Finding]:
    """Return one finding a stage; the record of a stage that is gone stays, for its artifacts are in caches still."""
    return [Finding(name, stage, recorded.get(name)) for name, stage in present.items()]


def main(arguments: Sequence[str], root: Path = ROOT, record: Path = RECORD, packages: Sequence[str] = PACKAGES) -> int:
    """Record the present state where that is right; return 1 when some stage was refused."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Record what the cached steps are made of.")
    parser.add_argument("--cannot-alter-results", nargs="+", default=[], metavar="STAGE", help="stages, or `all`")
    same_results = set(parser.parse_args(arguments).cannot_alter_results)
    stages = Sources(root, packages).stages()
    if unknown := same_results - set(stages) - {"all"}:
        parser.error(f"there is no stage {', '.join(sorted(unknown))}; known: {', '.join(stages)}")
    recorded = read_record(record)
    refused = []
    for finding in compare(stages, recorded):
        allowed = finding.name in same_results or "all" in same_results
        if finding.verdict is Verdict.LOWERED or (finding.verdict is Verdict.CHANGED and not allowed):
            refused.append(finding.message())
        else:
            recorded[finding.name] = finding.present
            if finding.verdict is not Verdict.SAME:
                print(f"Recorded {finding.name}, version {finding.present.version} ({finding.verdict}).")
    write_record(record, recorded)
    if refused:
        print("\n\n".join(refused), file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
