"""The static-mask example prints what its docstring says it prints."""

import ast
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "static_mask.py"


def test_example_ends_as_its_docstring_shows() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    docstring = ast.get_docstring(ast.parse(SCRIPT.read_text(encoding="utf-8"))) or ""
    shown = [line[4:] for line in docstring.splitlines()[-5:]]
    assert [line.rstrip() for line in done.stdout.splitlines()[-5:]] == shown
