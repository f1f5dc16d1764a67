"""The example on images: its model, its accounting, its errors, and one comparison from end to end."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_cifar

SCRIPT = Path(__file__).parents[2] / "examples" / "train_cifar.py"


def test_training_flops_are_six_per_weight_and_pixel_of_its_output_less_the_gradient_of_the_images() -> None:
    batch, depth, classes = random.randint(1, 5), random.randint(1, 3), random.randint(2, 20)
    narrow, wide = random.randint(1, 30), random.randint(31, 60)
    height, width = random.choice([8, 12, 32]), random.choice([8, 12, 32])
    stem = 3 * narrow * 9
    first = depth * 2 * narrow**2 * 9
    second = narrow * wide * (9 + 1) + (2 * depth - 1) * wide**2 * 9
    pixels, further = height * width, (height // 2) * (width // 2)
    products = 4 * stem * pixels + 6 * (first * pixels + second * further + wide * classes)
    shape = train_cifar.Shape((narrow, wide), depth, (3, height, width), classes)
    assert train_cifar.training_flops(shape, batch) == batch * products


def test_resnet18_is_the_one_known_for_cifar() -> None:
    channels, depth, _ = train_cifar.MODELS["resnet18"]
    with torch.device("meta"):
        model = train_cifar.ResNet(train_cifar.Shape(channels, depth, (3, 32, 32), 10))
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962


def test_the_wide_resnet_has_its_first_stage_on_half_the_image_and_the_flops_of_the_other() -> None:
    narrow, wide = (
        train_cifar.Shape(channels, depth, (3, 32, 32), 10, pool)
        for channels, depth, pool in (train_cifar.MODELS[name] for name in ("resnet8", "wide-resnet8"))
    )
    assert train_cifar.ResNet(wide).stem(torch.zeros(2, 3, 32, 32)).shape == (2, 64, 16, 16)
    assert train_cifar.training_flops(wide, 1) == pytest.approx(train_cifar.training_flops(narrow, 1), rel=0.02)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.9, 1.0])
def test_narrow_model_uses_its_share_and_little_more(share: float) -> None:
    shape = train_cifar.Shape((32, 64, 128), 1, (3, 32, 32), 10)
    narrow = train_cifar.narrower(shape, share)
    used = train_cifar.training_flops(narrow, 4) / train_cifar.training_flops(shape, 4)
    assert share <= used < share + 0.04
    assert all(channels % 4 == 0 for channels in narrow.channels)
    assert (narrow == shape) == (share == 1.0)


def test_no_stage_of_the_narrow_model_is_wider_than_the_dense_ones_or_empty() -> None:
    shape = train_cifar.Shape(tuple(random.randint(1, 40) for _ in range(3)), 1, (1, 8, 8), 10)
    narrow = train_cifar.narrower(shape, random.random())
    assert all(0 < few <= many for few, many in zip(narrow.channels, shape.channels, strict=True))


def test_learning_rate_rises_to_its_peak_and_falls_to_nearly_nothing() -> None:
    steps = random.randint(1, 300)
    optimizer, schedule = train_cifar.sgd(torch.nn.Linear(2, 2), 0.3, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.3)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] <= 0.3 * max(0.1, 4 / steps)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--budget", "0"], "above 0 and at most 1"),
        (["--epochs", "0"], "--epochs is 0; it has to be at least 1"),
        (["--depth", "0"], "--depth is 0; it has to be at least 1"),
        (["--channels", "32-x"], "invalid stages value: '32-x'"),
        (["--channels", "32-0"], "invalid stages value: '32-0'"),
        (["--batch", "2000"], "--batch is 2000; there are 1437 images to train on"),
        (["--data", "no/such/file"], "No such file"),
        (["--data", str(SCRIPT)], "is no whole .npz of JPEGs"),
        (["--data", str(SCRIPT.parent)], "data_batch_1"),
        (["--run", "sparse"], "invalid choice"),
        (["--model", "vgg"], "invalid choice"),
    ],
)
def test_bad_input_is_refused_in_the_words_of_who_gave_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    given: list[str],
    complaint: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", "--out", str(tmp_path), *given])
    with pytest.raises(SystemExit) as exit_info:
        train_cifar.main()
    assert exit_info.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("module", ["sklearn.datasets", "PIL"])
def test_a_missing_package_is_named_with_the_way_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    given = ["--out", str(tmp_path)]
    if module == "PIL":
        import numpy as np

        one = {"jpeg": np.zeros(1, np.uint8), "offsets": np.array([0, 1]), "labels": np.zeros(1, np.uint8)}
        both = {f"{part}_{name}": array for part in ("train", "test") for name, array in one.items()}
        np.savez(tmp_path / "images.npz", classes=np.array(["a"]), **both)
        given += ["--data", str(tmp_path / "images.npz")]
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", *given])
    with pytest.raises(SystemExit):
        train_cifar.main()
    told = capsys.readouterr().err
    assert module in told
    assert "ctrlcompile[examples]" in told


def test_compare_trains_all_three_from_one_seed_and_lands_on_the_budget(tmp_path: Path) -> None:
    settings = {"channels": "32-64", "epochs": 3, "seed": 3, "budget": 0.5}
    given = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, str(SCRIPT), "--compare", "--out", str(tmp_path), *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr

    log = json.loads((tmp_path / "train_cifar.json").read_text())
    pruned, dense, narrow = log["runs"]
    assert [run["name"] for run in log["runs"]] == ["ctrlprune", "dense", "narrow"]
    assert pruned["loss"][0] == pytest.approx(dense["loss"][0], rel=1e-4)
    assert pruned["flops"][-1] == pytest.approx(0.5 * dense["flops"][-1], rel=0.01)
    assert 0.5 <= narrow["flops"][-1] / dense["flops"][-1] < 0.6
    assert pruned["density"][-1] < 0.5
    assert all(len(run[key]) == 66 for run in log["runs"] for key in ("loss", "seconds", "flops", "density", "price"))
    for run in log["runs"]:
        assert 0.5 < run["validation"] < 1
        assert run["validation_error"] == pytest.approx((run["validation"] * (1 - run["validation"]) / 360) ** 0.5)
        assert f"{run['validation']:.4f}" in done.stdout
    assert (tmp_path / "train_cifar.png").read_bytes().startswith(b"\x89PNG")
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if str(tmp_path) not in line)
