"""Calibration data, a folder of images and `samples.jsonl`, a JSON object a line.

    {"id": "0001", "messages": [{"role": "user", "content": [{"type": "image", "image": "images/0001.png"},
     {"type": "text", "text": "What is the total?"}]}], "answers": ["12.40"]}

Messages are those that the runtime takes (runtime/messages.py), with paths inside the folder. Of the answers, the first
is what the model is shown to have said; without answers there is only the prompt. Nothing is fetched from anywhere.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..runtime.errors import InputError
from ..runtime.messages import read_messages
from ..runtime.package import file_entry
from ..runtime.schema import SchemaError, from_json

__all__ = ["SAMPLES_NAME", "CalibrationSample", "load_samples", "media_files", "samples_digest"]

SAMPLES_NAME = "samples.jsonl"


@dataclass(frozen=True)
class CalibrationSample:
    """One conversation, and what may be said next."""

    id: str
    messages: tuple[dict[str, Any], ...]
    answers: tuple[str, ...] = ()
    # For tasks (validate), not for calibration:
    kind: str | None = None  # of the question
    scorer: str | None = None


def load_samples(folder: Path, num_samples: int, seed: int) -> tuple[CalibrationSample, ...]:
    """At most `num_samples` of the folder's, drawn by the seed, in the order of the file.

    Raises InputError naming the file, the line and the fix.
    """
    file = folder / SAMPLES_NAME
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{file}: missing; give a folder with a {SAMPLES_NAME}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); give a UTF-8 text") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InputError(f"{file}: is empty; it needs at least one sample, better a hundred")
    chosen = sorted(np.random.default_rng(seed).permutation(len(numbered))[:num_samples])
    return tuple(_sample(folder, *numbered[int(place)]) for place in chosen)


def samples_digest(folder: Path, samples: Sequence[CalibrationSample]) -> str:
    """sha256 (hex) of the samples and of the files that they name."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.id, sample.messages, sample.answers], sort_keys=True).encode())
        for source in media_files(folder, sample.messages):
            digest.update(file_entry(source).sha256.encode())
    return digest.hexdigest()


def _sample(folder: Path, number: int, line: str) -> CalibrationSample:
    where = f"{folder / SAMPLES_NAME}: line {number}"
    try:
        sample = from_json(CalibrationSample, json.loads(line))
    except (SchemaError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: {error}") from error
    try:
        files = media_files(folder, sample.messages)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    for file in files:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{where}: {file} is outside the folder; put the file into it")
        if not file.is_file():
            raise InputError(f"{where}: {file} is missing; put the file there, or leave out the sample")
    return sample


def media_files(folder: Path, messages: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Of images, clips and frames; those within the text itself, as data URIs, have none."""
    sources = [visual.source for visual in read_messages(messages, folder=folder).visuals]
    frames = [cast("list[Any]", source) if isinstance(source, (list, tuple)) else [source] for source in sources]
    named = [source for each in frames for source in each if isinstance(source, (str, Path))]
    return [Path(source) for source in named if not str(source).startswith("data:")]
