"""The method: arrays and modules in, arrays and modules out."""

__version__ = "0.1.0"
