"""Auditing somebody's own calibration set against a pool, before anything is quantised with it."""

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from covercal.errors import InputError, TooFewSamplesError
from covercal.recipe import Recipe, TextSource
from flows.chain import run_chain
from flows.console import printable
from flows.execution import Direct, Execution, Recorder
from flows.inputs import check_model, identify
from tasks.audit import audit_set
from tasks.capture import capture_shard, pool_shards
from tasks.identities import TokenizerIdentity, identify_text
from tasks.pool import make_pool


def audit(recipe: Recipe, source: TextSource, execution: Execution) -> dict[str, Any]:
    """Measure a calibration set as the pool was measured, and compare.

    Parameters
    ----------
    recipe
        Its pool stands for what the model will meet; its tokenizer, lengths and sites hold for the set, too.
    source
        The calibration set: all its texts are used, in samples of the recipe's length; what fills none is told.
    execution
        How steps are carried out.

    Raises
    ------
    InputError
        When the set gives no sample; nothing heavy has been done then.
    """
    store = execution.store
    inputs, texts = identify(recipe, store), identify_text(source, store)
    model = inputs.model
    imported = check_model(recipe, inputs, Direct(store, Recorder()))
    try:
        own = execution.run(
            "calibration",
            make_pool,
            sources=(texts,),
            tokenizer=TokenizerIdentity(model),
            imported=imported,
            lengths=recipe.pool.lengths,
            packing="join",
            samples=None,
            seed=recipe.pool.seed,
        )
    except TooFewSamplesError as cause:
        raise InputError(
            f"--calibration {source.path} gives no sample of {min(recipe.pool.lengths)} tokens: {cause.read}. "
            "Give more text, or a smaller pool.sequence_length."
        ) from cause
    chain = run_chain(recipe, inputs, execution, until="outliers")
    place = {"model": model, "imported": imported, "dtype": recipe.model.dtype, "device": recipe.device}
    shards = pool_shards(store, own, recipe.statistics.shard_samples)
    settings = {"sites": recipe.statistics.sites, "skip_tokens": recipe.statistics.skip_tokens}
    wanted = [{**place, **settings, "pool": own, "shard": shard} for shard in shards]
    measured = execution.map("measured", capture_shard, wanted)
    return audit_set(store, chain.pool, chain.statistics, chain.outliers, own, measured)


def calibration_source(path: Path, text: str, domain: str | None) -> TextSource:
    """Return a user's calibration file as a source of texts.

    Raises
    ------
    InputError
        When there is no such file.
    """
    if not path.exists():
        raise InputError(f"--calibration {path} is not there; give a JSONL, Parquet or text file, or a folder.")
    return TextSource(path=str(path.absolute()), text=text, domain=domain)


def audit_lines(found: dict[str, Any]) -> list[str]:
    """Return the sentences of an audit."""
    blocks = found["coverage_by_block"]
    worst = min(blocks, key=lambda block: blocks[block]) if blocks else None
    domains = sorted(found["domains"].items(), key=lambda each: (-each[1], each[0]))
    mix = ", ".join(f"{count} {name}" for name, count in domains)
    pairs = found["samples"] > 1 and found["outlier_channels"] > 0
    alike = f"two samples share {found['jaccard']:.1%} of the channels that either fires; " if pairs else ""
    beside, weighs = "as many random samples of the pool", f"random: {found['random_weighted_coverage']:.1%}"
    weighs += f", chosen by coverage: {found['chosen_weighted_coverage']:.1%}"
    if found["samples"] >= found["pool_samples"]:  # as many are all that there are, however they are chosen
        beside = f"all {found['pool_samples']} samples of the pool"
        weighs = f"all of the pool: {found['random_weighted_coverage']:.1%}"
    lines = [
        f"Set          {found['samples']} sample{'s' if found['samples'] > 1 else ''}: {mix}",
        f"Coverage     {found['coverage']:.1%} of {found['outlier_channels']:,} outlier channels of the pool; "
        f"{beside}: {found['random_coverage']:.1%}",
        f"             {found['weighted_coverage']:.1%} of their weight; {weighs}",
        f"Likeness     {alike}Gram diagonals {found['gram_distance']:.1%} off the pool's",
    ]
    if found["dropped"]:
        lines.insert(1, f"Left out     {found['dropped']}")
    if worst is not None:
        lines.append(f"Weakest      block {worst}: {blocks[worst]:.1%} of its outlier channels covered")
    return lines


def missed_table(found: dict[str, Any]) -> Table:
    """Return the heaviest channels that the set never fires."""
    table = Table(box=None, pad_edge=False, header_style="bold", title="Heaviest missed", title_justify="left")
    for name in ("block", "read by", "channel", "peak / threshold", "share of all weight"):
        table.add_column(name, justify="left" if name == "read by" else "right")
    for each in found["heaviest_missed"]:
        table.add_row(
            str(each["block"]),
            escape(each["linears"]),
            str(each["channel"]),
            f"{each['peak_over_threshold']:.2f}",
            f"{each['weight_share']:.3%}",
        )
    return table


def help_table(found: dict[str, Any]) -> Table:
    """Return the samples of the pool that would add most."""
    table = Table(box=None, pad_edge=False, header_style="bold", title="Would add most", title_justify="left")
    for name in ("sample", "adds", "domain", "text"):
        table.add_column(name, justify="right" if name in ("sample", "adds") else "left", no_wrap=True)
    for each in found["would_help"]:
        words = (printable(each["domain"]), " ".join(printable(each["text"]).split())[:60])
        table.add_row(str(each["sample"]), f"{each['adds']:.2%}", *map(escape, words))
    return table
