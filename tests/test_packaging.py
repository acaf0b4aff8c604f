"""The package as it is shipped: what is in the wheel, what it asks for, what the two commands run."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fxfuse.kernels.build import find_nvcc

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def check_wheel() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / ".ci" / "check_wheel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_wheel(folder: Path, environment: dict[str, str], *leave_out: str) -> subprocess.CompletedProcess[str]:
    """Build the wheel from a copy of the sources, `folder`/source, in a process where torch can't be imported."""
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "_prebuilt", "*.egg-info", *leave_out)
    shutil.copytree(ROOT / "fxfuse", source / "fxfuse", ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    program = "import sys; sys.modules['torch'] = None; import setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    return subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=source, env={"PATH": "/usr/bin:/bin", "HOME": str(folder), **environment}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pure")
    done = build_wheel(folder, {"FXFUSE_PREBUILT": "0"})
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_the_pure_wheel_is_complete(pure_wheel: Path, check_wheel: ModuleType) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert check_wheel.faults(pure_wheel) == []


def test_the_wheel_with_kernels_is_complete(tmp_path: Path, check_wheel: ModuleType) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed: the wheel with prebuilt kernels is not tested here")
    # One small kernel is enough to see the library built, packed and found again; `make wheel` builds them all.
    others = [path.name for path in (ROOT / "fxfuse" / "kernels").glob("*.cu") if path.name != "runtime.cu"]
    done = build_wheel(tmp_path, {"FXFUSE_PREBUILT": "1", "CUDACXX": nvcc}, *others)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    assert check_wheel.faults(wheel, tmp_path / "source") == []
    assert not (tmp_path / "source" / "fxfuse" / "kernels" / "_prebuilt").exists(), "the source tree was written to"

    # The loader takes the library in the wheel only when it was built from the sources beside it.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    from fxfuse.kernels.build import library_is_whole, source_key

    kernels = tmp_path / "installed" / "fxfuse" / "kernels"
    assert library_is_whole(kernels / "_prebuilt", source_key(kernels))


def test_asking_for_kernels_without_a_compiler_fails(tmp_path: Path) -> None:
    done = build_wheel(tmp_path, {"FXFUSE_PREBUILT": "1", "CUDACXX": str(tmp_path / "none")})
    assert done.returncode != 0
    assert "nvcc was not found" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_the_check_finds_what_is_missing(pure_wheel: Path, tmp_path: Path, check_wheel: ModuleType) -> None:
    dropped = {"fxfuse/py.typed", "fxfuse/kernels/common.cuh"}
    broken = tmp_path / pure_wheel.name.replace("-any", "-linux_x86_64")
    with zipfile.ZipFile(pure_wheel) as old, zipfile.ZipFile(broken, "w") as new:
        for name in old.namelist():
            if name not in dropped and not name.endswith("LICENSE"):
                new.writestr(name, old.read(name).replace(b"fxfuse.backend:backend", b"fxfuse.nothing:backend"))
        new.writestr("tests/test_x.py", "")
    text = "\n".join(check_wheel.faults(broken))
    for words in (*dropped, "does not belong: tests/test_x.py", "LICENSE", "fxfuse.backend:backend", "tag is"):
        assert words in text
    assert check_wheel.main([str(broken)]) == 1
    assert check_wheel.main([str(pure_wheel)]) == 0


def test_entry_points_exist(pure_wheel: Path) -> None:
    with zipfile.ZipFile(pure_wheel) as archive:
        text = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    points = re.findall(r"^\w+ = ([\w.]+):(\w+)$", text, re.MULTILINE)
    assert len(points) == 2
    for module, name in points:
        assert callable(getattr(importlib.import_module(module), name))


def test_the_version_is_said_once() -> None:
    import fxfuse

    assert f'\nversion = "{fxfuse.__version__}"\n' in PROJECT


def requirements() -> list[str]:
    """The names of everything pyproject.toml depends on, extras included."""
    listed = re.findall(r'^    "([A-Za-z][\w.-]*)[<>=]', PROJECT, re.MULTILINE)
    assert {"torch", "tabulate", "pytest", "tqdm"} <= set(listed)
    return listed


def test_every_dependency_is_pinned_and_has_its_reason() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    pins: dict[str, Any] = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", constraints, re.MULTILINE))
    assert pins["torch"] == "2.13.0"
    missing = [name for name in requirements() if name not in pins]
    assert not missing, f"constraints.txt does not pin {missing}"
    for name in requirements():
        assert re.search(rf'^    "{name}[<>=][^"]*",\s+# \S', PROJECT, re.MULTILINE), f"{name} has no reason beside it"


def test_ci_runs_the_command_the_readme_gives() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    for command in ("make test", "make demo"):
        assert command in readme
    for step in ("make test", "make lint", "make docs", "make wheel"):
        assert re.search(rf"^step {step}\b", script, re.MULTILINE)


def test_make_help_lists_every_command() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    listed = subprocess.run([make, "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    for target in phony[1].split():
        assert re.search(rf"^  make {target} ", listed, re.MULTILINE)
