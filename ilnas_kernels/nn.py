"""Drop-in layers: nn.Conv2d and nn.Linear whose weight is live only where a mask says so."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from . import dispatch, ops
from ._calls import ConvCall, LinearCall
from ._checks import check_input, check_mask_type, check_operands, check_output_size, check_same_shape, conv_call
from ._layer import MaskedLayer
from ._masked import GradientSum
from .layout import is_strided_batch_last
from .pattern import Pattern

__all__ = ["MaskedConv2d", "MaskedLayer", "MaskedLinear", "convert"]


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """``out[n,o] = bias[o] + sum over the live (o,c,i,j) of weight[o,c,i,j] * x[n,c,...]``, otherwise nn.Conv2d.

    mask: bool of the weight's shape, or a Pattern; density: exactly ``round(density * numel)`` live weights, drawn
    uniformly with ``generator``; neither: all live. ValueError or TypeError for a mask of another shape or dtype and a
    density outside [0, 1].
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
        padding_mode="zeros", device=None, dtype=None, *, mask=None, density=None, generator=None,
    ):  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._init_mask(mask, density, generator)

    @classmethod
    def from_dense(cls, module: nn.Conv2d, mask: Tensor | Pattern | None = None) -> "MaskedConv2d":
        """A masked copy of a dense layer; without a mask all weights are live."""
        return _from_dense(cls, nn.Conv2d, module, mask)

    def to_dense(self) -> nn.Conv2d:
        """A plain nn.Conv2d with a copy of the weights, absent ones 0."""
        dense = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode, device="meta",
        )  # fmt: skip
        return _to_dense(self, dense)

    def forward(self, input: Tensor, gradient_sum: GradientSum | None = None) -> Tensor:
        """gradient_sum: the gradient of the input, [N, C, H, W], is added there instead of being handed to autograd."""
        weight, bias, pattern = self._stored_weight(), self._effective_bias(), self._pattern
        if dispatch.is_plain(pattern, weight) and not is_strided_batch_last(input) and gradient_sum is None:
            return self._conv_forward(input, weight, bias)
        if gradient_sum is not None and (self.padding_mode != "zeros" or input.dim() != 4):
            raise ValueError(
                "MaskedConv2d: gradient_sum needs padding_mode 'zeros' and a batch [N, C, H, W], "
                f"got {self.padding_mode!r} and {tuple(input.shape)}"
            )
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        check_operands("MaskedConv2d", input, weight, pattern, bias)
        return ops.run_conv2d("MaskedConv2d", input, weight, bias, self.call(), gradient_sum)

    def call(self) -> ConvCall:
        """The geometry of the operator, after a padding mode other than zeros has been carried out."""
        key = (self._pattern, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        cached = self._call
        if cached is not None and all(a is b for a, b in zip(cached[0], key, strict=True)):
            return cached[1]
        padding = self.padding if self.padding_mode == "zeros" else 0
        call = conv_call("MaskedConv2d", self._pattern, self.stride, padding, self.dilation, self.groups)
        self._call = (key, call)
        return call

    def _checked_call(self, x: Tensor) -> ConvCall:
        check_input("MaskedConv2d", x, self._pattern)
        if self.padding_mode == "zeros":
            check_output_size("MaskedConv2d", x, self.call())
        return self.call()


class MaskedLinear(MaskedLayer, nn.Linear):
    """``out[..., o] = bias[o] + sum over the live (o,i) of weight[o,i] * x[..., i]``, otherwise nn.Linear.

    mask, density, generator: as for MaskedConv2d.
    """

    groups = 1

    def __init__(
        self, in_features, out_features, bias=True, device=None, dtype=None, *, mask=None, density=None, generator=None
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_mask(mask, density, generator)

    @classmethod
    def from_dense(cls, module: nn.Linear, mask: Tensor | Pattern | None = None) -> "MaskedLinear":
        """A masked copy of a dense layer; without a mask all weights are live."""
        return _from_dense(cls, nn.Linear, module, mask)

    def to_dense(self) -> nn.Linear:
        """A plain nn.Linear with a copy of the weights, absent ones 0."""
        return _to_dense(self, nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"))

    def forward(self, input: Tensor) -> Tensor:
        weight, bias, pattern = self._stored_weight(), self._effective_bias(), self._pattern
        if dispatch.is_plain(pattern, weight) and not self.call().outruns_torch(input):
            return F.linear(input, weight, bias)
        check_operands("MaskedLinear", input, weight, pattern, bias)
        return ops.run_linear(input, weight, bias, self.call())

    def call(self) -> LinearCall:
        """The operator on this pattern."""
        cached = self._call
        if cached is not None and cached.pattern is self._pattern:
            return cached
        self._call = LinearCall(self._pattern)
        return self._call

    def _checked_call(self, x: Tensor) -> LinearCall:
        check_input("MaskedLinear", x, self._pattern)
        return self.call()


def convert(
    model: nn.Module,
    *,
    density: float | None = None,
    masks: Mapping[str, Tensor | Pattern] | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Turns every nn.Conv2d and nn.Linear of a model into a masked layer, in place, and returns the model.

    The layers stay the same objects with the same Parameters and hooks, so optimisers and tied weights go on working.
    density: of every converted layer; masks: by module name, for the layers named (they go before density); neither:
    all live, the outputs stay equal. filter(name, module) says which layers to convert; default all. Subclasses of
    nn.Conv2d / nn.Linear and layers whose weight is computed (weight_norm, parametrizations) are left as they are.
    """
    masks = dict(masks or {})
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) in _MASKED_CLASS
        and module._parameters.get("weight") is not None
        and (filter is None or filter(name, module))
    }
    if unknown := sorted(masks.keys() - found.keys()):
        raise ValueError(f"convert: masks names {unknown[0]!r}, which is no nn.Conv2d or nn.Linear to convert")
    if density is not None and not 0.0 <= density <= 1.0:
        raise ValueError(f"convert: density must lie in [0, 1], got {density}")
    for name, mask in masks.items():
        check_mask_type("convert", f"masks[{name!r}]", mask)
        check_same_shape("convert", f"masks[{name!r}]", mask, found[name].weight.shape)
    for name, module in found.items():
        module.__class__ = _MASKED_CLASS[type(module)]
        mask = masks.get(name)
        module._init_mask(mask, density if mask is None else None, generator)
    return model


_MASKED_CLASS = {nn.Conv2d: MaskedConv2d, nn.Linear: MaskedLinear}


def _from_dense(cls, dense_class, module, mask):
    if not isinstance(module, dense_class):
        raise TypeError(f"{cls.__name__}.from_dense: module must be a {dense_class.__name__}, got {type(module)}")
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    for name, value in module.__dict__.items():  # the geometry: all that is plain and not nn.Module's own
        if not name.startswith("_") or name == "_reversed_padding_repeated_twice":
            layer.__dict__[name] = value
    for name in ("weight", "bias"):
        parameter = getattr(module, name)
        copy = None if parameter is None else Parameter(parameter.detach().clone(), parameter.requires_grad)
        layer.register_parameter(name, copy)
    layer._init_mask(mask, None, None)
    return layer


@torch.no_grad()
def _to_dense(layer: MaskedLayer, dense: nn.Module) -> nn.Module:
    weight = layer.weight.clone()
    weight.masked_fill_(~layer.mask.to(weight.device), 0)
    dense.weight = Parameter(weight)
    if layer.bias is not None:
        dense.bias = Parameter(layer._effective_bias().clone())
    return dense.train(layer.training)
