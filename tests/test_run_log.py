"""A run's log: what was decided can be read back, whatever happened to the process, the file or the disk."""

import json
import math
import random
import resource
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ctrlcompile import run_log
from ctrlcompile.controller import Controller
from ctrlcompile.inspect.run import read
from ctrlcompile.proposals import Outcome

from .controller.plant import Plant

SHAPES = [(96, 96), (64, 100), (48, 40)]
STEPS = 150


class Logged:
    """A simulated run with a log; `masks` are those after each record of the history."""

    def __init__(self, folder: Path, seed: int, *, budget: float = 0.4, shapes=SHAPES) -> None:
        self.plant = Plant(shapes, seed=seed, noise=1.0)
        self.controller = Controller(self.plant.gates, self.plant.meter, budget, STEPS)
        self.controller.log = run_log.start(folder, self.controller)
        self.masks: list[dict[str, torch.Tensor]] = []

    def train(self, steps: int) -> "Logged":
        for _ in range(steps):
            self.plant.train_step()
            before = len(self.controller.history)
            self.controller.step(random.random())
            if len(self.controller.history) > before:
                self.masks.append({name: gate.mask for name, gate in self.plant.gates.items()})
        return self


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / run_log.FILE).read_text().splitlines() if line]


def assert_tells(run, history, masks) -> None:
    """The run read back has these records and, after each of them, these masks."""
    assert [{"step": made.step, **made.values} for made in run.decisions] == history
    for name in run.gates:
        known = run.masks(name, range(len(history)))
        assert all(torch.equal(mask, mine[name]) for mask, mine in zip(known, masks, strict=True))


def test_every_record_and_every_mask_is_read_back(tmp_path, seed):
    logged = Logged(tmp_path, seed).train(STEPS)
    run = read(tmp_path)
    assert_tells(run, logged.controller.history, logged.masks)
    assert run.steps[-1] == STEPS
    assert run.unread == 0
    assert run.gates["layer1"] == {"shape": (64, 100), "block": (8, 8), "grid": (8, 13)}
    for name, line in run.densities().items():
        assert line == pytest.approx([float(masks[name].float().mean()) for masks in logged.masks])
    assert run.sums("reactivated")[-1] == logged.controller.reactivations > 0
    seconds = [decision.seconds for decision in run.decisions]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0 < seconds[-1]
    (process,) = run.processes
    assert process["settings"] == {"budget": 0.4, "total_steps": STEPS, "interval": logged.controller.interval}
    assert process["versions"]["torch"] == torch.__version__
    assert process["command"] == shlex.join(sys.orig_argv)


def some_outcome() -> Outcome:
    density, gain, saved, cost, measured, error = (random.random() for _ in range(6))
    return Outcome(
        random.choice(["forward", "dgrad"]), density, "block-sparse", random.choice(["dense", "coarse 16x16"]), gain,
        saved, cost, random.choice([measured, None, math.nan]), random.random() < 0.5, random.choice([None, error]),
        random.choice(["", "no c++"]),
    )  # fmt: skip


def respecialise(logged: Logged, steps: int, started: int = 0) -> list[tuple[int, str, str]]:
    """Trains on, with an outcome at some of the steps: those, as text."""
    told = []
    for step in range(started + 1, started + steps + 1):
        before_the_decision = random.random() < 0.5
        outcome, (name, gate) = some_outcome(), random.choice(list(logged.plant.gates.items()))
        for now in (True, False):
            if now is before_the_decision and (step % 3 == 0 or step % logged.controller.interval == 0):
                logged.controller.log.respecialized(step, gate, outcome)
                told.append((step, name, str(outcome)))
            if now:
                logged.train(1)
    return told


def told_by(run) -> list[tuple[int, str, str]]:
    return [(became.step, became.gate, str(became.outcome)) for became in run.respecialised]


def test_what_became_of_variants_is_read_back_and_what_a_resumed_run_repeats_counts_once(tmp_path, seed):
    first = Logged(tmp_path, seed)
    first.train(2)
    told = respecialise(first, 58, 2)
    assert told_by(read(tmp_path)) == told
    state, generator = first.controller.state_dict(), first.plant.generator.get_state()
    told += respecialise(first, 45, 60)
    first.controller.close()
    resumed = Logged(tmp_path, seed)
    resumed.controller.load_state_dict(state)
    resumed.plant.generator.set_state(generator)
    resumed.plant.step = 60
    while resumed.controller.log._began is None:  # what comes before its first decision is not told
        resumed.train(1)
    since = resumed.controller.steps
    told = [became for became in told if became[0] < since] + respecialise(resumed, STEPS - since, since)
    run = read(tmp_path)
    assert told_by(run) == told
    assert all(0 <= became.seconds <= run.decisions[-1].seconds for became in run.respecialised if became.step < STEPS)
    assert run.unread == 0


def test_a_log_without_variants_or_with_a_torn_or_damaged_one_still_reads(tmp_path, seed):
    logged = Logged(tmp_path, seed).train(20)
    assert read(tmp_path).respecialised == ()
    logged.controller.log.respecialized(20, next(iter(logged.plant.gates.values())), some_outcome())
    path = tmp_path / run_log.FILE
    line = path.read_text().splitlines()[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[: -random.randrange(2, len(line))])
    run = read(tmp_path)
    assert (run.respecialised, run.unread) == ((), 1)
    for damage in ({"role": None, "density": "dense"}, {"gain": None}, {"measured": []}, {"step": {}}):
        path.write_bytes(whole + (json.dumps(json.loads(line) | damage) + "\n").encode())
        run = read(tmp_path)
        assert (len(run.respecialised), run.unread) == (1, 1)
        assert_tells(run, logged.controller.history, logged.masks)


def test_only_masks_that_changed_are_written(tmp_path, seed):
    logged = Logged(tmp_path, seed).train(STEPS)
    written = [set(line["masks"]) for line in lines(tmp_path) if line["kind"] == "decision"]
    assert written[0] == set(logged.plant.gates)
    for before, after, names in zip(logged.masks, logged.masks[1:], written[1:], strict=False):
        assert names == {name for name, mask in after.items() if not torch.equal(mask, before[name])}


def test_a_mask_of_any_size_survives_the_packing():
    for _ in range(20):
        grid = (random.randint(1, 40), random.randint(1, 40))
        mask = torch.rand(grid) < random.random()
        packed = run_log.pack(mask)
        assert torch.equal(run_log.unpack(packed, grid), mask)
        assert len(packed) <= 4 * -(-mask.numel() // 24)
        with pytest.raises(ValueError, match="bytes"):
            run_log.unpack(packed, (grid[0] + 8, grid[1]))


def test_a_resumed_run_goes_on_in_its_log_and_what_it_repeats_counts_once(tmp_path, seed):
    first = Logged(tmp_path, seed).train(60)
    state, masks, generator = first.controller.state_dict(), list(first.masks), first.plant.generator.get_state()
    first.train(45)
    first.controller.close()
    resumed = Logged(tmp_path, seed)
    resumed.controller.load_state_dict(state)
    resumed.plant.generator.set_state(generator)
    resumed.plant.step, resumed.masks = 60, masks
    resumed.train(STEPS - 60)
    run = read(tmp_path)
    assert_tells(run, resumed.controller.history, resumed.masks)
    assert len(run.processes) == 2
    seconds = [decision.seconds for decision in run.decisions]
    assert seconds == sorted(seconds)


def test_a_log_cut_anywhere_tells_what_is_left_and_is_gone_on_with(tmp_path, seed):
    logged = Logged(tmp_path, seed).train(STEPS)
    logged.controller.close()
    path = tmp_path / run_log.FILE
    whole = path.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for _ in range(8):
        cut = random.randrange(ends[1] + 2, len(whole) - 1)
        path.write_bytes(whole[:cut])
        run = read(tmp_path)
        left = sum(end <= cut for end in ends) - 1  # a line without its end is whole, too
        assert_tells(run, logged.controller.history[:left], logged.masks[:left])
        assert run.gates.keys() == logged.plant.gates.keys()
        assert run.unread == (whole[cut - 1 : cut] != b"\n" and cut not in ends)
    again = Logged(tmp_path, seed).train(STEPS)
    run = read(tmp_path)
    assert_tells(run, again.controller.history, again.masks)
    assert run.unread <= 1


def test_lines_that_are_no_log_are_counted_and_left_out(tmp_path, seed):
    logged = Logged(tmp_path, seed).train(STEPS)
    path = tmp_path / run_log.FILE
    found = path.read_text().splitlines()
    looped = {"name": "a", "operator": "b", "module": "", "shape": "", "sources": ["a"]}
    foreign = [
        "garbage", '{"kind": "decision"}', '{"kind": "weather", "step": 3}', "[1, 2]", '{"step": 1}', "\x00\xff",
        '{"kind": "run", "gates": 3}', json.dumps({"kind": "graph", "nodes": [looped], "gates": {}}),
    ]  # fmt: skip
    damaged = {"step": 70, "seconds": 1.0, "masks": {"layer0": "AAAA"}, "kind": "decision"}
    for line in (*foreign, json.dumps(damaged)):
        found.insert(random.randrange(1, len(found) + 1), line)
    path.write_text("\n".join(found))
    run = read(tmp_path)
    assert_tells(run, logged.controller.history, logged.masks)
    assert run.unread == len(foreign) + 1


def test_without_its_first_line_a_log_still_tells_the_numbers(tmp_path, seed):
    logged = Logged(tmp_path, seed).train(STEPS)
    path = tmp_path / run_log.FILE
    path.write_text(path.read_text().replace('"kind": "run"', '"kind": run"', 1))
    run = read(tmp_path)
    assert run.steps == [record["step"] for record in logged.controller.history]
    assert run.densities() == run.gates == {}
    assert run.unread == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"holds no log\.jsonl: train with options=.*'log': '.*'"),
        ("", "holds no decision of a run yet"),
        ("cat\ndog\n", "holds no decision of a run, only lines that are no log"),
    ],
)
def test_a_folder_without_a_run_says_so(tmp_path, content, message):
    if content is not None:
        (tmp_path / run_log.FILE).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, seed):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / run_log.FILE).mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "taken"):
        with pytest.raises(ValueError, match=f"log: cannot be written, {folder.parent}"):
            Logged(folder, seed)
    with pytest.raises(TypeError, match=r"log is the folder.*got 3"):
        Logged(3, seed)


def test_another_runs_log_or_another_file_is_left_alone(tmp_path, seed):
    first = Logged(tmp_path, seed).train(20)
    first.controller.close()
    before = (tmp_path / run_log.FILE).read_bytes()
    with pytest.raises(ValueError, match=r"is of another run: it differs in budget; .* use the same settings"):
        Logged(tmp_path, seed, budget=0.5)
    with pytest.raises(ValueError, match=r"differs in layer2; .* use the same gates"):
        Logged(tmp_path, seed, shapes=[*SHAPES[:2], (48, 48)])
    assert (tmp_path / run_log.FILE).read_bytes() == before
    (tmp_path / run_log.FILE).write_text("a diary\n")
    with pytest.raises(ValueError, match="is no log of a run"):
        Logged(tmp_path, seed)
    (tmp_path / run_log.FILE).write_text('{"kind": "run", "gat')
    assert Logged(tmp_path, seed).train(5).masks
    assert read(tmp_path).unread == 1


def test_a_log_that_another_process_writes_is_refused(tmp_path, seed):
    script = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print('locked'); input()"
    command = [sys.executable, "-Sc", script, str(tmp_path / run_log.FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="is being written by another process; name another folder"):
            Logged(tmp_path, seed)
        other.communicate("\n")
    assert Logged(tmp_path, seed).train(5).masks


def test_a_second_controller_of_the_run_takes_the_log_over_and_the_first_says_so(tmp_path, seed):
    first = Logged(tmp_path, seed).train(20)
    second = Logged(tmp_path, seed)
    with pytest.warns(RuntimeWarning, match="another controller of this process writes it now") as caught:
        first.train(STEPS - 20)
    assert len(caught) == 1
    second.train(STEPS)
    assert_tells(read(tmp_path), second.controller.history, second.masks)


def test_a_full_disk_costs_decisions_and_one_warning_but_no_training(tmp_path, seed):
    logged = Logged(tmp_path, seed).train(40)
    kept, size = len(logged.masks), (tmp_path / run_log.FILE).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, limits[1]))
    try:
        with pytest.warns(RuntimeWarning, match=r"log\.jsonl misses records: .*training goes on") as caught:
            logged.train(95)  # till little changes any more
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caught) == 1
    lost = len(logged.masks) - kept
    assert lost > 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logged.train(STEPS - 135)
    history, masks = logged.controller.history, logged.masks
    run = read(tmp_path)
    assert_tells(run, history[:kept] + history[kept + lost :], masks[:kept] + masks[kept + lost :])
    assert run.unread == 1


def test_a_loss_that_is_no_number_is_read_back_from_plain_json(tmp_path, seed):
    logged = Logged(tmp_path, seed)
    for loss in (math.nan, math.inf, -math.inf):
        for _ in range(2 * logged.controller.interval):
            logged.plant.train_step()
            logged.controller.step(loss)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / run_log.FILE).read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert set(map(str, read(tmp_path).series("loss"))) == {"nan", "inf", "-inf"}
