"""The immutable set of a weight's live positions, compressed by row and by input channel."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Pattern:
    """The live positions of a weight of shape ``[out, in / groups, *kernel]`` (a linear weight has no kernel).

    Kept as two compressed forms of the matrix ``[out, in / groups * taps]``, int32, on one device:

    * by row: ``row_ptr [out + 1]``, ``col [nnz]`` ascending within a row. Packed values are in this order, which is
      ascending flat order;
    * by input channel: ``t_row_ptr [in + 1]``, ``t_col [nnz]`` = (output channel within its group) * taps + tap,
      ascending, and ``t_perm [nnz]``, where in the packed values an entry's weight is.

    For an all-live pattern they are made when first asked for: mostly no sparse kernel ever sees it.
    """

    def __init__(
        self, shape: Sequence[int], index: Tensor | None, groups: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        """index: int64 [nnz], flat positions, ascending, each once; not checked. None: all positions, on ``device``.
        See the constructors :meth:`full`, :meth:`from_mask`, :meth:`from_index` and :meth:`random`."""
        self.shape = torch.Size(shape)
        self.groups = groups
        rows, in_per_group = self.shape[:2]
        if groups < 1 or rows % groups:
            raise ValueError(f"Pattern: groups must be at least 1 and divide the {rows} output channels, got {groups}")
        self.in_channels = in_per_group * groups
        self.taps = math.prod(self.shape[2:])
        self.numel = math.prod(self.shape)
        self.nnz = self.numel if index is None else index.numel()
        self.density = self.nnz / self.numel if self.numel else 0.0
        self.device = torch.device(device) if index is None else index.device
        cols = in_per_group * self.taps
        if index is not None:
            if self.nnz >= 2**31 or cols >= 2**31:
                raise ValueError(f"Pattern: {self.nnz} live weights in rows of {cols}; both must be below 2**31")
            self.row_ptr, self.col = rows_of(index, rows, cols)
            self.operands = self._compressed()
        self._plans: dict[str, Any] = {}

    @classmethod
    def full(cls, shape: Sequence[int], groups: int = 1, device: torch.device | str = "cpu") -> "Pattern":
        """All positions live."""
        return cls(shape, None, groups, device)

    @classmethod
    def from_mask(cls, mask: Tensor, groups: int = 1) -> "Pattern":
        """The positions where the boolean ``mask`` is true."""
        if mask.dtype != torch.bool or mask.dim() < 2:
            raise TypeError(
                f"Pattern: mask must be bool with at least two dimensions, got {mask.dtype} {tuple(mask.shape)}"
            )
        return cls(mask.shape, mask.reshape(-1).nonzero().reshape(-1), groups)

    @classmethod
    def from_index(cls, shape: Sequence[int], index: Tensor, groups: int = 1) -> "Pattern":
        """The given flat positions, in any order; each must lie in the shape and stand there once."""
        index = index.to(torch.int64).reshape(-1).sort().values
        numel = math.prod(shape)
        if index.numel() and (int(index[0]) < 0 or int(index[-1]) >= numel):
            worst = int(index[0]) if int(index[0]) < 0 else int(index[-1])
            raise ValueError(f"Pattern: index {worst} lies outside a weight of {numel} elements")
        if (twice := index[1:][index[1:] == index[:-1]]).numel():
            raise ValueError(f"Pattern: index {int(twice[0])} is given twice; each position may stand there once")
        return cls(shape, index, groups)

    @classmethod
    def random(
        cls, shape: Sequence[int], density: float, groups: int = 1, *, generator: torch.Generator | None = None
    ) -> "Pattern":
        """Exactly ``round(density * numel)`` live positions, chosen uniformly."""
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"Pattern: density must lie in [0, 1], got {density}")
        numel = math.prod(shape)
        device = generator.device if generator is not None else "cpu"  # whatever the default device is
        chosen = torch.randperm(numel, generator=generator, device=device)[: round(density * numel)]
        return cls(shape, chosen.sort().values, groups)

    def __getattr__(self, name: str) -> Tensor:
        """An all-live pattern's compressed forms, when a sparse kernel asks for them after all."""
        if name == "operands":
            self.operands = self._compressed()
            return self.operands
        if name not in ("row_ptr", "col"):
            raise AttributeError(f"Pattern has no attribute {name!r}")
        rows, cols = self.shape[0], math.prod(self.shape[1:])
        if self.numel >= 2**31:
            raise ValueError(f"Pattern: {self.numel} live weights; they must be below 2**31 for the sparse kernels")
        self.row_ptr = torch.arange(rows + 1, device=self.device, dtype=torch.int32) * cols
        self.col = torch.arange(cols, device=self.device, dtype=torch.int32).repeat(rows)
        return self.__dict__[name]

    def _compressed(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``operands``, the five tensors that every operator takes: row_ptr, col, t_row_ptr, t_col, t_perm."""
        rows, in_per_group = self.shape[:2]
        out_per_group = max(rows // self.groups, 1)
        row, col = self._row, self.col.long()
        taps = max(self.taps, 1)
        channel = col // taps
        entry = row * taps + col - channel * taps
        if self.groups > 1:
            group = row // out_per_group
            channel += group * in_per_group
            entry -= group * (out_per_group * taps)
        # The entries of a channel are in order already; numbers of fewer bytes are sorted in fewer passes.
        short = torch.int16 if self.in_channels < 2**15 else torch.int32
        order = channel.to(short).argsort(stable=True)
        t_row_ptr = torch.zeros(self.in_channels + 1, dtype=torch.int32, device=self.device)
        t_row_ptr[1:] = channel.bincount(minlength=self.in_channels).cumsum(0)
        return self.row_ptr, self.col, t_row_ptr, entry.index_select(0, order).int(), order.int()

    @property
    def t_row_ptr(self) -> Tensor:
        return self.operands[2]

    @property
    def t_col(self) -> Tensor:
        return self.operands[3]

    @property
    def t_perm(self) -> Tensor:
        return self.operands[4]

    @property
    def stride(self) -> tuple[int, ...]:
        """The strides of a contiguous weight of this shape."""
        strides = [1] * len(self.shape)
        for d in range(len(self.shape) - 2, -1, -1):
            strides[d] = strides[d + 1] * max(self.shape[d + 1], 1)
        return tuple(strides)

    @property
    def _row(self) -> Tensor:
        counts = (self.row_ptr[1:] - self.row_ptr[:-1]).long()
        rows = torch.arange(self.shape[0], device=self.device)
        return torch.repeat_interleave(rows, counts, output_size=self.nnz)

    @property
    def index(self) -> Tensor:
        """The live flat positions, int64 [nnz], ascending."""
        if self.nnz == self.numel:
            return torch.arange(self.numel, device=self.device)
        return self._row * math.prod(self.shape[1:]) + self.col

    @property
    def mask(self) -> Tensor:
        """The boolean tensor of the weight's shape, true where live."""
        if self.nnz == self.numel:
            return torch.ones(self.shape, dtype=torch.bool, device=self.device)
        mask = torch.zeros(self.numel, dtype=torch.bool, device=self.device)
        mask[self.index] = True
        return mask.view(self.shape)

    def plan(self, name: str, build: Callable[["Pattern"], Any]) -> Any:
        """What a kernel derives from the pattern alone, made once and kept with it."""
        if name not in self._plans:
            self._plans[name] = build(self)
        return self._plans[name]

    @property
    def live_bits(self) -> Tensor:
        """:func:`pack_bits` of this pattern."""
        return self.plan("live_bits", pack_bits)

    @property
    def live_bits_channels_last(self) -> Tensor:
        """The same with the mask [out, in, kh, kw] read in the order of a channels_last weight."""
        return self.plan("live_bits_channels_last", lambda pattern: _packed(pattern.mask.permute(0, 2, 3, 1)))

    def to(self, device: torch.device | str) -> "Pattern":
        """The same pattern on another device; itself when it is there already."""
        device = torch.device(device)
        if device == self.device:
            return self
        index = self.index.to(device) if "row_ptr" in self.__dict__ else None
        return Pattern(self.shape, index, self.groups, device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pattern):
            return NotImplemented
        if (self.shape, self.groups, self.nnz) != (other.shape, other.groups, other.nnz):
            return False
        if self is other or self.nnz == self.numel:
            return True
        return torch.equal(self.row_ptr, other.row_ptr.to(self.device)) and torch.equal(
            self.col, other.col.to(self.device)
        )

    __hash__ = object.__hash__

    def __deepcopy__(self, memo: dict) -> "Pattern":
        return self  # immutable

    def __reduce__(self):
        index = self.index if "row_ptr" in self.__dict__ else None
        return Pattern, (self.shape, index, self.groups, self.device)

    def __repr__(self) -> str:
        return f"Pattern(shape={tuple(self.shape)}, nnz={self.nnz}, density={self.density:.4g}, groups={self.groups})"


def rows_of(index: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """(row_ptr, col), int32, of ascending flat positions in a matrix."""
    starts = torch.arange(rows + 1, device=index.device) * cols
    row_ptr = torch.searchsorted(index, starts, out_int32=True)
    before = starts[:-1].repeat_interleave(row_ptr.diff(), output_size=index.numel())
    return row_ptr, (index - before).int()


def pack_bits(pattern: Pattern) -> Tensor:
    """The mask as one bit a weight, uint8 [ceil(numel / 8)]; weight i is bit i % 8 of byte i // 8."""
    return _packed(pattern.mask)


def _packed(mask: Tensor) -> Tensor:
    bits = torch.nn.functional.pad(mask.reshape(-1), (0, -mask.numel() % 8)).view(-1, 8)
    packed = torch.zeros(bits.shape[0], dtype=torch.uint8, device=mask.device)
    for place in range(8):
        packed |= bits[:, place].to(torch.uint8) << place
    return packed


def unpack_bits(bits: Tensor, shape: Sequence[int], groups: int = 1) -> Pattern:
    """The inverse of :func:`pack_bits`. ValueError when the number of bytes does not fit the shape."""
    numel = math.prod(shape)
    if bits.shape != (-(-numel // 8),):
        raise ValueError(f"a packed mask of {numel} weights has {-(-numel // 8)} bytes, got shape {tuple(bits.shape)}")
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    mask = (bits.view(-1, 1) >> shifts & 1).view(-1)[:numel].bool()
    return Pattern.from_mask(mask.view(tuple(shape)), groups)
