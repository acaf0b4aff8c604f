"""One process of the tests under a tool of compute-sanitizer: started, waited for, and what its log says."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOUND, NO_TESTS = 99, 5  # exit statuses: the tool's when it found something, pytest's when it had nothing to run

_running: set[subprocess.Popen[bytes]] = set()
_stopped = threading.Event()


@dataclass(frozen=True)
class Run:
    """What a tool said about a part of the tests."""

    tool: str
    part: str
    passed: int = 0
    failed: int = 0
    found: str = "cut off"
    seconds: float = 0.0

    @property
    def ended(self) -> bool:
        return self.found != "cut off"

    @property
    def clean(self) -> bool:
        return not self.failed and self.found.startswith("0 ") and "status" not in self.found

    def __str__(self) -> str:
        words = f"{self.passed} passed, {self.failed} failed, {self.found}" if self.ended else self.found
        return f"{self.tool} {self.part}: {words}, {self.seconds:.0f} s"


def run(tool: str, part: str, command: Sequence[str], log: Path, gpu: str, deadline: float) -> Run:
    """``command`` on one GPU until ``deadline`` (time.monotonic); all that it prints goes to ``log``. A tool that dies
    before Python has started is started again, once."""
    started = time.monotonic()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "FXFUSE_FOLLOWED": "1"}
    for _ in range(2):
        status = _status(command, log, environment, deadline)
        text = log.read_text(errors="replace")
        if status is None:
            return Run(tool, part, seconds=time.monotonic() - started)
        if status >= 0 or _stopped.is_set() or not all(line.startswith("=") for line in text.splitlines()):
            break
    failed = count(text, "failed") + count(text, "errors?")
    said = re.findall(r"SUMMARY: (\d+ (?:errors?|hazards?)[^\n]*)", text)
    found = said[0] if said else "no summary"
    if status not in (0, FOUND, NO_TESTS) and not failed:
        found += f", status {status}"
    return Run(tool, part, count(text, "passed"), failed, found, time.monotonic() - started)


def _status(command: Sequence[str], log: Path, environment: dict[str, str], deadline: float) -> int | None:
    """The exit status; None where the deadline came first. A session of its own, so that all of it can be ended."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        _running.add(process)
        try:
            if _stopped.is_set():  # while this one was being started
                return None
            return process.wait(None if deadline == float("inf") else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)
            _running.discard(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stop() -> None:
    """Ends every process that is still running; none is started again."""
    _stopped.set()
    for process in list(_running):
        _end(process)


def count(text: str, word: str) -> int:
    """The number before ``word`` in pytest's last line, ``3 failed, 20 passed, 1 skipped in 12.00s``."""
    lines = re.findall(r"^(?:=+ )?(\d+ [a-z].*) in [\d.]+s", text, re.MULTILINE)
    found = re.search(rf"(\d+) {word}\b", lines[-1] if lines else "")
    return int(found[1]) if found else 0


def why(log: Path) -> list[str]:
    """The first lines of a log that say what is wrong."""
    lines = log.read_text(errors="replace").splitlines()
    wrong = re.compile(r"=+ .*(Error|Invalid|hit|hazard|Barrier)|E  +\S|FAILED tests")
    return list(dict.fromkeys(line.strip() for line in lines if wrong.match(line)))[:6]


class Kept:
    """What was clean, in ``file``: known again as long as the package, the tests and ``how`` are the same."""

    def __init__(self, file: Path, how: Sequence[str]) -> None:
        self._file = file
        digest = hashlib.sha256("\0".join(how).encode())
        for path in sorted(p for f in ("fxfuse", "tests") for p in (ROOT / f).rglob("*") if p.suffix in _SOURCES):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
        self._of = digest.hexdigest()
        self._runs: dict[str, Run] = {}

    def read(self) -> int:
        """How many runs the file has for us."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(self._file.read_text())
            if said["of"] == self._of:
                self._runs = {f"{r['tool']} {r['part']}": Run(**r) for r in said["runs"]}
        return len(self._runs)

    def find(self, tool: str, part: str) -> Run | None:
        return self._runs.get(f"{tool} {part}")

    def add(self, run: Run) -> None:
        self._runs[f"{run.tool} {run.part}"] = run
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps({"of": self._of, "runs": [asdict(r) for r in self._runs.values()]}, indent=1))
        new.replace(self._file)


_SOURCES = frozenset((".py", ".cu", ".cuh"))
