"""What an installation holds: the top-level rooms inside the package, types, licence and the backend's entry point."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"ctrlcompile": "ctrlcompile", "passes": "ctrlcompile/passes", "kernels": "ctrlcompile/kernels"}

LOCATE = """
import pathlib, sys
import torch
assert not any(name.startswith("ctrlcompile") for name in sys.modules)
backend = torch._dynamo.lookup_backend("ctrlprune")
assert backend.__module__ == "ctrlcompile.backend", backend
import ctrlcompile.kernels, ctrlcompile.passes
print(*(pathlib.Path(m.__file__).parent for m in (ctrlcompile, ctrlcompile.passes, ctrlcompile.kernels)), sep="\\n")
"""


def locate(cwd: Path, **environment: str) -> list[Path]:
    """Where a fresh process, which asks torch for the backend first, finds the package, its passes and its kernels."""
    command = [sys.executable, "-c", LOCATE]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / "source" / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_module_of_every_room(wheel: Path) -> None:
    expected = {
        str(Path(ROOMS[room]) / source.relative_to(ROOT / room))
        for room in ROOMS
        for source in (ROOT / room).rglob("*.py")
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == expected
    assert {"ctrlcompile/py.typed", "ctrlcompile/inspect/report.html"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_backend_is_found_in_an_unpacked_wheel_by_a_process_that_never_imported_it(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    found = locate(tmp_path, PYTHONPATH=str(tmp_path))
    assert found == [tmp_path / room for room in ROOMS.values()]


def test_editable_install_serves_the_rooms_from_the_repository(tmp_path: Path) -> None:
    assert locate(tmp_path) == [ROOT / room for room in ROOMS]
