"""Kernel sources compiled for the SIMT emulator, and their launchers called on CPU tensors.

A launcher is reached through an ``extern "C"`` function that returns its cudaError_t as int and takes, in order,
pointers (``void*`` or typed), ``int64_t`` and ``float`` arguments; sample.cu shows two::

    library = compile_kernels([*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "tests/cuda/exports.cpp"])
    device = Device(library, seed=1)
    device.run("export_masked_linear", In(x), In(values), None, Out(out), batch, rows)

A kernel that breaks a rule of csrc/cuda/device.cuh raises SimtError, which says where and which.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
# Locals that a kernel forgets to set hold a pattern, not a lucky zero.
FLAGS = [
    *"-std=c++20 -O2 -fPIC -Wall -Wno-unknown-pragmas -DILNAS_SIMT -ftrivial-auto-var-init=pattern".split(),
    "-fsanitize=signed-integer-overflow,shift,bounds,integer-divide-by-zero",  # reported by undefined.cpp
]
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
COUNTERS = (
    "fma shared_loads shared_stores global_loads global_stores global_load_bytes global_store_bytes atomics ldmatrix "
    "mma_k8 mma_k16 shuffles barriers shared_load_requests shared_load_wavefronts shared_store_requests "
    "shared_store_wavefronts ldmatrix_requests ldmatrix_wavefronts global_load_requests global_load_sectors "
    "global_store_requests global_store_sectors global_block_sectors"
).split()


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its shape, and what the blocks that ran executed (tests/simt/profile.h defines the counts)."""

    kernel: str
    blocks: int
    blocks_run: int
    threads: int
    dynamic_shared: int
    static_shared: int
    counts: dict[str, int]


class SimtError(Exception):
    """A kernel broke a rule; the text names kernel, block, thread, array, offset and rule."""


@dataclass(frozen=True)
class In:
    """An array that the kernels only read."""

    tensor: Tensor


@dataclass(frozen=True)
class InOut:
    """An array that holds data and may be written."""

    tensor: Tensor


@dataclass(frozen=True)
class Out:
    """An array without contents, dense in memory, of which every byte must have been written at the end."""

    tensor: Tensor


@dataclass(frozen=True)
class Scratch:
    """An array without contents; what is not written may stay so."""

    tensor: Tensor


def _headers_digest() -> bytes:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for folder in ("csrc/cuda", "csrc/cpu", "tests/simt"):
        for path in sorted((ROOT / folder).iterdir()):
            if path.suffix in {".h", ".cuh", ".inl"}:
                digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"ilnas-simt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _run_compiler(arguments: Sequence[str], output: Path) -> None:
    """Writes to a name of its own first, so that processes that build the same file at once do no harm."""
    part = output.with_suffix(f".{os.getpid()}.part")
    result = subprocess.run(["g++", *arguments, "-o", str(part)], capture_output=True, text=True, check=False)
    if result.returncode != 0 or result.stderr:
        raise RuntimeError(f"the emulated build failed:\n{result.stderr[:4000]}")
    part.replace(output)


def _object(source: Path, headers: bytes) -> Path:
    key = hashlib.sha256(headers + str(source).encode() + source.read_bytes()).hexdigest()[:24]
    output = _cache() / f"{source.stem}-{key}.o"
    if not output.exists():
        _run_compiler([*FLAGS, *INCLUDES, "-x", "c++", "-c", str(source)], output)
    return output


@lru_cache
def _library(sources: tuple[Path, ...]) -> ctypes.CDLL:
    headers = _headers_digest()
    machine = sorted((ROOT / "tests/simt").glob("*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda path: _object(path, headers), (*machine, *sources)))
    key = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:24]
    output = _cache() / f"library-{key}.so"
    if not output.exists():
        _run_compiler(["-shared", *map(str, objects)], output)
    library = ctypes.CDLL(str(output))
    library.simt_error.restype = ctypes.c_char_p
    library.simt_first_unwritten.restype = ctypes.c_int64
    library.simt_launch_name.restype = ctypes.c_char_p
    library.simt_launch_offset.restype = ctypes.c_int64
    return library


@lru_cache
def _symbols(library: str) -> dict[int, str]:
    """Function names by offset: the launch macro knows a kernel only as the launcher spells it."""
    listing = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout
    names = {}
    for line in listing.splitlines():
        offset, kind, name = line.split(maxsplit=2) if line[0] != " " else ("0", "U", "")
        if kind in "tTwW":
            names[int(offset, 16)] = _short_name(name)
    return names


def _short_name(demangled: str) -> str:
    """``gemm_kernel<Half>`` of the whole signature."""
    name = re.sub(r"\(anonymous namespace\)::|ilnas::(cuda::)?|^void ", "", demangled)
    depth = 0
    for i, char in enumerate(name):
        depth += {"<": 1, ">": -1}.get(char, 0)
        if char == "(" and depth == 0:
            return name[:i]
    return name


def compiler_found() -> bool:
    return shutil.which("g++") is not None


def compile_kernels(sources: Sequence[Path]) -> ctypes.CDLL:
    """The sources and the emulator as one library, built anew only when a file has changed."""
    return _library(tuple(sorted(Path(path).resolve() for path in sources)))


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class Device:
    """An emulated GPU: compute capability ``arch``, thread order by ``seed``, bytes of shared memory per block.

    With ``profile`` the traffic of each launch is counted and bytes are not watched; ``blocks_to_run`` blocks of every
    grid then stand for all (None: all run), except of kernels in whose name ``run_in_full`` occurs.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        *,
        arch: int = 80,
        seed: int = 0,
        shared_limit: int = 64 * 1024,
        multiprocessors: int = 4,
        profile: bool = False,
        blocks_to_run: int | None = None,
        run_in_full: str = "",
    ) -> None:
        self._library = library
        self._settings = (
            ctypes.c_int(arch),
            ctypes.c_int(multiprocessors),
            ctypes.c_int64(shared_limit),
            ctypes.c_uint64(seed),
        )
        self._profile = (ctypes.c_int(profile), ctypes.c_int64(blocks_to_run or 0), run_in_full.encode())
        self._watched = not profile

    def run(self, function: str, *arguments: In | InOut | Out | Scratch | int | float | None) -> list[Launch]:
        """Calls the exported launcher; returns what it launched. Raises SimtError when a kernel breaks a rule."""
        library = self._library
        library.simt_reset(*self._settings)
        library.simt_profile(*self._profile)
        outputs = []
        converted = [self._convert(function, i, argument, outputs) for i, argument in enumerate(arguments)]
        status = getattr(library, function)(*converted)
        launches = [self._launch(i) for i in range(library.simt_launches())]
        if message := library.simt_error().decode():
            if launches:  # the launcher may spell the kernel as a variable
                message = message.replace(
                    self._spelt(len(launches) - 1) + ", block", launches[-1].kernel + ", block", 1
                )
            raise SimtError(message)
        if status != 0:
            raise SimtError(f"{function} returned error {status}")
        for name, tensor in outputs if self._watched else ():
            offset = library.simt_first_unwritten(ctypes.c_void_p(tensor.data_ptr()))
            if offset >= 0:
                raise SimtError(f"{function}: byte {offset} of output '{name}' was never written")
        return launches

    def _spelt(self, i: int) -> str:
        return self._library.simt_launch_name(i).decode()

    def _launch(self, i: int) -> Launch:
        values = (ctypes.c_uint64 * (5 + len(COUNTERS)))()
        if self._library.simt_launch_numbers(i, values, len(values)) != len(values):
            raise RuntimeError("COUNTERS does not match the emulator's Counts")
        name = _symbols(self._library._name).get(self._library.simt_launch_offset(i), self._spelt(i))
        return Launch(name, *values[:5], dict(zip(COUNTERS, values[5:], strict=True)))

    def _convert(self, function, position, argument, outputs):
        if argument is None:
            return ctypes.c_void_p(None)
        if isinstance(argument, bool | int):
            return ctypes.c_int64(int(argument))
        if isinstance(argument, float):
            return ctypes.c_float(argument)
        if not isinstance(argument, In | InOut | Out | Scratch):
            raise TypeError(f"{function}: argument {position} must be In, InOut, Out, Scratch, int, float or None")
        tensor, kind = argument.tensor, type(argument)
        name, extent = f"{function} argument {position}", _extent(tensor)
        if kind is Out:
            if extent != tensor.numel() * tensor.element_size():
                raise ValueError(f"{function}: Out argument {position} must be dense in memory")
            outputs.append((name, tensor))
        writable, initialised = kind is not In, kind in (In, InOut)
        self._library.simt_register(
            name.encode(), ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(extent), int(writable), int(initialised)
        )
        return ctypes.c_void_p(tensor.data_ptr())
