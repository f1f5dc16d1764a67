"""The benchmarks: what they compute from times, how the GPU's one script takes failures, and a tiny run of each."""

import argparse
import importlib.util
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = ("kernels", "convolutions", "steps", "respecialize", "overhead", "cost_model", "agreement", "gpu")


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    loaded = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.delitem(sys.modules, "kernels", raising=False)  # the folder, which transformers takes for a library
        for name in NAMES:
            # Not under its own name, which is a folder's as well.
            spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
            loaded[name] = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = loaded[name]  # dataclasses look their module up
            spec.loader.exec_module(loaded[name])
    return loaded


@pytest.fixture
def kernels(scripts):
    return scripts["kernels"]


@pytest.fixture
def gpu(scripts):
    return scripts["gpu"]


def measured(role="forward", **given):
    """A row of made-up times."""
    m, k, n = (random.randint(1, 5000) for _ in range(3))
    times = {"ours_ms": random.uniform(1, 9), "dense_ms": {"eager": 8.0, "autotuned": 7.0}, "bsr_ms": None}
    rest = {"density": random.random(), "dtype": "bfloat16", "peak_flops": 1e12}
    return {"role": role, "M": m, "K": k, "N": n, **rest, **times, **given}


def test_break_even_is_where_our_time_meets_the_dense_one(kernels):
    start, slope = random.uniform(0, 5), random.uniform(1, 20)
    ours = {density: start + slope * density for density in (1.0, 0.5, 0.25, 0.1)}
    crossing = random.uniform(0.1, 1)
    assert kernels.break_even(ours, start + slope * crossing) == pytest.approx(crossing)


def test_break_even_is_all_or_nothing_where_one_side_always_wins(kernels):
    ours = {1.0: 4.0, 0.5: 3.0}
    assert kernels.break_even(ours, 4.0) == 1.0
    assert kernels.break_even(ours, 2.9) == 0.0


def test_a_kernel_whose_skipped_blocks_cost_nothing_has_a_ratio_of_one(kernels):
    row = measured(dense_ms={"eager": 8.0, "autotuned": 6.0})
    row["ours_ms"] = row["density"] * 8.0
    found = kernels.ratios(row, kernels.Rates(1e12, 1e12))
    assert found["of_eager"] == pytest.approx(1)
    assert found["of_best"] == pytest.approx(6 / 8)
    assert found["dense_way"] == "autotuned"
    assert found["speedup"] == pytest.approx(6 / row["ours_ms"])
    assert found["of_peak"] == pytest.approx(found["flops"] / row["peak_flops"])


@pytest.mark.parametrize("role", ["forward", "dgrad", "wgrad"])
def test_a_kernel_at_the_roofline_has_a_ratio_of_one(kernels, role):
    row = measured(role)
    m, k, n = row["M"], row["K"], row["N"]
    flops = 2 * m * k * n * row["density"]
    moved = 2 * (m * k + m * n + k * n * row["density"]) + (2 * k * n if role == "wgrad" else 0)
    seconds = row["ours_ms"] / 1e3
    bound_by_arithmetic = kernels.Rates(flops / seconds, 1e30)
    bound_by_memory = kernels.Rates(1e30, moved / seconds)
    assert kernels.ratios(row, bound_by_arithmetic)["of_roofline"] == pytest.approx(1)
    assert kernels.ratios(row, bound_by_memory)["of_roofline"] == pytest.approx(1)
    both = kernels.Rates(bound_by_arithmetic.peak / 2, bound_by_memory.bandwidth / 3)
    assert kernels.ratios(row, both)["of_roofline"] == pytest.approx(3)


def test_the_block_sparse_ratio_is_there_where_it_ran(kernels):
    rates = kernels.Rates(1e12, 1e12)
    assert kernels.ratios(measured(bsr_ms=None), rates)["bsr_ratio"] is None
    assert kernels.ratios(measured(ours_ms=2.0, bsr_ms=5.0), rates)["bsr_ratio"] == pytest.approx(2.5)


@pytest.mark.parametrize("role", ["forward", "dgrad", "wgrad"])
def test_error_is_told_as_a_multiple_of_the_dense_product_s(kernels, role):
    inputs = kernels.Inputs(torch.randn(40, 96), torch.randn(40, 64), torch.randn(64, 96))
    entries = torch.rand(64, 96) < 0.5
    masked = inputs._replace(weight=torch.where(entries, inputs.weight, 0))

    def product(dtype):
        result = kernels.PRODUCTS[role](*(tensor.to(dtype) for tensor in masked))
        return torch.where(entries, result, 0) if role == "wgrad" else result

    dense, exact = product(torch.float32), product(torch.float64)
    factor = random.uniform(2, 9)
    assert kernels.error_ratio(role, inputs, entries, dense) == pytest.approx(1)
    assert kernels.error_ratio(role, inputs, entries, exact + factor * (dense - exact)) == pytest.approx(factor)


def test_a_random_mask_has_the_density_asked_for_and_one_block_at_least(kernels):
    grid = (random.randint(2, 30), random.randint(2, 30))
    density = random.random()
    mask = kernels.random_mask(grid, density)
    assert mask.shape == grid
    assert mask.sum() == max(1, round(density * math.prod(grid)))
    assert kernels.random_mask(grid, 0.0).sum() == 1


@pytest.mark.parametrize(("text", "block"), [("64", (64, 64)), ("128x64", (128, 64))])
def test_blocks_are_given_as_users_write_them(kernels, text, block):
    assert kernels.a_block(text) == block


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_it_measures(scripts, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        scripts[name].main()
    assert ended.value.code == 0
    assert scripts[name].__doc__.splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "given", "complaint"),
    [
        ("kernels", ["--device", "cuda"], "sees no GPU"),
        ("kernels", ["--blocks", "7"], "block sides"),
        ("kernels", ["--blocks", "8x8x8"], "--blocks"),
        ("kernels", ["--shapes", "99"], "numbered 0 to"),
        ("convolutions", ["--blocks", "7"], "block sides"),
        ("convolutions", ["--shapes", "99"], "numbered 0 to"),
        ("steps", ["--device", "cuda"], "sees no GPU"),
        ("steps", ["--width", "100"], "multiple of 64"),
        ("steps", ["--steps", "0"], "at least 1"),
        ("gpu", [], "sees no GPU"),
        ("gpu", ["--rehearse"], "--out"),
        ("gpu", ["--only", "nothing"], "invalid choice"),
    ],
)
def test_bad_input_is_refused_in_the_words_of_who_gave_it(scripts, name, given, complaint, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
    with pytest.raises(SystemExit) as ended:
        scripts[name].main()
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def python(gpu, code, limit=30.0, summary=lambda: "told"):
    return gpu.Part((sys.executable, "-c", code), limit, summary)


def test_a_part_that_fails_says_what_it_wrote_last(gpu, tmp_path):
    outcome = gpu.run("it", python(gpu, "import sys; print('so far'); sys.exit('no further')"), tmp_path)
    assert not outcome.passed
    assert outcome.ended == "exit status 1"
    assert outcome.last_lines == "so far\nno further"


def test_a_part_that_outlasts_its_limit_ends_with_all_that_it_started(gpu, tmp_path):
    sleeper = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    outcome = gpu.run("it", python(gpu, sleeper, limit=1.0), tmp_path)
    assert not outcome.passed
    assert outcome.ended == "stopped at its time limit"
    assert outcome.seconds < 20
    child = Path("/proc", outcome.last_lines, "stat")
    for _ in range(50):
        # Gone, or a zombie where nobody collects orphans.
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("what it started runs on")


def test_a_part_without_a_result_or_a_program_did_not_pass(gpu, tmp_path):
    def nothing():
        return (tmp_path / "nothing.json").read_text()

    assert not gpu.run("it", python(gpu, "pass", summary=nothing), tmp_path).passed
    missing = gpu.run("it", gpu.Part(("no-such-program",), 9.0, nothing), tmp_path)
    assert not missing.passed
    assert "no-such-program" in missing.ended


@pytest.mark.parametrize("status", [0, 1])
def test_a_failing_part_stops_no_other_and_shows_in_the_exit_status(gpu, status, monkeypatch, capfd, tmp_path):
    made = {"first": lambda session: python(gpu, f"raise SystemExit({status})")}
    made["second"] = lambda session: python(gpu, "print('after it')")
    monkeypatch.setattr(gpu, "PARTS", made)
    monkeypatch.setattr(gpu, "lay_out", lambda package: None)
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--out", str(tmp_path)])
    assert gpu.main() == status
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["passed"] for part in found["parts"]] == [status == 0, True]
    assert found["machine"]["torch"] == torch.__version__
    assert "after it" in capfd.readouterr().out


def test_gpu_tests_that_were_all_skipped_did_not_pass(gpu, tmp_path):
    part = gpu.tests(gpu.Session(tmp_path, tmp_path, deadline=time.monotonic() + 9))
    report = '<testsuites><testsuite tests="{}" skipped="3" failures="1" errors="1"/></testsuites>'
    (tmp_path / "tests.xml").write_text(report.format(9))
    assert part.summary() == "4 passed, 2 failed, 3 skipped"
    (tmp_path / "tests.xml").write_text(report.format(3))
    with pytest.raises(ValueError, match="no test ran"):
        part.summary()


def test_the_one_script_runs_from_a_checkout_and_writes_what_it_measured(tmp_path):
    only = ["steps", "convolutions", "kernels"]
    command = [sys.executable, str(FOLDER / "gpu.py"), "--rehearse", "--only", *only, "--out", "."]
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1"}  # every line of the scripts runs all the same
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["", *(f"_{name}" for name in only)]
    found = {name: json.loads((tmp_path / f"gpu{name}.json").read_text()) for name in names}
    assert [part["name"] for part in found[""]["parts"]] == only
    assert [row["role"] for row in found["_convolutions"]["rows"][::4]] == ["forward", "dgrad", "wgrad"]
    assert [row["name"] for row in found["_steps"]["rows"]] == ["inductor", "eager", "density 0.4", "density 1"]
    rows = found["_kernels"]["rows"]
    assert len(rows) == 12
    assert all(row["error"] < 10 and row["speedup"] > 0 for row in rows)
    assert {row["bsr_ratio"] is not None for row in rows if row["role"] == "forward"} == {True}
    for part in found.values():
        assert {"cpu", "torch", "python", "command"} <= part["machine"].keys()


def test_triton_kernels_go_through_the_same_comparison(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import torch, kernels
from ctrlcompile.kernels import triton_linear
cpu = torch.device("cpu")
dense = kernels.dense_ways(cpu, autotune=False)
rows, rates = kernels.compare((16, 32, 32), (16, 16), torch.float16, cpu, triton_linear, dense, 1, True)
print([round(kernels.ratios(row, rates)["error"], 3) for row in rows])
"""
    given = {"TRITON_INTERPRET": "1", "TORCH_COMPILE_DISABLE": "1", "CTRLCOMPILE_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 12
    assert max(errors) < 2


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_are_compared_role_by_role(scripts, stride, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda product, **_: product)
    script = scripts["convolutions"]
    rows = script.compare(script.Shape(2, 32, 64, 6, stride), (16, 16), 2, torch.device("cpu"))
    assert [row["role"] for row in rows[::4]] == ["forward", "dgrad", "wgrad"]
    for row in rows:
        best = min(row["dense_ms"].values()) / row["ours_ms"]
        assert row["speedup"] == pytest.approx(best)
        assert row["of_best"] == pytest.approx(best * row["density"])
        assert 0 < row["of_peak"] < 1.5
    script.show(rows)


def test_a_resnet_takes_steps_like_a_gpt(scripts, monkeypatch):
    steps = scripts["steps"]
    args = argparse.Namespace(model="resnet8", device="cpu", batch=2)
    work = steps.resnet(args)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    contestant = steps.Contestant(work, torch.device("cpu"), "ctrlprune", 0.5, layout=torch.channels_last)
    contestant.step(*work.batch())
    assert len(contestant.seconds) == 1
    assert 0.4 < contestant.density < 0.6


@pytest.mark.parametrize("slower", [1, 2])
def test_predictions_are_made_before_their_measurement_and_from_other_shapes_alone(scripts, slower):
    script = scripts["cost_model"]
    rate, sizes, rows = random.uniform(1e-12, 1e-10), [(64, 32, 96), (128, 64, 64)], []
    for (m, k, n), density, role in itertools.product(sizes, (1.0, 0.5, 0.25), ("forward", "dgrad")):
        seconds = (slower if (m, k, n) == sizes[1] else 1) * rate * 2 * m * k * n * density
        row = {"M": m, "K": k, "N": n, "role": role, "variant": "block-sparse", "density": density, "share": density}
        rows.append(row | {"seconds": seconds})
    found = script.predict(random.sample(rows, len(rows)))
    assert len(found) == len(rows)
    for row in found:
        factor = 1 / slower if row["M"] == sizes[1][0] else slower
        assert row["another_shape"] == pytest.approx(factor * row["seconds"])
        assert (row["same_product"] is None) == (row["density"] == 1.0)
    assert script.error([row for row in found if row["density"] == 1.0], "same_product") is None
    if slower == 1:
        assert script.error(found, "same_product") == pytest.approx(0, abs=1e-6)
    else:
        assert 0.5 <= script.error(found, "another_shape") <= 1


def test_every_variant_is_measured_at_every_density_and_computes_the_masked_product(scripts):
    script = scripts["cost_model"]
    rows = script.measure((16, 64, 64), (16, 16), 1)
    assert {(row["role"], row["density"]) for row in rows} == {
        (role, density) for role in ("forward", "dgrad", "wgrad") for density in (1.0, 0.5, 0.25, 0.1)
    }
    assert {row["variant"] for row in rows} >= {"block-sparse", "dense", "coarse 32x32"}
    for row in rows:
        assert row["density"] - 0.05 <= row["share"] <= 1
        assert row["seconds"] > 0


def test_what_explain_counts_is_what_pytorch_counts(scripts, monkeypatch):
    script = scripts["agreement"]
    for name, size in (("ROWS", 16), ("WIDTH", 128), ("HIDDEN", 256)):
        monkeypatch.setattr(script, name, size)
    subject = script.Subject(0.5)
    assert script.flops_apart(subject) == pytest.approx((0, 0), abs=1e-9)
    seen = script.in_steps(subject)
    assert set(seen) == {(name, role) for name in subject.gates for role in ("forward", "dgrad", "wgrad")}
    assert all(len(taken) == 1 for taken in seen.values())
    products = subject.products()
    assert set(products) == {(key, way) for key in seen for way in ("gated", "kernel", "dense")}
    for key in seen:
        by_operator, by_kernel = products[key, "gated"](), products[key, "kernel"]()
        first, other = (y if isinstance(y, torch.Tensor) else y[0] for y in (by_operator, by_kernel))
        torch.testing.assert_close(first, other, msg=f"{key} is timed of two different products")
