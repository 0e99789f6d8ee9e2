"""Readers of the original files of MNIST, Fashion-MNIST (IDX) and CIFAR-10 (pickled or binary batches)."""

import gzip
import pickle
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

Part = tuple[np.ndarray, np.ndarray]  # images uint8 [count, channels, height, width], labels int64 [count]

IDX_FOLDERS = {
    "mnist": ("", "MNIST/raw", "mnist", "raw"),
    "fashion-mnist": ("", "FashionMNIST/raw", "fashion-mnist", "raw"),
}
CIFAR_FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin", "cifar-10")
CIFAR_RECORD = 1 + 3 * 32 * 32  # a label byte, then the three colour planes


def read_idx_dataset(name: str, directory: Path) -> tuple[Part, Part]:
    """Training and test part of ``mnist`` or ``fashion-mnist`` from its folder, or from a torchvision root."""
    parts = []
    for prefix in ("train", "t10k"):
        # A torchvision root may hold both data sets, so a folder of the set's own name comes before the plain one.
        folders = [directory / sub for sub in (*IDX_FOLDERS[name][1:], "")]
        images = read_idx(_find(name, directory, folders, _idx_names(f"{prefix}-images", 3)), 3)
        labels_path = _find(name, directory, folders, _idx_names(f"{prefix}-labels", 1))
        labels = read_idx(labels_path, 1)
        if len(images) != len(labels):
            raise ValueError(f"{labels_path}: holds {len(labels)} labels for {len(images)} images; they must match")
        parts.append((images[:, None], _checked_labels(labels_path, labels)))
    return parts[0], parts[1]


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an IDX file, plain or gzip; ValueError where the header or the length is wrong."""
    raw = _read_maybe_gzip(path)
    header = 4 + 4 * dimensions
    if len(raw) < header:
        raise ValueError(f"{path}: truncated: {len(raw)} bytes, an IDX header of {dimensions} dimensions has {header}")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", raw[:header])
    if magic != 0x0800 + dimensions:
        raise ValueError(f"{path}: not an IDX file of bytes with {dimensions} dimensions (magic number {magic:#010x})")
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(raw) != expected:
        fault = "truncated" if len(raw) < expected else "too long"
        raise ValueError(f"{path}: {fault}: {len(raw)} bytes, its header {tuple(shape)} promises {expected}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def read_cifar10(directory: Path) -> tuple[Part, Part]:
    """Training and test part of CIFAR-10, from ``data_batch_1..5`` and ``test_batch``, pickled or ``.bin``."""
    folders = [directory / sub for sub in CIFAR_FOLDERS]
    train = [
        read_cifar_batch(_find("cifar-10", directory, folders, (f"data_batch_{i}", f"data_batch_{i}.bin")))
        for i in range(1, 6)
    ]
    test = read_cifar_batch(_find("cifar-10", directory, folders, ("test_batch", "test_batch.bin")))
    return (np.concatenate([x for x, _ in train]), np.concatenate([y for _, y in train])), test


def read_cifar_batch(path: Path) -> Part:
    """One batch file: records of ``label, 3072 pixels`` when its name ends in .bin, else a pickled dictionary."""
    if path.suffix == ".bin":
        raw = _read(path)
        if not raw or len(raw) % CIFAR_RECORD:
            raise ValueError(f"{path}: truncated: {len(raw)} bytes, not a multiple of the record's {CIFAR_RECORD}")
        records = np.frombuffer(raw, np.uint8).reshape(-1, CIFAR_RECORD)
        pixels, labels = records[:, 1:], records[:, 0]
    else:
        try:
            with path.open("rb") as file:
                batch = _ArraysOnly(file, encoding="bytes").load()
            pixels, labels = np.asarray(batch[b"data"], np.uint8), np.asarray(batch[b"labels"])
        except (EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: truncated or not a pickled CIFAR-10 batch: {error}") from error
        if pixels.ndim != 2 or pixels.shape != (len(labels), CIFAR_RECORD - 1):
            raise ValueError(f"{path}: pixels of shape {pixels.shape} for {len(labels)} labels; 3072 each are needed")
    return pixels.reshape(-1, 3, 32, 32), _checked_labels(path, labels)


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and nothing else: a data file must not be able to run code."""

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a CIFAR-10 batch does not hold")


def _idx_names(stem: str, dimensions: int) -> tuple[str, ...]:
    plain = (f"{stem}-idx{dimensions}-ubyte", f"{stem}.idx{dimensions}-ubyte")
    return (*plain, *(f"{name}.gz" for name in plain))


def _find(dataset: str, directory: Path, folders: Iterable[Path], names: Iterable[str]) -> Path:
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    what = "is no folder" if not directory.is_dir() else f"holds none of {', '.join(names)}"
    raise FileNotFoundError(
        f"--dataset {dataset}: --data {directory} {what}; give the folder of the original files or a torchvision root"
    )


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _read_maybe_gzip(path: Path) -> bytes:
    raw = _read(path)
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated or damaged gzip file: {error}") from error


def _checked_labels(path: Path, labels: np.ndarray) -> np.ndarray:
    labels = labels.astype(np.int64)
    if labels.size and (labels.min() < 0 or labels.max() > 9):
        raise ValueError(f"{path}: labels from {labels.min()} to {labels.max()}; all must lie in 0..9")
    return labels
