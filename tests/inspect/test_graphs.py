"""The graph before and after each pass, in Python, in logs and in a trace; the source of the kernels in force."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._logging._internal import trace_log

import ctrlcompile as cc
from ctrlcompile.passes import passes_for, run
from ctrlcompile.passes.graph_edit import copy_graph
from ctrlcompile.passes.layer_nodes import is_linear

NAMES = ["gate_linear", "gate_matmul", "gate_conv", "fuse_activation", "skip_heads", "restore_layout"]


class Broken(nn.Module):
    """A linear with its activation, a graph break, a linear that is too small."""

    def __init__(self):
        super().__init__()
        self.wide, self.small = nn.Linear(40, 64), nn.Linear(64, 8)

    def forward(self, x):
        x = torch.relu(self.wide(x))
        torch._dynamo.graph_break()
        return self.small(x)


@pytest.fixture
def changes():
    """What the passes change in a graph with one linear and one ReLU."""

    def made():
        return run(copy_graph(graph), examples, passes_for(dict.fromkeys(linears, (8, 8))))[1]

    def capture(gm, example_inputs):
        nonlocal graph, examples
        graph, examples = gm, example_inputs
        return gm.forward

    graph, examples = None, ()
    torch.compile(nn.Sequential(nn.Linear(40, 48), nn.ReLU()), backend=capture)(torch.randn(3, 40))
    linears = [node.name for node in graph.graph.nodes if is_linear(node)]
    return made


def test_each_change_is_the_text_before_and_after_with_a_diff_that_leads_from_one_to_the_other(changes):
    found = changes()
    assert [change.name for change in found] == NAMES
    assert found[0].after == found[1].before
    gated, matmul, conv, fused, skipped, restored = found
    assert matmul.before == matmul.after == gated.after, "it has no matmul"
    assert conv.before == conv.after == gated.after, "it has no convolution"
    assert skipped.before == skipped.after == fused.after, "it has no attention"
    assert restored.before == restored.after == fused.after
    assert "linear(" in gated.before
    assert "ctrlprune" not in gated.before
    assert "ctrlprune.linear" in gated.after
    assert "'none')" in gated.after
    assert "'relu')" in fused.after
    assert "float32" in gated.before or "f32[3, 40]" in gated.before
    for change in found:
        removed = [line[1:] for line in change.diff.splitlines() if line[0] == "-" and line[:3] != "---"]
        added = [line[1:] for line in change.diff.splitlines() if line[0] == "+" and line[:3] != "+++"]
        before, after = change.before.splitlines(), change.after.splitlines()
        assert [line for line in before if line in removed or line in after] == before
        assert sorted([line for line in before if line not in removed] + added) == sorted(after)


def test_diffs_are_logged_for_who_asks_for_detail_and_only_for_them(changes, caplog):
    logger = "ctrlcompile.passes"
    with caplog.at_level(logging.INFO, logger):
        changes()
    assert not any("+++" in record.getMessage() for record in caplog.records)
    with caplog.at_level(logging.DEBUG, logger):
        found = changes()
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if "+++" in message] == [change.diff for change in found if change.diff]


def test_graphs_and_diffs_are_artifacts_in_a_trace(changes):
    class Handler(logging.Handler):
        def emit(self, record):
            if "artifact" in getattr(record, "metadata", {}):
                artifacts[record.metadata["artifact"]["name"]] = record.payload

    artifacts: dict[str, str] = {}
    handler = Handler()
    trace_log.addHandler(handler)
    try:
        gated, _, _, fused, _, _ = changes()
    finally:
        trace_log.removeHandler(handler)
    assert artifacts == {
        "ctrlcompile_0_before_passes": gated.before,
        "ctrlcompile_1_gate_linear": gated.after,
        "ctrlcompile_1_gate_linear_diff": gated.diff,
        "ctrlcompile_2_gate_matmul": gated.after,
        "ctrlcompile_2_gate_matmul_diff": "",
        "ctrlcompile_3_gate_conv": gated.after,
        "ctrlcompile_3_gate_conv_diff": "",
        "ctrlcompile_4_fuse_activation": fused.after,
        "ctrlcompile_4_fuse_activation_diff": fused.diff,
        "ctrlcompile_5_skip_heads": fused.after,
        "ctrlcompile_5_skip_heads_diff": "",
        "ctrlcompile_6_restore_layout": fused.after,
        "ctrlcompile_6_restore_layout_diff": "",
    }


@torch.no_grad()  # half the work for the compiler
def test_explain_holds_a_graph_for_each_region_and_the_source_of_each_kernel(one_thread):
    compiled = torch.compile(Broken(), backend="ctrlprune", options={"block": 8})
    found = cc.explain(compiled)(torch.randn(3, 40))
    assert found.regions == len(found.graphs) == 2
    first, second = found.graphs
    assert "relu" in first.before
    assert "ctrlprune.linear" in first.after
    assert str(first).index("2. gate_linear") < str(first).index("+++ after gate_linear")
    assert second.after == second.before, "nothing of it is gated"
    assert "2. gate_linear\nno change" in str(second)

    wide, small = found.rows
    assert list(wide.kernel_sources) == ["forward", "dgrad", "wgrad"]
    assert small.kernel_sources == {}
    assert found.sources == {path: path.read_text() for path in wide.kernel_sources.values()}
    assert all('extern "C" void run(' in text for text in found.sources.values())
    assert "relu" in wide.kernel_sources["forward"].name, "the one in force, with the activation that moved into it"


@torch.no_grad()
def test_explains_json_says_module_source_line_and_kernel_source_of_each_linear(one_thread):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Broken()

        def forward(self, x):
            return F.linear(x, self.inner.wide.weight)

    compiled = torch.compile(nn.Sequential(Functional(), nn.Linear(64, 40)), backend="ctrlprune", options={"block": 8})
    found = cc.explain(compiled)(torch.randn(3, 40))
    read = json.loads(found.to_json())
    functional, plain, unreached = read["rows"]
    line = Functional.forward.__code__.co_firstlineno + 1
    assert (functional["name"], functional["module"]) == ("0.inner.wide.weight", "0")
    assert functional["source"] == f"{__file__}:{line}"
    assert (plain["name"], plain["module"]) == ("1.weight", "1")
    assert plain["kernel_sources"] == {role: str(path) for role, path in found.rows[1].kernel_sources.items()}
    assert unreached["module"] == "0.inner.small"
    assert f"test_graphs.py:{line}" in str(found)
    assert "0.inner.wide.weight" in found._repr_html_()
    read["step"].pop("model_error", None)  # of the whole process, once some training in it was timed
    assert read["step"] == {"regions": 1, "dense_flops": found.dense_flops, "flops": found.flops}
