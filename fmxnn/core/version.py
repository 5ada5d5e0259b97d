"""The version of fmxnn, which saved folders carry."""

__version__ = "0.1.0"
