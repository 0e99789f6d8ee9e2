# ruff: noqa: E501 - a table of cases reads best with one case a line
"""Bad arguments of the functions: the error names the operator, the argument, its value and the rule."""

import pytest
import torch

from ilnas_kernels import Pattern, absent_topk, instruction_set, masked_conv2d, masked_linear, use_route

X, W = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
MASK = torch.rand(4, 3, 3, 3) < 0.5
PATTERN = Pattern.from_mask(MASK)
ROWS, MATRIX, MATRIX_MASK = torch.randn(5, 7), torch.randn(4, 7), torch.rand(4, 7) < 0.5
META = torch.device("meta")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: masked_conv2d(X[:, :2], W, PATTERN),
            ValueError,
            r"masked_conv2d: x must be \[N, 3, H, W\].*\(2, 2, 6",
        ),
        (lambda: masked_conv2d(X[0, 0], W, PATTERN), ValueError, "masked_conv2d: x must be"),
        (
            lambda: masked_conv2d(X, W[:, :2], PATTERN),
            ValueError,
            r"weight_or_values must have the mask's shape \(4, 3",
        ),
        (lambda: masked_conv2d(X, torch.ones(3), PATTERN), ValueError, r"or \[nnz\] = \[\d+\], got \(3,\)"),
        (lambda: masked_conv2d(X, W, PATTERN, torch.ones(3)), ValueError, r"bias must be \[4\], got \(3,\)"),
        (lambda: masked_conv2d(X, W, MASK.int()), TypeError, "mask_or_pattern must be a bool tensor.*int32"),
        (
            lambda: masked_conv2d(X, W, None),
            TypeError,
            "mask_or_pattern must be a bool tensor or a Pattern, got a None",
        ),
        (lambda: masked_conv2d(X, W, MATRIX_MASK), ValueError, r"must have 4 dimensions, got shape \(4, 7\)"),
        (lambda: masked_conv2d(X, W, MASK, groups=3), ValueError, "groups must be at least 1 and divide the 4"),
        (
            lambda: masked_conv2d(X, W, PATTERN, groups=2),
            ValueError,
            "groups is 2, but the pattern was made for groups=1",
        ),
        (
            lambda: masked_conv2d(X.double(), W, PATTERN),
            TypeError,
            "weight_or_values must be of the dtype of x, torch.fl",
        ),
        (lambda: masked_conv2d(X.int(), W, PATTERN), TypeError, "x must be of one of the dtypes.*got torch.int32"),
        (
            lambda: masked_conv2d(X.to(META), W, PATTERN),
            ValueError,
            "weight_or_values must be on the device of x, meta",
        ),
        (
            lambda: masked_conv2d(X, W, PATTERN, torch.ones(4).to(META)),
            ValueError,
            "bias must be on the device of x, cpu",
        ),
        (
            lambda: masked_conv2d(X, W, PATTERN, stride=0),
            ValueError,
            "stride must be an int or a pair.*at least 1, got 0",
        ),
        (lambda: masked_conv2d(X, W, PATTERN, dilation=(1, 2, 3)), ValueError, r"dilation must be.*got \(1, 2, 3\)"),
        (lambda: masked_conv2d(X, W, PATTERN, padding=-1), ValueError, "padding must be.*at least 0, got -1"),
        (lambda: masked_conv2d(X, W, PATTERN, padding=(1, 1, 1, -1)), ValueError, "padding must not be negative"),
        (
            lambda: masked_conv2d(X, W, PATTERN, padding="full"),
            ValueError,
            "must be 'same', 'valid' or ints, got 'full'",
        ),
        (lambda: masked_conv2d(X, W, PATTERN, stride=2, padding="same"), ValueError, "padding 'same' needs stride 1"),
        (lambda: masked_conv2d(X[..., :2], W, PATTERN), ValueError, r"height and width \(6, 2\), too small for kernel"),
        (lambda: masked_linear(ROWS[:, :3], MATRIX, MATRIX_MASK), ValueError, r"masked_linear: x must be \[..., 7\]"),
        (lambda: masked_linear(torch.tensor(1.0), MATRIX, MATRIX_MASK), ValueError, "x must be"),
        (lambda: masked_linear(ROWS, MATRIX, MASK), ValueError, "must have 2 dimensions"),
        (
            lambda: absent_topk(ROWS, torch.ones(5, 4), MATRIX_MASK, 0),
            ValueError,
            "k must be an int of at least 1, got 0",
        ),
        (lambda: absent_topk(ROWS, torch.ones(5, 4), MATRIX_MASK, True), ValueError, "k must be an int"),
        (
            lambda: absent_topk(ROWS, torch.ones(5, 3), MATRIX_MASK, 1),
            ValueError,
            r"grad_out must be \(5, 4\), got \(5, 3",
        ),
        (lambda: absent_topk(ROWS[:, 1:], torch.ones(5, 4), MATRIX_MASK, 1), ValueError, r"x must be \[..., 7\]"),
        (
            lambda: absent_topk(ROWS, torch.ones(5, 4).double(), MATRIX_MASK, 1),
            TypeError,
            "must share one of the dtypes",
        ),
        (
            lambda: absent_topk(ROWS, torch.ones(5, 4).to(META), MATRIX_MASK, 1),
            ValueError,
            "grad_out must be on the device",
        ),
        (lambda: absent_topk(X, torch.ones(2, 4, 6, 6), MASK, 1), ValueError, r"grad_out must be \(2, 4, 4, 4\), got"),
        (lambda: absent_topk(X[:, :2], torch.ones(2, 4, 4, 4), MASK, 1), ValueError, r"x must be \[N, 3, H, W\]"),
        (lambda: absent_topk(X, torch.ones(2, 4, 4, 4), MASK, 1, granularity="row"), ValueError, "got 'row'"),
        (
            lambda: absent_topk(ROWS, torch.ones(5, 4), MATRIX_MASK, 1, exclude=MATRIX_MASK.int()),
            TypeError,
            "exclude must be a bool tensor or a Pattern, got dtype torch.int32",
        ),
        (
            lambda: absent_topk(ROWS, torch.ones(5, 4), MATRIX_MASK, 1, exclude=MASK),
            ValueError,
            r"exclude must have the weight's shape \(4, 7\), got",
        ),
        (lambda: instruction_set("sse9").__enter__(), ValueError, "must be compiled in and run here .*got 'sse9'"),
        (lambda: use_route("fast").__enter__(), ValueError, "route must be 'dense' or 'sparse', got 'fast'"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_autocast_lifts_the_rule_on_dtypes_and_nothing_else():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert masked_conv2d(X.bfloat16(), W, PATTERN).dtype == torch.bfloat16
        with pytest.raises(TypeError, match="x must be of one of the dtypes"):
            masked_conv2d(X.int(), W, PATTERN)
