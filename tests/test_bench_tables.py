"""The bench's tables and plots, and that the pages of this repository show what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxfuse.bench import plot, tables

ROOT = Path(__file__).resolve().parent.parent


def row(rival: str, ms: float, **more: Any) -> dict[str, Any]:
    base = {"workload": "kl_div", "shape": [4, 4], "precision": "fp32", "mode": "fwd", "rival": rival, "status": "ok"}
    numbers = {"median_ms": ms, "spread": 0.02, "ratio": 8.0 / ms, "limit_ms": 1.0, "share_of_limit": 1.0 / ms}
    return {**base, "reason": "", **numbers, "peak_bytes": 3 << 20, "error": 1e-7, **more}


DOCUMENT: dict[str, Any] = {
    "schema": 1,
    "command": "fxfuse bench",
    "date": "2026-01-01",
    "seed": 0,
    "machine": {"cpu": "a CPU", "torch_threads": 2, "gpu": "a GPU"},
    "versions": {"torch": "2.13.0", "fxfuse": "0.1.0"},
    "limits": {},
    "results": [
        row("eager", 8.0),
        row("compile", 4.0),
        row("max-autotune", 2.0),
        {key: row("liger", 1.0)[key] for key in ("workload", "shape", "precision", "mode", "rival")}
        | {"status": "missing", "reason": "not installed"},
        row("fxfuse", 1.25),
    ],
}
MARKED = "# T\n\n<!-- bench:here -->\nold\n<!-- /bench:here -->\n\nrest <!-- a comment -->\n"


def test_a_table_is_written_between_its_markers_and_only_there() -> None:
    filled = tables.fill(MARKED, {"here": DOCUMENT})
    assert filled.startswith("# T\n\n<!-- bench:here -->\n")
    assert filled.endswith("<!-- /bench:here -->\n\nrest <!-- a comment -->\n")
    assert "old" not in filled
    line = next(line for line in filled.splitlines() if line.startswith("| KL divergence"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["KL divergence", "4×4", "fp32", "fwd", "8", "2", "1.25", "6.40×", "1.60×", "1", "80 %"]
    assert "a GPU, torch 2.13.0" in filled
    assert "`fxfuse bench`" in filled
    assert tables.fill(filled, {"here": DOCUMENT}) == filled


def test_of_many_runs_the_first_is_named_and_the_others_counted() -> None:
    command = "fxfuse bench --sweep && fxfuse bench --append && fxfuse bench --append --vs eager"
    several = DOCUMENT | {"command": command}
    filled = tables.fill(MARKED, {"here": several})
    assert "`fxfuse bench --sweep` (benchmarks/here.json, which names 2 more runs)" in filled
    assert "which names" not in tables.fill(MARKED, {"here": DOCUMENT})


def test_views_and_filters() -> None:
    for view in tables.VIEWS:
        assert "| " in tables.fill(MARKED.replace("here -->", f"here view={view} -->", 1), {"here": DOCUMENT})
    full = tables.markdown(DOCUMENT, "here", {"view": "full", "rival": "liger,fxfuse"})
    assert "missing" in full
    assert "PyTorch eager" not in full


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MARKED.replace("bench:here", "bench:nowhere"), "no benchmarks/nowhere.json"),
        (MARKED.replace("<!-- /bench:here -->", ""), "without a matching"),
        (MARKED.replace("here -->", "here view=odd -->", 1), "no view 'odd'"),
        (MARKED.replace("here -->", "here colour=red -->", 1), "unknown option 'colour'"),
        (MARKED.replace("here -->", "here workload=none -->", 1), "no result matches"),
    ],
)
def test_a_bad_marker_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tables.fill(text, {"here": DOCUMENT})


def test_the_command_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "here.json").write_text(json.dumps(DOCUMENT))
    page = tmp_path / "README.md"
    page.write_text(MARKED)
    picture = tmp_path / "docs" / "images" / "bench-here.png"
    check = ["--check", "--root", str(tmp_path)]
    assert tables.main(check) == 1
    assert page.read_text() == MARKED
    assert not picture.exists()
    assert tables.main(["--root", str(tmp_path)]) == 0
    assert tables.main(check) == 0
    page.write_text(page.read_text().replace("1.25", "1.24"))  # a number typed by hand
    assert tables.main(check) == 1
    assert "README.md: out of date" in capsys.readouterr().out
    assert tables.main(["--root", str(tmp_path)]) == 0
    changed = json.loads(json.dumps(DOCUMENT))
    changed["results"][0]["median_ms"] = 9.0
    (tmp_path / "benchmarks" / "here.json").write_text(json.dumps(changed))
    assert tables.main(check) == 1
    assert "bench-here.png: out of date" in capsys.readouterr().out


def test_the_pages_of_this_repository_show_their_results() -> None:
    stale = tables.out_of_date(ROOT)
    assert not stale, f"run `make tables`: {[str(page.relative_to(ROOT)) for page in stale]} differ from benchmarks/"
    drawn = plot.out_of_date(ROOT, tables.load(ROOT / "benchmarks"))
    assert not drawn, f"run `make tables`: {[path.name for path in drawn]} differ from benchmarks/"


def test_a_plot_is_opaque_and_has_something_on_it(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="plots need matplotlib: pip install 'fxfuse[bench]'")
    path = tmp_path / "p.png"
    plot.draw(DOCUMENT, path)
    pixels = image.imread(path)
    assert pixels.shape[2] == 3 or pixels[..., 3].min() == 1.0
    assert tuple(pixels[0, 0, :3]) == (1.0, 1.0, 1.0)
    orange = abs(pixels[..., :3] - [0xD5 / 255, 0x5E / 255, 0]).max(-1) < 0.02
    assert orange.sum() > 500, "the bar of fxfuse is not there"
    assert plot.read_digest(path) == plot.digest(DOCUMENT)
    assert plot.read_digest(tmp_path / "none.png") is None
