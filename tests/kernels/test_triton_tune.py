"""Tiles are chosen by the clock, here a made-up one; choices are kept on disk, and damaged ones are made anew."""

import dataclasses
import json

import pytest
import torch

from ctrlcompile.kernels import triton_conv, triton_device, triton_linear, triton_tune
from ctrlcompile.kernels.build import KernelBuildError
from ctrlcompile.kernels.triton_rows import Rows
from ctrlcompile.kernels.triton_wgrad import Wgrad
from ctrlcompile.kernels.window import Window

pytest.importorskip("triton")  # whose version is a part of what a choice is kept under

KERNEL = Rows(128, 64, True, torch.bfloat16, "gelu", True)
CPU = torch.device("cpu")


class Clock:
    """Ours takes `fixed + slope * density`, a little more in every tile but `best`; the dense product `dense`."""

    def __init__(self, best, fixed=1.0, slope=10.0, dense=6.0, broken=()):
        self.best, self.fixed, self.slope, self.dense, self.broken = best, fixed, slope, dense, broken
        self.asked = []

    def __call__(self, tile, density):
        self.asked.append(tile)
        if tile is None:
            return self.dense
        if tile in self.broken:
            raise RuntimeError("does not compile")
        return self.fixed + self.slope * density + (tile != self.best) * 0.1


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """As on a GPU: cases are timed, by a clock that the test sets, and kept in an empty folder."""
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_tune, "_known", {})
    monkeypatch.setattr(triton_tune, "_may_time", lambda device: True)

    def set_clock(clock):
        monkeypatch.setattr(triton_tune, "_device_clock", lambda case: clock)
        return clock

    return set_clock


def tiles():
    return triton_tune.Case(KERNEL, 4096, 1024, 1024, True, CPU).candidates


def test_the_fastest_tile_wins_and_one_that_does_not_run_is_passed_over():
    best, broken, *_ = tiles()
    choice = triton_tune.decide(tiles(), Clock(best, broken=(broken,)))
    assert choice.tile == best
    assert choice.crossover == pytest.approx(0.5)
    with pytest.raises(KernelBuildError, match="no tile"):
        triton_tune.decide(tiles(), Clock(best, broken=tiles()))


@pytest.mark.parametrize(("dense", "crossover"), [(6.0, 0.5), (100.0, 1.0), (0.5, 0.0), (1.0, 0.0), (11.0, 1.0)])
def test_dense_is_faster_above_the_crossover(dense, crossover):
    choice = triton_tune.decide(tiles(), Clock(tiles()[0], dense=dense))
    assert choice.crossover == pytest.approx(crossover)


def test_a_time_that_does_not_grow_with_density_is_compared_as_it_is():
    assert triton_tune.decide(tiles(), Clock(tiles()[0], slope=0, fixed=2)).crossover == 1
    assert triton_tune.decide(tiles(), Clock(tiles()[0], slope=0, fixed=9)).crossover == 0


def test_a_case_is_timed_once_and_then_read_from_disk(timed, tmp_path, monkeypatch):
    best = tiles()[2]
    first = timed(Clock(best))
    assert triton_tune.choose(KERNEL, 5000, 1024, 1024, True, CPU) == best
    asked = len(first.asked)
    assert triton_tune.choose(KERNEL, 4200, 1024, 1024, True, CPU) == best
    # An activation changes nothing about the product.
    plain = dataclasses.replace(KERNEL, activation="none", bias=False)
    assert triton_tune.choose(plain, 8191, 1024, 1024, True, CPU) == best
    assert triton_tune.crossover(KERNEL, 4096, 1024, 1024, CPU) == pytest.approx(0.5)
    assert len(first.asked) == asked
    monkeypatch.setattr(triton_tune, "_known", {})
    other_process = timed(Clock(tiles()[0]))
    assert triton_tune.choose(KERNEL, 4096, 1024, 1024, True, CPU) == best
    assert not other_process.asked
    assert triton_tune.choose(KERNEL, 300, 1024, 1024, True, CPU) != best
    assert other_process.asked


@pytest.mark.parametrize("role", ["forward", "dgrad", "wgrad"])
def test_each_role_tells_its_crossover(timed, monkeypatch, role):
    asked = []
    monkeypatch.setattr(triton_tune, "decide", lambda tiles, clock: triton_tune.Choice(tiles[0], 0.75))
    monkeypatch.setattr(triton_tune, "_device_clock", asked.append)
    assert triton_linear.crossover(role, torch.bfloat16, (128, 64), 5000, 768, 3072, CPU) == 0.75
    (case,) = asked
    assert (case.m, case.aligned) == (4096, True)
    assert (case.outputs, case.inputs) == ((3072, 768) if role == "dgrad" else (768, 3072))
    assert (case.kernel.outputs, case.kernel.inputs) == ((64, 128) if role == "dgrad" else (128, 64))


@pytest.mark.parametrize(("role", "sizes"), [("forward", (1 << 14, 64, 96)), ("dgrad", (1 << 16, 96, 64))])
def test_a_convolution_is_tuned_for_its_pixels_and_sizes_rounded_down(timed, monkeypatch, role, sizes):
    asked = []
    monkeypatch.setattr(triton_tune, "decide", lambda tiles, clock: triton_tune.Choice(tiles[0], 0.75))
    monkeypatch.setattr(triton_tune, "_device_clock", asked.append)
    window = Window((2, 2), ((1, 1), (1, 1)), (1, 1), 2)
    for size in ((56, 40), (58, 41)):
        given = (role, torch.bfloat16, (64, 32), 32, size, (64, 48, 3, 3), window, CPU)
        assert triton_conv.crossover(*given) == 0.75
    (case,) = asked
    assert (case.m, case.outputs, case.inputs) == sizes
    assert case.size == (32, 32)
    assert (case.kernel.window, case.kernel.taps) == (window, (3, 3))


def test_an_unknown_role_is_said():
    window = Window((2,), ((1, 1),), (1,))
    with pytest.raises(ValueError, match="'backward'; allowed are forward, dgrad and wgrad"):
        triton_linear.crossover("backward", torch.bfloat16, (128, 64), 64, 64, 64, CPU)
    with pytest.raises(ValueError, match="'backward'; allowed are forward, dgrad and wgrad"):
        triton_conv.crossover("backward", torch.bfloat16, (128, 64), 4, (8,), (64, 64, 3), window, CPU)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"tile": 1}', "null"])
def test_a_damaged_file_is_tuned_anew(timed, tmp_path, monkeypatch, damage):
    best = tiles()[1]
    timed(Clock(best))
    triton_tune.choose(KERNEL, 4096, 1024, 1024, True, CPU)
    (path,) = tmp_path.glob("tuned_*.json")
    kept = json.loads(path.read_text())
    path.write_text(damage)
    monkeypatch.setattr(triton_tune, "_known", {})
    clock = timed(Clock(best))
    assert triton_tune.choose(KERNEL, 4096, 1024, 1024, True, CPU) == best
    assert clock.asked
    assert json.loads(path.read_text()) == kept


def test_a_kept_tile_that_is_no_candidate_any_more_is_tuned_anew(timed, tmp_path, monkeypatch):
    timed(Clock(tiles()[1]))
    triton_tune.choose(KERNEL, 4096, 1024, 1024, True, CPU)
    (path,) = tmp_path.glob("tuned_*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "tile": {"rows": 1}}))
    monkeypatch.setattr(triton_tune, "_known", {})
    assert triton_tune.choose(KERNEL, 4096, 1024, 1024, True, CPU) == tiles()[1]


def test_too_little_memory_to_tune_in_leaves_the_best_guess(timed, tmp_path):
    def clock(tile, density):
        raise torch.OutOfMemoryError

    timed(clock)
    assert triton_tune.choose(KERNEL, 4096, 1024, 1024, True, CPU) == tiles()[0]
    assert not list(tmp_path.glob("tuned_*.json"))


def test_where_nothing_can_be_timed_the_best_guess_serves():
    kernel = Wgrad(64, 64, torch.float16)
    tile = triton_tune.choose(kernel, 4096, 1024, 1024, True, CPU)
    assert tile == triton_tune.Case(kernel, 4096, 1024, 1024, True, CPU).candidates[0]
    assert triton_tune.crossover(kernel, 4096, 1024, 1024, CPU) == 1


def test_a_device_on_which_no_tile_fits_is_named(monkeypatch):
    tiny = triton_device.Device("a toy", (8, 0), 1, 1024)
    monkeypatch.setattr(triton_device, "of", lambda device: tiny)
    monkeypatch.setattr(triton_tune, "_known", {})
    with pytest.raises(KernelBuildError, match="fits a toy"):
        triton_tune.choose(KERNEL, 4096, 512, 2048, True, CPU)
