"""What knows nothing of crosscoders: contractions, recipes, seeds, errors."""

from fmxnn.core.contraction import Contraction, PatternError, ShapeError
from fmxnn.core.recipe import RecipeError, build, describe
from fmxnn.core.version import __version__

__all__ = ["Contraction", "PatternError", "RecipeError", "ShapeError", "__version__", "build", "describe"]
