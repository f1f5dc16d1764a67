"""What the controller asks of the outside: a gate to switch, and the cost of the step that has just run.

The controller knows nothing of graphs or kernels. Anything that looks like `Gate` can be controlled, and anything that
returns a `StepCost` can be its meter; the tests drive it with a simulated model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from .coupling import Coupled


@dataclass(frozen=True)
class StepCost:
    """FLOPs, forward and backward, of everything that ran in one optimizer step.

    Attributes:
        dense: what the dense model would have used (all matrix work, gated or not).
        fixed: the part that no gate switches block by block: all other matrix work, attention's live heads.
        gated: for each gate that ran, the FLOPs of its products at density 1 (forward, dgrad if any, wgrad).
        used: what was used: `fixed`, the active blocks and the probes.
        coupled: how the gates are coupled in each graph that ran.
    """

    dense: float
    fixed: float
    gated: Mapping[Any, float] = field(default_factory=dict)
    used: float = 0.0
    coupled: Collection[Coupled] = ()


class Gate(Protocol):
    """The block mask of one weight, as far as the controller needs it. Gates are compared by identity."""

    probed_area: float  # weight entries in the blocks that are probed

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def block(self) -> tuple[int, int]: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def transposed(self) -> bool: ...  # whether the weight is stored [in, out]: its block columns are the outputs
    @property
    def mask(self) -> Tensor: ...  # bool [R, C], on the CPU
    @property
    def density(self) -> float: ...
    @property
    def updates(self) -> int: ...  # how often the mask was written
    @property
    def trained(self) -> bool: ...  # whether an optimizer steps the weight; if none does, its blocks stay
    @property
    def normalised(self) -> bool: ...  # whether each output channel is normalised by itself, as batch norm does
    @property
    def probes(self) -> Tensor: ...  # int32 [P]; P is the most blocks that one step can probe
    @property
    def signals(self) -> Tensor: ...  # float32 [2, R, C]; its .grad receives sum(w·g) and sum(g²) of each block
    @property
    def block_area(self) -> Tensor: ...  # float32 [R, C], weight entries in each block; on the CPU
    def norms(self) -> Tensor: ...  # float32 [R, C], the norm of each block of the weight; on the weight's device
    def update_(self, mask: Tensor) -> None: ...


class Log(Protocol):
    """Who is told of each decision."""

    def write(self, record: Mapping[str, Any], gates: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...
