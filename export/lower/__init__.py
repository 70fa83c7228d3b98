"""Lowering a traced graph to a target: one pass for each semantic operator, in a list anyone can read."""

from typing import Literal

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, Sequential

from ...runtime.errors import InputError
from ..layers.semantic import DOMAIN
from .attention import LoopSegmentAttention, LowerCachedAttention, PackSegmentAttention
from .cross_attention import LoopCrossAttention, MaskCrossAttention
from .cuda import LastPositionsOnHost
from .elementwise import LowerFloatConstant, LowerLastPositions, LowerRMSNorm, LowerRotary
from .residual import WideResidual
from .tidy import FoldSmallConstants, Tidy
from .weights import LowerEmbedding, LowerLinear

__all__ = ["COMPUTE_DTYPE", "TARGETS", "Target", "lower"]

Target = Literal["cpu", "cuda"]
TARGETS: tuple[Target, ...] = ("cpu", "cuda")
COMPUTE_DTYPE: dict[Target, Literal["float32", "float16"]] = {
    "cpu": "float32",
    "cuda": "float16",
}  # GroupQueryAttention: no float16 gain on CPU, no float32 on CUDA

_SEGMENT_ATTENTION = {"cpu": LoopSegmentAttention, "cuda": PackSegmentAttention}
_CROSS_ATTENTION = {"cpu": LoopCrossAttention, "cuda": MaskCrossAttention}
_LAST_POSITIONS = {"cpu": LowerLastPositions, "cuda": LastPositionsOnHost}
_FINISHING: dict[Target, tuple[InPlacePass, ...]] = {"cpu": (), "cuda": (WideResidual(),)}


def lower(model: ir.Model, target: Target) -> None:
    """Replaces every semantic operator of the graph, in place. Raises InputError on an unknown target."""
    if target not in TARGETS:
        raise InputError(f"--target {target!r} is not known; choose one of {', '.join(TARGETS)}")
    passes: list[InPlacePass] = [
        LowerLinear(),
        LowerEmbedding(),
        LowerRMSNorm(),
        LowerRotary(),
        LowerFloatConstant(),
        _LAST_POSITIONS[target](),
        FoldSmallConstants(),
        _SEGMENT_ATTENTION[target](),
        _CROSS_ATTENTION[target](),
        LowerCachedAttention(),
        *_FINISHING[target],
        Tidy(),
    ]
    Sequential(*passes)(model)
    defined = {(domain, name) for domain, name, _ in model.functions}
    left = {n.op_type for n in model.graph if n.domain == DOMAIN and (n.domain, n.op_type) not in defined}
    assert not left, f"no pass lowered {left}"
