"""What is proposed of a node's variants, and what became of it: told to callables, to the log and to the run's log."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Proposal:
    """A change that the model predicts to pay.

    Attributes:
        node: name of the gate, and the role (forward, dgrad or wgrad) as a linear's kernel has it. With a weight
            stored [in, out] the first two change parts: `x @ weight` is computed by the kernel of dgrad.
        current, proposed: names of the variants.
        gain: part of a call's time that is predicted to be saved.
        saved_s: seconds over the steps that remain.
        cost_s: seconds that building takes, this node's part; 0 where nothing is built.
    """

    node: str
    current: str
    proposed: str
    gain: float
    saved_s: float
    cost_s: float


@dataclass(frozen=True)
class Outcome:
    """What became of a change that was predicted to pay.

    Attributes:
        role: forward, dgrad or wgrad, as in `Proposal.node`.
        density: of the gate.
        current, proposed, gain, saved_s, cost_s: as in `Proposal`.
        measured: part of a call's time that was saved in the trial; None where there was none, since the variant had
            run before or could not be built.
        in_force: whether the proposed variant serves now.
        model_error: the cost model's median relative error at that time; None before any prediction could be checked.
        error: why it could not be built; empty otherwise.
    """

    role: str
    density: float
    current: str
    proposed: str
    gain: float
    saved_s: float
    cost_s: float
    measured: float | None
    in_force: bool
    model_error: float | None
    error: str = ""

    def __str__(self) -> str:
        measured = "measured before" if self.measured is None else f"measured {self.measured:.1%}"
        found = f"not built: {self.error}" if self.error else measured
        known = self.model_error is not None
        return (
            f"{self.role}, density {self.density:.3f}: {self.current} -> {self.proposed}, predicted {self.gain:.1%} "
            f"faster ({self.saved_s:.1f} s over the rest, build {self.cost_s:.1f} s), {found}, "
            f"{'in force' if self.in_force else 'not taken'}; "
            + (f"median error of the model {self.model_error:.1%}" if known else "the model not checked yet")
        )
