"""Prunes a model while it trains, and makes the pruned blocks cost nothing."""

from ctrlcompile.gate import Gate, gates

__all__ = ["Gate", "gates"]
