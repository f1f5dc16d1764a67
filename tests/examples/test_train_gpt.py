"""The main example: its accounting, its data, its errors, and one comparison from end to end."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_gpt

SCRIPT = Path(__file__).parents[2] / "examples" / "train_gpt.py"


def test_training_flops_are_six_per_weight_and_character_and_twelve_per_attended_pair() -> None:
    heads, context, batch, layers = (random.randint(1, 9) for _ in range(4))
    width, symbols = heads * random.randint(2, 20), random.randint(20, 90)
    products = 6 * batch * context * (layers * 12 * width**2 + width * symbols)
    attention = 12 * batch * layers * context**2 * width
    shape = train_gpt.Shape(layers, width, heads, context, symbols)
    assert train_gpt.training_flops(shape, batch) == products + attention


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.9])
def test_narrow_model_is_the_narrowest_that_uses_its_share(share: float) -> None:
    shape = train_gpt.Shape(layers=2, width=384, heads=6, context=64, symbols=65)
    narrow = train_gpt.narrower(shape, share)
    flops = [
        train_gpt.training_flops(s, 4) for s in (train_gpt.replace(narrow, width=narrow.width - 24), narrow, shape)
    ]
    assert flops[0] < share * flops[2] <= flops[1]
    assert narrow.width % shape.heads == 0


def test_targets_are_the_next_characters_and_held_out_text_is_the_last_tenth() -> None:
    text = "".join(random.choices("abcdefghij", k=5000))
    data = train_gpt.Data(text, context=16)
    tokens, targets = data.batch(8, torch.Generator().manual_seed(0))
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        spelled = "".join(data.alphabet[i] for i in (row[0], *target))
        assert spelled in text[:4500]
        assert row[1:] == target[:-1]
    assert "".join(data.alphabet[i] for i in data.validation.flatten()) == text[4500:][: data.validation.numel()]
    assert torch.equal(data.validation.flatten()[1:], data.validation_targets.flatten()[:-1])


def test_text_is_there_where_python_comes_without_its_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    documentation = train_gpt.default_text()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    sources = train_gpt.default_text()
    assert min(len(documentation), len(sources)) > 200_000
    assert documentation != sources


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--budget", "0"], "above 0 and at most 1"),
        (["--budget", "1.5"], "above 0 and at most 1"),
        (["--steps", "0"], "--steps is 0; it has to be at least 1"),
        (["--width", "100", "--heads", "6"], "--width 100 does not divide into --heads 6"),
        (["--data", "no/such/file"], "No such file"),
        (["--data", sys.executable], "can't decode"),
        (["--context", "1000000"], "the text has"),
        (["--run", "sparse"], "invalid choice"),
    ],
)
def test_bad_input_is_refused_in_the_words_of_who_gave_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    given: list[str],
    complaint: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--out", str(tmp_path), *given])
    with pytest.raises(SystemExit) as exit_info:
        train_gpt.main()
    assert exit_info.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--out", str(tmp_path), "--device", "cuda"])
    with pytest.raises(SystemExit):
        train_gpt.main()
    assert "sees no GPU" in capsys.readouterr().err


def test_compare_trains_all_three_from_one_seed_and_lands_on_the_budget(tmp_path: Path) -> None:
    sizes = {"layers": 1, "width": 128, "heads": 2, "context": 32, "batch": 4, "steps": 120, "seed": 3, "budget": 0.5}
    given = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, str(SCRIPT), "--compare", "--out", str(tmp_path), *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr

    log = json.loads((tmp_path / "train_gpt.json").read_text())
    pruned, dense, narrow = log["runs"]
    assert [run["name"] for run in log["runs"]] == ["ctrlprune", "dense", "narrow"]
    assert pruned["loss"][0] == pytest.approx(dense["loss"][0], rel=1e-5)
    assert pruned["flops"][-1] == pytest.approx(0.5 * dense["flops"][-1], rel=0.01)
    assert 0.5 <= narrow["flops"][-1] / dense["flops"][-1] < 0.7
    assert pruned["density"][-1] < 0.5
    assert all(len(run[key]) == 120 for run in log["runs"] for key in ("loss", "seconds", "flops", "density", "price"))
    assert all(run["validation"] < run["loss"][0] for run in log["runs"])
    for run in log["runs"]:
        assert f"{run['validation']:.4f}" in done.stdout
    assert (tmp_path / "train_gpt.png").read_bytes().startswith(b"\x89PNG")
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if str(tmp_path) not in line)


def test_without_matplotlib_the_log_is_written_and_the_way_to_a_picture_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def trained(name: str, shape: object, *_: object) -> object:
        one = [1.0]
        return train_gpt.Run(name, shape, one, one, one, one, one, [0], validation=1.0, validation_error=0.1)

    monkeypatch.setattr(train_gpt, "train", trained)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--out", str(tmp_path)])
    train_gpt.main()
    assert "ctrlcompile[examples]" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["train_gpt.json"]
