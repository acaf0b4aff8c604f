"""The command: its verbs, its errors, its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import cli, doctor, ops
from fxfuse.kernels import loader
from fxfuse.target import TargetError, example_inputs, load_model

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
MODELS = """
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 6)

        def forward(self, x):
            return torch.relu(self.linear(x)) / 2

    ready = Model()
    number = 3

    def broken():
        raise RuntimeError("no weights")
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with models in it."""
    name = "models_for_cli_tests"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODELS))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_python_m_fxfuse_lists_the_verbs() -> None:
    done = subprocess.run([sys.executable, "-m", "fxfuse", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("demo", "bench", "explain", "doctor", "build"):
        assert f"    {verb} " in done.stdout


def test_no_verb_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m fxfuse doctor | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["Model", "ready"])
def test_explain_names_what_is_replaced(models: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", f"{models}:{name}", "--input", "4,5"]) == 0
    assert "linear_activation_scale" in capsys.readouterr().out


def test_explain_draws(models: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "graph.svg"
    assert cli.main(["explain", f"{models}:Model", "--draw", str(picture)]) == 0
    assert "<svg" in picture.read_text()
    assert cli.main(["explain", f"{models}:Model", "--draw", str(tmp_path / "graph.xyz")]) == 2
    assert "fxfuse explain:" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["explain", "doctor"])
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nothing", "not of the form"),
        ("no_such_module:x", "No module named"),
        ("{models}:absent", "absent"),
        ("{models}:number", "int"),
        ("{models}:broken", "no weights"),
    ],
)
def test_a_model_that_cannot_be_had_is_named(
    models: str, verb: str, target: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb, target.format(models=models)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_doctor_wants_the_inputs_of_a_model(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", f"{models}:Model"]) == 2
    assert "--input" in capsys.readouterr().err


def test_targets(models: str) -> None:
    assert isinstance(load_model(f"{models}:Model"), torch.nn.Module)
    assert load_model(f"{models}:ready") is load_model(f"{models}:ready")
    assert [tuple(x.shape) for x in example_inputs(["2,3", "4"])] == [(2, 3), (4,)]
    for bad in ("a,b", "2,-3"):
        with pytest.raises(TargetError, match="not a shape"):
            example_inputs([bad])


# fxfuse build ---------------------------------------------------------------------------------------------------------


def run_build(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fxfuse", "build", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_build_without_a_compiler_says_so(tmp_path: Path) -> None:
    missing = str(tmp_path / "no-nvcc")
    for arguments in ([], ["--force"]):
        done = run_build(*arguments, CUDACXX=missing, FXFUSE_CACHE_DIR=str(tmp_path))
        if (ROOT / "fxfuse" / "kernels" / "_prebuilt").exists() and not arguments:
            continue  # a prebuilt library needs no compiler
        assert done.returncode == 1, done.stdout
        assert "nvcc was not found" in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir()), "something half-made was left"


def test_build_makes_the_library_once() -> None:
    """In the usual cache folder, so that whatever needs the kernels after this test finds them built."""
    from fxfuse.kernels.build import find_nvcc

    if find_nvcc() is None:
        pytest.skip("nvcc is not installed: building the kernels is not tested here")
    first = run_build()
    assert first.returncode == 0, first.stderr
    again = run_build()
    assert again.returncode == 0, again.stderr
    origin, path = again.stdout.strip().split(": ", 1)
    assert origin in ("cache", "prebuilt")
    assert Path(path).read_bytes()[:4] == b"\x7fELF"
    assert "building" not in again.stderr


# fxfuse doctor --------------------------------------------------------------------------------------------------------


class TwoMatches(nn.Module):
    """A Linear–BatchNorm and a Linear–ReLU, and a Linear–Softmax that nothing takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.second = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(torch.relu(self.second(self.bn(self.first(x)))), -1)


def test_doctor_shows_the_machine_and_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for words in (torch.__version__, "nvcc", "driver", "kernels", str(loader.cache_dir())):
        assert words in shown
    roads = shown.split("Roads on ")[1]
    for name in ops.names():
        assert f"\n{name} " in roads
    assert "depends" not in roads, "an op is not called by any of the bench's models"
    assert "every" in roads or "float32" in roads
    assert max(map(len, roads.splitlines()[1:])) <= 80


def test_doctor_names_a_broken_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\necho nonsense\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(fake))
    assert "says nothing that reads as a CUDA release" in dict(doctor._facts(CPU))["nvcc"].replace("\n", " ")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "none"))
    assert "not found" in dict(doctor._facts(CPU))["nvcc"]


def test_diagnose_gives_each_replacement_its_road_and_changes_nothing() -> None:
    model = TwoMatches().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = doctor.diagnose(model, torch.randn(4, 5))
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("linear_")]
    assert sorted(lines) == ["linear_activation_scale", "linear_scale_batchnorm1d"]
    assert "(the model)" in text
    assert "composed" in text or "closed" in text
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert doctor.diagnose(fxfuse.optimize(model), torch.randn(4, 5)).count("linear_") == 2
    assert "nothing is replaced" in doctor.diagnose(nn.Identity(), torch.randn(3))


def test_diagnose_names_what_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    model[0].register_forward_hook(lambda module, inputs, output: None)
    text = doctor.diagnose(model, torch.randn(4, 5))
    assert "left alone" in text
    assert "hook" in text


def test_the_recorder_sees_calls_and_lets_them_through() -> None:
    p, t = torch.rand(4, 5).softmax(-1), torch.rand(4, 5).softmax(-1)
    call = ops.get("kl_div").call
    with doctor.RoadRecorder() as recorder:
        got = call(p.log(), t, reduction="sum")
    torch.testing.assert_close(got, torch.nn.functional.kl_div(p.log(), t, reduction="sum"))
    assert [(name, road) for name, road, _ in recorder.calls] == [("kl_div", ops.get("kl_div").road(p, t).name)]
