"""Compiles generated C++ with the system's compiler, and keeps the result on disk.

A library is found by a hash of its source, its flags and the compiler's version, so nothing in the cache can be stale.
It is written under another name and moved into place, so that any number of processes may build at once. It ends in a
digest, which is checked before it is loaded, so that a damaged file is built anew rather than run.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

_TIMEOUT_S = 300


compile_seconds: list[float] = []  # of the processor, for each compilation of this process


class KernelBuildError(RuntimeError):
    """No kernel could be built: says what failed, why, and what to do about it."""

    def __init__(self, what: str, why: str, advice: str) -> None:
        super().__init__(f"{what}: {why}. {advice}")
        self.what, self.why, self.advice = what, why, advice


def load(name: str, source: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library of `source` (C++), from the cache or compiled now with `flags` added to the usual ones.

    `name` begins its file name. Raises KernelBuildError when there is no compiler or it refuses the source.
    """
    program = compiler()
    command = (*program, "-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", *_openmp(), *flags)
    key = hashlib.sha256("\0".join((*command, _version(program), source)).encode()).hexdigest()[:16]
    path = cache_folder() / f"{name}_{key}.so"
    if not _intact(path):
        path = _compile(path, source, command)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelBuildError(
            f"the compiled kernel {path.name} could not be loaded",
            str(error),
            f"Delete {path.parent}; if it lies on a file system mounted noexec, set CTRLCOMPILE_CACHE_DIR to another",
        ) from error


@contextlib.contextmanager
def beside_training(timeout_s: float) -> Iterator[None]:
    """What this thread compiles inside runs an eighth of the time, and fails after so many seconds."""
    _terms.in_turns, _terms.timeout_s = True, timeout_s
    try:
        yield
    finally:
        del _terms.in_turns, _terms.timeout_s


def stop_compiling() -> None:
    """Ends the compilers that run; whoever waits for one gets a KernelBuildError."""
    for process in tuple(_running):
        _signal(process, signal.SIGKILL)


def cache_folder() -> Path:
    """Where compiled kernels and their sources lie.

    `$CTRLCOMPILE_CACHE_DIR`, else `$XDG_CACHE_HOME/ctrlcompile`, else `~/.cache/ctrlcompile`; where that cannot be
    written, a temporary folder for this process, with one warning.
    """
    chosen = os.environ.get("CTRLCOMPILE_CACHE_DIR")
    if chosen:
        return _writable(Path(chosen))
    base = os.environ.get("XDG_CACHE_HOME")
    return _writable((Path(base) if base else Path.home() / ".cache") / "ctrlcompile")


def compiler() -> tuple[str, ...]:
    """The C++ compiler and its own arguments: `$CXX`, else the first of c++, g++ and clang++ on the PATH."""
    chosen = os.environ.get("CXX")
    for candidate in [shlex.split(chosen)] if chosen else [["c++"], ["g++"], ["clang++"]]:
        program = shutil.which(candidate[0])
        if program:
            return (program, *candidate[1:])
    raise KernelBuildError(
        "no C++ compiler",
        f"CXX={chosen} is no program on the PATH" if chosen else "none of c++, g++ and clang++ is on the PATH",
        "Install one (on Debian and Ubuntu: apt install g++), or set CXX to one",
    )


@functools.cache
def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return folder
    except OSError as error:
        temporary = tempfile.TemporaryDirectory(prefix="ctrlcompile-")
        _temporary_folders.append(temporary)
        warnings.warn(
            f"the kernel cache {folder} cannot be written ({error.strerror}): kernels are compiled anew in every "
            "process. Set CTRLCOMPILE_CACHE_DIR to a folder that can be written.",
            stacklevel=4,
        )
        return Path(temporary.name)


_temporary_folders: list[tempfile.TemporaryDirectory[str]] = []  # kept until the process ends, then removed


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    try:
        result = subprocess.run((*compiler, "--version"), capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelBuildError("the C++ compiler does not run", str(error), "Set CXX to one that works") from error
    return result.stdout


def _compile(path: Path, source: str, command: tuple[str, ...]) -> Path:
    text = path.with_suffix(".cpp")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
        draft_text, draft = Path(scratch, text.name), Path(scratch, path.name)
        draft_text.write_text(source)
        started, used = time.perf_counter(), _used_by_children()
        try:
            result = _run((*command, "-o", str(draft), str(draft_text)))
        except (OSError, subprocess.SubprocessError) as error:
            raise KernelBuildError("the C++ compiler does not run", str(error), "Set CXX to one that works") from error
        if result.returncode or not draft.exists():
            lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            raise KernelBuildError(
                f"{Path(command[0]).name} could not compile {text.name}",
                lines[0].strip() if lines else f"exit status {result.returncode}",
                "Set CXX to GCC 10 or newer or Clang 12 or newer, with OpenMP",
            )
        # Another child of this process may have ended meanwhile: no more than a compiler can have used.
        compile_seconds.append(min(_used_by_children() - used, time.perf_counter() - started))
        with open(draft, "ab") as library:  # a footer: the loader ignores it, and it cannot part from the file
            library.write(_digest(draft.read_bytes()))
        os.replace(draft_text, text)
        os.replace(draft, path)
    return path


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Like `subprocess.run`, but what the compiler has started ends with it, and beside training rests in between."""
    pipe, in_turns = subprocess.PIPE, getattr(_terms, "in_turns", False)
    timeout_s = getattr(_terms, "timeout_s", _TIMEOUT_S)
    deadline = time.monotonic() + timeout_s
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **_OWN_GROUP) as process:
        _running.add(process)
        try:
            while True:
                try:
                    out, errors = process.communicate(timeout=_RUNS_S if in_turns else timeout_s)
                    break
                except subprocess.TimeoutExpired:
                    if not in_turns or time.monotonic() > deadline:
                        raise
                    _signal(process, signal.SIGSTOP)
                    time.sleep(_RESTS_S)
                    _signal(process, signal.SIGCONT)
        except BaseException:
            _signal(process, signal.SIGKILL)
            raise
        finally:
            _running.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def _signal(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _used_by_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# Turns of the compiler beside training. A niceness or idle priority is not enough: while it runs at all, two of the
# training's threads may meet on one core and stay there, until the scheduler looks at its balance, for up to 0.3 s.
_RUNS_S, _RESTS_S = 0.003, 0.02
# A group, to be stopped and ended as one. Where it is no session (all that Python 3.10 has), the system ends it when
# the training is killed during a rest.
_OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
_terms = threading.local()
_running: "set[subprocess.Popen[str]]" = set()
_FOOTER = b"ctrlcompile"


def _digest(content: bytes) -> bytes:
    return _FOOTER + hashlib.sha256(content).digest()


def _intact(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = len(_FOOTER) + hashlib.sha256().digest_size
    return content[-size:] == _digest(content[:-size])


@functools.cache
def _openmp() -> tuple[str, ...]:
    """Links the OpenMP runtime that torch has loaded, which a wheel may carry under a name of its own."""
    folder = Path(torch.__file__).parent
    for place in (folder / "lib", folder.parent / "torch.libs"):
        for library in sorted(place.glob("libgomp*.so*")):
            # Before -fopenmp's own -lgomp, which then has nothing left to resolve and is dropped.
            return ("-Wl,--no-as-needed", str(library), f"-Wl,-rpath,{place}", "-Wl,--as-needed")
    return ()
