"""What `torch.compile(..., options={...})` may say to this backend: typed, checked where it comes in."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ctrlcompile.blocks import Block, BlockChoice, parse_block
from ctrlcompile.controller.budget import Budget, parse_steps
from ctrlcompile.named_gates import parse_patterns
from ctrlcompile.respecialize import Mode, check_mode
from ctrlcompile.run_log import check_folder

MODES = ("default", "max-autotune-no-cudagraphs", "max-autotune")


@dataclass(frozen=True)
class Options:
    """Options of the `ctrlprune` backend.

    Attributes:
        budget: what the run may use of the dense run's training FLOPs, in (0, 1], or a `Budget`. None: no controller,
            masks change only by `Gate.update_` or by a `Controller` of one's own.
        total_steps: optimizer steps of the whole run; None: the budget is a rate to hold.
        block: sides of a block along the weight's dimensions, `(block_out, block_in)`, in features or channels; an int
            for a square; "auto" chooses.
        exclude: shell-style patterns of Parameter names that stay dense.
        strict: raise where the backend would otherwise warn and compute densely.
        log: folder for the run's log, which `ctrlcompile report` reads; None: no log.
        respecialize: "auto": other variants of the kernels are built in the background and put in force where the
            clock says that they are faster; "never": runs agree to the last bit; a callable is asked of each
            `respecialize.Proposal` and returns whether to follow it.
    """

    budget: Budget | None = None
    total_steps: int | None = None
    block: Block | Literal["auto"] = "auto"
    exclude: tuple[str, ...] = ()
    strict: bool = False
    log: Path | None = None
    respecialize: Mode = "auto"


def parse(options: Mapping[str, Any] | None) -> Options:
    """Checks what was passed as `options=`.

    Raises ValueError for an unknown option (the message lists those that exist), a value out of range, or a log that
    cannot be written; TypeError for a value of the wrong type.
    """
    given = dict(options or {})
    allowed = [field.name for field in dataclasses.fields(Options)]
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise ValueError(f"unknown option {', '.join(map(repr, unknown))} for backend 'ctrlprune'; it takes {allowed}")
    budget = given.get("budget")
    total_steps = given.get("total_steps")
    if total_steps is not None:
        total_steps = parse_steps("total_steps", total_steps)
        if budget is None:
            raise ValueError("total_steps says how long a budget has to last; give options={'budget': ..., ...} too")
    block: BlockChoice = given.get("block", "auto")
    strict = given.get("strict", False)
    if not isinstance(strict, bool):
        raise TypeError(f"strict is True or False; got {strict!r}")
    log = given.get("log")
    if log is not None and budget is None:
        raise ValueError("log keeps what a budget's controller decides; give options={'budget': ..., ...} too")
    return Options(
        budget=None if budget is None else Budget.of(budget),
        total_steps=total_steps,
        block=parse_block(block),
        exclude=parse_patterns("exclude", given.get("exclude", ())),
        strict=strict,
        log=None if log is None else check_folder(log),
        respecialize=check_mode(given.get("respecialize", "auto")),
    )


def inductor_patches(mode: str | None) -> dict[str, Any]:
    """Inductor's settings for a `mode` of `torch.compile`.

    Raises ValueError for a mode that replays CUDA graphs or does not exist.
    """
    if mode is None or mode == "default":
        return {}
    if mode not in MODES:
        raise ValueError(
            f"mode {mode!r} is not available with backend 'ctrlprune', which takes {list(MODES)}: masks change between "
            "steps, and a replayed CUDA graph would not see kernels chosen anew"
        )
    from torch._inductor import list_mode_options

    patches = dict(list_mode_options(mode))
    patches["triton.cudagraphs"] = False
    return patches
