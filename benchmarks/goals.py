"""This project's own goals for the CPU: how many times faster than torch an operator should be.

They are targets set before the kernels were written, not promises; the report says for each whether it was reached.
"""

from dataclasses import dataclass

SPARSE_GOALS = {0.5: 0, 0.2: 1, 0.1: 2, 0.05: 3, 0.02: 4, 0.01: 5}  # density -> column of Goal.ratios


@dataclass(frozen=True)
class Goal:
    """ratios: baseline time / our time, at densities 0.5, 0.2, 0.1, 0.05, 0.02, 0.01.

    op: the measured operator; over several shapes the geometric mean counts.
    baselines: the contenders of which the faster is the baseline. ours: those of ours of which the faster counts.
    """

    title: str
    op: str
    baselines: tuple[str, ...]
    ours: tuple[str, ...]
    ratios: tuple[float, ...]

    def ratio(self, density: float) -> float:
        return self.ratios[SPARSE_GOALS[density]]


TORCH_CONV = ("dense_nchw", "dense_channels_last")
TORCH_LAYOUTS = ("ours_nchw", "ours_channels_last")
CONV_3X3 = (1.4, 3, 5, 8, 12, 16)
CONV_1X1 = (1.2, 2, 3, 4.5, 6, 7)
MKL = (2, 4, 7, 11, 16, 20)
ONEDNN = (1, 2, 3, 5, 7, 9)

SPARSE = (
    Goal("conv 3x3 forward", "conv3x3 forward", TORCH_CONV, TORCH_LAYOUTS, CONV_3X3),
    Goal("conv 3x3 backward", "conv3x3 backward", TORCH_CONV, TORCH_LAYOUTS, CONV_3X3),
    Goal("conv 1x1 forward", "conv1x1 forward", TORCH_CONV, TORCH_LAYOUTS, CONV_1X1),
    Goal("conv 1x1 backward", "conv1x1 backward", TORCH_CONV, TORCH_LAYOUTS, CONV_1X1),
    Goal("linear forward, against MKL", "linear forward", ("dense_mkl",), ("ours",), MKL),
    Goal("linear backward, against MKL", "linear backward", ("dense_mkl",), ("ours",), MKL),
    Goal("linear forward, against oneDNN", "linear forward", ("dense_onednn",), ("ours",), ONEDNN),
    Goal("linear backward, against oneDNN", "linear backward", ("dense_onednn",), ("ours",), ONEDNN),
)

# Over the faster of SparseProp's two ways.
SPARSEPROP = {"forward": (6, 6, 6.5, 6.5, 6, 5), "backward": (5, 5, 5, 4.5, 3.5, 3)}

NEVER_SLOWER_THAN = 0.97  # at every density
TWO_THREADS = 1.8  # over one thread
# absent_topk: over the weight gradient alone, and over gradient + abs + mask + torch.topk
ABSENT_TOPK = {"linear": (1.0, 5.0), "conv": (1 / 1.10, 1.5)}
WEIGHT_STATE = 1.3  # bytes of weights, gradients and momentum, over density * dense
ABSENT_TOPK_BYTES = (32, 8 * 2**20)  # for each of the k entries, and besides
# The network the search grows, trained at this density in torch's dense layers and in ours.
TRAINING_STEP = {"training step ILNAS network": {0.05: 4.0}}
# What an expansion of the search may cost, in training steps; the dense gradients of all weights come on top.
EXPANSION_STEPS = 3
