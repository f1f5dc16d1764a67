"""The model that proposes Triton tiles: every proposal fits its device, and follows the shape it is made for."""

import itertools

import pytest
import torch

from ctrlcompile.kernels import triton_rows, triton_rows_text, triton_wgrad
from ctrlcompile.kernels.triton_device import A100, B200, H100, Device
from ctrlcompile.kernels.triton_rows import Rows, RowsTile
from ctrlcompile.kernels.triton_wgrad import Wgrad
from ctrlcompile.kernels.window import Window

SIDES = range(16, 129, 16)
KINDS = [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")]
SMALL = Device("a small card", (8, 9), 20, 99 << 10)
CONV = {"taps": (3, 3), "window": Window((2, 2), ((1, 1), (1, 1)), (1, 1))}


@pytest.mark.parametrize("device", [A100, H100, B200, SMALL], ids=lambda device: device.name)
def test_every_block_and_type_has_one_to_six_tiles_that_fit(device):
    for out, into, (dtype, precision), aligned in itertools.product(SIDES, SIDES, KINDS, [True, False]):
        rows = Rows(out, into, True, dtype, precision=precision)
        for family, kernel in ((triton_rows, rows), (triton_wgrad, Wgrad(out, into, dtype, precision))):
            for m, size in [(1, 64), (8192, 4096), (512, 768)]:
                tiles = family.candidates(kernel, m, size, size, device, aligned)
                assert 1 <= len(tiles) <= 6, (kernel, device.name)
                assert len(set(tiles)) == len(tiles)
                for tile in tiles:
                    assert family.shared_bytes(kernel, tile) <= device.shared_memory
                    assert not tile.descriptors or (aligned and device.descriptors)


@pytest.mark.parametrize("device", [A100, H100, SMALL], ids=lambda device: device.name)
def test_every_block_of_a_convolution_has_tiles_that_load_through_pointers(device):
    for out, into, (dtype, precision) in itertools.product(SIDES, SIDES, KINDS):
        rows = Rows(out, into, True, dtype, precision=precision, **CONV)
        for family, kernel in ((triton_rows, rows), (triton_wgrad, Wgrad(out, into, dtype, precision, **CONV))):
            for pixels, channels in [(1, 64), (1 << 16, 256)]:
                tiles = family.candidates(kernel, pixels, channels, channels, device, True)
                assert 1 <= len(tiles) <= 6, (kernel, device.name)
                assert not any(tile.descriptors for tile in tiles)


def test_few_rows_get_small_tiles_and_many_get_large_ones():
    kernel = Rows(128, 64, True, torch.bfloat16)
    few, many = (triton_rows.candidates(kernel, m, 4096, 4096, H100, True)[0] for m in (8, 16384))
    assert few.rows == 16
    assert many.rows >= 128


def test_the_rows_of_a_small_weights_gradient_are_split():
    kernel = Wgrad(128, 128, torch.bfloat16)
    small, large = (triton_wgrad.candidates(kernel, 16384, size, size, H100, True)[0] for size in (512, 8192))
    assert small.splits > 1
    assert large.splits == 1


def test_texts_are_python_with_short_lines_and_name_what_they_are():
    for out, into, transposed, partial in itertools.product((48, 64), (16, 96), (True, False), (True, False)):
        kernel = Rows(out, into, transposed, torch.float16, "gelu" if transposed else "none", transposed, partial)
        for tile in triton_rows.candidates(kernel, 4096, 1024, 1024, H100, True):
            check_text(triton_rows_text.source(kernel, tile), kernel)
        for tile in triton_wgrad.candidates(Wgrad(out, into, torch.float16), 4096, 1024, 1024, H100, True):
            check_text(triton_wgrad.source(Wgrad(out, into, torch.float16), tile), kernel)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("taps", "window"),
    [
        ((5,), Window((4,), ((2, 1),), (2,))),
        ((3, 3), Window((2, 2), ((1, 1), (1, 1)), (1, 1))),
        ((2, 1, 7), Window((3, 1, 4), ((0, 1), (0, 0), (3, 2)), (3, 1, 2))),
    ],
    ids=["1d", "2d", "3d"],
)
def test_texts_of_convolutions_are_python_with_short_lines(taps, window, groups):
    given = {"taps": taps, "window": window._replace(groups=groups), "wide": groups == 2}
    for out, into, transposed in itertools.product((48, 64), (16, 96), (True, False)):
        kernel = Rows(out, into, transposed, torch.float16, partial=transposed, **given)
        for tile in triton_rows.candidates(kernel, 4096, 192, 192, H100):
            check_text(triton_rows_text.source(kernel, tile), kernel)
        for tile in triton_wgrad.candidates(Wgrad(out, into, torch.float16, **given), 4096, 192, 192, H100):
            check_text(triton_wgrad.source(Wgrad(out, into, torch.float16, **given), tile), kernel)


def check_text(text, kernel):
    compile(text, "kernel", "exec")
    assert text.startswith(f'"""Block-sparse {"convolution" if kernel.walk else "linear"}, ')
    assert f"{kernel.outputs} x {kernel.inputs} " in text.splitlines()[2]
    assert max(map(len, text.splitlines())) <= 120
    assert "$" not in text


def test_a_descriptor_cannot_gather():
    with pytest.raises(ValueError, match="at most 16 columns"):
        triton_rows_text.source(Rows(64, 16, True, torch.float16), RowsTile(64, 64, 4, 3, descriptors=True))
