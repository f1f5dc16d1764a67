"""The door: `torch.compile(model, backend="ctrlprune")` comes in here, found through the entry point alone."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

from ctrlcompile import options as backend_options
from ctrlcompile.passes import fuse_derivative
from ctrlcompile.passes.graph_edit import copy_graph
from ctrlcompile.region import Region

COMPILER_TROUBLE = (InvalidCxxCompiler, CppCompileError)


def ctrlprune(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles one graph of Dynamo's with its layers gated; the rest goes to Inductor.

    Called by `torch.compile`. `options` are those of `ctrlcompile.options.Options`; `mode` is passed on to Inductor.

    Raises ValueError or TypeError for an option or a mode that does not exist here.
    """
    parsed = backend_options.parse(options)
    patches = backend_options.inductor_patches(mode)
    return Region(gm, example_inputs, parsed, functools.partial(_lower, patches=patches, strict=parsed.strict))


def _lower(
    gm: fx.GraphModule, example_inputs: Sequence[Any], static: bool, *, patches: dict[str, Any], strict: bool
) -> Callable[..., Any]:
    patches = {**patches, "post_grad_custom_pre_pass": fuse_derivative.after(inductor.post_grad_custom_pre_pass)}
    try:
        compiled: Any = compile_fx(
            copy_graph(gm), list(example_inputs), config_patches=patches, ignore_shape_env=static
        )
    except (*COMPILER_TROUBLE, InductorError) as error:
        cause = getattr(error, "inner_exception", error)
        if strict or not isinstance(cause, COMPILER_TROUBLE):
            raise
        _warn_eager(str(cause).strip().splitlines()[0])
        return gm.forward
    return compiled


@functools.cache
def _warn_eager(why: str) -> None:
    warnings.warn(
        f"ctrlcompile runs without Inductor, in eager mode: {why}. Install a C++ compiler, or name one in $CXX; "
        "options={'strict': True} makes this an error",
        RuntimeWarning,
        stacklevel=2,
    )
