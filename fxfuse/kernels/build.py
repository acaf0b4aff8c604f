"""Finds nvcc and compiles every ``*.cu`` of this folder into one shared library.

Imports neither torch nor fxfuse, so that packaging can load this file alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path

__all__ = ["BuildError", "build", "find_nvcc", "library_is_whole", "nvcc_version", "source_key"]

KERNELS = Path(__file__).resolve().parent
LIBRARY = "libfxfuse.so"
RECORD = "libfxfuse.json"
#: What is compiled: machine code for 8.0 with PTX for everything else, and 9.0 with Hopper's own instructions.
TARGETS = ("arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a")
FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", "-Xcompiler=-O2")
#: Machine code compressed as tightly as it goes, a fifth of its size; from this nvcc on, all whose drivers read it.
COMPRESSED, COMPRESSES = "--compress-mode=size", (13, 0)
# Nothing of the static CUDA runtime is exported, so it cannot meet the runtime that torch loads.
LINK_FLAGS = ("-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", "-Xlinker=--as-needed")
OLDEST_NVCC = (12, 0)  # the first that knows sm_90a

Progress = Callable[[str], None]


class BuildError(RuntimeError):
    """The kernels could not be built; the message says why and what to do."""


def find_nvcc() -> str | None:
    """The nvcc to use: ``$CUDACXX``, then ``$CUDA_HOME`` or ``$CUDA_PATH``, then PATH, then the usual folder."""
    named = os.environ.get("CUDACXX")
    if named:
        return shutil.which(named)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        root = os.environ.get(variable)
        if root and (found := shutil.which("nvcc", path=str(Path(root, "bin")))):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@lru_cache(maxsize=8)
def nvcc_version(nvcc: str) -> str:
    """The release of an nvcc, as ``13.0.88``. BuildError when it does not run."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{nvcc} does not run: {error}") from error
    found = re.search(r"V(\d+\.\d+\.\d+)", text) or re.search(r"release (\d+\.\d+)", text)
    if not found:
        raise BuildError(f"{nvcc} --version says nothing that reads as a CUDA release")
    return found.group(1)


def sources(folder: Path = KERNELS) -> list[Path]:
    """The kernel files of a folder, in a fixed order."""
    return sorted(folder.glob("*.cu"))


def source_key(folder: Path = KERNELS) -> str:
    """A digest of everything that decides what the library is, but for the compiler's version."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.cu"), *folder.rglob("*.cuh")]):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(text)}\n".encode())
        digest.update(text)
    digest.update(json.dumps([TARGETS, FLAGS, LINK_FLAGS, platform.system(), platform.machine()]).encode())
    return digest.hexdigest()[:32]


def library_is_whole(folder: Path, key: str | None = None) -> bool:
    """Whether a folder holds a library, undamaged, and (with ``key``) built from these sources."""
    try:
        record = json.loads((folder / RECORD).read_text())
        if key is not None and record["source_key"] != key:
            return False
        return bool(record["sha256"] == hashlib.sha256((folder / LIBRARY).read_bytes()).hexdigest())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def show_progress(line: str) -> None:
    """Progress on stderr: one line that is rewritten on a terminal, plain lines elsewhere."""
    terminal = sys.stderr.isatty()
    print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)


def build(folder: Path, *, progress: Progress | None = show_progress, kernels: Path = KERNELS) -> Path:
    """Compile the kernels into ``folder`` (made if missing; what was there under the same names is replaced at once).

    Compiles in parallel in a temporary folder beside ``folder`` and moves the finished pair (library and record) into
    place, so a build that fails or is killed leaves nothing half-written. Returns the library's path. Raises
    BuildError when there is no compiler, a source does not compile or the disk is full.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was not found: install the CUDA toolkit (12.0 or newer) or set CUDA_HOME")
    version = nvcc_version(nvcc)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_NVCC:
        raise BuildError(f"{nvcc} is CUDA {version}; the kernels need 12.0 or newer")
    files = sources(kernels)
    if not files:
        raise BuildError(f"no kernel sources in {kernels}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent, ignore_cleanup_errors=True) as name:
        work = Path(name)
        fresh = work / "entry"
        fresh.mkdir(mode=0o755)
        objects, serialized = _compile(nvcc, files, work, progress)
        library = fresh / LIBRARY
        _run([nvcc, *LINK_FLAGS, "-o", str(library), *map(str, objects)], work, "linking")
        record = {
            "source_key": source_key(kernels),
            "sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
            "nvcc": version,
            "targets": TARGETS,
            "serialized": serialized,
        }
        (fresh / RECORD).write_text(json.dumps(record, indent=1))
        if folder.exists():
            os.replace(folder, work / "old")
        os.replace(fresh, folder)
    if progress:
        progress(f"fxfuse: CUDA kernels built ({len(files)} files, nvcc {version})\n")
    return folder / LIBRARY


def _compile(nvcc: str, files: list[Path], work: Path, progress: Progress | None) -> tuple[list[Path], list[str]]:
    """The object files, and those of the sources in which a kernel's tensor-core instructions were serialized."""
    targets = [f"-gencode={target}" for target in TARGETS]
    if tuple(int(part) for part in nvcc_version(nvcc).split(".")[:2]) >= COMPRESSES:
        targets.append(COMPRESSED)
    if (os.cpu_count() or 1) > len(files):  # cores left over compile a file's targets side by side
        targets.append(f"--threads={len(TARGETS)}")
    objects = [work / f"{path.stem}.o" for path in files]

    serialized: list[str] = []

    def compile_one(path: Path, out: Path) -> str:
        said = _run([nvcc, *FLAGS, *targets, "-c", "-o", str(out), str(path)], work, path.name)
        if waits_for_each_product(said):
            serialized.append(path.name)
            print(f"fxfuse: {path.name}: ptxas has a kernel's wgmma instructions wait for each other", file=sys.stderr)
        return path.name

    if progress:
        progress(f"fxfuse: building CUDA kernels (0/{len(files)})")
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(compile_one, *pair) for pair in zip(files, objects, strict=True)]
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                name = job.result()
                if progress:
                    progress(f"fxfuse: building CUDA kernels ({done}/{len(files)}: {name})")
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return objects, sorted(serialized)


def waits_for_each_product(said: str) -> bool:
    """Whether ptxas could not let a kernel's wgmma instructions overlap (C7510 and its like): right, but slow."""
    return any("wgmma" in line and "serialized" in line for line in said.splitlines())


def _run(command: list[str], work: Path, what: str) -> str:
    # TMPDIR: nvcc's intermediate files go where the temporary folder is cleaned up.
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(work)}, check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines()
        raise BuildError(f"{what} failed ({command[0]} exited with {done.returncode}):\n" + "\n".join(lines[-12:]))
    return done.stderr + done.stdout
