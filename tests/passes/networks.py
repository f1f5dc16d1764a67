"""Small networks of the families whose layers are coupled in different ways, as plain PyTorch writes them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution with batch norm."""
    padding = size // 2
    layer = nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """A basic block (two convolutions) or a bottleneck (three), with a downsample where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, bottleneck: bool = False) -> None:
        super().__init__()
        hidden = outputs // 2 if bottleneck else outputs
        self.first = conv(inputs, hidden, 1) if bottleneck else conv(inputs, hidden, 3, stride)
        self.middle = conv(hidden, hidden, 3, stride) if bottleneck else None
        self.last = conv(hidden, outputs, 1 if bottleneck else 3)
        self.downsample = conv(inputs, outputs, 1, stride) if (stride, inputs) != (1, outputs) else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.first(x))
        if self.middle is not None:
            out = self.relu(self.middle(out))
        out = self.last(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Three residual blocks and a classifier of one hidden layer."""

    def __init__(self, bottleneck: bool = False) -> None:
        super().__init__()
        self.stem, self.relu, self.pool = conv(3, 10, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(
            Residual(10, 10, 1, bottleneck), Residual(10, 14, 2, bottleneck), Residual(14, 14, 1, bottleneck)
        )
        self.average, self.hidden, self.head = nn.AdaptiveAvgPool2d((2, 2)), nn.Linear(56, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.relu(self.stem(x))))
        x = torch.flatten(self.average(x), 1)
        return self.head(F.dropout(F.relu(self.hidden(x)), 0.5, self.training))


class DenseNet(nn.Module):
    """Layers that each see all that came before, a transition, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Conv2d(c, 5, 3, padding=1)) for c in (7, 12, 17)
        )
        self.transition = nn.Sequential(nn.BatchNorm2d(22), nn.ReLU(), nn.Conv2d(22, 11, 1), nn.AvgPool2d(2))
        self.norm, self.head = nn.BatchNorm2d(11), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = F.relu(self.norm(self.transition(torch.cat(features, 1))))
        return self.head(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class Mixer(nn.Module):
    """Two layers of token mixing and channel mixing over patches."""

    def __init__(self, tokens: int = 9, width: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.tokens = nn.ModuleList(self.mlp(tokens, 11) for _ in range(2))
        self.channels = nn.ModuleList(self.mlp(width, 13) for _ in range(2))
        self.head = nn.Linear(width, 5)

    @staticmethod
    def mlp(width: int, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for i, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + tokens(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x).mean(dim=1))


class Attention(nn.Module):
    """Causal attention; one product makes queries, keys and values, or three do."""

    def __init__(self, width: int, heads: int, together: bool, layer: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.heads, self.together = heads, together
        self.inputs = nn.ModuleList(layer(width, width * (3 if together else 1)) for _ in range(1 if together else 3))
        self.output = layer(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.inputs[0](x).split(width, dim=2) if self.together else (layer(x) for layer in self.inputs)
        q, k, v = (t.view(batch, time, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(y.transpose(1, 2).contiguous().view(batch, time, width))


class Transformer(nn.Module):
    """Two pre-norm layers over tokens, of linears or of `Conv1D`; `recompute` checkpoints each of them."""

    def __init__(
        self, together: bool = True, recompute: bool = False, width: int = 12, layer: type[nn.Module] = nn.Linear
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding, self.position = nn.Embedding(20, width), nn.Parameter(torch.randn(7, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.attention = nn.ModuleList(Attention(width, 3, together, layer) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(layer(width, 22), nn.GELU(), layer(22, width)) for _ in range(2))
        self.head = nn.Linear(width, 20)

    def layer(self, x: Tensor, i: int) -> Tensor:
        x = x + self.attention[i](self.norms[2 * i](x))
        return x + self.mlps[i](self.norms[2 * i + 1](x))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for i in range(2):
            x = checkpoint(self.layer, x, i, use_reentrant=False) if self.recompute else self.layer(x, i)
        return self.head(self.norms[4](x))
