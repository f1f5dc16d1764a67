"""Train a ResNet on images, pruned in blocks while it trains, and compare it with dense training.

python examples/train_cifar.py                  # digits that come with scikit-learn; prunes to 0.4 of the dense FLOPs
python examples/train_cifar.py --data PATH      # CIFAR-10: torchvision's folder, or an .npz of JPEGs (see images.py)
python examples/train_cifar.py --compare        # also trains it dense, and a narrower dense one of equal FLOPs
python examples/train_cifar.py --data PATH --model resnet18 --epochs 20

`python examples/train_cifar.py --compare --epochs 6`, on two cores and with its graphs compiled before, ends in:

     run         channels  accuracy     FLOPs  of dense  seconds  compile  density
     ──────────────────────────────────────────────────────────────────────────────
     ctrlprune  32-64-128    0.9806  6.14e+10     0.400      3.9      4.2     0.38
     dense      32-64-128    0.9861  1.53e+11     1.000      3.7      0.8     1.00
     narrow      20-40-84    0.9778  6.16e+10     0.402      2.4      1.0     1.00

       test accuracy, standard error 0.008; seconds of training, compiling apart
    log: out/train_cifar.json; picture: out/train_cifar.png
"""

from __future__ import annotations

import argparse
import math
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
from images import Images, load
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

# Channels of each stage, residual blocks in a stage, and by how much the stem shrinks the image. For the same FLOPs,
# twice as wide on an image of half the size learns more in short training; the widest loses least by being pruned
# (docs/benchmarks.md).
MODELS = {
    "resnet8": ((32, 64, 128), 1, 1),
    "wide-resnet8": ((64, 128, 256), 1, 2),
    "wider-resnet8": ((128, 256, 512), 1, 2),
    "resnet18": ((64, 128, 256, 512), 2, 1),
}
WORDING = Wording(
    script="train_cifar",
    size="channels",
    validation="accuracy",
    caption="test accuracy",
    title="cross-entropy of the training images, whose labels are smoothed",
    dots=False,
)


@dataclass(frozen=True)
class Shape:
    """The size of a ResNet and of its images."""

    channels: tuple[int, ...]
    depth: int
    image: tuple[int, int, int]
    classes: int
    pool: int = 1

    def __str__(self) -> str:
        return "-".join(map(str, self.channels))


class Block(nn.Module):
    """Two 3x3 convolutions on a residual stream; the first one moves by `stride`."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride > 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """images [batch, channels, height, width] and labels [batch], int64 -> mean cross-entropy, labels smoothed.

    The first stage keeps the size that the stem leaves of the image, each further one halves it.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.channels[0]
        self.stem = nn.Sequential(
            nn.Conv2d(shape.image[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        if shape.pool > 1:
            self.stem.append(nn.MaxPool2d(shape.pool))
        blocks = []
        for stage, outer in enumerate(shape.channels):
            for number in range(shape.depth):
                blocks.append(Block(width, outer, stride=2 if stage and not number else 1))
                width = outer
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, shape.classes)

    def logits(self, images: Tensor) -> Tensor:
        x = self.blocks(self.stem(images))
        return self.head(x.mean((2, 3)))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(images), labels, label_smoothing=0.1)


def sgd(model: nn.Module, lr: float, steps: int) -> tuple[torch.optim.SGD, LambdaLR]:
    """SGD with Nesterov momentum; its rate rises for a fifth of the steps, then falls to 0."""
    weights = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": weights, "weight_decay": 5e-4}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    warm_up = max(1, steps // 5)
    return optimizer, LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
    )


@torch.no_grad()
def accuracy(model: ResNet, data: Images, device: str) -> tuple[float, float]:
    """The share of test images that are recognised, and its standard error."""
    model.eval()
    right = 0
    for images, labels in zip(data.test.split(500), data.test_labels.split(500), strict=True):
        found = model.logits(data.normalised(images).to(device)).argmax(1)
        right += int((found == labels.to(device)).sum())
    share = right / len(data.test)
    return share, math.sqrt(share * (1 - share) / len(data.test))


def training_flops(shape: Shape, batch: int) -> int:
    """Matrix FLOPs of one dense training step, as FlopCounterMode counts them."""
    with counted_flops() as counter:
        images, labels = torch.zeros(batch, *shape.image), torch.zeros(batch, dtype=torch.long)
        ResNet(shape)(images, labels).backward()
    return counter.get_total_flops()


def narrower(shape: Shape, share: float) -> Shape:
    """The narrowest ResNet of about the same proportions that uses at least `share` of the training FLOPs.

    Its channels are multiples of 4, where a CPU's vectors are full.
    """
    last = shape.channels[-1]
    scaled = [tuple(min(c, max(4, round(c * size / last / 4) * 4)) for c in shape.channels) for size in range(4, last)]
    shapes = [replace(shape, channels=channels) for channels in dict.fromkeys(scaled)] + [shape]
    return narrowest(shapes, share, lambda candidate: training_flops(candidate, 1))


def train(name: str, shape: Shape, data: Images, args: argparse.Namespace) -> Run:
    """Trains a ResNet from `args.seed`, which fixes the initial weights, the order of the images and their crops."""
    start_over(args.seed)
    steps = args.epochs * (len(data.train) // args.batch)
    model = ResNet(shape).to(args.device)
    optimizer, schedule = sgd(model, args.lr, steps)
    training = compiled(model, name, args.budget, steps)

    run, dense_flops = Run(name, shape), training_flops(shape, args.batch)
    batches = data.batches(args.batch, args.epochs, args.seed)
    for images, labels in run.steps(batches, steps, optimizer, dense_flops, args.device):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = training(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        run.loss.append(loss.item())
    run.validation, run.validation_error = accuracy(model, data, args.device)
    return run


def stages(text: str) -> tuple[int, ...]:
    """The channels of each stage, from a text like 32-64-128."""
    channels = tuple(int(part) for part in text.split("-"))
    if min(channels) < 1:
        raise ValueError("a stage without channels")
    return channels


def arguments() -> tuple[argparse.Namespace, Images]:
    """The settings, checked, and the images to train on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CIFAR-10, a folder or an .npz; default: scikit-learn's digits")
    parser.add_argument("--model", choices=MODELS, help="default resnet8 for digits, wider-resnet8 for CIFAR-10")
    parser.add_argument("--channels", type=stages, help="of each stage, instead of the model's, such as 32-64-128")
    parser.add_argument("--depth", type=int, help="residual blocks in a stage, instead of the model's")
    for name, default in {"batch": 64, "epochs": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate of SGD, default %(default)s")
    add_options(parser)
    args = parser.parse_args()
    args.model = args.model or ("resnet8" if args.data is None else "wider-resnet8")
    channels, depth, args.pool = MODELS[args.model]
    args.channels, args.depth = args.channels or channels, depth if args.depth is None else args.depth
    check_options(parser, args, ("batch", "epochs", "depth"))
    try:
        data = load(args.data)
    except (OSError, ValueError) as problem:
        parser.error(str(problem))
    except ImportError as missing:
        parser.error(f"{missing}; pip install 'ctrlcompile[examples]' brings it")
    if len(data.train) < args.batch:
        parser.error(f"--batch is {args.batch}; there are {len(data.train)} images to train on")
    return args, data


def main() -> None:
    args, data = arguments()
    height, width, channels = data.train.shape[1:]
    wide = Shape(args.channels, args.depth, (channels, height, width), data.classes, args.pool)
    shapes = {"ctrlprune": wide, "dense": wide, "narrow": narrower(wide, args.budget)}
    runs = [train(name, shapes[name], data, args) for name in (RUNS if args.compare else [args.run])]
    report(runs, training_flops(wide, args.batch) * len(runs[0].loss), args, WORDING)


if __name__ == "__main__":
    main()
