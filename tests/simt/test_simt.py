"""The emulator against the definitions of CUDA and the PTX ISA, and against kernels with planted faults."""

import subprocess

import pytest
import torch

from tests.simt.harness import FLAGS, INCLUDES, ROOT, Device, In, InOut, Out, Scratch, SimtError, compile_kernels

HERE = ROOT / "tests/simt"
SEEDS = range(4)


@pytest.fixture(scope="module")
def sound():
    return compile_kernels([HERE / "sound.cu", HERE / "sample.cu"])


@pytest.fixture(scope="module")
def faulty():
    return compile_kernels([HERE / "faults.cu"])


RACE = "race: .*no barrier orders them"
FAULTS = {
    "missing_block_barrier": f"{RACE}|uninitialised",
    "missing_barrier_before_overwrite": RACE,
    "broadcast_overwritten_by_a_reader": RACE,
    "two_writers": f"write at byte 0 of shared array 'flag'.*after a write.*{RACE[6:]}",
    "missing_warp_barrier": RACE,
    "warp_barrier_between_warps": f"{RACE}|uninitialised",
    "warp_barrier_of_half_a_warp": f"{RACE}|uninitialised",
    "ldmatrix_without_barrier": RACE,
    "global_race_in_a_block": f"{RACE}|uninitialised",
    "global_race_between_blocks": "race: write .* of block .*nothing orders the blocks",
    "block_reads_what_another_wrote": "nothing orders the blocks|uninitialised",
    "plain_read_of_a_shared_counter": f"{RACE}",
    "shared_past_the_end": r"thread \(63,0,0\): write of 4 bytes at byte 252 of shared array 'tile' .*out of bounds",
    "shared_before_the_start": r"thread \(0,0,0\): write of 4 bytes at byte -4 of shared array 'tile' .*out of bounds",
    "dynamic_shared_past_the_end": "dynamic shared memory.*out of bounds",
    "vector_over_the_end": "read of 16 bytes at byte 16 of shared array 'tile' .*out of bounds",
    "global_past_the_end": "write of 4 bytes at byte 256 of global array .*out of bounds",
    "global_before_the_start": "read of 4 bytes at byte -4 of global array .*out of bounds",
    "pointer_to_a_local": "out of bounds: the pointer belongs to no array",
    "uninitialised_shared": r"thread \(7,0,0\): read at byte 28 of shared array 'tile' .*uninitialised",
    "shared_kept_from_the_block_before": r"block \(1,0,0\).*uninitialised",
    "uninitialised_global": "read at byte .* of global array .*uninitialised",
    "misaligned_shared_vector": "at byte 8 of shared array 'tile' .*misaligned: .*multiple of 16",
    "misaligned_global_vector": "misaligned: .*multiple of 8",
    "misaligned_store": "misaligned: .*multiple of 16",
    "misaligned_ldmatrix_row": "misaligned: .*multiple of 16",
    "ldmatrix_row_outside": r"thread \(8,0,0\).*out of bounds",
    "barrier_after_exit": r"divergent barrier: 1 threads exited, first thread \(3,0,0\); 63 threads wait at",
    "barriers_at_two_places": "divergent barrier: .*all threads of a block must meet at the same one",
    "barrier_against_warp_barrier": "divergent barrier|divergent warp",
    "shuffle_in_a_branch": "divergent barrier: .*__shfl_xor_sync",
    "shuffle_from_outside_the_mask": "reads lane 20, which does not take part",
    "shuffle_without_itself": "does not name the calling lane 0|divergent",
    "shuffle_in_a_short_warp": "the block ends before it",
    "two_warp_functions": "divergent warp",
    "write_to_an_input": "registered read-only",
    "copy_not_waited_for": "cp_async that has not been waited for",
    "copy_not_committed": "cp_async that has not been waited for",
    "copy_without_barrier": f"{RACE}|waited for|uninitialised",
    "misaligned_copy": "misaligned",
    "readonly_load_of_an_output": "load_readonly",
    "readonly_load_before_a_write": "load_readonly|registered read-only",
    "bfloat16_mma_on_turing": "needs sm_80, the device is sm_75",
    "index_overflow": r"thread \(0,0,0\): signed overflow in a multiplication at faults.cu:",
    "local_array_overrun": "local array out of bounds at faults.cu:",
    "shift_too_far": "shift by too many bits",
    "division_by_zero": "division by zero",
    "too_much_static_shared": "more than 49152 bytes of static shared memory",
    "too_much_shared_in_all": "needs 69632 bytes of shared memory, the device has 65536",
    "too_much_dynamic_shared": "66560 bytes of dynamic shared memory, the device has 65536",
    "too_many_threads": "1 to 1024 threads",
    "kernel_in_a_variable": r"^offset_kernel<64>, block \(0,0,0\).*out of bounds",
    "unwritten_output": "byte 252 of output .* was never written",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(faulty, fault, seed):
    arch = 75 if "turing" in fault else 80
    x = torch.arange(64.0)
    with pytest.raises(SimtError, match=FAULTS[fault]):
        Device(faulty, arch=arch, seed=seed).run(fault, In(x), Out(torch.empty(64)))


def test_an_error_names_kernel_block_thread_array_and_rule(faulty):
    with pytest.raises(SimtError) as caught:
        Device(faulty).run("misaligned_store", In(torch.zeros(64)), Out(torch.empty(64)))
    assert str(caught.value) == (
        "misaligned_store_kernel, block (0,0,0), thread (0,0,0): write of 16 bytes at byte 4 of global array "
        "'misaligned_store argument 1' (256 bytes): misaligned: the address must be a multiple of 16"
    )


def test_a_fault_does_not_outlive_its_run(faulty, sound):
    for library, kernel in ((faulty, "two_writers"), (sound, "mirror"), (faulty, "two_writers")):
        device, out = Device(library), torch.empty(64)
        if library is faulty:
            with pytest.raises(SimtError):
                device.run(kernel, In(torch.ones(64)), Out(out))
        else:
            device.run(kernel, In(torch.ones(64)), Out(out))


def test_an_element_must_not_be_bound_to_auto(tmp_path):
    source = tmp_path / "auto.cu"
    line = "__global__ void k(ilnas::cuda::Global<float> p) {{ {} v = p[0]; p[1] = v; }}\n"
    compiled = []
    for word in ("const float", "auto"):
        source.write_text('#include "cuda/device.cuh"\n' + line.format(word))
        command = ["g++", *FLAGS, *INCLUDES, "-x", "c++", "-fsyntax-only", str(source)]
        compiled.append(subprocess.run(command, capture_output=True, check=False).returncode == 0)
    assert compiled == [True, False]


# ---- what is allowed does what CUDA says ----


@pytest.mark.parametrize("arch", [75, 80])
@pytest.mark.parametrize("seed", SEEDS)
def test_barriers_of_blocks_and_warps_and_copies(sound, seed, arch):
    x, out = torch.arange(64.0), torch.empty(64)
    Device(sound, arch=arch, seed=seed).run("mirror", In(x), Out(out))
    copied = x.clone()
    copied[5] = 0  # an invalid copy writes zeros
    in_warp = x.view(2, 32).flip(1)
    expected = copied.flip(0) + (in_warp + in_warp.view(2, 16, 2).flip(2).view(2, 32)).view(64)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_functions(sound, seed):
    x = torch.randint(-50, 50, (32,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    out = torch.empty(8, 32, dtype=torch.int32)
    Device(sound, seed=seed).run("warp_functions", In(x), Out(out))
    lane = torch.arange(32)
    assert torch.equal(out[0], x[lane * 7 % 32])
    assert torch.equal(out[1], x[torch.where(lane % 8 >= 3, lane - 3, lane)])
    assert torch.equal(out[2], x[torch.where(lane % 8 < 5, lane + 3, lane)])
    assert torch.equal(out[3], x[lane ^ 5])
    ballot = sum(1 << i for i in range(32) if x[i] > 0)
    assert (out[4].long() & 0xFFFFFFFF == ballot).all()
    halves = x.view(2, 16)
    assert torch.equal(out[5].view(2, 16), (halves > 30).any(1, keepdim=True).int().expand(2, 16))
    assert torch.equal(out[6].view(2, 16), torch.ones(2, 16, dtype=torch.int32))
    assert torch.equal(out[7], x[lane ^ 1])


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(sound, seed):
    blocks, n = 3, 120
    x = torch.randint(-(2**40), 2**40, (n,), generator=torch.Generator().manual_seed(seed))
    wide = torch.tensor([-(2**62), 2**62, 0, -1, 0])
    narrow, ticket = torch.zeros(2, dtype=torch.int32), torch.zeros(n + 1, dtype=torch.int32)
    Device(sound, seed=seed).run("atomics", In(x), InOut(wide), InOut(narrow), InOut(ticket), blocks)
    assert wide[:3].tolist() == [x.max(), x.min(), x.sum()]
    assert wide[3] in x and wide[4] in x
    assert narrow.tolist() == [n, -1]
    assert ticket[0] == n and (ticket[1:] == 1).all()


def test_voting_barriers(sound):
    x, out = torch.arange(50, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    Device(sound).run("votes", In(x), Out(out))
    assert out.tolist() == [25, 0]
    x[49] = 1001
    Device(sound, seed=1).run("votes", In(x), Out(out))
    assert out.tolist() == [25, 1]


def _halves(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., 32] of packed halves -> float16 [..., 32, 2]."""
    return words.contiguous().view(torch.float16).unflatten(-1, (32, 2))


def test_ldmatrix_layout(sound):
    """PTX ISA 9.7.14.5.15: lane l holds elements [l / 4, 2 (l % 4) + i] of each matrix, or of its transpose."""
    x, out = torch.arange(256.0).half(), torch.empty(14, 32, dtype=torch.int32)
    Device(sound).run("fragments_of", In(x), Out(out))
    matrices = x.view(4, 8, 8)
    for first, of in ((0, matrices), (7, matrices.transpose(1, 2))):
        for offset, count in ((0, 1), (1, 2), (3, 4)):
            expected = of[:count].reshape(count, 32, 2)  # row-major: lane 4 row + column / 2
            assert torch.equal(_halves(out[first + offset : first + offset + count]), expected)


MMA = {  # kind: (depth, element type)
    0: (8, torch.float16),
    1: (16, torch.float16),
    2: (8, torch.bfloat16),
    3: (16, torch.bfloat16),
    4: (8, torch.float32),
}


def _scatter(matrix, registers, place, dtype):
    """The registers of the 32 lanes: element place(lane, register, i) of the matrix, i over what a register holds."""
    held = 1 if dtype == torch.float32 else 2
    values = torch.zeros(registers, 32, held, dtype=dtype)
    for register in range(registers):
        for lane in range(32):
            for i in range(held):
                values[register, lane, i] = matrix[place(lane // 4, lane % 4, register, i)]
    return values.view(torch.int32).squeeze(-1)


@pytest.mark.parametrize("kind", MMA)
def test_mma_layout(sound, kind):
    """PTX ISA 9.7.14.5.7 and .8: the fragments, written out from the tables, give the product of the matrices."""
    depth, dtype = MMA[kind]
    generator = torch.Generator().manual_seed(kind)
    a = torch.randint(-8, 8, (16, depth), generator=generator).to(dtype)  # small integers: every sum is exact
    b = torch.randint(-8, 8, (depth, 8), generator=generator).to(dtype)
    c = torch.randint(-8, 8, (16, 8), generator=generator).float()
    if dtype == torch.float32:
        ra = _scatter(a, 4, lambda g, t, r, i: (g + 8 * (r % 2), t + 4 * (r // 2)), dtype)
        rb = _scatter(b, 2, lambda g, t, r, i: (t + 4 * r, g), dtype)
    else:
        words = depth // 4
        ra = torch.zeros(4, 32, dtype=torch.int32)
        ra[:words] = _scatter(a, words, lambda g, t, r, i: (g + 8 * (r % 2), 2 * t + i + 8 * (r // 2)), dtype)
        rb = torch.zeros(2, 32, dtype=torch.int32)
        rb[: depth // 8] = _scatter(b, depth // 8, lambda g, t, r, i: (2 * t + i + 8 * r, g), dtype)
    lanes = torch.arange(32)
    rows = torch.stack([lanes // 4 + 8 * (i // 2) for i in range(4)])
    cols = torch.stack([2 * (lanes % 4) + i % 2 for i in range(4)])
    d = c[rows, cols].contiguous()
    Device(sound).run("mma", In(ra), In(rb), InOut(d), kind)
    result = torch.zeros(16, 8)
    result[rows, cols] = d
    assert torch.equal(result, a.float() @ b.float() + c)


def test_tf32_ignores_the_low_bits(sound):
    a = torch.full((4, 32), 1 + 2**-11).view(torch.int32)
    b, d = torch.full((2, 32), 1.0).view(torch.int32), torch.zeros(4, 32)
    Device(sound).run("mma", In(a), In(b), InOut(d), 4)
    assert (d == 8).all()


@pytest.mark.parametrize(("layout", "right"), [(0, True), (1, False), (2, False), (3, False), (4, False)])
def test_a_wrong_fragment_layout_shows_in_the_product(faulty, layout, right):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 8, size, generator=generator).half() for size in ((16, 16), (16, 8)))
    c = torch.empty(16, 8)
    Device(faulty).run("fragments", In(a), In(b), Out(c), layout)
    assert torch.equal(c, a.float() @ b.float()) == right


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("arch", "dtype"), [(75, torch.float16), (80, torch.float16), (80, torch.bfloat16)])
def test_a_tiled_product_matches_float64(sound, arch, dtype, seed):
    m, n, k = 48, 24, 64
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(size, generator=generator).to(dtype) for size in ((m, k), (k, n)))
    c = torch.empty(m, n)
    (launch,) = Device(sound, arch=arch, seed=seed).run("gemm", In(a), In(b), Out(c), m, n, k, dtype == torch.bfloat16)
    expected = a.double() @ b.double()
    # One rounding towards zero, at most 2^-23 of the partial sum, for each of the k / 16 products added.
    bound = (k / 16) * 2.0**-23 * (a.double().abs() @ b.double().abs())
    assert ((c - expected).abs() <= bound).all()
    assert launch.kernel == f"gemm_kernel<{'Half' if dtype == torch.float16 else 'BFloat16'}>"
    assert (launch.blocks, launch.blocks_run, launch.threads, launch.static_shared) == (9, 9, 32, 768)
    assert launch.counts["mma_k16"] == m // 16 * (n // 8) * (k // 16)
    assert launch.counts["ldmatrix"] == 6 * launch.counts["mma_k16"]


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffled_sums(sound, seed):
    rows, cols = 5, 997
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    total, largest = torch.empty(rows), torch.empty(1, dtype=torch.int32)
    Device(sound, seed=seed).run("row_sum", In(x), Out(total), Out(largest), rows, cols)
    bound = cols * 2.0**-24 * x.double().abs().sum(1)
    assert ((total - x.double().sum(1)).abs() <= bound).all()
    assert largest.item() == int(total.max())


def test_16_bit_conversions_round_as_torch_does(sound):
    special = [
        0.0,
        -0.0,
        1e-8,
        6e-8,
        6.1e-5,
        65504.0,
        65519.9,
        65520.0,
        1e38,
        float("inf"),
        -float("inf"),
        float("nan"),
    ]
    x = torch.cat([torch.tensor(special), torch.randn(500) * 10.0 ** torch.randint(-9, 6, (500,))])
    bits, back = torch.empty(len(x), 2, dtype=torch.int32), torch.empty(len(x), 2)
    Device(sound).run("numbers", In(x), Out(bits), Out(back), len(x))
    for i, dtype in enumerate((torch.float16, torch.bfloat16)):
        expected = x.to(dtype)
        assert torch.equal(back[:, i].nan_to_num(1.5), expected.float().nan_to_num(1.5))
        assert torch.equal(bits[:, i][~x.isnan()].short(), expected.view(torch.int16)[~x.isnan()])


def test_the_seed_shuffles_threads_and_blocks(sound):
    orders = set()
    for seed in range(6):
        ticket, order = torch.zeros(1, dtype=torch.int32), torch.empty(24, dtype=torch.int32)
        Device(sound, seed=seed).run("order", InOut(ticket), Out(order))
        assert order.sort().values.tolist() == list(range(24))
        again = torch.empty(24, dtype=torch.int32)
        Device(sound, seed=seed).run("order", InOut(torch.zeros(1, dtype=torch.int32)), Out(again))
        assert torch.equal(order, again)
        orders.add(tuple(order.tolist()))
    assert len(orders) == 6
    assert len({tuple(i // 8 for i in order) for order in orders}) > 1  # blocks too


@pytest.mark.parametrize(
    ("stride", "vector", "row_words", "load_turns", "matrix_turns"),
    [
        (1, 1, 4, 1, 4),  # 32 neighbouring words; rows of 16 bytes side by side
        (0, 1, 4, 1, 4),  # one word for all
        (2, 1, 4, 2, 4),
        (32, 1, 32, 32, 32),  # every lane in one bank; every row of a matrix in the same banks
        (33, 1, 36, 1, 4),  # a padding word removes the conflict
        (4, 4, 4, 4, 4),  # 128-bit loads: eight lanes a turn
        (8, 4, 8, 8, 8),
        (128, 4, 16, 32, 16),
    ],
)
def test_the_profile_counts_bank_conflicts_and_sectors(sound, stride, vector, row_words, load_turns, matrix_turns):
    x, out = torch.zeros(31 * stride + 1), torch.empty(64)
    device = Device(sound, profile=True, blocks_to_run=2)
    (launch,) = device.run("traffic", In(x), Out(out), stride, vector, row_words)
    warps = 2 * launch.blocks_run
    assert (launch.blocks, launch.blocks_run) == (6, 2)
    assert launch.counts["shared_load_requests"] == warps
    assert launch.counts["shared_load_wavefronts"] == warps * load_turns
    assert launch.counts["ldmatrix_wavefronts"] == warps * matrix_turns
    assert launch.counts["shared_store_wavefronts"] == launch.counts["shared_store_requests"] == warps * 4096 // 64
    sectors = {(x.data_ptr() + 4 * stride * lane) // 32 for lane in range(32)}
    assert launch.counts["global_load_sectors"] == warps * len(sectors)
    assert launch.counts["global_block_sectors"] == launch.blocks_run * len(sectors)  # both warps load the same


def test_a_run_in_full_is_not_sampled(sound):
    device = Device(sound, profile=True, blocks_to_run=2, run_in_full="traffic")
    (launch,) = device.run("traffic", In(torch.zeros(32)), Out(torch.empty(64)), 1, 1, 4)
    assert launch.blocks_run == launch.blocks == 6


def test_scratch_may_stay_unwritten(faulty):
    Device(faulty).run("unwritten_output", In(torch.zeros(64)), Scratch(torch.empty(64)))
