"""How a convolution's window moves over its input, and how its input lies in memory: channels-last."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """Stride, padding and dilation for each spatial dimension (1 to 3 of them), and the number of groups.

    `padding` holds the zeros before and after the input in each dimension. A linear is the window of one tap that
    moves over nothing, `Window()`.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> "Window":
        """A window from what an operator's schema holds: padding flat, before and after each dimension in turn."""
        return cls(tuple(stride), tuple(zip(padding[::2], padding[1::2], strict=True)), tuple(dilation), groups)

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int], int]:
        """What `of` takes."""
        return list(self.stride), [side for sides in self.padding for side in sides], list(self.dilation), self.groups

    def is_linear(self, taps: Sequence[int]) -> bool:
        """Whether a convolution with a kernel of `taps` is a linear layer on each position of its input."""
        moves = zip(taps, self.stride, self.padding, strict=True)
        return self.groups == 1 and all(move == (1, 1, (0, 0)) for move in moves)

    def output_size(self, input_size: tuple[int, ...], taps: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the output for an input of this spatial size and a kernel of `taps`.

        >>> Window((2, 2), ((1, 1), (1, 1)), (1, 1)).output_size((32, 32), (3, 3))
        (16, 16)
        """
        return tuple(
            (size + before + after - dilation * (count - 1) - 1) // stride + 1
            for size, count, stride, (before, after), dilation in zip(
                input_size, taps, self.stride, self.padding, self.dilation, strict=True
            )
        )

    def misses(self, input_size: tuple[int, ...], taps: tuple[int, ...]) -> bool:
        """Whether somewhere all taps of a kernel lie in the padding, so that nothing of the input is seen there.

        >>> Window((1, 1), ((1, 1), (1, 1)), (1, 1)).misses((8, 8), (3, 3))
        False
        >>> Window((1, 1), ((1, 1), (1, 1)), (1, 1)).misses((8, 8), (1, 1))
        True
        """
        axes = zip(
            self.output_size(input_size, taps), input_size, taps, self.stride, self.padding, self.dilation, strict=True
        )
        for places, size, count, stride, (before, _), dilation in axes:
            early, late = -(-before // stride), -(-(before + size) // stride)  # those between begin on the input
            for place in (*range(min(places, early)), *range(late, places)):
                first = place * stride - before
                if all(not 0 <= first + tap * dilation < size for tap in range(count)):
                    return True
        return False


def channels_last(x: Tensor, dim: int | None = None) -> Tensor:
    """`x` `[N, C, *size]` laid out with its channels side by side; itself where it is. 1 to 3 sizes.

    `dim` says how many dimensions x has where x itself cannot, in a graph.
    """
    dim = x.dim() if dim is None else dim
    if dim == 3:  # for which there is no memory format
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous(memory_format=torch.channels_last if dim == 4 else torch.channels_last_3d)
