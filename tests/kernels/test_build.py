"""Compiled kernels are kept on disk, safely; what cannot be built says why."""

import ctypes
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from ctrlcompile.kernels import build

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiled(folder: Path) -> Path:
    (library,) = folder.glob("*.so")
    return library


def answer(library: Path, tmp_path: Path) -> int:
    """What the file says; copied, since the loader knows a library by its path."""
    copy = shutil.copy(library, tmp_path / f"{random.random()}.so")
    return ctypes.CDLL(copy).answer()


def test_source_and_library_lie_side_by_side(folder):
    assert build.load("probe", SOURCE, ()).answer() == 42
    assert compiled(folder).with_suffix(".cpp").read_text() == SOURCE
    assert [entry.suffix for entry in sorted(folder.iterdir())] == [".cpp", ".so"]


def test_a_library_is_compiled_once(folder):
    build.load("probe", SOURCE, ())
    first = compiled(folder).stat().st_mtime_ns
    build.load("probe", SOURCE, ())
    assert compiled(folder).stat().st_mtime_ns == first


def test_other_source_or_flags_are_another_library(folder):
    build.load("probe", SOURCE, ())
    build.load("probe", SOURCE.replace("42", "43"), ())
    build.load("probe", SOURCE, ("-DOTHER",))
    assert len(list(folder.glob("*.so"))) == 3


@pytest.mark.parametrize("damage", ["truncated", "emptied", "one byte changed"])
def test_a_damaged_library_is_built_anew(folder, damage, tmp_path):
    build.load("probe", SOURCE, ())
    library = compiled(folder)
    content = bytearray(library.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "emptied":
        content.clear()
    else:
        content[len(content) // 2] ^= 0xFF
    library.unlink()  # what is loaded already stays as it is
    library.write_bytes(content)
    build.load("probe", SOURCE, ())
    assert library.read_bytes() != bytes(content)
    assert answer(library, tmp_path) == 42


def test_a_folder_that_was_removed_since_is_made_anew(folder):
    build.load("probe", SOURCE, ())
    shutil.rmtree(folder)
    assert build.load("probe", SOURCE.replace("42", "44"), ()).answer() == 44


def test_what_cannot_be_kept_is_a_build_error(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        build.KernelBuildError, match=r"cannot be kept: .*No space left on device.*CTRLCOMPILE_CACHE_DIR"
    ):
        build.load("probe", SOURCE, ())


def test_several_processes_may_build_at_once(folder):
    code = f"""if True:
        import importlib.util  # this file alone: the whole package takes seconds to import
        spec = importlib.util.spec_from_file_location("build", {build.__file__!r})
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        print(build.load("probe", {SOURCE!r}, ()).answer())
    """
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == ["42\n"] * 2
    assert [entry.suffix for entry in sorted(folder.iterdir())] == [".cpp", ".so"]


def test_a_cache_that_cannot_be_written_is_replaced_with_one_warning(tmp_path, monkeypatch):
    occupied = tmp_path / "file"
    occupied.touch()
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(occupied / "cache"))
    with pytest.warns(UserWarning, match=r"cannot be written.*CTRLCOMPILE_CACHE_DIR"):
        assert build.load("probe", SOURCE, ()).answer() == 42
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.load("probe", SOURCE.replace("42", "44"), ()).answer() == 44


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_read_only_cache_is_replaced(tmp_path, monkeypatch):
    folder = tmp_path / "read_only"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(folder))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert build.load("probe", SOURCE, ()).answer() == 42


def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("CTRLCOMPILE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "ctrlcompile"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.cache_folder() == tmp_path / "home" / ".cache" / "ctrlcompile"


def test_a_missing_compiler_is_named(folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.KernelBuildError, match=r"no C\+\+ compiler: CXX=no-such-compiler .*Install one"):
        build.load("probe", SOURCE, ())


def test_no_compiler_on_the_path(folder, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(build.KernelBuildError, match=r"none of c\+\+, g\+\+ and clang"):
        build.load("probe", SOURCE, ())


def test_a_compiler_that_fails_is_quoted(folder, monkeypatch, tmp_path):
    broken = tmp_path / "broken-compiler"
    broken.write_text(
        "#!/bin/sh\ncase $1 in --version) echo broken 1.0;; *) echo 'error: it is broken' >&2; exit 3;; esac\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.KernelBuildError, match=r"broken-compiler could not compile.*it is broken") as caught:
        build.load("probe", SOURCE, ())
    assert "GCC" in caught.value.advice
    assert not list(folder.glob("*.so"))


def test_source_that_is_wrong_leaves_nothing_behind(folder):
    with pytest.raises(build.KernelBuildError, match="could not compile"):
        build.load("probe", "this is no C++", ())
    assert not list(folder.iterdir())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a process group without a session needs Python 3.11")
def test_a_compiler_beside_training_is_a_group_in_its_session(folder, tmp_path, monkeypatch):
    compiler, seen = tmp_path / "c++", tmp_path / "seen"
    ask = "import os; print(os.getsid(0), os.getpgrp())"
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] || {sys.executable} -Sc '{ask}' > {seen}\nexec c++ \"$@\"\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "_ALONE_S", 0.1)  # nobody gives it a turn
    monkeypatch.setattr(build, "_YIELDING", ())  # other tests may keep all cores busy
    monkeypatch.setenv("CXX", str(compiler))
    with build.beside_training(60):
        build.load("probe", SOURCE, ())
    session, group = map(int, seen.read_text().split())
    assert session == os.getsid(0)
    assert group != os.getpgrp()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="it rests from Python 3.11 on")
def test_a_compiler_beside_training_runs_in_its_turns_alone(folder, tmp_path, monkeypatch):
    count = tmp_path / "count"  # grows while the compiler runs
    compiler = tmp_path / "c++"
    endless = f"while :; do echo >> {count}; done"
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] || {endless}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "_SHARE", 1.0)
    monkeypatch.setattr(build, "_YIELDING", ())  # other tests may keep all cores busy

    def compile_beside():
        with build.beside_training(60), pytest.raises(build.KernelBuildError):
            build.load("probe", SOURCE, ())

    def size():
        return count.stat().st_size if count.exists() else 0

    thread = threading.Thread(target=compile_beside)
    thread.start()
    try:
        sizes = []
        while len(sizes) < 3:  # in each turn it gets on, between turns it does not
            before, deadline = size(), time.monotonic() + 60
            while size() == before and time.monotonic() < deadline:
                time.sleep(0.02)
                build.give_turn()
            stopped = -1
            while stopped != size() and time.monotonic() < deadline:  # it may take a while to stop on a busy machine
                stopped = size()
                time.sleep(0.1)
            assert size() == stopped
            sizes.append(stopped)
        assert 0 < sizes[0] < sizes[1] < sizes[2]
        monkeypatch.setattr(build, "_ALONE_S", 0.1)  # nobody trains any more
        deadline = time.monotonic() + 20
        while size() == sizes[-1] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert size() > sizes[-1]
    finally:
        build.stop_compiling()
        thread.join(20)
    assert not thread.is_alive()


def test_a_compilation_counts_with_what_it_used_of_the_processor(folder, tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ $1 = --version ] || sleep 0.3\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "compile_seconds", [])
    started = time.perf_counter()
    build.load("probe", SOURCE, ())
    (used,) = build.compile_seconds
    assert 0 < used <= time.perf_counter() - started - 0.3
