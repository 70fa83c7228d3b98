"""What one run of the benchmark found: JSON first, a table and Markdown made from it.

Times are in seconds, sizes in bytes, speeds in tokens a second.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

from vlmport.cli.bench import Spread
from vlmport.cli.table import table

from .calibration import Calibrated
from .floor import FloorTimes
from .process import Finished
from .profiling import OperatorTime
from .runtime import Loaded, VisionRun

__all__ = ["SCHEMA", "Decode", "ShapeReport", "VariantReport", "machine", "markdown", "merged", "rows", "text"]

SCHEMA = "vlmport-bench-shape/1"
_TOP = 8  # operators of a profile that are shown
_MISSING = "-"


@dataclass(frozen=True)
class Decode:
    """One token at a time on top of a context; each burst of tokens stands beside a reading of the bandwidth."""

    context: int  # tokens that the cache held when the first burst began
    speed: Spread
    bandwidth: Spread  # bytes a second, measured before and after every burst
    share: Spread  # of the roof: weight bytes a token x speed / the faster of the two readings beside the burst


@dataclass(frozen=True)
class VariantReport:
    """One recipe. What was not measured is None or empty."""

    export: Finished | None = None
    floor: FloorTimes | None = None
    calibrated: tuple[Calibrated, ...] = ()  # by number of samples
    package_size: int | None = None  # of the variant's files, each counted once
    nodes: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])  # by role and operator
    weight_bytes: int | None = None  # that a decode step reads
    cache_bytes: int | None = None  # a token of context, of all layers
    load: Loaded | None = None
    prepare: Finished | None = None
    load_prepared: Loaded | None = None
    decode_prepared: Decode | None = None  # at the first context
    vision: dict[str, tuple[VisionRun, ...]] = field(default_factory=dict[str, tuple[VisionRun, ...]])
    float32_speedup: Spread | None = None  # of the vision tower at 448x448, pair by pair with a float32 tower
    large: VisionRun | None = None  # 1792x1792
    prefill: dict[str, float] = field(default_factory=dict[str, float])  # tokens a second by prompt length
    decode: tuple[Decode, ...] = ()
    peak_memory: int | None = None  # of the process that did all of the above but the large image
    steady_memory: tuple[int, ...] = ()  # bytes but for mapped files, after 50, 100, 150 and 200 steps
    profile: dict[str, tuple[OperatorTime, ...]] = field(default_factory=dict[str, tuple[OperatorTime, ...]])


@dataclass(frozen=True)
class ShapeReport:
    """What build/bench-<shape>.json holds."""

    schema: str
    shape: str
    about: str
    date: str
    box: dict[str, str]
    num_threads: int
    checkpoint_size: int
    num_parameters: int
    variants: dict[str, VariantReport]


Row = tuple[str, Callable[[VariantReport], str | None]]


def rows(report: ShapeReport) -> list[tuple[str, ...]]:
    """The measured rows: a name, and a cell a variant."""
    variants = list(report.variants.values())
    names = list(dict.fromkeys(name for variant in variants for name in variant.vision))
    lengths = list(dict.fromkeys(length for variant in variants for length in variant.prefill))
    contexts = list(dict.fromkeys(decode.context for variant in variants for decode in variant.decode))
    samples = list(dict.fromkeys(run.data.num_samples for variant in variants for run in variant.calibrated))
    wanted: list[Row] = [
        ("export", lambda v: v.export and f"{v.export.seconds:.1f} s"),
        ("floor: read + quantize + write", lambda v: v.floor and _floor(v.floor)),
        (
            "sha256 of checkpoint and package, one core",
            lambda v: v.floor and v.floor.digest and f"{v.floor.digest:.1f} s",
        ),
        ("export / floor", lambda v: v.export and v.floor and f"{v.export.seconds / v.floor.total:.2f}"),
        ("export, peak RSS of the process tree", lambda v: v.export and _gb(v.export.peak_tree)),
        ("export, bytes read", lambda v: v.export and _gb(v.export.bytes_read)),
        ("export, bytes written", lambda v: v.export and _gb(v.export.bytes_written)),
        *(row for number in samples for row in _calibrated_rows(number)),
        ("package", lambda v: v.package_size and _gb(v.package_size)),
        ("load", lambda v: v.load and f"{v.load.seconds:.2f} s"),
        ("RSS after load", lambda v: v.load and _gb(v.load.after.resident)),
        ("RSS after load / package", lambda v: v.load and _ratio(v.load.after.resident, v.package_size)),
        ("prepare, once a box", lambda v: v.prepare and f"{v.prepare.seconds:.1f} s"),
        ("load, prepared", lambda v: v.load_prepared and f"{v.load_prepared.seconds:.2f} s"),
        ("RSS after load, prepared", lambda v: v.load_prepared and _gb(v.load_prepared.after.resident)),
        ("decode, prepared, tokens/s", lambda v: v.decode_prepared and _cell(v.decode_prepared.speed, 1)),
        *((f"vision {name}", _vision_cell(name)) for name in names),
        ("speed of vision 448x448 over a float32 tower", lambda v: v.float32_speedup and _cell(v.float32_speedup, 2)),
        ("vision 1792x1792, one run", lambda v: v.large and f"{v.large.seconds:.1f} s"),
        ("vision 1792x1792, peak RSS above the loaded model", lambda v: v.large and _gb(v.large.peak_above)),
        *((f"prefill of {length}, tokens/s", _prefill_cell(length)) for length in lengths),
        *((f"decode at {context}, tokens/s", _decode_cell(context, "speed")) for context in contexts),
        ("weights read a token", lambda v: v.weight_bytes and _gb(v.weight_bytes)),
        *((f"cache read a token at {context}", _cache_cell(context)) for context in contexts),
        *((f"bandwidth beside decode at {context}, GB/s", _decode_cell(context, "bandwidth")) for context in contexts),
        *((f"decode at {context}, share of the roof", _decode_cell(context, "share")) for context in contexts),
        ("peak RSS of the runtime", lambda v: v.peak_memory and _gb(v.peak_memory)),
        (
            "MB of its own after 50 .. 200 decode steps",
            lambda v: " ".join(f"{b / 1e6:.0f}" for b in v.steady_memory) or None,
        ),
    ]
    cells = [(name, *(str(cell(v) or _MISSING) for v in variants)) for name, cell in wanted]
    return [row for row in cells if set(row[1:]) != {_MISSING}]


def text(report: ShapeReport) -> str:
    """The tables as plain text."""
    header = (report.shape, *report.variants)
    parts = [machine(report), table(header, rows(report), "<" + ">" * len(report.variants))]
    for name, variant in report.variants.items():
        for stage, operators in variant.profile.items():
            parts.append(table((f"{name}: {stage}", *_PROFILE), _profile_rows(operators), "<>>>"))
    return "\n\n".join(parts)


def markdown(report: ShapeReport) -> str:
    """The same for docs/performance.md."""
    parts = [f"{machine(report)}\n", _markdown_table((report.shape, *report.variants), rows(report))]
    for name, variant in report.variants.items():
        for stage, operators in variant.profile.items():
            parts.append(_markdown_table((f"{name}: {stage}", *_PROFILE), _profile_rows(operators)))
    return "\n".join(parts)


def machine(report: ShapeReport) -> str:
    """What the figures depend on, in one line, as the machine itself tells it."""
    told = report.box
    version, date = f"ONNX Runtime {told.get('onnxruntime', '?')}", report.date
    return f"{told.get('cpu', '?')}, {report.num_threads} cores, {told.get('memory', '?')}, {version}, {date}"


def merged(old: ShapeReport, new: ShapeReport) -> ShapeReport:
    """The new report, with what only the old one has measured: other recipes, and other parts of the same."""
    variants = dict(old.variants)
    for name, variant in new.variants.items():
        before = variants.get(name, VariantReport())
        kept = {f.name: getattr(before, f.name) for f in fields(variant) if getattr(variant, f.name) in (None, {}, ())}
        variants[name] = replace(variant, **kept)
    return replace(new, variants=variants)


_PROFILE = ("ms a run", "share", "calls")


def _profile_rows(operators: Sequence[OperatorTime]) -> list[tuple[str, ...]]:
    shown = [
        (item.operator, f"{item.seconds * 1000:,.1f}", f"{item.share:.1%}", f"{item.num_calls:,.0f}")
        for item in operators[:_TOP]
    ]
    rest = operators[_TOP:]
    if rest:
        seconds, share, calls = (
            sum(getattr(item, name) for item in rest) for name in ("seconds", "share", "num_calls")
        )
        shown.append((f"{len(rest)} others", f"{seconds * 1000:,.1f}", f"{share:.1%}", f"{calls:,.0f}"))
    return shown


def _markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    marks = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, marks, *lines))


def _calibrated_rows(num_samples: int) -> list[Row]:
    """Those of an export on so many samples."""

    def cell(tell: Callable[[Calibrated], str]) -> Callable[[VariantReport], str | None]:
        return lambda variant: next(
            (tell(run) for run in variant.calibrated if run.data.num_samples == num_samples), None
        )

    def seconds(run: Calibrated) -> str:
        return ", ".join(f"{role} {run.seconds[role]:.1f} s x {run.stages[role]}" for role in run.seconds)

    name = f"export calibrated on {num_samples} pairs"
    return [
        (name, cell(lambda run: f"{run.variant}: {run.export.seconds:.0f} s, {run.data.num_tokens:,} tokens")),
        (f"{name}, peak RSS of the process tree", cell(lambda run: _gb(run.export.peak_tree))),
        (f"{name}, a stage", cell(seconds)),
    ]


def _vision_cell(name: str) -> Callable[[VariantReport], str | None]:
    def cell(variant: VariantReport) -> str | None:
        runs = variant.vision.get(name)
        return f"{_cell(Spread.of(run.seconds for run in runs), 2)} s" if runs else None

    return cell


def _prefill_cell(length: str) -> Callable[[VariantReport], str | None]:
    return lambda variant: f"{variant.prefill[length]:.1f}" if length in variant.prefill else None


def _decode_cell(context: int, name: str) -> Callable[[VariantReport], str | None]:
    def cell(variant: VariantReport) -> str | None:
        for decode in variant.decode:
            if decode.context == context:
                spread: Spread = getattr(decode, name)
                if name == "share":
                    return f"{spread.median:.0%} ({spread.low:.0%}-{spread.high:.0%})"
                return _cell(spread, 1, 1e9 if name == "bandwidth" else 1)
        return None

    return cell


def _cache_cell(context: int) -> Callable[[VariantReport], str | None]:
    return lambda variant: variant.cache_bytes and _gb(variant.cache_bytes * context)


def _floor(floor: FloorTimes) -> str:
    return f"{floor.total:.1f} s ({floor.read:.1f} + {floor.quantize:.1f} + {floor.write:.1f})"


def _cell(spread: Spread, digits: int, scale: float = 1.0) -> str:
    low, median, high = (f"{value / scale:.{digits}f}" for value in (spread.low, spread.median, spread.high))
    return median if low == high else f"{median} ({low}-{high})"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _ratio(size: int, of: int | None) -> str | None:
    return f"{size / of:.2f}" if of else None
