"""Memory of `vlmport validate` over few and many questions: `python -m benchmarks.validate_memory --num 100 2000`.

The demo's package against its checkpoint in PyTorch, on held-out receipts, answers alone. Each number of questions is a
process of its own; its largest resident set, by the kernel, is what is compared. Exit status 1 where it grows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .process import Finished, run_watched

__all__ = ["main"]

RECEIPTS = Path("examples", "receipts")
GROWTH = 1.1  # largest over smallest peak: an allocator's arenas differ by some per cent from run to run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.validate_memory", description=__doc__)
    parser.add_argument("--num", metavar="N", type=int, nargs="+", default=[100, 2000], help="default: 100 2000")
    parser.add_argument("--recipe", metavar="R", nargs="+", default=["int4"], help="default: int4")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="of an answer (default: the task's 128)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="vlmport-") as folder:
        package = Path(folder, "package")
        _run(
            Path(folder), "vlmport.cli.main", "export", RECEIPTS / "checkpoint", "-o", package, "--recipe", *args.recipe
        )
        print("questions  seconds  peak RSS", flush=True)
        peaks: list[int] = []
        for num in args.num:
            run = _validate(Path(folder), package, num, args.max_new_tokens)
            peaks.append(run.peak_process)
            print(f"{num:>9}  {run.seconds:>7.0f}  {run.peak_process / 2**20:>5.0f} MiB", flush=True)
    growth = max(peaks) / min(peaks)
    print(f"largest over smallest: {growth:.3f}, at most {GROWTH} is flat")
    return int(growth > GROWTH)


def _validate(folder: Path, package: Path, num: int, max_new_tokens: int | None) -> Finished:
    """All variants on `num` receipts that no other run has seen."""
    task = folder / f"task-{num}"
    subprocess.run([sys.executable, RECEIPTS / "receipts.py", task, "--num", str(num)], check=True, stdout=sys.stderr)
    if max_new_tokens is not None:
        settings = json.loads((task / "task.json").read_text())
        (task / "task.json").write_text(json.dumps({**settings, "max_new_tokens": max_new_tokens}))
    options = ["--reference", RECEIPTS / "checkpoint", "--task", task, "--report", folder / f"report-{num}"]
    return _run(folder, "vlmport.cli.main", "validate", package, *options, "--no-insides", "--no-sweep")


def _run(folder: Path, module: str, *arguments: str | Path) -> Finished:
    """A module as a program. A validation's status 1 is a gate that failed, which is no matter here."""
    script = f"import sys; from {module} import main; sys.exit(main() == 2)"
    try:
        return run_watched([sys.executable, "-c", script, *map(str, arguments)], folder / "log")
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.output) from None


if __name__ == "__main__":
    sys.exit(main())
