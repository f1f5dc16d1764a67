"""Masks of one's own: no controller, only gates that one sets, before training and in the middle of it.

An MLP learns a smooth function of 256 inputs. Its second layer is a band of blocks from the start; its first layer
loses the weaker half of its blocks after 100 steps, in place and without a recompile.

    python examples/static_mask.py

ends with a picture of the band (`█` active, `▒` half, one character per 2 x 1 blocks) and the gates:

                          ▒████████▒
    █▒                      ▒███████
    ███▒                      ▒█████
    Gate('fc1.weight', shape=(1024, 256), block=(32, 32), 128 of 32 x 8 blocks active, density=0.500)
    Gate('fc2.weight', shape=(1024, 1024), block=(32, 32), 288 of 32 x 32 blocks active, density=0.281)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ctrlcompile as cc


class MLP(nn.Module):
    """256 inputs to 1 output through two hidden layers of 1024."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(256, 1024)
        self.fc2 = nn.Linear(1024, 1024)
        self.out = nn.Linear(1024, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


def band(rows: int, columns: int, reach: int) -> Tensor:
    """True where block row and block column are at most `reach` apart, counted along a circle."""
    distance = (torch.arange(rows)[:, None] - torch.arange(columns)[None]).abs()
    return torch.minimum(distance, columns - distance) <= reach


def strongest(gate: cc.Gate, density: float) -> Tensor:
    """True for the blocks whose weights have the largest sum of squares."""
    (rows, columns), (height, width) = gate.grid, gate.block
    strength = gate.weight.detach().square().view(rows, height, columns, width).sum((1, 3))
    return strength > strength.quantile(1 - density)


def main() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(256, 8) / 16
    model = MLP()
    gates = cc.gates(model, block=32, exclude=["out.*"])
    gates["fc2.weight"].update_(band(*gates["fc2.weight"].grid, reach=4))

    model.compile(backend="ctrlprune")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(201):
        x = torch.randn(512, 256)
        loss = F.mse_loss(model(x), (x @ teacher).sin().sum(1, keepdim=True))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 100:
            gates["fc1.weight"].update_(strongest(gates["fc1.weight"], density=0.5))
        if step % 50 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    print(cc.explain(model)(x))
    print(gates["fc2.weight"].picture())
    for gate in gates.values():
        print(gate)


if __name__ == "__main__":
    main()
