"""The backend as users meet it: models of many kinds, compiled in many ways, compute what the plain model computes."""

import copy
import subprocess
import sys
import textwrap
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import ctrlcompile as cc
from ctrlcompile import region
from ctrlcompile.options import MODES

from .small_models import MLP, assert_like_plain, compiled_and_pruned, gradients, masked_entries, prune_, random_mask

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"block": 8}


def test_a_fresh_process_finds_the_backend_without_importing_the_package():
    script = """
        import sys, torch
        from torch import nn
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        optimizer = torch.optim.AdamW(model.parameters())
        options = {"budget": 0.5, "total_steps": 20, "block": 16}
        assert "ctrlcompile" not in sys.modules
        model = torch.compile(model, backend="ctrlprune", options=options)
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(32, 64)).square().mean().backward()
            optimizer.step()
        import ctrlcompile
        controller = ctrlcompile.controller_of(optimizer)
        print(controller.steps, round(controller.flops_used / controller.flops_dense, 2))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["20", "0.5"]


class Broken(nn.Module):
    """A graph break between two gated linears, and one weight that both graphs read."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(40, 40), nn.Linear(40, 40)

    def forward(self, x):
        x = torch.tanh(self.fc2(self.fc1(x)))
        torch._dynamo.graph_break()
        return self.fc1(x)


def test_graph_breaks_and_a_weight_in_two_regions():
    model = Broken()
    run, gates = compiled_and_pruned(model)
    gate = gates["fc1.weight"]
    gate.signals.requires_grad_()
    assert_like_plain(run, model, torch.randn(6, 40))
    assert counters["stats"]["unique_graphs"] == 2
    model.zero_grad()
    gate.signals.grad = None
    run(torch.randn(6, 40)).square().mean().backward()
    per_block = F.pad(gate.weight * gate.weight.grad, (0, 0, 0, 0)).view(5, 8, 5, 8).sum((1, 3))
    torch.testing.assert_close(gate.signals.grad[0], per_block.detach(), rtol=1e-4, atol=1e-5)


def test_dynamic_batch_and_sequence_recompile_once_and_stay_right():
    model = MLP()
    run, _ = compiled_and_pruned(model)
    assert_like_plain(run, model, torch.randn(3, 5, 40))
    assert_like_plain(run, model, torch.randn(4, 7, 40))
    compiles = counters["stats"]["unique_graphs"]
    assert compiles <= 2
    for lead in ((2, 9), (11, 3), (6, 6)):
        assert_like_plain(run, model, torch.randn(*lead, 40))
    assert counters["stats"]["unique_graphs"] == compiles


@pytest.mark.parametrize("rows", [0, 1])
def test_an_empty_batch_and_a_batch_of_one(rows):
    model = MLP()
    run, gates = compiled_and_pruned(model)
    x = torch.randn(rows, 40)
    y = run(x)
    torch.testing.assert_close(y, model(x))
    y.sum().backward()
    mine = gradients(model)
    model.zero_grad()
    model(x).sum().backward()
    for name, grad in gradients(model).items():
        kept = ~masked_entries(gates[name]) if name in gates else torch.ones_like(grad)
        torch.testing.assert_close(mine[name], grad * kept, rtol=1e-4, atol=1e-5)


def test_evaluation_without_gradients_meets_the_masks_of_training():
    model = MLP()
    run, gates = compiled_and_pruned(model)
    x = torch.randn(8, 40)
    for _ in range(3):
        prune_(gates.values())
        run(x).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_model_that_is_evaluated_before_it_trains_trains_with_the_same_gates(context):
    model = MLP()
    run = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    x = torch.randn(8, 40)
    with context():
        run(x)
    prune_(cc.gates(model).values())
    assert_like_plain(run, model, x)
    with context():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_second_instance_with_other_blocks_and_a_dense_third_share_dynamos_graph(recwarn):
    models = [MLP(), MLP(), MLP()]
    runs = [compiled_and_pruned(model, block)[0] for model, block in zip(models[:2], (8, (16, 8)), strict=True)]
    cc.gates(models[2], 8, include="fc1*")
    gate = cc.gates(models[2], include="fc1*")["fc1.weight"]
    gate.update_(random_mask(gate.grid))
    runs.append(torch.compile(models[2], backend="ctrlprune"))
    region._tell_of_many.cache_clear()
    for _ in range(2):
        for run, model in zip(runs, models, strict=True):
            assert_like_plain(run, model, torch.randn(7, 40))
            assert_like_plain(run, model, torch.randn(9, 40))
            with torch.no_grad():
                torch.testing.assert_close(run(x := torch.randn(5, 40)), model(x), rtol=1e-4, atol=1e-5)
    told = [warning for warning in recwarn if "compiles a graph again for each size" in str(warning.message)]
    assert len(told) == 1
    assert {gate.block for gate in cc.gates(models[1]).values()} == {(16, 8)}


def test_module_compile_keeps_the_state_dicts_keys_clean():
    model = MLP()
    gates = cc.gates(model, 8)
    prune_(gates.values())
    model.compile(backend="ctrlprune")
    plain = MLP()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(6, 40)
    torch.testing.assert_close(model(x), plain(x))
    model(x).sum().backward()
    assert not model.fc1.weight.grad[masked_entries(gates["fc1.weight"])].any()


@pytest.mark.parametrize("mode", MODES)
def test_every_allowed_mode_computes_the_same(mode):
    model = MLP()
    run, _ = compiled_and_pruned(model, mode=mode)
    assert_like_plain(run, model, torch.randn(6, 40))


def test_a_refused_mode_reaches_the_user():
    with pytest.raises(Exception, match="mode 'reduce-overhead' is not available with backend 'ctrlprune'"):
        torch.compile(MLP(), backend="ctrlprune", mode="reduce-overhead")(torch.randn(2, 40))


def test_gradient_accumulation_adds_gradients_and_signals_up():
    model = MLP()
    run, gates = compiled_and_pruned(model)
    gate = gates["fc1.weight"]
    gate.signals.requires_grad_()
    batches = [torch.randn(6, 40) for _ in range(3)]
    alone = []
    for batch in batches:
        model.zero_grad()
        gate.signals.grad = None
        run(batch).square().mean().backward()
        alone.append((model.fc1.weight.grad.clone(), gate.signals.grad.clone()))
    model.zero_grad()
    gate.signals.grad = None
    for batch in batches:
        run(batch).square().mean().backward()
    torch.testing.assert_close(model.fc1.weight.grad, sum(grad for grad, _ in alone))
    torch.testing.assert_close(gate.signals.grad, sum(signals for _, signals in alone))
    assert gate.signals.grad[0].any()


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = MLP(40, 68, 40), nn.Linear(40, 40)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def test_activation_checkpointing_is_right_and_leaves_masked_blocks_zero():
    model = Checkpointed()
    gates = cc.gates(model, 8)
    prune_(gates.values())
    run = torch.compile(model, backend="ctrlprune")
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(6, 40)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    run(x).square().mean().backward()
    mine = gradients(model)
    optimizer.step()
    for name, gate in gates.items():
        assert not gate.weight[masked_entries(gate)].any(), name
    assert mine["body.fc1.weight"].any()
    rows = {row.name: row for row in cc.explain(run)(x).rows}
    assert rows["head.weight"].gated
    assert all(row.gated or row.reason for row in rows.values())


def test_a_compiled_block_inside_a_checkpointed_model_recomputes_with_the_same_masks():
    body = MLP(40, 68, 40)
    run, gates = compiled_and_pruned(body)
    assert_like_plain(lambda x: checkpoint(run, x, use_reentrant=False), body, torch.randn(6, 40), gates=gates)


@pytest.mark.parametrize("around", ["nothing", "checkpoint", "reentrant checkpoint"])
def test_what_a_checkpoint_computes_again_does_not_count(around):
    torch.manual_seed(0)
    model = MLP(64, 96, 64)
    run = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    controller = cc.Controller(model, budget=0.5, optimizer=optimizer, block=8)
    for _ in range(3):
        x = torch.randn(16, 64, requires_grad=True)
        y = run(x) if around == "nothing" else checkpoint(run, x, use_reentrant=around == "reentrant checkpoint")
        y.square().mean().backward()
        optimizer.step()
        controller.step()
    assert controller.flops_dense == 3 * 6 * 16 * 2 * 64 * 96


def test_instances_of_which_every_second_is_in_a_reentrant_checkpoint_all_count():
    models = [MLP(64, 96, 64) for _ in range(4)]
    runs = [torch.compile(model, backend="ctrlprune", options=OPTIONS) for model in models]
    parameters = [parameter for model in models for parameter in model.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.01)
    controller = cc.Controller(nn.ModuleList(models), budget=0.5, optimizer=optimizer, block=8)
    x = torch.randn(16, 64, requires_grad=True)
    for number, run in enumerate(runs):
        x = checkpoint(run, x, use_reentrant=True) if number % 2 else run(x)
    x.square().mean().backward()
    optimizer.step()
    controller.step()
    assert controller.flops_dense == 4 * 6 * 16 * 2 * 64 * 96


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_models_in_other_types_are_right_gated_or_not(dtype):
    model = MLP().to(dtype)
    run, _ = compiled_and_pruned(model)
    x = torch.randn(6, 40, dtype=dtype)
    assert_like_plain(run, model, x)
    own = MLP().to(dtype)
    run = torch.compile(own, backend="ctrlprune", options=OPTIONS)
    assert_like_plain(run, own, x)
    rows = cc.explain(run)(x).rows
    assert all(row.gated for row in rows) == (dtype == torch.bfloat16)
    assert all(row.gated or str(dtype) in row.reason for row in rows)


def test_a_model_that_changes_its_type_keeps_its_masks():
    model = MLP()
    run, gates = compiled_and_pruned(model)
    assert_like_plain(run, model, torch.randn(6, 40))
    masks = {name: gate.mask for name, gate in gates.items()}
    model.double()
    assert_like_plain(run, model, torch.randn(6, 40, dtype=torch.float64))
    assert all(torch.equal(gate.mask, masks[name]) for name, gate in cc.gates(model).items())


def test_autocast_trains_in_half_with_the_masters_gradient_zero_where_masked():
    model = MLP()
    run, gates = compiled_and_pruned(model)
    x = torch.randn(64, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = run(x), model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain, rtol=5e-2, atol=2e-2)
    y.float().square().mean().backward()
    for gate in gates.values():
        assert gate.weight.grad.dtype == torch.float32
        assert not gate.weight.grad[masked_entries(gate)].any()


def test_a_compiled_function_and_a_compiled_loss_closure_are_gated():
    model, target = MLP(), torch.randn(6, 36)
    gates = cc.gates(model, 8)
    prune_(gates.values())

    @torch.compile(backend="ctrlprune")
    def loss_of(x):
        return F.mse_loss(model(x), target)

    x = torch.randn(6, 40)
    loss = loss_of(x)
    torch.testing.assert_close(loss, F.mse_loss(model(x), target))
    loss.backward()
    for name, gate in gates.items():
        assert not gate.weight.grad[masked_entries(gate)].any(), name
        assert gate.weight.grad.any()

    weight = nn.Parameter(torch.randn(64, 40))
    run = torch.compile(lambda x, w: torch.relu(F.linear(x, w)), backend="ctrlprune", options=OPTIONS)
    torch.testing.assert_close(run(x, weight), torch.relu(F.linear(x, weight)), rtol=1e-4, atol=1e-5)


class Bookkeeper(nn.Module):
    """Writes into buffers and scratch that nothing in its graph reads through the node that wrote."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 40)
        self.norm = nn.BatchNorm1d(40)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(40))

    def forward(self, x):
        self.calls.add_(1)
        y = self.norm(torch.relu(self.fc(x)))
        self.average.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        total = torch.ones(40)
        torch.add(total, self.calls, out=total)
        return y * total


@pytest.mark.parametrize("gated", [True, False])
def test_what_is_written_in_place_is_written_although_nobody_reads_the_node(gated):
    torch.manual_seed(0)
    plain = Bookkeeper()
    model = copy.deepcopy(plain)
    if gated:
        run, gates = compiled_and_pruned(model)
        gates["fc.weight"].update_(torch.ones_like(gates["fc.weight"].mask))
    else:
        run = torch.compile(model, backend="ctrlprune", options={"exclude": ["*"]})
    model.load_state_dict(plain.state_dict())
    for _ in range(3):
        x = torch.randn(8, 40)
        torch.testing.assert_close(run(x), plain(x))
    for (name, mine), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=f"buffer {name}")
    assert model.calls == model.norm.num_batches_tracked == 3


class Branches(nn.Module):
    """Gated layers that the loss does not depend on."""

    def __init__(self):
        super().__init__()
        self.fc, self.detached, self.target = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40)

    def forward(self, x):
        with torch.no_grad():
            target = self.target(x)
        return (self.fc(x) + self.detached(x).detach() - target).square()


def test_layers_that_the_loss_does_not_depend_on_train_nothing_and_are_in_nobodys_way():
    model = Branches()
    run, _ = compiled_and_pruned(model)
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        x = torch.randn(6, 40)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
        run(x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert changed == {"fc"}


def test_a_graph_that_leaves_gradients_off_is_compiled_with_them():
    class Switches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(40, 40), nn.Linear(40, 40)

        def forward(self, x):
            y = self.fc1(x).relu()
            torch.set_grad_enabled(False)
            return y, self.fc2(y)

    run = torch.compile(Switches(), backend="ctrlprune", options=OPTIONS)
    try:
        y, z = run(torch.randn(6, 40))
    finally:
        torch.set_grad_enabled(True)
    assert (y.requires_grad, z.requires_grad) == (True, False)


def test_a_gated_model_can_be_sent_to_another_process_without_a_warning(recwarn):
    model = MLP()
    cc.gates(model, 8)
    ForkingPickler.dumps(model)
    assert not [warning for warning in recwarn if "hook" in str(warning.message)]


def test_an_encoder_that_takes_its_fast_path_in_evaluation():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 96, batch_first=True), 2)
    run = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    x = torch.randn(4, 8, 64)
    run(x).sum().backward()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
