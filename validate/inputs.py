"""What each side of a comparison was given, by sha256: the proof that both were asked the same.

A digest is taken where a side takes its inputs, from that side's own arrays: of the reference before it computes, of a
variant from what its own runtime has prepared. It covers dtype, shape and the row-major bytes, integers as int64 and
floats as float32, little-endian. Nothing but digests is kept, so that memory does not grow with pictures.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.image import Patches
from ..runtime.prepare import Prepared
from .compare import Comparison

__all__ = [
    "INPUT_STAGE",
    "GivenInputs",
    "InputProof",
    "compare_inputs",
    "hash_of",
    "image_hashes",
    "input_hashes",
    "prove",
    "rolled_up",
]

Array = NDArray[Any]
INPUT_STAGE = "inputs"  # of the records of `compare_inputs`


@dataclass(frozen=True)
class GivenInputs:
    """sha256 by input of one sample, of both sides."""

    sample: str
    reference: Mapping[str, str]
    variant: Mapping[str, str]

    @property
    def different(self) -> tuple[str, ...]:
        """Inputs that are not the same, or that one side lacks."""
        names = dict.fromkeys([*self.reference, *self.variant])
        return tuple(name for name in names if self.reference.get(name) != self.variant.get(name))


@dataclass(frozen=True)
class InputProof:
    """How many samples were given to a variant as they were to the reference. `sha256`: over all of the variant's."""

    num_samples: int
    num_equal: int
    sha256: str
    different: tuple[Mapping[str, str | None], ...]  # sample, input, reference, variant


def input_hashes(prepared: Prepared) -> dict[str, str]:
    """Digests of a prompt."""
    return {
        "input_ids": hash_of([prepared.input_ids]),
        "position_ids": hash_of([prepared.position_ids]),
        "visual_runs": hash_of([np.array([(run.start, run.length) for run in prepared.runs], np.int64)]),
        **image_hashes(prepared.visuals),
    }


def image_hashes(patches: Sequence[Patches]) -> dict[str, str]:
    """Digests of pixels, of their grids, and of the patches that are left of dropped ones."""
    kept = [np.zeros(0, np.int64) if item.kept is None else item.kept for item in patches]
    return {
        "pixel_values": hash_of([item.pixel_values for item in patches]),
        "grids": hash_of([np.array([item.grid for item in patches], np.int64)]),
        **({"kept_patches": hash_of(kept)} if any(item.kept is not None for item in patches) else {}),
    }


def hash_of(arrays: Iterable[Array]) -> str:
    """sha256 over arrays one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        plain = np.ascontiguousarray(array, "<f4" if np.issubdtype(array.dtype, np.floating) else "<i8")
        digest.update(f"{plain.dtype.str}{list(plain.shape)}".encode())
        digest.update(plain.data)
    return digest.hexdigest()


def compare_inputs(given: GivenInputs) -> Comparison:
    """One record a sample, of exact values: one digest that differs fails the gate."""
    names = set(given.reference) | set(given.variant)
    different = given.different
    return Comparison(
        given.sample,
        INPUT_STAGE,
        "exact",
        num_values=len(names),
        num_different=len(different),
        note=f"not what the reference was given: {', '.join(different)}" if different else "",
    )


def prove(given: Sequence[GivenInputs]) -> InputProof:
    """Of all samples of a variant."""
    different = [
        {"sample": one.sample, "input": name, "reference": one.reference.get(name), "variant": one.variant.get(name)}
        for one in given
        for name in one.different
    ]
    return InputProof(
        num_samples=len(given),
        num_equal=sum(not one.different for one in given),
        sha256=rolled_up((one.sample, one.variant) for one in given),
        different=tuple(different),
    )


def rolled_up(hashes: Iterable[tuple[str, Mapping[str, str]]]) -> str:
    """sha256 over the digests of samples, a JSON line each: equal where all of them are, in the same order."""
    digest = hashlib.sha256()
    for sample, found in hashes:
        digest.update(json.dumps([sample, dict(sorted(found.items()))]).encode() + b"\n")
    return digest.hexdigest()
