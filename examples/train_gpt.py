"""Train a character-level GPT, pruned in blocks while it trains, and compare it with dense training.

python examples/train_gpt.py                    # text that comes with Python; prunes to 0.4 of the dense FLOPs
python examples/train_gpt.py --data FILE        # any text file
python examples/train_gpt.py --compare          # also trains it dense, and a narrower dense one of equal FLOPs

`make demo` compares on 3 layers, 128 characters of context and 120 steps, and ends in:

     run        width  val. loss     FLOPs  of dense  seconds  compile  density
     ───────────────────────────────────────────────────────────────────────────
     ctrlprune    384     2.4059  1.66e+12     0.400     12.1     24.8     0.37
     dense        384     2.4095  4.16e+12     1.000     18.3      6.9     1.00
     narrow       240     2.4189  1.68e+12     0.405      8.8     10.1     1.00

       validation loss in nats per character, standard error 0.024; seconds of
                              training, compiling apart
    log: out/train_gpt.json; picture: out/train_gpt.png
"""

from __future__ import annotations

import argparse
import math
import random
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from comparison import (
    RUNS,
    Run,
    Wording,
    add_options,
    check_options,
    compiled,
    counted_flops,
    narrowest,
    report,
    start_over,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

WORDING = Wording(
    script="train_gpt",
    size="width",
    validation="val. loss",
    caption="validation loss in nats per character",
    title="loss in nats per character: lines for training, smoothed; dots for validation",
    dots=True,
)


@dataclass(frozen=True)
class Shape:
    """The size of a GPT."""

    layers: int
    width: int
    heads: int
    context: int
    symbols: int

    def __str__(self) -> str:
        return str(self.width)


class Block(nn.Module):
    """Causal self-attention and an MLP of four times the width, each on a normalised residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class GPT(nn.Module):
    """tokens [batch, time] and targets [batch, time], int64 -> mean cross-entropy in nats per character."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.symbols, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.symbols, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attention_out.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())


class Data:
    """A text as symbols: the first 90 % train, the last 10 % are held out."""

    def __init__(self, text: str, context: int) -> None:
        self.alphabet = sorted(set(text))
        index = {symbol: i for i, symbol in enumerate(self.alphabet)}
        symbols = torch.tensor([index[symbol] for symbol in text])
        split = int(0.9 * len(symbols))
        self.context = context
        self.train, held_out = symbols[:split], symbols[split:]
        windows = (len(held_out) - 1) // context
        self.validation = held_out[: windows * context].view(windows, context)
        self.validation_targets = held_out[1 : windows * context + 1].view(windows, context)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(self.train) - self.context, (size, 1), generator=generator)
        window = self.train[starts + torch.arange(self.context + 1)]
        return window[:, :-1], window[:, 1:]


def adamw(model: nn.Module, lr: float, steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW, weight decay on matrices only; its rate rises for 5 % of the steps (at least 20), then falls to 10 %."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    warm_up = max(20, steps // 20)

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))

    return optimizer, LambdaLR(optimizer, rate)


@torch.no_grad()
def validation_loss(model: GPT, data: Data, device: str) -> tuple[float, float]:
    """The held-out text's mean loss in nats per character, and its standard error over windows."""
    losses = []
    for tokens, targets in zip(data.validation.split(16), data.validation_targets.split(16), strict=True):
        logits = model.logits(tokens.to(device)).float()
        losses.append(F.cross_entropy(logits.mT, targets.to(device), reduction="none").mean(1))
    loss = torch.cat(losses)
    return loss.mean().item(), loss.std().item() / math.sqrt(len(loss))


def training_flops(shape: Shape, batch: int) -> int:
    """Matrix FLOPs of one dense training step, attention counted in full, as FlopCounterMode counts them."""
    with counted_flops() as counter:
        tokens = torch.zeros(batch, shape.context, dtype=torch.long)
        GPT(shape)(tokens, tokens).backward()
    return counter.get_total_flops()


def narrower(shape: Shape, share: float) -> Shape:
    """The narrowest GPT of the same depth and heads that uses at least `share` of the training FLOPs."""
    step = math.lcm(8, shape.heads)
    shapes = [replace(shape, width=width) for width in range(step, shape.width, step)] + [shape]
    return narrowest(shapes, share, lambda candidate: training_flops(candidate, 1))


def train(name: str, shape: Shape, data: Data, args: argparse.Namespace) -> Run:
    """Trains a GPT from `args.seed`, which fixes the initial weights and the order of the data."""
    start_over(args.seed)
    order = torch.Generator().manual_seed(args.seed)
    batches = (data.batch(args.batch, order) for _ in range(args.steps))
    model = GPT(shape).to(args.device)
    optimizer, schedule = adamw(model, args.lr, args.steps)
    training = compiled(model, name, args.budget, args.steps)

    run, dense_flops = Run(name, shape), training_flops(shape, args.batch)
    for tokens, targets in run.steps(batches, args.steps, optimizer, dense_flops, args.device):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = training(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        run.loss.append(loss.item())
    run.validation, run.validation_error = validation_loss(model, data, args.device)
    return run


def default_text() -> str:
    """English prose that comes with Python: the reference behind `help()`, else the sources of the standard library."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return "".join(source.read_text(encoding="utf-8") for source in sources)[:1_000_000]
    return "\n".join(topics[name] for name in random.Random(0).sample(sorted(topics), len(topics)))


def arguments() -> tuple[argparse.Namespace, str]:
    """The settings, checked, and the text to train on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a text file, UTF-8; default: text that comes with Python")
    sizes = {"layers": 6, "width": 384, "heads": 6, "context": 256, "batch": 8, "steps": 1000}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW, default %(default)s")
    add_options(parser)
    args = parser.parse_args()
    check_options(parser, args, sizes)
    if args.width % args.heads:
        parser.error(f"--width {args.width} does not divide into --heads {args.heads}")
    try:
        text = args.data.read_text(encoding="utf-8") if args.data else default_text()
    except (OSError, UnicodeDecodeError) as problem:
        parser.error(str(problem))
    if len(text) < 20 * args.context:
        parser.error(f"the text has {len(text)} characters; --context {args.context} needs {20 * args.context}")
    return args, text


def main() -> None:
    args, text = arguments()
    data = Data(text, args.context)
    wide = Shape(args.layers, args.width, args.heads, args.context, len(data.alphabet))
    shapes = {"ctrlprune": wide, "dense": wide, "narrow": narrower(wide, args.budget)}
    runs = [train(name, shapes[name], data, args) for name in (RUNS if args.compare else [args.run])]
    report(runs, training_flops(wide, args.batch) * args.steps, args, WORDING)


if __name__ == "__main__":
    main()
