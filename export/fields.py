"""Reading fields of a checkpoint's JSON, so that a wrong file is told by field, value and what was expected.

`path` is dotted; `file` is what messages call the document.
"""

from typing import Any, TypeVar

from ..runtime.errors import CheckpointError

__all__ = ["read_field", "read_fields", "read_numbers", "read_size"]

T = TypeVar("T")
_CONFIG = "config.json"
_REQUIRED: Any = object()


def read_field(config: dict[str, Any], path: str, kind: type[T], default: Any = _REQUIRED, *, file: str = _CONFIG) -> T:
    """The value at a path. Raises CheckpointError where it is of another type, or missing without a default."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part, _REQUIRED) if isinstance(value, dict) else _REQUIRED
    if value is _REQUIRED or value is None:
        if default is _REQUIRED:
            raise CheckpointError(f"{file}: {path} is missing; the checkpoint is incomplete or of another family")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # pyright: ignore[reportReturnType]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{file}: {path} is {value!r}, expected {kind.__name__}")
    if kind is int and value < 0:  # pyright: ignore[reportOperatorIssue]
        raise CheckpointError(f"{file}: {path} is {value}, expected a number of at least 0")
    return value


def read_size(config: dict[str, Any], path: str, default: int = _REQUIRED, *, file: str = _CONFIG) -> int:
    """A number of at least 1 at a path: a width, a count of heads or layers, a side."""
    value = read_field(config, path, int, default, file=file)
    if value < 1:
        raise CheckpointError(f"{file}: {path} is {value}, expected a number of at least 1")
    return value


def read_fields(config: dict[str, Any], path: str, num: int | None = None) -> tuple[int, ...]:
    """A list of integers at a path; `num` of them, or any number."""
    values = read_field(config, path, list)
    integers = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    if not integers or num not in (None, len(values)):
        raise CheckpointError(f"{_CONFIG}: {path} is {values}, expected {'' if num is None else f'{num} '}integers")
    return tuple(values)


def read_numbers(
    config: dict[str, Any], path: str, default: tuple[float, float, float] | None = None, *, file: str = _CONFIG
) -> tuple[float, float, float]:
    """Three numbers at a path, a colour channel each; required where there is no default."""
    values = read_field(config, path, list, _REQUIRED if default is None else list(default), file=file)
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if not numbers or len(values) != 3:
        raise CheckpointError(f"{file}: {path} is {values}, expected 3 numbers")
    red, green, blue = (float(value) for value in values)
    return red, green, blue
