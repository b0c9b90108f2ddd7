"""What the words of a report mean, in a sentence each."""

from typing import Final

_SELECTION: Final = (
    ("Sample", "A token sequence of the candidate pool; the chosen samples calibrate the quantiser."),
    ("Budget", "How many samples are chosen."),
    ("Selector", "The rule that chooses them, such as coverage, random, or k-center."),
    ("Site", "An input tensor within a block, and the linears that read it."),
    (
        "Outlier channel",
        "A channel of a site whose largest magnitude lies far above the others there; a quantiser that never saw it "
        "is wrong about it.",
    ),
    ("Coverage", "Share of the pool's outlier channels that at least one chosen sample makes fire."),
    ("Weighted coverage", "The same, each channel counted by how much an error in it costs."),
)
_QUALITY: Final = (
    (
        "KL, divergence",
        "How far the quantised model's distribution over the next token is from the original's, in nats per token; "
        "0 is the same.",
    ),
    ("95% interval", "The range that holds the true value in 95 of 100 repetitions with other texts or seeds."),
)
RUN_TERMS: Final = (
    *_SELECTION,
    *_QUALITY,
    ("Same top token", "Share of positions where both models find the same next token likeliest."),
    ("Perplexity", "Exponential of the loss: as if the model chose evenly among so many tokens. Lower is better."),
    ("Round to nearest", "Quantising without any calibration text, on the same grid: what every method has to beat."),
    (
        "Relative error",
        "Size of the error in a linear's output, as a share of the size of the output itself (root mean squares).",
    ),
    (
        "Noise",
        "The 95% interval of a paired difference holds zero: these texts cannot tell the two models apart. Lower and "
        "higher mean that it does not hold zero.",
    ),
)
SWEEP_TERMS: Final = (
    *_SELECTION,
    *_QUALITY,
    ("Cell and row", "A cell is one run of the sweep; a row joins the cells that differ by a seed alone."),
    ("Minus random", "Mean of the row less that of random choice of the same size; negative is better."),
    ("Beats", "Share of the random choices of the same size that are worse than the row."),
    ("Noise", "The 95% interval of the difference holds zero. Lower and higher mean that it does not."),
)
