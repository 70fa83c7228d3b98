"""Libraries that stand in for CUDA's, so that ONNX Runtime's CUDA provider starts on a box without a GPU.

    python tests/standin_cuda.py FOLDER        in an environment with onnxruntime-gpu; needs gcc and nm
    LD_LIBRARY_PATH=FOLDER python tests/record_cuda_kernels.py

Sessions open and nodes are placed, by ONNX Runtime's own partitioner and its own list of kernels. Kernels do nothing:
no number that such a session gives means anything.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import onnxruntime

__all__ = ["build"]

_PREAMBLE = """
#include <stdlib.h>
#include <string.h>
static long handle[64];
"""
# One device of compute capability 9.0, whose memory is the host's.
_RUNTIME = """
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *n) { *n = 0; return 0; }
int cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
int cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
int cudaGetDeviceProperties(char *p, int d) {
  memset(p, 0, 800); strcpy(p, "stand-in"); *(size_t *)(p + 288) = (size_t)24 << 30;  // the rest: warp, block, grid
  int *q = (int *)p; q[77] = 32; q[80] = 1024; q[84] = q[85] = q[86] = 65535; q[90] = 9; return 0;
}
int cudaDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 9 : a == 76 ? 0 : a == 16 ? 100 : 49152; return 0; }
int cudaMalloc(void **p, size_t n) { *p = malloc(n); return *p ? 0 : 2; }
int cudaFree(void *p) { free(p); return 0; }
int cudaMallocHost(void **p, size_t n) { *p = malloc(n); return 0; }
int cudaHostAlloc(void **p, size_t n, unsigned f) { *p = malloc(n); return 0; }
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaMemcpy(void *d, const void *s, size_t n, int k) { memcpy(d, s, n); return 0; }
int cudaMemcpyAsync(void *d, const void *s, size_t n, int k, void *t) { memcpy(d, s, n); return 0; }
int cudaMemset(void *d, int v, size_t n) { memset(d, v, n); return 0; }
int cudaMemsetAsync(void *d, int v, size_t n, void *t) { memset(d, v, n); return 0; }
int cudaMemGetInfo(size_t *f, size_t *t) { *f = *t = (size_t)24 << 30; return 0; }
int cudaStreamCreate(void **s) { *s = handle; return 0; }
int cudaStreamCreateWithFlags(void **s, unsigned f) { *s = handle; return 0; }
int cudaEventCreate(void **s) { *s = handle; return 0; }
int cudaEventCreateWithFlags(void **s, unsigned f) { *s = handle; return 0; }
const char *cudaGetErrorString(int e) { return "stand-in"; }
const char *cudaGetErrorName(int e) { return "stand-in"; }
void **__cudaRegisterFatBinary(void *p) { return (void **)handle; }
"""
_BODIES = {
    "libcudart": _RUNTIME,
    "libcublas": "int cublasCreate_v2(void **h) { *h = handle; return 0; }\n",
    "libcublasLt": "int cublasLtCreate(void **h) { *h = handle; return 0; }\n",
}


def build(folder: Path) -> None:
    """Compiles one library for each that the provider wants; what is not written above returns 0."""
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    wanted = re.findall(r"NEEDED\s+(libcu\S+)", _output("objdump", "-p", str(provider)))
    symbols: dict[str, list[str]] = defaultdict(list)
    for line in _output("nm", "-D", "--undefined-only", str(provider)).splitlines():
        name, _, library = line.split()[-1].partition("@")
        if library.startswith("libcu"):
            symbols[library].append(name)
        elif re.match("cu[A-Z]", name):
            symbols["libcuda.so.1"].append(name)  # its symbols have no versions
    folder.mkdir(parents=True, exist_ok=True)
    for library in wanted:
        body = _PREAMBLE + _BODIES.get(library.split(".")[0], "")
        written = set(re.findall(r"(\w+)\(", body))
        body += "".join(f"int {name}() {{ return 0; }}\n" for name in symbols[library] if name not in written)
        source, versions = folder / f"{library}.c", folder / f"{library}.map"
        source.write_text(body, encoding="utf-8")
        versions.write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
        script = [] if library == "libcuda.so.1" else [f"-Wl,--version-script={versions}"]
        command = ["gcc", "-w", "-shared", "-fPIC", "-o", str(folder / library), str(source), f"-Wl,-soname,{library}"]
        subprocess.run([*command, *script], check=True)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    build(Path(sys.argv[1]))
