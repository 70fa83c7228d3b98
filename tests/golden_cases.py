"""Golden folders read by their schema (tests/goldens/README.md), for every test that compares with them.

A case is known by its content alone: folders and cases that are added later are covered without a change.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from vlmport.runtime.manifest import ImageSpec, PositionSpec, PromptSpec, VideoSpec, VisionSpec

__all__ = ["GOLDENS", "Golden", "alternatives", "cases", "cases_with_pixels", "keep_cases", "read_json", "specs"]

GOLDENS = Path(__file__).parent / "goldens" / "qwen2_5_vl"


@dataclass(frozen=True)
class Golden:
    """One case, or what an alternative says of it."""

    folder: Path
    name: str
    case: dict[str, Any]
    record: dict[str, Any]  # where stages and hashes stand; the case itself, or its alternative
    tensors_file: str

    def __str__(self) -> str:
        return f"{self.folder.name}-{self.name}"

    @property
    def base(self) -> "Golden":
        """The case itself, where this is what an alternative says of it."""
        return Golden(self.folder, self.name, self.case, self.case, "expected.safetensors")

    @property
    def request(self) -> dict[str, Any]:
        return self.case["request"]

    def stages(self, stage: str, modality: str | None = None) -> list[tuple[dict[str, Any], np.ndarray]]:
        """[(its record, its tensor)] of a stage, parts and modalities apart."""
        tensors = _tensors(self.folder / self.tensors_file)
        wanted = [s for s in self.record.get("stages", []) if s["stage"] == stage]
        return [(s, tensors[s["tensor"]]) for s in wanted if modality in (None, s.get("modality"))]

    def tensor(self, stage: str, modality: str | None = None) -> np.ndarray | None:
        """The tensor of a stage that is stored whole, None where there is none."""
        found = [array for record, array in self.stages(stage, modality) if record["part"] is None]
        return found[0] if found else None


@dataclass(frozen=True)
class Specs:
    image: ImageSpec
    video: VideoSpec
    vision: VisionSpec
    prompt: PromptSpec
    positions: PositionSpec
    template: str


@cache
def _tensors(file: Path) -> dict[str, np.ndarray]:
    return load_file(file)


@cache
def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def folders() -> list[Path]:
    found = sorted(file.parent for file in GOLDENS.glob("*/expected.json"))
    assert found, f"no golden folders under {GOLDENS}"
    return found


def cases() -> list[Golden]:
    """Every case of every folder."""
    return [
        Golden(folder, name, case, case, "expected.safetensors")
        for folder in folders()
        for name, case in read_json(folder / "expected.json")["cases"].items()
    ]


def cases_with_pixels() -> list[tuple[Golden, str]]:
    """(case, "image" or "video") of every case that has pixels of that kind."""
    return [(case, kind) for case in cases() for kind in ("image", "video") if case.stages("pixel_values", kind)]


def alternatives(prefix: str) -> list[tuple[str, Golden]]:
    """(rest of the alternative's name, case) of the alternatives whose names begin with `prefix`."""
    found: list[tuple[str, Golden]] = []
    for folder in folders():
        document = read_json(folder / "expected.json")
        for name, alternative in document["alternatives"].items():
            if name.startswith(prefix):
                tensors = alternative.get("tensors", "expected.safetensors")
                for case, record in alternative["cases"].items():
                    found.append(
                        (name.removeprefix(prefix), Golden(folder, case, document["cases"][case], record, tensors))
                    )
    return found


@cache
def specs(folder: Path) -> Specs:
    """The manifest parts that the checkpoint's own files ask for."""
    pixels, config = read_json(folder / "preprocessor_config.json"), read_json(folder / "config.json")
    vision = config["vision_config"]
    tokens = read_json(folder / "expected.json")["special_token_ids"]
    placeholders = {
        name: text for text, id in tokens.items() for name in ("image", "video") if config[f"{name}_token_id"] == id
    }
    patch, merge = pixels["patch_size"], pixels["merge_size"]
    return Specs(
        image=ImageSpec(
            strategy="smart_resize",
            patch_size=patch,
            temporal_patch_size=pixels["temporal_patch_size"],
            merge_size=merge,
            min_pixels=pixels["min_pixels"],
            max_pixels=pixels["max_pixels"],
            mean=tuple(pixels["image_mean"]),
            std=tuple(pixels["image_std"]),
            rescale=pixels.get("rescale_factor", 1 / 255),
            resample="bicubic",
        ),
        video=VideoSpec(
            sampling="linspace",
            fps=2.0,
            min_frames=4,
            max_frames=768,
            frame_multiple=2,
            min_pixels=128 * 28 * 28,
            max_pixels=768 * 28 * 28,
            total_pixels=int(128000 * 28 * 28 * 0.9),
            default_fps=2.0,
        ),
        vision=VisionSpec(
            inputs=("patch_positions", "cu_seqlens", "window_index", "cu_window_seqlens"),
            merge_size=merge,
            window_blocks=vision["window_size"] // patch // merge,
        ),
        prompt=PromptSpec(
            image_placeholder=placeholders["image"],
            video_placeholder=placeholders["video"],
            protected_tokens=tuple(tokens),
            template_options={},
        ),
        positions=PositionSpec("mrope", "transformers-4.49", vision["tokens_per_second"]),
        template=read_json(folder / "chat_template.json")["chat_template"],
    )


def keep_cases(folder: Path, *names: str) -> Path:
    """Leaves these cases of a golden folder's copy alone, without batches and alternatives, for speed."""
    file = folder / "expected.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    document["cases"] = {name: document["cases"][name] for name in names}
    document["batches"], document["alternatives"] = {}, {}
    file.write_text(json.dumps(document), encoding="utf-8")
    return folder
