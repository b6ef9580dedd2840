"""The version of Penstock: here, because every process announces it."""

__version__ = "0.1.0"
