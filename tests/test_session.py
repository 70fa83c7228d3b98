"""Opening graphs: quietly, on the right provider, and with an error that says what to install or mend."""

import subprocess
import sys
from pathlib import Path

import decoder_graph as tiny
import numpy as np
import onnxruntime
import pytest

from vlmport.runtime.errors import InputError, MissingDependencyError, PackageError
from vlmport.runtime.session import open_session


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("graph") / "decoder.onnx")


def test_specs_of_inputs_and_outputs(graph: Path) -> None:
    session = open_session(graph)
    assert session.inputs["inputs_embeds"].shape == ("batch", "sequence", tiny.D)
    assert session.inputs["inputs_embeds"].dtype == np.float32
    assert session.inputs["position_ids"].dtype == np.int64
    assert session.outputs["logits"].shape == ("batch", "kept", tiny.V)
    assert list(session.optional) == ["num_logits_to_keep"]


def test_an_initializer_that_is_also_an_input_causes_no_warning(graph: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_session(graph)
    assert capfd.readouterr() == ("", "")


def test_run_casts_to_the_types_of_the_graph(graph: Path) -> None:
    session = open_session(graph, num_threads=1)
    feeds = {
        "inputs_embeds": np.ones((1, 3, tiny.D), np.float64),
        "attention_mask": np.ones((1, 3), np.int32),
        "position_ids": np.zeros((3, 1, 3), np.int32)[:, :, ::-1],
        "num_logits_to_keep": np.array([2], np.int32),
    }
    past = np.zeros((1, tiny.KV, 3, tiny.HEAD), np.float32)
    feeds |= {f"past_key_values.{n}.{part}": past.copy() for n in range(2) for part in ("key", "value")}
    logits = session.run(feeds, ["logits"])["logits"]
    expected = tiny.reference(np.ones((3, tiny.D), np.float32), np.zeros((3, 3), np.int64))[-2:]
    np.testing.assert_allclose(logits[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "outputs", "message"),
    [
        ({"attention_mask": None}, ["logits"], "wants input 'attention_mask'"),
        ({"pixel_values": np.zeros(1)}, ["logits"], "has no input 'pixel_values'"),
        ({}, ["logits", "vision_features"], "has no output 'vision_features'"),
    ],
)
def test_inputs_and_outputs_that_do_not_fit(
    graph: Path, change: dict[str, np.ndarray | None], outputs: list[str], message: str
) -> None:
    session = open_session(graph)
    feeds = {name: np.zeros(1) for name in session.inputs} | change
    with pytest.raises(PackageError, match=message):
        session.run({name: array for name, array in feeds.items() if array is not None}, outputs)


@pytest.mark.parametrize("content", [b"", b"\x00", b"not a graph", None])
def test_a_file_that_is_no_graph(tmp_path: Path, content: bytes | None, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "decoder.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PackageError, match=r"decoder\.onnx: ONNX Runtime .* cannot load this graph: .+") as caught:
        open_session(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", [b"position_ids", b"logits", b"MatMul", b"sequence"])
def test_names_that_are_no_text_are_told_in_one_line(
    graph: Path, name: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's own wrapper would try again aloud, and its bindings raise UnicodeDecodeError."""
    path = graph.with_name("damaged.onnx")
    path.write_bytes(graph.read_bytes().replace(name, b"\xaa" + name[1:]))
    with pytest.raises(PackageError, match=r"damaged\.onnx: ONNX Runtime .* cannot load this graph: .+"):
        open_session(path)
    assert capfd.readouterr() == ("", "")


def test_what_the_graph_cannot_run_is_told_in_one_line(graph: Path, capfd: pytest.CaptureFixture[str]) -> None:
    session = open_session(graph)
    feeds = {name: np.zeros((2, 3, 5, 7)) for name in session.inputs}
    with pytest.raises(PackageError, match="cannot run this graph") as caught:
        session.run(feeds)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [0, -3, 100_000])
def test_thread_counts_that_make_no_sense(graph: Path, count: int) -> None:
    with pytest.raises(InputError, match=f"num_threads: {count}"):
        open_session(graph, num_threads=count)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime does have CUDA"
)
def test_a_cuda_package_without_cuda_names_the_extra(graph: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"no CUDAExecutionProvider.*vlmport\[gpu\]"):
        open_session(graph, "cuda")


def test_without_onnxruntime_the_runtime_imports_and_loading_names_the_extras(graph: Path) -> None:
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
sys.meta_path.insert(0, Absent())
import vlmport.runtime
from pathlib import Path
from vlmport.runtime.errors import MissingDependencyError
from vlmport.runtime.session import open_session
try:
    open_session(Path({str(graph)!r}))
except MissingDependencyError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "vlmport[cpu]" in run.stdout
    assert "vlmport[gpu]" in run.stdout


@pytest.mark.parametrize(
    ("flags", "asked"),
    [("flags : avx2 avx512_vnni", False), ("flags : avx2 avx_vnni", False), ("flags : avx2", True), ("", True)],
)
def test_the_slow_exact_kernel_is_asked_for_only_where_it_is_needed(
    graph: Path, flags: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmport.runtime.session._cpu_flags", lambda: flags)
    options = open_session(graph).raw.get_session_options()
    try:
        entry = options.get_session_config_entry("session.x64quantprecision")
    except RuntimeError:  # there is none of this name
        entry = "0"
    assert entry == ("1" if asked else "0")
