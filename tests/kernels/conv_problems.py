"""Random problems for the kernels of convolutions; what error they may make is said in `problems`."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ctrlcompile.kernels import dense_conv, index_lists, reference
from ctrlcompile.kernels.window import Window, channels_last

from .problems import check_sums, within_budget


@dataclass
class ConvProblem:
    """One call of each role: images `[N, I, *size]`, a weight in blocks, a mask, a few probed blocks."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad_z: Tensor
    mask: Tensor
    probes: Tensor
    block: tuple[int, int]
    window: Window
    kernels: Any = dense_conv  # what has forward, dgrad and wgrad

    @staticmethod
    def random(
        images: tuple[int, ...], outputs: int, taps: tuple[int, ...], window: Window, block: tuple[int, int],
        density: float, dtypes: tuple[torch.dtype, torch.dtype],
    ) -> "ConvProblem":  # fmt: skip
        """`images` is the shape of x."""
        count, inputs, *size = images
        shape = (outputs, inputs // window.groups, *taps)
        mask = torch.rand(index_lists.grid_shape(shape[:2], block)) < density
        inactive = (~mask).flatten().nonzero().flatten()
        probed = inactive[torch.randperm(inactive.numel())[:3]].int()
        summed = index_lists.matrix_shape(shape)[1]
        return ConvProblem(
            x=channels_last(torch.randn(images)).to(dtypes[0]),
            weight=(torch.randn(shape) / summed**0.5).to(dtypes[1]),
            bias=torch.randn(outputs).to(dtypes[1]),
            grad_z=channels_last(torch.randn(count, outputs, *window.output_size(tuple(size), taps))).to(dtypes[0]),
            mask=mask,
            probes=torch.cat([probed, torch.tensor([-1], dtype=torch.int32)]),
            block=block,
            window=window,
        )

    def on(self, kernels: Any, device: str = "cpu") -> "ConvProblem":
        """The same problem for other kernels, on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in moved.items()}
        return replace(self, **{**moved, "kernels": kernels})

    def check(self, activation: str = "none") -> None:
        """All three roles."""
        self.check_forward(activation)
        self.check_dgrad()
        self.check_wgrad()

    def check_forward(self, activation: str) -> None:
        lists = index_lists.build(self.mask)
        y, z = self.kernels.forward(self.x, self.weight, self.bias, lists, self.block, activation, self.window)
        bias = None if self.bias is None else self.bias.double()
        tensors = (self.x.double(), self.weight.double(), bias)
        exact = reference.conv(*tensors, self.mask, self.block, activation, self.window)
        dense_z = dense_conv.product(self.x, self._masked_weight(), self.bias, self.window)
        assert y.dtype == self.x.dtype
        assert_channels_last(y)
        within_budget(y, reference.activate(dense_z, activation), exact[0])
        if activation.startswith("gelu"):
            assert_channels_last(z)
            within_budget(z, dense_z, exact[1])
        else:
            assert z.numel() == 0

    def check_dgrad(self) -> None:
        lists, size = index_lists.build(self.mask), tuple(self.x.shape[2:])
        dense = dense_conv.input_gradient(self.grad_z, self._masked_weight(), self.window, size)
        grad_x = self.kernels.dgrad(self.grad_z, self.weight, lists, self.block, self.window, size)
        tensors = (self.grad_z.double(), self.weight.double())
        exact = reference.conv_dgrad(*tensors, self.mask, self.block, self.window, size)
        assert grad_x.dtype == self.x.dtype
        assert_channels_last(grad_x)
        within_budget(grad_x, dense, exact)
        z = channels_last(3 * torch.randn_like(self.x))
        before = reference.Before(z, "gelu", z.new_full(z.shape[1:2], torch.nan, dtype=torch.float32))
        grad_before = self.kernels.dgrad(self.grad_z, self.weight, lists, self.block, self.window, size, before)
        assert grad_before.dtype == self.x.dtype
        assert_channels_last(grad_before)
        expected = reference.differentiate(exact, z.double(), "gelu")
        chained = reference.differentiate(dense, z, "gelu")
        within_budget(grad_before, chained, expected)
        check_sums(before.sums, chained, expected, exact)

    def check_wgrad(self) -> None:
        lists, given = index_lists.build(self.mask), (self.grad_z, self.x, self.weight)
        grad_weight, signals = self.kernels.wgrad(*given, lists, self.probes, self.block, self.window)
        rest = (self.mask, self.probes, self.block, self.window)
        exact, exact_signals = reference.conv_wgrad(*(tensor.double() for tensor in given), *rest)
        summed, summed_signals = reference.conv_wgrad(*(tensor.double().abs() for tensor in given), *rest)
        entries = index_lists.expand(self.mask, self.block, self.weight.shape)
        dense = torch.where(entries, dense_conv.weight_gradient(*given, self.window), 0)
        assert grad_weight.dtype == self.weight.dtype
        assert grad_weight.is_contiguous()
        assert not grad_weight[~entries].any()
        within_budget(grad_weight, dense, exact, magnitude=summed)
        dense_signals = reference.conv_wgrad(*(tensor.float() for tensor in given), *rest)[1]
        within_budget(signals, dense_signals, exact_signals, units=16, magnitude=summed_signals)

    def _masked_weight(self) -> Tensor:
        entries = index_lists.expand(self.mask, self.block, self.weight.shape)
        return torch.where(entries, self.weight, 0).to(self.x.dtype)


def assert_channels_last(x: Tensor) -> None:
    assert x.movedim(1, -1).is_contiguous()
