"""How far a long measure is; see `fmxnn.core.progress`."""

from fmxnn.core.progress import Progress, silently

__all__ = ["Progress", "silently"]
