"""Coupling from the compiled graph to the controller: what is useless goes, region by region and model by model."""

import pytest
import torch
from torch import nn

import ctrlcompile as cc

from .small_models import MLP

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 80
ONE_LINE = {"budget": 0.4, "total_steps": STEPS, "block": 8}


class Muted(MLP):
    """The first units of the hidden layer are constant, whatever the rows that compute them."""

    def __init__(self, muted: int) -> None:
        super().__init__(64, 96, 64)
        self.register_buffer("heard", (torch.arange(96) >= muted).float())

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)) * self.heard + (1 - self.heard))


class Broken(MLP):
    """The graph breaks between the two layers."""

    def forward(self, x):
        hidden = torch.relu(self.fc1(x))
        torch._dynamo.graph_break()
        return self.fc2(hidden)


def train(model, steps=STEPS):
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    run = torch.compile(model, backend="ctrlprune", options=ONE_LINE)
    teacher = torch.randn(64, 64) / 8
    for _ in range(steps):
        x = torch.randn(32, 64)
        optimizer.zero_grad()
        (run(x) - x @ teacher).square().mean().backward()
        optimizer.step()
    return cc.controller_of(optimizer)


def test_the_columns_of_units_without_living_rows_end_up_off_and_the_run_lands():
    model = Muted(24)
    controller = train(model)
    first, second = (gate.mask for gate in cc.gates(model).values())
    assert not first[:3].any(), "their gradient is zero, so their rows went"
    assert second[:, :3].sum() <= 2, "and what reads them, although a constant has a gradient"
    assert second[:, 3:].float().mean() > 0.2
    assert controller.flops_used / controller.flops_dense == pytest.approx(0.4, rel=0.01)


def test_two_instances_of_one_class_are_each_coupled_with_themselves():
    models = [nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)) for _ in range(2)]
    states = [train(model, 2).state_dict()["coupling"] for model in models]
    feeds = [tensor.tolist() for tensor in states[0][:3]]
    assert feeds == [[-1] * 8 + list(range(12)), list(range(12)), list(range(12))]
    assert all(map(torch.equal, states[0], states[1]))


def test_layers_of_different_graphs_are_not_coupled():
    assert train(Broken(64, 96, 64), 2).state_dict()["coupling"] == []


def test_convolutions_are_coupled_through_batch_norm():
    model = nn.Sequential(nn.Conv2d(32, 40, 3), nn.BatchNorm2d(40), nn.ReLU(inplace=True), nn.Conv2d(40, 32, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = torch.compile(model, backend="ctrlprune", options=ONE_LINE)
    run(torch.randn(2, 32, 6, 6)).square().mean().backward()
    optimizer.step()
    state = cc.controller_of(optimizer).state_dict()["coupling"]
    assert [tensor.tolist() for tensor in state[:3]] == [[-1] * 4 + list(range(5)), list(range(5)), list(range(5))]
    assert [tensor.tolist() for tensor in state[3:]] == [list(range(5)) + [-1] * 4, list(range(5)), list(range(4, 9))]


class Normed(nn.Module):
    """A product followed by a batch norm; the weight is read by a linear beside it, or not."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.encoder = nn.Linear(64, 48, bias=False) if linear else None
        self.weight = nn.Parameter(torch.randn(48, 64) / 7) if self.encoder is None else self.encoder.weight
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x):
        hidden = x[:, :48] if self.encoder is None else self.encoder(x)
        return self.norm(hidden @ self.weight)


@pytest.mark.parametrize("both_ways", [False, True])
def test_outputs_are_normalised_where_a_batch_norm_follows_what_the_gate_takes_for_outputs(both_ways):
    model = Normed(both_ways)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = torch.compile(model, backend="ctrlprune", options=ONE_LINE)
    for _ in range(2):
        run(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
    (gate,) = cc.gates(model).values()
    assert gate.transposed is not both_ways
    assert gate.normalised is not both_ways


@pytest.mark.parametrize("strict", [False, True])
def test_a_graph_that_cannot_be_followed_is_one_warning_and_no_coupling(monkeypatch, strict):
    def fail(*_):
        raise RuntimeError("no such rule")

    monkeypatch.setattr("ctrlcompile.region.find_coupling", fail)
    model = MLP(64, 96, 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = torch.compile(model, backend="ctrlprune", options={**ONE_LINE, "strict": strict})
    expected = (
        pytest.raises(RuntimeError) if strict else pytest.warns(RuntimeWarning, match="each by itself.*no such rule")
    )
    with expected as seen:
        for _ in range(3):
            run(torch.randn(4, 64)).square().mean().backward()
            optimizer.step()
    if not strict:
        assert sum("each by itself" in str(warning.message) for warning in seen) == 1
        assert cc.controller_of(optimizer).state_dict()["coupling"] == []
