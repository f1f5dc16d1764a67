"""Images to train on: what a batch is made of, and files that are whole, broken or hostile."""

import io
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import images
import numpy as np
import pytest
import torch
from PIL import Image

Arrays = dict[str, np.ndarray]


def drawn(count: int, side: int, mirrored: bool) -> images.Images:
    """Images whose every pixel says which image it is of, and where it lies in it."""
    number = np.arange(1, count + 1, dtype=np.uint8)[:, None, None]
    row, column = np.arange(side, dtype=np.uint8)[:, None], np.arange(side, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(number, row, column), -1)
    labels = np.arange(count) % 7
    return images.whole(pixels, labels, pixels, labels, classes=7, mirrored=mirrored)


def pixels(data: images.Images, batch: torch.Tensor) -> torch.Tensor:
    """[n, height, width, channels], as they were before they were normalised."""
    return (batch.permute(0, 2, 3, 1) * data.deviation + data.mean).round().long()


def test_an_epoch_takes_every_image_once_with_its_own_label_in_an_order_of_its_own() -> None:
    count, size = random.randint(20, 60), random.randint(2, 9)
    data, orders = drawn(count, 16, mirrored=True), []
    taken = list(data.batches(size, epochs=2, seed=random.randrange(9)))
    assert len(taken) == 2 * (count // size)
    for epoch in (taken[: count // size], taken[count // size :]):
        numbers = torch.cat([pixels(data, batch)[:, 8, 8, 0] for batch, _ in epoch])
        assert len(set(numbers.tolist())) == count // size * size
        assert torch.equal(torch.cat([labels for _, labels in epoch]), (numbers - 1) % 7)
        orders.append(numbers.tolist())
    assert orders[0] != orders[1]


@pytest.mark.parametrize("mirrored", [True, False])
def test_an_image_is_a_crop_of_itself_with_a_black_border_and_keeps_its_side_where_that_matters(mirrored: bool) -> None:
    side = 16
    data = drawn(50, side, mirrored)
    seen = set()
    for batch, _ in data.batches(50, epochs=4, seed=random.randrange(9)):
        for image in pixels(data, batch):
            inside = image[..., 0] > 0
            rows, columns = image[..., 1][inside], image[..., 2][inside]
            mirror = bool(columns[0] > columns[1])
            assert inside.sum() == len(rows.unique()) * len(columns.unique())
            assert not image[~inside].any()
            down, right = (int(where[0]) for where in inside.nonzero(as_tuple=True))
            wanted = torch.arange(len(columns.unique())) + int(columns.min())
            assert torch.equal(columns[: len(wanted)], wanted.flip(0) if mirror else wanted)
            seen.add((mirror, down - int(rows[0]), right))
    assert {mirror for mirror, _, _ in seen} == ({True, False} if mirrored else {False})
    assert {down for _, down, _ in seen} == {-2, -1, 0, 1, 2}
    assert {right for _, _, right in seen} == {0, 1, 2}


def test_the_same_seed_gives_the_same_batches() -> None:
    data, seed = drawn(30, 8, mirrored=True), random.randrange(1000)
    first, again, other = (list(data.batches(6, 2, s)) for s in (seed, seed, seed + 1))
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(first, again, strict=True))
    assert not all(torch.equal(x, y) for (_, x), (_, y) in zip(first, other, strict=True))


def test_images_come_normalised_and_with_channels_last_in_memory() -> None:
    data = images.load(None)
    normalised = data.normalised(data.train)
    assert abs(normalised.mean().item()) < 1e-4
    assert normalised.std().item() == pytest.approx(1, abs=1e-3)
    coloured = drawn(9, 8, mirrored=True)
    assert coloured.normalised(coloured.train).is_contiguous(memory_format=torch.channels_last)


def some_bytes(*shape: int) -> np.ndarray:
    return torch.randint(256, shape, dtype=torch.uint8).numpy()


def jpegs(count: int) -> tuple[Arrays, np.ndarray]:
    """The arrays of one part of a file, and the images that it decodes to."""
    files, decoded = [], []
    for _ in range(count):
        file = io.BytesIO()
        grey = some_bytes(4, 4, 3)
        Image.fromarray(grey).resize((32, 32)).save(file, "JPEG")
        files.append(file.getvalue())
        decoded.append(np.asarray(Image.open(file)))
    offsets = np.cumsum([0, *map(len, files)])
    arrays = {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offsets": offsets}
    return arrays | {"labels": some_bytes(count) % 10}, np.stack(decoded)


def parts() -> tuple[Arrays, np.ndarray, np.ndarray]:
    train, train_images = jpegs(5)
    test, test_images = jpegs(3)
    arrays = {f"train_{name}": array for name, array in train.items()}
    arrays |= {f"test_{name}": array for name, array in test.items()}
    return arrays | {"classes": np.array(list("abcdefghij"))}, train_images, test_images


def test_jpegs_are_decoded_in_their_order(tmp_path: Path) -> None:
    arrays, train, test = parts()
    np.savez(tmp_path / "images.npz", **arrays)
    data = images.load(tmp_path / "images.npz")
    assert np.array_equal(data.train.numpy(), train)
    assert np.array_equal(data.test.numpy(), test)
    assert data.train_labels.tolist() == arrays["train_labels"].tolist()
    assert data.test_labels.tolist() == arrays["test_labels"].tolist()


def without(name: str) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.__delitem__(name)


def put(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: change(arrays[name])})


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (without("test_labels"), "no array 'test_labels'"),
        (put("train_offsets", lambda offsets: offsets[:-1]), "offsets do not divide"),
        (put("train_offsets", lambda offsets: offsets[::-1]), "offsets do not divide"),
        (put("train_offsets", lambda offsets: offsets[:0]), "no whole .npz"),
        (put("test_jpeg", lambda jpeg: np.zeros_like(jpeg)), "image 0: cannot identify"),
        (put("test_labels", lambda labels: labels[1:]), "3 images with labels of shape [2]"),
        (put("test_labels", lambda labels: labels + 10), "whole numbers from 0 to 9"),
        (put("test_labels", lambda labels: labels / 3), "whole numbers from 0 to 9"),
        (put("classes", lambda classes: classes.astype(object)), "allow_pickle=False"),
    ],
)
def test_a_damaged_file_is_refused_with_what_is_wrong(
    tmp_path: Path, damage: Callable[[Arrays], None], complaint: str
) -> None:
    arrays, _, _ = parts()
    damage(arrays)
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(ValueError, match=r"images\.npz") as refused:
        images.load(tmp_path / "images.npz")
    assert complaint in str(refused.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    arrays, _, _ = parts()
    np.savez(tmp_path / "whole", **arrays)
    cut = (tmp_path / "whole.npz").read_bytes()[:-100]
    for number, content in enumerate((b"", b"no images", cut, pickle.dumps({1: 2}))):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is no whole \.npz of JPEGs"):
            images.load(path)
    np.save(tmp_path / "one.npy", arrays["train_jpeg"])
    with pytest.raises(ValueError, match=r"is no whole \.npz of JPEGs"):
        images.load(tmp_path / "one.npy")
    with pytest.raises(FileNotFoundError):
        images.load(tmp_path / "no such file")


def as_python_2_pickled_it(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch of CIFAR-10 as it was published: protocol 2, strings of bytes, an array of NumPy 1."""
    count, size = (b"M" + struct.pack("<H", number) for number in pixels.shape)
    raw = pixels.tobytes()
    return b"".join(
        (
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
            b"(K\x01" + count + size + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R",
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
            b"T" + struct.pack("<I", len(raw)) + raw + b"tb",
            b"U\x06labels](" + b"".join(b"K" + bytes([label]) for label in labels) + b"eu.",
        )
    )


def as_python_3_pickles_it(pixels: np.ndarray, labels: list[int]) -> bytes:
    return pickle.dumps({"data": pixels, "labels": labels}, protocol=random.choice([2, 3, 4]))


def write_folder(folder: Path, written: Callable[[np.ndarray, list[int]], bytes]) -> tuple[np.ndarray, list[int]]:
    """Six batches of four images; returns the images [24, channels, height, width] and their labels."""
    folder.mkdir()
    pixels, labels = some_bytes(24, 3072), [random.randrange(10) for _ in range(24)]
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name, start in zip(names, range(0, 24, 4), strict=True):
        (folder / name).write_bytes(written(pixels[start : start + 4], labels[start : start + 4]))
    return pixels.reshape(-1, 3, 32, 32), labels


@pytest.mark.parametrize("written", [as_python_2_pickled_it, as_python_3_pickles_it])
def test_a_folder_of_cifar_10_is_read_from_inside_or_above(
    tmp_path: Path, written: Callable[[np.ndarray, list[int]], bytes]
) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    pixels, labels = write_folder(folder, written)
    for path in (folder, tmp_path):
        data = images.load(path)
        assert np.array_equal(data.train.permute(0, 3, 1, 2).numpy(), pixels[:20])
        assert np.array_equal(data.test.permute(0, 3, 1, 2).numpy(), pixels[20:])
        assert [*data.train_labels.tolist(), *data.test_labels.tolist()] == labels


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_is_refused_and_nothing_of_it_is_run(tmp_path: Path) -> None:
    folder = tmp_path / "cifar"
    write_folder(folder, as_python_2_pickled_it)
    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": Hostile(tmp_path / "made"), "labels": [1]}))
    with pytest.raises(ValueError, match=r"data_batch_3 is no whole batch of CIFAR-10: it asks for \w+\.mkdir"):
        images.load(folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"labels": [1]}),
        pickle.dumps({"data": [1, 2], "labels": [1]}),
        as_python_2_pickled_it(np.zeros((4, 3072), np.uint8), [0] * 4)[:-200],
        as_python_3_pickles_it(np.zeros((4, 3000), np.uint8), [0] * 4),
        as_python_3_pickles_it(np.zeros((4, 3072), np.float32), [0] * 4),
        b"c_codecs\nencode\n(K\x01K\x02tR.",
        b"cnumpy\ndtype\nN\x85R}b.",
        b"cnumpy\nndarray\nK\x05b.",
    ],
)
def test_a_broken_batch_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "cifar"
    write_folder(folder, as_python_3_pickles_it)
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match="test_batch is no whole batch of CIFAR-10"):
        images.load(folder)


def test_a_folder_that_lacks_a_batch_or_has_fewer_labels_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar"
    write_folder(folder, as_python_3_pickles_it)
    (folder / "test_batch").write_bytes(as_python_3_pickles_it(np.zeros((4, 3072), np.uint8), [0] * 3))
    with pytest.raises(ValueError, match=r"4 images with labels of shape \[3\]"):
        images.load(folder)
    (folder / "data_batch_2").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_2"):
        images.load(folder)
