"""What a run may use and in how many steps, and the ledger of what it has used so far."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

ENDLESS = 10**9  # steps, so many that those before them do not count
AVERAGE_STEPS = 100  # horizon of the average step, long against noise in the batch size, short against a curriculum


def parse_steps(name: str, value: Any, unit: str = "optimizer steps of the whole run") -> int:
    """A whole number of steps, 1 or more. Raises TypeError for what is none, ValueError for one below."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is the number of {unit}, an int; got {value!r}")
    if (steps := operator.index(value)) < 1:
        raise ValueError(f"{name} is the number of {unit}, above 0; got {value!r}")
    return steps


class BudgetError(ValueError):
    """The budget cannot be met by this model in the steps that are left."""


@dataclass(frozen=True)
class Budget:
    """What a training run may use, as a share of what the dense run uses.

    Args:
        flops: share of the dense run's training FLOPs, in (0, 1]: all matrix work of the model, gated or not, with the
            dense warm-up and the probes counted.

    Raises:
        TypeError: `flops` is no number.
        ValueError: `flops` is outside (0, 1].

    >>> Budget(flops=0.4)
    Budget(flops=0.4)
    >>> Budget.of(0.25)
    Budget(flops=0.25)
    """

    flops: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.flops, bool) or not isinstance(self.flops, Real):
            raise TypeError(
                f"budget: got {self.flops!r} of type {type(self.flops).__name__}; allowed is a number in (0, 1], "
                "the share of the dense run's training FLOPs, such as 0.4"
            )
        if not (math.isfinite(self.flops) and 0 < self.flops <= 1):
            hint = f"; for {self.flops:g} % pass {self.flops / 100:g}" if 1 < self.flops <= 100 else ""
            raise ValueError(
                f"budget: got {self.flops!r}; allowed is 0 < budget <= 1, the share of the dense run's training FLOPs "
                f"(1 trains dense){hint}"
            )

    @classmethod
    def of(cls, value: float | Budget) -> Budget:
        """A `Budget` from itself or from the share of FLOPs alone."""
        return value if isinstance(value, Budget) else cls(flops=value)


@dataclass
class Ledger:
    """FLOPs used so far, and the average step that forecasts the rest.

    `dense` and `used` are totals; `forgiven_*` is the part of them that the budget does not look back on (where the
    length of the run is not known, a rate is held, and the dense start is not paid back). `average_*` are per optimizer
    step, over about the last `AVERAGE_STEPS` steps; `average_gated` has one entry per gate, at density 1.
    """

    dense: float = 0.0
    used: float = 0.0
    forgiven_dense: float = 0.0
    forgiven_used: float = 0.0
    measured: int = 0
    average_dense: float = 0.0
    average_fixed: float = 0.0
    average_gated: list[float] = field(default_factory=list)

    def add(self, dense: float, fixed: float, used: float, gated: list[float]) -> None:
        """Books one step."""
        self.dense += dense
        self.used += used
        self.measured += 1
        new = 1 / min(self.measured, AVERAGE_STEPS)
        self.average_dense += new * (dense - self.average_dense)
        self.average_fixed += new * (fixed - self.average_fixed)
        old = self.average_gated or [0.0] * len(gated)
        self.average_gated = [a + new * (g - a) for a, g in zip(old, gated, strict=True)]

    def forgive(self) -> None:
        """From here on the budget counts afresh."""
        self.forgiven_dense, self.forgiven_used = self.dense, self.used

    @property
    def gated(self) -> float:
        """FLOPs of an average step that gates can switch, at density 1."""
        return sum(self.average_gated)

    def gated_at(self, densities: list[float]) -> float:
        """The same with each gate at its density."""
        return sum(density * flops for density, flops in zip(densities, self.average_gated, strict=True))

    def allowed(self, budget: Budget, steps_left: int) -> float:
        """Share of the gateable FLOPs that each of `steps_left` steps may use on average, so that the run lands.

        The reference of the loop: (budget of the whole run − used)/(steps left), less the fixed part. Below 0 or
        above 1 where the budget cannot be met or not be used up.
        """
        whole = budget.flops * (self.dense - self.forgiven_dense + steps_left * self.average_dense)
        left = whole - (self.used - self.forgiven_used)
        return (left / steps_left - self.average_fixed) / self.gated

    def least(self, steps_left: int, lowest: list[float]) -> float:
        """The least budget that the run can still meet, with each gate at its `lowest` density from now on."""
        whole = self.dense + steps_left * self.average_dense
        return (self.used + steps_left * (self.average_fixed + self.gated_at(lowest))) / whole

    def check(self, budget: Budget, steps_left: int | None, lowest: list[float], untrained: list[str]) -> None:
        """Raises BudgetError where a run of `steps_left` steps more (None: without end) cannot meet the budget."""
        least = self.least(ENDLESS if steps_left is None else steps_left, lowest)
        if least > budget.flops:
            rest = "" if steps_left is None else f" and {steps_left} steps are left"
            if untrained:
                rest = f", {', '.join(untrained[:3])}{' ...' if len(untrained) > 3 else ''} no optimizer steps{rest}"
            raise BudgetError(
                f"budget: got {budget.flops:g}; {self.average_fixed / self.average_dense:.3f} of this model's training "
                f"FLOPs cannot be gated{rest}, so the least that it can meet is {math.ceil(least * 1e3) / 1e3:.3f}. "
                "Ask for that or more, gate more of the model or, in a short run, train longer"
            )
