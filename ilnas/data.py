"""Image data sets in memory, a validation split, and batches augmented as whole tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ilnas.datafiles import read_cifar10, read_idx_dataset
from ilnas.randomness import generator_for

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar-10")
FLIPPED = ("fashion-mnist", "cifar-10")  # mirror images of digits are other signs


@dataclass(frozen=True)
class Images:
    """images uint8 [count, channels, height, width] and labels int64 [count]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Images":
        return Images(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test part, and the training part's mean and standard deviation by channel, in [0, 1]."""

    name: str
    train: Images
    validation: Images
    test: Images
    mean: Tensor
    std: Tensor

    @property
    def classes(self) -> int:
        return 10

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.train.images.shape[1:])


def load_dataset(
    name: str,
    directory: str | Path | None = None,
    *,
    validation: float = 0.1,
    train_images: int = 0,
    image_size: int = 0,
    seed: int = 0,
) -> Dataset:
    """One of ``DATASETS``, its training part split at random by ``seed`` into training and validation.

    directory: where the original files are (digits needs none). validation: the share of the training part that is
    held out, in [0, 1). train_images: keep only so many for training, 0 for all. image_size: resize to this many
    pixels a side, 0 to keep the size. Raises FileNotFoundError or ValueError naming the file and what is wrong.
    """
    if name not in DATASETS:
        raise ValueError(f"--dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    if not 0.0 <= validation < 1.0:
        raise ValueError(f"--validation must lie in [0, 1), got {validation}")
    if train_images < 0 or image_size < 0:
        raise ValueError(f"--train-images and --image-size must not be negative, got {train_images}, {image_size}")
    if name != "digits" and directory is None:
        raise ValueError(f"--dataset {name} needs --data DIR, the folder that holds its original files")
    whole, test = _digits() if name == "digits" else _from_files(name, Path(directory).expanduser())
    order = torch.randperm(len(whole), generator=generator_for(seed, "validation split"))
    held_out = round(validation * len(whole))
    keep = order[held_out:]
    if train_images:
        keep = keep[:train_images]
    train, held, test = (_resized(part, image_size) for part in (whole.take(keep), whole.take(order[:held_out]), test))
    if not len(train):
        raise ValueError(f"--dataset {name}: no training image is left (validation {validation})")
    return Dataset(name, train, held, test, *_mean_and_std(train.images))


def _mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """By channel, of pixels in [0, 1], from a count of each byte value: exact, and no float copy of the data set."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = torch.stack([torch.bincount(plane.reshape(-1), minlength=256) for plane in images.unbind(1)]).double()
    share /= share.sum(1, keepdim=True)
    mean = share @ levels
    variance = (share @ levels.square() - mean.square()).clamp_min(0)
    return mean.float(), variance.sqrt().clamp_min(1e-6).float()


def _digits() -> tuple[Images, Images]:
    """scikit-learn's 1797 digits of 8x8; one fixed fifth is the test part (the set comes without a split)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=generator_for(0, "digits test part"))
    test = len(labels) // 5
    whole = Images(images, labels)
    return whole.take(order[test:]), whole.take(order[:test])


def _from_files(name: str, directory: Path) -> tuple[Images, Images]:
    parts = read_cifar10(directory) if name == "cifar-10" else read_idx_dataset(name, directory)
    train, test = (Images(torch.from_numpy(x.copy()), torch.from_numpy(y)) for x, y in parts)
    return train, test


def _resized(part: Images, size: int) -> Images:
    if size == 0 or part.images.shape[-2:] == (size, size):
        return part
    resized = [
        F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255).byte()
        for chunk in part.images.split(4096)
    ]
    return Images(
        torch.cat(resized) if resized else part.images.new_empty(0, part.images.shape[1], size, size), part.labels
    )


class Batches:
    """Normalised float batches, in the same order and with the same augmentation for the same seed and step.

    A step is one batch; epoch e is steps ``e * per_epoch`` to ``(e + 1) * per_epoch - 1``, over all images once in
    an order drawn anew, the last incomplete batch left out (unless it is the only one).
    """

    def __init__(
        self, part: Images, dataset: Dataset, batch_size: int, *, seed: int = 0, crop: int = 0, flip: bool = False
    ) -> None:
        """crop: pixels of zero padding around the image out of which a window is cut at random."""
        if batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
        if not len(part):
            raise ValueError("Batches: the part holds no image")
        self.part, self.seed, self.crop, self.flip = part, seed, crop, flip
        self.batch_size = min(batch_size, len(part))
        self.per_epoch = len(part) // self.batch_size
        self.scale = (1 / (255 * dataset.std)).view(-1, 1, 1)
        self.shift = (-dataset.mean / dataset.std).view(-1, 1, 1)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a training step: images float32 [batch, channels, height, width] and labels [batch]."""
        epoch, position = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, torch.randperm(len(self.part), generator=generator_for(self.seed, "order", epoch)))
        index = self._order[1][position * self.batch_size : (position + 1) * self.batch_size]
        return self._prepared(index, generator_for(self.seed, "augmentation", step))

    def sample(self, size: int, purpose: str, step: int) -> tuple[Tensor, Tensor]:
        """``size`` images drawn without replacement, augmented, for one purpose (such as scoring) at one step."""
        generator = generator_for(self.seed, purpose, step)
        index = torch.randperm(len(self.part), generator=generator)[:size]
        return self._prepared(index, generator)

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, unaugmented, the last batch as small as it comes: for evaluation."""
        for start in range(0, len(self.part), self.batch_size):
            part = self.part.take(torch.arange(start, min(start + self.batch_size, len(self.part))))
            yield self.normalised(part.images), part.labels

    def normalised(self, images: Tensor) -> Tensor:
        return images.float().mul_(self.scale).add_(self.shift)

    def _prepared(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = self.part.images[index]
        if self.crop or self.flip:
            images = augmented(images, crop=self.crop, flip=self.flip, generator=generator)
        return self.normalised(images), self.part.labels[index]


def augmented(images: Tensor, *, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image moved by up to ``crop`` pixels each way (zeros come in) and mirrored with probability 1/2.

    One gather for the whole batch: a row index and a column index per image say where each pixel comes from.
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, (crop,) * 4)
    top = torch.randint(2 * crop + 1, (count, 1), generator=generator)
    left = torch.randint(2 * crop + 1, (count, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    flat = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]
    flat = flat.view(count, 1, -1).expand(count, channels, height * width)
    return padded.flatten(2).gather(2, flat).view(images.shape)
