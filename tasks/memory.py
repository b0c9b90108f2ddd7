"""How much memory hidden states may take before they go to files."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from covercal.errors import InputError

if TYPE_CHECKING:
    import torch

    from covercal.calibration import Memory

VARIABLE = "COVERCAL_ACTIVATION_MEMORY"
FREE_SHARE = 0.25  # of the free memory, where the variable does not say
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def activation_memory(work: Path, device: "torch.device") -> "Memory":
    """Return the limit in `COVERCAL_ACTIVATION_MEMORY` (bytes, or 500M, 8G), and a folder for what is above it.

    Parameters
    ----------
    device
        Where hidden states lie.

    Raises
    ------
    InputError
        When the variable is no number of bytes.
    """
    from covercal.calibration import Memory
    from covercal.decoder import free_memory

    text = os.environ.get(VARIABLE, "").strip()
    limit = parse_bytes(text) if text else int(FREE_SHARE * free_memory(device))
    return Memory(limit, work / "activations")


def parse_bytes(text: str) -> int:
    """Return the number of bytes that a text such as `500M` names.

    Raises
    ------
    InputError
        When it names none.
    """
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in ("K", "M", "G") else (text, "")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"{VARIABLE} is {text!r}; it is a number of bytes such as 500M or 8G.")
    return int(value * UNITS[unit])
