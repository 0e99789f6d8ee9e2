"""Readers of the original files, the split, and augmentation against a plain loop."""

import gzip
import io
import pickle
import struct

import numpy as np
import pytest
import torch

from ilnas.data import Batches, Dataset, Images, augmented, load_dataset
from ilnas.datafiles import read_cifar_batch, read_idx

RNG = np.random.default_rng(0)


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_idx_dataset(folder, suffix="", dot=False):
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    for prefix, count in (("train", 20), ("t10k", 7)):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = RNG.integers(0, 10, count, dtype=np.uint8)
        for kind, array in (("images", images), ("labels", labels)):
            raw = idx_bytes(array)
            name = f"{prefix}-{kind}{'.' if dot else '-'}idx{array.ndim}-ubyte{suffix}"
            (folder / name).write_bytes(gzip.compress(raw) if suffix else raw)
        parts[prefix] = images, labels
    return parts


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "raw", "torchvision"])
def test_idx_files_are_found_and_read(tmp_path, name, suffix, place):
    inner = {"": "", "raw": "raw", "torchvision": "MNIST/raw" if name == "mnist" else "FashionMNIST/raw"}[place]
    parts = write_idx_dataset(tmp_path / inner, suffix, dot=place == "raw")
    dataset = load_dataset(name, tmp_path, validation=0.25)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (15, 5, 7)
    np.testing.assert_array_equal(dataset.test.images[:, 0].numpy(), parts["t10k"][0])
    np.testing.assert_array_equal(dataset.test.labels.numpy(), parts["t10k"][1])
    together = torch.cat([dataset.train.images, dataset.validation.images])[:, 0].flatten(1)
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, parts["train"][0].reshape(20, -1)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-5], "truncated"),
        (lambda raw: raw[:6], "truncated"),
        (lambda raw: raw + b"x", "too long"),
        (lambda raw: b"\0\0\x09\x03" + raw[4:], "magic"),
        (lambda raw: gzip.compress(raw)[:-20], "gzip"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, damage, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(idx_bytes(np.zeros((3, 4, 4), np.uint8))))
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path, 3)
    assert str(path) in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data .*holds none of train-images-idx3-ubyte"):
        load_dataset("mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_dataset("cifar-10", tmp_path / "absent")
    with pytest.raises(ValueError, match="needs --data"):
        load_dataset("mnist")
    with pytest.raises(ValueError, match="--dataset must be one of"):
        load_dataset("imagenet", tmp_path)


def test_labels_that_do_not_fit_the_images(tmp_path):
    write_idx_dataset(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(19, np.uint8)))
    with pytest.raises(ValueError, match="19 labels for 20 images"):
        load_dataset("mnist", tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(20, 11, np.uint8)))
    with pytest.raises(ValueError, match=r"must lie in 0\.\.9"):
        load_dataset("mnist", tmp_path)


def write_cifar(folder, binary):
    folder.mkdir(parents=True)
    batches = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels, labels = RNG.integers(0, 256, (4, 3072), dtype=np.uint8), RNG.integers(0, 10, 4)
        if binary:
            (folder / f"{name}.bin").write_bytes(np.column_stack([labels.astype(np.uint8), pixels]).tobytes())
        else:
            (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=2))
        batches[name] = pixels, labels
    return batches


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("in_root", [False, True])
def test_cifar_pickled_and_binary(tmp_path, binary, in_root):
    folder = tmp_path / f"cifar-10-batches-{'bin' if binary else 'py'}"
    batches = write_cifar(folder, binary)
    dataset = load_dataset("cifar-10", tmp_path if in_root else folder, validation=0.0)
    assert dataset.image_shape == (3, 32, 32)
    assert len(dataset.train) == 20
    np.testing.assert_array_equal(dataset.test.images.flatten(1).numpy(), batches["test_batch"][0])
    np.testing.assert_array_equal(dataset.test.labels.numpy(), batches["test_batch"][1])


def test_a_cifar_batch_cannot_run_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return print, ("harm",)

    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Harmful()}))
    with pytest.raises(ValueError, match=r"builtins\.print"):
        read_cifar_batch(path)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_1.bin"])
def test_a_truncated_cifar_batch_is_named(tmp_path, name):
    stream = io.BytesIO(pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0] * 4}))
    path = tmp_path / name
    path.write_bytes(stream.getvalue()[:5000])
    with pytest.raises(ValueError, match=f"{name}.*truncated"):
        read_cifar_batch(path)


def test_digits_split_is_fixed_by_the_seed_and_the_test_part_by_nothing():
    one, same, other = (load_dataset("digits", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.train.images, same.train.images)
    assert not torch.equal(one.train.images, other.train.images)
    assert torch.equal(one.test.images, other.test.images)
    assert len(one.train) + len(one.validation) + len(one.test) == 1797


def test_mean_and_standard_deviation():
    dataset = load_dataset("digits", validation=0.0)
    pixels = dataset.train.images.double() / 255
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3), correction=0)
    # The byte counts are exact; what is left is rounding to float32, 2^-24 relative.
    torch.testing.assert_close(dataset.mean.double(), mean, rtol=2**-23, atol=0)
    torch.testing.assert_close(dataset.std.double(), std, rtol=2**-23, atol=0)


def test_resizing():
    dataset = load_dataset("digits", image_size=12, train_images=50)
    assert dataset.image_shape == (1, 12, 12)
    assert len(dataset.train) == 50


@pytest.mark.parametrize("crop", [0, 1, 3])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7)])
def test_augmentation_against_a_loop(crop, flip, shape):
    images = torch.randint(256, (40, *shape), dtype=torch.uint8)
    got = augmented(images, crop=crop, flip=flip, generator=torch.Generator().manual_seed(3))
    padded = torch.nn.functional.pad(images, (crop,) * 4)
    height, width = shape[1:]
    for image, source in zip(got, padded, strict=True):
        windows = [
            source[:, top : top + height, left : left + width]
            for top in range(2 * crop + 1)
            for left in range(2 * crop + 1)
        ]
        windows += [window.flip(2) for window in windows] if flip else []
        assert any(torch.equal(image, window) for window in windows)
    if crop and shape != (1, 1, 1):
        assert not torch.equal(got, images)


def tiny_dataset(count=23):
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 3, 3).contiguous()
    part = Images(images, torch.arange(count) % 10)
    return Dataset("tiny", part, part, part, torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.25]))


def test_an_epoch_sees_each_image_once_and_steps_repeat_exactly():
    dataset = tiny_dataset()
    batches = Batches(dataset.train, dataset, 5, seed=1)
    assert batches.per_epoch == 4
    epochs = [[batches.batch(4 * e + i)[0] for i in range(4)] for e in range(2)]
    numbers = [torch.cat(epoch)[:, 0, 0, 0] for epoch in epochs]
    assert all(len(set(n.tolist())) == 20 for n in numbers)
    assert not torch.equal(*numbers)
    again = Batches(dataset.train, dataset, 5, seed=1)
    assert torch.equal(again.batch(6)[0], epochs[1][2])


def test_normalisation_and_evaluation_order():
    dataset = tiny_dataset()
    batches = Batches(dataset.train, dataset, 10)
    images = torch.cat([x for x, _ in batches.in_order()])
    expected = (dataset.train.images.double() / 255 - dataset.mean.view(-1, 1, 1)) / dataset.std.view(-1, 1, 1)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=8 * 2**-24)  # values up to 1, four roundings
    assert len(images) == 23


def test_bad_sizes_are_named():
    dataset = tiny_dataset()
    with pytest.raises(ValueError, match="--batch-size must be at least 1, got 0"):
        Batches(dataset.train, dataset, 0)
    with pytest.raises(ValueError, match=r"--validation must lie in \[0, 1\), got 1"):
        load_dataset("digits", validation=1.0)
    with pytest.raises(ValueError, match="holds no image"):
        Batches(dataset.train.take(torch.arange(0)), dataset, 4)
