"""One run of the benchmark: checkpoint, export, load, vision, prefill, decode, profile, in processes of their own."""

import os
import shutil
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from vlmport.cli.bench import Spread, box
from vlmport.runtime.package import Package

from .calibration import Calibrated, calibrate
from .checkpoint import make_checkpoint
from .floor import Floor, forget_cached
from .graphs import count_nodes, weight_bytes
from .plan import Plan, VisionCase
from .process import Actor, run_watched
from .profiling import Profiler
from .report import SCHEMA, Decode, ShapeReport, VariantReport
from .roof import Roof
from .runtime import Runtime, VisionRun
from .shapes import load_shape

__all__ = ["run"]

_LARGE = (1792, 1792)
_BASELINE = Path(__file__).parent / "recipes" / "float32-vision.json"
_WARM_UP = 2  # decode steps
_INSTRUCTIONS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
_STEADY_STEPS = (50, 100, 150, 200)


def run(plan: Plan) -> ShapeReport:
    """Measures every recipe of the plan. Raises CalledProcessError where a command fails."""
    shape = load_shape(plan.shape)
    (plan.folder / "packages").mkdir(parents=True, exist_ok=True)
    os.environ["VLMPORT_CACHE"] = str(_prepared_copies(plan).resolve())  # not the user's own, which packages may be in
    shutil.rmtree(_prepared_copies(plan), ignore_errors=True)
    checkpoint = plan.checkpoint or plan.folder / "checkpoints" / shape.name
    if not (checkpoint / "config.json").is_file():
        _say(f"making the checkpoint {checkpoint}")
        make_checkpoint(shape, checkpoint)
    weights = sorted(checkpoint.glob("*.safetensors"))
    variants: dict[str, VariantReport] = {}
    towers: dict[str, VariantReport] = {}  # by the precision of the vision encoder: equal ones are measured once
    for recipe in plan.recipes:
        variants[recipe] = _variant(plan, recipe, checkpoint, towers)
    package = Package.open(_package(plan, plan.recipes[0]))
    return ShapeReport(
        schema=SCHEMA,
        shape=shape.name,
        about=shape.about,
        date=datetime.now(UTC).date().isoformat(),
        box=box() | {"onnxruntime": _version("onnxruntime"), "cpu": _cpu_name(), "memory": _memory_size()},
        num_threads=plan.num_threads,
        checkpoint_size=sum(file.stat().st_size for file in weights),
        num_parameters=package.manifest.source.num_parameters,
        variants=variants,
    )


def _variant(plan: Plan, recipe: str, checkpoint: Path, towers: dict[str, VariantReport]) -> VariantReport:
    report = _export(plan, recipe, checkpoint, VariantReport())
    path = _package(plan, recipe)
    package = Package.open(path)
    cache = package.manifest.cache
    assert cache is not None, f"{path}: a package without a decoder"
    graphs = {role: package.graph_path(role, recipe) for role in package.manifest.roles}
    report = replace(
        report,
        package_size=package.size(recipe),
        nodes={role: count_nodes(file) for role, file in graphs.items()},
        weight_bytes=weight_bytes(graphs["decoder"]),
        cache_bytes=2 * cache.num_layers * cache.num_kv_heads * cache.head_dim * (4 if cache.dtype == "float32" else 2),
    )
    tower = package.variant(recipe).graphs["vision_encoder"].precision
    known = towers.get(tower)
    report = _runtime(plan, recipe, report, with_vision=known is None)
    if known is not None:
        report = replace(
            report,
            vision=known.vision,
            float32_speedup=known.float32_speedup,
            large=known.large,
            profile={"vision": known.profile["vision"], **report.profile} if known.profile else report.profile,
        )
    else:
        if "float32" in plan.parts:
            report = replace(report, float32_speedup=_float32(plan, recipe, checkpoint))
        if "large" in plan.parts:
            _say(f"{recipe}: vision {_LARGE[0]}x{_LARGE[1]}")
            with Actor(Runtime, path, recipe) as runtime:
                runtime.ask("load")
                report = replace(report, large=runtime.ask("vision", [_LARGE]))
        towers[tower] = report
    if "calibrate" in plan.parts:
        report = replace(report, calibrated=_calibrated(plan, recipe, checkpoint))
    if "prepare" in plan.parts:
        report = _prepared(plan, recipe, report)
    return report


def _export(plan: Plan, recipe: str, checkpoint: Path, report: VariantReport) -> VariantReport:
    """The export and its floor. Both read the checkpoint from the disk: its pages are dropped before."""
    path = _package(plan, recipe)
    if "export" in plan.parts or not path.exists():
        _say(f"{recipe}: export")
        forget_cached(sorted(checkpoint.glob("*.safetensors")))
        command = [*_VLMPORT, "export", str(checkpoint), "-o", str(path), "--recipe", recipe, "--overwrite"]
        report = replace(report, export=run_watched(command, path.with_suffix(".log")))
    if "floor" in plan.parts:
        _say(f"{recipe}: floor of the export")
        with Actor(Floor, checkpoint) as floor:
            report = replace(report, floor=floor.ask("measure", recipe, path))
    return report


def _calibrated(plan: Plan, recipe: str, checkpoint: Path) -> tuple[Calibrated, ...]:
    found: list[Calibrated] = []
    for num_samples in plan.calibration:
        _say(f"{recipe}: export with {plan.method} on {num_samples} samples")
        package = _package(plan, f"{recipe}-{plan.method}")
        found.append(calibrate(checkpoint, package, recipe, plan.method, num_samples))
    return tuple(found)


def _runtime(plan: Plan, recipe: str, report: VariantReport, *, with_vision: bool) -> VariantReport:
    """Load, vision, text and memory of one process, as a request would have them one after the other."""
    path = _package(plan, recipe)
    with Actor(Runtime, path, recipe) as runtime:
        if {"load", "vision", "text", "steady"} & set(plan.parts):
            _say(f"{recipe}: load")
            report = replace(report, load=runtime.ask("load"))
        if "vision" in plan.parts and with_vision:
            report = replace(report, vision={case[0]: _vision(runtime, recipe, case) for case in plan.vision})
        if "text" in plan.parts:
            report = _text(plan, recipe, runtime, report)
            report = replace(report, peak_memory=runtime.ask("peak"))
        if "steady" in plan.parts:
            _say(f"{recipe}: memory of {_STEADY_STEPS[-1]} decode steps")
            report = replace(report, steady_memory=tuple(runtime.ask("steady", _STEADY_STEPS)))
    if "profile" in plan.parts:
        _say(f"{recipe}: profile")
        with Actor(Profiler, path, recipe) as profiler:
            prefill, decode = profiler.ask("decoder", plan.prefill[0], plan.profile_steps)
            stages = {f"prefill of {plan.prefill[0]}": tuple(prefill), "decode": tuple(decode)}
            if with_vision:
                stages = {"vision": tuple(profiler.ask("vision", plan.vision[0][1][0])), **stages}
        report = replace(report, profile=stages)
    return report


def _vision(runtime: Actor, recipe: str, case: VisionCase) -> tuple[VisionRun, ...]:
    name, sizes, times = case
    _say(f"{recipe}: vision {name}")
    if times > 1:
        runtime.ask("vision", sizes)  # warms up
    return tuple(runtime.ask("vision", sizes) for _ in range(times))


def _text(plan: Plan, recipe: str, runtime: Actor, report: VariantReport) -> VariantReport:
    """Prefill and decode. A context is reached by a prefill, so that the cache holds what that of a request would."""
    prefill: dict[str, float] = {}
    for length in plan.prefill:
        _say(f"{recipe}: prefill of {length}")
        for _ in range(2 if length == plan.prefill[0] else 1):  # the second of the first also leaves warming up behind
            runtime.ask("start", length)
            prefill[str(length)] = length / runtime.ask("prefill", length)
    decode: list[Decode] = []
    decoded = _WARM_UP + plan.bursts * plan.burst_tokens
    runtime.ask("start", plan.contexts[-1] + decoded)
    held = 0
    with Actor(Roof, plan.roof_bytes, plan.num_threads) as roof:
        for context in plan.contexts:
            _say(f"{recipe}: decode at {context}")
            runtime.ask("prefill", context - held)
            decode.append(_decode(plan, runtime, roof, context, report.weight_bytes or 0))
            held = context + decoded
    return replace(report, prefill=prefill, decode=tuple(decode))


def _decode(plan: Plan, runtime: Actor, roof: Actor, context: int, num_bytes: int) -> Decode:
    """Bursts of decoding between readings of the bandwidth; the faster neighbour is the roof of a burst."""
    runtime.ask("decode", _WARM_UP)
    readings = [roof.ask("measure")]
    speeds: list[float] = []
    for _ in range(plan.bursts):
        time.sleep(0.2)  # threads of the other process still spin
        speeds.append(plan.burst_tokens / runtime.ask("decode", plan.burst_tokens))
        time.sleep(0.2)
        readings.append(roof.ask("measure"))
    roofs = [max(pair) for pair in pairwise(readings)]
    shares = [num_bytes * speed / reading for speed, reading in zip(speeds, roofs, strict=True)]
    return Decode(context, Spread.of(speeds), Spread.of(readings), Spread.of(shares))


def _float32(plan: Plan, recipe: str, checkpoint: Path) -> Spread:
    """How many times faster the tower is than in float32; the two take turns."""
    path = _package(plan, recipe)
    _say(f"{recipe}: a float32 tower to compare with")
    command = [*_VLMPORT, "quantize", str(path), "--recipe", str(_BASELINE), "--checkpoint", str(checkpoint)]
    run_watched(command, path.with_suffix(".float32.log"))
    size = plan.vision[0][1]
    with Actor(Runtime, path, recipe) as own, Actor(Runtime, path, _BASELINE.stem) as float32:
        for runtime in (own, float32):
            runtime.ask("load", ["vision_encoder", "projector"])
            runtime.ask("vision", size)  # warms up
        pairs = [(float32.ask("vision", size), own.ask("vision", size)) for _ in range(plan.pairs)]
    return Spread.of(slow.seconds / fast.seconds for slow, fast in pairs)


def _prepared(plan: Plan, recipe: str, report: VariantReport) -> VariantReport:
    """The copy that belongs to this box, and a load by it; removed again, as it would speed up the next load."""
    path = _package(plan, recipe)
    _say(f"{recipe}: prepare")
    command = [*_VLMPORT, "prepare", str(path), "--variant", recipe]
    finished = run_watched(command, path.with_suffix(".prepare.log"))
    with Actor(Runtime, path, recipe) as runtime:
        report = replace(report, prepare=finished, load_prepared=runtime.ask("load"))
        if "text" in plan.parts:
            first = replace(plan, prefill=(), contexts=plan.contexts[:1])
            report = replace(report, decode_prepared=_text(first, recipe, runtime, report).decode[0])
    shutil.rmtree(_prepared_copies(plan))
    return report


def _prepared_copies(plan: Plan) -> Path:
    return plan.folder / "prepared"


_VLMPORT = (sys.executable, "-m", "vlmport.cli.main")


def _package(plan: Plan, recipe: str) -> Path:
    return plan.folder / "packages" / f"{plan.shape}-{recipe}"


def _say(what: str) -> None:
    print(f"bench {time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _version(distribution: str) -> str:
    from importlib.metadata import version

    return version(distribution)


def _cpu_name() -> str:
    """The model, and which of the instructions for products of small integers it has."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = told.get("flags", told.get("Features", "")).split()
    found = [flag for flag in flags if flag in _INSTRUCTIONS]
    return f"{told.get('model name', 'unknown CPU')} ({', '.join(found) or 'no VNNI'})"


def _memory_size() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB"
