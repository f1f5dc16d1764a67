"""Prunes a model while it trains, and makes the pruned blocks cost nothing.

>>> model = torch.compile(model, backend="ctrlprune", options={"budget": 0.4, "total_steps": 5000})  # doctest: +SKIP
"""

from ctrlcompile.controller.budget import Budget, BudgetError
from ctrlcompile.follow import controller_of
from ctrlcompile.gate import Gate
from ctrlcompile.inspect import explain, profile
from ctrlcompile.model_controller import Controller
from ctrlcompile.named_gates import gates

__all__ = ["Budget", "BudgetError", "Controller", "Gate", "controller_of", "explain", "gates", "profile"]
