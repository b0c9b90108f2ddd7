"""How weights are quantised: choices that combine, and presets of them that are named after the papers.

Every paper since GPTQ changed one part of one computation. Each part is a section here; a preset sets the sections that
its paper changed, and a recipe may change any of them again.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from covercal.section import Choice, Section, one_of

Dtype = Literal["float32", "bfloat16", "float16"]


class Ranges(Choice):
    """Where each group's grid ends."""

    main: ClassVar[str] = "search"

    search: Literal["min_max", "mse", "weighted", "output"] = Field(
        "min_max",
        description="min_max: at the smallest and largest weight; the others shrink both ends by the factor with the "
        "least error, mse: of the weights, weighted: of the weights, by mean square input, output: of the group's "
        "output (AWQ's clipping)",
    )
    shrink: float = Field(0.5, gt=0, lt=1, description="smallest factor that is tried")
    steps: int = Field(20, ge=1, description="factors that are tried below 1")
    refit: int = Field(
        0,
        ge=0,
        description="times that scales are fitted to the codes, by least squares on the output; between two of them "
        "everything is rounded again",
    )


class Scaling(Choice):
    """Input channels are scaled before rounding, and whatever makes them by the inverse: the function is the same."""

    main: ClassVar[str] = "search"

    search: Literal["none", "awq", "duo", "smooth"] = Field(
        "none",
        description="awq: powers of mean |x|; duo: also of mean |w| (AutoAWQ's duo scaling); "
        "smooth: SmoothQuant's fixed formula",
    )
    loss: Literal["module", "linear"] = Field(
        "linear", description="what a scale is judged by: the linears' output, or that of the module around them"
    )
    steps: int = Field(20, ge=1, description="powers that are tried: 0, 1/steps, …")
    regularization: Literal["none", "identity", "saliency"] = Field(
        "none", description="weight drift that is added to the loss (SARQC-GS), plain or weighted by saliency"
    )
    strength: float = Field(0.5, ge=0, description="how much the weight drift counts beside the loss")
    power: float = Field(0.5, ge=0, le=1, description="of the largest input, with `search: smooth`")


class GramSource(Choice):
    """Which inputs a linear is calibrated on."""

    main: ClassVar[str] = "source"

    source: Literal["calibration", "pool", "blend"] = Field(
        "calibration",
        description="calibration: the chosen samples, behind the quantised prefix; pool: the whole pool, at full "
        "precision, cached; blend: a mean of both (with the larger of both peaks)",
    )
    pool_share: float = Field(0.5, gt=0, lt=1, description="weight of the pool in a blend")
    weight: Literal["token", "sequence"] = Field(
        "token", description="every token counts the same, or every sequence, whatever its length (MaCa)"
    )
    prefixes: tuple[int, ...] = Field(
        (),
        description="calibrate on these prefixes of every chosen sample (nested lengths); empty: on whole samples. "
        "Those of one sample are held out together, and count together for how much samples differ; a sample that is "
        "shorter than all of them is left out",
    )
    expert_tokens: int = Field(
        32, ge=1, description="an expert that fewer calibration tokens reach is rounded to nearest, and reported"
    )

    @model_validator(mode="after")
    def _prefixes_are_lengths(self) -> Self:
        if any(length < 2 for length in self.prefixes) or len(set(self.prefixes)) < len(self.prefixes):
            raise ValueError("gram.prefixes lists different lengths of at least 2 tokens")
        return self


class Shrinkage(Choice):
    """How far the Gram matrix is moved towards a diagonal."""

    main: ClassVar[str] = "strength"

    strength: Annotated[float, Field(ge=0, le=1)] | Literal["ledoit_wolf", "validated"] = Field(
        0.0,
        description="share of the matrix that is replaced; ledoit_wolf: by how much its sequences differ; "
        "validated: what rounds held-out sequences best, for each site",
    )
    towards: Literal["own", "pool"] = Field(
        "own",
        description="its own diagonal, or the pool's, from the cached statistics: without the first "
        "statistics.skip_tokens tokens of every sample, which the matrix itself includes",
    )


class Damping(Choice):
    """What is added to the Gram matrix's diagonal."""

    main: ClassVar[str] = "strength"

    strength: Annotated[float, Field(ge=0)] | Literal["validated"] = Field(
        0.01, description="relative to the mean diagonal; validated: what rounds held-out sequences best, for each site"
    )
    weights: Literal["uniform", "saliency"] = Field(
        "uniform", description="the same for all channels, or by saliency (SARQC-GBS)"
    )
    gamma: Annotated[float, Field(ge=0, le=1)] | Literal["validated"] = Field(
        "validated", description="power of mean |x| in the saliency"
    )


class Target(Choice):
    """What rounding aims at."""

    main: ClassVar[str] = "kind"

    kind: Literal["weights", "coreq", "gptaq"] = Field(
        "weights",
        description="the weights; coreq: weights that undo a part of what the quantised prefix did to the inputs; "
        "gptaq: the same within the rounding, for later columns only",
    )
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["closed_form"] = Field(
        "closed_form", description="how much is undone; closed_form: the share that can be (coreq only)"
    )


class Rounding(Choice):
    """How codes are chosen."""

    main: ClassVar[str] = "kind"

    kind: Literal["nearest", "sequential", "beam"] = Field(
        "sequential", description="sequential: GPTQ; beam: the best of several partial roundings of a row (K-CoreQ)"
    )
    width: int = Field(4, ge=1, description="partial roundings that a beam keeps")
    polish: int = Field(
        0, ge=0, description="passes of coordinate descent afterwards; where scales are fitted, before the last fit"
    )


class Salient(Choice):
    """The largest weights, on a grid of their own (statistical pre-calibration)."""

    main: ClassVar[str] = "share"

    share: float = Field(0.0, ge=0, lt=1, description="of the weights; 0: none")
    bits: int = Field(4, ge=2, le=16, description="of their codes; 16: kept in 16 bits")
    scope: Literal["tensor", "row", "group"] = Field("tensor", description="over which they are the largest")
    clip: float = Field(1.0, gt=0, le=1, description="share of the other weights' range that their grid covers")


class Activations(Choice):
    """How the linears' inputs are quantised."""

    main: ClassVar[str] = "kind"

    kind: Literal["none", "static", "dynamic"] = Field(
        "none", description="static: one scale a site, fixed beforehand; dynamic: one scale a token"
    )
    bits: int = Field(8, ge=4, le=8)
    ranges: Literal["min_max", "percentile", "mse"] = Field("min_max", description="of a static scale")
    percentile: float = Field(99.99, gt=50, le=100)
    source: Literal["calibration", "statistics"] = Field(
        "calibration",
        description="static scales from the chosen samples' inputs, or from the cached statistics: without the first "
        "statistics.skip_tokens tokens of every sample, which are quantised all the same",
    )


SECTIONS: Mapping[str, type[Choice]] = {
    "ranges": Ranges,
    "scaling": Scaling,
    "gram": GramSource,
    "shrinkage": Shrinkage,
    "damping": Damping,
    "target": Target,
    "rounding": Rounding,
    "salient": Salient,
    "activations": Activations,
}

OWN: Mapping[str, Any] = {  # what helped on top of every Gram matrix: docs/methods.md
    "ranges": {"search": "output", "refit": 3},
    "rounding": {"polish": 2},
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "rtn": {"rounding": "nearest"},
    "gptq": {},
    "awq": {"scaling": "awq", "ranges": "output", "rounding": "nearest"},
    "gptaq": {"target": {"kind": "gptaq", "alpha": 0.25}},
    "maca": {"gram": {"weight": "sequence"}},
    "sarqc_gs": {"scaling": {"search": "duo", "regularization": "saliency"}, "rounding": "nearest"},
    "sarqc_gbs": {"damping": {"strength": "validated", "weights": "saliency"}, "activation_order": False},
    "coreq": {"target": "coreq"},
    "k_coreq": {"target": "coreq", "rounding": "beam"},
    "precal": {"salient": 0.08, "rounding": "nearest"},
    "w8a8_static": {
        "bits": 8,
        "group_size": None,
        "symmetric": True,
        "activations": "static",
        "rounding": "nearest",
    },
    "cached": {"gram": "pool", "shrinkage": 0.1, **OWN},
    "covercal": {"target": "coreq", "shrinkage": 0.25, **OWN},
}


class Quantization(Section):
    """How the weights are quantised."""

    method: Annotated[str, one_of(PRESETS, "method")] = Field(
        "covercal", description="a preset: what the fields and sections below are unless they are given"
    )
    bits: int = Field(4, ge=2, le=8)
    group_size: int | None = Field(128, ge=1, description="columns that share a scale; null: one scale a row")
    symmetric: bool = False
    activation_order: bool = Field(True, description="round the columns with the largest inputs first")
    ranges: Ranges = Ranges()
    scaling: Scaling = Scaling()
    gram: GramSource = GramSource()
    shrinkage: Shrinkage = Shrinkage()
    damping: Damping = Damping()
    target: Target = Target()
    rounding: Rounding = Rounding()
    salient: Salient = Salient()
    activations: Activations = Activations()
    storage_dtype: Dtype | Literal["auto"] = Field(
        "auto",
        description="dtype of scales and unquantised weights in the checkpoint; auto: the model's own 16-bit dtype",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _preset(cls, value: Any, validated: ModelWrapValidatorHandler[Self]) -> Self:
        """Fill in the preset; what it gives does not count as set: with another method it would be that method's."""
        method = value.get("method", cls.model_fields["method"].default) if isinstance(value, Mapping) else None
        if not isinstance(method, str):
            return validated(value)
        made = validated(with_defaults(value, PRESETS.get(method, {})))
        made.model_fields_set.intersection_update(value)
        for name, section in SECTIONS.items():
            given = section.spelled_out(value.get(name))
            if isinstance(given, Mapping):
                getattr(made, name).model_fields_set.intersection_update(given)
        return made

    @model_validator(mode="after")
    def _combines(self) -> Self:
        for sentence in conflicts(self):
            raise ValueError(sentence)
        return self

    @property
    def calibrated(self) -> bool:
        """Whether chosen samples are run through the model."""
        return (self.reads_inputs and self.gram.source != "pool") or self.static_from_calibration

    @property
    def reads_inputs(self) -> bool:
        """Whether anything depends on what the linears' inputs are like."""
        return self.rounds or self.scaling.search != "none" or self.ranges.search in ("weighted", "output")

    @property
    def rounds(self) -> bool:
        """Whether anything beyond rounding to nearest uses a regularised Gram matrix."""
        refines = self.rounding.polish > 0 or self.ranges.refit > 0
        return self.rounding.kind != "nearest" or refines or self.target.kind == "coreq"

    @property
    def reads_pool_gram(self) -> bool:
        """Whether the pool's Gram matrices are needed."""
        return self.reads_inputs and self.gram.source != "calibration"

    @property
    def reads_statistics(self) -> bool:
        """Whether the pool's cached statistics are needed."""
        static = self.activations.kind == "static" and self.activations.source == "statistics"
        return static or (self.rounds and self.shrinkage.towards == "pool" and self.shrinkage.strength != 0)

    @property
    def validates(self) -> bool:
        """Whether a regularisation is chosen on held-out sequences."""
        by_saliency = self.damping.weights == "saliency"
        named = "validated" in (self.shrinkage.strength, self.damping.strength)
        return self.rounds and (named or (by_saliency and self.damping.gamma == "validated"))

    @property
    def reads_spread(self) -> bool:
        """Whether it matters how much sequences differ."""
        return self.rounds and self.shrinkage.strength == "ledoit_wolf"

    @property
    def static_from_calibration(self) -> bool:
        """Whether static activation ranges come from the chosen samples."""
        return self.activations.kind == "static" and self.activations.source == "calibration"

    def key_material(self) -> dict[str, Any]:
        """Return what can change the result: not the preset's name, nor what nothing reads."""
        value = self.model_dump(mode="json", exclude={"method"})
        for name, is_read in self._read().items():
            section, _, inner = name.partition(".")
            if not is_read and section in value:
                (value[section] if inner else value).pop(inner or section)
        return value

    def _read(self) -> dict[str, bool]:
        """Return for sections, and fields of sections, that something must be so for them to be read."""
        scaling, activations = self.scaling, self.activations
        static = activations.kind == "static"
        return {
            "activation_order": self.rounds,
            "scaling": self.scaling.search != "none",
            "gram": self.reads_inputs or (self.static_from_calibration and bool(self.gram.prefixes)),
            "shrinkage": self.rounds,
            "damping": self.rounds,
            "target": self.target.kind != "weights",
            "salient": self.salient.share > 0,
            "activations": activations.kind != "none",
            "ranges.shrink": self.ranges.search != "min_max",
            "ranges.steps": self.ranges.search != "min_max",
            "ranges.refit": self.ranges.refit > 0,
            "scaling.loss": scaling.search in ("awq", "duo"),
            "scaling.steps": scaling.search in ("awq", "duo"),
            "scaling.regularization": scaling.search in ("awq", "duo"),
            "scaling.strength": scaling.search in ("awq", "duo") and scaling.regularization != "none",
            "scaling.power": scaling.search == "smooth",
            "gram.source": self.reads_inputs,
            "gram.pool_share": self.reads_inputs and self.gram.source == "blend",
            "gram.weight": self.reads_inputs,
            "gram.expert_tokens": self.reads_inputs,
            "shrinkage.towards": self.shrinkage.strength != 0,
            "damping.gamma": self.damping.weights == "saliency",
            "rounding.width": self.rounding.kind == "beam",
            "activations.ranges": static,
            "activations.source": static,
            "activations.percentile": static and activations.ranges == "percentile",
        }


def with_defaults(value: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """Return `value` with the fields of a preset that it does not give, section by section."""
    merged = dict(value)
    for name, default in preset.items():
        section = SECTIONS.get(name)
        if section is None:
            merged.setdefault(name, default)
            continue
        given = section.spelled_out(value.get(name, {}))
        if isinstance(given, Section):
            continue
        if isinstance(given, Mapping):
            merged[name] = {**section.spelled_out(default), **given}
    return merged


def conflicts(settings: Quantization) -> list[str]:
    """Return sentences about choices that do not go together."""
    found = []
    gram, target, rounding, activations = settings.gram, settings.target, settings.rounding, settings.activations
    if target.kind != "weights":
        if gram.source == "pool":
            found.append(
                f"target {target.kind} compares the quantised prefix with the original; `gram: pool` has no prefix: "
                "use `gram: calibration`, or `target: weights`"
            )
        if rounding.kind == "nearest" and target.kind == "gptaq":
            found.append("target gptaq acts within sequential rounding; `rounding: nearest` has none")
    if target.kind == "gptaq" and rounding.kind == "beam":
        found.append("target gptaq acts within sequential rounding; use `target: coreq` with `rounding: beam`")
    if target.kind == "gptaq" and target.alpha == "closed_form":
        found.append("target.alpha of gptaq is a number, 0.25 in its paper; closed_form belongs to coreq")
    if settings.scaling.loss == "module" and gram.source == "pool" and settings.scaling.search in ("awq", "duo"):
        found.append("scaling.loss: module runs the module on the chosen samples; `gram: pool` needs `loss: linear`")
    if settings.shrinkage.towards == "pool" and gram.source == "pool":
        found.append("with `gram: pool` the Gram matrix's own diagonal is the pool's: leave shrinkage.towards at own")
    if settings.shrinkage.strength == "ledoit_wolf" and gram.source == "pool" and settings.scaling.search != "none":
        found.append("shrinkage: ledoit_wolf is not known for scaled inputs of the pool; give a number, or no scaling")
    if gram.prefixes and gram.source == "pool":
        found.append("gram.prefixes are of the chosen samples; `gram: pool` calibrates on none")
    if activations.kind != "none" and settings.salient.share > 0:
        found.append("no format holds quantised activations beside salient weights")
    return found
