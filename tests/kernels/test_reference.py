"""The specification of convolutions is what the framework computes with a masked weight; dense products follow it."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctrlcompile.kernels import dense_conv, index_lists, reference
from ctrlcompile.kernels.window import Window, channels_last

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass
class Case:
    """Shape of the input and of the weight, sides of a block, and how the window moves."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    block: tuple[int, int]
    window: Window
    mask: Callable[[Tensor], Tensor] = lambda mask: mask


def plain(dimensions: int, stride: int = 1, padding: int = 1, dilation: int = 1, groups: int = 1) -> Window:
    return Window((stride,) * dimensions, ((padding, padding),) * dimensions, (dilation,) * dimensions, groups)


def without(dim: int, index: int) -> Callable[[Tensor], Tensor]:
    return lambda mask: mask.index_fill(dim, torch.tensor(index), 0)


CASES = {
    "one dimension": Case((3, 10, 17), (12, 10, 3), (4, 3), plain(1)),
    "two dimensions": Case((2, 10, 9, 7), (12, 10, 3, 3), (5, 4), plain(2)),
    "three dimensions": Case((2, 6, 5, 4, 6), (7, 6, 3, 1, 2), (2, 4), plain(3)),
    "stride 2": Case((2, 8, 9, 8), (8, 8, 3, 3), (4, 4), plain(2, stride=2)),
    "strides that differ": Case((2, 8, 12, 9), (8, 8, 2, 3), (4, 4), Window((3, 2), ((0, 1), (2, 0)), (1, 2))),
    "dilation": Case((2, 8, 11, 11), (8, 8, 3, 3), (4, 4), plain(2, padding=2, dilation=2)),
    "one channel": Case((2, 1, 9, 9), (1, 1, 3, 3), (1, 1), plain(2)),
    "groups": Case((2, 12, 7, 7), (8, 6, 3, 3), (2, 4), plain(2, groups=2)),
    "asymmetric padding": Case((2, 6, 8, 8), (6, 6, 4, 2), (4, 4), Window((1, 1), ((1, 2), (0, 1)), (1, 1))),
    "one tap": Case((2, 9, 5, 5), (11, 9, 1, 1), (4, 4), plain(2, padding=0)),
    "an empty row": Case((2, 8, 6, 6), (8, 8, 3, 3), (4, 4), plain(2), without(0, 1)),
    "an empty column": Case((2, 8, 6, 6), (8, 8, 3, 3), (4, 4), plain(2), without(1, 0)),
    "nothing active": Case((2, 8, 6, 6), (8, 8, 3, 3), (4, 4), plain(2), torch.zeros_like),
    "an empty batch": Case((0, 8, 6, 6), (8, 8, 3, 3), (4, 4), plain(2)),
}  # fmt: skip


class Problem:
    """Random tensors of a case in float64, and what the framework's own operators make of the masked weight."""

    def __init__(self, case: Case) -> None:
        self.block, self.window = case.block, case.window
        mask = torch.rand(index_lists.grid_shape(case.weight[:2], case.block)) < 0.6
        self.mask = case.mask(mask)
        self.active = index_lists.expand(self.mask, case.block, case.weight)
        self.x = channels_last(torch.randn(case.x, dtype=torch.float64)).requires_grad_()
        self.weight = torch.randn(case.weight, dtype=torch.float64)
        self.bias = torch.randn(case.weight[0], dtype=torch.float64)
        self.probes = torch.cat(((~self.mask).flatten().nonzero().flatten()[:2], torch.tensor([-1]))).int()
        leaf = (self.weight * self.active).requires_grad_()
        padded = F.pad(self.x, [side for sides in reversed(self.window.padding) for side in sides])
        convolve = CONVOLUTIONS[len(case.x) - 2]
        self.z = convolve(padded, leaf, self.bias, self.window.stride, 0, self.window.dilation, self.window.groups)
        self.grad_z = channels_last(torch.randn_like(self.z))
        self.grad_x, self.grad_weight = torch.autograd.grad(self.z, (self.x, leaf), self.grad_z)
        self.x, self.z = self.x.detach(), self.z.detach()

    @property
    def signals(self) -> Tensor:
        """Sums over each block and its taps."""
        measured = self.mask.clone()
        measured.view(-1)[self.probes[self.probes >= 0].long()] = True
        measured_entries = index_lists.expand(measured, self.block, self.weight.shape)
        sums = []
        for entries, counted in (
            (self.weight * self.grad_weight, self.active),
            (self.grad_weight**2, measured_entries),
        ):
            rows = (entries * counted).flatten(2).sum(2).split(self.block[0])
            sums.append(torch.stack([torch.stack([b.sum() for b in row.split(self.block[1], 1)]) for row in rows]))
        return torch.stack(sums).float()


@pytest.fixture(params=CASES, ids=str)
def problem(request) -> Problem:
    return Problem(CASES[request.param])


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_the_output_is_that_of_the_masked_weight(problem, activation):
    y, z = reference.conv(
        problem.x, problem.weight, problem.bias, problem.mask, problem.block, activation, problem.window
    )
    torch.testing.assert_close(z, problem.z)
    torch.testing.assert_close(y, reference.activate(problem.z, activation))


def test_the_gradients_are_those_of_the_masked_weight_and_signals_sum_over_blocks_and_taps(problem):
    size = tuple(problem.x.shape[2:])
    grad_x = reference.conv_dgrad(problem.grad_z, problem.weight, problem.mask, problem.block, problem.window, size)
    torch.testing.assert_close(grad_x, problem.grad_x)
    z = torch.randn_like(grad_x).requires_grad_()
    (expected,) = torch.autograd.grad(reference.activate(z, "gelu_tanh"), z, problem.grad_x)
    before = reference.Before.of(z.detach(), "gelu_tanh")
    rest = (problem.mask, problem.block, problem.window, size, before)
    torch.testing.assert_close(reference.conv_dgrad(problem.grad_z, problem.weight, *rest), expected)
    torch.testing.assert_close(before.sums, expected.sum([dim for dim in range(expected.dim()) if dim != 1]))
    grad_weight, signals = reference.conv_wgrad(
        problem.grad_z, problem.x, problem.weight, problem.mask, problem.probes, problem.block, problem.window
    )
    torch.testing.assert_close(grad_weight, problem.grad_weight * problem.active)
    torch.testing.assert_close(signals, problem.signals)


def test_dense_products_are_what_the_specification_says_and_channels_last(problem):
    lists, window, block = index_lists.build(problem.mask), problem.window, problem.block
    masked = problem.weight * problem.active
    for activation in reference.ACTIVATIONS:
        y, z = dense_conv.forward(problem.x, masked, problem.bias, lists, block, activation, window)
        torch.testing.assert_close(y, reference.activate(problem.z, activation))
        assert y.movedim(1, -1).is_contiguous()
        assert z.numel() == (y.numel() if activation.startswith("gelu") else 0)
    grad_x = dense_conv.dgrad(problem.grad_z, masked, lists, block, window, tuple(problem.x.shape[2:]))
    torch.testing.assert_close(grad_x, problem.grad_x)
    assert grad_x.movedim(1, -1).is_contiguous()
    grad_weight, signals = dense_conv.wgrad(problem.grad_z, problem.x, masked, lists, problem.probes, block, window)
    torch.testing.assert_close(grad_weight, problem.grad_weight * problem.active)
    torch.testing.assert_close(signals, problem.signals)
    assert grad_weight.is_contiguous()


def test_what_only_masked_blocks_see_is_not_computed():
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3)
    mask = torch.tensor([[True, False], [True, False]])
    window, probes = plain(2), torch.tensor([-1], dtype=torch.int32)
    grad = torch.randn(2, 8, 6, 6)
    finite = reference.conv(x, weight, None, mask, (4, 4), "none", window)[0]
    gradient = reference.conv_wgrad(grad, x, weight, mask, probes, (4, 4), window)
    x[:, 4:] = torch.inf
    weight[:, 4:] = torch.nan
    assert torch.equal(reference.conv(x, weight, None, mask, (4, 4), "none", window)[0], finite)
    again = reference.conv_wgrad(grad, x, weight, mask, probes, (4, 4), window)
    assert all(map(torch.equal, again, gradient))
    grad_x = reference.conv_dgrad(grad, weight, mask, (4, 4), window, (6, 6))
    assert grad_x[:, :4].isfinite().all()
    assert not grad_x[:, 4:].any()


def test_half_types_are_summed_in_float32_and_rounded_once():
    problem = Problem(CASES["two dimensions"])
    x, weight, grad = (t.to(torch.bfloat16) for t in (problem.x, problem.weight, problem.grad_z))
    rest = (problem.mask, problem.block)
    window, size = problem.window, tuple(problem.x.shape[2:])
    rounding = 2**-8  # of bfloat16; compared unrounded, since near a tie either neighbour is right
    y, _ = reference.conv(x, weight, None, *rest, "none", window)
    exact, _ = reference.conv(x.double(), weight.double(), None, *rest, "none", window)
    torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=1e-5)
    grad_x = reference.conv_dgrad(grad, weight, *rest, window, size)
    exact_x = reference.conv_dgrad(grad.double(), weight.double(), *rest, window, size)
    torch.testing.assert_close(grad_x.double(), exact_x, rtol=rounding, atol=1e-5)
