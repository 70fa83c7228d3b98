"""What a long validation has found so far, on disk, so that an interrupted one goes on where it stopped.

One JSON line a sample and variant, appended and flushed once it is known; a line that a kill has torn is dropped. The
file's name is a digest of everything that the lines depend on: packages, checkpoints, samples and gates other than
these have another file, so that no line is ever read as evidence of other bytes.

    {"sample": "0007", "variant": "int4", "records": [{"type": "Comparison", "fields": {...}}, ...]}
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

__all__ = ["JOURNAL_SCHEMA", "Journal", "digest_of"]

JOURNAL_SCHEMA = "vlmport-journal/1"


class Journal:
    """Records by sample and variant. Use it in a `with` block; one process at a time."""

    def __init__(self, folder: Path, digest: str, types: Iterable[type]) -> None:
        """types: the frozen dataclasses that records are made of, one inside the other.

        Other fields of these are another file, so that no line of an older version is read as one of this.
        """
        self._types = {kind.__name__: kind for kind in types}
        fields = {name: [f"{f.name}: {f.type}" for f in dataclasses.fields(kind)] for name, kind in self._types.items()}
        self.file = folder / f"{digest_of({'lines': digest, 'fields': fields})[:16]}.jsonl"
        self._places: dict[tuple[str, str], tuple[int, int]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._stream = self.file.open("a+b")
        self._index()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether (sample, variant) is there."""
        return key in self._places

    def append(self, sample: str, variant: str, records: Sequence[Any]) -> None:
        """Adds what was found of a sample; it is on the disk when this returns."""
        line = json.dumps({"sample": sample, "variant": variant, "records": [self._encode(r) for r in records]})
        data = line.encode() + b"\n"
        place = self._stream.seek(0, os.SEEK_END)
        self._stream.write(data)
        self._stream.flush()
        self._places[sample, variant] = (place, len(data))

    def read(self, sample: str, variant: str) -> list[Any]:
        """The records of a sample as they were given."""
        place, length = self._places[sample, variant]
        self._stream.seek(place)
        return [self._decode(record) for record in json.loads(self._stream.read(length))["records"]]

    def remove(self) -> None:
        """Once a report is written nothing is left to go on with."""
        self._stream.close()
        self.file.unlink(missing_ok=True)
        if not any(self.file.parent.iterdir()):
            self.file.parent.rmdir()

    def _index(self) -> None:
        """Finds the lines that are whole, and cuts off a last one that is not."""
        self._stream.seek(0)
        place = 0
        for line in self._stream:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except json.JSONDecodeError:
                entry = None
            if entry is None:
                break
            self._places[entry["sample"], entry["variant"]] = (place, len(line))
            place += len(line)
        self._stream.truncate(place)

    def _encode(self, value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            name = type(value).__name__
            assert name in self._types, name
            fields = {field.name: self._encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return {"type": name, "fields": fields}
        if isinstance(value, np.ndarray):
            return {"array": value.tolist(), "dtype": str(value.dtype)}
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Mapping):
            return {"items": [[key, self._encode(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return [self._encode(item) for item in value]
        return value

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(self._decode(item) for item in value)
        if not isinstance(value, dict):
            return value
        if "array" in value:
            return np.array(value["array"], value["dtype"])
        if "items" in value:
            return {key: self._decode(item) for key, item in value["items"]}
        return self._types[value["type"]](**{key: self._decode(item) for key, item in value["fields"].items()})


def digest_of(parts: Mapping[str, Any]) -> str:
    """sha256 over what a validation depends on; parts are JSON, or arrays and images by their bytes."""
    digest = hashlib.sha256(JOURNAL_SCHEMA.encode())
    for name, part in sorted(parts.items()):
        digest.update(json.dumps([name, part], sort_keys=True, default=_bytes_of).encode())
    return digest.hexdigest()


def _bytes_of(value: Any) -> str:
    """A digest of an array or an image; what else a sample may hold tells itself by its text."""
    data = np.asarray(value) if hasattr(value, "tobytes") else None
    return (
        str(value)
        if data is None
        else hashlib.sha256(f"{data.shape}{data.dtype}".encode() + data.tobytes()).hexdigest()
    )
