"""The CUDA toolkit of this machine: compiling the kernels to machine code and reading what came out."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (75, 80, 86, 90)
# As setup.py compiles them, but with every warning an error.
FLAGS = ["-O3", "-std=c++17", "-Xptxas=-v,--warn-on-spills,--warning-as-error", "-Werror=all-warnings"]


class ToolkitError(Exception):
    """Something of the toolkit is missing, or it refused the sources."""


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin/nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        raise ToolkitError("no nvcc: put it on PATH or set CUDA_HOME")
    return nvcc


def toolkit_root(nvcc: str) -> Path:
    """nvcc on PATH may be a wrapper outside the toolkit; a dry run names the real place."""
    dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    top = re.search(r"TOP=(\S+)", dry_run)
    if top is None:
        raise ToolkitError(f"{nvcc} --dryrun does not name its toolkit")
    return Path(os.path.realpath(top[1]))


def nvcc_release(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release [\d.]+, V([\d.]+)", text)[1]


def find_disassembler(root: Path) -> str:
    """nvdisasm of the toolkit, of PATH, or the one that the triton package carries."""
    candidates = [root / "bin/nvdisasm", shutil.which("nvdisasm")]
    try:
        import triton

        candidates.append(Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm")
    except ImportError:
        pass
    for path in candidates:
        if path is not None and Path(path).exists():
            return str(path)
    raise ToolkitError("no nvdisasm in the toolkit, on PATH or in the triton package")


@dataclass
class Kernel:
    """One compiled instance. ``loops``: the opcodes of every loop, without those of the loops inside it."""

    name: str
    arch: int
    source: str
    registers: int = 0
    static_shared: int = 0
    stack: int = 0  # bytes of local memory, spills included
    opcodes: list[str] = field(default_factory=list)
    loops: list[list[str]] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        return count(self.opcodes, pattern)

    def busiest_loop(self, pattern: str) -> list[str]:
        """The loop with the most instructions of this kind; empty where no loop has any."""
        loop = max(self.loops, key=lambda opcodes: count(opcodes, pattern), default=[])
        return loop if count(loop, pattern) else []


def count(opcodes: list[str], pattern: str) -> int:
    return sum(re.match(pattern, opcode) is not None for opcode in opcodes)


def short_name(demangled: str) -> str:
    """``direct_kernel<float, 4>`` of the whole signature."""
    name = re.sub(r"\(anonymous namespace\)::|ilnas::cuda::|^void ", "", demangled)
    depth = 0
    for i, char in enumerate(name):
        depth += {"<": 1, ">": -1}.get(char, 0)
        if char == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\((?:int|bool|\w+::\w+|\w+)\)", "", name)


def demangle(names: list[str]) -> dict[str, str]:
    if not names:
        return {}
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, result.stdout.splitlines(), strict=True))


def parse_resources(log: str, source: str) -> dict[str, Kernel]:
    """ptxas -v's report, by mangled name."""
    kernels: dict[str, Kernel] = {}
    for block in log.split("Compiling entry function ")[1:]:
        mangled, arch = re.match(r"'([^']+)' for 'sm_(\d+)", block).groups()
        registers = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        stack = re.search(r"(\d+) bytes stack frame", block)
        kernels[mangled] = Kernel(
            mangled, int(arch), source, int(registers[1]), int(shared[1]) if shared else 0, int(stack[1])
        )
    return kernels


_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)(.*)")


def parse_assembly(text: str) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(mangled name, opcodes, loops) of every function in nvdisasm's listing. A loop ends in a jump back."""
    for section in re.split(r"^\t\.section\t\.text\.", text, flags=re.M)[1:]:
        opcodes, labels, jumps = [], {}, []
        for line in section.splitlines():
            if label := re.match(r"^\.(L_x_\d+|L_\d+):", line):
                labels[label[1]] = len(opcodes)
            elif instruction := _INSTRUCTION.match(line):
                if instruction[2] == "BRA" and (target := re.search(r"\.(L_x_\d+|L_\d+)", instruction[3])):
                    jumps.append((len(opcodes), target[1]))
                opcodes.append(instruction[2])
        ends: dict[int, int] = {}  # by first instruction: several jumps back to one place are one loop
        for at, target in jumps:
            if labels.get(target, at + 1) <= at:
                ends[labels[target]] = max(at, ends.get(labels[target], at))
        owned: dict[tuple[int, int], list[str]] = {loop: [] for loop in sorted(ends.items())}
        for i, opcode in enumerate(opcodes):
            around = [loop for loop in owned if loop[0] <= i <= loop[1]]
            if around:
                owned[min(around, key=lambda loop: loop[1] - loop[0])].append(opcode)
        yield section[: section.index(",")], opcodes, list(owned.values())


def compile_kernel_file(nvcc: str, disassembler: str, source: Path, arch: int, folder: Path) -> list[Kernel]:
    cubin = folder / f"{source.stem}.{arch}.cubin"
    command = [nvcc, *FLAGS, f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", "-cubin", str(source), "-o", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    log = result.stdout + result.stderr
    if result.returncode != 0:
        raise ToolkitError(f"nvcc for sm_{arch} refused {source.name}:\n{log}")
    kernels = parse_resources(log, source.name)
    listing = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    for mangled, opcodes, loops in parse_assembly(listing):
        if mangled in kernels:
            kernels[mangled].opcodes, kernels[mangled].loops = opcodes, loops
    for mangled, demangled in demangle(list(kernels)).items():
        kernels[mangled].name = short_name(demangled)
    return list(kernels.values())


def compile_kernels(architectures=ARCHITECTURES, sources: list[Path] | None = None) -> list[Kernel]:
    """Every kernel instance of the sources, for every architecture. Raises ToolkitError on a warning or a spill."""
    nvcc = find_nvcc()
    disassembler = find_disassembler(toolkit_root(nvcc))
    jobs = [(source, arch) for source in sources or kernel_sources() for arch in architectures]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda job: compile_kernel_file(nvcc, disassembler, *job, Path(folder)), jobs)
        return [kernel for kernels in compiled for kernel in kernels]
