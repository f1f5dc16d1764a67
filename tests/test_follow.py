"""Optimizers are followed: who drives which gates, and whose state goes with a block."""

import gc
import warnings
import weakref

import pytest
import torch

import ctrlcompile as cc
from ctrlcompile import BudgetError, follow

from .small_models import MLP, Conv1D, masked_entries, random_mask

pytestmark = pytest.mark.usefixtures("one_thread")


def step(run, *optimizers):
    run.zero_grad()
    run(torch.randn(32, 64)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_an_optimizer_of_other_parameters_drives_nothing():
    model = MLP(64, 96, 64)
    other = torch.optim.AdamW(MLP().parameters())
    biases = torch.optim.SGD([model.fc1.bias, model.fc2.bias], 0.1)
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.4, "total_steps": 50, "block": 8})
    for _ in range(3):
        step(run, biases)
        other.step()
    assert cc.controller_of(other) is None
    assert cc.controller_of(biases) is None
    mine = torch.optim.AdamW(model.parameters())
    step(run, mine, biases)
    assert cc.controller_of(mine).steps == 1


def test_two_optimizers_of_one_model_share_a_controller_that_runs_once_a_round():
    model = MLP(64, 96, 64)
    optimizers = [torch.optim.AdamW(layer.parameters(), 1e-3) for layer in (model.fc1, model.fc2)]
    # A budget that either could only meet with the other's weights, too.
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.4, "total_steps": 60, "block": 8})
    for steps in range(60):
        step(run, *optimizers)
        first, second = map(cc.controller_of, optimizers)
        assert first is second
        assert first.steps == steps + 1
    assert list(first.gates) == ["fc1.weight", "fc2.weight"]
    assert first.flops_dense == 60 * 5 * 2 * 32 * 64 * 96  # the input needs no gradient
    assert first.flops_used == pytest.approx(0.4 * first.flops_dense, rel=0.01)
    for gate, optimizer in zip(first.gates.values(), optimizers, strict=True):
        gone = masked_entries(gate)
        assert gone.any()
        assert not gate.weight[gone].any()
        assert not optimizer.state[gate.weight]["exp_avg"][gone].any()


class Wrapper(torch.optim.Optimizer):
    """An optimizer as trainers hand it out: around the one that steps, with the same groups."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)


def test_an_optimizer_in_a_wrapper_has_the_controller_of_what_it_wraps():
    model = MLP(64, 96, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.7, "block": 8})
    assert cc.controller_of(Wrapper(optimizer)) is None
    step(run, optimizer)
    assert cc.controller_of(Wrapper(optimizer)) is cc.controller_of(optimizer) is not None
    assert cc.controller_of(Wrapper(torch.optim.AdamW(MLP().parameters()))) is None


def test_an_optimizer_that_takes_over_goes_on_with_the_run():
    model = MLP(64, 96, 64)
    first, second = (torch.optim.AdamW(model.parameters(), 1e-3) for _ in range(2))
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.7, "block": 8})
    for optimizer in (first, first, second, second, second):
        step(run, optimizer)
    assert cc.controller_of(second) is cc.controller_of(first)
    assert cc.controller_of(second).steps == 5


def test_a_weight_that_no_optimizer_steps_stays_whole():
    model = MLP(64, 96, 64)
    optimizer = torch.optim.AdamW(model.fc2.parameters(), 1e-3)
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.6, "total_steps": 60, "block": 8})
    for _ in range(60):
        step(run, optimizer)
    kept, pruned = cc.gates(model).values()
    assert kept.density == 1
    assert pruned.density < 0.5


@pytest.mark.parametrize("kept", [False, True])
def test_another_optimizer_takes_the_run_over_whether_or_not_the_first_is_gone(kept):
    model = MLP(64, 96, 64)
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.7, "total_steps": 20, "block": 8})
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(10):
        step(run, optimizer)
    controller = cc.controller_of(optimizer)
    first = optimizer if kept else None
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    gc.collect()
    for _ in range(10):
        step(run, optimizer)
    assert cc.controller_of(optimizer) is controller
    assert controller.steps == 20
    assert controller.flops_used / controller.flops_dense == pytest.approx(0.7, rel=0.01)
    assert (first is None) != kept


def two_models(total_steps):
    """Two models, compiled on a budget of 0.7 of as many steps, and one optimizer of both."""
    models = MLP(64, 96, 64), MLP(64, 96, 64)
    options = {"budget": 0.7, "total_steps": total_steps, "block": 8}
    runs = [torch.compile(model, backend="ctrlprune", options=options) for model in models]
    return models, runs, torch.optim.AdamW([parameter for model in models for parameter in model.parameters()])


class Around(torch.optim.Optimizer):
    """An optimizer around another one, as sharpness-aware minimisation and ZeRO are."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__([parameter for group in inner.param_groups for parameter in group["params"]], {})

    def step(self, closure=None):
        self.inner.step(closure)


def test_an_optimizer_around_another_steps_once():
    model = MLP(64, 96, 64)
    optimizer = Around(torch.optim.AdamW(model.parameters()))
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.7, "total_steps": 20, "block": 8})
    for _ in range(20):
        step(run, optimizer)
    assert cc.controller_of(optimizer).steps == 20


def test_two_optimizers_of_which_one_has_the_others_weights_too_step_once_in_a_round():
    model = MLP(64, 96, 64)
    some, every = torch.optim.SGD(model.fc1.parameters(), 0.01), torch.optim.AdamW(model.parameters())
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.7, "total_steps": 20, "block": 8})
    for _ in range(20):
        run(torch.randn(16, 64)).square().mean().backward()
        some.step()
        every.step()
        every.zero_grad()
    assert cc.controller_of(every).steps == 20


def test_gradients_set_by_hand_count_each_step():
    model = MLP(64, 96, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.7, "total_steps": 20, "block": 8})
    step(run, optimizer)
    for _ in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert cc.controller_of(optimizer).steps == 5


def test_layers_that_came_too_late_in_one_run_take_part_in_another():
    (_, second), runs, optimizer = two_models(20)
    for _ in range(19):
        step(runs[0], optimizer)
    with pytest.warns(RuntimeWarning, match="too near the end of the run"):
        step(runs[1], optimizer)
    optimizer = torch.optim.AdamW(second.parameters())
    for _ in range(20):
        step(runs[1], optimizer)
    controller = cc.controller_of(optimizer)
    assert controller.flops_used / controller.flops_dense == pytest.approx(0.7, rel=0.02)


@pytest.mark.parametrize("begin", [28, 29, 30, 35])
def test_layers_that_come_when_the_run_is_all_but_over_train_on_densely_and_are_told_of_once(begin, recwarn):
    (_, second), runs, optimizer = two_models(30)
    for number in range(40):
        step(runs[number >= begin], optimizer)
    assert [str(warning.message).count("trains fc1.weight, fc2.weight densely") for warning in recwarn] == [1]
    assert all(gate.density == 1 for gate in cc.gates(second).values())


def test_layers_of_a_graph_of_their_own_that_come_late_land_with_the_rest_of_the_run():
    (first, second), runs, optimizer = two_models(60)
    for number in range(60):
        step(runs[number >= 20 and number % 2], optimizer)
    controllers = {gate.run.controller for model in (first, second) for gate in cc.gates(model).values()}
    assert sorted(controller.total_steps for controller in controllers) == [39, 60]
    for controller in controllers:
        assert controller.flops_used / controller.flops_dense == pytest.approx(0.7, rel=0.02)


def test_layers_that_come_after_the_first_step_are_told_of_once():
    model = MLP(64, 96, 64)
    model.fc1.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.8, "total_steps": 50, "block": 8})
    step(run, optimizer)
    model.fc1.requires_grad_(True)
    with pytest.warns(RuntimeWarning, match=r"trains fc1\.weight densely: they were trained for the first time when"):
        step(run, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(run, optimizer)


def test_a_budget_beside_a_controller_in_the_open_is_told_of():
    model = MLP(64, 96, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    controller = cc.Controller(model, budget=0.875, optimizer=optimizer, block=8)
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.75, "block": 8})
    with pytest.warns(RuntimeWarning, match=r"ignores the option budget=0\.75: .* on a budget of 0\.875"):
        step(run, optimizer)
    controller.step()
    assert controller.steps == 1


def test_what_another_model_without_gates_used_is_not_this_ones():
    def used():
        torch.manual_seed(0)
        model = MLP(64, 96, 64)
        optimizer = torch.optim.AdamW(model.parameters())
        run = torch.compile(model, backend="ctrlprune", options={"budget": 0.7, "total_steps": 50, "block": 8})
        for _ in range(3):
            step(run, optimizer)
        return cc.controller_of(optimizer).flops_dense

    alone = used()
    other = torch.nn.Linear(64, 8)
    optimizer = torch.optim.AdamW(other.parameters())
    run = torch.compile(other, backend="ctrlprune")
    for _ in range(3):
        step(run, optimizer)
    torch._dynamo.reset()
    assert used() == alone


def test_gradients_that_leave_the_blocks_reports_out_are_told_of_early(caplog):
    model = MLP(64, 96, 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.7, "total_steps": 100, "block": 8})
    parameters = list(model.parameters())
    for _ in range(7):
        loss = run(torch.randn(16, 64)).square().mean()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert caplog.text.count("after 6 steps no gated weight has had a finite gradient") == 1


def test_controller_of_says_what_it_takes():
    with pytest.raises(TypeError, match="controller_of takes the optimizer that trains the model; got Linear"):
        cc.controller_of(torch.nn.Linear(4, 4))


def test_a_model_without_a_budget_leaves_nothing_behind_after_one_with():
    other = MLP(64, 96, 64)
    optimizer = torch.optim.AdamW(other.parameters())
    step(torch.compile(other, backend="ctrlprune", options={"budget": 0.7, "block": 8}), optimizer)
    model = MLP(64, 96, 64)
    run = torch.compile(model, backend="ctrlprune", options={"block": 8})
    step(run, torch.optim.AdamW(model.parameters()))
    gates = [weakref.ref(gate) for gate in cc.gates(model).values()]
    del model, run
    torch._dynamo.reset()
    gc.collect()
    assert [gate() for gate in gates] == [None, None]


def test_without_a_budget_no_controller_runs():
    model = MLP(64, 96, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    run = torch.compile(model, backend="ctrlprune", options={"block": 8})
    step(run, optimizer)
    assert cc.controller_of(optimizer) is None
    assert all(gate.mask.all() for gate in cc.gates(model).values())


class Left(torch.nn.Module):
    """A product with a Parameter on the left, which is no layer, and a linear where one is asked for."""

    def __init__(self, linear: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64, 64))
        self.linear = torch.nn.Linear(64, 64) if linear else torch.nn.Identity()

    def forward(self, x):
        y = (self.weight @ x.t()).t()
        torch._dynamo.graph_break()
        return self.linear(y)


@pytest.mark.parametrize(
    ("linear", "options", "warned"),
    [
        (False, {"budget": 0.4, "total_steps": 50}, 1),
        (False, {}, 0),
        (True, {"budget": 0.9, "total_steps": 50, "block": 8}, 0),
        (True, {"budget": 0.4, "total_steps": 50, "exclude": ["*linear*"]}, 1),
    ],
)
def test_a_budget_for_a_model_without_a_gate_is_told_of_once(linear, options, warned):
    model = Left(linear)
    optimizer = torch.optim.AdamW(model.parameters())
    run = torch.compile(model, backend="ctrlprune", options=options)
    follow._warn_dense.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step(run, optimizer)
    assert sum("none of its layers can be gated" in str(w.message) for w in caught) == warned


class Layer(torch.nn.Module):
    """A layer of GPT-2: attention and an MLP of weights that are stored [in, out]."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(2))
        self.c_attn, self.attn_proj = Conv1D(width, 3 * width), Conv1D(width, width)
        self.c_fc, self.c_proj = Conv1D(width, 4 * width), Conv1D(4 * width, width)

    def forward(self, x):
        heads = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.c_attn(self.norms[0](x)).chunk(3, 2))
        q, k, v = heads
        weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1)
        x = x + self.attn_proj((weights @ v).transpose(1, 2).flatten(2).contiguous())
        return x + self.c_proj(torch.nn.functional.gelu(self.c_fc(self.norms[1](x)), approximate="tanh"))


def test_a_gpt2_of_weights_stored_in_out_trains_to_its_budget():
    embedding, head = torch.nn.Embedding(50, 64), torch.nn.Linear(64, 50, bias=False)
    head.weight = embedding.weight
    model = torch.nn.Sequential(embedding, Layer(), Layer(), head)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.5, "total_steps": 60, "block": 8})
    for _ in range(60):
        tokens = torch.randint(50, (4, 12))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(run(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    controller = cc.controller_of(optimizer)
    assert controller.flops_used == pytest.approx(0.5 * controller.flops_dense, rel=0.01)
    layers = ("c_attn", "attn_proj", "c_fc", "c_proj")
    assert set(controller.gates) == {f"{i}.{name}.weight" for i in (1, 2) for name in layers}
    for gate in controller.gates.values():
        gone = masked_entries(gate)
        assert gone.any()
        assert not gate.weight[gone].any()
        assert not optimizer.state[gate.weight]["exp_avg"][gone].any()
    rows = {row.name: row.gated for row in cc.explain(run)(tokens).rows}
    assert rows == {**dict.fromkeys(controller.gates, True), "0.weight": False}, "attention's products are no layers"
    torch.testing.assert_close(run(tokens), model(tokens), rtol=1e-4, atol=1e-5)


def test_the_state_of_a_block_goes_with_it_whichever_optimizer_owns_it():
    model = MLP(64, 96, 64)
    gates = cc.gates(model, 8)
    run = torch.compile(model, backend="ctrlprune")
    optimizers = [torch.optim.AdamW(model.fc1.parameters()), torch.optim.RMSprop(model.fc2.parameters(), momentum=0.9)]
    step(run, *optimizers)
    for gate, optimizer in zip(gates.values(), optimizers, strict=True):
        gate.update_(random_mask(gate.grid))
        gone = masked_entries(gate)
        moments = [value for value in optimizer.state[gate.weight].values() if value.shape == gate.shape]
        assert len(moments) == 2
        for value in moments:
            assert not value[gone].any()
            assert value[~gone].any()


def test_a_budget_that_the_model_cannot_meet_is_an_error_of_the_first_step():
    model = MLP(64, 96, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    options = {"budget": 0.3, "total_steps": 50, "block": 8, "exclude": ["fc1*"]}
    run = torch.compile(model, backend="ctrlprune", options=options)
    with pytest.raises(BudgetError, match=r"0\.400 of this model's training FLOPs cannot be gated"):
        step(run, optimizer)


def test_a_dropped_model_leaves_nothing_behind():
    model = MLP(64, 96, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.7, "block": 8})
    step(run, optimizer)
    kept = [weakref.ref(model.fc1.weight), weakref.ref(cc.controller_of(optimizer))]
    del model, optimizer, run
    torch._dynamo.reset()
    gc.collect()
    assert [ref() is None for ref in kept] == [True, True]


def test_a_budget_that_only_weights_that_nobody_steps_could_meet_is_an_error_of_the_second_step():
    model = MLP(64, 96, 64)
    optimizer = torch.optim.AdamW(model.fc2.parameters())
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.3, "total_steps": 50, "block": 8})
    step(run, optimizer)
    with pytest.raises(BudgetError, match=r"cannot be gated, fc1\.weight no optimizer steps and 48 steps are left"):
        step(run, optimizer)
