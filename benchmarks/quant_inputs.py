"""What rows are made of: checkpoints, held-out questions, calibration pairs, each made once below one folder."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["QuantInputs"]

_ROOT = Path(__file__).resolve().parent.parent
_RECEIPTS, _OUTLIERS = _ROOT / "examples" / "receipts", _ROOT / "examples" / "outliers"
_HELDOUT_SEED, _CALIBRATION_SEED = 21, 5


@dataclass(frozen=True)
class QuantInputs:
    """Everything below `folder`; `num_items` questions are asked, of `num_samples` pairs calibration learns."""

    folder: Path
    num_items: int
    num_samples: int

    def checkpoint(self, name: str) -> Path:
        """The demo, or the demo with outliers."""
        if name == "demo":
            return _RECEIPTS / "checkpoint"
        folder = self.folder / "checkpoints" / name
        if not folder.exists():
            _run(_OUTLIERS / "outliers.py", str(_RECEIPTS / "checkpoint"), "-o", str(folder))
        return folder

    def task(self) -> Path:
        """Questions about receipts that the demo was not trained on."""
        folder = self.folder / f"task-{self.num_items}"
        if not (folder / "task.json").exists():
            _run(_RECEIPTS / "receipts.py", str(folder), "--num", str(self.num_items), "--seed", str(_HELDOUT_SEED))
        return folder

    def calibration(self) -> Path:
        """Pairs of the training split."""
        folder = self.folder / f"calibration-{self.num_samples}"
        if not folder.exists():
            options = ("--split", "train", "--num", str(self.num_samples), "--seed", str(_CALIBRATION_SEED))
            _run(_RECEIPTS / "receipts.py", str(folder), *options)
        return folder


def _run(script: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, str(script), *arguments], check=True, stdout=subprocess.DEVNULL)
