"""Column-condensed weights: the rows of a block share the union of their live columns, all others are skipped.

With few live weights in a row, a tile of consecutive columns holds hardly any; the union of the columns that a block of
rows uses is dense enough for a matrix product, and the inputs of all other columns are never read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .launch import cdiv


class CondensedPlan(NamedTuple):
    """The live columns of each block of rows, and where each packed value goes. Sizes follow from nnz alone, so that
    building it never waits for the device.

    block_ptr [row blocks * phases + 1] int32: where the list of a block and phase begins.
    cols [nnz] int32: channel in group * taps + tap; the unused rest is 0.
    place [nnz] int32 or int64: position in the condensed weight [cols, block_rows] of each packed value.
    """

    block_ptr: Tensor
    cols: Tensor
    place: Tensor


def build_plan(
    row_ptr: Tensor,
    col: Tensor,
    perm: Tensor | None,
    cols: int,
    groups: int,
    block_rows: int,
    tap_phases: Sequence[int],
    phases: int = 1,
    channels_inner: bool = False,
) -> CondensedPlan:
    """The plan of a row-compressed weight [rows, cols], rows split evenly into groups.

    perm [nnz]: where in the packed values an entry is; None: the entries are in that order.
    tap_phases [taps]: lists are kept apart by the phase, below phases, of an entry's tap (see gather_kernel).
    channels_inner: columns are listed by (tap, channel), as channels_last memory has them, else by (channel, tap).
    """
    rows, nnz, taps = row_ptr.numel() - 1, col.numel(), len(tap_phases)
    rows_per_group = max(rows // groups, 1)
    blocks = groups * cdiv(rows_per_group, block_rows)
    row = torch.repeat_interleave(
        torch.arange(rows, device=col.device), (row_ptr[1:] - row_ptr[:-1]).long(), output_size=nnz
    )
    group, row_in_group = row // rows_per_group, row % rows_per_group
    block = group * cdiv(rows_per_group, block_rows) + row_in_group // block_rows
    tap = col.long() % taps
    phase = torch.tensor(tap_phases, device=col.device)[tap] if phases > 1 else torch.zeros_like(tap)
    ordered_col = tap * (cols // taps) + col // taps if channels_inner else col.long()
    key, order = torch.sort((block * phases + phase) * cols + ordered_col)
    is_first = torch.ones_like(key, dtype=torch.bool)
    is_first[1:] = key[1:] != key[:-1]
    rank = is_first.cumsum(0) - 1
    rank_or_end = torch.cat([rank.new_zeros(1), rank + 1])
    list_starts = torch.arange(blocks * phases + 1, device=col.device) * cols
    # Of the entries before a list's first, the last one's rank + 1 is where the list begins.
    block_ptr = rank_or_end[torch.searchsorted(key, list_starts)].int()
    listed = torch.zeros_like(col).scatter_(0, rank, col[order])
    place = torch.empty_like(rank)
    place[order if perm is None else perm[order].long()] = rank * block_rows + row_in_group[order] % block_rows
    return CondensedPlan(block_ptr, listed, place.int() if nnz * block_rows < 2**31 else place)


@triton.jit
def expand_kernel(values_ptr, place_ptr, condensed_ptr, nnz, NUMBERED: tl.constexpr, BLOCK: tl.constexpr):
    """condensed[place[i]] = values[i], or i itself if NUMBERED."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = entry < nnz
    place = tl.load(place_ptr + entry, mask=live, other=0)
    value = entry if NUMBERED else tl.load(values_ptr + entry, mask=live)
    tl.store(condensed_ptr + place, value, mask=live)


EXPAND_BLOCK = 1024


def condensed_size(nnz: int, lists: int, cols: int) -> int:
    """The most columns that the lists can have together."""
    return min(nnz, lists * cols)


def expand(plan: CondensedPlan, values: Tensor, columns: int, block_rows: int) -> Tensor:
    """The condensed weight [columns, block_rows]; absent entries are 0."""
    condensed = values.new_zeros(columns, block_rows)
    return _expand_into(condensed, plan, values.contiguous(), numbered=False)


def expand_numbers(plan: CondensedPlan, columns: int, block_rows: int) -> Tensor:
    """Which packed value stands where in the condensed weight [columns, block_rows], int32; -1 where none does."""
    numbers = plan.cols.new_full((columns, block_rows), -1)
    return _expand_into(numbers, plan, plan.cols, numbered=True)


def _expand_into(condensed: Tensor, plan: CondensedPlan, values: Tensor, numbered: bool) -> Tensor:
    nnz = plan.place.numel()
    if nnz:
        grid = (cdiv(nnz, EXPAND_BLOCK),)
        wrap_triton(expand_kernel)[grid](
            values, plan.place, condensed, nnz, NUMBERED=numbered, BLOCK=EXPAND_BLOCK, num_warps=4
        )
    return condensed
