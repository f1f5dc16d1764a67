"""Coupled layers: which blocks are useless, what a block's going frees, and pairs that go and come back together."""

import itertools
import random

import pytest
import torch

from ctrlcompile.controller import Controller, decide
from ctrlcompile.controller.coupling import Coupling, Lattice, Sets
from ctrlcompile.controller.layout import Layout

from .plant import FakeGate, Plant, chained
from .test_checkpoint import same, through_a_file


def random_members(targets, members):
    """For each target None, nothing, or a few members."""
    some = [frozenset(random.sample(range(members), random.randint(0, 3))) for _ in range(max(2, targets // 2))]
    return [None if random.random() < 0.2 else random.choice(some) for _ in range(targets)]


def lines(gate):
    """How many rows of outputs and columns of inputs."""
    return gate.grid[::-1] if gate.transposed else gate.grid


def random_lattice():
    gates = [FakeGate(f"g{i}", (8 * random.randint(2, 6), 8 * random.randint(2, 6)), (8, 8)) for i in range(3)]
    for gate in gates:
        gate.normalised, gate.transposed = random.random() < 0.5, random.random() < 0.5
    grids = [lines(gate) for gate in gates]
    rows, columns = (sum(side) for side in zip(*grids, strict=True))
    feeds, reads = random_members(columns, rows), random_members(rows, columns)
    coupling = Coupling(*zip(*grids, strict=True), Sets.from_members(feeds), Sets.from_members(reads))
    lattice = Lattice(gates, Layout.of(gates))
    lattice.learn([(coupling, tuple(gates))])
    return gates, lattice, feeds, reads


def places(gates):
    """Row and column of every block, numbered through."""
    rows, columns, found = 0, 0, []
    for gate in gates:
        for r, c in itertools.product(*map(range, gate.grid)):
            found.append((rows + c, columns + r) if gate.transposed else (rows + r, columns + c))
        rows, columns = rows + lines(gate)[0], columns + lines(gate)[1]
    return found


def test_rows_are_outputs_whichever_way_a_weight_is_stored():
    shapes = [(8 * random.randint(1, 6) - 3, 8 * random.randint(1, 6)) for _ in range(3)]
    plain, stored = ([FakeGate(f"g{i}", shape, (8, 8)) for i, shape in enumerate(shapes)] for _ in range(2))
    for i in random.sample(range(3), 2):
        stored[i] = FakeGate(f"g{i}", shapes[i][::-1], (8, 8))
        stored[i].transposed = True
    one, other = Layout.of(plain), Layout.of(stored)
    for name in ("row_of", "column_of", "area"):
        for gate, expected, found in zip(stored, *(at.split(getattr(at, name)) for at in (one, other)), strict=True):
            grid = found.view(gate.grid)
            assert torch.equal((grid.t() if gate.transposed else grid).flatten(), expected)


def test_useless_blocks_and_what_a_block_frees_are_what_the_definitions_say():
    for _ in range(30):
        gates, lattice, feeds, reads = random_lattice()
        assert lattice.coupling.feeds.to_members() == feeds
        assert lattice.coupling.reads.to_members() == reads
        at = places(gates)
        active = torch.rand(len(at)) < random.choice((0.1, 0.2, 0.4))
        cost, benefit = torch.rand(len(at), dtype=torch.float64), torch.rand(len(at))
        alive = [(row, column) for (row, column), on in zip(at, active.tolist(), strict=True) if on]
        rows, columns = [row for row, _ in alive], [column for _, column in alive]

        def dead(members, living):
            return bool(members) and not any(member in living for member in members)

        normalised = [gate.normalised for gate in gates for _ in range(lines(gate)[0])]
        varies = {row for row, column in alive if not dead(feeds[column], rows)}
        gone = [known and row not in varies for row, known in enumerate(normalised)]

        weighed = lattice.weigh(benefit, active, cost)
        useless = lattice.useless(active)
        for block, (row, column) in enumerate(at):
            asleep = column not in columns
            for_good = bool(feeds[column]) and all(gone[member] for member in feeds[column])
            expected = dead(reads[row], columns) or (dead(feeds[column], rows) and not asleep) or for_good
            assert bool(useless[block]) is expected
            if expected or gone[row]:
                assert weighed[block] == 0
                continue
            frees = 0.0
            if active[block]:
                for other, (r, c) in enumerate(at):
                    if not active[other]:
                        continue
                    if rows.count(row) == 1 and feeds[c] and set(feeds[c]) & set(rows) == {row}:
                        frees += float(cost[other])
                    if columns.count(column) == 1 and reads[r] and set(reads[r]) & set(columns) == {column}:
                        frees += float(cost[other])
            share = float(cost[block]) / (float(cost[block]) + frees)
            assert float(weighed[block]) == pytest.approx(float(benefit[block]) * share, rel=1e-5)


def test_what_several_graphs_say_of_the_same_gates_is_joined():
    first, second = (FakeGate(name, (16, 16), (8, 8)) for name in "ab")
    stranger = FakeGate("c", (16, 16), (8, 8))
    lattice = Lattice([first, second], Layout.of([first, second]))
    lattice.learn([chained([first, second])])
    assert lattice.coupling.reads.to_members() == [frozenset({2}), frozenset({3}), None, None]
    before = lattice.fingerprint
    lattice.learn([chained([first, second])])
    assert lattice.fingerprint == before, "the same again is nothing new"
    lattice.learn([chained([second, first])])  # the two the other way round
    assert lattice.coupling.reads.to_members() == [None, None, None, None]
    assert lattice.coupling.feeds.to_members() == [None, None, None, None]

    lattice = Lattice([first, second], Layout.of([first, second]))
    lattice.learn([chained([first, stranger, second])])
    assert lattice.coupling.reads.to_members() == [None, None, None, None], "another controller's gate reads them"


def coupled_plant(seed, coupled=True, steps=400, budget=0.5):
    """Two layers; the units of two block rows of the first become useless, while the second still asks for them."""
    plant = Plant([(96, 64), (64, 96)], block=(8, 8), noise=0.3, spread=0.5, seed=seed)
    if coupled:
        plant.meter.coupled = (chained(list(plant.gates.values())),)
    return plant, Controller(plant.gates, plant.meter, budget, steps)


def run(plant, controller, steps):
    for _ in range(steps):
        plant.train_step()
        controller.step()


def test_the_columns_of_dead_rows_go_and_rows_that_nobody_reads():
    for coupled in (True, False):
        plant, controller = coupled_plant(random.randrange(2**31), coupled)
        first, second = plant.gates.values()
        hidden = slice(2, 4)
        plant.useful[0][hidden] *= 1e-4
        plant.useful[1][:, hidden] *= 5
        plant.useful[0][8:10] *= 5
        plant.useful[1][:, 8:10] *= 1e-4
        run(plant, controller, 400)
        assert not first.mask[hidden].any()
        assert not second.mask[:, 8:10].any()
        if coupled:
            assert not first.mask[8:10].any()
            assert second.mask[:, hidden].sum() <= 2, "but for what is being tried whether the pair comes back"
        else:
            assert second.mask[:, hidden].all()
            assert first.mask[8:10].all()
        assert controller.flops_used / controller.flops_dense == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("constant", [0.5, 0.0])
def test_a_dead_pair_comes_back_together_if_the_constant_of_its_channels_gives_it_a_gradient(constant, monkeypatch):
    """As in a real model: rows that nobody reads have no gradient; columns of dead rows have that of a constant."""
    monkeypatch.setattr(decide, "LIFE", 100)
    plant, controller = coupled_plant(random.randrange(2**31), steps=800)
    first, second = plant.gates.values()
    hidden = slice(2, 5)
    useful = [u.clone() for u in plant.useful]
    useful[0][hidden] *= 1e-4
    seen = []
    for step in range(800):
        if step == 250:
            useful[0][hidden] *= 1e5
            useful[1][:, hidden] *= 10
        plant.useful = [
            useful[0] * second.mask.any(0)[:, None],
            useful[1] * torch.where(first.mask.any(1), 1.0, constant),
        ]
        plant.train_step()
        controller.step()
        seen.append((int(first.mask[hidden].sum()), int(second.mask[:, hidden].sum())))
    assert seen[249][0] == 0
    if constant:
        rows_at, columns_at = (next(step for step in range(250, 800) if seen[step][side]) for side in (0, 1))
        assert columns_at < rows_at, "the column leads"
        assert min(seen[-1]) > first.mask[hidden].numel() / 2
    else:
        assert set(seen[249:]) == {(0, 0)}


def test_a_resumed_run_knows_the_coupling_and_makes_the_same_decisions():
    seed, cut = random.randrange(2**31), random.randrange(1, 390)
    plant, controller = coupled_plant(seed)
    run(plant, controller, cut)
    state = through_a_file(controller.state_dict())
    resumed_plant, resumed = coupled_plant(seed)
    resumed.load_state_dict(state)
    assert same(resumed.state_dict(), state)
    resumed_plant.generator.set_state(plant.generator.get_state())
    resumed_plant.step = plant.step
    run(plant, controller, 400 - cut)
    run(resumed_plant, resumed, 400 - cut)
    assert same(resumed.state_dict(), controller.state_dict()), f"saved at step {cut}"


def test_a_state_with_damaged_coupling_is_refused():
    plant, controller = coupled_plant(random.randrange(2**31))
    run(plant, controller, 50)
    state = controller.state_dict()
    state["coupling"][0] = state["coupling"][0][1:]
    with pytest.raises(ValueError, match="'coupling' is damaged"):
        controller.load_state_dict(state)
