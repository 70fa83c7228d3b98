"""The validation against golden folders: what upstream's own code computed once, and what variants make of it."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..runtime.model import Model
from ..runtime.package import Package, file_entry
from .compare import Comparison, NotCompared, stage_columns, stage_rows
from .gates import GateTable
from .golden import Golden
from .golden_compare import compare_golden
from .image_golden import compare_image_golden
from .judged import hash_golden, hash_package
from .report import Report, VariantReport, versions
from .run import variant_report
from .shards import provider_of

__all__ = ["made_from", "validate_golden"]

Progress = Callable[[int, int, str], None]


def validate_golden(
    package: Package, goldens: Sequence[Golden], variants: Sequence[str], gates: GateTable, progress: Progress
) -> Report:
    """Each variant against every case of the golden folders, of which there is at least one."""
    judged = [hash_package(package, variants, progress)]
    judged += [hash_golden(golden.path, progress) for golden in goldens]
    reports: list[VariantReport] = []
    provider = ""
    for name in variants:
        started = time.perf_counter()
        # Golden activations are of unit scale, so float32 is held to absolute limits.
        columns = {
            kind: "fp32-unit" if column == "fp32" else column
            for kind, column in stage_columns(package.variant(name)).items()
        }
        records: list[Comparison | NotCompared] = []
        with ExitStack() as models:
            loaded: dict[str | None, Model] = {}

            def load(rule: str | None, name: str = name, loaded: dict[str | None, Model] = loaded) -> Model:
                if rule not in loaded:
                    loaded[rule] = models.enter_context(Model.load(package.path, name, video_rule=rule))
                return loaded[rule]

            for golden in goldens:
                if "decoder" in package.manifest.roles:
                    records += compare_golden(golden, load, gates.tie_margin[columns["generation"]], progress)
                else:
                    records += compare_image_golden(golden, load(None))
            provider = provider_of(load(None))
        rows = stage_rows([r for r in records if isinstance(r, Comparison)], gates, columns)
        reports.append(variant_report(package, name, records, rows, time.perf_counter() - started))
    reference = {"golden": ", ".join(golden.path.name for golden in goldens), "upstream": goldens[0].upstream}
    samples = [f"{golden.path.name}/{case}" for golden in goldens for case in golden.cases]
    for files in judged:
        files.check()
    return Report(
        mode="golden",
        reference=reference,
        package=package,
        files=judged[0].sha256,
        reference_files={
            f"{golden.path.name}/{name}": sha256
            for golden, files in zip(goldens, judged[1:], strict=True)
            for name, sha256 in files.sha256.items()
        },
        provider=provider,
        versions=versions(),
        samples=tuple(samples),
        gates=gates,
        variants=tuple(reports),
    )


def made_from(package: Package, checkpoint: Path) -> bool:
    """Whether the weight files of a checkpoint folder are those that the package was made from, by sha256."""
    files = [path for path in sorted(checkpoint.glob("*.safetensors")) if path.name in package.manifest.source.files]
    return bool(files) and all(file_entry(path) == package.manifest.source.files[path.name] for path in files)
