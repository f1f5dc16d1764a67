"""The gates of a model by name: which of its weights get one, and which by their names do not."""

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ctrlcompile.blocks import Block, BlockChoice, check_block, no_room, parse_block, resolve_block, too_small
from ctrlcompile.gate import Gate, registry

GATEABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def gates(
    model: nn.Module, block: BlockChoice = "auto", *, include: str = "*", exclude: Sequence[str] = ()
) -> dict[str, Gate]:
    """The gates of a model by name: those of its linears and convolutions, made where there are none yet, with every
    block active, and those that other Parameters have.

    Call it before the model's first compiled call, or the backend has chosen the blocks already. A convolution that has
    no room for a block (the first one of a network, of three channels, or a depthwise one) has no gate. Another
    Parameter that a matrix product reads (`x @ weight`) has its gate from the first compiled call on, since only the
    graph tells.

    Args:
        model: plain, or what `torch.compile` made of it; names are those of `named_parameters()` of the plain model.
        block: sides of a block along the weight's dimensions, `(block_out, block_in)`, in features or channels; one int
            for a square; "auto" chooses.
        include, exclude: shell-style patterns of names.

    Raises:
        TypeError: `exclude` is no list of patterns.
        ValueError: the block does not fit a linear's weight, or differs from the block a weight was gated with before;
            no gate is made then.

    >>> gates = cc.gates(model, block=(32, 32))  # doctest: +SKIP
    >>> gates["fc1.weight"].update_(torch.rand(gates["fc1.weight"].grid) < 0.5)  # doctest: +SKIP
    """
    model = plain(model)
    block, exclude = parse_block(block), parse_patterns("exclude", exclude)
    chosen: dict[Tensor, tuple[str, Block | None]] = {}  # with the block of a gate yet to be made
    for name, module, weight in _weights(model):
        if not fnmatch.fnmatch(name, include) or name_excluded(name, exclude) or weight in chosen:
            continue
        gate = registry.get(weight)
        wanted: Block | None = None
        if gate is None:
            wanted = resolve_block(block, weight)
            if _shared_with_other_kind(model, weight):
                registry.refuse(weight, "shared with a module that is neither a linear nor a convolution")
            unfit = weight.is_inference() or not weight.is_floating_point()  # made in inference mode, or complex
            small = block == "auto" and too_small(weight.shape, wanted)
            groups = getattr(module, "groups", None)
            if registry.refusal(weight) or unfit or small or no_room(weight.shape, wanted, groups):
                continue
            check_block(wanted, weight.shape, name)
        else:
            gate.check_is_in(block)
        chosen[weight] = name, wanted
    found: dict[str, Gate] = {}
    for weight, (name, wanted) in chosen.items():  # nothing is made before all is checked
        gate = registry.get(weight) if wanted is None else registry.get_or_create(weight, wanted, name)
        assert gate is not None
        gate.name, found[name] = name, gate
    return found


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The weights of linears and convolutions, and other Parameters that have a gate: name, module, Parameter."""
    for prefix, module in model.named_modules():
        for own, parameter in module._parameters.items():
            of_layer = isinstance(module, GATEABLE) and own == "weight"
            if parameter is not None and (of_layer or registry.get(parameter) is not None):
                yield f"{prefix}.{own}" if prefix else own, module, parameter


def plain(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or the module itself. Raises TypeError for anything else."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, plain or compiled; got {type(model).__name__}")
    return getattr(model, "_orig_mod", model)


def parse_patterns(name: str, patterns: Any) -> tuple[str, ...]:
    """Shell-style patterns of Parameter names, as the argument `name` has them. Raises TypeError for anything else."""
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{name} is a list of name patterns such as ['*.head.weight']; got {patterns!r}")
    return tuple(patterns)


def name_excluded(name: str, patterns: Sequence[str]) -> str | None:
    """The first shell-style pattern that a Parameter's name matches, or None."""
    return next((pattern for pattern in patterns if fnmatch.fnmatch(name, pattern)), None)


def _shared_with_other_kind(model: nn.Module, weight: Tensor) -> bool:
    return any(
        any(parameter is weight for parameter in module._parameters.values()) and not isinstance(module, GATEABLE)
        for module in model.modules()
    )
