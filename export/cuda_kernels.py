"""Operators that ONNX Runtime's CUDA provider has kernels for, of those in our graphs, by dtypes of inputs.

Written by tests/record_cuda_kernels.py, which asks ONNX Runtime itself; do not edit.
"""

from collections.abc import Mapping

__all__ = ["HOST_INPUTS", "HOST_OUTPUTS", "KERNELS", "VERSION"]

VERSION = "onnxruntime-gpu 1.31.1"

# Operator -> dtypes of its inputs -> whether there is a kernel.
KERNELS: Mapping[str, Mapping[tuple[str, ...], bool]] = {
    "Add": {
        ("float16", "float16"): True,
        ("float32", "float32"): True,
        ("int64", "int64"): True,
    },
    "Cast": {
        ("bool",): True,
        ("float16",): True,
        ("float32",): True,
        ("int32",): True,
        ("int64",): True,
    },
    "CastLike": {
        ("float32", "float16"): True,
        ("float32", "float32"): True,
    },
    "Clip": {
        ("float32", "float32"): True,
    },
    "Concat": {
        ("float16", "float16"): True,
        ("float16", "float16", "float16"): True,
        ("float32", "float32"): True,
        ("float32", "float32", "float32"): True,
        ("float32", "float32", "float32", "float32"): True,
        ("int64", "int64"): True,
        ("int64", "int64", "int64"): True,
    },
    "Conv": {
        ("float16", "float16", "float16"): True,
        ("float32", "float32", "float32"): True,
    },
    "Cos": {
        ("float32",): True,
    },
    "Div": {
        ("float32", "float32"): True,
        ("int64", "int64"): True,
    },
    "Expand": {
        ("float16", "int64"): True,
        ("float32", "int64"): True,
        ("int64", "int64"): True,
    },
    "Gather": {
        ("float16", "int64"): True,
        ("float32", "int64"): True,
        ("int64", "int64"): True,
    },
    "Gelu": {
        ("float16",): True,
        ("float32",): True,
    },
    "LayerNormalization": {
        ("float16", "float16", "float16"): True,
        ("float32", "float32", "float32"): True,
    },
    "Less": {
        ("int64", "int64"): True,
    },
    "MatMul": {
        ("float16", "float16"): True,
        ("float32", "float32"): True,
    },
    "Mul": {
        ("float16", "float16"): True,
        ("float32", "float32"): True,
        ("int32", "int32"): True,
        ("int64", "int64"): True,
    },
    "NonZero": {
        ("bool",): True,
    },
    "Not": {
        ("bool",): True,
    },
    "Pad": {
        ("float16", "int64"): True,
        ("float32", "int64"): True,
    },
    "RMSNormalization": {
        ("float16", "float16"): True,
        ("float32", "float16"): True,
        ("float32", "float32"): True,
    },
    "Range": {
        ("int32", "int32", "int32"): True,
        ("int64", "int64", "int64"): True,
    },
    "ReduceL2": {
        ("float32", "int64"): True,
    },
    "ReduceMax": {
        ("int64",): True,
    },
    "ReduceMean": {
        ("float16", "int64"): True,
        ("float32", "int64"): True,
    },
    "ReduceSum": {
        ("int64", "int64"): True,
    },
    "Reshape": {
        ("bool", "int64"): True,
        ("float16", "int64"): True,
        ("float32", "int64"): True,
        ("int64", "int64"): True,
    },
    "RotaryEmbedding": {
        ("float32", "float32", "float32"): True,
    },
    "ScatterElements": {
        ("int64", "int64", "int64"): True,
    },
    "Shape": {
        ("bool",): True,
        ("float16",): True,
        ("float32",): True,
        ("int32",): True,
        ("int64",): True,
    },
    "Sigmoid": {
        ("float16",): True,
        ("float32",): True,
    },
    "Sin": {
        ("float32",): True,
    },
    "Slice": {
        ("float16", "int64", "int64", "int64", "int64"): True,
        ("float32", "int64", "int64", "int64"): True,
        ("float32", "int64", "int64", "int64", "int64"): True,
        ("int64", "int64", "int64"): True,
        ("int64", "int64", "int64", "int64"): True,
        ("int64", "int64", "int64", "int64", "int64"): True,
    },
    "Softmax": {
        ("float32",): True,
    },
    "Squeeze": {
        ("float16", "int64"): True,
        ("int64",): True,
    },
    "Sub": {
        ("int64", "int64"): True,
    },
    "Transpose": {
        ("float16",): True,
        ("float32",): True,
        ("int64",): True,
    },
    "Unsqueeze": {
        ("float16", "int64"): True,
        ("float32", "int64"): True,
        ("int64", "int64"): True,
    },
    "Where": {
        ("bool", "float32", "float32"): True,
    },
    "com.microsoft.FusedMatMul": {
        ("float16", "float16"): True,
        ("float32", "float32"): True,
    },
    "com.microsoft.GatherBlockQuantized": {
        ("uint8", "int64", "float16", "uint8"): True,
    },
    "com.microsoft.GroupQueryAttention": {
        ("float16", "float16", "float16", "float16", "float16", "int32", "int32"): True,
        ("float32", "float32", "float32", "float32", "float32", "int32", "int32"): False,
    },
    "com.microsoft.MatMulNBits": {
        ("float16", "uint8", "float16", "uint8"): True,
        ("float32", "uint8", "float32", "uint8"): True,
    },
    "com.microsoft.PackedMultiHeadAttention": {
        ("float16", "float16", "float16", "", "int32", "int32"): True,
    },
}

# Inputs that the CUDA kernel reads on the host.
HOST_INPUTS: Mapping[str, tuple[int, ...]] = {
    "CastLike": (1,),
    "Expand": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "ReduceL2": (1,),
    "ReduceMean": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "com.microsoft.GroupQueryAttention": (6,),
}

# Operators whose CUDA kernel writes its result there.
HOST_OUTPUTS = frozenset({"Shape"})
