"""Tables as people see them: text for a terminal, HTML for a notebook."""

import io

from rich.console import Console
from rich.table import Table

WIDTH = 132  # characters


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
