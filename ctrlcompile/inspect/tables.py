"""Tables as people see them: text for a terminal, HTML for a notebook."""

import io
from abc import ABC, abstractmethod

from rich.console import Console
from rich.table import Table

WIDTH = 132  # characters


class Shown(ABC):
    """What prints itself as a table, in a terminal and in a notebook."""

    @abstractmethod
    def _table(self) -> Table: ...

    def __str__(self) -> str:
        return text(self._table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html(self._table())


def text(table: Table) -> str:
    """The table in plain characters."""
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False, markup=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def html(table: Table) -> str:
    """The table as one `<pre>` element."""
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False, markup=False, record=True)
    console.print(table)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height: 1.2">{code}</pre>')
