"""How a window moves: the size of what comes out, which convolutions are linears, and images with channels last."""

import random

import pytest
import torch
import torch.nn.functional as F

from ctrlcompile.kernels.window import Window, channels_last


def test_the_size_of_the_output_is_that_of_the_frameworks_convolution():
    for _ in range(30):
        taps = (random.randint(1, 4), random.randint(1, 4))
        stride, dilation = ((random.randint(1, 3), random.randint(1, 3)) for _ in range(2))
        padding = tuple((random.randint(0, 3), random.randint(0, 3)) for _ in taps)
        x, weight = torch.empty(1, 1, 12, 15), torch.empty(1, 1, *taps)
        (top, bottom), (left, right) = padding
        y = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, stride, 0, dilation)
        window = Window(stride, padding, dilation)
        assert window.output_size((12, 15), taps) == tuple(y.shape[2:])
        assert Window.of(*window.arguments) == window


def test_a_window_misses_the_input_where_a_convolution_of_ones_is_zero():
    found = set()
    for _ in range(200):
        size, taps = (tuple(random.randint(1, most) for _ in range(2)) for most in (5, 3))
        stride, dilation = (tuple(random.randint(1, 3) for _ in range(2)) for _ in range(2))
        padding = tuple((random.randint(0, 3), random.randint(0, 3)) for _ in range(2))
        window = Window(stride, padding, dilation)
        if min(window.output_size(size, taps)) < 1:
            continue
        (top, bottom), (left, right) = padding
        ones = F.pad(torch.ones(1, 1, *size), (left, right, top, bottom))
        counted = F.conv2d(ones, torch.ones(1, 1, *taps), None, stride, 0, dilation)
        assert window.misses(size, taps) == bool((counted == 0).any())
        found.add(window.misses(size, taps))
    assert found == {True, False}


@pytest.mark.parametrize(
    ("window", "taps", "linear"),
    [
        (Window((1, 1), ((0, 0), (0, 0)), (1, 1)), (1, 1), True),
        (Window((1,), ((0, 0),), (3,)), (1,), True),
        (Window((1, 1), ((0, 0), (0, 0)), (1, 1)), (1, 3), False),
        (Window((1, 2), ((0, 0), (0, 0)), (1, 1)), (1, 1), False),
        (Window((1, 1), ((0, 0), (0, 1)), (1, 1)), (1, 1), False),
        (Window((1, 1), ((0, 0), (0, 0)), (1, 1), 2), (1, 1), False),
    ],
)
def test_one_tap_that_sees_every_position_is_a_linear(window, taps, linear):
    assert window.is_linear(taps) is linear


@pytest.mark.parametrize("size", [(5,), (5, 4), (5, 4, 3)])
def test_channels_last_moves_what_is_not_and_leaves_what_is(size):
    x = torch.randn(2, 6, *size)
    moved = channels_last(x)
    assert torch.equal(moved, x)
    assert moved.stride(1) == 1
    assert channels_last(moved).data_ptr() == moved.data_ptr()
