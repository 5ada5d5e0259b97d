"""What knows nothing of crosscoders: contractions, recipes, seeds, errors."""

from fmxnn.core.contraction import Contraction
from fmxnn.core.errors import PatternError, RecipeError, ShapeError
from fmxnn.core.recipe import build, describe
from fmxnn.core.version import __version__

__all__ = ["Contraction", "PatternError", "RecipeError", "ShapeError", "__version__", "build", "describe"]
