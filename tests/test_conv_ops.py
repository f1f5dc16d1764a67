"""The gated convolution as an operator: registration, gradients, autocast, FLOP formulas, what it refuses."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ctrlcompile as cc
from ctrlcompile import ops
from ctrlcompile.kernels import reference
from ctrlcompile.kernels.index_lists import build, expand, grid_shape
from ctrlcompile.kernels.window import Window

from .small_models import error, no_worse, random_mask

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = (8, 16)
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def plain(dimensions: int, stride: int = 1, padding: int = 1, dilation: int = 1, groups: int = 1) -> Window:
    return Window((stride,) * dimensions, ((padding, padding),) * dimensions, (dilation,) * dimensions, groups)


class Case:
    """Random arguments of `ctrlprune::conv`; both channels end in a partial block."""

    def __init__(
        self, dtype=torch.float32, *, size=(7, 6), taps=(3, 3), window=None, outputs=20, inputs=24, batch=3, bias=True,
        activation="none", density=None, block=BLOCK,
    ):  # fmt: skip
        self.window, self.activation, self.block = window or plain(len(size)), activation, block
        self.x = torch.randn(batch, inputs * self.window.groups, *size, dtype=dtype)
        shape = (outputs, inputs, *taps)
        grid = grid_shape(shape[:2], block)
        self.mask = torch.ones(grid, dtype=torch.bool) if density == 1 else random_mask(grid, density)
        self.active = expand(self.mask, block, shape)
        self.weight = torch.randn(shape, dtype=dtype) / 10 * self.active
        self.bias = torch.randn(outputs, dtype=dtype) if bias else None
        self.signals, self.lists = torch.zeros(2, *grid), build(self.mask)
        off = (~self.mask).flatten().nonzero().flatten()[:2].int()
        self.probes = torch.cat((off, torch.tensor([-1], dtype=torch.int32)))

    def requires_grad(self) -> "Case":
        for tensor in (self.x, self.weight, self.bias, self.signals):
            if tensor is not None:
                tensor.requires_grad_()
        return self

    @property
    def gate(self):
        return (self.signals, list(self.lists), self.probes, *self.block)

    @property
    def arguments(self):
        return (self.x, self.weight, self.bias, *self.gate, self.activation, *self.window.arguments)

    def run(self) -> Tensor:
        return ops.conv(*self.arguments)[0]

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """The framework's own ops on the masked dense weight in `dtype`: the output, and leaves for its gradients."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in (self.x, self.weight, self.bias) if t is not None]
        x = F.pad(leaves[0], [side for sides in reversed(self.window.padding) for side in sides])
        moves = (self.window.stride, 0, self.window.dilation, self.window.groups)
        bias = leaves[2] if self.bias is not None else None
        y = CONVOLUTIONS[x.dim() - 2](x, leaves[1] * self.active, bias, *moves)
        return reference.activate(y, self.activation), leaves


KINDS = {
    "1d": {"size": (9,), "taps": (3,), "activation": "relu"},
    "2d": {"activation": "gelu"},
    "3d": {"size": (4, 3, 5), "taps": (3, 1, 2), "bias": False},
    "strided": {"window": plain(2, stride=2), "activation": "gelu_tanh"},
    "dilated, padded on one side": {"window": Window((1, 1), ((0, 2), (1, 2)), (1, 2))},
    "groups": {"window": plain(2, groups=2), "outputs": 32},
    "a linear": {"taps": (1, 1), "window": plain(2, padding=0), "activation": "relu"},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@kinds
def test_the_operators_are_registered_as_pytorch_wants(kind):
    case = Case(**kind)
    y = case.run()
    torch.library.opcheck(ops.conv.default, case.requires_grad().arguments)
    moves, lists = case.window.arguments, list(case.lists)
    size = list(case.x.shape[2:])
    grad, x, weight = torch.randn_like(y), case.x.detach(), case.weight.detach()
    for before in ((), (torch.randn_like(x), "gelu")):
        torch.library.opcheck(ops.conv_dgrad.default, (grad, weight, lists, *case.block, size, *moves, *before))
    torch.library.opcheck(ops.conv_wgrad.default, (grad, x, weight, lists, case.probes, *case.block, *moves))


@kinds
def test_gradients_are_the_numerical_ones(kind):
    case = Case(torch.float64, batch=1, inputs=10, block=(8, 8), **kind)
    leaves = [tensor.requires_grad_() for tensor in (case.x, case.weight, case.bias) if tensor is not None]
    bias = () if case.bias is not None else (None,)
    rest = case.arguments[3:]
    assert torch.autograd.gradcheck(lambda *inputs: ops.conv(*inputs, *bias, *rest)[0], leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds
def test_output_and_gradients_are_as_exact_as_the_dense_op(kind, dtype):
    case = Case(dtype, **kind).requires_grad()
    y = case.run()
    grad = torch.randn_like(y)
    y.backward(grad)
    ours = [y, *(t.grad for t in (case.x, case.weight, case.bias) if t is not None)]
    results = {}
    for precision in (torch.float64, dtype):
        out, leaves = case.dense(precision)
        out.backward(grad.to(precision))
        results[precision] = [out, *(leaf.grad for leaf in leaves)]
    times = 10 if dtype == torch.float32 else 1.1
    for mine, exact, theirs in zip(ours, results[torch.float64], results[dtype], strict=True):
        assert mine.dtype == dtype
        assert error(mine, exact) <= times * error(theirs, exact) + 1e-7
    assert y.movedim(1, -1).is_contiguous()


def test_the_layout_of_the_input_changes_nothing_but_time():
    case = Case()
    y = case.run()
    for format in (torch.channels_last, torch.contiguous_format):
        case.x = case.x.to(memory_format=format)
        torch.testing.assert_close(case.run(), y, rtol=0, atol=0)
    case.x = torch.cat((case.x, case.x), 3)[..., :6]
    torch.testing.assert_close(case.run(), y, rtol=0, atol=0)


def test_under_autocast_the_output_is_half_and_the_master_weight_and_its_gradient_are_not():
    case = Case(activation="gelu").requires_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run()
    assert y.dtype == torch.bfloat16
    grad = torch.randn_like(y)
    y.backward(grad)
    assert {t.grad.dtype for t in (case.x, case.weight, case.bias)} == {torch.float32}
    exact_y, exact = case.dense(torch.float64)
    exact_y.backward(grad.double())
    with torch.autocast("cpu", torch.bfloat16):
        dense_y, dense = case.dense(torch.float32)
    dense_y.backward(grad)
    assert error(y, exact_y) <= 1.1 * error(dense_y, exact_y)
    for mine, leaf, theirs in zip((case.x, case.weight, case.bias), exact, dense, strict=True):
        assert no_worse(error(mine.grad, leaf.grad), error(theirs.grad, leaf.grad), leaf.numel())


@kinds
def test_with_every_block_active_the_flops_are_those_of_the_frameworks_operators(kind):
    case = Case(density=1, **kind).requires_grad()
    with FlopCounterMode(display=False) as counter:
        case.run().sum().backward()
    with FlopCounterMode(display=False) as dense:
        case.dense(torch.float32)[0].sum().backward()
    ours, theirs = counter.get_flop_counts()["Global"], dense.get_flop_counts()["Global"]
    assert ours[ops.conv] == theirs[torch.ops.aten.convolution] > 0
    # Of a convolution in groups PyTorch counts the weight gradient as many times.
    wgrad = ours[ops.conv_wgrad] * case.window.groups
    assert ours[ops.conv_dgrad] + wgrad == theirs[torch.ops.aten.convolution_backward]


def test_flops_are_those_of_active_blocks_and_probes():
    case = Case(density=0.5, inputs=40, outputs=44).requires_grad()
    with FlopCounterMode(display=False) as counter:
        case.run().sum().backward()
    counted = counter.get_flop_counts()["Global"]
    listened = case.mask.clone()
    listened.view(-1)[case.probes[case.probes >= 0].long()] = True
    positions = 3 * 7 * 6
    assert counted[ops.conv] == counted[ops.conv_dgrad] == 2 * positions * int(case.active.sum())
    entries = expand(listened, BLOCK, case.weight.shape)
    assert counted[ops.conv_wgrad] == 2 * positions * int(entries.sum())


def test_only_what_is_asked_for_is_computed():
    case = Case()
    case.x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        case.run().sum().backward()
    assert set(counter.get_flop_counts()["Global"]) == {ops.conv, ops.conv_dgrad}
    frozen = Case(bias=False)
    frozen.weight.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        frozen.run().sum().backward()
    assert set(counter.get_flop_counts()["Global"]) == {ops.conv, ops.conv_wgrad}


def test_changing_a_mask_between_forward_and_backward_is_an_error():
    layer = nn.Conv2d(24, 24, 3, padding=1)
    (gate,) = cc.gates(layer, 8).values()
    x = torch.randn(2, 24, 5, 5, requires_grad=True)
    gated = (gate.signals, list(gate.lists), gate.probes, *gate.block, "none", *plain(2).arguments)
    y = ops.conv(x, layer.weight, layer.bias, *gated)[0]
    gate.update_(random_mask(gate.grid))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_does_not_fit_is_refused_before_a_kernel_sees_it():
    case = Case()
    x, weight, bias, *rest = case.arguments
    *gated, _, _, _, _ = rest
    one = plain(2)

    def wrong(match: str, *arguments) -> None:
        with pytest.raises((ValueError, RuntimeError), match=match):
            ops.conv(*arguments)

    wrong("does not fit a weight", x[:, 1:], weight, bias, *rest)
    wrong("does not fit a weight", x[0], weight, bias, *rest)
    wrong("does not fit a weight", x.flatten(2), weight, bias, *rest)
    wrong("does not fit a weight", x, weight, bias, *gated, *plain(2, groups=2).arguments)
    wrong("stride and dilation are 2 ints", x, weight, bias, *gated, *plain(1).arguments)
    wrong("above 0", x, weight, bias, *gated, *one._replace(stride=(0, 1)).arguments)
    wrong("pairs of ints from 0", x, weight, bias, *gated, *one._replace(padding=((-1, 0), (0, 0))).arguments)
    wrong("larger than the image", x, weight, bias, *gated, *one._replace(dilation=(9, 9)).arguments)
    wrong("swish", *case.arguments[:8], "swish", *one.arguments)
    wrong("bias", x, weight, bias[1:], *rest)
    wrong("crow_indices", x, weight, bias, case.signals, list(build(~case.mask.t())), *rest[2:])
    grouped = Case(window=plain(2, groups=2), outputs=24)
    wrong("blocks of 8 do not divide", *grouped.arguments)
    moves, lists = case.window.arguments, list(case.lists)
    grad = torch.randn_like(case.run())
    with pytest.raises((ValueError, RuntimeError), match="the gradient of what comes out has shape"):
        ops.conv_dgrad(grad, weight, lists, *BLOCK, [8, 6], *moves)
    with pytest.raises((ValueError, RuntimeError), match="the gradient of what comes out has shape"):
        ops.conv_wgrad(grad[:, :, 1:], x, weight, lists, case.probes, *BLOCK, *moves)
