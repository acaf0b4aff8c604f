"""The bench as a command: what a run saves and shows, and the demo. No test asserts a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import TINY, tiny
from torch import nn

from fxfuse import cli
from fxfuse.bench import demo, formats, measure, plot, run
from fxfuse.bench.workloads import WORKLOADS

# The run --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings from small buffers: their values do not matter here."""
    monkeypatch.setitem(sys.modules["fxfuse.bench.limits"].COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(sys.modules["fxfuse.bench.limits"].PRODUCT, "cpu", (64, 64, 64))
    monkeypatch.setattr(run.machine, "cache_bytes", lambda device: 0)


def test_bench_end_to_end(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "new" / "results.json", tmp_path / "results.png"
    arguments = ["bench", "--device", "cpu", "--shapes", "8,6,5;8,6", "--mode", "fwd", "--vs", "eager,liger"]
    arguments += ["--repeat", "3", "--seed", "7", "--json", str(out), "--plot", str(picture)]
    assert cli.main(arguments) == 0
    document = json.loads(out.read_text())
    assert document["command"].startswith("fxfuse bench --device cpu --shapes '8,6,5;8,6'")
    assert document["seed"] == 7
    assert document["versions"]["torch"] == torch.__version__
    assert document["machine"]["cpu"]
    assert document["limits"]["bandwidth"] > 0
    assert {row["workload"] for row in document["results"]} == set(WORKLOADS)
    assert {row["rival"] for row in document["results"]} == {"eager", "liger", "fxfuse"}
    ours = [row for row in document["results"] if row["rival"] == "fxfuse"]
    assert all(row["status"] == "ok" and len(row["replaced"]) == 1 for row in ours)
    assert not list(out.parent.glob(".*")), "a temporary file was left"
    assert plot.read_digest(picture) == plot.digest(document)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= max(80, len(str(out)) + 9)
    assert "KL divergence 8×6, fp32, fwd" in shown


def test_the_budget_ends_a_run_in_the_middle_of_a_case(
    quick: None, plant_rival: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def swallows_everything(model: Any, workload: Any) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(60)

        return call

    plant_rival("endless", swallows_everything)
    out = tmp_path / "results.json"
    began = time.monotonic()
    arguments = ["bench", "--device", "cpu", "--shapes", "8,6,5", "--workload", "linear_activation_scale"]
    assert cli.main([*arguments, "--vs", "endless", "--budget", "3", "--json", str(out)]) == 0
    assert time.monotonic() - began < 30
    rows = json.loads(out.read_text())["results"]
    assert {row["status"] for row in rows} == {"skipped"}
    assert {row["rival"] for row in rows} == {"eager", "endless", "fxfuse"}
    assert "the budget of 3 s was spent" in capsys.readouterr().out


def test_a_workload_that_cannot_be_built_is_reported_and_the_rest_measured(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(shape: Any) -> nn.Module:
        raise RuntimeError("out of memory")

    broken = dataclasses.replace(WORKLOADS["kl_div"], build=no_memory)
    monkeypatch.setitem(WORKLOADS, "kl_div", broken)
    out = tmp_path / "r.json"
    arguments = ["bench", "--device", "cpu", "--shapes", "8,6", "--mode", "fwd", "--vs", "eager", "--repeat", "3"]
    assert cli.main([*arguments, "--json", str(out)]) == 1
    rows = json.loads(out.read_text())["results"]
    assert {row["status"] for row in rows if row["workload"] == "kl_div"} == {"failed"}
    assert {row["status"] for row in rows if row["workload"] == "distillation_kl"} == {"ok"}
    assert "out of memory" in capsys.readouterr().out


def test_append_replaces_measured_cases_whole_and_keeps_the_others(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    base = ["bench", "--device", "cpu", "--shapes", "8,6", "--mode", "fwd", "--repeat", "3", "--json", str(out)]
    assert cli.main([*base, "--vs", "liger"]) == 0
    before = formats.by_case(json.loads(out.read_text())["results"])
    assert cli.main([*base, "--vs", "eager", "--workload", "kl_div", "--append"]) == 0
    document = json.loads(out.read_text())
    after = formats.by_case(document["results"])
    assert list(after) == list(before)
    distillation, divergence = sorted(after)
    assert after[distillation] == before[distillation]
    assert set(after[divergence]) == {"eager", "fxfuse"}, "rivals of two runs were mixed in one case"
    assert document["command"].count("fxfuse bench") == 2

    assert cli.main([*base, "--vs", "eager", "--append", "--seed", "1"]) == 2
    assert "its seed is 0, here it is 1" in capsys.readouterr().err
    assert json.loads(out.read_text()) == document
    skipped = {"command": "", "limits": {}, "results": [measure.empty_row(tiny("kl_div"), "fxfuse", "skipped")]}
    assert formats.by_case(run.merged(document, skipped)["results"]) == after


def test_saving_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    run.save({"results": [1]}, path)
    with pytest.raises(TypeError):
        run.save({"results": object()}, path)
    assert json.loads(path.read_text()) == {"results": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "kl"], "kl is not one of"),
        (["--vs", "eager,nobody"], "nobody is not one of"),
        (["--shapes", "1,x"], "not numbers"),
        (["--budget", "-1"], "not a number above 0"),
        (["--repeat", "0"], "not a number above 0"),
    ],
)
def test_bad_options_are_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nonsense", "meta"] + ([] if torch.cuda.is_available() else ["cuda"]))
def test_a_device_that_cannot_be_used_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", name]) == 2
    assert f"--device {name}" in capsys.readouterr().err


# The demo -------------------------------------------------------------------------------------------------------------


def test_demo_shows_five_models_in_eighty_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, workload in list(WORKLOADS.items()):
        monkeypatch.setitem(WORKLOADS, name, dataclasses.replace(workload, sizes={"cpu": [TINY[workload.dims]]}))
    assert cli.main(["demo", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count("replaced: ") == len(demo.DEMO) == 5
    for pattern in {name.removesuffix("_train") for name, _ in demo.DEMO}:
        assert pattern in shown
    assert "gain" in shown
    assert "MiB" in shown


def test_demo_fails_when_a_model_is_not_matched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = WORKLOADS["linear_activation_scale"]
    other = dataclasses.replace(workload, build=lambda s: nn.Sequential(nn.Linear(s[2], s[1]), nn.Softmax(-1)),
                                sizes={"cpu": [(8, 6, 5)]})  # fmt: skip
    monkeypatch.setitem(WORKLOADS, "linear_activation_scale", other)
    monkeypatch.setattr(demo, "DEMO", (("linear_activation_scale", "fwd"),))
    assert cli.main(["demo", "--device", "cpu"]) == 1
    assert "nothing was replaced" in capsys.readouterr().out
