"""The command `ctrlcompile`: what it prints, where, and its exit status (0 works, 1 something is wrong, 2 usage)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from ctrlcompile import cli, kernel_choice, run_log
from ctrlcompile.controller import Controller
from ctrlcompile.inspect import doctor
from ctrlcompile.inspect.run import read
from ctrlcompile.kernels import build, cpu_conv, cpu_linear

from .controller.plant import Plant

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = """
import torch
from torch import nn

print("the script talks")

class Talking(nn.Linear):
    def forward(self, x):
        return super().forward(x)

def plain():
    print("the callable talks")
    return nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 64, bias=False)), torch.randn(5, 128)

def named():
    model = torch.compile(Talking(128, 128, bias=False), backend="ctrlprune", options={"block": 16})
    return model, {"x": torch.randn(3, 128)}

def misfit():
    return nn.Linear(128, 128), (torch.randn(3, 127),)

def small():
    return nn.Linear(8, 8), [torch.randn(3, 8)]

def elsewhere():
    return torch.compile(nn.Linear(128, 128), backend="eager"), torch.randn(3, 128)

def nothing():
    return None

def failing():
    raise LookupError("the user's own trouble")

number = 3
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A file with callables to look at, in the current folder; the name of the file without its ending is fresh."""
    path = tmp_path / f"script_{os.urandom(4).hex()}.py"
    path.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty kernel cache."""
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def invoke(*arguments: object):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def test_explain_prints_json_and_nothing_else_for_a_callable_of_a_file(script):
    done = invoke("explain", f"{script}:plain", "--json")
    assert done.exit_code == 0, done.output
    assert [row["name"] for row in json.loads(done.stdout)["rows"]] == ["0.weight", "1.weight"]
    assert "the script talks" in done.stderr
    assert "the callable talks" in done.stderr


def test_profile_takes_a_module_and_named_inputs_of_a_compiled_model(script):
    done = invoke("profile", f"{script.stem}:named", "--rounds", 1, "--json")
    assert done.exit_code == 0, done.output
    read = json.loads(done.stdout)
    assert read["rounds"] == 1
    assert [(row["role"], row["block"]) for row in read["rows"]] == [("forward", [16, 16]), ("wgrad", [16, 16])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "plain"], "'plain' is not of the form module:callable"),
        (["explain", "{path}:"], "not of the form"),
        (["explain", "gone.py:plain"], "there is no file gone.py"),
        (["profile", "no_such_module_here.at_all:plain"], "there is no module 'no_such_module_here'"),
        (["profile", "{path}:absent"], "has no callable 'absent'"),
        (["profile", "{path}:number"], "has no callable 'number'"),
        (["profile", "{path}:plain", "--rounds", "0"], "--rounds"),
        (["profile", "{path}:plain", "--csv", "--json"], "exclude each other"),
        (["explain", "{path}:plain", "--graphs", "--json"], "leave out --json"),
        (["cache"], "Usage"),
        (["retrain"], "No such command"),
    ],
)
def test_what_is_not_understood_ends_in_status_2_and_says_what(script, arguments, message):
    done = invoke(*(argument.format(path=script) for argument in arguments))
    assert done.exit_code == 2
    assert message in re.sub(r"\s+", " ", done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        ("explain", "misfit", "does not run on inputs (float32[3, 127])"),
        ("explain", "nothing", "returns (model, inputs), a torch.nn.Module first; got None"),
        ("profile", "elsewhere", "no graph of this model was compiled with backend='ctrlprune'"),
        ("profile", "small", "no layer of this model is gated"),
    ],
)
def test_what_cannot_be_looked_at_ends_in_status_1_and_says_why(script, command, name, message):
    done = invoke(command, f"{script}:{name}")
    assert done.exit_code == 1
    assert done.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert message in done.stderr
    assert done.stdout == ""


def test_what_the_users_own_code_raises_goes_through_with_its_traceback(script):
    done = invoke("explain", f"{script}:failing")
    assert done.exit_code == 1
    assert isinstance(done.exception, LookupError)
    (script.parent / "needs_more.py").write_text("import a_package_that_is_not_there")
    assert isinstance(invoke("explain", "needs_more:make").exception, ModuleNotFoundError)


@pytest.fixture
def run_folder(tmp_path):
    """A run's folder with a log of ten steps, its last line torn."""
    plant = Plant([(64, 64)])
    controller = Controller(plant.gates, plant.meter, 0.5, 10)
    controller.log = run_log.start(tmp_path / "run", controller)
    for _ in range(10):
        plant.train_step()
        controller.step()
    with open(tmp_path / "run" / run_log.FILE, "a") as log:
        log.write('{"kind": "dec')
    return tmp_path / "run"


def test_report_writes_a_page_and_says_where_and_what_could_not_be_read(run_folder, tmp_path):
    done = invoke("report", run_folder)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{run_folder / 'report.html'}\n"
    assert "1 line of the log could not be read" in done.stderr
    assert "Step 10 of 10" in (run_folder / "report.html").read_text()
    elsewhere = tmp_path / "page.html"
    said = json.loads(invoke("report", run_folder, "-o", elsewhere, "--json").stdout)
    assert said == {"report": str(elsewhere), "decisions": len(read(run_folder).decisions), "unread": 1}
    assert elsewhere.read_text() == (run_folder / "report.html").read_text()


def test_report_without_a_log_or_a_place_to_write_or_plotly_ends_in_status_1_or_2(run_folder, tmp_path, monkeypatch):
    for arguments, status, message in (
        ([tmp_path], 1, "holds no log.jsonl: train with options="),
        ([tmp_path / "gone"], 2, "does not exist"),
        ([run_folder / run_log.FILE], 2, "is a file"),
        ([run_folder, "-o", tmp_path], 2, "is a directory"),
        ([run_folder, "-o", "page.html", "--tensorboard", "events"], 2, "exclude each other"),
        ([run_folder, "--tensorboard", run_folder / run_log.FILE], 1, "log.jsonl cannot be written"),
        ([run_folder, "-o", tmp_path / "gone" / "page.html"], 1, "page.html cannot be written: No such file"),
    ):
        done = invoke("report", *arguments)
        assert (done.exit_code, done.stdout) == (status, "")
        assert message in re.sub(r"\s+", " ", done.stderr)
    monkeypatch.setitem(sys.modules, "plotly", None)
    done = invoke("report", run_folder)
    assert done.exit_code == 1
    assert "plotly is missing: pip install 'ctrlcompile[report]'" in done.stderr
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    done = invoke("report", run_folder, "--tensorboard", tmp_path / "events")
    assert done.exit_code == 1
    assert "tensorboard is missing: pip install 'ctrlcompile[tensorboard]'" in done.stderr


def test_cache_lists_and_clears_kernels_and_touches_nothing_else(cache):
    build.load("tiny", 'extern "C" int one() { return 1; }', ())
    build.load("other", 'extern "C" int two() { return 2; }', ())
    foreign = [cache / "notes.txt", cache / "my_own.so", cache / "tiny_library.cpp"]
    for path in foreign:
        path.write_text("mine")
    read = json.loads(invoke("cache", "list", "--json").stdout)
    assert read["folder"] == str(cache)
    sizes = {Path(kernel["path"]).name.rsplit("_", 1)[0]: kernel["bytes"] for kernel in read["kernels"]}
    assert sizes.keys() == {"tiny", "other"}
    assert all(Path(kernel["path"]).stat().st_size == kernel["bytes"] for kernel in read["kernels"])
    text = invoke("cache", "list").stdout
    assert "tiny_" in text
    assert f"2 files, {sum(sizes.values()) / 1e6:.1f} MB, in {cache}" in text
    assert "2 files deleted" in invoke("cache", "clear").stdout
    assert sorted(cache.iterdir()) == sorted(foreign)
    assert json.loads(invoke("cache", "clear", "--json").stdout) == {"folder": str(cache), "removed": []}


def test_doctor_builds_and_runs_kernels_in_a_folder_of_its_own_and_finds_them_right(cache):
    done = invoke("doctor", "--json")
    checks = {check["what"]: check for check in json.loads(done.stdout)}
    assert done.exit_code == 0, done.output
    working = {"PyTorch", "backend", "C++ compiler", "instruction set", "CPU kernels", "kernel cache"}
    assert {name for name in working if checks[name]["state"] == "works"} == working
    assert "built and run" in checks["CPU kernels"]["found"]
    assert "0 kernels" in checks["kernel cache"]["found"]
    assert {"Triton", "GPU"} <= checks.keys()


@pytest.fixture
def probed_here(monkeypatch, capsys):
    """The doctor's trial of the kernels, in this process; `state()` is what it concludes."""

    def trial(command, **_):
        capsys.readouterr()
        doctor.probe("cpu")
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(doctor, "subprocess", SimpleNamespace(run=trial, TimeoutExpired=subprocess.TimeoutExpired))
    return lambda: doctor._kernels("cpu").state


def test_doctor_tells_of_a_compiler_that_builds_for_float32_alone(probed_here, monkeypatch):
    build_any = kernel_choice.why_no_kernel

    def build_one(device, x_dtype, *rest, **options):
        return "no such flag" if x_dtype == torch.bfloat16 else build_any(device, x_dtype, *rest, **options)

    monkeypatch.setattr(kernel_choice, "why_no_kernel", build_one)
    assert probed_here() == "missing"
    found = doctor._kernels("cpu").found
    assert re.search("linears in float32.*in bfloat16 gated layers are computed densely: no such flag", found)


@pytest.mark.parametrize("role", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("kernels", [cpu_linear, cpu_conv], ids=["linear", "conv"])
def test_doctor_finds_a_kernel_that_computes_wrong(probed_here, monkeypatch, kernels, role):
    assert probed_here() == "works"
    right = getattr(kernels, role)

    def wrong(*arguments):
        result = right(*arguments)
        (result if role == "dgrad" else result[0])[0, 0] += 0.01
        return result

    monkeypatch.setattr(kernels, role, wrong)
    assert probed_here() == "broken"


def test_doctor_says_what_to_do_about_what_is_broken_in_status_1(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CTRLCOMPILE_ISA", "avx1024")
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(blocked))
    done = invoke("doctor")
    text = re.sub(r"\s+", " ", done.stdout)
    assert done.exit_code == 1
    for part in ("C++ compiler broken", "set CXX to one", "avx1024", "Unset CTRLCOMPILE_ISA", "CPU kernels broken"):
        assert part in text
    assert "cannot be written" in text
    assert "Set CTRLCOMPILE_CACHE_DIR" in text


def test_doctor_survives_kernels_that_this_processor_cannot_run(monkeypatch):
    killed = subprocess.CompletedProcess([], -4, "", "")
    run = SimpleNamespace(run=lambda *_, **__: killed, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(doctor, "subprocess", run)
    monkeypatch.delenv("CTRLCOMPILE_ISA", raising=False)
    check = doctor._kernels("cpu")
    assert (check.state, check.advice) == ("broken", "Set CTRLCOMPILE_ISA=portable")
    assert "SIGILL" in check.found


def test_the_installed_command_explains_with_graphs_and_its_logs_can_be_asked_for(script):
    command = [str(Path(sys.executable).with_name("ctrlcompile")), "explain", f"{script.name}:plain", "--graphs"]
    environment = {**os.environ, "TORCH_LOGS": "+ctrlcompile"}
    done = subprocess.run(command, cwd=script.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("layer ")
    assert "1 of 2 layers gated" in done.stdout, "64 outputs are two blocks of 32, too few"
    assert "Graph 1 of 1" in done.stdout
    assert "2. gate_linear: " in done.stderr
