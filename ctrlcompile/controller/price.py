"""The price on cost: feedback that corrects what the model of the cost misses.

For FLOPs the plant is known: the price that gives a wanted cost is a quantile of benefit per cost, read off in
`decide`. Feedback acts on the *cost asked for*, in front of that quantile, so that its gain does not depend on how the
benefits happen to be distributed, nor on their scale, which falls by orders of magnitude during training.
"""

from __future__ import annotations

from dataclasses import dataclass

NU = 0.8
K_I = 0.2
K_P = 0.1
AUTHORITY = 0.1  # the most that feedback takes from, or adds to, the cost asked for


@dataclass
class Feedback:
    """νPI on the relative overspend (Sohrabi et al., "On PI Controllers for Updating Lagrange Multipliers", 2024).

    ξ ← ν ξ + (1−ν) e;  u ← clip(u + K_I e + K_P (ξ − ξ_previous)): the projection of this incremental form is its
    anti-windup: what lies beyond the authority is never summed up.

    Attributes:
        correction: u, part of the wanted cost to ask less for, in [-AUTHORITY, AUTHORITY].
        smoothed: ξ.
    """

    correction: float = 0.0
    smoothed: float = 0.0

    def update(self, overspend: float) -> None:
        """Takes in (used − planned) / planned of the steps since the last decision."""
        before = self.smoothed
        self.smoothed = NU * before + (1 - NU) * overspend
        moved = self.correction + K_I * overspend + K_P * (self.smoothed - before)
        self.correction = min(AUTHORITY, max(-AUTHORITY, moved))

    def ask(self, wanted: float) -> float:
        """The cost to ask for, so that `wanted` results."""
        return wanted * (1 - self.correction)
