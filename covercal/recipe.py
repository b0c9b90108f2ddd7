"""The typed recipe: YAML in, frozen settings out, errors that name the field and the nearest valid name."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from covercal.errors import InputError
from covercal.quantization_settings import SECTIONS, Dtype, Quantization
from covercal.recipe_errors import sentences
from covercal.section import Section, one_of
from covercal.selectors.registry import SELECTORS
from covercal.thresholds import RULES, WEIGHTINGS

READ = ("pool.sources", "evaluation.perplexity", "evaluation.divergence", "evaluation.tasks")  # lists of what is read
NOT_DRAWN = {"random": "it is always drawn, as a band", "given": "its samples are a list in the recipe"}


class TextSource(Section):
    """Texts from a file, a folder of text files, or a data set on the hub."""

    path: str | None = Field(None, description="JSONL, JSONL.gz, Parquet, text file, or folder of text files")
    hub: str | None = Field(None, description="data set id on the hub, or a local data set folder")
    config: str | None = Field(None, description="configuration of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    revision: str | None = Field(None, description="commit of a hub data set")
    text: str = Field("text", description="field that holds the text")
    domain: str | None = Field(None, description="field that holds the domain; without it, the file's name")
    rows: int | None = Field(None, ge=1, description="read at most so many rows")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either `path` or `hub`")
        return self

    @property
    def name(self) -> str:
        """Return what people call this source."""
        return str(self.path or self.hub)


class Model(Section):
    """Which decoder, and the dtype it computes in."""

    source: str = Field(description="hub id, folder, or .gguf file")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Dtype = Field("bfloat16", description="dtype of weights and activations in every forward pass")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class Pool(Section):
    """The candidate samples."""

    sources: tuple[TextSource, ...] = Field(min_length=1)
    sequence_length: int | tuple[int, ...] = Field(
        256, description="tokens a sample, or a list of lengths that take turns"
    )
    packing: Literal["join", "separate"] = Field("join", description="join short texts of one domain, or drop them")
    samples: int = Field(512, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _positive_lengths(self) -> Self:
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError("a sequence length is at least 2 tokens")
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the lengths that take turns."""
        return (self.sequence_length,) if isinstance(self.sequence_length, int) else self.sequence_length


class Statistics(Section):
    """What is measured of each sample's activations."""

    sites: Literal["linear_inputs", "block_inputs"] = "linear_inputs"
    skip_tokens: int = Field(1, ge=0, description="first tokens of a sample that are left out (attention sinks)")
    shard_samples: int = Field(64, ge=1, description="samples in one cached artifact")


class Outliers(Section):
    """Which channels are outlier channels, and what each weighs."""

    rule: Annotated[str, one_of(dict.fromkeys(RULES), "threshold rule")] = Field(
        "sigma",
        description="sigma: mean + k standard deviations of |x| over a site's tokens; of the samples' peaks there, "
        "mad: median + k (scaled) median absolute deviations, median: k times the median, quantile: the k quantile; "
        "absolute: k",
    )
    k: float = Field(6.0, gt=0)
    weighting: Annotated[str, one_of(WEIGHTINGS, "weighting")] = "full"
    adaptive: bool = Field(False, description="quantise, lower the threshold where the error is large, choose again")
    adaptive_k: float = Field(4.0, gt=0, description="the lower k")

    @model_validator(mode="after")
    def _k_fits_rule(self) -> Self:
        for name in ("k", "adaptive_k") if self.adaptive else ("k",):
            value = getattr(self, name)
            if self.rule == "quantile" and not value < 1:
                raise ValueError(f"outliers.{name} is {value:g}; with `rule: quantile` it is a share such as 0.999")
        if self.adaptive and not self.adaptive_k < self.k:
            raise ValueError(f"outliers.adaptive_k ({self.adaptive_k:g}) must be lower than outliers.k ({self.k:g})")
        return self


class Selection(Section):
    """Which samples calibrate."""

    selector: Annotated[str, one_of(SELECTORS, "selector")] = "coverage"
    budget: int = Field(64, ge=1, description="samples to choose")
    seed: int = Field(0, ge=0)
    samples: tuple[int, ...] = Field((), description="with `selector: given`: numbers of samples, the best first")

    @model_validator(mode="after")
    def _samples_are_given(self) -> Self:
        if (self.selector == "given") != bool(self.samples):
            raise ValueError("selection.samples lists the samples of `selector: given`, and of no other")
        if self.samples and self.budget > len(self.samples):
            raise ValueError(
                f"selection.budget ({self.budget}) is larger than the {len(self.samples)} samples of selection.samples"
            )
        if len(set(self.samples)) < len(self.samples):
            raise ValueError("selection.samples names a sample twice")
        return self


class PerplexityText(Section):
    """A text whose perplexity is measured over whole windows in its own order."""

    path: str
    window: int = Field(2048, ge=2, description="tokens a window; windows do not overlap")
    limit: int | None = Field(None, ge=1, description="windows, from the start; null: all")


class DivergenceText(TextSource):
    """Held-out texts on which the original and the quantised model are compared token by token."""

    window: int = Field(512, ge=2, description="tokens a sequence")
    limit: int = Field(24, ge=1, description="sequences, spread evenly over the domains")


class LanguageTask(Section):
    """A task of the lm-evaluation-harness: by its name there, or a task file of one's own."""

    name: str | None = Field(None, description="task or group of lm-eval, such as arc_challenge; data from the hub")
    path: str | None = Field(None, description="lm-eval task YAML; its `data_files` are relative to the YAML's folder")
    limit: int | None = Field(None, ge=1, description="items of each task of a group, from the start; null: all")
    shots: int | None = Field(None, ge=0, description="examples before each item; null: what the task itself says")
    seed: int = Field(1234, ge=0, description="draws the examples; lm-eval's default")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either `name`, a task of lm-eval, or `path`, a task YAML")
        return self

    @property
    def called(self) -> str:
        """Return what people call this task."""
        return str(self.name or Path(str(self.path)).stem)


class Evaluation(Section):
    """How the quantised model is judged."""

    perplexity: tuple[PerplexityText, ...] = ()
    divergence: tuple[DivergenceText, ...] = ()
    tasks: tuple[LanguageTask, ...] = ()
    task_models: tuple[Literal["original", "nearest", "random", "run"], ...] = Field(
        ("original", "nearest", "random", "run"),
        description="models that are scored on tasks, which cost more than all else; of the random sets the first",
    )
    random: int = Field(
        1, ge=0, description="random sets of the same size to quantise with as well, so that the choice can be judged"
    )
    layers: int = Field(
        8, ge=0, description="sequences of the first divergence text on which the error of every linear is measured"
    )

    @model_validator(mode="after")
    def _scores_the_run(self) -> Self:
        if "run" not in self.task_models:
            raise ValueError("evaluation.task_models must name `run`, the model that the tasks are to judge")
        return self

    @property
    def texts(self) -> tuple["PerplexityText | DivergenceText", ...]:
        """Return all texts: first those for perplexity, then those for divergence."""
        return (*self.perplexity, *self.divergence)


class Bar(Section):
    """How good a number has to be."""

    max: float | None = None
    min: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if self.max is None and self.min is None:
            raise ValueError("give `max`, `min` or both")
        return self


class Require(Section):
    """The quality that a run must have, or else it ends as failed; its checkpoint is there all the same."""

    divergence: Bar | None = Field(None, description="nats per token, on every divergence text")
    agreement: Bar | None = Field(None, description="share of tokens, on every divergence text")
    perplexity: Bar | None = Field(None, description="on every text")
    tasks: dict[str, Bar] = Field({}, description="main metric by the task's name")


class Report(Section):
    """What the report shows beside the run itself."""

    selectors: tuple[Annotated[str, one_of(SELECTORS, "selector")], ...] | None = Field(
        None, description="selectors whose coverage is drawn; null: all that read nothing which the run does not make"
    )

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        for name in NOT_DRAWN:
            if name in (self.selectors or ()):
                raise ValueError(f"report.selectors cannot name {name}: {NOT_DRAWN[name]}")
        return self


class Recipe(Section):
    """Everything a run depends on."""

    model: Model
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …; never part of a key")
    pool: Pool
    statistics: Statistics = Statistics()
    outliers: Outliers = Outliers()
    selection: Selection = Selection()
    quantization: Quantization = Quantization()
    evaluation: Evaluation = Evaluation()
    require: Require = Require()
    report: Report = Report()
    sweep: dict[str, tuple[Any, ...]] = Field(
        {}, description="fields and the values each takes in turn: selection.budget: [8, 32]; `covercal sweep` runs all"
    )

    @model_validator(mode="after")
    def _sweep_is_a_grid(self) -> Self:
        for name, values in self.sweep.items():
            if not values:
                raise ValueError(f"sweep.{name} is an empty list; give the values it takes")
            if name.split(".", 1)[0] not in type(self).model_fields or "." not in name or name.startswith("sweep."):
                raise ValueError(
                    f"sweep.{name} names no field of a recipe; write section.field, as in selection.budget"
                )
        return self

    @model_validator(mode="after")
    def _measures_what_it_requires(self) -> Self:
        wanted, measured = self.require, self.evaluation
        for name in ("divergence", "agreement"):
            if getattr(wanted, name) is not None and not measured.divergence:
                raise ValueError(f"require.{name} needs a text in evaluation.divergence to measure it on")
        if wanted.perplexity is not None and not measured.texts:
            raise ValueError("require.perplexity needs a text in evaluation.perplexity or evaluation.divergence")
        if wanted.tasks and not measured.tasks:
            raise ValueError("require.tasks needs tasks in evaluation.tasks")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.selection.budget > self.pool.samples:
            raise ValueError(
                f"selection.budget ({self.selection.budget}) is larger than pool.samples ({self.pool.samples}); "
                f"a budget of at most {self.pool.samples} can be chosen"
            )
        if self.outliers.adaptive and not (self.quantization.calibrated and self.quantization.reads_inputs):
            raise ValueError(
                f"outliers.adaptive needs the errors of a calibrated method; {self.quantization.method} has none"
            )
        if self.quantization.reads_statistics and self.statistics.sites != "linear_inputs":
            raise ValueError(
                f"quantization reads statistics of every linear's input; statistics.sites is {self.statistics.sites}, "
                "use linear_inputs"
            )
        too_long = [each for each in self.quantization.gram.prefixes if each > max(self.pool.lengths)]
        if too_long:
            raise ValueError(
                f"quantization.gram.prefixes has {too_long[0]} tokens; samples have at most {max(self.pool.lengths)}"
            )
        beyond = [each for each in self.selection.samples if not 0 <= each < self.pool.samples]
        if beyond:
            raise ValueError(f"selection.samples names sample {beyond[0]}; the pool has 0 to {self.pool.samples - 1}")
        if self.statistics.skip_tokens >= min(self.pool.lengths):
            raise ValueError(
                f"statistics.skip_tokens ({self.statistics.skip_tokens}) leaves nothing of "
                f"samples of {min(self.pool.lengths)} tokens (pool.sequence_length)"
            )
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `a.b=value` overrides.

    Paths in a recipe are relative to the recipe file's folder; they come back absolute.

    Raises
    ------
    InputError
        Naming the file or the field, and what would be right.
    """
    try:
        value = _read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"There is no recipe file {path}.") from None
    except (OSError, UnicodeDecodeError) as cause:
        raise InputError(f"Recipe {path} cannot be read: {cause}.") from cause
    except yaml.YAMLError as cause:
        raise InputError(f"Recipe {path} is not valid YAML: {cause}") from cause
    if not isinstance(value, dict):
        raise InputError(f"Recipe {path} must be a mapping of sections such as `model:` and `pool:`.")
    return parse_recipe(value, path.parent.absolute(), str(path), overrides)


class _Loader(yaml.SafeLoader):
    """Reads plain YAML, and refuses a name that a mapping has twice: the first of the two would be lost in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (each for each, _ in node.value if isinstance(each, yaml.ScalarNode)):
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                said = f"line {line} gives `{key.value}` again, after line {lines[name]}; keep one of the two."
                raise yaml.YAMLError(said)
            lines[name] = line
        return node


def _read_yaml(text: str) -> Any:
    """Return what a YAML text says.

    Raises
    ------
    yaml.YAMLError
        When it is none: also for a date that there is not, say, which PyYAML tells by other exceptions.
    """
    try:
        return _Loader(text).get_single_data()
    except (ValueError, LookupError, AttributeError, RecursionError) as cause:
        raise yaml.YAMLError(f"a value cannot be read ({cause}).") from cause


def parse_recipe(value: Mapping[str, Any], folder: Path, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in `value` with `a.b=value` overrides, with paths made absolute against `folder`.

    Raises
    ------
    InputError
        Naming every wrong field and, for an unknown one, the nearest valid name.
    """
    changed = deepcopy(dict(value)) if overrides else value
    for each in overrides:
        _override(changed, each)
    try:
        recipe = Recipe.model_validate(changed)
    except ValidationError as error:
        raise InputError(f"Recipe {name}: " + "; ".join(sentences(error, Recipe))) from None
    return Recipe.model_validate(_absolute("", plain(recipe), folder))


def plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain JSON, of the quantisation only its method and what was given: the rest the method says.

    This is how a recipe is shown, kept and handed on: with another method, it means what its author would have meant.
    """
    value = recipe.model_dump(mode="json")
    given = recipe.quantization.model_dump(mode="json", exclude_unset=True)
    return value | {"quantization": {"method": recipe.quantization.method, **given}}


def with_fields(recipe: Recipe, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe as plain JSON with some fields (`section.field`) of its sweep set, and without the sweep.

    Raises
    ------
    InputError
        When a field is inside a single value, or names no entry of a list.
    """
    value = plain(recipe)
    del value["sweep"]
    for name, wanted in fields.items():
        _set(value, name.split("."), deepcopy(wanted), f"sweep.{name}")
    return value


def short_names(fields: Iterable[str]) -> dict[str, str]:
    """Return every field as few of its last parts as tell it from the others: `bits`, but `damping.strength`."""
    known = list(fields)
    found = {}
    for name in known:
        parts = name.split(".")
        tails = [".".join(parts[place:]) for place in reversed(range(len(parts)))]
        others = [f".{other}" for other in known if other != name]
        found[name] = next((tail for tail in tails if not any(each.endswith(f".{tail}") for each in others)), name)
    return found


def _override(value: Any, assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    section, _, swept = path.strip().partition(".")
    names = [section, swept] if section == "sweep" and swept else path.strip().split(".")
    if not equals or not all(names):
        raise InputError(f"--set {assignment}: write it as section.field=value, for example selection.budget=16.")
    try:
        parsed = _read_yaml(text)
    except yaml.YAMLError as cause:
        raise InputError(f"--set {assignment}: the value is not valid YAML: {cause}") from cause
    _set(value, names, parsed, f"--set {assignment}")


def _set(value: Any, names: Sequence[str], wanted: Any, asked: str) -> None:
    """Set one field of a plain recipe; `asked` begins the error."""
    here = value
    for depth, name in enumerate(names):
        if not isinstance(here, dict | list):
            raise InputError(f"{asked}: `{'.'.join(names[:depth])}` is a single value and has no fields.")
        if isinstance(here, list) and not (name.isdecimal() and int(name) < len(here)):
            raise InputError(f"{asked}: there is no `{name}` there; a list entry is named by its number from 0.")
        at: Any = int(name) if isinstance(here, list) else name
        if depth == len(names) - 1:
            here[at] = wanted
        elif isinstance(here, dict):
            here[at] = _opened(names[: depth + 1], here.get(at))
        here = here[at]


def _opened(names: Sequence[str], value: Any) -> Any:
    """Return a section that a field is to be set in: an empty one where there is none, a short form spelled out."""
    if value is None:
        return {}
    is_choice = len(names) == 2 and names[0] == "quantization" and names[1] in SECTIONS
    return SECTIONS[names[1]].spelled_out(value) if is_choice else value


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: there is no user of that name to take a home folder from.") from None


def _absolute(field: str, value: Any, folder: Path) -> Any:
    """Return the plain value of a field, or of a whole recipe, with the paths in it made absolute against `folder`."""
    if isinstance(value, dict):
        inside = "" if field in ("", "sweep") else f"{field}."  # the names in `sweep` are those of whole fields
        return {name: _absolute(f"{inside}{name}", each, folder) for name, each in value.items()}
    if isinstance(value, list):
        return [_absolute(field, each, folder) for each in value]
    return str((folder / _expanded(value)).absolute()) if _is_place(field, value, folder) else value


def _is_place(field: str, value: Any, folder: Path) -> bool:
    """Return whether the value of a field names a file or folder."""
    section, _, last = ".".join(part for part in field.split(".") if not part.isdecimal()).rpartition(".")
    if not isinstance(value, str):
        return False
    if (section, last) == ("model", "source"):
        return value.endswith(".gguf") or (folder / _expanded(value)).exists()
    return section in READ and (last == "path" or (last == "hub" and (folder / value).is_dir()))
