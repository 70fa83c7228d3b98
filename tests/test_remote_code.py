"""A checkpoint's own code as a reference: run where it is trusted, never unasked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import config_of

from vlmport.cli.main import main
from vlmport.runtime.errors import CheckpointError
from vlmport.validate.reference import load_reference

GOLDENS = Path(__file__).parent / "goldens" / "points1_5"
FUSED, PLAIN = GOLDENS / "tiny_a_custom_llama", GOLDENS / "tiny_b_qwen2"


REMOTE_CODE = """
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger, Qwen2VisionTransformerPretrainedModel


class Config(PretrainedConfig):
    model_type = "pointsv1.5_chat"

    def __init__(self, llm_config=None, vision_config=None, **others):
        self.llm_config, self.vision_config = llm_config or {}, vision_config or {}
        super().__init__(**others)


class Tower(Qwen2VisionTransformerPretrainedModel):
    def forward(self, pixels, grid_thw):
        return super().forward(pixels, grid_thw=grid_thw).last_hidden_state


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        llm, vision = Qwen2Config(**config.llm_config), Qwen2VLVisionConfig(**config.vision_config)
        llm._attn_implementation = vision._attn_implementation = "eager"
        self.llm = Qwen2ForCausalLM(llm)
        self.vision_encoder = Tower(vision)
        self.vision_projector = PatchMerger(dim=llm.hidden_size, context_dim=vision.embed_dim)
        self.post_init()
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plain checkpoint with Python files of its own: transformers' modules under upstream's names."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(PLAIN, tmp_path / "with_code"))
    config = config_of(folder)
    config["auto_map"] = {"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_code.py").write_text(REMOTE_CODE)
    return folder


def test_a_checkpoints_own_code_is_the_reference_where_it_is_trusted(
    with_code: Path, package_of: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["validate", str(package_of(PLAIN)), "--reference", str(with_code), "--variant", "fp32"]
    arguments += ["--limit", "3", "--no-sweep"]
    report = tmp_path / "report"
    assert main([*arguments, "--trust-remote-code", "--report", str(report)]) == 0
    document = json.loads((report / "report.json").read_text(encoding="utf-8"))
    assert "own Python files" in document["reference"]["code"]
    rows = {row["stage"]: row for row in document["variants"][0]["rows"]}
    assert {"vision", "projector", "inputs_embeds", "prefill_logits", "step_logits", "generated_ids"} <= set(rows)
    assert rows["prefill_logits"]["values"]["max_abs"] <= 1e-4
    capsys.readouterr()
    (with_code / "own_code.py").write_text("raise ImportError('needs\\nsome package')")
    assert main([*arguments, "--trust-remote-code"]) == 2
    assert "its own code does not load" in capsys.readouterr().err


def test_no_code_of_a_checkpoint_is_run_unasked(with_code: Path, tmp_path: Path) -> None:
    marker = tmp_path / "was run"
    (with_code / "own_code.py").write_text(f"open({str(marker)!r}, 'w')")
    assert "own modules" in load_reference(with_code).origin
    assert not marker.exists()


def test_trust_needs_a_reference_and_code(package_tiny_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(package_tiny_b), "--golden", str(PLAIN), "--trust-remote-code"]) == 2
    assert "add --reference" in capsys.readouterr().err
    other = GOLDENS.parent / "qwen2_5_vl" / "tiny_b"
    with pytest.raises(CheckpointError, match="leave out --trust-remote-code"):
        load_reference(other, trust_remote_code=True)
