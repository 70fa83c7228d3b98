"""Connectors over frames: the numbers of convolutions over whole clips, whatever shares a call, traced or eager."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from vlmport.export.families.videollama2 import FAMILY
from vlmport.export.layers.connector import ConnectorConfig, MeanProjector, WindowConnector
from vlmport.export.layers.regnet import RegStage
from vlmport.export.layers.repeat import BlockRunner
from vlmport.export.lower import lower
from vlmport.export.trace import trace
from vlmport.runtime.connector import frame_shares, frame_windows, num_connector_rows
from vlmport.runtime.errors import InputError, PackageError
from vlmport.runtime.manifest import ConnectorSpec, VisionSpec

TABLE = Path(__file__).parent / "goldens" / "videollama2" / "tables" / "connector_tokens.json"
KINDS = {
    "stc_connector": ConnectorSpec("windows", 4, (2, 2, 2), 1),
    "stc_connector_v35": ConnectorSpec("windows", 4, (2, 2, 2), 0),
    "stp_connector": ConnectorSpec("windows", 4, (2, 2, 2), 0),
    "spatial_conv": ConnectorSpec("windows", 4, (1, 2, 2), 1),
    "spatial_pool": ConnectorSpec("windows", 4, (1, 2, 2), 0),
}
POOLS, SHALLOW = ("stp_connector", "spatial_pool"), ("spatial_conv", "spatial_pool")
WIDTH, OUT = 6, 8


def vision(connector: ConnectorSpec) -> VisionSpec:
    return VisionSpec((), 1, 0, connector=connector)


def random_module(module: torch.nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for values in module.parameters():
        values.data = 0.5 * torch.randn(values.shape, generator=generator)
    return module.eval()


def window_connector(kind: str, side: int) -> WindowConnector:
    spec, width = KINDS[kind], OUT if kind in SHALLOW else WIDTH
    depth = 0 if kind in SHALLOW else 4
    return random_module(
        WindowConnector(ConnectorConfig(width, OUT, side, spec.kernel, spec.padding, kind in POOLS, depth))
    )


def as_upstream(module: WindowConnector, kind: str, clip_TPC: torch.Tensor, side: int) -> torch.Tensor:
    """One clip by convolutions of two and three dimensions over channels first, as upstream's modules do it."""
    spec = KINDS[kind]
    x = clip_TPC.reshape(-1, side, side, clip_TPC.shape[-1]).permute(0, 3, 1, 2)
    x = stage(module.s1, x) if module.has_stages else x
    x = x.permute(1, 0, 2, 3)[None]
    if kind in POOLS:
        x = functional.avg_pool3d(x, spec.kernel)
    else:
        conv = module.sampler.conv
        kernel = conv.weight.reshape(OUT, OUT, *spec.kernel)
        x = functional.conv3d(x, kernel, conv.bias, stride=spec.kernel, padding=spec.padding)
    x = functional.silu(x)[0].permute(1, 0, 2, 3)
    x = stage(module.s2, x) if module.has_stages else x
    return module.readout(x.permute(0, 2, 3, 1).reshape(-1, OUT))


def stage(blocks: RegStage, x: torch.Tensor) -> torch.Tensor:
    for block in blocks.values():
        x = reg_block(block, x)
    return x


def reg_block(block: Any, x: torch.Tensor) -> torch.Tensor:
    def conv(part: Any, x: torch.Tensor) -> torch.Tensor:
        groups = x.shape[1] if part.conv.weight.ndim == 4 else 1
        kernel = part.conv.weight if groups > 1 else part.conv.weight[:, :, None, None]
        y = functional.conv2d(x, kernel, padding=int(groups > 1), groups=groups)
        norm = functional.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2], part.bn.weight, part.bn.bias, 1e-5)
        return norm.permute(0, 3, 1, 2)

    y = functional.silu(conv(block.conv2, functional.silu(conv(block.conv1, x))))
    gate = y.mean((2, 3))
    gate = torch.sigmoid(block.se.fc2(functional.silu(block.se.fc1(gate))))
    y = conv(block.conv3, y * gate[:, :, None, None])
    shortcut = x if isinstance(block.downsample, torch.nn.Identity) else conv(block.downsample, x)
    return functional.silu(y + shortcut)


@settings(max_examples=12)
@given(st.sampled_from(list(KINDS)), st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(2, 7))
def test_clips_and_stills_in_one_call_are_what_upstream_computes_of_each(
    kind: str, lengths: list[int], side: int
) -> None:
    module = window_connector(kind, side)
    spec, places, width = vision(KINDS[kind]), side * side, OUT if kind in SHALLOW else WIDTH
    generator = torch.Generator().manual_seed(sum(lengths))
    clips = [torch.randn(length, places, width, generator=generator) for length in lengths]
    grids = [(length, side, side) for length in lengths]
    windows = torch.from_numpy(frame_windows(spec, grids))
    with torch.no_grad():
        found = module(torch.cat(clips).reshape(-1, width), windows)
        shown = [clip.expand(4, -1, -1) if len(clip) == 1 else clip for clip in clips]
        expected = [as_upstream(module, kind, clip, side) for clip in shown]
    assert [len(rows) for rows in expected] == [num_connector_rows(spec, grid) for grid in grids]
    np.testing.assert_allclose(found, torch.cat(expected), atol=2e-5)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_the_mean_is_over_the_frames_of_each_clip(lengths: list[int]) -> None:
    module = random_module(MeanProjector(WIDTH, OUT, 9, 2))
    spec, grids = vision(ConnectorSpec("mean", 4)), [(length, 3, 3) for length in lengths]
    clips = [torch.randn(length, 9, WIDTH) for length in lengths]
    shares = torch.from_numpy(frame_shares(spec, grids))
    with torch.no_grad():
        found = module(torch.cat(clips).reshape(-1, WIDTH), shares)
        expected = torch.cat([module.mlp(clip.mean(0)) for clip in clips])
    assert len(found) == sum(num_connector_rows(spec, grid) for grid in grids)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_squeeze_of_half_a_channel_rounds_to_even() -> None:
    for width, inner in ((10, 2), (14, 4), (42, 10)):
        block = RegStage(width, 16, (2, 2), 1)["b1"]
        assert tuple(block.se.fc1.weight.shape) == (inner, 16)


def test_blocks_that_are_alike_share_one_runner() -> None:
    stages = random_module(RegStage(WIDTH, OUT, (3, 3), 4))
    with torch.no_grad():
        assert stages(torch.randn(18, WIDTH), BlockRunner()).shape == (18, OUT)


@pytest.mark.parametrize("row", json.loads(TABLE.read_text())["rows"], ids=str)
def test_as_many_tokens_as_upstream_counts(row: dict[str, Any]) -> None:
    side, frames = row["patches_per_side"], row["frames"]
    assert num_connector_rows(vision(KINDS[row["mm_projector_type"]]), (frames, side, side)) == row["visual_tokens"]


def test_windows_repeat_a_still_and_look_past_the_ends_of_a_clip() -> None:
    stills = frame_windows(vision(KINDS["stc_connector"]), [(1, 2, 2), (1, 2, 2)])
    assert stills.tolist() == [[2, 0], [0, 0], [0, 2], [2, 1], [1, 1], [1, 2]]
    assert frame_windows(vision(KINDS["stc_connector_v35"]), [(5, 2, 2)]).tolist() == [[0, 1], [2, 3]]
    assert frame_windows(vision(KINDS["spatial_conv"]), [(2, 2, 2)]).tolist() == [[2], [0], [1], [2]]


def test_what_a_manifest_cannot_say() -> None:
    with pytest.raises(PackageError, match=r"vision\.connector is missing"):
        frame_windows(VisionSpec((), 1, 0), [(1, 2, 2)])
    with pytest.raises(InputError, match="1 frames give no token; this model takes 2 at a time"):
        num_connector_rows(vision(ConnectorSpec("windows", 1, (2, 2, 2), 0)), (1, 2, 2))
    for wrong in ({"num_frames": 0}, {"num_frames": 4, "kernel": (0, 1, 1)}, {"num_frames": 4, "padding": 2}):
        with pytest.raises(ValueError, match=r"num_frames is 0|do not go together"):
            ConnectorSpec("windows", **wrong)


@pytest.mark.parametrize("kind", ["stp_connector", "spatial_conv", "spatial_pool", "linear", "mlp3x_gelu"])
def test_every_connector_is_traced_as_it_computes(kind: str) -> None:
    """stc_connector is that of the tiny config, and traced with all families."""
    config = {**FAMILY.tiny_config, "mm_projector_type": kind}
    if kind in SHALLOW:
        config["hidden_size"] = config["mm_hidden_size"]
    role = FAMILY.roles(config)["projector"]
    model, module = trace(role, "float32"), random_module(role.build())
    lower(model, "cpu")
    state = module.state_dict()
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(state[name].numpy(), name=name)
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), None, ["CPUExecutionProvider"])
    connector = KINDS.get(kind, ConnectorSpec("mean", 4))
    for lengths in ([1], [3, 1, 4]):
        grids = [(length, 4, 4) for length in lengths]
        index = (frame_windows if kind in KINDS else frame_shares)(vision(connector), grids)
        features = np.random.default_rng(1).standard_normal((16 * sum(lengths), 48)).astype(np.float32)
        with torch.no_grad():
            expected = module(torch.from_numpy(features), torch.from_numpy(index))
        (found,) = session.run(None, {"vision_features": features, role.inputs[1].name: index})
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)
