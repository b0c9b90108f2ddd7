"""A loaded decoder as lm-eval sees it: requests as it makes them, scored by `covercal.continuations`."""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from covercal.continuations import Answer, score_continuations, truncated, unshareable
from covercal.decoder import Decoder

ROWS = 8  # sequences at once where lm-eval runs the model itself
SHARED = "shared contexts"

Started = Callable[[int, str], Callable[[int], None]]
"""Is told how many requests there are and of what kind, and returns what is told of finished ones."""


class HarnessModel(HFLM):  # type: ignore[misc]
    """lm-eval's own transformers model, but that a context shared by several requests runs once.

    What is asked, how it is cut into tokens and where it is truncated is lm-eval's own code; so is generation.
    Probabilities are made in float32, whatever the dtype of the model; lm-eval's own default, the model's dtype, leaves
    8 bits of a log-likelihood in bfloat16.

    Attributes
    ----------
    path
        `SHARED`, or why every request is run whole by lm-eval's own code.
    """

    def __init__(self, decoder: Decoder, tokenizer: Any, started: Started = lambda total, unit: lambda n: None) -> None:
        super().__init__(
            pretrained=decoder.model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=ROWS,
            softmax_dtype="float32",
        )
        self.decoder = decoder
        self.path = unshareable(decoder) or SHARED
        self._started = started
        self._advance: Callable[[int], None] = lambda n: None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        """Return the log-likelihood of every continuation, and whether it is the greedy one."""
        self._advance = self._started(len(requests), "requests")
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of every text, over windows as long as the model's context."""
        return self._one_by_one(super().loglikelihood_rolling, requests, "texts")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return what the model writes after every context; lm-eval's own code."""
        advance = self._started(len(requests), "answers")
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        advance(len(requests))
        return answers

    def _one_by_one(self, method: Callable[..., list[float]], requests: Sequence[Any], unit: str) -> list[float]:
        advance = self._started(len(requests), unit)
        self._advance = lambda n: None
        found: list[float] = []
        for request in requests:
            found += method([request], disable_tqdm=True)
            advance(1)
        return found

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[Answer]:
        if self.path != SHARED:
            answers: list[Answer] = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            self._advance(len(requests))
            return answers
        length = self.max_length
        pairs = [truncated(tuple(context), tuple(wanted), length) for _, context, wanted in requests]
        return score_continuations(self.decoder, pairs, advance=self._advance)
