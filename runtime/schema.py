"""Frozen dataclasses to JSON and back, strictly: unknown, missing or mistyped fields are errors that name the field."""

import dataclasses
import types
import typing
from typing import Any, TypeVar

__all__ = ["SchemaError", "from_json", "to_json"]

T = TypeVar("T")


class SchemaError(ValueError):
    """A JSON value that does not fit its dataclass; the message starts with the path of the field."""


def to_json(value: Any) -> Any:
    """Turns dataclasses, tuples and dicts into what `json.dumps` takes. Fields that are None are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: to_json(item) for name, item in fields if item is not None}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in typing.cast("typing.Iterable[Any]", value)]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in typing.cast("dict[Any, Any]", value).items()}
    return value


def from_json(kind: type[T], data: Any, where: str = "") -> T:
    """Builds `kind` (dataclass, tuple[X, ...], dict[str, X], Literal, X | None or a plain type) from parsed JSON.

    Raises SchemaError naming the field path on unknown, missing or mistyped fields.
    """
    return typing.cast(T, _decode(kind, data, where or "$"))


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        (inner,) = [arg for arg in args if arg is not type(None)]
        return _decode(inner, data, where)
    if origin is typing.Literal:
        if data not in args:
            raise SchemaError(f"{where}: {data!r} is not one of {', '.join(map(repr, args))}")
        return data
    if origin is tuple:
        _expect(isinstance(data, list), where, "a list", data)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
        _expect(len(data) == len(args), where, f"a list of {len(args)}", data)
        return tuple(_decode(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, data, strict=True)))
    if origin is dict:
        _expect(isinstance(data, dict), where, "an object", data)
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    return _decode_plain(kind, data, where)


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, "an object", data)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise SchemaError(f"{where}: unknown field {unknown[0]!r}; known fields are {', '.join(sorted(fields))}")
    missing = [
        name
        for name, field in fields.items()
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SchemaError(f"{where}: field {missing[0]!r} is missing")
    try:
        return kind(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in data.items()})
    except SchemaError:
        raise
    except ValueError as error:  # a dataclass's own __post_init__ check
        raise SchemaError(f"{where}: {error}") from error


def _decode_plain(kind: Any, data: Any, where: str) -> Any:
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    fits = isinstance(data, kind) and not (kind in (int, float) and isinstance(data, bool))
    _expect(fits, where, f"of type {kind.__name__}", data)
    return data


def _expect(holds: bool, where: str, what: str, data: Any) -> None:
    if not holds:
        raise SchemaError(f"{where}: expected {what}, got {str(data)[:80]!r}")
