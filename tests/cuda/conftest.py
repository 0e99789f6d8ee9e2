import pytest

from tests.simt.harness import ROOT, compile_kernels, compiler_found


@pytest.fixture(scope="session")
def library():
    """The CUDA sources compiled for the SIMT emulator."""
    if not compiler_found():
        pytest.skip("no g++ to compile the kernels for the emulator")
    return compile_kernels([*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "tests/cuda/exports.cpp"])
