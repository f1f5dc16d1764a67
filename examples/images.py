"""Labelled images to train on: the digits that come with scikit-learn, or CIFAR-10 from a file or a folder.

A file is an .npz of JPEGs: `train_jpeg` (all files end to end, uint8), `train_offsets` (where each begins, and the end
of the last; int64), `train_labels` (uint8), the same for `test_`, and `classes` (their names). A folder is what
torchvision unpacks: `cifar-10-batches-py`, or one that contains it. Its pickles may hold numbers, text, containers and
arrays of bytes; anything else that a pickle could ask Python to load is refused, and nothing of it is run.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Images:
    """Images [n, height, width, channels], uint8, and their labels [n], int64, to train on and to test with."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    mirrored: bool  # whether a mirrored image keeps its label
    mean: Tensor  # of the training images' channels, as is the deviation
    deviation: Tensor

    def normalised(self, images: Tensor) -> Tensor:
        """[n, height, width, channels], uint8 -> [n, channels, height, width], float32, channels last in memory."""
        return ((images - self.mean) / self.deviation).permute(0, 3, 1, 2)

    def batches(self, size: int, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every epoch in a new order, every image shifted and perhaps mirrored; the same from the same seed.

        Yields images [size, channels, height, width], as `normalised` gives them, and labels [size]. What is left at
        the end of an epoch is dropped.
        """
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(self.train), generator=generator)
            for chosen in order[: len(order) // size * size].split(size):
                yield self.normalised(self.varied(self.train[chosen], generator)), self.train_labels[chosen]

    def varied(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Each image cropped at a random place after a border of an eighth, and mirrored every other time."""
        count, height, width, _ = images.shape
        border = height // 8
        padded = F.pad(images, (0, 0, border, border, border, border))
        top, left = torch.randint(2 * border + 1, (2, count, 1), generator=generator)
        rows, columns = top + torch.arange(height), torch.arange(width).expand(count, width)
        mirror = torch.rand(count, 1, generator=generator) < (0.5 if self.mirrored else 0.0)
        columns = left + torch.where(mirror, columns.flip(1), columns)
        return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def load(path: Path | None) -> Images:
    """The images at `path`, or scikit-learn's digits. Raises OSError or ValueError where they are not whole."""
    if path is None:
        return digits()
    return from_pickles(path) if path.is_dir() else from_jpegs(path)


def digits() -> Images:
    """1797 handwritten digits of 8x8 grey pixels; the last fifth, which other people wrote, tests."""
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    images, split = np.rint(grey * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1), len(labels) * 4 // 5
    return whole(images[:split], labels[:split], images[split:], labels[split:], classes=10, mirrored=False)


def from_jpegs(path: Path) -> Images:
    """Decodes an .npz of JPEGs."""
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
        train, test = (decoded(held[f"{part}_jpeg"], held[f"{part}_offsets"]) for part in ("train", "test"))
        return whole(train, held["train_labels"], test, held["test_labels"], len(held["classes"]), mirrored=True)
    except KeyError as missing:
        raise ValueError(f"{path} has no array {missing}; it needs those that examples/images.py lists") from None
    except (ValueError, EOFError, AttributeError, TypeError, IndexError, zipfile.BadZipFile, zlib.error) as problem:
        raise ValueError(f"{path} is no whole .npz of JPEGs: {problem}") from None


def decoded(jpeg: Bytes, offsets: NDArray[np.int64]) -> Bytes:
    """All images of one array, [n, height, width, 3]. Raises ValueError where one cannot be decoded."""
    from PIL import Image

    if offsets[0] != 0 or offsets[-1] != len(jpeg) or np.any(np.diff(offsets) <= 0):
        raise ValueError("the offsets do not divide the JPEGs' bytes")

    def decode(number: int) -> Bytes:
        file = io.BytesIO(jpeg[offsets[number] : offsets[number + 1]].tobytes())
        try:
            return np.asarray(Image.open(file, formats=["JPEG"]).convert("RGB"))
        except (OSError, Image.DecompressionBombError) as problem:
            raise ValueError(f"image {number}: {problem}") from None

    return np.stack([decode(number) for number in range(len(offsets) - 1)])


def from_pickles(folder: Path) -> Images:
    """Reads CIFAR-10's five training batches and its test batch."""
    inner = folder / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else folder
    batches = [read_batch(folder / name) for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
    (*train, test), (*train_labels, test_labels) = zip(*batches, strict=True)
    return whole(np.concatenate(train), np.concatenate(train_labels), test, test_labels, classes=10, mirrored=True)


def read_batch(path: Path) -> tuple[Bytes, NDArray[Any]]:
    """One file's images [n, 32, 32, 3] and labels [n]."""
    try:
        held = Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        images, labels = held["data"].bytes.reshape(-1, 3, 32, 32), np.array(held["labels"])
    except (pickle.UnpicklingError, ValueError, EOFError, AttributeError, KeyError, TypeError, IndexError) as problem:
        raise ValueError(f"{path} is no whole batch of CIFAR-10: {problem}") from None
    return images.transpose(0, 2, 3, 1), labels


class PickledArray:
    """What an array in a pickle becomes: its bytes."""

    def __init__(self, *_: object) -> None:
        self.bytes = np.zeros(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, _, held = state
        if kind.name != "u1":
            raise ValueError(f"an array of {kind.name}, not of bytes")
        self.bytes = np.frombuffer(held.encode("latin1") if isinstance(held, str) else held, np.uint8).reshape(shape)


class PickledKind:
    """The type of a pickled array's entries, by its name."""

    def __init__(self, name: str, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which bytes do not have."""


# All names that a pickled array of bytes uses, under Python 2 or 3 and any NumPy.
PICKLED: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray._reconstruct": PickledArray,
    "numpy._core.multiarray._reconstruct": PickledArray,
    "numpy.ndarray": PickledArray,
    "numpy.dtype": PickledKind,
    "_codecs.encode": lambda text, _: text.encode("latin1"),
}


class Unpickler(pickle.Unpickler):
    """Knows no names but those."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in PICKLED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of images needs")
        return PICKLED[f"{module}.{name}"]


def whole(
    train: Bytes, train_labels: NDArray[Any], test: Bytes, test_labels: NDArray[Any], classes: int, mirrored: bool
) -> Images:
    """Checked, as tensors. Raises ValueError where images and labels do not belong together."""
    for images, labels in ((train, train_labels), (test, test_labels)):
        if images.ndim != 4 or not len(images):
            raise ValueError(f"images of shape {list(images.shape)}; they should be [n, height, width, channels]")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images with labels of shape {list(labels.shape)}")
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels should be whole numbers from 0 to {classes - 1}")
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(f"training images of shape {list(train.shape[1:])}, test images of {list(test.shape[1:])}")
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in (train, train_labels, test, test_labels)]
    channels = [tensors[0][..., channel].float() for channel in range(train.shape[-1])]
    mean, deviation = (torch.stack([f(channel) for channel in channels]) for f in (torch.mean, torch.std))
    return Images(tensors[0], tensors[1].long(), tensors[2], tensors[3].long(), classes, mirrored, mean, deviation)
