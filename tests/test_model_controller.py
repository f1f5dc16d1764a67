"""One line, and the same in the open: a real model trained through torch.compile lands on its budget and resumes."""

import io

import pytest
import torch
from torch import nn

import ctrlcompile as cc
from ctrlcompile.controller.coupling import Sets
from ctrlcompile.inspect.run import read

from .small_models import MLP, Products, masked_entries

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 60
ONE_LINE = {"budget": 0.4, "total_steps": STEPS, "block": 8}


class Run:
    """A model, its optimizer and its data, from a seed."""

    def __init__(self, seed: int, options=None, budget=None, log=None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = MLP(64, 96, 64)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 3e-3)
        self.teacher = torch.randn(64, 64, generator=self.generator) / 8
        self.controller = None
        if budget is not None:
            self.controller = cc.Controller(
                self.model, budget=budget, total_steps=STEPS, optimizer=self.optimizer, block=8, log=log
            )
        self.compiled = torch.compile(self.model, backend="ctrlprune", options=options)

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            x = torch.randn(32, 64, generator=self.generator)
            loss = (self.compiled(x) - x @ self.teacher).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.controller is not None:
                self.controller.step(loss)
        self.loss = loss.item()
        return self

    @property
    def masks(self):
        return {name: gate.mask for name, gate in cc.gates(self.model).items()}


def share(controller) -> float:
    return controller.flops_used / controller.flops_dense


def same_masks(a: Run, b: Run) -> bool:
    return a.masks.keys() == b.masks.keys() and all(torch.equal(a.masks[k], b.masks[k]) for k in a.masks)


def test_one_line_lands_on_the_budget_and_the_open_form_makes_and_logs_the_same_decisions(seed, tmp_path):
    one_line = Run(seed, {**ONE_LINE, "log": str(tmp_path / "one line")})
    assert cc.controller_of(one_line.optimizer) is None
    start = one_line.train(1).loss
    one_line.train(STEPS - 1)
    controller = cc.controller_of(one_line.optimizer)
    assert controller.steps == STEPS
    assert share(controller) == pytest.approx(0.4, rel=0.01)
    assert one_line.loss < start
    gates = cc.gates(one_line.model)
    assert set(controller.gates) == set(gates)
    assert any(gate.density < 0.9 for gate in gates.values())
    for gate in gates.values():
        assert not gate.weight[masked_entries(gate)].any()

    in_the_open = Run(seed, budget=0.4, log=tmp_path / "open").train(STEPS)
    assert share(in_the_open.controller) == share(controller)
    assert same_masks(one_line, in_the_open)
    assert in_the_open.loss == one_line.loss
    logged = [read(folder) for folder in (tmp_path / "one line", tmp_path / "open")]
    for name in ("density", "price", "flops_used"):
        assert logged[0].series(name) == logged[1].series(name) == [record[name] for record in controller.history]
    for run in logged:
        last = len(run.decisions) - 1
        assert all(torch.equal(run.masks(name, [last])[0], mask) for name, mask in one_line.masks.items())
        (graph,) = run.graphs
        assert set(graph.gates.values()) == gates.keys() == run.gates.keys()
    assert cc.controller_of(in_the_open.optimizer) is None, "a controller in the open is stepped by its user alone"


@pytest.mark.parametrize("one_line", [True, False])
def test_a_run_is_resumed_in_the_open_bit_for_bit(seed, one_line):
    whole = Run(seed, ONE_LINE) if one_line else Run(seed, budget=0.4)
    whole.train(33)
    controller = cc.controller_of(whole.optimizer) if one_line else whole.controller
    file = io.BytesIO()
    torch.save([thing.state_dict() for thing in (whole.model, whole.optimizer, controller)], file)
    file.seek(0)
    resumed = Run(seed, budget=0.4)
    saved = torch.load(file, weights_only=True)
    for thing, state in zip((resumed.model, resumed.optimizer, resumed.controller), saved, strict=True):
        thing.load_state_dict(state)
    resumed.generator.set_state(whole.generator.get_state())
    for run in (whole, resumed):
        run.train(STEPS - 33)
    assert same_masks(whole, resumed)
    assert resumed.loss == whole.loss
    assert all(map(torch.equal, whole.model.state_dict().values(), resumed.model.state_dict().values()))
    assert share(resumed.controller) == share(controller)


def test_two_models_with_their_own_optimizers_land_each_on_its_own_budget(seed):
    first, second = Run(seed, ONE_LINE), Run(seed + 1, {**ONE_LINE, "budget": 0.6})
    for _ in range(STEPS):
        first.train(1)
        second.train(1)
    one, two = (cc.controller_of(run.optimizer) for run in (first, second))
    assert one is not two
    assert share(one) == pytest.approx(0.4, rel=0.01)
    assert share(two) == pytest.approx(0.6, rel=0.01)


def test_a_model_whose_last_layer_stays_dense_is_controlled():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    run = torch.compile(model, backend="ctrlprune", options=ONE_LINE)
    for _ in range(3):
        run(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
    controller = cc.controller_of(optimizer)
    assert list(controller.gates) == ["0.weight", "2.weight"]
    assert controller.steps == 3


def test_micro_batches_and_evaluation_between_steps_still_land(seed):
    run = Run(seed, ONE_LINE)
    for step in range(STEPS):
        run.optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(16, 64, generator=run.generator)
            (run.compiled(x) - x @ run.teacher).square().mean().backward()
        run.optimizer.step()
        if step % 10 == 0:
            with torch.no_grad():
                run.compiled(torch.randn(16, 64))
    controller = cc.controller_of(run.optimizer)
    assert controller.steps == STEPS
    assert share(controller) == pytest.approx(0.4, rel=0.01)
    assert controller.flops_dense == STEPS * 2 * 16 * 2 * 64 * 96 * (2 + 3)


def test_two_linears_that_share_a_weight_are_controlled_as_one(seed):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    controller = cc.Controller(model, budget=0.5, total_steps=STEPS, optimizer=optimizer, block=8)
    run = torch.compile(model, backend="ctrlprune")
    for _ in range(STEPS):
        optimizer.zero_grad()
        run(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
        controller.step()
    assert list(controller.gates) == ["0.weight"]
    assert share(controller) == pytest.approx(0.5, rel=0.01)


def test_wrong_arguments_are_refused_where_they_come_in():
    model = MLP(64, 96, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    for given, error, message in (
        ({"optimizer": torch.optim.SGD(MLP().parameters(), 0.1)}, ValueError, "steps none of the model's gated"),
        ({"optimizer": "adamw"}, TypeError, r"torch\.optim\.Optimizer.*got str"),
        ({"budget": 1.5}, ValueError, "allowed is 0 < budget <= 1"),
        ({"budget": None}, TypeError, "budget"),
        ({"total_steps": 0}, ValueError, "total_steps"),
        ({"block": 10}, ValueError, "multiples of 8"),
        ({"block": 128}, ValueError, "larger than the weight"),
        ({"exclude": ["*"]}, ValueError, "nothing to control"),
        ({"log": __file__}, ValueError, "log: cannot be written"),
    ):
        arguments = {"budget": 0.4, "total_steps": 10, "optimizer": optimizer, "block": 8} | given
        with pytest.raises(error, match=message):
            cc.Controller(MLP(64, 96, 64) if "block" in given else model, **arguments)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        cc.Controller("model", budget=0.4, optimizer=optimizer)


def test_a_controller_of_products_with_parameters_is_made_after_a_compiled_call():
    model = Products(64, 96, 64)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    make = {"budget": 0.5, "total_steps": STEPS, "optimizer": optimizer}
    with pytest.raises(ValueError, match=r"nothing to control.*call it once, then make the controller"):
        cc.Controller(model, **make)
    run = torch.compile(model, backend="ctrlprune", options={"block": 8})
    run(torch.randn(2, 64))
    controller = cc.Controller(model, **make)
    assert list(controller.gates) == ["fc.weight", "projection"]
    for _ in range(STEPS):
        optimizer.zero_grad()
        run(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
        controller.step()
    assert share(controller) == pytest.approx(0.5, rel=0.01)
    feeds = Sets(*controller.state_dict()["coupling"][:3]).to_members()
    assert feeds == [None] * 8 + [frozenset([i]) for i in range(12)], "one unit's output is the next weight's input"


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing():
    model, other = MLP(64, 96, 64), MLP(64, 64, 64)
    make = {"budget": 0.4, "total_steps": 10, "block": 8}
    saved = cc.Controller(other, optimizer=torch.optim.SGD(other.parameters(), 0.1), **make).state_dict()
    controller = cc.Controller(model, optimizer=torch.optim.SGD(model.parameters(), 0.1), **make)
    with pytest.raises(ValueError, match=r"another model; shape of gate 'fc1\.weight' is \(64, 64\)"):
        controller.load_state_dict(saved)
    assert all(gate.mask.all() for gate in controller.gates.values())


def test_the_default_device_changes_nothing():
    """Where it is a GPU, what decides must still be made on the CPU; "meta" is a device without data."""
    masks = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        model, inputs = MLP(64, 96, 64), torch.randn(STEPS, 32, 64)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        torch._dynamo.reset()
        torch.set_default_device(device)
        try:
            run = torch.compile(model, backend="ctrlprune", options=ONE_LINE)
            for x in inputs.unbind():
                optimizer.zero_grad()
                run(x).square().mean().backward()
                optimizer.step()
            assert "fc1" in str(cc.explain(run)(inputs[0]))
            state = cc.controller_of(optimizer).state_dict()
            cc.controller_of(optimizer).load_state_dict(state)
        finally:
            torch.set_default_device(None)
        masks.append([gate.mask for gate in cc.gates(model).values()])
    for one, other in zip(*masks, strict=True):
        assert one.any()
        assert not one.all()
        assert torch.equal(one, other)


def test_what_the_one_line_began_with_two_optimizers_goes_on_in_the_open(seed):
    def started() -> tuple[MLP, list[torch.optim.Optimizer]]:
        torch.manual_seed(seed)
        model = MLP(64, 96, 64)
        halves = [torch.optim.AdamW(layer.parameters(), 3e-3) for layer in (model.fc2, model.fc1)]
        return model, halves

    model, optimizers = started()
    run = torch.compile(model, backend="ctrlprune", options=ONE_LINE)
    for _ in range(STEPS // 2):
        run(torch.randn(32, 64)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = cc.controller_of(optimizers[1]).state_dict()

    model, optimizers = started()
    alone = cc.Controller(model, budget=0.4, total_steps=STEPS, optimizer=optimizers[0], block=8)
    with pytest.raises(ValueError, match="saved with another model"):
        alone.load_state_dict(state)
    both = cc.Controller(model, budget=0.4, total_steps=STEPS, optimizer=optimizers, block=8)
    both.load_state_dict(state)
    assert both.steps == STEPS // 2
