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


def test_other_layers_are_inductors_business():
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.LayerNorm(40), nn.Linear(40, 40), nn.Dropout(0.0))
    run, _ = compiled_and_pruned(model)
    assert_like_plain(run, model, torch.randn(3, 4, 40))


def test_a_model_without_anything_to_gate_runs_as_inductor_runs_it():
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
    run = torch.compile(model, backend="ctrlprune")
    assert_like_plain(run, model, torch.randn(3, 12))
    assert cc.gates(run) == {}


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


def test_a_gate_made_by_hand_leaves_an_excluded_layer_dense_and_the_graph_as_it_is(caplog):
    model = MLP(64, 96, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    options = {"block": 8, "exclude": ["fc2*"], "budget": 0.8, "total_steps": 20}
    run = torch.compile(model, backend="ctrlprune", options=options)
    x = torch.randn(16, 64)
    run(x).square().mean().backward()
    with caplog.at_level("INFO", logger="ctrlcompile"):
        gates = cc.gates(model, 8)  # a look at the masks
        assert set(gates) == {"fc1.weight", "fc2.weight"}
        for _ in range(20):
            run(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert "lowering it again" not in caplog.text
    assert gates["fc1.weight"].density < 1 == gates["fc2.weight"].density
    gates["fc2.weight"].update_(random_mask(gates["fc2.weight"].grid))
    run(x).square().mean().backward()
    optimizer.step()
    assert not model.fc2.weight[masked_entries(gates["fc2.weight"])].any()


def test_a_look_at_the_gates_of_a_running_model_does_not_lower_it_again(caplog):
    model = MLP(64, 96, 64)
    model.fc2.weight.requires_grad_(False)
    run = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    x = torch.randn(16, 64)
    run(x).sum().backward()
    gate = cc.gates(model, 8)["fc2.weight"]
    with caplog.at_level("INFO", logger="ctrlcompile"):
        run(x).sum().backward()
        assert [row.gated for row in cc.explain(run)(x).rows] == [True, False]
        assert "lowering it again" not in caplog.text
        gate.update_(random_mask(gate.grid))
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
        assert [row.gated for row in cc.explain(run)(x).rows] == [True, True]


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


def test_weights_of_complex_numbers_stay_dense():
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.cfloat), nn.Linear(64, 64, dtype=torch.cfloat))
    assert not cc.gates(model, 8)
    run = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    x = torch.randn(8, 64, dtype=torch.cfloat)
    mine = torch.autograd.grad(run(x).abs().square().mean(), list(model.parameters()))
    torch.testing.assert_close(mine, torch.autograd.grad(model(x).abs().square().mean(), list(model.parameters())))


class Transformed(nn.Module):
    """Layers inside `vmap` and `grad` of torch.func, and one outside."""

    def __init__(self):
        super().__init__()
        self.mapped, self.differentiated, self.fc = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40)

    def forward(self, x):
        slope = torch.func.grad(lambda row: self.differentiated(row).square().sum())(x[0])
        return self.fc(torch.func.vmap(self.mapped)(x)) + slope


def test_layers_inside_transformations_of_torch_func_stay_dense():
    torch.manual_seed(0)
    model = Transformed()
    run = torch.compile(model, backend="ctrlprune", options={"block": 8})
    x = torch.randn(6, 40)
    run(x).sum().backward()
    gates = cc.gates(model)
    gates = {"fc.weight": gates["fc.weight"]}
    prune_(gates.values())
    assert_like_plain(run, model, x, gates=gates)
    rows = {row.name: row.reason for row in cc.explain(run)(x).rows}
    assert rows.pop("fc.weight") == ""
    assert set(rows.values()) == {"inside a transformation of torch.func, such as vmap"}


@pytest.mark.filterwarnings("ignore:ctrlcompile leaves out of its budget")
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_whose_number_depends_on_values_stay_dense():
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x, chosen):
            y = self.fc1(x)
            return self.fc2(y[chosen.nonzero().squeeze(1)]).sum() + y.sum()

    model = Picks()
    run = torch.compile(model, backend="ctrlprune", options={"block": 8, "budget": 0.6, "total_steps": 6})
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(6):
        x, chosen = torch.randn(16, 64), torch.rand(16) < 0.5
        torch.testing.assert_close(run(x, chosen), model(x, chosen), rtol=1e-4, atol=1e-4)
        run(x, chosen).backward()
        optimizer.step()
        optimizer.zero_grad()
    first, second = cc.explain(run)(x, chosen).rows
    assert first.gated
    assert first.density < 1
    assert second.reason == "the size of its input depends on values in the same graph"


def test_a_model_made_in_inference_mode_and_a_bias_of_one_entry_stay_dense():
    with torch.inference_mode():
        made = MLP()
    run = torch.compile(made, backend="ctrlprune", options=OPTIONS)
    x = torch.randn(6, 40)
    with torch.no_grad():
        torch.testing.assert_close(run(x), made(x))
    assert not cc.gates(made, 8)

    model = MLP()
    model.fc1.bias = nn.Parameter(torch.randn(1))
    run, gates = compiled_and_pruned(model)
    assert_like_plain(run, model, x, gates={"fc2.weight": gates["fc2.weight"]})
    assert cc.explain(run)(x).rows[0].reason == "its bias has not one entry per output"


def test_vmap_beside_a_gated_layer():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(40, 40)

        def forward(self, x):
            return torch.func.vmap(lambda row: row * row.sum())(self.fc(x))

    torch.manual_seed(0)
    model = Mapped()
    run, gates = compiled_and_pruned(model)
    assert_like_plain(run, model, torch.randn(6, 40), gates=gates)
