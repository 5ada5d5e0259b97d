"""What goes wrong, named: each error says who asked, what was expected, what came, and the way out."""


class PatternError(ValueError):
    """A pattern that cannot be read, or sizes that do not fit it."""


class ShapeError(ValueError):
    """A tensor whose axes are not those that a module reads."""


class RecipeError(ValueError):
    """A module that no recipe can describe, or a recipe that makes no module; says where, as a dotted path."""


class LockedError(OSError):
    """A folder that another process is writing into."""


class IntegrityError(OSError):
    """A file that is missing, cut, changed, in the way, or that may not be read or written."""


class FormatError(ValueError):
    """A folder of no known format or of two, or files that do not fit theirs; names file and key."""


class CheckpointError(ValueError):
    """A folder from which a run cannot go on, or a run that a checkpoint cannot hold."""


class NonFiniteError(ArithmeticError):
    """A loss that is NaN or infinite, or whose gradient is, raised before it can touch the weights."""
