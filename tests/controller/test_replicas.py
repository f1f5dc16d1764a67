"""Data-parallel replicas see different batches and decide alike."""

import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from ctrlcompile.inspect.run import read


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_replicas_with_different_batches_switch_the_same_blocks(tmp_path):
    script = pathlib.Path(__file__).with_name("replica.py")
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    runs = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path / "store", out], stderr=subprocess.PIPE, text=True
        )
        for rank, out in enumerate(outs)
    ]
    errors = [run.communicate(timeout=600)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    first, second = (torch.load(out, weights_only=True) for out in outs)
    assert all(torch.equal(a, b) for a, b in zip(first["masks"], second["masks"], strict=True))
    assert not all(mask.all() for mask in first["masks"])
    for name, tensor in first["state"]["tensors"].items():
        assert torch.equal(tensor, second["state"]["tensors"][name]), name
    assert read(tmp_path / "0.pt.log").steps[-1] == 80, "the first one writes the log"
    assert not (tmp_path / "1.pt.log").exists()
    ledger = first["state"]["ledger"]
    assert ledger == second["state"]["ledger"]
    assert ledger["used"] / ledger["dense"] == pytest.approx(0.4, rel=0.01)
