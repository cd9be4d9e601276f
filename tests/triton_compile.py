"""Compile Triton kernels for GPUs that are not here, and read from the machine code what it asks of them.

To be imported where ``TRITON_INTERPRET`` is not set, which decides what ``triton.jit`` makes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch

ARCHITECTURES = (80, 90, 100)
_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int16: "*i16",
    torch.int32: "*i32",
}


def _describe(value, path: tuple, attributes: dict):
    """The type of an argument as a launch would see it; 16-byte alignment goes to ``attributes``."""
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return _TYPES[value.dtype]
    if isinstance(value, tuple):
        return tuple(_describe(part, (*path, i), attributes) for i, part in enumerate(value))
    if isinstance(value, int) and not isinstance(value, bool):
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32"
    return "fp32"


def compiled(kernel, arguments: dict, constants: dict, arch: int, warps: int, stages: int, **options) -> dict:
    """Compile for ``sm_<arch>``: registers a thread, stack bytes, shared memory, instruction counts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    while not hasattr(kernel, "arg_names") or hasattr(kernel, "configs"):
        kernel = kernel.fn
    attributes: dict = {}
    signature = {
        param.name: "constexpr"
        if param.name in constants
        else param.annotation_type or _describe(arguments[param.name], (index,), attributes)
        for index, param in enumerate(kernel.params)
    }
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, **options}
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, code = _machine_code(result.asm["cubin"])
    return {"name": kernel.__name__, "shared": result.metadata.shared, **usage, "instructions": code}


def _machine_code(cubin: bytes) -> tuple[dict, dict]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    names = Counter(
        re.findall(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+ )?([A-Z][A-Z0-9]+)", code.stdout, re.MULTILINE)
    )
    wanted = ("HMMA", "HGMMA", "UTCHMMA", "FFMA", "FFMA2", "MUFU", "LDL", "STL", "LDGSTS")
    kept = {name: names[name] for name in wanted if names[name]}
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}, kept
