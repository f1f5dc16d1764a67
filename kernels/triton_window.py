"""Triton for a convolution's window: where in the input each tap of an output row lies, and where in the weight.

A row is one pixel of the output, counted through images and pixels; tensors are matrices of pixels by channels, the
weight a matrix `[O, taps * I/groups]`, taps outside. So a kernel of a linear becomes one of a convolution by having its
rows begin elsewhere and by walking its lists once per tap. The text that takes comes from here:

- Before the loop, the coordinates at which the window of each row begins, `<axis>_from`; that takes divisions, once.
- In the loop, how far from there the tap lies, `<axis>_move` and, in pixels, `move`: the same for all rows. Then a load
  takes one addition more for its address, and one comparison per axis for its mask: as unsigned numbers, coordinates
  before the input lie beyond it.

The input gradient walks the output's gradient backwards. Under a stride only some taps reach a pixel of the input, the
same ones for all pixels that leave the same remainders: such a *phase* is a product of its own over those taps. No
zeros are inserted, and nothing is multiplied by them.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .window import Window

STILL = Window()  # a linear's


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a convolution."""

    name: str
    taps: int
    stride: int
    before: int  # zeros before the input
    after: int
    dilation: int

    @property
    def reach(self) -> int:
        """Pixels with another remainder by this than the window's are met by no tap."""
        return math.gcd(self.stride, self.dilation)

    @property
    def apart(self) -> int:
        """Taps that meet the same pixels lie so far apart in the weight."""
        return self.stride // self.reach


@dataclass(frozen=True)
class Walk:
    """The taps of a convolution as a kernel walks them: forward over the input, or back over the output's gradient."""

    taps: tuple[int, ...]
    window: Window
    forward: bool = True

    @functools.cached_property
    def axes(self) -> list[Axis]:
        """The dimensions, outermost first."""
        names = ("depth", "height", "width")[3 - len(self.taps) :]
        stride, padding, dilation, _ = self.window
        each = zip(names, self.taps, stride, padding, dilation, strict=True)
        return [Axis(name, taps, step, *zeros, spread) for name, taps, step, zeros, spread in each]

    @property
    def phases(self) -> int:
        """Into how many products the walk falls: back from a strided convolution, one for each of the remainders."""
        return 1 if self.forward else math.prod(self.window.stride)

    @property
    def phased(self) -> list[Axis]:
        """The axes along which there are phases."""
        return [] if self.forward else [axis for axis in self.axes if axis.stride > 1]

    @property
    def name(self) -> str:
        """Begins the name of a kernel, like conv3x3_s2x2."""
        parts = ["conv" + "x".join(map(str, self.taps))]
        for letter, values in (("s", self.window.stride), ("d", self.window.dilation)):
            parts += [letter + "x".join(map(str, values))] * (set(values) != {1})
        return "_".join([*parts, *[f"g{self.window.groups}"] * (self.window.groups > 1)])

    @property
    def description(self) -> str:
        """A line of a kernel's text."""
        zeros = " and ".join(f"{axis.before}+{axis.after}" for axis in self.axes)
        sides = ("x".join(map(str, values)) for values in (self.taps, self.window.stride, self.window.dilation))
        return "Taps {}, stride {}, dilation {}, ".format(*sides) + f"zeros around {zeros}.\n"

    @property
    def parameters(self) -> list[str]:
        """What tells a kernel of the images: how many, the spatial sizes of x and of y, and the groups if there are."""
        spatial = [f"{tensor}_{axis.name}" for tensor in "xy" for axis in self.axes]
        return ["images", *spatial, *["groups"] * (self.window.groups > 1)]

    @property
    def count(self) -> str:
        """How many taps are walked, as an expression."""
        return "taps" if self.phased else "TAPS"

    def begin(self) -> list[str]:
        """Sets `m`, the number of rows; where there are phases also `taps`, and what the phase says of each axis."""
        lines = ["phase = tl.program_id(1)"] * bool(self.phased)
        for axis in reversed(self.phased):
            name, offset = axis.name, _plus(f"{axis.name}_phase", axis.before)
            inverse = pow(axis.dilation // axis.reach, -1, axis.apart)
            first = f"({offset})" + (f" // {axis.reach}" if axis.reach > 1 else "")
            first += f" * {inverse}" if inverse != 1 else ""
            lines += [
                f"{name}_phase = phase % {axis.stride}",
                f"phase = phase // {axis.stride}",
                f"{name}_rows = (y_{name} - {name}_phase + {axis.stride - 1}) // {axis.stride}",
                f"{name}_first = {first} % {axis.apart}",
                f"{name}_taps = ({axis.taps + axis.apart - 1} - {name}_first) // {axis.apart}",
            ]
            if axis.reach > 1:
                lines += [f"{name}_taps = tl.where(({offset}) % {axis.reach} == 0, {name}_taps, 0)"]
        if self.phased:
            lines += [f"taps = {' * '.join(self._taps(axis) for axis in self.axes)}"]
        return [*lines, f"m = {' * '.join(['images', *map(self._rows, self.axes)])}"]

    def divisors(self) -> list[str]:
        """Makes numbers of taps fit to divide by, once the length of the walk is known."""
        if not self.phased:
            return []
        counts = ["taps", *(f"{axis.name}_taps" for axis in self.phased)]
        # A phase that no tap reaches walks nothing, but the compiler may divide before it knows.
        return ["# None to walk, yet divided by.", *(f"{count} = tl.maximum({count}, 1)" for count in counts)]

    def starts(self) -> list[str]:
        """Sets `x_rows`, where in x the window of each row begins, and its coordinates; past the end the last one's."""
        lines = ["pixel = tl.minimum(row + rows, m - 1)"]
        for axis in reversed(self.axes):
            lines += [f"{axis.name}_from = {self._start(axis)}", f"pixel = pixel // {self._rows(axis)}"]
        return [*lines, f"x_rows = ({self.x_pixel('pixel')}) * x_stride"]

    def enter(self, row: str, rows: str) -> list[str]:
        """Sets where in y the first of the rows lies, how far it moves with every so many `rows`, and reciprocals."""
        lines = [f"image = {row}", f"image_step = {rows}"]
        for axis in reversed(self.axes):
            name, size = axis.name, f"y_{axis.name}"
            lines += [f"{name}_0 = image % {size}", f"image = image // {size}"]
            lines += [f"{name}_step = image_step % {size}", f"image_step = image_step // {size}"]
            lines += [f"{name}_part = ({2**32 - 1} // tl.cast({size}, tl.int64)).to(tl.uint32)"]
        return lines

    def rows(self) -> list[str]:
        """Sets `x_rows` and the coordinates of the windows, from where the first row is in y.

        Coordinates of all rows, carried from one iteration to the next, would take registers that there are not.
        """
        lines, at = [], "rows"
        for axis in reversed(self.axes):
            name, size = axis.name, f"y_{axis.name}"
            lines += [
                f"at = {name}_0 + {at}",
                f"over = tl.umulhi(at.to(tl.uint32), {name}_part).to(tl.int32)",
                f"at -= over * {size}",
                f"more = (at >= {size}).to(tl.int32)",  # the product with a reciprocal is at most 1 too small
                f"at -= more * {size}",
                f"{name}_from = {_plus(_times('at', axis.stride), -axis.before)}",
            ]
            at = "over + more"
        return [*lines, f"pixel = image + {at}", f"x_rows = ({self.x_pixel('pixel')}) * x_stride"]

    def advance(self) -> list[str]:
        """Moves the first row on."""
        lines, carried = [], ""
        for axis in reversed(self.axes):
            at, size = f"{axis.name}_0", f"y_{axis.name}"
            lines += [f"{at} += {axis.name}_step{carried}", f"over_0 = ({at} >= {size}).to(tl.int32)"]
            lines += [f"{at} -= over_0 * {size}"]
            carried = " + over_0"
        return [*lines, f"image += image_step{carried}"]

    def tap(self, index: str) -> list[str]:
        """For the taps at places `index` of the walk sets their `move` and, in the weight, `tap`."""
        lines = [f"tap = {index} % {self.count}"]
        for position, axis in enumerate(self.axes):
            inner = [self._taps(axis) for axis in self.axes[position + 1 :]]
            at = "".join(f" // {taps}" for taps in inner if taps != "1")
            at += f" % {self._taps(axis)}" if position else ""
            spread = axis.dilation if self.forward else -axis.dilation // axis.reach
            lines += [f"{axis.name}_tap = tap{at}", f"{axis.name}_move = {_times(f'{axis.name}_tap', spread)}"]
        if self.phased:
            places = [
                f"{axis.name}_first + {_times(f'{axis.name}_tap', axis.apart)}"
                if axis in self.phased
                else f"{axis.name}_tap"
                for axis in self.axes
            ]
            lines += [f"tap = {_nested(places, [str(axis.taps) for axis in self.axes])}"]
        moves = [f"{axis.name}_move" for axis in self.axes]
        return [*lines, f"move = {_nested(moves, [f'x_{axis.name}' for axis in self.axes])}"]

    def seen(self, vectors: bool) -> list[str]:
        """Says along each axis whether a tap lies inside x: of each row, and with `vectors` each of several taps."""
        rows, taps = ("[:, None]", "[None, :]") if vectors else ("", "")
        return [
            f"{axis.name}_seen = ({axis.name}_from{rows} + {axis.name}_move{taps}).to(tl.uint32) < x_{axis.name}"
            for axis in self._bounded
        ]

    @property
    def mask(self) -> str:
        """Whether all axes say so, as an expression; empty where no tap can lie outside."""
        return " & ".join(f"{axis.name}_seen" for axis in self._bounded)

    @property
    def _bounded(self) -> list[Axis]:
        return [axis for axis in self.axes if axis.before or axis.after or not self.forward]

    def places(self) -> list[str]:
        """Sets `place`, the pixel of y that each row is, where rows of a phase are not neighbours."""
        lines = ["pixel = row + rows"]
        for axis in reversed(self.axes):
            lines += [f"{axis.name}_to = pixel % {self._rows(axis)}", f"pixel = pixel // {self._rows(axis)}"]
        lines.append("place = pixel")
        for axis in self.axes:
            far = f" * {axis.stride} + {axis.name}_phase" if axis in self.phased else ""
            lines.append(f"place = place * y_{axis.name} + {axis.name}_to{far}")
        return lines

    def x_pixel(self, image: str) -> str:
        """The pixel of x at `<axis>_from` in an image, as an expression."""
        places = [image, *(f"{axis.name}_from" for axis in self.axes)]
        return _nested(places, ["", *(f"x_{axis.name}" for axis in self.axes)])

    def _rows(self, axis: Axis) -> str:
        return f"{axis.name}_rows" if axis in self.phased else f"y_{axis.name}"

    def _taps(self, axis: Axis) -> str:
        return f"{axis.name}_taps" if axis in self.phased else str(axis.taps)

    def _start(self, axis: Axis) -> str:
        at = f"pixel % {self._rows(axis)}"
        if self.forward:
            return _plus(_times(at, axis.stride), -axis.before)
        if axis not in self.phased:
            return _plus(at, axis.before)
        met = f"{_plus(f'{axis.name}_phase', axis.before)} - {_times(f'{axis.name}_first', axis.dilation)}"
        return f"{at} + ({met}) // {axis.stride}"  # without a remainder


def _plus(term: str, number: int) -> str:
    return f"{term} {'+' if number > 0 else '-'} {abs(number)}" if number else term


def _times(term: str, factor: int) -> str:
    return {1: term, -1: f"-{term}"}.get(factor, f"{term} * {factor}")


def _nested(places: Sequence[str], sizes: Sequence[str]) -> str:
    """The place in a flattened array of these sizes, by Horner's rule."""
    text = places[0]
    for place, size in zip(places[1:], sizes[1:], strict=True):
        text = f"({text}) * {size} + {place}" if "+" in text else f"{text} * {size} + {place}"
    return text
