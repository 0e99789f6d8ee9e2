"""What both masked layers share: the pattern, the weight in two forms, and saving and loading."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from . import dispatch
from ._checks import as_pattern, check_mask_type, check_same_shape
from ._masked import gather, scatter
from .pattern import Pattern, pack_bits, unpack_bits


class MaskedLayer:
    """A pattern, and a weight kept dense (Parameter ``weight``) or packed (Parameter ``values``).

    Absent weights never matter: they are set to 0 when the mask changes, and get the gradient 0, so that optimisers
    leave them at 0; what others write there is not read.
    """

    @property
    def weight(self) -> Tensor:
        """The dense weight: the Parameter itself, or in packed form a new tensor made on demand."""
        parameters = self.__dict__.get("_parameters", {})
        if "weight" in parameters:
            return parameters["weight"]
        if "values" in parameters:
            return _scatter(parameters["values"], self._pattern)
        raise AttributeError(f"{type(self).__name__} has no weight yet")

    @property
    def pattern(self) -> Pattern:
        """The live positions."""
        return self._pattern

    @property
    def mask(self) -> Tensor:
        """Bool, of the weight's shape, true where live; a new tensor."""
        return self._pattern.mask

    @property
    def nnz(self) -> int:
        """The number of live weights, biases not counted."""
        return self._pattern.nnz

    @property
    def density(self) -> float:
        """``nnz / numel`` of the weight."""
        return self._pattern.density

    @property
    def packed(self) -> bool:
        """Whether the weight is stored as ``values`` [nnz]."""
        return "values" in self._parameters

    @property
    def bias_mask(self) -> Tensor | None:
        """Bool [out], true where the bias is live; None when all are."""
        return self._bias_mask

    @torch.no_grad()
    def set_mask(self, mask: Tensor | Pattern) -> None:
        """Makes exactly the given positions live: those that were absent start at 0, those that no longer are drop out.

        mask: bool of the weight's shape, or a Pattern; TypeError or ValueError otherwise, nothing changed. Optimiser
        state is not moved; see :func:`ilnas_kernels.grow_` and :func:`ilnas_kernels.prune_`.
        """
        pattern = self._checked_pattern(mask)
        if self.packed:
            self.set_packed_(pattern, move_values(self._parameters["values"], self._pattern, pattern))
        else:
            _zero_absent_(self._parameters["weight"], self._pattern)
            self._pattern = pattern
            _zero_absent_(self._parameters["weight"], pattern)

    @torch.no_grad()
    def set_bias_mask(self, bias_mask: Tensor | None) -> None:
        """Makes exactly the given biases live, bool [out]; None: all. Biases that become absent are set to 0."""
        if bias_mask is not None:
            name = f"{type(self).__name__}.set_bias_mask"
            if self.bias is None:
                raise ValueError(f"{name}: the layer has no bias")
            if not isinstance(bias_mask, Tensor) or bias_mask.dtype != torch.bool:
                raise TypeError(f"{name}: bias_mask must be a bool tensor or None, got {bias_mask!r}")
            if bias_mask.shape != self.bias.shape:
                raise ValueError(f"{name}: bias_mask must be {tuple(self.bias.shape)}, got {tuple(bias_mask.shape)}")
            bias_mask = bias_mask.to(self.bias.device, copy=True)
            self.bias.masked_fill_(~bias_mask, 0)
        self._bias_mask = bias_mask

    @torch.no_grad()
    def pack_(self) -> "MaskedLayer":
        """Stores only the live weights, as the Parameter ``values`` [nnz] in ascending flat order; returns the layer.

        To be called before the optimiser is made: the Parameter ``weight`` is gone.
        """
        if not self.packed:
            weight, _ = self._parameters["weight"], self._pattern.operands  # made now: a traced forward cannot
            values = Parameter(_gather(weight, self._pattern), requires_grad=weight.requires_grad)
            if weight.grad is not None:
                values.grad = _gather(weight.grad, self._pattern)
            self._replace_parameter("weight", "values", values)
        return self

    @torch.no_grad()
    def unpack_(self) -> "MaskedLayer":
        """Back to the dense Parameter ``weight``; returns the layer. ``values`` is gone from its optimiser's reach."""
        if self.packed:
            values = self._parameters["values"]
            weight = Parameter(_scatter(values, self._pattern), requires_grad=values.requires_grad)
            if values.grad is not None:
                weight.grad = _scatter(values.grad, self._pattern)
            self._replace_parameter("values", "weight", weight)
        return self

    @torch.no_grad()
    def set_packed_(self, pattern: Pattern, values: Tensor) -> None:
        """Pattern and values of the packed form together; the Parameter stays the same object, its gradient goes."""
        parameter = self._parameters["values"]
        parameter.grad = None
        # Autograd remembers the old size as long as an old graph lives; only a change of dtype makes it forget.
        other = torch.float32 if values.dtype == torch.float64 else torch.float64
        parameter.data = torch.empty(0, dtype=other, device=values.device)
        parameter.data = values
        self._pattern = pattern

    def explain(self, input_shape: Sequence[int]) -> dispatch.Explanation:
        """Which route forward, grad of the input and grad of the weight take for an input of this shape, and why.

        For a contiguous input of the weight's dtype and device; ValueError for a shape the layer does not take.
        """
        stored = self._parameters["values" if self.packed else "weight"]
        x = torch.empty(1, dtype=stored.dtype, device=stored.device).expand(tuple(input_shape))
        call = self._checked_call(x)
        return dispatch.explain(call, torch.empty(1, *[1] * (call.weight_dim - 1), dtype=x.dtype, device=x.device))

    def _init_mask(self, mask, density, generator) -> None:
        weight = self._parameters["weight"]
        if mask is not None and density is not None:
            raise ValueError(f"{type(self).__name__}: give mask or density, not both")
        device = _pattern_device(weight)
        self._bias_mask = self._call = None
        if density is not None:
            if not 0.0 <= density <= 1.0:
                raise ValueError(f"{type(self).__name__}: density must lie in [0, 1], got {density}")
            mask = Pattern.random(weight.shape, density, self.groups, generator=generator)
        if mask is None:
            self._pattern = Pattern.full(weight.shape, self.groups, device)
            return
        # By way of a pattern without live weights: the full one takes 8 bytes for every weight of a huge sparse layer.
        self._pattern = Pattern(weight.shape, torch.empty(0, dtype=torch.int64, device=device), self.groups)
        self._pattern = self._checked_pattern(mask)
        _zero_absent_(weight, self._pattern)

    def _stored_weight(self) -> Tensor:
        parameters = self._parameters
        return parameters["values"] if "values" in parameters else parameters["weight"]

    def _checked_pattern(self, mask: Tensor | Pattern) -> Pattern:
        name = type(self).__name__
        check_mask_type(name, "mask", mask)
        check_same_shape(name, "mask", mask, self._pattern.shape)
        if isinstance(mask, Pattern) and mask.groups != self.groups:
            raise ValueError(f"{name}: mask is a Pattern of groups={mask.groups}, the layer has {self.groups}")
        return as_pattern(name, "mask", mask, self.groups).to(self._pattern.device)

    def _effective_bias(self) -> Tensor | None:
        if self._bias_mask is None:
            return self.bias
        return torch.where(self._bias_mask, self.bias, 0)

    def _replace_parameter(self, old: str, new: str, parameter: Parameter) -> None:
        """In place of the old one, so that the order of parameters() stays."""
        items = [(new, parameter) if name == old else (name, p) for name, p in self._parameters.items()]
        self._parameters.clear()
        self._parameters.update(items)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        device = _pattern_device(self._stored_weight())
        self._pattern = self._pattern.to(device)
        if self._bias_mask is not None:
            self._bias_mask = self._bias_mask.to(device)
        return self

    def __getstate__(self):
        return {**self.__dict__, "_call": None}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight_mask"] = pack_bits(self._pattern)
        if self._bias_mask is not None:
            destination[prefix + "bias_mask"] = self._bias_mask.clone()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Takes either form; without a weight_mask, as in a dense checkpoint, the masks stay as they are."""
        ours = ("weight", "values", "bias", "weight_mask", "bias_mask")
        state = {name: state_dict[prefix + name] for name in ours if prefix + name in state_dict}
        own = "values" if self.packed else "weight"
        try:
            pattern = self._loaded_pattern(state.get("weight_mask"))
            weight = self._loaded_weight(state, pattern)
            bias_mask = self._loaded_bias_mask(state)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix[:-1] or type(self).__name__}: {error}")
            return
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in ours}}
        if weight is not None:
            rest[prefix + own] = weight
        if "bias" in state:
            rest[prefix + "bias"] = state["bias"]
        if self.packed and pattern is not self._pattern and weight is not None:
            values = self._parameters["values"]
            self.set_packed_(pattern, torch.zeros(pattern.nnz, dtype=values.dtype, device=values.device))
        errors = len(error_msgs)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if len(error_msgs) > errors:
            return
        if self.packed:
            if weight is None:  # a mask alone
                self.set_mask(pattern)
        else:
            self._pattern = pattern
            _zero_absent_(self._parameters["weight"], pattern)
        if self.bias is not None:
            self.set_bias_mask(bias_mask)

    def _loaded_pattern(self, saved: Tensor | None) -> Pattern:
        if saved is None:
            return self._pattern
        if saved.dtype == torch.uint8:
            return unpack_bits(saved, self._pattern.shape, self.groups).to(self._pattern.device)
        return self._checked_pattern(saved)

    def _loaded_weight(self, state: Mapping[str, Tensor], pattern: Pattern) -> Tensor | None:
        """The saved weight in this layer's form; None when the state has none."""
        if "values" in state:
            values = state["values"]
            if values.shape != (pattern.nnz,):
                raise ValueError(f"values has shape {tuple(values.shape)}, but the mask has {pattern.nnz} live weights")
            return values if self.packed else _scatter(values, pattern)
        if "weight" in state and self.packed:
            check_same_shape(type(self).__name__, "the saved weight", state["weight"], pattern.shape)
            return _gather(state["weight"], pattern)
        return state.get("weight")

    def _loaded_bias_mask(self, state: Mapping[str, Tensor]) -> Tensor | None:
        if "bias_mask" not in state:
            return None if "weight_mask" in state else self._bias_mask
        saved = state["bias_mask"]
        if self.bias is None or saved.shape != self.bias.shape or saved.dtype != torch.bool:
            raise ValueError(f"bias_mask must be bool and of the bias's shape, got {saved.dtype} {tuple(saved.shape)}")
        return saved

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nnz={self.nnz}, density={self.density:.4g}"


def _pattern_device(weight: Tensor) -> torch.device:
    """A meta weight's pattern lies on the CPU: positions need real numbers."""
    return torch.device("cpu") if weight.device.type == "meta" else weight.device


def _zero_absent_(weight: Tensor, pattern: Pattern) -> None:
    if weight.device.type != "meta" and pattern.nnz != pattern.numel:
        torch.ops.ilnas.zero_absent_(weight.detach(), pattern.row_ptr, pattern.col, pattern.live_bits)


def _gather(weight: Tensor, pattern: Pattern) -> Tensor:
    """Differentiable; on the device of the weight, meta included."""
    return weight.new_empty(pattern.nnz) if weight.device.type == "meta" else gather(weight, pattern.to(weight.device))


def _scatter(values: Tensor, pattern: Pattern) -> Tensor:
    if values.device.type == "meta":
        return values.new_empty(pattern.shape)
    return scatter(values, pattern.to(values.device))


def move_values(values: Tensor, old: Pattern, new: Pattern) -> Tensor:
    """Packed numbers of the new pattern: the old ones where both are live, otherwise 0. O(nnz) memory."""
    moved = torch.zeros(new.nnz, dtype=values.dtype, device=values.device)
    if old.nnz and new.nnz and values.device.type != "meta":
        old_index, new_index = old.index, new.index
        place = torch.searchsorted(old_index, new_index).clamp_(max=old.nnz - 1)
        kept = old_index[place] == new_index
        moved[kept] = values.detach()[place[kept]]
    return moved
