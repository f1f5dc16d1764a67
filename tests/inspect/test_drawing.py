"""The picture of a graph: every node in a box, every edge downwards, nothing on top of anything else."""

import random
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import ctrlcompile as cc
from ctrlcompile.inspect import drawing
from ctrlcompile.passes.outline import Node

from ..small_models import MLP, prune_

SVG = "{http://www.w3.org/2000/svg}"


def random_outline(count):
    """A graph in the order of computation, with short and long edges and several inputs."""
    nodes = []
    for number in range(count):
        earlier = [node.name for node in nodes[-8:]]
        sources = tuple(random.sample(earlier, min(len(earlier), random.choice([0, 1, 1, 1, 2, 3]))))
        nodes.append(Node(f"n{number}", "op<&>", f"blocks.{number}", "8 x 16", sources))
    return tuple(nodes)


def boxes_of(picture):
    """(left, top, width, height) of each box, by the node's name."""
    found = {}
    for group in ElementTree.fromstring(picture).iter(f"{SVG}g"):
        name = group.find(f"{SVG}title").text.split(":")[0]
        frame = group.find(f"{SVG}rect").attrib
        found[name] = tuple(float(frame[side]) for side in ("x", "y", "width", "height"))
    return found


def test_boxes_do_not_overlap_and_edges_lead_down_from_each_node_to_its_readers():
    for count in (1, 2, 10, 60):
        outline = random_outline(count)
        picture = drawing.svg(outline, {})
        boxes = boxes_of(picture)
        assert boxes.keys() == {node.name for node in outline}
        for node in outline:
            for source in node.sources:
                assert boxes[source][1] + boxes[source][3] < boxes[node.name][1]
        for first, (x, y, width, height) in boxes.items():
            for second, (left, top, _, _) in boxes.items():
                assert first == second or abs(left - x) >= width or abs(top - y) >= height
        ends = set()
        for path in ElementTree.fromstring(picture).iter(f"{SVG}path"):
            numbers = [float(number) for number in re.findall(r"-?\d+", path.attrib["d"])]
            ends |= {tuple(numbers[:2]), tuple(numbers[-2:])}
            assert numbers[1] < numbers[-1]
        for node in outline:
            x, y, width, height = boxes[node.name]
            read = any(node.name in other.sources for other in outline)
            assert any(abs(a - x - width / 2) <= 1 and abs(b - y - height) <= 1 for a, b in ends) == read
            assert any(abs(a - x - width / 2) <= 1 and abs(b - y) <= 1 for a, b in ends) == bool(node.sources)
        left, top, width, height = map(float, ElementTree.fromstring(picture).attrib["viewBox"].split())
        assert all(
            left <= x and x + w <= left + width and top <= y and y + h <= top + height for x, y, w, h in boxes.values()
        )


def test_a_chain_with_a_way_around_it_stays_straight():
    names = [f"n{number}" for number in range(30)]
    chain = [Node(name, "op", "", "", (names[place - 1],) if place else ()) for place, name in enumerate(names)]
    chain[-1] = Node("n29", "op", "", "", ("n28", "n0"))
    left = [x for name, (x, *_) in boxes_of(drawing.svg(tuple(chain), {})).items() if name not in ("n0", "n29")]
    assert max(left) - min(left) <= 1


@torch.no_grad()
def test_explain_draws_each_graph_before_and_after_each_pass_with_the_density_of_what_is_gated(one_thread):
    model = MLP()
    gates = cc.gates(model, block=8)
    prune_(gates.values())
    (graph,) = cc.explain(torch.compile(model, backend="ctrlprune"))(torch.randn(3, 40)).graphs
    before, gated, after = graph.svg(0), graph.svg(1), graph.svg()
    assert after == graph._repr_svg_() == graph.svg(len(graph.changes)) != gated
    assert "ctrlprune::linear" not in before
    assert gated.count(">relu<") == 1
    assert ">relu<" not in after
    marks = [f"density {gate.density:.3f}" for gate in gates.values()]
    assert re.findall(r"density [\d.]+", after) == re.findall(r"density [\d.]+", gated) == marks
    for text in ("fc1 · 3 x 68", "fc2 · 3 x 36"):
        assert text in before
        assert text in after
    with pytest.raises(ValueError, match=r"passes: got 9; allowed is 0 to \d"):
        graph.svg(9)
