"""Predicted time of the CUDA kernels on GPUs that are not at hand: python tools/resource_model.py --density 0.1 0.05

Nothing here is a measurement. The kernels themselves are run by the SIMT emulator on the problem at full size, a few
blocks of every grid. That gives the exact plan (tile, grid, shared memory) and what the blocks executed: multiply-adds,
tensor-core instructions, turns in shared memory with their bank conflicts, sectors of global memory. The instructions
around them come from the compiled loops (tools/cuda_resources.md). Each resource of a multiprocessor then needs

    issue     warp instructions / schedulers            (arithmetic instructions x loop length / arithmetic in the loop)
    fma       fused multiply-adds / lanes
    tensor    tensor-core operations / rate
    shared    turns in shared memory, one a cycle
    l1        sectors of all requests x 32 bytes / bytes a cycle
    l2        sectors a block loads, each once, and those stored, x 32 bytes / bytes a cycle
    dram      the tensors' bytes, once, / bandwidth      (of the whole device)

cycles. ``floor`` is the largest, were all the others hidden behind it; ``serial`` their sum, were nothing hidden. Both
count the multiprocessors that get a block more than others. The truth lies between them unless latency binds.

--measured FILE puts the measurements of benchmarks/bench_gpu.py (gpu.json), made on such a device, beside them.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from tests.simt.harness import ROOT, Device, In, InOut, Launch, Scratch, compile_kernels

OPS = ("forward", "grad_input", "grad_values", "absent_topk")
DTYPES = {"float32": (0, torch.float32), "float16": (2, torch.float16), "bfloat16": (3, torch.bfloat16)}
ROUTES = {"best": 0, "general": 1, "direct": 2, "condensed": 3}
SEED = 0
TOPK_SHARE = 0.01


@dataclass(frozen=True)
class Gpu:
    """A device by its data sheet; throughputs are per multiprocessor and cycle."""

    name: str
    arch: int
    table_arch: int  # the architecture whose loops cuda_resources.md lists
    multiprocessors: int
    hertz: float
    schedulers: int
    fma_lanes: int
    tensor_flop: float  # float16 in, float32 sums, as mma.sync reaches it
    l1_bytes: float
    l2_bytes: float
    dram_bytes_per_second: float
    shared_per_block: int
    shared_per_multiprocessor: int
    threads_per_multiprocessor: int
    dense_tflops: dict[str, float]  # what cuDNN's dense 3x3 convolution is taken to reach

    def resident_blocks(self, launch: Launch, registers: int) -> int:
        """How many blocks a multiprocessor holds at once. Registers are handed out by warps, in units of 256."""
        registers_a_warp = math.ceil(registers * 32 / 256) * 256
        limits = [
            65536 // (registers_a_warp * math.ceil(launch.threads / 32)),
            self.threads_per_multiprocessor // launch.threads,
        ]
        if shared := launch.dynamic_shared + launch.static_shared:
            limits.append(self.shared_per_multiprocessor // (shared + 1024 * (self.arch >= 80)))
        return max(1, min(limits))


# Clocks such that the data sheet's fp32 rate results: 7.2 and 67 TFLOP/s. Tensor rates: 28.7 TFLOP/s on the RTX 2060
# Super (float32 sums run at half rate on GeForce); 990 TFLOP/s on the H200, of which mma.sync reaches about 62 %
# (arXiv:2402.13499, section on tensor cores). L1: 64 and 128 bytes
# a cycle (arXiv:1903.07486 for Turing); L2 to multiprocessor: 64.
GPUS = {
    "rtx2060s": Gpu(
        "RTX 2060 Super", 75, 75, 34, 7.2e12 / (34 * 128), 4, 64, 512, 64, 64, 448e9, 64 * 1024, 64 * 1024, 1024,
        {"float32": 9.2, "float16": 23.0},
    ),
    "h200": Gpu(
        "H200", 90, 90, 132, 67e12 / (132 * 256), 4, 128, 0.62 * 990e12 / (67e12 / 256), 128, 64, 4.8e12, 227 * 1024,
        228 * 1024, 2048, {"float32": 57.8, "float16": 586.0, "bfloat16": 586.0},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A convolution with padding that keeps the size: batch, in and out channels, height, width, kernel."""

    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        if not (found := re.fullmatch(r"(\d+),(\d+),(\d+),(\d+)x(\d+),(\d+)", text)):
            raise argparse.ArgumentTypeError(f"a shape is batch,in,out,HxW,kernel, as 128,256,256,16x16,3; got {text}")
        return cls(*map(int, found.groups()))

    @property
    def layer(self) -> str:
        """As benchmarks/bench_gpu.py calls it, where it has it."""
        sides = self.height if self.height == self.width else f"{self.height}x{self.width}"
        return f"conv{self.kernel}x{self.kernel} {self.batch}x{self.in_channels}x{self.out_channels}x{sides}"

    def flop(self) -> float:
        pixels = self.batch * self.height * self.width
        return 2.0 * pixels * self.in_channels * self.out_channels * self.kernel**2

    def sizes(self) -> Tensor:
        pad = self.kernel // 2
        return torch.tensor(
            [self.batch, self.in_channels, self.height, self.width, self.out_channels, self.height, self.width,
             self.kernel, self.kernel, 1, 1, pad, pad, 1, 1, 1]
        )  # fmt: skip


@dataclass(frozen=True)
class Loop:
    registers: int
    instructions: int
    counted: int
    kind: str


def committed_loops(arch: int) -> dict[str, Loop]:
    """By kernel name: registers and the loop of tools/cuda_resources.md."""
    text = (ROOT / "tools/cuda_resources.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if "| `" in line]
    loops = {}
    for _source, name, *registers, _shared, loop75, loop90 in lines:
        found = re.fullmatch(r"(\d+)/(\d+) (\w+)", loop75 if arch == 75 else loop90)
        used = int(registers[0] if arch == 75 else registers[-1])
        numbers = (int(found[1]), int(found[2]), found[3]) if found else (0, 1, "-")
        loops[name.strip("`")] = Loop(used, *numbers)
    return loops


def compiled_name(emulated: str) -> str:
    """The emulator's spelling of an instance in nvcc's."""
    return emulated.replace("BFloat16", "__nv_bfloat16").replace("Half", "__half")


@dataclass(frozen=True)
class Prediction:
    """Seconds of one launch by resource, and how often its blocks fill the device."""

    kernel: str
    seconds: dict[str, float]
    waves: float

    @property
    def floor(self) -> float:
        return max(self.seconds.values())

    @property
    def serial(self) -> float:
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)


def predict(gpu: Gpu, launch: Launch, loop: Loop) -> Prediction:
    """Resource demand of one launch; DRAM is the caller's, who knows the tensors."""
    c, scale = launch.counts, launch.blocks / launch.blocks_run
    wide = 1 if gpu.arch >= 80 else 2  # HMMA instructions for k = 16
    arithmetic = {"FFMA": c["fma"] / 32, "HMMA": c["mma_k8"] + wide * c["mma_k16"], "LDG": c["global_load_requests"]}
    instructions = arithmetic.get(loop.kind, 0) * loop.instructions / loop.counted
    # What stands outside that loop is at least the staging: a load, a store and their addresses.
    instructions += 2 * (c["global_load_requests"] + c["shared_store_requests"] + c["global_store_requests"])
    turns = c["shared_load_wavefronts"] + c["shared_store_wavefronts"] + c["ldmatrix_wavefronts"]
    requested = c["global_load_sectors"] + c["global_store_sectors"]
    fetched = c["global_block_sectors"] + c["global_store_sectors"]
    cycles = {
        "issue": instructions / gpu.schedulers,
        "fma": c["fma"] / gpu.fma_lanes,
        "tensor": (2048 * c["mma_k8"] + 4096 * c["mma_k16"]) / gpu.tensor_flop,
        "shared": turns,
        "l1": requested * 32 / gpu.l1_bytes,
        "l2": fetched * 32 / gpu.l2_bytes,
    }
    resident = gpu.multiprocessors * gpu.resident_blocks(launch, loop.registers)
    waves = launch.blocks / resident
    share = launch.blocks / gpu.multiprocessors
    tail = math.ceil(share) / share
    seconds = {k: v * scale * tail / gpu.multiprocessors / gpu.hertz for k, v in cycles.items()}
    return Prediction(launch.kernel, seconds, waves)


def random_pattern(shape: Shape, density: float) -> dict[str, Tensor]:
    """CSR by output channel and by input channel, as ilnas_kernels.Pattern holds them."""
    generator = torch.Generator().manual_seed(SEED)
    taps, numel = shape.kernel**2, shape.out_channels * shape.in_channels * shape.kernel**2
    flat = torch.randperm(numel, generator=generator)[: round(density * numel)].sort().values
    row, col = flat // (shape.in_channels * taps), flat % (shape.in_channels * taps)
    channel, t_col = col // taps, row * taps + col % taps
    perm = (channel * shape.out_channels * taps + t_col).argsort()

    def offsets(of: Tensor, count: int) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(of, minlength=count).cumsum(0)]).int()

    return {
        "row_ptr": offsets(row, shape.out_channels),
        "col": col.int(),
        "t_row_ptr": offsets(channel, shape.in_channels),
        "t_col": t_col[perm].int(),
        "t_perm": perm.int(),
    }


def run_launches(
    device: Device, op: str, shape: Shape, dtype: str, density: float, route: str = "best"
) -> list[Launch]:
    """The op's kernels on zeros: what they execute depends on the pattern and the shape alone."""
    code, storage = DTYPES[dtype]
    p, nnz = random_pattern(shape, density), round(density * shape.out_channels * shape.in_channels * shape.kernel**2)
    x = torch.zeros(shape.batch, shape.in_channels, shape.height, shape.width, dtype=storage)
    out = torch.zeros(shape.batch, shape.out_channels, shape.height, shape.width, dtype=storage)
    values, sizes, route = torch.zeros(nnz, dtype=storage), In(shape.sizes()), ROUTES[route]
    strides = {name: In(strides_of(image)) for name, image in (("x", x), ("out", out))}

    def workspace(function: str, *arguments: int) -> Scratch:
        size = torch.zeros(1, dtype=torch.long)
        device.run(function, route, code, sizes, nnz, *arguments, InOut(size))
        return Scratch(torch.empty(max(int(size), 1), dtype=torch.uint8))

    row_ptr, col = In(p["row_ptr"]), In(p["col"])
    if op == "absent_topk":
        k = round(TOPK_SHARE * shape.out_channels * shape.in_channels * shape.kernel**2)
        size = torch.zeros(1, dtype=torch.long)
        device.run("topk_workspace", sizes, k, 0, InOut(size))
        answer = [Scratch(torch.empty(n, dtype=t)) for n, t in ((k, torch.long), (k, torch.float), (1, torch.long))]
        launches = device.run(
            "topk", code, sizes, row_ptr, col, nnz, In(out), strides["out"], In(x), strides["x"], k, 0, 0.0, *answer,
            Scratch(torch.empty(int(size), dtype=torch.uint8)),
        )  # fmt: skip
        return usual_passes(launches)
    if op == "grad_values":
        space = workspace("grad_values_workspace")
        return device.run(
            "grad_values", route, code, sizes, In(out), strides["out"], In(x), strides["x"], row_ptr, col, nnz,
            Scratch(values), space,
        )  # fmt: skip
    backward = op == "grad_input"
    source, target, columns = (out, x, "t_") if backward else (x, out, "")
    rows = In(p[columns + "row_ptr"]), In(p[columns + "col"])
    form = None if dtype == "float32" else kept_form(device, sizes, rows, nnz, backward)
    space = workspace("gather_workspace", int(backward), int(form is not None))
    return device.run(
        "gather", route, code, int(backward), sizes, In(source), strides["out" if backward else "x"], In(values), None,
        *rows, In(p["t_perm"]) if backward else None, nnz, Scratch(target), strides["x" if backward else "out"], form,
        space,
    )  # fmt: skip


def strides_of(image: Tensor) -> Tensor:
    """As the bindings pass them: 0 for a dimension of one element."""
    return torch.tensor([0 if n == 1 else s for n, s in zip(image.shape, image.stride(), strict=True)])


def usual_passes(launches: list[Launch]) -> list[Launch]:
    """Without the passes that find the search done: the device decides, and mostly one pass over the tiles suffices.

    The last seven decisions end passes that are all alike (csrc/cuda/absent_topk.cu); of those the first counts.
    """
    decisions = [i for i, launch in enumerate(launches) if launch.kernel == "decide_kernel"]
    return launches[: decisions[-7] + 1] + launches[decisions[-1] + 1 :]


def kept_form(device: Device, sizes: In, rows: tuple[In, In], nnz: int, backward: bool) -> In:
    """What a pattern's first call leaves to the later ones, which are what is predicted."""
    count = torch.zeros(1, dtype=torch.long)
    device.run("form_bytes", sizes, nnz, int(backward), InOut(count))
    form = torch.zeros(int(count), dtype=torch.uint8)
    device.run("form", sizes, int(backward), *rows, nnz, Scratch(form))
    return In(form)


def predict_op(
    gpu: Gpu, library, op: str, shape: Shape, dtype: str, density: float, blocks: int, route: str = "best"
) -> dict:
    """One row of the report."""
    device = Device(
        library, arch=gpu.arch, multiprocessors=gpu.multiprocessors, shared_limit=gpu.shared_per_block, profile=True,
        blocks_to_run=blocks, run_in_full="condense_kernel",
    )  # fmt: skip
    loops = committed_loops(gpu.table_arch)
    predictions = []
    for launch in run_launches(device, op, shape, dtype, density, route):
        if (name := compiled_name(launch.kernel)) not in loops:
            sys.exit(f"tools/cuda_resources.md does not list {name}: run python tools/check_cuda.py --write")
        predictions.append(predict(gpu, launch, loops[name]))
    images = shape.batch * shape.height * shape.width * (shape.in_channels + shape.out_channels)
    dram = images * (4 if dtype == "float32" else 2) / gpu.dram_bytes_per_second
    main = max(predictions, key=lambda p: p.floor)
    floor = max(dram, sum(p.floor for p in predictions))
    dense = shape.flop() / gpu.dense_tflops[dtype] / 1e12
    return {
        "device": gpu.name,
        "capability": list(divmod(gpu.arch, 10)),
        "op": op,
        "dtype": dtype,
        "layer": shape.layer,
        "density": density,
        "kind": "prediction",
        "kernel": main.kernel,
        "bound": "dram" if dram > main.floor else main.bound,
        "waves": round(main.waves, 2),
        "floor_us": round(1e6 * floor, 1),
        "serial_us": round(1e6 * (dram + sum(p.serial for p in predictions)), 1),
        "dense_us": round(1e6 * dense, 1),
        "by_resource_us": {k: round(1e6 * v, 1) for k, v in main.seconds.items()} | {"dram": round(1e6 * dram, 1)},
    }


def add_measurements(rows: list[dict], path: Path) -> None:
    """Our own time in NCHW, which is what is predicted, and the fastest dense one, where gpu.json has the case."""
    results = json.loads(path.read_text())
    found = {(r["op"], r["layer"], r["dtype"], r["density"]): r["microseconds"] for r in results["rows"]}
    for row in rows:
        times = found.get((row["op"], row["layer"], row["dtype"], row["density"]))
        if times is not None and list(results["capability"]) == row["capability"]:
            row["measured_us"] = times["ours nchw"]
            row["measured_dense_us"] = min(t for name, t in times.items() if name.startswith("dense"))


def print_rows(rows: list[dict]) -> None:
    print("Predictions of a resource model, not measurements. us; dense: cuDNN at the rate assumed in this program")
    header = f"{'device':15}{'op':12}{'dtype':9}{'density':>8}{'floor':>9}{'serial':>9}{'dense':>9}{'dense/floor':>12}"
    print(f"{header}{'measured':>10}{'meas/floor':>11}  bound   kernel")
    for row in rows:
        found = row.get("measured_us")
        measured = f"{found:10.1f}{found / row['floor_us']:11.2f}" if found else f"{'-':>10}{'-':>11}"
        print(
            f"{row['device']:15}{row['op']:12}{row['dtype']:9}{row['density']:8.3f}{row['floor_us']:9.1f}"
            f"{row['serial_us']:9.1f}{row['dense_us']:9.1f}{row['dense_us'] / row['floor_us']:12.2f}{measured}"
            f"  {row['bound']:7} {row['kernel']}"
        )


def print_markdown(rows: list[dict]) -> None:
    """One line for a device, type and operation: floor - serial at each density, and what binds."""
    densities = sorted({row["density"] for row in rows}, reverse=True)
    print("| device | dtype | op | dense | " + " | ".join(f"{density:.0%}" for density in densities) + " |")
    print("|---|---|---|---|" + "---|" * len(densities))
    lines: dict[tuple, dict[float, dict]] = {}
    for row in rows:
        lines.setdefault((row["device"], row["dtype"], row["op"], row["dense_us"]), {})[row["density"]] = row
    for (device, dtype, op, dense), cells in lines.items():
        texts = [f"{cells[d]['floor_us']:.0f} - {cells[d]['serial_us']:.0f} {cells[d]['bound']}" for d in densities]
        print(f"| {device} | {dtype} | {op} | {dense:.0f} | " + " | ".join(texts) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Shape.parse, default=Shape.parse("128,256,256,16x16,3"))
    parser.add_argument("--density", type=float, nargs="+", default=[0.2, 0.1, 0.05, 0.02, 0.01])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float16", "float32"])
    parser.add_argument("--op", choices=OPS, nargs="+", default=list(OPS))
    parser.add_argument("--route", choices=ROUTES, default="best")
    parser.add_argument("--device", choices=GPUS, nargs="+", default=list(GPUS))
    parser.add_argument("--blocks", type=int, default=2, help="blocks of every grid to emulate")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", action="store_true", help="print a table for a document")
    parser.add_argument("--measured", type=Path, help="JSON of measurements to compare with")
    arguments = parser.parse_args()
    library = compile_kernels([*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "tests/cuda/exports.cpp"])
    rows = [
        predict_op(GPUS[device], library, op, arguments.shape, dtype, density, arguments.blocks, arguments.route)
        for device in arguments.device
        for dtype in arguments.dtype
        if dtype in GPUS[device].dense_tflops
        for op in arguments.op
        for density in arguments.density
    ]
    if arguments.measured:
        add_measurements(rows, arguments.measured)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    (print_markdown if arguments.markdown else print_rows)(rows)


if __name__ == "__main__":
    main()
