"""Weights stream: the memory of an export does not grow with the checkpoint."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

from vlmport.export.family import load_family

EXPORT = """
import resource, sys
from vlmport.export.build import export_checkpoint
from vlmport.quant.recipe import load_recipe
package = export_checkpoint(sys.argv[1], sys.argv[2], [load_recipe(name) for name in sys.argv[3:]])
print(package.manifest.source.num_parameters, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def export(checkpoint: Path, output: Path, *recipes: str) -> tuple[int, int]:
    """(parameters, peak resident bytes) of an export in a process of its own."""
    command = [sys.executable, "-c", EXPORT, str(checkpoint), str(output), *recipes]
    parameters, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(parameters), int(peak)


def config(**fields: Any) -> dict[str, Any]:
    return copy.deepcopy(load_family("qwen2_5_vl").tiny_config) | fields


def test_a_table_a_hundred_times_larger_takes_no_more_memory(tmp_path: Path) -> None:
    peaks: dict[int, int] = {}
    for vocab_size in (1_000, 400_000):
        checkpoint = write_checkpoint(tmp_path / f"checkpoint-{vocab_size}", config(vocab_size=vocab_size))
        parameters, peaks[vocab_size] = export(checkpoint, tmp_path / f"package-{vocab_size}", "fp32", "int8")
        assert parameters > 2 * 64 * vocab_size
    table = 4 * 64 * 400_000  # bytes of the embedding; the head is as large again
    assert peaks[400_000] - peaks[1_000] < 0.75 * table, "about one chunk of rows, never a whole table"


@pytest.mark.slow
def test_a_billion_parameters_under_two_gigabytes(tmp_path: Path) -> None:
    large = config(
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=16,
        num_hidden_layers=12,
        vocab_size=151_936,
        tie_word_embeddings=True,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    )
    large["vision_config"] |= {"depth": 4, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    large["vision_config"] |= {"out_hidden_size": 2048, "fullatt_block_indexes": [1, 3]}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", large, dtype="BF16", num_shards=2)
    parameters, peak = export(checkpoint, tmp_path / "package", "fp32", "int8", "int4")
    print(f"{parameters / 1e9:.2f} B parameters exported to fp32, int8 and int4 at a peak of {peak / 1e9:.2f} GB")
    assert parameters > 1_000_000_000
    assert peak < 2_000_000_000
