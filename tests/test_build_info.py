"""build_info, and what the package does where something is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import csikernels
from csikernels import _load

ROOT = Path(__file__).parent.parent
needs_extension = pytest.mark.skipif(_load.extension is None, reason="the extension was not built")
LEVELS = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"]


def test_keys_and_types():
    info = csikernels.build_info()
    assert {"version", "cpp", "cuda", "cuda_archs", "triton", "cpu_capability", "torch", "reason"} <= set(info)
    assert info["version"] == csikernels.__version__
    assert info["torch"] == torch.__version__
    assert isinstance(info["cpp"], bool) and isinstance(info["cuda_archs"], list)
    assert (info["cuda"] is None) == (info["cuda_archs"] == [])
    assert json.loads(json.dumps(info)) == info


def test_the_version_is_that_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{csikernels.__version__}"\n' in text


@needs_extension
def test_a_loaded_extension_has_no_reason():
    info = csikernels.build_info()
    assert info["reason"] is None
    assert info["cpu_capability"] in LEVELS
    assert _load.extension.build_info()["torch"] == torch.__version__.split("+")[0]


@needs_extension
def test_a_missing_extension_says_why(run_python):
    assert _load.missing_reason is None
    # sys.modules[name] = None makes an import fail as if there were no such file.
    shown = run_python(
        "import sys; sys.modules['csikernels._C'] = None\n"
        "import csikernels, torch\n"
        "info = csikernels.build_info()\n"
        "assert info['cpp'] is False and info['cpu_capability'] is None, info\n"
        "print(info['reason'])\n"
        "values, indices = csikernels.top_m(torch.tensor([[1.0, 3.0, 2.0]]), 2)\n"
        "assert indices.tolist() == [[1, 2]]\n"
        "assert csikernels.backends()['top_m']['cpu'] == ['reference']\n"
        "try:\n"
        "    csikernels.use_backend('cpp').__enter__()\n"
        "except RuntimeError as error:\n"
        "    print(error)\n",
        TRITON_INTERPRET="0",
    )
    assert shown.returncode == 0, shown.stderr
    reason, error = shown.stdout.splitlines()
    assert "csikernels._C" in reason
    assert error == f"backend 'cpp' is not available: {reason}"


@needs_extension
@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512_bf16"])
def test_the_capability_is_lowered_and_never_raised(run_python, level):
    shown = run_python(
        "import csikernels; print(csikernels.build_info()['cpu_capability'])", CSIKERNELS_CPU_CAPABILITY=level
    )
    highest = run_python("from csikernels import _load; print(_load.extension.cpu_capability())").stdout.strip()
    assert shown.stdout.strip() == min(level, highest, key=LEVELS.index)


@needs_extension
def test_a_wrong_capability_is_an_error(run_python):
    shown = run_python("import csikernels", CSIKERNELS_CPU_CAPABILITY="avx9")
    assert shown.returncode != 0
    assert "ValueError: CSIKERNELS_CPU_CAPABILITY: expected one of scalar, avx2," in shown.stderr
    with pytest.raises(ValueError, match="capability: expected one of .* got 'sse'"):
        _load.extension.set_cpu_capability("sse")


@needs_extension
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_the_machine_is_read_as_the_kernel_reads_it(run_python):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())
    wanted = [
        set(),
        {"avx2", "fma", "f16c"},
        {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        {"avx512_vnni"},
        {"avx512_bf16"},
    ]
    level = 0
    while level + 1 < len(wanted) and wanted[level + 1] <= flags:
        level += 1
    shown = run_python("from csikernels import _load; print(_load.extension.cpu_capability())")
    assert shown.stdout.strip() == LEVELS[level]


def test_import_needs_torch_and_numpy_only(run_python):
    shown = run_python(
        "import sys, torch, numpy\n"
        "before = set(sys.modules)\n"
        "import csikernels\n"
        "heavy = {'scipy', 'triton', 'h5py', 'matplotlib', 'transformers', 'bitsandbytes', 'peft', 'cupy'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))\n"
    )
    assert shown.stdout.strip() == "[]", shown.stderr
