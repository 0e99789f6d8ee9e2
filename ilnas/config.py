"""Every option of a search: one table that the command line, the TOML file and the documentation are made from."""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METHODS = ("ilnas", "random", "static", "set", "rigl", "prune", "dense")
CHOICES = {
    "dataset": ("digits", "mnist", "fashion-mnist", "cifar-10"),
    "method": METHODS,
    "alr_decay": ("constant", "cosine", "exponential"),
    "trigger": ("solved", "interval", "plateau"),
    "ranking": ("global", "quota", "normalised"),
    "selection": ("top", "sampled"),
    "granularity": ("weight", "kernel", "layer", "mixed", "top-down"),
    "stage_output": ("all", "last"),
    "reduction": ("max", "average"),
    "preset": ("default", "paper"),
}


def _option(default: Any, group: str, text: str) -> Any:
    return field(default=default, metadata={"group": group, "help": text})


@dataclass(frozen=True)
class Config:
    """The options, in the groups that ``ilnas search --help`` shows. See docs/options.md."""

    dataset: str = _option("digits", "data", "data set; digits comes with scikit-learn, the others need --data")
    data: str = _option("", "data", "folder of the original files, or a torchvision root")
    train_images: int = _option(0, "data", "train on this many images only; 0 for all")
    image_size: int = _option(0, "data", "resize images to this many pixels a side; 0 keeps them")
    validation: float = _option(0.1, "data", "share of the training images held out for every choice")
    crop: int = _option(-1, "data", "random crop: pixels of padding; -1 for an eighth of the side, 0 for none")
    flip: int = _option(-1, "data", "random mirroring: 1 yes, 0 no, -1 as suits the data set")

    widths: str = _option(
        "16,16/32,32/64", "template", "nodes of each conv layer: layers by comma, stages (between reductions) by slash"
    )
    kernel_size: int = _option(3, "template", "side of the box in which kernels grow; 5 lets dilation emerge")
    hidden: str = _option("", "template", "nodes of hidden linear layers of the head, by comma; empty for none")
    head_grid: int = _option(2, "template", "the head reads each channel averaged over a grid of this side")
    stage_output: str = _option("all", "template", "what a reduction passes on: all of its stage, or the last layer")
    reduction: str = _option("max", "template", "2x2 pooling between stages")
    base: float = _option(0.5, "template", "live parameters of the random base network, as a share of the budget")
    max_channels: int = _option(1024, "template", "no layer grows beyond this many nodes")
    max_layers: int = _option(64, "template", "no more conv layers than this, identity layers included")

    method: str = _option(
        "ilnas",
        "search",
        "what changes the architecture: growth by gradient, or a baseline: random growth; a fixed sparse network; SET; "
        "RigL; gradual pruning of a dense network; a narrow dense network",
    )
    budget: int = _option(20_000, "search", "C: live weights and biases at most")
    growth_end: float = _option(0.12, "search", "share of the steps after which nothing is added; the budget is met")
    growth_start: float = _option(0.01, "search", "share of the steps before the first expansion")
    alr: float = _option(0.1, "search", "A_lr: parameters added per expansion, relative to the live ones")
    alr_decay: str = _option("cosine", "search", "how A_lr falls over the growth period")
    trigger: str = _option(
        "solved",
        "search",
        "when to expand: so that the budget is met exactly at growth_end; every --interval epochs; "
        "or when the training loss stops falling",
    )
    interval: float = _option(0.5, "search", "j: epochs between moves, and between expansions but for trigger solved")
    patience: int = _option(100, "search", "plateau: steps over which the loss is averaged and compared")
    tolerance: float = _option(0.01, "search", "plateau: relative fall of the loss below which it has stopped")
    candidates: float = _option(4.0, "search", "n/m: first-level candidates per parameter to add")
    hyper_step: bool = _option(True, "search", "score by |g + g*|; off: by |g| alone")
    hyper_lr: float = _option(0.0, "search", "learning rate of the hyper step; 0 for the current one")
    ranking: str = _option("global", "search", "one ranking, a quota by layer, or gradients normalised by layer")
    selection: str = _option("sampled", "search", "the best candidates, or drawn in proportion to the squared score")
    move: float = _option(
        0.2,
        "search",
        "share of the live weights, the smallest, that is moved at each expansion; falls as a cosine to 0",
    )
    move_end: float = _option(0.75, "search", "share of the steps after which nothing is moved or pruned")
    granularity: str = _option(
        "weight",
        "search",
        "what is added together: single weights; kernels; as much of a layer as the step adds; kernels, later weights; "
        "or layers, kernels, weights in turn",
    )
    nodes: int = _option(0, "search", "placeholder nodes offered per layer at each expansion")
    fan_in: int = _option(0, "search", "live inputs of a placeholder; 0 for the layer's mean")
    layers: int = _option(0, "search", "identity layers offered at each expansion, behind conv and hidden layers")
    scoring_batch: int = _option(0, "search", "images in each of the two scoring batches; 0 for as many as in a step")
    count_norm: bool = _option(False, "search", "count the normalisation's parameters towards the budget")

    epochs: int = _option(60, "training", "passes over the training images")
    batch_size: int = _option(128, "training", "images per step")
    lr: float = _option(0.1, "training", "highest learning rate; falls as a cosine to 0")
    warmup: float = _option(0.05, "training", "share of the steps in which the learning rate rises")
    momentum: float = _option(0.9, "training", "momentum of SGD")
    weight_decay: float = _option(5e-4, "training", "weight decay of SGD")
    label_smoothing: float = _option(0.0, "training", "label smoothing of the cross-entropy")
    clip: float = _option(0.0, "training", "largest norm of the gradient; 0 for none")
    autocast: str = _option("", "training", "compute in this type (bfloat16, float16); empty for float32")
    test_every: int = _option(1, "training", "epochs between looks at the validation part")

    preset: str = _option("default", "run", "default, or paper: the paper's own setting of the search")
    seed: int = _option(0, "run", "everything random follows from it")
    threads: int = _option(0, "run", "threads of torch; 0 for torch's choice")
    checkpoint_every: float = _option(1.0, "run", "epochs between checkpoints")
    tensorboard: bool = _option(False, "run", "also write TensorBoard events (needs the tensorboard extra)")

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{_flag(name)} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{_flag(name)} must lie in [{low}, {high}], got {value}")
        if self.autocast not in ("", "bfloat16", "float16"):
            raise ValueError(f"--autocast must be bfloat16, float16 or empty, got {self.autocast!r}")
        last = "growth_end" if self.method in ("ilnas", "random") else "move_end"
        if self.growth_start > getattr(self, last):
            raise ValueError(
                f"--growth-start {self.growth_start} must not be after {_flag(last)} {getattr(self, last)}"
            )
        _ = self.stage_widths, self.hidden_widths

    @property
    def stage_widths(self) -> list[list[int]]:
        """``widths`` as numbers: a list of layers' node counts per stage."""
        return [_counts("--widths", stage) for stage in self.widths.split("/")]

    @property
    def hidden_widths(self) -> list[int]:
        return _counts("--hidden", self.hidden) if self.hidden else []

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_SHARE = (0.0, 1.0)
_LARGE = 10**12
_RANGES = (
    ("validation", 0.0, 0.9), ("base", 1e-6, 1.0), ("growth_end", *_SHARE), ("growth_start", *_SHARE),
    ("move", *_SHARE), ("move_end", *_SHARE), ("warmup", *_SHARE), ("momentum", *_SHARE), ("label_smoothing", *_SHARE),
    ("budget", 1, _LARGE), ("epochs", 0, _LARGE), ("batch_size", 1, _LARGE), ("alr", 1e-6, 1e6),
    ("candidates", 1.0, 1e6), ("interval", 1e-6, 1e9), ("patience", 1, _LARGE), ("tolerance", 0.0, 1.0),
    ("lr", 0.0, 1e6), ("weight_decay", 0.0, 1e6), ("clip", 0.0, 1e12), ("train_images", 0, _LARGE),
    ("image_size", 0, 4096), ("crop", -1, 4096), ("flip", -1, 1), ("kernel_size", 1, 31), ("head_grid", 1, 64),
    ("max_channels", 1, _LARGE), ("max_layers", 1, _LARGE), ("nodes", 0, _LARGE), ("layers", 0, _LARGE),
    ("fan_in", 0, _LARGE), ("scoring_batch", 0, _LARGE), ("hyper_lr", 0.0, 1e6), ("threads", 0, 4096),
    ("test_every", 1, _LARGE), ("checkpoint_every", 1e-6, 1e9), ("seed", 0, 2**63),
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # PAPER 3.3, 5.1: a small random base, growth in the first 80 % of the epochs, the plain top of |g + g*| over the
    # network, kernels before weights, nodes and layers as additions, nothing removed.
    "paper": {
        "base": 0.1,
        "growth_end": 0.8,
        "growth_start": 0.0,
        "candidates": 2.0,
        "selection": "top",
        "move": 0.0,
        "ranking": "global",
        "granularity": "mixed",
        "nodes": 2,
        "layers": 1,
        "alr": 0.05,
        "epochs": 500,
        "test_every": 5,
        # Not the paper's: twenty identity layers may stand behind each other without normalisation, and without this
        # one training in three did not get off the ground.
        "clip": 1.0,
    },
}


def options() -> tuple[dataclasses.Field, ...]:
    """The fields of Config; ``metadata`` holds the group and the help text."""
    return dataclasses.fields(Config)


def make_config(*sources: dict[str, Any]) -> Config:
    """Defaults, then the preset that a source names, then the sources in order: the later one wins."""
    given: dict[str, Any] = {}
    for source in sources:
        given |= source
    preset = given.get("preset", "default")
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    known = {option.name: option.type for option in options()}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"unknown option {name!r}; known are {', '.join(known)}")
        if known[name] is float and type(value) is int:
            given[name] = float(value)
        elif type(value) is not known[name]:
            raise ValueError(f"option {name} must be of type {known[name].__name__}, got {value!r}")
    return Config(**(PRESETS[preset] | given))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The options in a TOML file; tables are groups for the reader's eye only."""
    try:
        with Path(path).open("rb") as file:
            content = tomllib.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"--config {path}: there is no such file") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--config {path}: not valid TOML: {error}") from error
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return {name.replace("-", "_"): value for name, value in flat.items()}


def to_toml(config: Config) -> str:
    """The options as TOML in their groups, each with its help text; ``read_toml`` reads it back."""
    lines: list[str] = []
    group = None
    for option in options():
        if option.metadata["group"] != group:
            group = option.metadata["group"]
            lines += ["", f"[{group}]"]
        lines.append(f"{option.name} = {_toml_value(getattr(config, option.name))}  # {option.metadata['help']}")
    return "\n".join(lines[1:]) + "\n"


def options_markdown() -> str:
    """The options as Markdown tables by group: docs/options.md."""
    paper = ", ".join(f"`{name} = {_toml_value(value)}`" for name, value in PRESETS["paper"].items())
    lines = [
        "# Options of `ilnas search`",
        "",
        "As `--name value` on the command line, `name = value` in a TOML file for `--config`, and those of growth and",
        "training as keyword arguments of `ilnas.grow`. Later sources win: defaults, preset, file, command line.",
        "",
        f"Preset `paper` sets: {paper}.",
    ]
    group = None
    for option in options():
        if option.metadata["group"] != group:
            group = option.metadata["group"]
            lines += ["", f"## {group}", "", "| option | default | what it does |", "|---|---|---|"]
        text = option.metadata["help"]
        if option.name in CHOICES:
            text += f" ({', '.join(CHOICES[option.name])})"
        lines.append(f"| `{option.name}` | `{_toml_value(option.default)}` | {text} |")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def _counts(flag: str, text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag}: {text!r} is not a list of whole numbers separated by commas") from None
    if min(counts) < 1:
        raise ValueError(f"{flag}: {text!r} holds {min(counts)}; every layer needs at least one node")
    return counts


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
