"""Which rows feed which columns: exactly what brute force finds on the usual families, and never less on any graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ..small_models import Conv1D
from .brute_force import Found, Graph
from .networks import DenseNet, Mixer, ResNet, Transformer


def images():
    return torch.randn(2, 3, 12, 12, dtype=torch.float64)


def tokens():
    return torch.randint(20, (3, 7))


def covers(claimed: Found, true: Found) -> bool:
    """Whether every true member is claimed."""
    return all(c is None or (t is not None and t <= c) for c, t in zip(claimed, true, strict=True))


@pytest.mark.parametrize(
    ("model", "draw"),
    [
        (lambda: ResNet(), images),
        (lambda: ResNet(bottleneck=True), images),
        (DenseNet, images),
        (Mixer, images),
        (lambda: Transformer(together=True), tokens),
        (lambda: Transformer(together=False), tokens),
        (lambda: Transformer(recompute=True), tokens),
        (lambda: Transformer(layer=Conv1D), tokens),
        (lambda: Transformer(together=False, recompute=True, layer=Conv1D), tokens),
    ],
    ids=[
        "resnet",
        "bottleneck",
        "densenet",
        "mixer",
        "transformer",
        "transformer_qkv",
        "transformer_checkpoint",
        "gpt2",
        "gpt2_qkv_checkpoint",
    ],
)
def test_feeders_and_readers_are_exactly_those_that_brute_force_finds(model, draw):
    graph = Graph(model(), draw)
    assert graph.coupling is not None
    assert graph.coupling.feeds.to_members() == graph.feeders()
    assert graph.coupling.reads.to_members() == graph.readers()


class Chain(nn.Module):
    """Two products with something between."""

    def __init__(self, first: nn.Module, second: nn.Module, between) -> None:
        super().__init__()
        self.first, self.second, self.between = first, second, between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def shuffled(x):
    n, c, h, w = x.shape
    return x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)


def written_through_a_view(x):
    x = x * 1
    half = x[:, :6]
    half += x[:, 6:]
    return x


def read_after_it_was_written(x):
    y = x.clone()
    kept = y.view(y.shape)
    y[:, :3] = x[:, 9:]
    return kept


def zero_padded_shortcut(x):
    return F.pad(x[:, :8, ::2, ::2], (0, 0, 0, 0, 2, 2)) + F.avg_pool2d(x, 2)


def rms_norm(x):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def attention(x):
    x = x.flatten(2).transpose(1, 2)
    weights = torch.softmax(x @ x.transpose(-2, -1), dim=-1)
    return (weights @ x).transpose(1, 2).unflatten(2, (12, 12))


def grouped_queries(x):
    x = x.flatten(2).transpose(1, 2).unflatten(2, (6, 2)).transpose(1, 2)
    q, k = x[:, :4], x[:, 4:]
    y = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    return F.pad(y.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (12, 12)), (0, 0, 0, 0, 0, 4))


IMAGE_CHAINS = {
    "squeeze_excite": (12, lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True))),
    "channel_shuffle": (12, shuffled),
    "written_through_a_view": (12, written_through_a_view),
    "read_after_it_was_written": (12, read_after_it_was_written),
    "gated_unit": (6, lambda x: F.glu(x, 1)),
    "swiglu": (6, lambda x: F.silu(x[:, :6]) * x[:, 6:]),
    "zero_padded_shortcut": (12, zero_padded_shortcut),
    "softmax_over_channels": (12, lambda x: x.softmax(1)),
    "rms_norm": (12, rms_norm),
    "group_norm": (12, lambda x: F.group_norm(x, 3)),
    "instance_norm": (12, lambda x: F.instance_norm(x)),
    "pixel_shuffle": (3, lambda x: F.pixel_shuffle(x, 2)),
    "interpolated": (12, lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "rolled": (12, lambda x: x.roll((1, 2), (2, 3))),
    "rolled_channels": (12, lambda x: x.roll(1, 1)),
    "sorted_channels": (12, lambda x: x.sort(1).values),
    "flipped": (12, lambda x: x.flip(2, 1)),
    "split_by_name": (6, lambda x: torch.mul(*x.split(split_size=6, dim=1))),
    "concatenated_along_an_axis": (12, lambda x: torch.cat((x[:, 8:], x[:, :8]), axis=1)),
    "concatenated_with_nothing": (12, lambda x: torch.cat((x.new_empty(0), x), 2)),
    "stacked": (12, lambda x: torch.stack((x[:, ::2], x[:, 1::2]), 2).flatten(1, 2)),
    "indexed": (12, lambda x: x[:, [3, 1, 2, 0, 4, 5, 6, 7, 8, 9, 10, 11]]),
    "unbound": (12, lambda x: torch.stack(x.unbind(1)[::-1], 1)),
    "attention": (12, attention),
    "grouped_queries": (12, grouped_queries),
    "einsum": (12, lambda x: torch.einsum("nchw,ndhw->ndhw", x, x)),
    "maximum": (12, lambda x: torch.maximum(x[:, :6], x[:, 6:]).repeat(1, 2, 1, 1)),
    "position": (12, lambda x: x + torch.arange(12.0, dtype=torch.float64)),
    "mean_where_negative": (12, lambda x: torch.where(x > 0, x, x.mean((0, 2, 3), keepdim=True))),
    "data_dependent_number": (12, lambda x: x * x.new_ones(1).cumsum(0)),
    "out_argument": (12, lambda x: torch.add(x, x.flip(1), out=torch.empty_like(x))),
}
# Where what feeds and reads is exactly as brute force finds it; elsewhere it may be more.
EXACT = [
    "squeeze_excite",
    "channel_shuffle",
    "gated_unit",
    "swiglu",
    "zero_padded_shortcut",
    "softmax_over_channels",
    "rms_norm",
    "group_norm",
    "instance_norm",
    "interpolated",
    "flipped",
    "split_by_name",
    "concatenated_along_an_axis",
    "concatenated_with_nothing",
    "stacked",
    "rolled",
]


@pytest.mark.parametrize("name", IMAGE_CHAINS)
def test_nothing_that_feeds_or_reads_is_missed_whatever_lies_between(name):
    channels, between = IMAGE_CHAINS[name]
    graph = Graph(Chain(nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(channels, 6, 1), between), images)
    if graph.coupling is not None:
        assert covers(graph.coupling.feeds.to_members(), graph.feeders())
        assert covers(graph.coupling.reads.to_members(), graph.readers())
    if name in EXACT:
        assert graph.coupling.feeds.to_members() == graph.feeders()
        assert graph.coupling.reads.to_members() == graph.readers()


def test_products_without_a_gate_mix_what_their_groups_read():
    for dense in (nn.Conv2d(12, 24, 3, groups=12), nn.Conv2d(12, 6, 3, groups=3), nn.ConvTranspose2d(12, 6, 2, 2)):
        outputs = dense.out_channels
        model = Chain(nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(outputs, 6, 1), nn.Sequential(dense, nn.ReLU6()))
        graph = Graph(model, images, dense="between")
        assert len(graph.layers) == 2
        assert graph.coupling.feeds.to_members() == graph.feeders()
        assert graph.coupling.reads.to_members() == graph.readers()


def test_a_column_of_a_grouped_convolution_is_fed_by_what_feeds_it_in_any_group():
    model = Chain(nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 3, groups=2), nn.BatchNorm2d(12))
    graph = Graph(model, images)
    assert graph.coupling.feeds.to_members() == graph.feeders()
    assert graph.coupling.reads.to_members() == graph.readers()


def test_a_batch_of_any_size_changes_nothing():
    graph = Graph(Transformer(), tokens, dynamic=True)
    assert any(isinstance(argument, int) for argument in graph.arguments), "sizes are symbols"
    assert covers(graph.coupling.feeds.to_members(), graph.feeders())
    assert graph.coupling.reads.to_members() == graph.readers()


def test_a_norm_over_dimensions_of_dynamic_size_mixes_them():
    model = Chain(nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 6, 1), lambda x: F.layer_norm(x, x.shape[1:]))
    graph = Graph(model, images, dynamic=True)
    assert graph.coupling is not None
    assert covers(graph.coupling.feeds.to_members(), graph.feeders())
    assert covers(graph.coupling.reads.to_members(), graph.readers())


def test_two_uses_of_one_weight_feed_and_read_together():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.last = nn.Linear(12, 12), nn.Linear(12, 8)

        def forward(self, x):
            return self.last(torch.tanh(self.shared(torch.relu(self.shared(x)))))

    graph = Graph(Twice(), lambda: torch.randn(5, 12, dtype=torch.float64))
    assert len(graph.layers) == 3
    assert graph.coupling.feeds.to_members() == graph.feeders()
    assert graph.coupling.reads.to_members() == graph.readers()


class Products(nn.Module):
    """Two linears and two weights stored [in, out], put together by `body`."""

    def __init__(self, body):
        super().__init__()
        self.body, self.first, self.last = body, nn.Linear(10, 12), nn.Linear(14, 8)
        self.one, self.other = nn.Parameter(torch.randn(12, 14)), nn.Parameter(torch.randn(10, 14))
        self.place = nn.Parameter(torch.randn(5, 14))

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.last(torch.tanh(self.body(x, hidden, self.one, self.other, self.place)))


@pytest.mark.parametrize(
    "body",
    [
        lambda x, hidden, one, other, place: hidden @ one + x.matmul(other),
        lambda x, hidden, one, other, place: torch.addmm(torch.mm(x, other), hidden, one),
        lambda x, hidden, one, other, place: torch.addmm(torch.relu(x @ other)[:, :1], hidden, one),
        lambda x, hidden, one, other, place: torch.addmm(place[:1], hidden, one),
    ],
    ids=["sum", "sum_in_one", "one_channel_for_all", "bias"],
)
def test_what_a_product_adds_feeds_beside_it(body):
    graph = Graph(Products(body), lambda: torch.randn(5, 10, dtype=torch.float64))
    assert graph.coupling.reads.to_members() == graph.readers()
    assert graph.coupling.feeds.to_members() == graph.feeders()


def test_a_position_that_a_product_adds_is_a_feature_that_no_gate_switches():
    def body(x, hidden, one, other, place):
        return torch.addmm(place, hidden, one)

    graph = Graph(Products(body), lambda: torch.randn(5, 10, dtype=torch.float64))
    assert graph.coupling.reads.to_members() == graph.readers()
    *_, last = graph.layers.values()
    feeds = zip(graph.columns, graph.coupling.feeds.to_members(), strict=True)
    assert all(members is None for (weight, _), members in feeds if weight == last[0])


def test_an_output_that_leaves_the_graph_is_read_by_others():
    class Peek(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            hidden = self.first(x)
            return self.second(F.relu(hidden)), hidden[:, :6]

    model = Peek()
    graph = Graph(model, lambda: torch.randn(5, 8, dtype=torch.float64))
    assert graph.coupling.reads.to_members() == graph.readers()
    assert None in graph.coupling.reads.to_members()[: -(-12 // graph.layers[next(iter(graph.layers))][1][0])]


def test_layers_side_by_side_are_not_coupled():
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 12), nn.Linear(8, 12)

        def forward(self, x):
            return self.first(x) + self.second(x)

    assert Graph(Side(), lambda: torch.randn(5, 8, dtype=torch.float64)).coupling is None
