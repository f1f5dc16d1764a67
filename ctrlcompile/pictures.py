"""Masks as pictures: characters for a terminal, SVG for a notebook, shares of patches for all else."""

import math

import torch
from torch import Tensor, nn


def patches(mask: Tensor, width: int, height: int) -> Tensor:
    """Of a boolean mask `[R, C]` the active share of each block or, beyond width x height, patch of blocks; float32."""
    rows, columns = mask.shape
    patch = (-(-rows // height), -(-columns // width))
    return nn.functional.avg_pool2d(mask[None, None].float().cpu(), patch, ceil_mode=True)[0, 0]


def text(mask: Tensor, width: int, height: int) -> str:
    """One character per patch: `█` full, ` ` empty."""
    return "\n".join("".join(" ░▒▓█"[math.ceil(4 * s)] for s in row) for row in patches(mask, width, height).tolist())


def svg(mask: Tensor, side: int = 256) -> str:
    """An SVG picture, `side` pixels wide or high; one square per patch, the darker the fuller."""
    shares = patches(mask, 64, 64)
    rows, columns = shares.shape
    scale = side / max(rows, columns)
    paths = []
    for share in torch.unique(shares[shares > 0]).tolist():
        squares = "".join(f"M{column} {row}h1v1h-1z" for row, column in (shares == share).nonzero().tolist())
        paths.append(f'<path d="{squares}" opacity="{share:.2f}"/>')
    size = f'viewBox="0 0 {columns} {rows}" width="{columns * scale:.0f}" height="{rows * scale:.0f}"'
    look = 'fill="#1f4e79" shape-rendering="crispEdges" style="background:#eee"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look}>{"".join(paths)}</svg>'
