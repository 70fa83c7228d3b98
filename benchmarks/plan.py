"""What a run of the benchmark measures, and how much of it."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["DEFAULT_PARTS", "PARTS", "Plan", "VisionCase", "smoke_plan"]

PARTS = ("export", "floor", "load", "vision", "float32", "text", "steady", "prepare", "large", "profile", "calibrate")
DEFAULT_PARTS = tuple(part for part in PARTS if part != "calibrate")  # that alone takes as long as all the others
_FOUR_SIZES = ((448, 448), (672, 448), (336, 560), (896, 224))  # unequal sides, areas and windows

VisionCase = tuple[str, tuple[tuple[int, int], ...], int]  # name, widths and heights of one call, measured runs


@dataclass(frozen=True)
class Plan:
    """What to measure, and how much of it."""

    shape: str
    folder: Path  # of checkpoints, packages and logs
    recipes: tuple[str, ...] = ("int4", "int4_b128", "int8")
    parts: tuple[str, ...] = DEFAULT_PARTS
    vision: tuple[VisionCase, ...] = (
        ("448x448", ((448, 448),), 3),
        ("1024x1024", ((1024, 1024),), 1),
        ("of four unequal images", _FOUR_SIZES, 1),
    )
    pairs: int = 3  # of the tower and its float32 twin
    prefill: tuple[int, ...] = (256, 1024)
    contexts: tuple[int, ...] = (256, 2048)
    bursts: int = 5  # of decoding, at each context
    burst_tokens: int = 12
    roof_bytes: int = 2 << 30
    profile_steps: int = 8
    calibration: tuple[int, ...] = (8,)  # samples of a calibrated export; one export each
    method: str = "gptq"
    checkpoint: Path | None = None  # None: made below `folder`

    @property
    def num_threads(self) -> int:
        return os.cpu_count() or 1


def smoke_plan(plan: Plan) -> Plan:
    """What makes a run short enough for every change: one recipe, small images, short prompts."""
    return replace(
        plan,
        recipes=("int4",),
        parts=tuple(part for part in DEFAULT_PARTS if part not in ("large", "float32")),
        vision=(
            ("448x448", ((448, 448),), 2),
            ("of four unequal images", ((224, 224), (336, 224), (168, 280), (448, 112)), 1),
        ),
        prefill=(256,),
        contexts=(256,),
        bursts=3,
        roof_bytes=512 << 20,
    )
