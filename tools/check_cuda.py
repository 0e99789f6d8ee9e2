"""Every check of the CUDA sources that needs nvcc but no GPU.

* compiles them for sm_75, 80, 86 and 90; a warning, a spill or other local memory is an error;
* compares registers and static shared memory of every kernel with the committed tools/cuda_resources.md, and prints
  what to do when it is out of date: ``python tools/check_cuda.py --write``;
* looks for tensor-core, ldmatrix and 128-bit shared-memory instructions where they are meant to be;
* checks the bindings' syntax against the headers of the installed torch, which may be a CPU one.
"""

import argparse
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from cuda_toolkit import (
    ARCHITECTURES,
    ROOT,
    Kernel,
    ToolkitError,
    compile_kernels,
    count,
    find_nvcc,
    nvcc_release,
    toolkit_root,
)

TABLE = ROOT / "tools/cuda_resources.md"
STATIC_SHARED_LIMIT = 48 * 1024  # of every device; dynamic shared memory is checked at each launch by the emulator


@dataclass(frozen=True)
class Expectation:
    """Instances whose name matches ``kernel`` hold an instruction that matches each of ``opcodes``."""

    kernel: str
    opcodes: tuple[str, ...]

    def applies(self, kernel: Kernel) -> bool:
        no_tensor_core = kernel.arch < 80 and "bfloat16" in kernel.name  # compiled to a trap, never launched
        return re.match(self.kernel, kernel.name) is not None and not no_tensor_core


ARITHMETIC, GLOBAL_LOAD = "(FFMA|HMMA)", "LDG"
VECTOR_SHARED_LOAD = r"LDS\.(U\.)?128"
EXPECTED = (
    Expectation(r"condensed_kernel<.*false>", (r"HMMA\.1688\.F32", r"LDSM\.16\.MT88\.4")),
    Expectation(r"condensed_kernel<.*true>", (r"HMMA\.(1688|16816)\.F32", r"LDSM\.16\.MT88\.4")),
    Expectation(r"condensed_grad_values_kernel<", (r"HMMA\.(1688|16816)\.F32", r"LDSM\.16\.M88\.4")),
    Expectation(r"direct_kernel<", ("FFMA", VECTOR_SHARED_LOAD)),
    Expectation(r"grad_values_kernel<", ("FFMA", VECTOR_SHARED_LOAD)),
    Expectation(r"gradient_tiles_kernel<", ("FFMA", VECTOR_SHARED_LOAD)),
    Expectation(r"gradient_tiles_tensor_kernel<.*false>", (r"HMMA\.(1688|16816)\.F32", r"LDSM\.16\.M88\.4")),
    Expectation(r"gradient_tiles_tensor_kernel<.*true>", (r"HMMA\.(1688|16816)\.F32", r"LDSM\.16\.MT88\.4")),
)


def check_resources(kernels: list[Kernel]) -> list[str]:
    errors = []
    for kernel in kernels:
        where = f"{kernel.source}: {kernel.name} for sm_{kernel.arch}"
        if kernel.stack:
            errors.append(f"{where} uses {kernel.stack} bytes of local memory: registers are spilled or indexed")
        if kernel.static_shared > STATIC_SHARED_LIMIT:
            errors.append(f"{where} has {kernel.static_shared} bytes of static shared memory, the limit is 49152")
    return errors


def check_instructions(kernels: list[Kernel]) -> list[str]:
    errors = []
    for expectation in EXPECTED:
        chosen = [kernel for kernel in kernels if expectation.applies(kernel)]
        if {kernel.arch for kernel in chosen} != set(ARCHITECTURES):
            errors.append(f"no kernel matches {expectation.kernel} on every architecture: correct EXPECTED")
        for kernel in chosen:
            for opcode in expectation.opcodes:
                if kernel.count(opcode) == 0:
                    errors.append(f"{kernel.source}: {kernel.name} for sm_{kernel.arch} has no {opcode}")
    return errors


def loop_summary(kernel: Kernel) -> str:
    """`instructions/arithmetic` of the loop that computes, or where none does, of the one that loads."""
    for kind in (ARITHMETIC, GLOBAL_LOAD):
        if loop := kernel.busiest_loop(kind):
            return f"{len(loop)}/{count(loop, kind)} {'LDG' if kind == GLOBAL_LOAD else count_names(loop)}"
    return "-"


def count_names(loop: list[str]) -> str:
    return max(("FFMA", "HMMA"), key=lambda name: count(loop, name))


def table(kernels: list[Kernel], release: str) -> str:
    """One line a kernel instance: registers on each architecture, static shared memory (the most of any), loops."""
    by_name: dict[tuple[str, str], dict[int, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault((kernel.source, kernel.name), {})[kernel.arch] = kernel
    lines = [
        "# Registers, shared memory and inner loops of the CUDA kernels",
        "",
        f"Written by `python tools/check_cuda.py --write` with nvcc {release}. Registers a thread; bytes of static",
        "shared memory a block; for the loop that does the arithmetic (or else loads), how many instructions it has",
        "and how many of them are FFMA or HMMA (or LDG). No kernel uses local memory.",
        "",
        "| source | kernel | " + " | ".join(f"sm_{arch}" for arch in ARCHITECTURES) + " | shared | "
        "loop sm_75 | loop sm_90 |",
        "|---|---|" + "---|" * (len(ARCHITECTURES) + 3),
    ]
    for (source, name), by_arch in sorted(by_name.items()):
        registers = " | ".join(str(by_arch[arch].registers) for arch in ARCHITECTURES)
        shared = max(kernel.static_shared for kernel in by_arch.values())
        loops = f"{loop_summary(by_arch[75])} | {loop_summary(by_arch[90])}"
        lines.append(f"| {source} | `{name}` | {registers} | {shared} | {loops} |")
    return "\n".join(lines) + "\n"


def check_table(text: str, release: str) -> list[str]:
    committed = TABLE.read_text() if TABLE.exists() else ""
    if committed == text:
        return []
    if f"nvcc {release}." not in committed:
        print(f"{TABLE.name} was written with another nvcc than {release}: not compared")
        return []
    old, new = set(committed.splitlines()), set(text.splitlines())
    changed = [f"  - {line}" for line in sorted(old - new)] + [f"  + {line}" for line in sorted(new - old)]
    return ["\n".join([f"{TABLE.name} is out of date: run python tools/check_cuda.py --write", *changed])]


def check_bindings(toolkit: Path) -> list[str]:
    """The bindings use the stable ABI alone, so the headers of a CPU torch hold all they need."""
    import pybind11
    from torch.utils import cpp_extension

    system = [
        *cpp_extension.include_paths(),
        sysconfig.get_paths()["include"],
        pybind11.get_include(),
        toolkit / "include",
    ]
    command = ["g++", "-std=c++20", "-fvisibility=hidden", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DUSE_CUDA"]
    command += [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        '-DILNAS_BUILD_FLAGS=""',
        '-DILNAS_CUDA_OUTCOME=""',
        f"-I{ROOT / 'csrc'}",
    ]
    command += [f"-isystem{path}" for path in system]
    errors = []
    for source in sorted((ROOT / "csrc/torch").glob("*_cuda.cpp")):
        result = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            errors.append(f"{source.name}:\n{result.stderr[:4000]}")
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing it")
    arguments = parser.parse_args()
    try:
        nvcc = find_nvcc()
        kernels = compile_kernels()
    except ToolkitError as error:
        sys.exit(str(error))
    release = nvcc_release(nvcc)
    text = table(kernels, release)
    errors = check_resources(kernels) + check_instructions(kernels)
    if arguments.write:
        TABLE.write_text(text)
    else:
        errors += check_table(text, release)
    errors += check_bindings(toolkit_root(nvcc))
    if errors:
        sys.exit("\n".join(errors))
    print(
        f"{len(kernels)} kernel instances for {', '.join(f'sm_{arch}' for arch in ARCHITECTURES)}: no spill, no warning"
    )


if __name__ == "__main__":
    main()
