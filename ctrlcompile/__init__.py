"""Prune a PyTorch model while it trains, and make the pruned blocks cost nothing."""
