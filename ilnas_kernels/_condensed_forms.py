"""What the CUDA tensor-core kernels derive from a pattern, kept with it from call to call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .pattern import Pattern

# Forms of one pattern: forward and backward of a batch size in training, its last one, and those of validation.
_MOST_KEPT = 8
_HALF = (torch.float16, torch.bfloat16)


class _Form:
    """A form and the work that builds it: until that is known to be done, other streams wait for it on the device."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._stream = torch.cuda.current_stream(tensor.device)
        self._built: torch.cuda.Event | None = self._stream.record_event()

    def ready(self) -> Tensor | None:
        """The form, for use on the current stream; None where a graph being captured could not wait for it."""
        if self._built is not None:
            if torch.cuda.is_current_stream_capturing():
                return None
            if self._built.query():
                self._built = None
            elif (stream := torch.cuda.current_stream(self._tensor.device)) != self._stream:
                stream.wait_event(self._built)
        return self._tensor


def kept_form(
    pattern: Pattern, x: Tensor, x_size: Sequence[int], geometry: Sequence, *, backward: bool
) -> Tensor | None:
    """The form for inputs of this size, or None where the operator has to do without or build its own.

    x_size: [N, C, H, W]; geometry: as the operators take it. The host never waits for it.
    """
    if x.dtype not in _HALF or torch.compiler.is_compiling():
        return None
    key = (backward, *x_size, *geometry[1:-1])
    forms: dict[tuple, _Form] = pattern.plan("condensed forms", lambda _: {})
    if (form := forms.get(key)) is None:
        if torch.cuda.is_current_stream_capturing():
            return None  # it would be built when the graph is replayed, not now
        row_ptr, col, t_row_ptr, t_col, _ = pattern.operands
        rows = (t_row_ptr, t_col) if backward else (row_ptr, col)
        if len(forms) >= _MOST_KEPT:
            del forms[next(iter(forms))]
        form = forms[key] = _Form(
            torch.ops.ilnas.condensed_form.default(*rows, list(x_size), pattern.shape[0], *geometry, backward)
        )
    return form.ready()
