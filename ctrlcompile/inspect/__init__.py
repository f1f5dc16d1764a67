"""What was done to a model, for people: `explain`."""

from ctrlcompile.inspect.explain import Explanation, Row, explain

__all__ = ["Explanation", "Row", "explain"]
