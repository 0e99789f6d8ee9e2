"""Growing and pruning single weights, with the optimiser's state carried along."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ._layer import MaskedLayer
from .pattern import Pattern


def grow_(
    layer: MaskedLayer,
    index: Tensor | None,
    value: float | Tensor = 0.0,
    optimizer: Optimizer | None = None,
    *,
    bias_index: Tensor | None = None,
    bias_value: float | Tensor = 0.0,
) -> None:
    """Makes the absent weights at the flat positions ``index`` live, with ``value`` (one number, or one per index).

    bias_index, bias_value: the same for absent biases. optimizer: the one that holds the layer's parameters; what it
    keeps per weight (momentum, Adam's moments) is carried along and starts at 0 for the new ones.
    ValueError when a position is out of range, given twice or live already; nothing is changed then.
    """
    change = _Change("grow_", layer, optimizer)
    change.weights(index, live=True, value=value)
    change.biases(bias_index, live=True, value=bias_value)
    change.carry_out()


def prune_(
    layer: MaskedLayer,
    index: Tensor | None,
    optimizer: Optimizer | None = None,
    *,
    bias_index: Tensor | None = None,
) -> None:
    """Makes the live weights at the flat positions ``index``, and the live biases at ``bias_index``, absent.

    optimizer: as for :func:`grow_`; what it keeps for the pruned weights is dropped. ValueError when a position is out
    of range, given twice or absent already; nothing is changed then.
    """
    change = _Change("prune_", layer, optimizer)
    change.weights(index, live=False)
    change.biases(bias_index, live=False)
    change.carry_out()


class _Change:
    """A change of what is live, checked in full before anything is touched."""

    def __init__(self, op: str, layer: MaskedLayer, optimizer: Optimizer | None) -> None:
        if not isinstance(layer, MaskedLayer):
            raise TypeError(f"{op}: layer must be a MaskedConv2d or MaskedLinear, got {type(layer)}")
        self._op, self._layer, self._optimizer = op, layer, optimizer
        self._steps: list = []

    def weights(self, index: Tensor | None, live: bool, value: float | Tensor = 0.0) -> None:
        if index is None or index.numel() == 0:
            return
        old = self._layer.pattern
        index = self._checked("index", index, old.numel)
        held = old.index
        # The positions were each given once, so what stands here twice is one of them that is live already.
        ordered, order = torch.cat([held, index]).sort(stable=True)
        twice = ordered[1:] == ordered[:-1]
        if int(twice.sum()) != (0 if live else index.numel()):
            self._check_state("index", index, torch.isin(index, held), live)
        if not live:
            lone = F.pad(~twice, (0, 1), value=True) & F.pad(~twice, (1, 0), value=True)
            kept = lone.nonzero().view(-1)
            ordered, order = ordered.index_select(0, kept), order.index_select(0, kept)
        new = Pattern(old.shape, ordered, old.groups)
        name = "values" if self._layer.packed else "weight"
        parameter = self._held_parameter(name)
        value = self._checked_value("value", value, index, parameter) if live else None
        self._steps.append(lambda: self._change_weights(parameter, new, order, index, value))

    def biases(self, index: Tensor | None, live: bool, value: float | Tensor = 0.0) -> None:
        if index is None or index.numel() == 0:
            return
        layer = self._layer
        if layer.bias is None:
            raise ValueError(f"{self._op}: bias_index is given, but the layer has no bias")
        index = self._checked("bias_index", index, layer.bias.numel())
        mask = layer.bias_mask
        mask = torch.ones_like(layer.bias, dtype=torch.bool) if mask is None else mask.clone()
        self._check_state("bias_index", index, mask[index], live)
        mask[index] = live
        parameter = self._held_parameter("bias")
        value = self._checked_value("bias_value", value, index, parameter) if live else None
        self._steps.append(lambda: self._change_biases(parameter, mask, index, value))

    @torch.no_grad()
    def carry_out(self) -> None:
        for step in self._steps:
            step()

    def _change_weights(self, parameter, new, order, index, value) -> None:
        """order: where the new live weights come from, among the old ones and behind them the added ones."""
        layer = self._layer
        if not layer.packed:
            layer.set_mask(new)
            self._reset(parameter, index, value)
            return

        def moved(packed: Tensor, added: Tensor | None) -> Tensor:
            if added is not None:
                packed = torch.cat([packed, added.to(packed.dtype).expand(index.shape)])
            return packed.index_select(0, order.to(packed.device))

        zero = None if value is None else torch.zeros_like(value)
        values = moved(parameter, value)
        grad = None if parameter.grad is None else moved(parameter.grad, zero)
        states = {key: moved(state, zero) for key, state in self._states(parameter)}
        layer.set_packed_(new, values)
        parameter.grad = grad
        if states:
            self._optimizer.state[parameter].update(states)

    def _change_biases(self, parameter, mask, index, value) -> None:
        self._layer.set_bias_mask(mask)
        self._reset(parameter, index, value)

    def _reset(self, parameter, index, value) -> None:
        """Dense storage: the changed places get their value, and nothing of the past."""
        _flat_set_(parameter, index, 0.0 if value is None else value)
        if parameter.grad is not None:
            _flat_set_(parameter.grad, index, 0.0)
        for _, state in self._states(parameter):
            _flat_set_(state, index, 0.0)

    def _states(self, parameter) -> list[tuple[str, Tensor]]:
        """What the optimiser keeps per element of the parameter."""
        if self._optimizer is None:
            return []
        state = self._optimizer.state.get(parameter, {})
        return [(k, v) for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape]

    def _held_parameter(self, name: str) -> nn.Parameter:
        parameter = self._layer._parameters[name]
        if self._optimizer is not None:
            groups = self._optimizer.param_groups
            if not any(parameter is held for group in groups for held in group["params"]):
                raise ValueError(f"{self._op}: optimizer does not hold the layer's parameter {name!r}")
        return parameter

    def _checked(self, name: str, index: Tensor, numel: int) -> Tensor:
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or index.dim() != 1:
            kind = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index)
            raise TypeError(f"{self._op}: {name} must be an integer tensor of one dimension, got {kind}")
        index = index.to(self._layer.pattern.device, torch.int64).contiguous()
        ordered = index.sort().values
        least, most = int(ordered[0]), int(ordered[-1])
        if least < 0 or most >= numel:
            worst = least if least < 0 else most
            raise ValueError(f"{self._op}: {name} must lie in [0, {numel}), got {worst}")
        if (twice := ordered[1:][ordered[1:] == ordered[:-1]]).numel():
            raise ValueError(f"{self._op}: {name} holds {int(twice[0])} more than once")
        return index

    def _check_state(self, name: str, index: Tensor, is_live: Tensor, live: bool) -> None:
        wrong = index[is_live] if live else index[~is_live]
        if wrong.numel():
            rule = "live already; only absent ones can be grown" if live else "absent already; only live ones can go"
            raise ValueError(f"{self._op}: {name} holds {int(wrong[0])}, which is {rule}")

    def _checked_value(self, name: str, value: float | Tensor, index: Tensor, parameter: Tensor) -> Tensor:
        value = torch.as_tensor(value, dtype=parameter.dtype, device=parameter.device)
        if value.dim() != 0 and value.shape != index.shape:
            raise ValueError(
                f"{self._op}: {name} must be one number or one per index, [{index.numel()}], got {tuple(value.shape)}"
            )
        return value.detach()


def _flat_set_(tensor: Tensor, index: Tensor, value: float | Tensor) -> None:
    """``tensor.flatten()[index] = value`` whatever the strides."""
    coordinates = torch.unravel_index(index, tensor.shape)
    value = torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
    tensor.detach().index_put_(coordinates, value)
