"""The errors that a user can act on; each message is a sentence that names what is wrong and what would be right."""


class CovercalError(Exception):
    """A run cannot go on."""


class InputError(CovercalError):
    """What the user gave (recipe, texts, model) is wrong; nothing heavy has been done."""


class ActivationError(CovercalError):
    """An activation is NaN or infinite."""


class QuantizationError(CovercalError):
    """A linear layer cannot be quantised as asked."""
