"""Random problems for the kernels, and what error they may make."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrlcompile.kernels import cpu_linear, index_lists, reference

FLOAT = (torch.float32, torch.float32)
HALF = (torch.bfloat16, torch.bfloat16)
AUTOCAST = (torch.bfloat16, torch.float32)
FLOAT16 = (torch.float16, torch.float16)
FEW = 200  # entries of about the same size: of fewer the dense error may be small by luck


@dataclass
class Problem:
    """One call of each role: M x K inputs, an N x K weight in blocks, a mask, a few probed blocks."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad_z: Tensor
    mask: Tensor
    probes: Tensor
    block: tuple[int, int]
    kernels: Any = cpu_linear  # what has forward, dgrad and wgrad

    @staticmethod
    def random(
        m: int, k: int, n: int, block: tuple[int, int], density: float, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> "Problem":
        grid = index_lists.grid_shape((n, k), block)
        mask = torch.rand(grid) < density
        inactive = (~mask).flatten().nonzero().flatten()
        probed = inactive[torch.randperm(inactive.numel())[:3]].int()
        return Problem(
            x=torch.randn(m, k).to(dtypes[0]),
            weight=(torch.randn(n, k) / k**0.5).to(dtypes[1]),
            bias=torch.randn(n).to(dtypes[1]),
            grad_z=torch.randn(m, n).to(dtypes[0]),
            mask=mask,
            probes=torch.cat([probed, torch.tensor([-1], dtype=torch.int32)]),
            block=block,
        )

    def on(self, kernels: Any, device: str = "cpu") -> "Problem":
        """The same problem for other kernels, on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in moved.items()}
        return replace(self, **{**moved, "kernels": kernels})

    def check_forward(self, activation: str) -> None:
        lists = index_lists.build(self.mask)
        y, z = self.kernels.forward(self.x, self.weight, self.bias, lists, self.block, activation)
        bias = None if self.bias is None else self.bias.double()
        exact = reference.linear(self.x.double(), self.weight.double(), bias, self.mask, self.block, activation)
        dense_bias = None if self.bias is None else self.bias.to(self.x.dtype)
        dense_z = F.linear(self.x, self._masked_weight(), dense_bias)
        assert y.dtype == self.x.dtype
        _, summed = reference.linear(
            self.x.double().abs(),
            self.weight.double().abs(),
            None if bias is None else bias.abs(),
            self.mask,
            self.block,
        )
        magnitude = summed if effective_number(summed) < FEW else exact[1]  # gelu is a part of z
        within_budget(y, reference.activate(dense_z, activation), exact[0], magnitude=magnitude)
        if activation.startswith("gelu"):
            within_budget(z, dense_z, exact[1], magnitude=magnitude)
        else:
            assert z.numel() == 0

    def check_dgrad(self) -> None:
        lists, dense = index_lists.build(self.mask), self.grad_z @ self._masked_weight()
        exact = reference.linear_dgrad(self.grad_z.double(), self.weight.double(), self.mask, self.block)
        grad_x = self.kernels.dgrad(self.grad_z, self.weight, lists, self.block)
        assert grad_x.dtype == self.x.dtype
        summed = reference.linear_dgrad(self.grad_z.double().abs(), self.weight.double().abs(), self.mask, self.block)
        magnitude = summed if effective_number(summed) < FEW else exact
        within_budget(grad_x, dense, exact, magnitude=magnitude)
        z = 3 * torch.randn_like(self.x)
        for activation in reference.DIFFERENTIATED:
            before = reference.Before(z, activation, z.new_full(z.shape[1:], torch.nan, dtype=torch.float32))
            grad_before = self.kernels.dgrad(self.grad_z, self.weight, lists, self.block, before)
            assert grad_before.dtype == self.x.dtype
            expected = reference.differentiate(exact, z.double(), activation)
            chained = reference.differentiate(dense, z, activation)
            within_budget(grad_before, chained, expected, magnitude=magnitude)
            check_sums(before.sums, chained, expected, magnitude)

    def check_wgrad(self, *, rounded: bool = False) -> None:
        """`rounded`: the signals are those of the rounded gradient, as dense products have it."""
        lists = index_lists.build(self.mask)
        grad_weight, signals = self.kernels.wgrad(self.grad_z, self.x, self.weight, lists, self.probes, self.block)
        given = (self.grad_z, self.x, self.weight)
        rest = (self.mask, self.probes, self.block)
        exact, exact_signals = reference.linear_wgrad(*(tensor.double() for tensor in given), *rest)
        summed, summed_signals = reference.linear_wgrad(*(tensor.double().abs() for tensor in given), *rest)
        entries = index_lists.expand(self.mask, self.block, (self.weight.shape[0], self.weight.shape[1]))
        dense = self.grad_z.t() @ self.x
        assert grad_weight.dtype == self.weight.dtype
        assert not grad_weight[~entries].any()
        within_budget(grad_weight, torch.where(entries, dense, 0), exact, magnitude=summed)
        if rounded:
            dense_signals = reference.gate_gradient(dense.float(), self.weight.float(), *rest)[1]
        else:
            dense_signals = reference.linear_wgrad(*(tensor.float() for tensor in given), *rest)[1]
        within_budget(signals, dense_signals, exact_signals, units=16, magnitude=summed_signals)

    def _masked_weight(self) -> Tensor:
        shape = (self.weight.shape[0], self.weight.shape[1])
        entries = index_lists.expand(self.mask, self.block, shape)
        return torch.where(entries, self.weight, 0).to(self.x.dtype)


def check_sums(sums: Tensor, dense: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """`sums` against those of a gradient over its positions, with the dense gradient's and the exact one's."""
    of_dense, of_exact = (reference.channel_sums(gradient, 1) for gradient in (dense, exact))
    if dense.dtype == torch.float32:
        of_magnitude = reference.channel_sums(magnitude.abs(), 1)
    else:  # of so many roundings that have nothing to do with one another
        of_magnitude = reference.channel_sums(magnitude.square(), 1).sqrt()
    within_budget(sums, of_dense, of_exact, magnitude=of_magnitude, of=dense.dtype)


def effective_number(x: Tensor) -> float:
    """Of entries, by their share in the sum of squares: n of n equal ones, about n / 3 of normal ones."""
    squares = x.double().square()
    return (squares.sum().square() / squares.square().sum().clamp(min=1e-300)).item()


def within_budget(
    ours: Tensor,
    dense: Tensor,
    exact: Tensor,
    units: int = 4,
    magnitude: Tensor | None = None,
    of: torch.dtype | None = None,
) -> None:
    """Error against float64 at most 10 times (float32) or 1.1 times (half types) that of torch's dense operator.

    Errors of so many `units` in the last place of float32, at the size of the result or of a `magnitude`, are not told
    apart: the dense result of a small product may be exact by luck. What sums many products into few entries gives as
    magnitude the sums of their absolute values. In a half type, or summed `of` one, chance decides which of the two
    results is off by more at the entry that is most off: there half a unit in the last place of the largest entry is
    allowed. Of few entries it is one of the magnitude, for the root of the mean square as well: as much as roundings of
    the weight and of the result make.
    """
    assert ours.shape == exact.shape
    if not exact.numel():
        return
    factor = 10 if ours.dtype == torch.float32 else 1.1
    largest = exact.abs().max().item()
    size = largest if magnitude is None else magnitude.abs().max().item()
    equal = units * torch.finfo(torch.float32).eps * size
    unit = 0.0 if (of or ours.dtype) == torch.float32 else torch.finfo(of or ours.dtype).eps
    few = unit * size if effective_number(exact) < FEW else 0.0
    ours_error, dense_error = (ours.double() - exact).abs(), (dense.double() - exact).abs()
    ours_rms, dense_rms = (error.square().mean().sqrt().item() for error in (ours_error, dense_error))
    assert ours_rms <= factor * dense_rms + max(equal, few)
    assert ours_error.max().item() <= factor * dense_error.max().item() + max(equal, few, unit / 2 * largest)
