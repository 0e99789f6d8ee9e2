"""Two extension modules: ilnas_kernels._C for the CPU, always; _C_cuda where torch has CUDA and a toolkit is found."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tools"))
from build_backend import expose_installed_torch

expose_installed_torch()

import torch  # noqa: E402
from setuptools import setup  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # one build serves torch 2.11 and newer
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}=.", STABLE_ABI]
NVCC_FLAGS = ["-O3", "-std=c++17", STABLE_ABI, "-DUSE_CUDA"]  # spills are errors in tools/check_cuda.py only
# Those of tools/check_cuda.py. 8.9 runs the machine code of 8.6, and nothing in the kernels is new in it.
CUDA_ARCHITECTURES = "7.5;8.0;8.6;9.0+PTX"


def toolkit_candidates():
    yield os.environ.get("CUDA_HOME")
    yield cpp_extension.CUDA_HOME
    if nvcc := shutil.which("nvcc"):  # may be a wrapper outside the toolkit; a dry run names the real place
        dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
        if top := re.search(r"TOP=(\S+)", dry_run):
            yield os.path.realpath(top[1])


def find_toolkit() -> str | None:
    for home in filter(None, toolkit_candidates()):
        if (Path(home) / "bin/nvcc").exists() and (Path(home) / "include/cuda_runtime.h").exists():
            return home
    return None


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern))


def find_cuda() -> tuple[str | None, str]:
    """The CUDA toolkit to build with, or None, and the sentence that says why."""
    if torch.version.cuda is None:
        return None, "not built: this torch has no CUDA"
    toolkit = find_toolkit()
    if toolkit is None:
        return None, "not built: no CUDA toolkit (nvcc and cuda_runtime.h) found"
    return toolkit, f"built for {os.environ.get('TORCH_CUDA_ARCH_LIST', CUDA_ARCHITECTURES)}"


def extensions():
    include = [str(ROOT / "csrc")]
    toolkit, cuda_outcome = find_cuda()
    flags = [
        *CXX_FLAGS,
        f'-DILNAS_BUILD_FLAGS="{" ".join(CXX_FLAGS[:2])}"',
        f'-DILNAS_CUDA_OUTCOME="{cuda_outcome}"',
    ]
    cpu_bindings = [path for path in sources("csrc/torch", "*.cpp") if not path.endswith("_cuda.cpp")]
    yield CppExtension(
        "ilnas_kernels._C",
        sources("csrc/cpu", "*.cpp") + cpu_bindings,
        include_dirs=include,
        extra_compile_args={"cxx": flags},
    )
    if toolkit is not None:
        cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = toolkit
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        yield CUDAExtension(
            "ilnas_kernels._C_cuda",
            sources("csrc/cuda", "*.cu") + sources("csrc/torch", "*_cuda.cpp"),
            include_dirs=include,
            extra_compile_args={"cxx": [*flags, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS},
        )
    print(f"ilnas_kernels: torch {torch.__version__}; CPU kernels: built; CUDA kernels: {cuda_outcome}")


setup(ext_modules=list(extensions()), cmdclass={"build_ext": BuildExtension})
