"""The command `ctrlcompile`: looks at the installation, at what is made of a model, and at the kernel cache.

Exit status: 0 works, 1 something is wrong, 2 the command was not understood.
"""

import contextlib
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from ctrlcompile.inspect import doctor as diagnosis
from ctrlcompile.inspect import explain as explain_model
from ctrlcompile.inspect import profile as profile_model
from ctrlcompile.inspect import report as reports
from ctrlcompile.inspect import run as runs
from ctrlcompile.inspect import tensorboard as tensorboards
from ctrlcompile.kernels import build

Result = TypeVar("Result")

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Target(click.ParamType):
    """`module:callable` or `file.py:callable`."""

    name = "target"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Callable[[], Any]:
        """The callable. A usage error where there is none; what the module itself raises goes through."""
        place, _, attribute = value.rpartition(":")
        if not place or not attribute:
            self.fail(f"{value!r} is not of the form module:callable or file.py:callable", param, ctx)
        with contextlib.redirect_stdout(sys.stderr):  # what a module prints is no part of the answer
            if place.endswith(".py"):
                path = Path(place).resolve()
                if not path.is_file():
                    self.fail(f"there is no file {place}", param, ctx)
                module = _run_file(path)
            else:
                sys.path.insert(0, str(Path.cwd()))
                try:
                    module = importlib.import_module(place)
                except ModuleNotFoundError as error:
                    if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                        raise
                    self.fail(f"there is no module {error.name!r} here or among those installed", param, ctx)
        found = getattr(module, attribute, None)
        if not callable(found):
            self.fail(f"{place} has no callable {attribute!r}", param, ctx)
        return found


def _run_file(path: Path) -> Any:
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("ctrlcompile_target", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


target = click.argument("target", type=Target())


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ctrlcompile")
def main() -> None:
    """Prunes a PyTorch model while it trains: look at the installation, a model, the kernel cache.

    TARGET is module:callable or file.py:callable; the callable takes no arguments and returns (model, inputs): a
    torch.nn.Module, compiled or not, and a tensor, a tuple of arguments or a dict of named ones.
    """


@main.command()
@as_json
def doctor(as_json: bool) -> None:
    """Say what works here, what does not, and what to do.

    Builds kernels, runs them and compares their results. Status 1 where something is broken.
    """
    found = list(diagnosis.checks())
    if as_json:
        click.echo(json.dumps([asdict(check) for check in found], indent=1))
    else:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("", "state", "found"):
            table.add_column(heading)
        for check in found:
            colour = {"works": "green", "missing": "yellow", "broken": "red"}[check.state]
            advice = f"\n{check.advice}." if check.advice else ""
            table.add_row(check.what, f"[{colour}]{check.state}[/]", escape(check.found + advice))
        Console().print(table)
    if any(check.state == "broken" for check in found):
        sys.exit(1)


@main.command()
@target
@click.option("--graphs", is_flag=True, help="Print what each pass changed in each graph.")
@as_json
def explain(target: Callable[[], Any], graphs: bool, as_json: bool) -> None:
    """Say what is gated of a model, and why the rest is not."""
    if graphs and as_json:
        raise click.UsageError(
            "--graphs prints text: leave out --json, or use explain(model)(*inputs).graphs in Python"
        )
    explanation = _looked_at(target, explain_model)
    click.echo(explanation.to_json() if as_json else str(explanation))
    if graphs:
        for number, graph in enumerate(explanation.graphs, 1):
            click.echo(f"\nGraph {number} of {len(explanation.graphs)}\n\n{graph}")


@main.command()
@target
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="How often each is timed.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@as_json
def profile(target: Callable[[], Any], rounds: int, as_csv: bool, as_json: bool) -> None:
    """Time each gated product, and the training step, against dense."""
    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other")
    found = _looked_at(target, lambda model: profile_model(model, rounds=rounds))
    click.echo(found.to_json() if as_json else found.to_csv().rstrip("\n") if as_csv else str(found))


def _looked_at(target: Callable[[], Any], look: Callable[[nn.Module], Callable[..., Result]]) -> Result:
    with contextlib.redirect_stdout(sys.stderr):
        made = target()
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
            raise click.ClickException(f"the callable returns (model, inputs), a torch.nn.Module first; got {made!r}")
        model, inputs = made
        positional: Sequence[Any] = inputs if isinstance(inputs, (tuple, list)) else ()
        named: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else {}
        if isinstance(inputs, Tensor):
            positional = (inputs,)
        if not isinstance(model, torch._dynamo.OptimizedModule) and model._compiled_call_impl is None:
            model = torch.compile(model, backend="ctrlprune")
        try:
            return look(model)(*positional, **named)
        except (TypeError, ValueError, RuntimeError) as error:
            raise click.ClickException(str(error)) from error


@main.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File; default: RUN/report.html.")
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Write the same for TensorBoard into this folder.")
@as_json
def report(run: Path, output: Path | None, tensorboard: Path | None, as_json: bool) -> None:
    """Make one HTML page of a run's log: curves, masks over time, graphs, profile, versions.

    RUN is the folder that was given as log=. A profile goes in where RUN/profile.json has one:
    ctrlcompile profile TARGET --json > RUN/profile.json
    """
    if output and tensorboard:
        raise click.UsageError("--output and --tensorboard exclude each other")
    output = tensorboard or output or run / "report.html"
    try:
        read = runs.read(run)
        if tensorboard:
            tensorboards.write(read, tensorboard)
        else:
            output.write_text(reports.page(read), encoding="utf-8")
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    except ImportError as error:
        extra = "tensorboard" if tensorboard else "report"
        raise click.ClickException(f"{error.name} is missing: pip install 'ctrlcompile[{extra}]'") from error
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {error.strerror}") from error
    if read.unread:
        lines = "line" if read.unread == 1 else "lines"
        click.echo(f"{read.unread} {lines} of the log could not be read; the report has the rest", err=True)
    said = {"report": str(output), "decisions": len(read.decisions), "unread": read.unread}
    click.echo(json.dumps(said, indent=1) if as_json else str(output))


@main.group()
def cache() -> None:
    """Look at the kernels on disk and what was tuned for them, or delete them."""


@cache.command("list")
@as_json
def list_(as_json: bool) -> None:
    """List what is kept: name, size, age."""
    folder = build.cache_folder()
    found = [(path, path.stat()) for path in diagnosis.cached(folder)]
    if as_json:
        kernels = [{"path": str(path), "bytes": stat.st_size, "modified": stat.st_mtime} for path, stat in found]
        click.echo(json.dumps({"folder": str(folder), "kernels": kernels}, indent=1))
        return
    for path, stat in found:
        click.echo(f"{path.name}  {stat.st_size / 1e3:.0f} kB  {(time.time() - stat.st_mtime) / 86400:.1f} days old")
    click.echo(f"{len(found)} files, {sum(stat.st_size for _, stat in found) / 1e6:.1f} MB, in {folder}")


@cache.command()
@as_json
def clear(as_json: bool) -> None:
    """Delete all of it; kernels are built, and tuned, again when needed."""
    folder = build.cache_folder()
    removed = diagnosis.cached(folder)
    try:
        for path in removed:
            path.unlink(missing_ok=True)
            path.with_suffix(".cpp").unlink(missing_ok=True)
    except OSError as error:
        raise click.ClickException(f"{error.filename} cannot be deleted: {error.strerror}") from error
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "removed": [path.name for path in removed]}, indent=1))
    else:
        click.echo(f"{len(removed)} files deleted from {folder}")


if __name__ == "__main__":
    main()
