"""The validations of packages without a decoder: embeddings and class scores of images."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.model import Model
from ..runtime.package import Package
from .against import PackageImages
from .compare import Comparison, NotCompared, stage_columns, stage_rows
from .gates import GateTable
from .images import EncodingReference, ImageReference, ImageSample, compare_image_sample
from .inputs import GivenInputs, prove
from .judged import hash_checkpoint, hash_package
from .report import Report, VariantReport
from .run import Compared, about_package, concluded, roles_of_checkpoint, variant_report
from .shards import provider_of

if TYPE_CHECKING:
    from .insides import Plan

__all__ = ["validate_images", "validate_images_against"]

Progress = Callable[[int, int, str], None]


def validate_images(
    package: Package,
    checkpoint: Path,
    reference: ImageReference,
    samples: Sequence[ImageSample],
    variants: Sequence[str],
    gates: GateTable,
    progress: Progress,
    plan: "Plan | None" = None,
) -> Report:
    """Each variant against the checkpoint in PyTorch. Raises as `validate_reference` does."""
    judged = [hash_package(package, variants, progress), hash_checkpoint(checkpoint, progress)]
    columns = {name: stage_columns(package.variant(name)) for name in variants}
    compared = _compare_images(package, reference, package, samples, columns, gates, progress)
    insides = None
    if plan is not None:
        from .insides import look_inside_images

        roles = roles_of_checkpoint(checkpoint)
        insides = look_inside_images(package, reference, roles, samples[-1], variants, plan, progress)
    about = {"checkpoint": checkpoint.name, "code": reference.origin}
    return concluded("reference", about, package, judged, compared, samples, None, gates, insides)


def validate_images_against(
    package: Package,
    other: Model,
    samples: Sequence[ImageSample],
    variants: Sequence[str],
    gates: GateTable,
    progress: Progress,
) -> Report:
    """The same against a variant of another package."""
    judged = [hash_package(package, variants, progress), hash_package(other.package, [other.variant.name], progress)]
    columns = {name: stage_columns(package.variant(name), other.variant) for name in variants}
    compared = _compare_images(package, PackageImages(other), other.package, samples, columns, gates, progress)
    return concluded("against", about_package(other), package, judged, compared, samples, None, gates)


def _compare_images(
    package: Package,
    reference: EncodingReference,
    preprocessor: Package,
    samples: Sequence[ImageSample],
    columns: Mapping[str, Mapping[str, str]],
    gates: GateTable,
    progress: Progress,
) -> Compared:
    """`preprocessor`: the package by whose manifest the reference's images are cut up."""
    reports: list[VariantReport] = []
    inputs: list[GivenInputs] = []
    provider = ""
    for name, column in columns.items():
        started = time.perf_counter()
        records: list[Comparison | NotCompared] = []
        inputs = []
        with Model.load(package.path, name) as model:
            for number, sample in enumerate(samples):
                progress(number, len(samples), f"{name}, {sample.id}")
                given, found = compare_image_sample(model, sample, reference, preprocessor.manifest.image)
                inputs.append(given)
                records += found
            provider = provider_of(model)
        rows = stage_rows([r for r in records if isinstance(r, Comparison)], gates, column)
        report = variant_report(package, name, records, rows, time.perf_counter() - started)
        reports.append(replace(report, inputs=prove(inputs)))
    return reports, inputs, provider
