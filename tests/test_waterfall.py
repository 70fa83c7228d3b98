"""The chain of a waterfall: one thing swapped a step, to the cache in 8 bits and another provider."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from vlmport.cli.main import main
from vlmport.runtime.model import Model
from vlmport.runtime.package import Package
from vlmport.runtime.session import open_session
from vlmport.validate.samples import draw_picture
from vlmport.validate.stages import logits_without_cache, run_stages
from vlmport.validate.waterfall import Tally, chain_of, measure, summarise

VARIANT = "int4_kv8"


@pytest.fixture(scope="module")
def package(package_tiny_a: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """tiny_a with int4 on a cache in 8 bits."""
    folder = Path(shutil.copytree(package_tiny_a, tmp_path_factory.mktemp("kv") / "package"))
    arguments = ["quantize", str(folder), "--recipe", "int4", "--kv-cache", "int8", "--calibration", str(calibration)]
    assert main([*arguments, "--calibration-samples", "2"]) == 0
    return Package.open(folder)


@pytest.fixture(scope="module")
def steps(package, tmp_path_factory):
    """Steps by name; float32 through ONNX Runtime is the reference, a CPU with one thread the other provider."""
    content = [{"type": "image", "image": draw_picture(9, 84, 84)}, {"type": "text", "text": "And this?"}]
    with Model.load(package.path, "fp32") as model:
        prepared = model.prepare([{"role": "user", "content": content}])
        visual = model.features(prepared)
        embeds = model.embed(prepared, visual.features)
        first = logits_without_cache(model, prepared, embeds, [5, 6, 7])
    opened: list[Path] = []

    def base(path):
        opened.append(path)
        return open_session(path, num_threads=1)

    chain, tally = chain_of(package, VARIANT, tmp_path_factory.mktemp("made"), base), Tally()
    measure(package, chain, prepared, [5, 6, 7], first, first, tally, {False: {}, True: {}}, None)
    with Model.load(package.path, VARIANT) as model:
        last = run_stages(model, prepared, [5, 6, 7]).step_logits
    found = {step.name: step for step in summarise(chain, tally, None).steps}
    return found, opened, first, last


def test_every_step_is_there_in_its_order(steps):
    found, *_ = steps
    weights = [f"weights:{role}" for role in ("vision_encoder", "projector", "embed_tokens", "decoder")]
    last = ["activations", "cache", "kv_cache", "provider"]
    assert list(found) == ["preprocessing", "export", "dtype", *weights, *last]
    assert [name for name, step in found.items() if step.skipped] == ["dtype"]
    assert found["export"].cumulative.mean < 1e-12
    assert found["weights:decoder"].alone.mean > 1e-7


def test_the_cache_in_8_bits_is_a_step_of_its_own(steps):
    found, _, _, _ = steps
    assert found["cache"].alone.mean < 1e-9, "a float cache gives what one pass gives"
    assert found["kv_cache"].alone.mean > 1e-7


def test_the_provider_is_the_last_step_and_the_base_opens_all_others(steps):
    found, opened, first, last = steps
    assert found["provider"].alone.mean < 1e-9, "threads alone"
    assert len(opened) == len(set(opened)), "each graph is opened once"
    assert any(path.name.startswith("float_cache_") for path in opened)
    log_p, log_q = (side - np.logaddexp.reduce(side, -1, keepdims=True) for side in np.float64((first, last)))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert found["provider"].cumulative.mean == pytest.approx(kl, rel=1e-6)


def test_on_its_own_provider_there_is_nothing_to_swap(package, tmp_path):
    *_, cache, codes, provider = chain_of(package, "int4", tmp_path).links
    assert cache.through_cache
    assert "floats" in codes.skipped
    assert "CPU" in provider.skipped


def test_a_graph_that_the_cpu_does_not_take_keeps_its_provider(package, tmp_path):
    folder = Path(shutil.copytree(package.path, tmp_path / "package"))
    graph = folder / "onnx" / "projector.onnx"
    model = onnx.load(graph, load_external_data=False)
    model.graph.node[0].domain = "nowhere"
    model.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    onnx.save(model, graph)
    manifest = folder / "vlmport.json"
    manifest.write_text(manifest.read_text().replace('"target": "cpu"', '"target": "cuda"'))
    shutil.copy(graph, tmp_path)
    package = _unchecked(folder)
    provider = chain_of(package, "fp32", tmp_path).links[-1]
    assert "the CPU does not take projector" in provider.skipped


def _unchecked(folder: Path) -> Package:
    """A package whose files are not those of its manifest."""
    import json

    from vlmport.runtime.package import file_entry

    manifest = json.loads((folder / "vlmport.json").read_text())
    entry = file_entry(folder / "onnx" / "projector.onnx")
    manifest["files"]["onnx/projector.onnx"] = {"sha256": entry.sha256, "size": entry.size}
    (folder / "vlmport.json").write_text(json.dumps(manifest))
    return Package.open(folder)
