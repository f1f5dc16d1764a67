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

    `name` begins its file name. Raises KernelBuildError when there is no compiler, it refuses the source, or what it
    made cannot be kept.
    """
    program = compiler()
    command = (*program, "-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", *_openmp(), *flags)
    key = hashlib.sha256("\0".join((*command, _version(program), source)).encode()).hexdigest()[:16]
    path = cache_folder() / f"{name}_{key}.so"
    if not _intact(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # it may have been cleared since
            path = _compile(path, source, command)
        except OSError as error:
            raise KernelBuildError(
                f"the compiled kernel {path.name} cannot be kept",
                str(error),
                "Make room there, or set CTRLCOMPILE_CACHE_DIR to a folder that can be written",
            ) from error
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
    """What this thread compiles inside runs in turns that training gives it, and fails after so many seconds of them.

    On Python 3.10 it runs throughout, with a low priority, and fails after so many seconds in all.

    A low priority is not enough. At idle priority it never ends where the training's threads spin while they wait. With
    any other, while it has one core the scheduler may put two of these threads on another and leave them there until it
    next looks at its balance: beside a niceness of 10, steps of 25 ms took up to 180 ms (Linux 6.18, two cores).
    """
    _terms.in_turns, _terms.timeout_s = _CAN_REST, timeout_s
    _terms.prefix = next((prefix for prefix in _YIELDING if shutil.which(prefix[0])), ())
    try:
        yield
    finally:
        del _terms.in_turns, _terms.timeout_s, _terms.prefix


def give_turn() -> None:
    """Lets what compiles beside training run for a twentieth of the time since its last turn, while the caller waits.

    Training calls it after each step. Where no turn has come for some seconds, a compiler gets on at idle priority.
    """
    for compiler in tuple(_running):
        compiler.take_turn()


def stop_compiling() -> None:
    """Ends the compilers that run; whoever waits for one gets a KernelBuildError."""
    for compiler in tuple(_running):
        compiler.signal(signal.SIGKILL)


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
            result = _run((*getattr(_terms, "prefix", ()), *command, "-o", str(draft), str(draft_text)))
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
    """Like `subprocess.run`, but what the compiler has started ends with it, and may run in turns."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **_OWN_GROUP) as process:
        compiler = _Compiler(process, getattr(_terms, "timeout_s", _TIMEOUT_S), getattr(_terms, "in_turns", False))
        _running.add(compiler)
        try:
            out, errors = compiler.communicate()
        except BaseException:
            compiler.signal(signal.SIGKILL)
            raise
        finally:
            _running.discard(compiler)
            compiler.ended.set()
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


class _Compiler:
    """A compiler that runs: throughout, or in turns. `ended` is set when nobody waits for it any more."""

    def __init__(self, process: "subprocess.Popen[str]", timeout_s: float, in_turns: bool) -> None:
        self._process, self._left_s, self._in_turns = process, timeout_s, in_turns
        self._lock, self._rests, self._last = threading.Lock(), False, time.monotonic()
        self.ended = threading.Event()
        if in_turns:
            self._rest()

    def communicate(self) -> tuple[str, str]:
        """What it has printed, when it has ended. Raises subprocess.TimeoutExpired when it ran for too long."""
        while True:
            try:
                return self._process.communicate(timeout=_LOOK_S if self._in_turns else self._left_s)
            except subprocess.TimeoutExpired:
                with self._lock:
                    if not self._rests:
                        self._left_s -= _SHARE * _LOOK_S  # what turns would have given it
                    elif time.monotonic() - self._last > _ALONE_S:
                        self._go_on()
                    if self._left_s <= 0 or not self._in_turns:
                        raise

    def take_turn(self) -> None:
        """Runs for its share of the time since its last turn, then rests."""
        if not self._in_turns:
            return
        with self._lock:
            turn = min(_SHARE * (time.monotonic() - self._last), _LONGEST_TURN_S)
            self._go_on()
            self.ended.wait(turn)
            self._rest()
            self._left_s -= turn

    def signal(self, number: signal.Signals) -> None:
        """Sends it, and all that it has started, a signal."""
        if self._process.returncode is None:
            with contextlib.suppress(OSError):  # it has just ended
                os.killpg(self._process.pid, number)

    def _rest(self) -> None:
        self.signal(signal.SIGSTOP)
        self._rests, self._last = True, time.monotonic()

    def _go_on(self) -> None:
        self.signal(signal.SIGCONT)
        self._rests = False


def _used_by_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


_SHARE, _LONGEST_TURN_S = 0.05, 1.0  # of the time, that training gives a compiler
_ALONE_S, _LOOK_S = 5.0, 0.1  # without a turn, until a compiler goes on by itself; between looks at that
# A group, to be stopped and ended as one. Where it is no session, the system ends it when training is killed during a
# rest, and init, in another session, inherits it. Python 3.10 can only make a session of it, so there it never rests.
_CAN_REST = sys.version_info >= (3, 11)
# At idle priority, whoever comes back from a pause has the core at once.
_YIELDING = (("chrt", "-i", "0"), ("nice", "-n", "19")) if _CAN_REST else (("nice", "-n", "10"),)
_OWN_GROUP: dict[str, Any] = {"process_group": 0} if _CAN_REST else {"start_new_session": True}
_terms = threading.local()
_running: set[_Compiler] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_running.clear)  # they are the parent's
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
