"""tools/resource_model.py: its arithmetic, and that what it counts is what the kernels execute."""

import json
import sys

import pytest
import torch

from ilnas_kernels.pattern import Pattern
from tests.simt.harness import COUNTERS, ROOT, Device, Launch, compile_kernels

sys.path.insert(0, str(ROOT / "tools"))

import resource_model
from resource_model import GPUS, Loop, Shape, predict

SMALL = Shape(8, 16, 16, 8, 8, 3)


@pytest.fixture(scope="module")
def library():
    return compile_kernels([*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "tests/cuda/exports.cpp"])


def launch_with(blocks=34, blocks_run=34, **counts):
    return Launch("k", blocks, blocks_run, 256, 0, 0, dict.fromkeys(COUNTERS, 0) | counts)


def test_each_resource_is_charged_at_its_rate():
    gpu = GPUS["rtx2060s"]
    counts = {
        "fma": 640,
        "mma_k8": 10,
        "shared_load_wavefronts": 70,
        "global_load_sectors": 6,
        "global_block_sectors": 4,
    }
    launch = launch_with(**{name: 34 * count for name, count in counts.items()})
    seconds = predict(gpu, launch, Loop(32, 12, 4, "FFMA")).seconds
    cycles = {name: round(value * gpu.hertz, 6) for name, value in seconds.items()}
    # a block each on 34 multiprocessors: 20 FFMA a warp in loops of 12 instructions of which 4 are FFMA, 4 schedulers
    assert cycles == {"issue": 20 * 3 / 4, "fma": 10, "tensor": 10 * 2048 / 512, "shared": 70, "l1": 3, "l2": 2}


def test_floor_and_serial_bracket_the_launch():
    prediction = predict(
        GPUS["h200"], launch_with(132, 132, fma=132 * 128, ldmatrix_wavefronts=132), Loop(32, 0, 1, "-")
    )
    assert prediction.bound in ("fma", "shared")
    assert prediction.floor == max(prediction.seconds.values()) <= prediction.serial == sum(prediction.seconds.values())


def test_sampled_blocks_stand_for_all_and_the_busiest_multiprocessor_counts():
    gpu, loop = GPUS["rtx2060s"], Loop(32, 0, 1, "-")
    all_run = predict(gpu, launch_with(35, 35, fma=35 * 64), loop).seconds["fma"]
    some_run = predict(gpu, launch_with(35, 5, fma=5 * 64), loop).seconds["fma"]
    assert some_run == pytest.approx(all_run) == pytest.approx(2 / gpu.hertz)


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [(256, 64, 0, 4), (256, 128, 0, 2), (256, 65, 0, 3), (128, 32, 30 * 1024, 2), (1024, 64, 0, 1)],
)
def test_resident_blocks(threads, registers, shared, blocks):
    launch = Launch("k", 1, 1, threads, shared, 0, {})
    assert GPUS["rtx2060s"].resident_blocks(launch, registers) == blocks


def test_the_pattern_is_that_of_ilnas_kernels():
    ours = resource_model.random_pattern(SMALL, 0.2)
    taps = SMALL.kernel**2
    row = torch.repeat_interleave(torch.arange(SMALL.out_channels), ours["row_ptr"].diff())
    mask = torch.zeros(SMALL.out_channels, SMALL.in_channels * taps, dtype=torch.bool)
    mask[row, ours["col"].long()] = True
    theirs = Pattern.from_mask(mask.view(SMALL.out_channels, SMALL.in_channels, SMALL.kernel, SMALL.kernel))
    for name, tensor in ours.items():
        assert torch.equal(tensor, getattr(theirs, name)), name


@pytest.mark.parametrize("op", ["forward", "grad_input", "grad_values"])
def test_counted_work_is_the_work_of_the_problem(library, op):
    """float32: every live weight meets every result once; positions of a tile outside the image may add to that."""
    device = Device(library, arch=75, profile=True)
    launches = resource_model.run_launches(device, op, SMALL, "float32", 0.2)
    nnz = round(0.2 * SMALL.out_channels * SMALL.in_channels * SMALL.kernel**2)
    useful = nnz * SMALL.batch * SMALL.height * SMALL.width
    assert useful <= sum(launch.counts["fma"] for launch in launches) <= 2.5 * useful


def test_absent_topk_counts_every_weight_once(library):
    """One pass over the tiles, of 64 by 128 weights, and none of those that find the search done."""
    device = Device(library, arch=75, profile=True)
    launches = resource_model.run_launches(device, "absent_topk", SMALL, "float32", 0.2)
    names = [launch.kernel.split("<")[0] for launch in launches]
    assert names == ["start_kernel", "gradient_tiles_kernel", "filter_kernel", "decide_kernel",
                     "sort_blocks_kernel", "decode_kernel"]  # fmt: skip
    tiles = -(-SMALL.out_channels // 64) * -(-SMALL.in_channels * SMALL.kernel**2 // 128)
    computed = tiles * 64 * 128 * SMALL.batch * SMALL.height * SMALL.width
    assert computed <= launches[1].counts["fma"] <= 1.1 * computed + tiles * 64 * 128 * 8 * launches[1].blocks


@pytest.mark.parametrize("op", resource_model.OPS)
@pytest.mark.parametrize(("gpu", "dtype"), [("rtx2060s", "float16"), ("h200", "bfloat16"), ("h200", "float32")])
def test_a_row_is_labelled_and_every_kernel_is_in_the_table(library, gpu, dtype, op):
    row = resource_model.predict_op(GPUS[gpu], library, op, SMALL, dtype, 0.2, blocks=1)
    assert row["kind"] == "prediction"
    assert 0 < row["floor_us"] <= row["serial_us"]
    assert row["by_resource_us"].keys() == {"issue", "fma", "tensor", "shared", "l1", "l2", "dram"}


def test_measurements_are_joined_by_what_they_measure(tmp_path):
    row = {"op": "forward", "layer": SMALL.layer, "dtype": "float16", "density": 0.1}
    times = {"ours nchw": 12.5, "ours nhwc": 3.0, "dense nchw": 40.0, "dense nhwc": 30.0}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"capability": [9, 0], "rows": [row | {"microseconds": times}]}))
    here, elsewhere = row | {"capability": [9, 0]}, row | {"capability": [7, 5]}
    other = here | {"density": 0.2}
    rows = [dict(here), dict(elsewhere), dict(other)]
    resource_model.add_measurements(rows, path)
    assert rows == [here | {"measured_us": 12.5, "measured_dense_us": 30.0}, elsewhere, other]


def test_layers_are_called_as_the_benchmark_calls_them():
    assert Shape.parse("128,256,256,16x16,3").layer == "conv3x3 128x256x256x16"


@pytest.mark.parametrize("text", ["128,256,256,16x16", "a,b,c,1x1,3", ""])
def test_a_malformed_shape_is_refused(text):
    with pytest.raises(Exception, match="a shape is batch,in,out,HxW,kernel"):
        Shape.parse(text)
