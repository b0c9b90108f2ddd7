"""The errors that a user can act on; each message is a sentence that names what is wrong and what would be right."""

from collections.abc import Iterator
from contextlib import contextmanager


class CovercalError(Exception):
    """A run cannot go on."""


class InputError(CovercalError):
    """What the user gave (recipe, texts, model) is wrong; nothing heavy has been done."""


class ActivationError(CovercalError):
    """An activation is NaN or infinite."""


class QuantizationError(CovercalError):
    """A linear layer cannot be quantised as asked."""


class EvaluationError(CovercalError):
    """A model could not be judged as asked; what else was to be done is done and kept."""


class TooFewSamplesError(InputError):
    """Texts that do not give the samples asked of them.

    Attributes
    ----------
    read
        What was read of them.
    """

    def __init__(self, message: str, read: str) -> None:
        super().__init__(message)
        self.read = read


@contextmanager
def naming(linear: str) -> Iterator[None]:
    """Let errors of quantising a linear name it."""
    try:
        yield
    except QuantizationError as cause:
        raise QuantizationError(f"{linear} cannot be quantised: {cause}.") from cause
