"""Predicts what a variant of a gated product takes, from what its calls have taken on this machine.

    seconds = constant + per_flop * FLOPs + per_byte * bytes

FLOPs and bytes are expressions in the rows of the call (batch x sequence, or positions of a convolution's output), the
sides of the weight, the share of it that is multiplied and the size of an entry. The coefficients are not negative and
have the least squared relative error over all products of a kind; a product that was measured itself is predicted from
its own latest times, moved along that line.
"""

import itertools
import operator
import statistics
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import sympy

ROWS, INPUTS, OUTPUTS, SHARE, ENTRY_BYTES = SIZES = sympy.symbols(
    "rows inputs outputs share entry_bytes", positive=True
)
FLOPS = 2 * ROWS * INPUTS * OUTPUTS * SHARE
BYTES = ENTRY_BYTES * (ROWS * (INPUTS + OUTPUTS) + INPUTS * OUTPUTS * SHARE)
_amounts = sympy.lambdify(SIZES, (FLOPS, BYTES), modules="math")

KEPT = 64  # observations of each kind, and relative errors
KEPT_OWN = 3  # of one product: its present speed
SINGULAR = 1e-9  # part of a term's square that others do not explain, below which they are not told apart
WIDE = 2  # a constant and a rate are told apart only where the largest call has so many times the smallest's FLOPs


class Size(NamedTuple):
    """Values of `SIZES`."""

    rows: int
    inputs: int
    outputs: int
    share: float
    entry_bytes: int


class Observation(NamedTuple):
    """What a call of a size took."""

    size: Size
    seconds: float


@dataclass
class CostModel:
    """Times of calls by kind (what may share coefficients) and by product (one role of one weight in one variant).

    errors: |predicted / measured - 1| of each prediction of a kind measured before, made before its measurement.
    """

    errors: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    _kinds: dict[Hashable, deque[Observation]] = field(default_factory=dict)
    _fits: dict[Hashable, tuple[float, float, float]] = field(default_factory=dict)

    def observe(self, kind: Hashable, own: deque[Observation], seen: Observation) -> None:
        """Takes a measurement in; `own` are those of the same product."""
        if (predicted := self.predict(kind, own, seen.size)) is not None:
            self.errors.append(abs(predicted / seen.seconds - 1))
        own.append(seen)
        self._kinds.setdefault(kind, deque(maxlen=KEPT)).append(seen)
        self._fits.pop(kind, None)

    def knows(self, kind: Hashable) -> bool:
        """Whether anything of a kind was measured."""
        return kind in self._kinds

    def predict(self, kind: Hashable, own: Sequence[Observation], size: Size) -> float | None:
        """Seconds of a call; None where nothing of its kind was measured yet."""
        if kind not in self._kinds:
            return None
        if kind not in self._fits:
            self._fits[kind] = fit(self._kinds[kind])
        coefficients = self._fits[kind]
        scale = statistics.median(s.seconds / seconds(coefficients, s.size) for s in own) if own else 1.0
        return scale * seconds(coefficients, size)

    @property
    def error(self) -> float | None:
        """The median relative error of the latest predictions; None before any could be checked."""
        return statistics.median(self.errors) if self.errors else None


def seconds(coefficients: tuple[float, float, float], size: Size) -> float:
    """What the coefficients (constant, per FLOP, per byte) give for a size."""
    constant, per_flop, per_byte = coefficients
    flops, moved = _amounts(*size)
    return constant + per_flop * flops + per_byte * moved


def fit(observations: Sequence[Observation]) -> tuple[float, float, float]:
    """Constant, seconds per FLOP and per byte, none negative, of least squared relative error."""
    # Plain numbers: a fit is made at each decision for each node, and tensors this small cost ten times as much.
    flops, moved = zip(*(_amounts(*size) for size, _ in observations), strict=True)
    ones = [1 / taken for _, taken in observations]
    terms = [ones, list(map(operator.mul, flops, ones)), list(map(operator.mul, moved, ones))]
    products = [[sum(map(operator.mul, one, other)) for other in terms] for one in terms]
    sums = [sum(term) for term in terms]
    best, least = (0.0, 0.0, 0.0), float("inf")
    # Three terms: each set of those that are not zero is tried. That is what non-negative least squares comes to.
    most = min(3, len(observations)) if max(flops) > WIDE * min(flops) else 1
    for count in range(1, most + 1):
        for chosen in itertools.combinations(range(3), count):
            if 1 not in chosen:
                continue  # FLOPs always count: a fit to one density must not say that others cost the same
            found = _solved([[products[i][j] for j in chosen] for i in chosen], [sums[i] for i in chosen])
            if found is None or min(found) < 0:
                continue
            error = len(ones) - sum(sums[i] * factor for i, factor in zip(chosen, found, strict=True))
            if error < least:
                given = dict(zip(chosen, found, strict=True))
                best, least = (given.get(0, 0.0), given.get(1, 0.0), given.get(2, 0.0)), error
    return best


def _solved(matrix: list[list[float]], values: list[float]) -> list[float] | None:
    """x where matrix @ x = values, of a symmetric matrix without negative eigenvalues; None where it is singular."""
    rows = [[*row, value] for row, value in zip(matrix, values, strict=True)]
    for i, row in enumerate(rows):
        if row[i] <= SINGULAR * matrix[i][i]:
            return None
        for other in rows:
            if other is not row:
                factor = other[i] / row[i]
                other[:] = [a - factor * b for a, b in zip(other, row, strict=True)]
    return [row[-1] / row[i] for i, row in enumerate(rows)]
