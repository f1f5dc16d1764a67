"""A compiled graph before and after each pass, as text and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ctrlcompile.inspect import drawing
from ctrlcompile.passes import Change


@dataclass(frozen=True)
class Graph:
    """One compiled graph of a model. `str()` shows what each pass changed, as a diff.

    Attributes:
        changes: one per pass, in order: `name`, `before`, `after` (the graph as Python) and `diff`.
        densities: of the gated layers, by their nodes in Dynamo's graph.
    """

    changes: Sequence[Change]
    densities: Mapping[str, float] = field(default_factory=dict)

    @property
    def before(self) -> str:
        """The graph as Dynamo gave it."""
        return self.changes[0].before

    @property
    def after(self) -> str:
        """The graph as Inductor gets it."""
        return self.changes[-1].after

    def svg(self, passes: int | None = None) -> str:
        """A picture of the graph after so many passes, by default all; gated layers are marked with their density.

        Raises ValueError where there are not so many passes.

        >>> pathlib.Path("graph.svg").write_text(cc.explain(model)(x).graphs[0].svg())  # doctest: +SKIP
        """
        stages = [self.changes[0].outlines[0], *(change.outlines[1] for change in self.changes)]
        if passes is not None and not 0 <= passes < len(stages):
            raise ValueError(f"passes: got {passes}; allowed is 0 to {len(self.changes)}, or None for all")
        return drawing.svg(stages[-1 if passes is None else passes], self.densities)

    _repr_svg_ = svg

    def __str__(self) -> str:
        numbered = enumerate(self.changes, 1)
        return "\n\n".join(f"{number}. {change.name}\n{change.diff or 'no change'}" for number, change in numbered)

    __repr__ = __str__
