"""A gated model on a GPU, from torch.compile to the controller: right, under autocast, and without waiting for it."""

import math

import pytest
import torch
from torch import nn

import ctrlcompile as cc
from ctrlcompile.kernels import index_lists

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE, BLOCK = "cuda", (64, 32)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(64, 128, 3, padding="same"), nn.Conv2d(128, 128, 3, stride=2, padding=1)
        self.fc = nn.Linear(128, 64)

    def forward(self, x):
        x = x.unflatten(1, (64, 2, 2)).repeat(1, 1, 4, 4)
        return self.fc(self.conv2(nn.functional.relu(self.conv1(x))).mean((2, 3)))


def gated_model(kind, density):
    model = kind().to(DEVICE)
    gates = cc.gates(model, BLOCK)
    for gate in gates.values():
        gate.update_(torch.rand(gate.grid) < density)
    return model, gates, torch.compile(model, backend="ctrlprune")


def error(tensor, exact):
    return ((tensor.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kind", [MLP, ConvNet])
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_and_signals_under_autocast_are_as_good_as_the_dense_models(dtype, density, kind):
    model, gates, run = gated_model(kind, density)
    x = torch.randn(192, 256, device=DEVICE)
    results = []
    for call in (run, model):
        model.zero_grad()
        with torch.autocast(DEVICE, dtype):
            loss = call(x).float().square().sum()
        loss.backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    exact_model = kind().to(DEVICE).double()
    exact_model.load_state_dict(model.state_dict())
    exact_model(x.double()).square().sum().backward()
    for name, ours, dense in zip(dict(model.named_parameters()), *results, strict=True):
        exact = exact_model.get_parameter(name).grad
        if name in gates:
            gate = gates[name]
            entries = index_lists.expand(gate.mask.to(DEVICE), gate.block, ours.shape)
            assert not ours[~entries].any()
            ours, dense, exact = ours[entries], dense[entries], exact[entries]
            weight = exact_model.get_parameter(name)
            products = torch.zeros_like(weight).masked_scatter_(entries, weight[entries] * exact)
            entries_of_blocks = products.flatten(1).view(*gate.shape, -1).sum(2)
            of_blocks = nn.functional.avg_pool2d(entries_of_blocks[None], gate.block)[0] * math.prod(gate.block)
            assert error(gate.signals.grad[0], of_blocks) < 0.05
        assert error(ours, exact) <= 1.1 * error(dense, exact) + 1e-3


def test_a_step_between_decisions_does_not_wait_for_the_device():
    model = MLP().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    controller = cc.Controller(model, budget=0.5, total_steps=200, optimizer=optimizer, block=BLOCK, interval=20)
    run = torch.compile(model, backend="ctrlprune")
    x = torch.randn(128, 256, device=DEVICE)
    for step in range(60):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = run(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        deciding = step < 2 or controller._next <= step + 2
        torch.cuda.set_sync_debug_mode("default" if deciding else "error")
        try:
            controller.step(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert controller.density < 1


def test_fp16_with_a_grad_scaler_lands_on_its_budget():
    model = MLP().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.5, "total_steps": 100, "block": BLOCK})
    scaler = torch.amp.GradScaler(DEVICE)
    x, target = torch.randn(128, 256, device=DEVICE), torch.randn(128, 256, device=DEVICE)
    for _ in range(100):
        with torch.autocast(DEVICE, torch.float16):
            loss = nn.functional.mse_loss(run(x).float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    controller = cc.controller_of(optimizer)
    assert controller.flops_used / controller.flops_dense == pytest.approx(0.5, rel=0.02)


def test_a_run_is_resumed_from_a_checkpoint_that_was_read_onto_the_device(tmp_path):
    def controlled(model):
        optimizer = torch.optim.AdamW(model.parameters())
        controller = cc.Controller(model, budget=0.5, total_steps=20, optimizer=optimizer, block=BLOCK)
        torch._dynamo.reset()
        run = torch.compile(model, backend="ctrlprune")

        def step():
            optimizer.zero_grad()
            run(torch.randn(64, 256, device=DEVICE)).square().mean().backward()
            optimizer.step()
            controller.step()

        return controller, step

    model = MLP().to(DEVICE)
    controller, step = controlled(model)
    for _ in range(10):
        step()
    assert controller.state_dict()["coupling"], "there is something to know"
    torch.save(controller.state_dict(), tmp_path / "state.pt")
    controller.close()
    resumed, step = controlled(model)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", map_location=DEVICE))
    for _ in range(10):
        step()
    assert resumed.flops_used == pytest.approx(0.5 * resumed.flops_dense, rel=0.01)


def test_a_model_that_moves_after_its_gates_were_made_is_an_error():
    model = MLP()
    cc.gates(model, BLOCK)
    run = torch.compile(model.to(DEVICE), backend="ctrlprune")
    with pytest.raises(Exception, match="Move the model before its gates"):
        run(torch.randn(2, 256, device=DEVICE))
