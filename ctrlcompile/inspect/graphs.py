"""A compiled graph before and after each pass, as text."""

from collections.abc import Sequence
from dataclasses import dataclass

from ctrlcompile.passes import Change


@dataclass(frozen=True)
class Graph:
    """One compiled graph of a model. `str()` shows what each pass changed, as a diff.

    Attributes:
        changes: one per pass, in order: `name`, `before`, `after` (the graph as Python) and `diff`.
    """

    changes: Sequence[Change]

    @property
    def before(self) -> str:
        """The graph as Dynamo gave it."""
        return self.changes[0].before

    @property
    def after(self) -> str:
        """The graph as Inductor gets it."""
        return self.changes[-1].after

    def __str__(self) -> str:
        numbered = enumerate(self.changes, 1)
        return "\n\n".join(f"{number}. {change.name}\n{change.diff or 'no change'}" for number, change in numbered)

    __repr__ = __str__
