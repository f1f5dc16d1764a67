"""Generated Triton modules are loaded from readable files, whatever has happened to these."""

import pytest

from ctrlcompile.kernels import triton_build
from ctrlcompile.kernels.build import KernelBuildError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_a_text_is_one_module_in_one_file(cache):
    module = triton_build.load("answer", "ANSWER = 42\n")
    assert module.ANSWER == 42
    assert triton_build.load("answer", "ANSWER = 42\n") is module
    assert triton_build.load("answer", "ANSWER = 43\n").ANSWER == 43
    assert sorted(path.read_text() for path in cache.glob("answer_*.py")) == ["ANSWER = 42\n", "ANSWER = 43\n"]
    assert not list(cache.glob(".build-*"))


def test_a_damaged_file_is_written_anew(cache, monkeypatch):
    path = cache / triton_build.load("damaged", "X = 1\n").__file__
    path.write_text("X = 2\n")
    monkeypatch.setattr(triton_build, "_loaded", {})
    assert triton_build.load("damaged", "X = 1\n").X == 1
    assert path.read_text() == "X = 1\n"


def test_what_does_not_load_is_said(cache):
    with pytest.raises(KernelBuildError, match="ZeroDivisionError"):
        triton_build.load("broken", "1 / 0\n")
