"""Reading fields of a config.json, so that a wrong file is told by field, value and what was expected."""

from typing import Any, TypeVar

from ..runtime.errors import CheckpointError

__all__ = ["read_field", "read_fields"]

T = TypeVar("T")
_REQUIRED = object()


def read_field(config: dict[str, Any], path: str, kind: type[T], default: Any = _REQUIRED) -> T:
    """The value at a dotted path of config.json. Raises CheckpointError where it is missing or of another type."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part, _REQUIRED) if isinstance(value, dict) else _REQUIRED
    if value is _REQUIRED or value is None:
        if default is _REQUIRED:
            raise CheckpointError(f"config.json: {path} is missing; the checkpoint is incomplete or of another family")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # pyright: ignore[reportReturnType]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"config.json: {path} is {value!r}, expected {kind.__name__}")
    if kind is int and value < 0:  # pyright: ignore[reportOperatorIssue]
        raise CheckpointError(f"config.json: {path} is {value}, expected a number of at least 0")
    return value


def read_fields(config: dict[str, Any], path: str, num: int) -> tuple[int, ...]:
    """A list of `num` integers at a dotted path."""
    values = read_field(config, path, list)
    if len(values) != num or not all(isinstance(value, int) for value in values):
        raise CheckpointError(f"config.json: {path} is {values}, expected {num} integers")
    return tuple(values)
