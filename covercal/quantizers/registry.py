"""Rounding methods by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Method:
    """What a method needs.

    Attributes
    ----------
    rounder
        `module:function` of the mathematics.
    calibrated
        Whether it reads Gram matrices, and so calibration samples.
    """

    rounder: str
    calibrated: bool


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "rtn": Method("covercal.quantizers.rtn:round_to_nearest", calibrated=False),
        "gptq": Method("covercal.quantizers.gptq:gptq", calibrated=True),
    }
)
