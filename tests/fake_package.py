"""A package whose graphs are not graphs: whoever loads one, fails. For tests of what the manifest alone decides."""

from pathlib import Path

from vlmport.runtime.manifest import (
    SCHEMA,
    CacheSpec,
    FileEntry,
    GraphFile,
    Manifest,
    Source,
    TensorInfo,
    Variant,
)
from vlmport.runtime.package import file_entry, manifest_text

__all__ = ["ROLES", "write_package"]

ROLES = ("embed_tokens", "decoder")
LAYERS = range(4)


def graph_file(role: str, suffix: str) -> GraphFile:
    element = {"": "float32", "_int4": "int4"}[suffix]
    formats = {f"layers.{layer}.mlp.down_proj.weight": element for layer in LAYERS}
    formats["layers.2.mlp.down_proj.weight"] = "float32"
    formats["norm.weight"] = "float32"
    return GraphFile(
        graph=f"{role}{suffix}.onnx",
        data=f"{role}{suffix}.onnx_data",
        precision=suffix[1:] or "fp32",
        inputs={
            f"past_key_values.{layer}.{part}": TensorInfo("float32", ("batch", "2", "past_length", "16"))
            for layer in LAYERS
            for part in ("key", "value")
        },
        outputs={"logits": TensorInfo("float32", ("batch", "kept", "512"))},
        formats=formats,
    )


def write_package(folder: Path) -> Path:
    """Two roles, two variants that share one of them."""
    (folder / "onnx").mkdir(parents=True)
    variants = {
        "fp32": Variant("fp32", {}, {role: graph_file(role, "") for role in ROLES}),
        "int4": Variant(
            "int4", {}, {"embed_tokens": graph_file("embed_tokens", ""), "decoder": graph_file("decoder", "_int4")}
        ),
    }
    names = {name for v in variants.values() for g in v.graphs.values() for name in g.files}
    for name in names:
        (folder / "onnx" / name).write_bytes(b"x" * (3_000_000 if name == "decoder.onnx_data" else 1000))
    manifest = Manifest(
        schema=SCHEMA,
        family="some_family",
        target="cpu",
        source=Source("my-finetune", "some_type", "bfloat16", 1234567, {"config.json": FileEntry("0" * 64, 1)}),
        roles=ROLES,
        variants=variants,
        versions={"vlmport": "0.1.0"},
        files={f"onnx/{name}": file_entry(folder / "onnx" / name) for name in sorted(names)},
        cache=CacheSpec(num_layers=4, num_kv_heads=2, head_dim=16, dtype="float32", max_length=32768),
    )
    (folder / "vlmport.json").write_text(manifest_text(manifest), encoding="utf-8")
    return folder
