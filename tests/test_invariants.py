"""What always holds (DESIGN.md, section 6), each promise by itself, through torch.compile as a user has it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import ctrlcompile as cc

from .small_models import MLP, error, gradients, masked_entries, prune_, random_mask

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"block": 8}


class Lion(torch.optim.Optimizer):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023), algorithm 2."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(m.lerp(p.grad, 1 - group["betas"][0])), alpha=-group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])


class Orthogonal(torch.optim.Optimizer):
    """Muon's idea: matrices step along the nearest orthogonal matrix to their momentum, which mixes all entries."""

    def __init__(self, params, lr=1e-2, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(p.grad)
                if p.dim() == 2:
                    u, _, v = torch.linalg.svd(m, full_matrices=False)
                    m = u @ v
                p.add_(m, alpha=-group["lr"])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, weight_decay=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1),
    "sgd nesterov": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adam amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "adamw single": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, 0.01, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9, weight_decay=0.1),
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.1),
    "adagrad with a start": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.001),
    "lion": Lion,
    "orthogonal": Orthogonal,
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.01, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 40)).square().mean().backward()
        optimizer.step()


def assert_zero_where_masked(gate: cc.Gate, optimizer: torch.optim.Optimizer) -> None:
    gone = masked_entries(gate)
    assert gone.any()
    state = optimizer.state[gate.weight]
    moments = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == gate.shape and k != "step_size"}
    for what, tensor in {"weight": gate.weight, "gradient": gate.weight.grad, **moments}.items():
        assert not tensor[gone].any(), f"{what} of {gate.name}"
    assert gate.weight[~gone].all(), f"active entries of {gate.name} live"


def test_weight_gradient_and_state_of_a_masked_block_are_zero_and_stay_zero_under_any_optimizer():
    wrong = {}
    for name, make in OPTIMIZERS.items():
        model = MLP()
        compiled = torch.compile(model, backend="ctrlprune", options=OPTIONS)
        optimizer = make(list(model.parameters()))
        train(compiled, optimizer, 2)
        gates = cc.gates(model)
        prune_(gates.values())
        try:
            for steps in (0, 1, 2):
                train(compiled, optimizer, steps)
                for gate in gates.values():
                    assert_zero_where_masked(gate, optimizer)
        except AssertionError as error:
            wrong[name] = str(error).splitlines()[0]
    assert not wrong


def test_blocks_come_back_at_zero_and_then_learn_under_any_optimizer():
    wrong = {}
    for name, make in OPTIMIZERS.items():
        model = MLP()
        compiled = torch.compile(model, backend="ctrlprune", options=OPTIONS)
        optimizer = make(list(model.parameters()))
        train(compiled, optimizer, 2)
        gate = cc.gates(model)["fc1.weight"]
        gate.update_(random_mask(gate.grid, 0.5))
        back = masked_entries(gate)
        train(compiled, optimizer, 2)
        gate.update_(torch.ones(gate.grid, dtype=torch.bool))
        if gate.weight[back].any():
            wrong[name] = "not zero when they come back"
        train(compiled, optimizer, 3)
        if (gate.weight[back] != 0).float().mean() < 0.5:  # behind a ReLU that is off nothing moves
            wrong[name] = "do not learn"
    assert not wrong


def test_a_training_step_outside_the_compiled_graph_leaves_masked_blocks_zero():
    model = MLP()
    gates = cc.gates(model, 8)
    compiled = torch.compile(model, backend="ctrlprune")
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(compiled, optimizer)
    prune_(gates.values())
    train(model, optimizer, 2)
    train(compiled, optimizer)
    train(model, optimizer)
    for gate in gates.values():
        assert_zero_where_masked(gate, optimizer)


def test_a_step_on_both_compiled_and_eager_gradients_leaves_masked_blocks_zero():
    model = MLP()
    compiled = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(compiled, optimizer)
    gates = cc.gates(model)
    prune_(gates.values())
    for _ in range(2):
        optimizer.zero_grad()
        compiled(torch.randn(16, 40)).square().mean().backward()
        model(torch.randn(16, 40)).square().mean().backward()  # an auxiliary loss on the plain model
        optimizer.step()
    for gate in gates.values():
        gone = masked_entries(gate)
        assert not gate.weight[gone].any()
        assert not optimizer.state[gate.weight]["exp_avg"][gone].any()


class Tied(nn.Module):
    """An autoencoder whose decoder reads the encoder's weight."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(40, 68)

    def forward(self, x):
        return F.linear(torch.relu(self.encoder(x)), self.encoder.weight.t()) - x


def pull(model):
    return sum((parameter - 1).square().sum() for parameter in model.parameters())


def add_noise(model):
    for parameter in model.parameters():
        parameter.grad += torch.randn_like(parameter.grad)


def overwrite(model):
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter))


def replace(model):
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)


OTHERS = {
    "another reader in the graph": (Tied, None, None),
    "a penalty outside the graph": (MLP, pull, None),
    "noise on the gradient": (MLP, None, add_noise),
    "written as data": (MLP, None, overwrite),
    "other data": (MLP, None, replace),
}


@pytest.mark.parametrize(
    ("what", "looks"),
    [*((what, True) for what in OTHERS), *((what, False) for what in list(OTHERS)[:2]), ("other data", False)],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_masked_blocks_are_zero_after_a_step_whatever_else_writes_or_trains_the_weight(
    what, looks, momentum, monkeypatch
):
    if not looks:  # at a block, as on a GPU
        monkeypatch.setattr(cc.Gate, "_is_written_to", lambda gate: False)
    make, penalty, meddle = OTHERS[what]
    model = make()
    gates = cc.gates(model, 8)
    prune_(gates.values())
    compiled = torch.compile(model, backend="ctrlprune")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=momentum)
    x = torch.randn(16, 40)
    for _ in range(3):
        optimizer.zero_grad()
        loss = compiled(x).square().mean()
        (loss if penalty is None else loss + penalty(model)).backward()
        if meddle is not None:
            meddle(model)
        optimizer.step()
        for gate in gates.values():
            assert_zero_where_masked(gate, optimizer)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_model_given_other_values_behind_autograds_back_computes_in_evaluation_what_the_plain_one_does():
    model = MLP()
    gates = cc.gates(model, 8)
    prune_(gates.values())
    compiled = torch.compile(model, backend="ctrlprune")
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(compiled, optimizer)
    x = torch.randn(16, 40)
    for write in (lambda p: p.data.copy_(torch.randn_like(p)), lambda p: setattr(p, "data", torch.randn_like(p))):
        for parameter in model.parameters():
            write(parameter)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        for gate in gates.values():
            assert not gate.weight[masked_entries(gate)].any()


def test_a_gradient_from_elsewhere_where_the_last_ones_memory_was_is_noticed(monkeypatch):
    monkeypatch.setattr(cc.Gate, "_is_written_to", lambda gate: False)
    model = MLP()
    gates = cc.gates(model, 8)
    prune_(gates.values())
    compiled = torch.compile(model, backend="ctrlprune")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(5):
        x = torch.randn(16, 40, requires_grad=True)
        torch.autograd.grad(compiled(x).sum(), x)  # computes the weights' gradients, too, for nobody
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        for gate in gates.values():
            assert_zero_where_masked(gate, optimizer)


@pytest.mark.parametrize("half", [False, True])
def test_an_ordinary_step_does_not_walk_over_masked_blocks(half, monkeypatch):
    model = MLP()
    gates = cc.gates(model, 8)
    prune_(gates.values())
    compiled = torch.compile(model, backend="ctrlprune")
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    walks = []
    monkeypatch.setattr(cc.Gate, "enforce_", walks.append)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = compiled(torch.randn(16, 40)).square().mean()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert not walks
    for gate in gates.values():
        assert_zero_where_masked(gate, optimizer)


def test_the_plain_state_dict_in_the_plain_model_gives_the_same_outputs():
    model = MLP()
    model.compile(backend="ctrlprune", options=OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, optimizer)
    prune_(cc.gates(model).values())
    train(model, optimizer, 2)
    plain = MLP()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(9, 40)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        assert error(model(x), exact) <= 10 * error(plain(x), exact)


def test_a_mask_update_is_never_a_recompile():
    model = MLP()
    compiled = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(compiled, optimizer, 2)
    with torch.no_grad():
        compiled(torch.randn(16, 40))
    gates = cc.gates(model).values()
    before = {group: dict(counters[group]) for group in ("stats", "frames", "inductor", "aot_autograd")}
    assert before["stats"]["unique_graphs"] == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for density in (0.5, 0.0, 0.3, 1.0):
            for gate in gates:
                gate.update_(torch.rand(gate.grid) < density)
                gate.probe_((~gate.mask).flatten().nonzero().flatten()[:1])
            train(compiled, optimizer)
            with torch.no_grad():
                compiled(torch.randn(16, 40))
    assert {group: dict(counters[group]) for group in before} == before


def test_a_mask_update_between_forward_and_backward_is_an_error():
    model = MLP()
    compiled = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    loss = compiled(torch.randn(16, 40)).square().mean()
    prune_(cc.gates(model).values())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_instances_of_a_class_share_code_and_keep_their_own_masks():
    first, second = MLP(), MLP()
    gates = [cc.gates(model, 8) for model in (first, second)]
    compiled = [torch.compile(model, backend="ctrlprune") for model in (first, second)]
    for each in gates:
        prune_(each.values())
    x = torch.randn(16, 40)
    for model, fast, own in zip((first, second), compiled, gates, strict=True):
        torch.testing.assert_close(fast(x), model(x))
        fast(x).square().mean().backward()
        for gate in own.values():
            assert not gate.weight.grad[masked_entries(gate)].any()
            assert gate.weight.grad[~masked_entries(gate)].any()
    assert counters["stats"]["unique_graphs"] == 1


class Activated(nn.Module):
    def __init__(self, activation, inputs, hidden):
        super().__init__()
        self.body, self.activation = MLP(inputs, hidden), activation

    def forward(self, x):
        return self.body.fc2(self.activation(self.body.fc1(x)))


@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
def test_outputs_and_gradients_are_as_exact_as_inductors(activation):
    model = Activated(activation, 52, 75)
    gates = cc.gates(model, (8, 16))
    prune_(gates.values())
    gates["body.fc1.weight"].update_(random_mask(gates["body.fc1.weight"].grid) & (torch.arange(10) != 3)[:, None])
    exact = copy.deepcopy(model).double()
    ours = torch.compile(model, backend="ctrlprune")
    dense = torch.compile(copy.deepcopy(model), backend="inductor")
    for rows in (33, 1):
        base = torch.randn(52, rows)
        grad = torch.randn(rows, 36)
        outputs = []
        for run in (ours, dense, exact):
            kind = torch.float64 if run is exact else torch.float32
            run.zero_grad()
            y = run(base.to(kind).t())  # not contiguous
            y.backward(grad.to(kind))
            outputs.append({"y": y, **{name.removeprefix("_orig_mod."): g for name, g in gradients(run).items()}})
        for name, truth in outputs[2].items():
            mine, theirs = outputs[0][name], outputs[1][name]
            if name in ("body.fc1.weight", "body.fc2.weight"):
                gone = masked_entries(gates[name])
                assert not mine[gone].any()
                mine, theirs, truth = mine[~gone], theirs[~gone], truth[~gone]
            assert error(mine, truth) <= 10 * error(theirs, truth) + 1e-9, f"{name} at {rows} rows"
