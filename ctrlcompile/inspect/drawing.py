"""A compiled graph as an SVG picture: inputs above, outputs below, gated layers filled as far as they are dense.

The layout is the usual one for graphs with a direction (Sugiyama et al., "Methods for visual understanding of
hierarchical system structures", 1981): rows by the longest path from an input, a place in every row that an edge
crosses, and places as near to those of their neighbours as there is room. Graphviz would do it too, but is a program,
which no package for Python brings along.
"""

import html
import itertools
from collections.abc import Mapping, Sequence

import networkx

from ctrlcompile.passes.outline import Node, Outline

WIDTH, HEIGHT, PITCH, GAP = 236, 36, 60, 16  # of a box; from row to row; between places of a row; pixels
LINE = 6  # breadth of an edge's place
SWEEPS = 12
CHARACTERS = 40  # of a line of text that fit into a box

Place = str | tuple[str, int]  # a node's name or, where its value is passed on to rows below the next, (name, row)


def svg(outline: Outline, densities: Mapping[str, float]) -> str:
    """The picture; `densities` are those of the gated layers, by node."""
    rows, edges = _rows(outline)
    x = _across(rows, edges)
    left = min(x.values()) - WIDTH / 2 - GAP
    width, height = max(x.values()) + WIDTH / 2 + GAP - left, PITCH * len(rows)
    y = {place: PITCH * number + PITCH / 2 for number, row in enumerate(rows) for place in row}
    boxes = {node.name for node in outline}
    parts = []
    for above, below in edges:
        start = y[above] + (HEIGHT / 2 if above in boxes else 0)
        end = y[below] - (HEIGHT / 2 if below in boxes else 0)
        bend = f"C{x[above]:.0f} {(start + end) / 2:.0f} {x[below]:.0f} {(start + end) / 2:.0f}"
        parts.append(f'<path d="M{x[above]:.0f} {start:.0f}{bend} {x[below]:.0f} {end:.0f}"/>')
    parts += [_box(node, x[node.name], y[node.name], densities.get(node.name)) for node in outline]
    size = f'viewBox="{left:.0f} 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    look = 'font-family="sans-serif" font-size="11" fill="none" stroke="#888"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look}>{"".join(parts)}</svg>'


def _rows(outline: Outline) -> tuple[list[list[Place]], list[tuple[Place, Place]]]:
    """The places of each row, and the edges between places of neighbouring rows."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(node.name for node in outline)
    graph.add_edges_from((source, node.name) for node in outline for source in node.sources)
    row_of = {name: row for row, names in enumerate(networkx.topological_generations(graph)) for name in names}
    rows: list[list[Place]] = [[] for _ in range(max(row_of.values()) + 1)]
    for node in outline:
        rows[row_of[node.name]].append(node.name)
    edges: dict[tuple[Place, Place], None] = {}
    for source, target in graph.edges:
        between = range(row_of[source] + 1, row_of[target])
        for row in between:
            if (source, row) not in rows[row]:
                rows[row].append((source, row))
        edges |= dict.fromkeys(itertools.pairwise([source, *((source, row) for row in between), target]))
    return rows, list(edges)


def _across(rows: Sequence[list[Place]], edges: Sequence[tuple[Place, Place]]) -> dict[Place, float]:
    """Where each place lies across; sorts the rows."""
    neighbours: dict[Place, tuple[list[Place], list[Place]]] = {place: ([], []) for row in rows for place in row}
    for above, below in edges:
        neighbours[below][0].append(above)
        neighbours[above][1].append(below)
    x = dict.fromkeys(neighbours, 0.0)
    for sweep in range(SWEEPS):
        side = sweep % 2  # from above, then from below
        for row in rows if side == 0 else reversed(rows):
            wanted = {p: sum(x[n] for n in near) / len(near) if (near := neighbours[p][side]) else x[p] for p in row}
            row.sort(key=wanted.__getitem__)
            x |= _spread(row, wanted)
    return x


def _spread(row: Sequence[Place], wanted: Mapping[Place, float]) -> dict[Place, float]:
    """The nearest places to those wanted, in least squares, that do not overlap: isotonic regression."""
    breadths = [LINE if isinstance(place, tuple) else WIDTH for place in row]
    steps = [0.0, *((a + b) / 2 + GAP for a, b in itertools.pairwise(breadths))]
    offsets = list(itertools.accumulate(steps))
    pools: list[tuple[float, int]] = []  # mean and number of places that touch each other
    for place, offset in zip(row, offsets, strict=True):
        pools.append((wanted[place] - offset, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, m), (a, n) = pools.pop(), pools.pop()
            pools.append(((a * n + b * m) / (n + m), n + m))
    means = [mean for mean, count in pools for _ in range(count)]
    return {place: mean + offset for place, mean, offset in zip(row, means, offsets, strict=True)}


def _box(node: Node, x: float, y: float, density: float | None) -> str:
    left, top, inside = x - WIDTH / 2, y - HEIGHT / 2, x - WIDTH / 2 + 8
    corner = f'x="{left:.0f}" y="{top:.0f}" height="{HEIGHT}" rx="4"'
    frame, mark = f'<rect {corner} width="{WIDTH}" fill="#f6f6f6"/>', ""
    if density is not None:
        frame = (
            f'<rect {corner} width="{WIDTH}" fill="#fff"/>'
            f'<rect {corner} width="{WIDTH * density:.0f}" fill="#a9c7e8" stroke="none"/>'
            f'<rect {corner} width="{WIDTH}" stroke="#1f4e79" stroke-width="2"/>'
        )
        mark = f'<tspan x="{left + WIDTH - 8:.0f}" text-anchor="end">density {density:.3f}</tspan>'
    detail = " · ".join(filter(None, (node.module, node.shape)))
    return (
        f"<g><title>{html.escape(f'{node.name}: {node.operator} {detail}')}</title>{frame}"
        f'<text stroke="none" fill="#222"><tspan x="{inside:.0f}" y="{y - 4:.0f}" font-weight="bold">'
        f"{html.escape(_cut(node.operator))}</tspan>{mark}"
        f'<tspan x="{inside:.0f}" y="{y + 11:.0f}" fill="#555">{html.escape(_cut(detail))}</tspan></text></g>'
    )


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"…{text[1 - CHARACTERS :]}"
