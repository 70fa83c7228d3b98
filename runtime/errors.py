"""Every error that vlmport raises on purpose.

    VlmportError                a mistake the user can mend; the command line prints it in one line and exits with 2
    ├── CheckpointError         the checkpoint folder: missing, truncated, unknown or mis-shaped
    ├── PackageError            the package folder: not one, damaged, of another schema, lacking a variant
    ├── InputError              messages, images, videos, options
    ├── CapacityError           the request is sound but does not fit: cache length, pixel cap, disk
    ├── RecipeError             a recipe, rule or calibration set that cannot be applied
    └── MissingDependencyError  an optional dependency that is not installed; names the extra to add

A message names the file or field, the value found and what to do. What is our own fault is an `assert`.
"""

__all__ = [
    "CapacityError",
    "CheckpointError",
    "InputError",
    "MissingDependencyError",
    "PackageError",
    "RecipeError",
    "VlmportError",
]


class VlmportError(ValueError):
    """Root of the tree: a mistake of the user, told in one line."""


class CheckpointError(VlmportError):
    """The checkpoint cannot be read as its config.json says."""


class PackageError(VlmportError):
    """The package folder is missing, damaged or lacks what was asked for."""


class InputError(VlmportError):
    """A message, image, video or option cannot be used."""


class CapacityError(VlmportError):
    """A sound request that exceeds a limit."""


class RecipeError(VlmportError):
    """A quantization recipe that cannot be read or applied."""


class MissingDependencyError(VlmportError):
    """An optional dependency is not installed."""
