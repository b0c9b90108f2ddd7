"""The command line of the artifact store: `covercal cache …`."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from flows.console import AsJson, megabytes, new_console, print_json, the_store
from storage.errors import MissingArtifactError
from storage.lineage import ancestors, readers
from storage.manifest import SHORT_KEY, Manifest, Ref
from storage.runs import LATEST, RunRecord, find_run, pin_run, pinned_runs, read_runs

SHOWN_LABELS = 3
NEAR = 0.75  # how alike two names of stages are when one is taken for a slip of the other

cache = typer.Typer(
    no_args_is_help=True,
    help="The artifact store: what is in it, where it comes from, whether it is whole; sharing it, and making room.",
)
RunNames = Annotated[list[str] | None, typer.Argument(help="First digits of runs, or `latest`.", show_default=False)]
RunName = Annotated[str, typer.Argument(help="First digits of a run, or `latest`.")]
MANY = 4  # artifacts of one stage that a tree shows one by one


@cache.command("ls")
def list_artifacts(
    stage: Annotated[str | None, typer.Argument(help="Only this stage.")] = None, as_json: AsJson = False
) -> None:
    """List the artifacts: stage, key, size, age, how long each took."""
    store = the_store(offline=True)
    rows: list[dict[str, Any]] = [
        {"stage": m.stage, "key": m.key, "bytes": m.size, "created": m.created, "seconds": m.seconds}
        for m in store.manifests(stage)
    ]
    known = {each for each, _ in store.folders()} if stage else set()
    near = difflib.get_close_matches(stage or "", known, n=1, cutoff=NEAR)
    if near and stage not in near:
        raise MissingArtifactError(f"No artifact here is of a stage {stage!r}; did you mean {near[0]!r}?")
    if as_json:
        print_json({"store": str(store.root), "artifacts": rows})
        return
    table = _table("stage", "key", ">size", "created", ">took")
    for row in rows:
        table.add_row(
            row["stage"],
            row["key"][:SHORT_KEY],
            megabytes(row["bytes"]),
            row["created"],
            f"{row['seconds']:.1f} s",
        )
    console = Console()
    console.print(table)
    total = sum(int(row["bytes"]) for row in rows)
    _say(console, f"{len(rows)} artifacts, {megabytes(total)} in {store.root}. Next: covercal cache show KEY")


@cache.command("show")
def show_artifact(
    key: Annotated[str, typer.Argument(help="First digits of a key, or stage/digits.")], as_json: AsJson = False
) -> None:
    """Show one artifact: its files, everything it was made from, everything made from it, and the runs that used it."""
    store = the_store(offline=True)
    manifest = store.find(key)
    folder = store.folder(manifest.stage, manifest.key)
    every = list(store.manifests())
    reads = {m.key: [each["key"] for each in m.inputs] for m in every}
    known = {each["key"]: Ref(**each) for m in every for each in m.inputs} | {m.key: m.ref for m in every}
    read_by = readers(reads)
    runs = [run.run for run in read_runs(store.root) if any(s.key == manifest.key for s in run.stages)]
    if as_json:
        above, below = ancestors([manifest.key], reads), ancestors([manifest.key], read_by)
        print_json(
            {
                "path": str(folder),
                **asdict(manifest),
                "read_by": [asdict(known[k]) for k in read_by.get(manifest.key, [])],
                "ancestors": sorted(known[k].short for k in above),
                "descendants": sorted(known[k].short for k in below),
                "runs": runs,
            }
        )
        return
    console = Console(highlight=False, soft_wrap=True)
    _show_manifest(console, manifest, str(folder))
    here = set(reads)
    for title, graph in (("made from", reads), ("what was made from it", read_by)):
        tree = Tree(f"[bold]{title}[/bold]" + ("" if graph.get(manifest.key) else ": nothing"))
        _grow(tree, graph.get(manifest.key, []), graph, known, here)
        console.print(tree)
    console.print(f"[bold]runs[/bold]         {', '.join(runs) or 'none'}")
    for name, each in manifest.files.items():
        console.print(f"  {each['size']:>14,}  {each['sha256'][:SHORT_KEY]}  {name}", markup=False)


def _show_manifest(console: Console, manifest: Manifest, folder: str) -> None:
    console.print(f"[bold]{manifest.stage}/{manifest.key}[/bold]\n{escape(folder)}")
    console.print(
        f"made {manifest.created} in {manifest.seconds:.1f} s, {megabytes(manifest.size)}, "
        f"stage version {manifest.version}"
    )
    console.print("key          " + json.dumps(manifest.material, sort_keys=True, ensure_ascii=False), markup=False)
    console.print("notes        " + json.dumps(_short(manifest.info), sort_keys=True, ensure_ascii=False), markup=False)
    console.print("libraries    " + ", ".join(f"{name} {version}" for name, version in manifest.libraries.items()))


def _grow(
    tree: Tree,
    keys: Sequence[str],
    graph: Mapping[str, Sequence[str]],
    known: Mapping[str, Ref],
    here: set[str],
    trail: frozenset[str] = frozenset(),
) -> None:
    """Add artifacts to a tree, each with its own inputs (or readers); many of one stage share one branch."""
    stages = list(dict.fromkeys(known[key].stage for key in keys))
    for stage in stages:
        mine = list(dict.fromkeys(key for key in keys if known[key].stage == stage and key not in trail))
        deeper = trail | frozenset(mine)
        if len(mine) < MANY:
            for key in mine:
                gone = "" if key in here else " (no longer here)"
                _grow(tree.add(known[key].short + gone), graph.get(key, []), graph, known, here, deeper)
        elif mine:
            lost = len([key for key in mine if key not in here])
            note = f", {lost} no longer here" if lost else ""
            branch = tree.add(f"{stage} x {len(mine)}: {mine[0][:SHORT_KEY]} … {mine[-1][:SHORT_KEY]}{note}")
            _grow(branch, [each for key in mine for each in graph.get(key, [])], graph, known, here, deeper)


@cache.command("verify")
def verify_artifacts(
    key: Annotated[str | None, typer.Argument(help="First digits of a key; without it, everything.")] = None,
    as_json: AsJson = False,
) -> None:
    """Re-hash every file of every artifact (or of one) and name what is damaged; exits with 1 if anything is.

    What is damaged is marked: the next run that needs it pulls or builds it again. Files that are none of an artifact's
    are named, too; they do no harm.
    """
    store = the_store(offline=True)
    wanted = list(store.folders())
    if key is not None:
        stage, _, digits = key.rpartition("/")
        wanted = [(s, k) for s, k in wanted if k.startswith(digits) and stage in ("", s)]
        if not wanted:
            raise MissingArtifactError(
                f"No artifact has a key that begins with {key!r}; `covercal cache ls` lists them."
            )
    faults = {
        f"{s}/{k}": found
        for s, k in wanted
        if (found := store.damage(s, k)) and store.folder(s, k).exists()  # else it was deleted meanwhile
    }
    strangers = {f"{s}/{k}": found for s, k in wanted if (found := store.strangers(s, k))}
    if as_json:
        print_json({"checked": len(wanted), "faults": faults, "strangers": strangers})
    else:
        for name, found in faults.items():
            typer.echo(f"{name}: {'; '.join(found)}")
        for name, found in strangers.items():
            typer.echo(f"{name}: {'; '.join(found)} (no damage; it may be deleted)")
        after = "; the next run that needs one makes it again" if faults else ""
        typer.echo(f"{len(wanted)} artifacts checked, {len(faults)} damaged{after}.")
    if faults:
        raise typer.Exit(1)


@cache.command("runs")
def list_runs(
    remote: Annotated[bool, typer.Option("--remote", help="The runs that were pushed to the remote.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the runs: when, how each ended, what it made, which are pinned."""
    from storage.transfer import remote_runs

    store = the_store(offline=not remote)
    runs = list(remote_runs(store) if remote else read_runs(store.root))
    pinned = pinned_runs(store.root)
    if as_json:
        print_json({"runs": [{**_run_row(run), "pinned": run.run in pinned} for run in runs]})
        return
    table = _table("run", "state", ">took", ">artifacts", "made", "command")
    for run in runs:
        row = _run_row(run)
        table.add_row(
            run.run + (" pinned" if run.run in pinned else ""),
            run.state,
            f"{run.seconds:.0f} s",
            str(row["artifacts"]),
            _first_labels(row["made"]),
            escape(run.command),
        )
    console = Console()
    console.print(table)
    _say(console, f"{len(runs)} runs, {len(pinned)} pinned. Next: covercal cache pin RUN, or push RUN")


def _first_labels(made: str) -> str:
    """Return the first few rows that a run made, and how many more there are."""
    labels = made.split(", ")
    if len(labels) <= SHOWN_LABELS + 1:
        return made
    return f"{', '.join(labels[:SHOWN_LABELS])} and {len(labels) - SHOWN_LABELS} more"


def _run_row(run: RunRecord) -> dict[str, Any]:
    made = [stage.label for stage in run.stages if stage.decision in ("built", "rebuilt")]
    counts = {label: made.count(label) for label in dict.fromkeys(made)}
    return {
        "run": run.run,
        "state": run.state,
        "started": run.started,
        "seconds": run.seconds,
        "artifacts": len({stage.key for stage in run.stages if stage.key}),
        "made": ", ".join(label if count == 1 else f"{count} {label}" for label, count in counts.items()) or "nothing",
        "command": run.command,
    }


@cache.command("pin")
def pin(run: RunName) -> None:
    """Keep everything a run used or made from garbage collection."""
    store = the_store(offline=True)
    name = find_run(store.root, run).run
    pin_run(store.root, name)
    typer.echo(f"Run {name} is pinned: `covercal cache gc` keeps its artifacts. Undo: covercal cache unpin {name}")


@cache.command("unpin")
def unpin(run: RunName) -> None:
    """Let garbage collection treat a run like any other again."""
    store = the_store(offline=True)
    name = find_run(store.root, run).run
    pin_run(store.root, name, pinned=False)
    typer.echo(f"Run {name} is no longer pinned.")


@cache.command("gc")
def collect_garbage(
    keep_days: Annotated[float, typer.Option(min=0, help="Keep what runs of the last days used or made.")] = 30.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete artifacts that no pinned run and no run of the last days needs, and what cut-short builds left.

    What a running build uses is never touched.
    """
    from storage.garbage import collect, short_name

    store = the_store(offline=True)
    found = collect(store, keep_days, dry_run=dry_run)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "bytes": found.size,
                "artifacts": [{"stage": o.stage, "key": o.key, "bytes": o.size} for o in found.objects],
                "leftovers": [{"path": str(o.path), "bytes": o.size, "what": o.what} for o in found.leftovers],
                "kept": found.kept,
                "in_use": found.in_use,
            }
        )
        return
    console = Console()
    table = _table("artifact", ">size")
    for each in found.objects:
        table.add_row(short_name(each), megabytes(each.size))
    for left in found.leftovers:
        where = left.path.parent.relative_to(store.root)
        table.add_row(f"{where}/{left.path.name[:SHORT_KEY]}… ({left.what})", megabytes(left.size))
    if table.row_count:
        console.print(table)
    verb = "would go" if dry_run else "deleted"
    running = f", {found.in_use} of them only because a running process uses them" if found.in_use else ""
    _say(
        console,
        f"{len(found.objects)} artifacts and {len(found.leftovers)} leftovers {verb}, {megabytes(found.size)}; "
        f"{found.kept} artifacts stay (pinned runs, and {keep_days:g} days){running}.",
    )
    if dry_run and (found.objects or found.leftovers):
        _say(console, f"Next: covercal cache gc --keep-days {keep_days:g}")


@cache.command("push")
def push(
    runs: RunNames = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Re-hash what is there already, and replace what is damaged.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Send the artifacts of runs to the remote (COVERCAL_REMOTE, with COVERCAL_REMOTE_WRITE=1)."""
    from storage.transfer import push_run

    _transfer(partial(push_run, verify=verify), runs, as_json, "sent")


@cache.command("pull")
def pull(runs: RunNames = None, as_json: AsJson = False) -> None:
    """Copy the artifacts of runs from the remote; every file is checked against its sha256."""
    from storage.transfer import pull_run

    _transfer(pull_run, runs, as_json, "pulled")


def _transfer(move: Any, runs: list[str] | None, as_json: bool, verb: str) -> None:
    from rich.progress import Progress, TaskID

    store = the_store()
    moved = []
    with Progress(console=new_console(True), transient=True) as progress:
        for run in runs or [LATEST]:
            task = progress.add_task(f"{verb} {run}", total=None)

            def advance(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            moved.append(move(store, run, advance))
    if as_json:
        print_json({"runs": [asdict(each) for each in moved]})
        return
    for each in moved:
        typer.echo(f"Run {each.run}: {each.moved} artifacts {verb}, {each.there} were there already.")
    if verb == "pulled":
        typer.echo("Next: covercal cache show KEY, or run the recipe: it finds them here.")
    else:
        typer.echo(f"Next: covercal cache pull {moved[-1].run}, on another machine with the same COVERCAL_REMOTE.")


@cache.command("remote")
def show_remote(
    create: Annotated[bool, typer.Option("--create", help="Set up an empty cache there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which remote cache is set, whether it answers, and whether this user may send to it."""
    from storage.transfer import remote_of

    remote = remote_of(the_store())
    created = remote.create() if create else False
    count = sum(1 for _ in remote.folders())
    if as_json:
        print_json({"remote": remote.place, "created": created, "artifacts": count, "writable": remote.writable})
        return
    made = "was set up" if created else "answers"
    rights = "read and write" if remote.writable else "read-only"
    typer.echo(f"Remote {remote.place} {made}: {count} artifacts, {rights}.")
    if not remote.writable:
        typer.echo("COVERCAL_REMOTE_WRITE=1 lets runs send what they build.")


def _table(*names: str) -> Table:
    """Return an empty table; names that begin with > are of numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(names):
        right = name.startswith(">")
        table.add_column(
            name.removeprefix(">"), justify="right" if right else "left", no_wrap=right or index == 0, overflow="fold"
        )
    return table


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _short(info: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if not isinstance(value, dict | list) or len(value) <= 16}
