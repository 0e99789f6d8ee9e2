"""Pattern: the two compressed forms, the constructors, and packed bits."""

import copy
import pickle

import pytest
import torch

from ilnas_kernels import Pattern
from ilnas_kernels.pattern import pack_bits, unpack_bits

SHAPES = [(1, 1), (7, 13), (6, 2, 3, 3), (8, 1, 1, 1), (4, 3, 2, 5)]


def random_mask(shape):
    return torch.rand(shape) < 0.4


@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] % 2 == 0], ids=str)
def test_both_forms_name_the_live_positions(shape, groups):
    mask = random_mask(shape)
    pattern = Pattern.from_mask(mask, groups)
    rows, in_per_group = shape[:2]
    taps = pattern.taps
    flat = mask.view(rows, in_per_group * taps)
    index = mask.flatten().nonzero().flatten().tolist()
    assert pattern.index.tolist() == index
    for row in range(rows):
        live = flat[row].nonzero().flatten()
        assert pattern.col[pattern.row_ptr[row] : pattern.row_ptr[row + 1]].tolist() == live.tolist()
    out_per_group = rows // groups
    entries = flat.nonzero().tolist()
    for channel in range(pattern.in_channels):
        begin, end = pattern.t_row_ptr[channel].item(), pattern.t_row_ptr[channel + 1].item()
        t_col = pattern.t_col[begin:end].tolist()
        assert t_col == sorted(t_col)
        for entry, place in zip(t_col, pattern.t_perm[begin:end].tolist(), strict=True):
            row, col = entries[place]
            assert row // out_per_group * in_per_group + col // taps == channel
            assert row % out_per_group * taps + col % taps == entry
    assert pattern.t_row_ptr[-1] == pattern.nnz == mask.sum()


@pytest.mark.parametrize("channels", (2**15 - 1, 2**15, 70_000))
def test_more_channels_than_short_numbers_count(channels):
    pattern = Pattern.random((3, channels), 0.1, generator=torch.Generator().manual_seed(0))
    channel, row = pattern.mask.t().nonzero().unbind(1)
    assert torch.equal(pattern.t_col.long(), row)
    assert torch.equal(pattern.index[pattern.t_perm], row * channels + channel)
    assert torch.equal(pattern.t_row_ptr.diff().long(), channel.bincount(minlength=channels))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_constructors_agree(shape):
    mask = random_mask(shape)
    pattern = Pattern.from_mask(mask)
    assert torch.equal(pattern.mask, mask)
    index = pattern.index
    assert Pattern.from_index(shape, index[torch.randperm(index.numel())]) == pattern
    assert unpack_bits(pack_bits(pattern), shape) == pattern
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert copy.deepcopy(pattern) is pattern
    assert pattern != Pattern.from_mask(~mask)


def test_all_live_takes_memory_only_when_asked():
    pattern = Pattern.full((4, 6, 3, 3), groups=2)
    assert not {"row_ptr", "col", "operands"} & vars(pattern).keys()
    assert pattern.mask.all()
    assert pattern == Pattern.from_mask(torch.ones(4, 6, 3, 3, dtype=torch.bool), 2)
    for ours, theirs in zip(pattern.operands, Pattern.from_mask(pattern.mask, 2).operands, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("density", (0.0, 0.1, 0.5, 1.0))
def test_random_has_exactly_the_density(density):
    draw = lambda seed: Pattern.random((7, 11), density, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert draw(1).nnz == round(density * 77)
    assert draw(1) == draw(1)
    assert density in (0.0, 1.0) or draw(1) != draw(2)


def test_packed_bits_take_one_bit_a_weight():
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask.view(-1)[[0, 9, 20]] = True
    assert pack_bits(Pattern.from_mask(mask)).tolist() == [1, 2, 16]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pattern.from_index((2, 3), torch.tensor([0, 6])), "index 6 lies outside a weight of 6 elements"),
        (lambda: Pattern.from_index((2, 3), torch.tensor([-1])), "index -1 lies outside"),
        (lambda: Pattern.from_index((2, 3), torch.tensor([4, 1, 4])), "index 4 is given twice"),
        (lambda: Pattern.random((2, 3), 1.5), r"density must lie in \[0, 1\], got 1.5"),
        (lambda: Pattern.full((3, 2, 1, 1), 2), "divide the 3 output channels, got 2"),
        (lambda: unpack_bits(torch.zeros(2, dtype=torch.uint8), (2, 3)), "1 bytes, got shape"),
    ],
)
def test_bad_patterns(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_plan_is_built_once():
    pattern = Pattern.full((2, 2))
    built = []
    for _ in range(2):
        assert pattern.plan("rows", lambda p: built.append(p) or len(built)) == 1
    assert built == [pattern]
