"""The gate of a weight: which of its blocks exist, as a mask to decide on and as index lists that kernels walk.

The Parameter is the truth. A block that is switched off becomes zero in the weight, in its gradient and in the
optimizer's state, at once, so the plain state_dict in the plain model computes what the gated model computes. A gate is
found by the live Parameter, never stored in a graph: two models that share compiled code keep their own masks.
"""

import html
import math
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ctrlcompile import pictures
from ctrlcompile.blocks import (
    Block,
    block_norms,
    block_sides,
    check_block,
    resolve_block,
    zero_blocks_,
)
from ctrlcompile.controller.host import on_cpu
from ctrlcompile.kernels import index_lists

PROBED_SHARE = 16  # one block in so many can be probed in a step


class Gate:
    """The block mask of one Parameter, with its index lists on the Parameter's device.

    Made by `ctrlcompile.gates`, by a `Controller` or by the backend; a Parameter has at most one. Masks are decided and
    kept on the CPU; switching blocks there queues work on the Parameter's device and does not wait for it.

    Attributes:
        name: the Parameter's name, as in `named_parameters()`.
        shape: of the weight, `(out, in)`; of a convolution's in channels, `(out, in / groups)`.
        transposed: whether the weight is stored `(in, out)`, as in `x @ weight`: its block columns are the outputs.
        block: sides of a block along these dimensions; a block of a convolution's weight spans the whole window.
        grid: `(R, C)`, number of block rows and block columns; the last ones may be partial.
        lists: index lists of the active blocks, int32, rewritten in place by `update_`.
        probes: int32 `[P]`, flat ids `r * C + c` of the inactive blocks whose gradient is measured, padded with -1.
        signals: float32 `[2, R, C]` leaf; backward accumulates into its `.grad` the sum over each block of
            weight * gradient and of gradient ** 2.
        block_area: float32 `[R, C]` on the CPU, weight entries in each block (partial blocks have fewer).
        updates: how often the mask was written.
        normalised: whether, in a graph that has run, each output channel is normalised by itself, as batch norm does.
        read_otherwise: whether, in a graph that has run, something reads the weight beside its gated layers.
        run: the training run of the one-line form that drives it, of which `follow` knows; None for none.
    """

    @on_cpu
    def __init__(self, weight: Tensor, block: Block, name: str, transposed: bool = False) -> None:
        check_block(block, weight.shape, name)
        self.name = name
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self.transposed = transposed
        self.block = block
        self.grid = index_lists.grid_shape(self.shape, block)
        device, (rows, columns) = weight.device, self.grid
        self._mask = torch.ones(rows, columns, dtype=torch.bool)
        self.lists = index_lists.build(self._mask.to(device))
        self.probes = torch.full((max(1, rows * columns // PROBED_SHARE),), -1, dtype=torch.int32, device=device)
        self.signals = torch.zeros(2, rows, columns, device=device)
        heights, widths = block_sides(self.shape[0], block[0], rows), block_sides(self.shape[1], block[1], columns)
        self.block_area = heights[:, None] * widths[None, :] * math.prod(weight.shape[2:])
        self.active, self.updates = rows * columns, 0
        self.active_area, self.probed_area = float(weight.numel()), 0.0
        self.normalised = self.read_otherwise = False
        self.run: Any = None
        self._entries = weight.numel()
        self._weight = weakref.ref(weight)
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._known = _values(weight)  # when masked blocks were last known to be zero
        # The kernels' last gradient, until autograd has it, and its version; None where it will be cast on its way.
        self._computed: tuple[Tensor | None, int] | None = None
        self._gradients: set[bool] = set()  # that came since the last step: whether they were the kernels', all of them
        self._sample: Tensor | None = None  # a masked block of the weight, chosen anew when it or the mask changes
        self._reports = False
        self._report()

    @property
    def mask(self) -> Tensor:
        """Boolean `[R, C]` on the CPU, True = active; a copy."""
        return self._mask.clone()

    @property
    def density(self) -> float:
        """Active blocks / all blocks."""
        return self.active / self._mask.numel()

    @property
    def weight(self) -> Tensor:
        """The live Parameter. Raises RuntimeError when it is gone."""
        weight = self._weight()
        if weight is None:
            raise RuntimeError(f"the Parameter of gate {self.name!r} no longer exists")
        return weight

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What a gated op takes, in the order of its schema: signals, the index lists, probes."""
        return (self.signals, *self.lists, self.probes)

    @torch.no_grad()
    @on_cpu
    def update_(self, mask: Tensor) -> None:
        """Switches blocks: `mask` is boolean `[R, C]`, True = active. In place, between optimizer steps.

        Blocks that go are zeroed in the weight, its gradient and its optimizer state; blocks that come start at zero.
        Call it after `optimizer.step()` and before the next forward pass, never between a forward and its backward.

        Raises TypeError when the mask is not a boolean tensor, ValueError when its shape is not the grid's or the
        weight has moved to another device, RuntimeError when the Parameter is gone. Nothing is changed then.
        """
        self._check_mask(mask)
        self.settle()
        mask = mask.cpu()
        masked = ~mask
        gone = masked if self.signals.is_cuda else masked & self._mask  # there, see `_is_written_to`
        self._mask.copy_(mask)
        self._sample = None
        index_lists.write_(self.lists, mask)
        self.active, self.updates = int(mask.sum()), self.updates + 1
        self.active_area = float(self.block_area[mask].sum()) if self.active else 0.0
        self.probe_(torch.empty(0, dtype=torch.int64))
        if bool(gone.any()):
            self._zero_blocks(gone)
            self._known = _values(self.weight)

    @torch.no_grad()
    @on_cpu
    def probe_(self, block_ids: Tensor) -> None:
        """Has the gradient of these inactive blocks measured from the next backward on.

        block_ids: integer `[n]`, flat ids `r * C + c`. Raises ValueError when there are more than `probes` holds, when
        an id is out of range, or names an active block.
        """
        count = block_ids.numel()
        if count > self.probes.numel():
            raise ValueError(f"gate {self.name!r} probes at most {self.probes.numel()} blocks a step, got {count}")
        probed_area = 0.0
        if count:
            ids = block_ids.to("cpu", torch.int64)
            if int(ids.min()) < 0 or int(ids.max()) >= self._mask.numel():
                raise ValueError(f"gate {self.name!r} has blocks 0 to {self._mask.numel() - 1}; got an id outside")
            if bool(self._mask.view(-1)[ids].any()):
                raise ValueError(f"gate {self.name!r}: only inactive blocks are probed; got an active one")
            probed_area = float(self.block_area.view(-1)[ids].sum())
            self.probes[:count].copy_(ids.int(), non_blocking=True)
        self.probes[count:].fill_(-1)
        self.probed_area = probed_area

    @torch.no_grad()
    def enforce_(self) -> None:
        """Zeroes the masked blocks in the weight, its gradient and its optimizer state, whatever wrote to them."""
        if self.active < self._mask.numel():
            self._zero_blocks(~self._mask)
        self._known, self._sample = _values(self.weight), None

    def settle(self) -> None:
        """Enforces the mask if anybody but the optimizer wrote to the weight (`load_state_dict`, say).

        Writes that autograd does not know of (`weight.data.copy_`) are found in evaluation, and by `stepped_by`.

        Raises ValueError when the weight has moved to another device since the gate was made, RuntimeError when the
        Parameter is gone.
        """
        if (here := self.signals.device) != (there := self.weight.device):
            raise ValueError(
                f"gate {self.name!r} was made while its weight was on {here}; now it is on {there}. Move the model "
                "before its gates, its Controller or its first compiled call"
            )
        if self._known != _values(self.weight) or (not torch.is_grad_enabled() and self._is_written_to()):
            self.enforce_()
        self._computed = None
        self._report()

    def computed(self, gradient: Tensor) -> None:
        """Notes what the kernels computed as the weight's gradient, which is zero in masked blocks."""
        self._computed = gradient if gradient.dtype == self.weight.dtype else None, gradient._version

    def owned_by(self, optimizer: torch.optim.Optimizer) -> None:
        """Remembers the optimizer that holds the weight's state, which goes with a block."""
        self._optimizer = weakref.ref(optimizer)

    def stepped_by(self, optimizer: torch.optim.Optimizer, *, keeps_zero: bool) -> bool:
        """Takes note of an optimizer's step: it owns the weight's state, and masked blocks are zero after it.

        keeps_zero: a step of this optimizer leaves an entry zero whose weight, gradient and state are zero. Even so,
        blocks are zeroed where a gradient was not the kernels' alone: a penalty on the weights that is not part of the
        compiled graph, say, or another reader of the weight that is. And where a masked block is found written to:
        through `weight.data`, or into the gradient before the step.

        Returns whether a gradient had come since the last step.
        """
        self.owned_by(optimizer)
        moved = self._known[1] != self.weight.data_ptr()
        if not keeps_zero or self.read_otherwise or self._gradients != {True} or moved or self._is_written_to():
            self.enforce_()
        self._known = _values(self.weight)
        anew = bool(self._gradients)
        self._gradients.clear()
        self._computed = None
        return anew

    @property
    def trained(self) -> bool:
        """Whether an optimizer is known to step the weight."""
        return self._optimizer is not None

    @property
    def active_share(self) -> float:
        """Active entries / all entries: the density by area, which is what the FLOPs follow."""
        return self.active_area / self._entries

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The norm of each block of the weight: float32 `[R, C]`, on the weight's device."""
        return block_norms(self.weight, self.block)

    @property
    def probed_share(self) -> float:
        """Probed entries / all entries."""
        return self.probed_area / self._entries

    def check_is_in(self, block: Block | Literal["auto"]) -> None:
        """Raises ValueError when other blocks are asked for than the gate was made with."""
        if block not in ("auto", self.block):
            raise ValueError(
                f"{self.name} is gated in blocks of {self.block} already, asked for {block}: they are chosen once, by "
                "gates(), a Controller or the first compiled call. Ask there, or for the same block here"
            )

    @on_cpu
    def picture(self, width: int = 64, height: int = 24) -> str:
        """The mask as text: one character per block or, on a larger grid, per patch of blocks; `█` full, ` ` empty.

        >>> print(ctrlcompile.gates(model)["fc1.weight"].picture())  # doctest: +SKIP
        """
        return pictures.text(self._mask, width, height)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>{pictures.svg(self._mask)}"

    def __repr__(self) -> str:
        rows, columns = self.grid
        return (
            f"Gate({self.name!r}, shape={self.shape}, block={self.block}, "
            f"{self.active} of {rows} x {columns} blocks active, density={self.density:.3f})"
        )

    def _report(self) -> None:
        """Has backward report signals and gradients from when the weight is trained."""
        if self._reports or not self.weight.requires_grad:
            return
        self._reports = True
        self.signals.requires_grad_(True)
        self.weight.register_hook(self._note_gradient)

    @unserializable_hook  # a copy of the model in another process has gates of its own, if any
    def _note_gradient(self, gradient: Tensor | None) -> None:
        if gradient is None:  # the weight was used, but not for what was differentiated
            return
        # Autograd adds what comes from elsewhere to a copy, or in place, which raises the version. What a GPU's
        # autocast has cast back to the weight's type cannot be told.
        noted, self._computed = self._computed, None
        if noted is None:
            self._gradients.add(False)
        else:
            ours, version = noted
            same = ours is None or (ours.data_ptr(), version) == (gradient.data_ptr(), gradient._version)
            self._gradients.add(same)

    def _is_written_to(self) -> bool:
        """Whether a masked block, one of them, is not zero.

        False on a GPU, which one would have to wait for; there `update_` zeroes all masked blocks.
        """
        if self.active == self._mask.numel() or self.signals.is_cuda:
            return False
        if self._sample is None:
            masked = (~self._mask).nonzero()
            row, column = masked[self.updates * 7919 % len(masked)].tolist()
            down, across = self.block
            block = self.weight.detach()[row * down : (row + 1) * down, column * across : (column + 1) * across]
            self._sample = block
        return bool(self._sample.any())

    def _check_mask(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"gate {self.name!r}: a mask is a boolean tensor, True = active; got {given}")
        if tuple(mask.shape) != self.grid:
            raise ValueError(
                f"gate {self.name!r}: the mask has one entry per block, shape {self.grid} for a weight of {self.shape} "
                f"in blocks of {self.block}; got {tuple(mask.shape)}"
            )

    def _zero_blocks(self, gone: Tensor) -> None:
        weight = self.weight
        for tensor in (weight, weight.grad, *self._optimizer_state()):
            if tensor is not None:
                zero_blocks_(tensor, gone, self.block)

    def _optimizer_state(self) -> Iterator[Tensor]:
        optimizer = self._optimizer() if self._optimizer is not None else None
        if optimizer is None:
            return
        for key, value in optimizer.state.get(self.weight, {}).items():
            # Rprop's step sizes are no moments: at zero they would never grow again.
            if isinstance(value, Tensor) and value.shape == self.weight.shape and key != "step_size":
                yield value


def _values(weight: Tensor) -> tuple[int, int]:
    """What changes when somebody writes to a weight as autograd sees it, or gives it other values (`weight.data =`)."""
    return weight._version, weight.data_ptr()


class Registry:
    """The live Parameters' gates, and the Parameters that must not be gated."""

    def __init__(self) -> None:
        self._gates: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._refusals: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._by_lists: weakref.WeakValueDictionary[int, Gate] = weakref.WeakValueDictionary()

    def get(self, weight: Tensor) -> Gate | None:
        """The gate of a Parameter, or None."""
        return self._gates.get(weight)

    def with_lists(self, crow_indices: Tensor) -> Gate | None:
        """The gate whose lists begin with this tensor, or an alias of it."""
        return self._by_lists.get(crow_indices.data_ptr())

    def get_or_create(
        self, weight: Tensor, block: Block | Literal["auto"], name: str, transposed: bool = False
    ) -> Gate:
        """The gate of a Parameter; a new one, `transposed` or not, where there is none.

        Raises ValueError for a block that does not fit.
        """
        gate = self._gates.get(weight)
        if gate is None:
            gate = Gate(weight, resolve_block(block, weight), name, transposed)
            self._gates[weight] = gate
            self._by_lists[gate.lists.crow_indices.data_ptr()] = gate
        return gate

    def refuse(self, weight: Tensor, reason: str) -> None:
        """Keeps a Parameter dense from now on, for a reason that users read."""
        self._refusals[weight] = reason

    def refusal(self, weight: Tensor) -> str | None:
        """Why a Parameter must stay dense, or None."""
        return self._refusals.get(weight)


registry = Registry()
