"""How a convolution's window moves over its input: what a kernel of a convolution is told beside its tensors."""

from typing import NamedTuple


class Window(NamedTuple):
    """Stride, padding and dilation for each spatial dimension (1 to 3 of them), and the number of groups.

    `padding` holds the zeros before and after the input in each dimension. A linear is the window of one tap that
    moves over nothing, `Window()`.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

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
