"""Loads generated Triton source as a module, from a file that stays in the kernel cache for whoever wants to read it.

A file is named after what it computes and a digest of its text. What is run is the text that was asked for: the file is
compared with it first and written anew where it differs, so a damaged file costs nothing. It is written under another
name and moved into place, so that any number of processes may load at once.
"""

import hashlib
import importlib.machinery
import importlib.util
import os
import tempfile
import threading
from pathlib import Path
from types import ModuleType

from . import build
from .build import KernelBuildError

_loaded: dict[Path, ModuleType] = {}
_lock = threading.Lock()


def load(name: str, source: str) -> ModuleType:
    """The module of `source`, whose file name begins with `name`; one module for the same text within a process.

    Raises KernelBuildError when the file cannot be written or Triton refuses it.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = build.cache_folder() / f"{name}_{digest}.py"
    with _lock:
        if path not in _loaded:
            _write(path, source)
            _loaded[path] = _run(path)
        return _loaded[path]


def write(path: Path, content: str) -> None:
    """Puts `content` into `path` at once: a reader sees the old file or the new one, never a part."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".build-", delete=False) as draft:
        draft.write(content)
    os.replace(draft.name, path)


def _write(path: Path, source: str) -> None:
    try:
        if path.exists() and path.read_text(errors="replace") == source:
            return
        write(path, source)
    except OSError as error:
        raise KernelBuildError(
            f"the kernel {path.name} could not be written",
            str(error),
            "Set CTRLCOMPILE_CACHE_DIR to a folder that can be written",
        ) from error


def _run(path: Path) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
    spec = importlib.machinery.ModuleSpec(path.stem, loader, origin=str(path))
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except Exception as error:
        raise KernelBuildError(
            f"the kernel {path.name} could not be loaded",
            f"{type(error).__name__}: {error}",
            "Install a Triton that goes with this PyTorch, 3.6 or newer",
        ) from error
    return module
