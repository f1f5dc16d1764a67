"""The feedback loop that lands a training run on its budget.

contract    what it asks of the outside: `Gate`, `StepCost`
budget      what the run may use, and the ledger of what it has used
layout      where the blocks of all gates lie in flat vectors
signals     benefit of every block, smoothed, and how far it has settled
ramp        the plan: dense, then down a cubic, then level, within what the budget allows
price       νPI feedback on what the model of the cost misses
coupling    which blocks are useless while others are off
rating      how blocks are rated against one another
decide      which blocks stay, go, come back
probes      which inactive blocks have their gradient measured next, and telling the gates
controller  the pieces composed: measure → settle → ramp → price → decide → act
checkpoint  exact resume
host        decisions are made on the CPU, whatever the default device

Nothing here knows graphs, kernels or compilers.
"""

from .budget import Budget, BudgetError
from .contract import Gate, StepCost
from .controller import Controller

__all__ = ["Budget", "BudgetError", "Controller", "Gate", "StepCost"]
