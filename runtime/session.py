"""Opens one graph of a package in ONNX Runtime, which is imported here and only when a graph is opened."""

import importlib
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import CapacityError, InputError, MissingDependencyError, PackageError

__all__ = [
    "Array",
    "Device",
    "GraphSession",
    "TensorSpec",
    "open_session",
    "ort_value",
    "require_onnxruntime",
    "save_prepared",
]

Array = NDArray[Any]
Device = Literal["cpu", "cuda"]

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}
_ARENAS = {"cpu": "cpu:0", "cuda": "gpu:0;cpu:0"}
_MAX_THREADS = 1024  # more would take minutes to start
_FATAL_ONLY = 4
_NO_ROOM = 1 << 20  # bytes: a disk with less is full
_ERRORS_ONLY = 3  # ONNX Runtime warns of every initializer that is also an input, as num_logits_to_keep is on purpose


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. A dimension is a number, a name, or None where it has neither."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


class GraphSession:
    """A loaded graph: what goes in, what comes out, and one call that runs it."""

    def __init__(self, raw: Any, path: Path, device: Device) -> None:
        self.raw = raw  # the onnxruntime.InferenceSession, for IO binding
        self.path = path
        self.device: Device = device
        self.inputs = {item.name: _tensor_spec(item, path) for item in raw.get_inputs()}
        self.optional = {item.name: _tensor_spec(item, path) for item in raw.get_overridable_initializers()}
        self.outputs = {item.name: _tensor_spec(item, path) for item in raw.get_outputs()}

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None, *, release_memory: bool = False
    ) -> dict[str, Array]:
        """Runs the graph and returns the named outputs (all by default) as numpy arrays.

        Arrays are cast to the element type that the graph declares. release_memory: hands working memory back to the
        system afterwards, for graphs that need much of it now and then (it costs nothing measurable in those). Raises
        PackageError where the graph wants an input that `feeds` lacks or has no input of a given name, or lacks an
        output.
        """
        names = list(outputs) if outputs is not None else list(self.outputs)
        self.expect(inputs=feeds, outputs=names)
        options = importlib.import_module("onnxruntime").RunOptions()
        if release_memory:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", _ARENAS[self.device])
        with self.told_by_file():
            return dict(zip(names, self.raw.run(names, self.cast(feeds), options), strict=True))

    def metadata(self, name: str) -> str | None:
        """An entry of the graph's metadata, or None."""
        return self.raw.get_modelmeta().custom_metadata_map.get(name)

    @contextmanager
    def told_by_file(self) -> Generator[None]:
        """What ONNX Runtime raises while the graph runs becomes a PackageError in one line."""
        try:
            yield
        except _ort_errors() as error:
            raise PackageError(
                f"{self.path}: ONNX Runtime cannot run this graph ({_first_line(error)}); check the package with "
                "`vlmport verify`, or export the checkpoint again"
            ) from error

    def cast(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The same arrays, contiguous and of the element types that the graph declares."""
        specs = self.inputs | self.optional
        return {name: np.ascontiguousarray(array, dtype=specs[name].dtype) for name, array in feeds.items()}

    def expect(self, *, inputs: Mapping[str, object] | Sequence[str], outputs: Sequence[str]) -> None:
        """Raises PackageError unless the graph takes exactly `inputs` (optional ones aside) and has `outputs`."""
        missing = [name for name in self.inputs if name not in inputs]
        unknown = [name for name in inputs if name not in self.inputs and name not in self.optional]
        absent = [name for name in outputs if name not in self.outputs]
        for names, what in ((missing, "wants input"), (unknown, "has no input"), (absent, "has no output")):
            if names:
                raise PackageError(
                    f"{self.path}: the graph {what} {', '.join(map(repr, names))}, against what vlmport.json says; "
                    "export the checkpoint again"
                )


def open_session(
    path: Path,
    target: Device = "cpu",
    *,
    num_threads: int | None = None,
    profile: Path | None = None,
    cuda_graph: bool = False,
) -> GraphSession:
    """Loads a graph for the target of its package: "cpu" on the CPU, "cuda" on the GPU with no silent fall-back.

    num_threads: threads of one operator; None leaves the choice to ONNX Runtime (one a physical core). profile: ONNX
    Runtime writes down what it runs, into a file whose name begins so (see placement.py). cuda_graph: calls can be
    captured and replayed (see device.py).
    Raises MissingDependencyError without a fitting onnxruntime, PackageError for a graph that it cannot load.
    """
    if num_threads is not None and not 1 <= num_threads <= _MAX_THREADS:
        raise InputError(
            f"num_threads: {num_threads} is not between 1 and {_MAX_THREADS}; leave it out for one thread a core"
        )
    ort = require_onnxruntime(target)
    options = _options(ort)
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        raw = ort.InferenceSession(
            str(path), sess_options=options, providers=_providers(target, cuda_graph), enable_fallback=0
        )
        session = GraphSession(raw, path, target)
    except _ort_errors() as error:
        raise PackageError(
            f"{path}: ONNX Runtime {ort.__version__} cannot load this graph: {_first_line(error)}"
        ) from error
    if target == "cuda" and "CUDAExecutionProvider" not in raw.get_providers():
        raise MissingDependencyError(
            f"{path}: onnxruntime-gpu {ort.__version__} is installed, but its CUDA provider did not start; install the "
            "CUDA and cuDNN libraries it was built for, or export with --target cpu"
        )
    return session


def save_prepared(path: Path, graph: Path, data: Path) -> None:
    """Loads a graph on the CPU and saves it as ONNX Runtime then holds it: optimized, and with the packed weights.

    Raises PackageError for a graph that it cannot load, CapacityError where it cannot write.
    """
    ort = require_onnxruntime()
    options = _options(ort)
    options.log_severity_level = _FATAL_ONLY  # it warns that the file fits this machine alone, which is the point
    options.optimized_model_filepath = str(graph)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data.name)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        ort.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except _ort_errors() as error:
        # It tells a full disk as any other failure, so ask the disk.
        if shutil.disk_usage(graph.parent).free < _NO_ROOM:
            raise CapacityError(f"{data}: cannot be written, the disk is full; make room") from error
        raise PackageError(f"{path}: ONNX Runtime {ort.__version__} cannot save it: {_first_line(error)}") from error


def ort_value(array: Array, device: Device = "cpu") -> Any:
    """An OrtValue on the device. On the CPU it shares the array's memory (and keeps the array alive)."""
    return importlib.import_module("onnxruntime").OrtValue.ortvalue_from_numpy(array, device, 0)


def require_onnxruntime(target: Device = "cpu") -> Any:
    """The onnxruntime module. Raises MissingDependencyError naming the extra where it is absent or lacks CUDA."""
    extra = "gpu" if target == "cuda" else "cpu"
    try:
        ort = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":  # it is installed, and something that it needs is not
            raise
        raise MissingDependencyError(
            "onnxruntime is not installed: `pip install 'vlmport[cpu]'`, or `pip install 'vlmport[gpu]'` for a package "
            f"made with --target cuda (this one wants {extra!r})"
        ) from None
    if target == "cuda":
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise MissingDependencyError(
                f"the installed onnxruntime {ort.__version__} has no CUDAExecutionProvider, which a package of target "
                "cuda needs: `pip uninstall onnxruntime`, `pip install 'vlmport[gpu]'`; or export with --target cpu"
            )
        ort.preload_dlls()  # finds the CUDA libraries that pip installed, which are on no search path
    return ort


def _adds_in_32_bits(flags: str) -> bool:
    """Whether a CPU adds up 8-bit products without a step in 16 bits, which overflows: with VNNI it does."""
    return "vnni" in flags


def _cpu_flags() -> str:
    """What Linux says of the first core; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")


def _options(ort: Any) -> Any:
    """What every session has: a copy is saved with the kernels that will read it."""
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if not _adds_in_32_bits(_cpu_flags()):
        # Exact, by a kernel that is slower; where VNNI is, it would be 3.7 times slower and equal to the bit.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _providers(target: Device, cuda_graph: bool) -> list[Any]:
    if target == "cpu":
        return ["CPUExecutionProvider"]
    # TF32 keeps 10 bits of mantissa: it would show up in the parity report as an error of ours.
    return [
        ("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": str(int(cuda_graph))}),
        "CPUExecutionProvider",
    ]


def _ort_errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's own exceptions share no base class below Exception. Names in a damaged graph may be no UTF-8."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented")
    return (*(getattr(state, name) for name in names), state.RuntimeException, UnicodeDecodeError)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _tensor_spec(item: Any, path: Path) -> TensorSpec:
    if item.type not in _DTYPES:
        raise PackageError(f"{path}: {item.name!r} is a {item.type}, which this version cannot run; update vlmport")
    shape = tuple(dim if isinstance(dim, (int, str)) else None for dim in item.shape)
    return TensorSpec(item.name, np.dtype(_DTYPES[item.type]), shape)
