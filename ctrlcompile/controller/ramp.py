"""The plan: which share of the gateable FLOPs the next steps may use.

Dense until the signals mean something; then down a cubic (Zhu & Gupta, "To Prune, or Not to Prune", 2017, eq. 1) from
the present level to the end level, whose pace follows how far the gradients have settled; then level. The rest of a
cubic is again a cubic, so the plan is made anew at each decision from the present level ℓ, the steps r that the ramp
still takes, and what is left of the budget: with an average share a allowed in each of the n steps left, the end level
is

    d = (n·a − r·ℓ/4) / (n − r/4)

since the cubic's mean lies a quarter of the way from d to ℓ. Whatever was over- or underspent is thereby spread over
all steps left, and the run lands.

The warm-up is worth up to a third of what the run may use, half as much as is then left. |Σ w·g| is small where weights
are still near their random start, whatever they will be worth: a ranking made before the learning rate is up switches
off what learns late. In a GPT these are the queries and keys; with all of them gone, neither has a gradient to come
back by. What is left after it is for the end: beyond the end's level the ramp uses no more than a fifth of it.

Before batch norms there is next to nothing to wait for: the ranking of blocks within a layer is worth little there (see
`rating`), and the densities of layers are told by the first steps. What a dense start and a ramp cost, the end pays
with its density: in 400 steps of a small ResNet they left 0.30 instead of 0.375, and a test loss of 1.179 instead of
1.150.
"""

from __future__ import annotations

from dataclasses import dataclass

WARM_UP = (0.07, 0.10)  # share of the run: at least, at most
RAMP = (0.15, 0.30)  # share of the run: settled, not settled
WARM_UP_SPEND = 0.5  # of what is then left of the allowed cost, at most
HASTE = 0.9  # part by which both are shorter where next to all that can be gated stands before batch norms,
NORMALISED = 0.9  # which is this share of the gateable FLOPs
FLOOR = 0.8  # the end level is at least this part of the average allowed after the warm-up, in runs of known length
LEAST_SPARED = 1.5  # times the lowest level that the gates can be at, which the end level is at least
SETTLED = 0.5  # ends the warm-up
STAIRS = 4  # decisions that the rest of the ramp is given at least
OPEN_ENDED = 1000  # steps that the shares above refer to where the length of the run is not known


@dataclass
class Ramp:
    """State of the plan.

    Attributes:
        level: share of the gateable FLOPs at which the path stands now, 0 to 1.
        progress: of the ramp, 0 (dense warm-up) to 1 (level).
        started: the step in which the ramp began, or -1.
        floor: the level that the ramp may not end below, lest it starves the end by spending early.
    """

    level: float = 1.0
    progress: float = 0.0
    started: int = -1
    floor: float = 0.0

    def plan(
        self,
        step: int,
        interval: int,
        allowed: float,
        settledness: float,
        *,
        total_steps: int | None,
        first: int,
        least: float = 0.0,
        normalised: float = 0.0,
    ) -> tuple[float, int]:
        """Moves the path on to the next decision.

        Args:
            step: optimizer steps done.
            interval: steps until the next decision, at most.
            allowed: average share that each step left may use (see `Ledger.allowed`).
            settledness: 0 to 1.
            total_steps: of the run; None holds the rate `allowed` from the end of the ramp.
            first: steps before which the signals mean nothing; the warm-up ends at its latest all the same.
            least: share that the gates use at their lowest densities, which the end must not fall below.
            normalised: share of the gateable FLOPs in gates before a batch norm.

        Returns:
            The mean share of the gateable FLOPs until the next decision, and the steps until then: fewer than
            `interval` where the path is steep, and at the end of the run, which makes the landing exact.
        """
        n = None if total_steps is None else total_steps - step
        take = interval if n is None else max(1, min(interval, n // 2))
        length = (total_steps or OPEN_ENDED) * (1 - HASTE if normalised >= NORMALISED else 1)
        if self.started < 0:
            reserve = LEAST_SPARED * least
            room = (allowed - reserve) / (1 - reserve)  # what a dense start may take of the run and leave the reserve
            latest = max(0.0, min(WARM_UP[1], WARM_UP_SPEND * allowed, room)) * length
            earliest = min(max(WARM_UP[0] * length, first), latest)
            if allowed >= self.level or (step < latest and (step < earliest or settledness < SETTLED)):
                return self.level, min(take, max(1, int(latest) - step)) if step < latest else take
            self.started, self.floor = step, max(FLOOR * allowed, min(allowed, reserve))
        left = (1 - self.progress) * (RAMP[1] - (RAMP[1] - RAMP[0]) * settledness) * length
        if n is not None:
            left = min(left, n, 4 * n * (allowed - self.floor) / max(self.level - self.floor, 1e-9))
        if left < 1:
            self.level, self.progress = allowed, 1.0
            return allowed, take

        end = allowed if n is None else (n * allowed - left * self.level / 4) / (n - left / 4)
        drop = self.level - end
        take = min(take, max(1, int(left / STAIRS)))
        rest = 1 - min(1.0, take / left)
        mean = end + drop * left * (1 - rest**4) / (4 * take)
        self.level = end + drop * rest**3
        self.progress = 1 - (1 - self.progress) * rest
        return mean, take
