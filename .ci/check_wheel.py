"""Checks what is in a built wheel: python .ci/check_wheel.py dist/*.whl; exits non-zero naming what is wrong.

It must hold every file of the package that git would ship (modules, kernel sources, py.typed), the entry points and
the licence, nothing else at the top level, and either the prebuilt kernels with a platform tag or neither.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("*.py", "*.cu", "*.cuh", "py.typed")
PREBUILT = "fxfuse/kernels/_prebuilt/libfxfuse.so"


def faults(wheel: Path, root: Path = ROOT) -> list[str]:
    """What is wrong with `wheel`, built from the sources in `root`; empty when nothing is."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        package = root / "fxfuse"
        expected = {p.relative_to(root).as_posix() for pattern in SHIPPED for p in package.rglob(pattern)}
        found += [f"missing: {name}" for name in sorted(expected - names)]
        foreign = {name for name in names if not name.startswith(("fxfuse/", "fxfuse-"))}
        found += [f"does not belong: {name}" for name in sorted(foreign)]
        info = next((n.split("/")[0] for n in names if n.endswith(".dist-info/METADATA")), "")
        points = archive.read(f"{info}/entry_points.txt").decode() if f"{info}/entry_points.txt" in names else ""
        for point in ("fxfuse = fxfuse.cli:main", "fxfuse = fxfuse.backend:backend"):
            if point not in points:
                found.append(f"missing entry point: {point}")
        if not any(name.startswith(f"{info}/") and name.endswith("LICENSE") for name in names):
            found.append("missing: LICENSE")

        carries = PREBUILT in names
        tag = "-".join(wheel.stem.split("-")[2:])
        wanted = "py3-none-linux_x86_64" if carries else "py3-none-any"
        if tag != wanted:
            found.append(f"tag is {tag}, but a wheel {'with' if carries else 'without'} {PREBUILT} is {wanted}")
        if carries:
            record = json.loads(archive.read(PREBUILT.replace(".so", ".json")))
            if "arch=compute_90a,code=sm_90a" not in record["targets"]:
                found.append(f"the library is built for {record['targets']}, without sm_90a")
            if archive.read(PREBUILT)[:4] != b"\x7fELF":
                found.append(f"{PREBUILT} is not a shared library")
    return found


def main(arguments: list[str]) -> int:
    if not arguments:
        print("usage: check_wheel.py WHEEL...", file=sys.stderr)
        return 2
    failed = False
    for wheel in map(Path, arguments):
        problems = faults(wheel)
        failed |= bool(problems)
        with zipfile.ZipFile(wheel) as archive:
            kind = "with the prebuilt kernels" if PREBUILT in archive.namelist() else "pure, kernels as sources"
        print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB, {kind}: {'; '.join(problems) or 'complete'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
