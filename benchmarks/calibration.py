"""Memory and time of a calibrated export: made-up pairs of image and text, their number, seconds a stage.

The pictures are drawn and the words are drawn, from one seed: what calibration takes depends on how many rows flow
through a role, not on what they say.
"""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmport.quant.samples import SAMPLES_NAME
from vlmport.runtime.manifest import Calibration
from vlmport.runtime.package import Package
from vlmport.validate.samples import draw_picture

from .process import Finished, run_watched

__all__ = ["Calibrated", "calibrate", "stages_of", "write_samples"]

SIDE = 448  # pixels: 1,024 patches of 14, and a quarter as many tokens
_WORDS = ("total", "date", "amount", "of", "the", "receipt", "tax", "item", "paid", "change", "left", "right", "seven")
_NUM_WORDS = 24  # of a question, and a third as many of its answer
# A plain line of progress: 120.5 s 3 min left, int4_gptq: calibrating decoder, stage 4 of 37
_LINE = re.compile(r" (\d+\.\d) s .*calibrating (\w+), stage (\d+) of (\d+)")


@dataclass(frozen=True)
class Calibrated:
    """One export whose codes were found on data."""

    variant: str
    data: Calibration
    export: Finished
    stages: dict[str, int]  # how many, by role
    seconds: dict[str, float]  # by role: the mean of its stages


def calibrate(checkpoint: Path, package: Path, recipe: str, method: str, num_samples: int, seed: int = 0) -> Calibrated:
    """Exports into `package`, which is removed when it has been looked at. The log stays beside it.

    Raises CalledProcessError where the export fails.
    """
    data = write_samples(package.parent / f"calibration-{num_samples}-{seed}", num_samples, seed)
    command = [sys.executable, "-m", "vlmport.cli.main", "export", str(checkpoint), "-o", str(package), "--overwrite"]
    command += ["--recipe", recipe, "--method", method, "--calibration", str(data)]
    command += ["--calibration-samples", str(num_samples)]
    log = package.with_name(f"{package.name}-{num_samples}.log")
    finished = run_watched(command, log)
    variant = next(iter(Package.open(package).manifest.variants.values()))
    assert variant.calibration is not None
    shutil.rmtree(package)
    stages, seconds = stages_of(log.read_text("utf-8"))
    return Calibrated(variant.name, variant.calibration, finished, stages, seconds)


def write_samples(folder: Path, num_samples: int, seed: int) -> Path:
    """A calibration folder: a picture, a question and an answer a sample."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for number in range(num_samples):
        random = np.random.default_rng([seed, number])
        image = f"images/{number:04}.png"
        draw_picture(int(random.integers(1 << 31)), SIDE, SIDE).save(folder / image)
        question, answer = (" ".join(random.choice(_WORDS, count)) for count in (_NUM_WORDS, _NUM_WORDS // 3))
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        lines.append(json.dumps({"id": f"{number:04}", "messages": messages, "answers": [answer]}))
    (folder / SAMPLES_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def stages_of(log: str) -> tuple[dict[str, int], dict[str, float]]:
    """How many stages each role has, and the mean seconds of one, between the first line of the role and its last."""
    told: dict[str, list[tuple[float, int]]] = {}
    stages: dict[str, int] = {}
    for seconds, role, stage, total in _LINE.findall(log):
        told.setdefault(role, []).append((float(seconds), int(stage)))
        stages[role] = int(total)
    means: dict[str, float] = {}
    for role, lines in told.items():
        (first, begun), (last, done) = lines[0], lines[-1]
        if done > begun:
            means[role] = (last - first) / (done - begun)
    return stages, means
