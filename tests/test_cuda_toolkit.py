"""What tools/check_cuda.py reads from the compiler's output, and that it objects to what it should object to."""

import re
import sys

import pytest

from tests.simt.harness import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import check_cuda
import cuda_toolkit
from cuda_toolkit import Kernel

MANGLED = "_ZN5ilnas4cuda12_GLOBAL__N_13direct_kernelIfLi4EEEvNS0_9ImageTileE"
PTXAS_LOG = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{MANGLED}' for 'sm_75'
ptxas info    : Function properties for {MANGLED}
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 116 registers, used 1 barriers, 2048 bytes smem, 680 bytes cmem[0]
ptxas info    : Compiling entry function 'other' for 'sm_75'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers, used 0 barriers, 400 bytes cmem[0]
"""
LISTING = f"""\t.headerflags\t@"EF_CUDA_SM75"
\t.section\t.text.{MANGLED},"ax",@progbits
.text.{MANGLED}:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   MOV R2, R3 ;
.L_x_0:
        /*0020*/                   LDS.U.128 R4, [R2] ;
        /*0030*/                   FFMA R5, R4, R4, R5 ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0070*/                   EXIT ;
"""


def test_ptxas_report():
    kernels = cuda_toolkit.parse_resources(PTXAS_LOG, "a.cu")
    assert kernels[MANGLED] == Kernel(MANGLED, 75, "a.cu", registers=116, static_shared=2048, stack=8)
    assert kernels["other"] == Kernel("other", 75, "a.cu", registers=7)


def test_a_loop_does_not_count_the_loops_inside_it():
    ((name, opcodes, loops),) = cuda_toolkit.parse_assembly(LISTING)
    assert name == MANGLED
    assert opcodes == ["IMAD.MOV.U32", "MOV", "LDS.U.128", "FFMA", "BRA", "BRA", "BRA", "EXIT"]
    assert loops == [["MOV", "BRA"], ["LDS.U.128", "FFMA", "BRA"]]
    kernel = Kernel("k", 75, "a.cu", opcodes=opcodes, loops=loops)
    assert kernel.busiest_loop("FFMA") == loops[1] and kernel.busiest_loop("HMMA") == []
    assert check_cuda.loop_summary(kernel) == "3/1 FFMA"


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void ilnas::cuda::(anonymous namespace)::k<float, 4>(ilnas::cuda::Call<float>, int)", "k<float, 4>"),
        ("void ilnas::cuda::k<__half, (int)16, (bool)1>(ilnas::cuda::Call<__half>)", "k<__half, 16, 1>"),
        ("ilnas::cuda::(anonymous namespace)::plain(int)", "plain"),
    ],
)
def test_short_names(demangled, name):
    assert cuda_toolkit.short_name(demangled) == name


def everywhere(name, opcodes, **numbers):
    return [Kernel(name, arch, "a.cu", opcodes=list(opcodes), **numbers) for arch in cuda_toolkit.ARCHITECTURES]


def matching(pattern):
    """An opcode that the pattern matches: the first of its alternatives, without its options."""
    opcode = re.sub(r"\((\w+)\|[^)]*\)", r"\1", re.sub(r"\([^()]*\)\?", "", pattern)).replace("\\", "")
    assert re.match(pattern, opcode), f"{opcode} does not match {pattern}"
    return opcode


def as_expected():
    """Kernels of the committed table that hold what EXPECTED asks of them and no more."""
    names = re.findall(r"`(\w+<.*?>)`", check_cuda.TABLE.read_text())
    kernels = []
    for expectation in check_cuda.EXPECTED:
        name = next(n for n in names if re.match(expectation.kernel, n) and "bfloat16" not in n)
        kernels += everywhere(name, [matching(opcode) for opcode in expectation.opcodes])
    return kernels


def test_a_missing_instruction_is_reported():
    kernels = as_expected()
    assert check_cuda.check_instructions(kernels) == []
    missing = kernels[0].opcodes.pop()
    (error,) = check_cuda.check_instructions(kernels)
    assert kernels[0].name in error and "sm_75" in error and missing.split(".")[0] in error


def test_an_expectation_without_a_kernel_is_reported():
    kernels = [kernel for kernel in as_expected() if not kernel.name.startswith("direct_kernel")]
    (error,) = check_cuda.check_instructions(kernels)
    assert "direct_kernel" in error


@pytest.mark.parametrize(("numbers", "word"), [({"stack": 8}, "local memory"), ({"static_shared": 49153}, "49152")])
def test_exceeded_resources_are_reported(numbers, word):
    errors = check_cuda.check_resources(everywhere("k", [], **numbers))
    assert len(errors) == 4 and all(word in error for error in errors)
    assert check_cuda.check_resources(everywhere("k", [], static_shared=49152)) == []


def test_a_table_out_of_date_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_cuda, "TABLE", tmp_path / "table.md")
    text = check_cuda.table(everywhere("k", [], registers=32), "13.0.1")
    check_cuda.TABLE.write_text(text)
    assert check_cuda.check_table(text, "13.0.1") == []
    changed = check_cuda.table(everywhere("k", [], registers=33), "13.0.1")
    (error,) = check_cuda.check_table(changed, "13.0.1")
    assert "- | a.cu | `k` | 32" in error and "+ | a.cu | `k` | 33" in error
    assert check_cuda.check_table(check_cuda.table(everywhere("k", []), "13.1"), "13.1") == []
    assert "not compared" in capsys.readouterr().out


def test_a_committed_table_is_there():
    assert "| source | kernel |" in check_cuda.TABLE.read_text()


def test_what_is_built_by_default_is_what_is_checked():
    (default,) = re.findall(r'^CUDA_ARCHITECTURES = "(.*)"', (ROOT / "setup.py").read_text(), re.M)
    assert tuple(int(float(a) * 10) for a in default.removesuffix("+PTX").split(";")) == cuda_toolkit.ARCHITECTURES
