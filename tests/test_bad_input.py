"""What cannot work says so at once, in one clear sentence, and leaves everything as it was."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from models import Branching, Halved, ScaleNorm, assert_untouched, fingerprint, patterns_in
from torch import nn

import fxfuse
from fxfuse import fuse
from fxfuse.rewrite import Fuel

torch.set_num_threads(1)
X = torch.randn(5, 8)


@pytest.mark.parametrize("thing", [None, 3, "model", X, [Halved()], {}, Halved, nn.Linear])
def test_what_is_not_a_model(thing):
    with pytest.raises(TypeError, match=r"optimize takes an nn\.Module, a function or an ExportedProgram, not"):
        fxfuse.optimize(thing)


def test_a_class_is_named():
    with pytest.raises(TypeError, match="the class Halved"):
        fxfuse.optimize(Halved)


@pytest.mark.parametrize("patterns", ["nope", ["kl_div", "nope"], {"nope"}])
def test_a_pattern_that_does_not_exist(patterns):
    for model in (Halved(), F.relu):
        with pytest.raises(ValueError, match=r"no pattern is named 'nope'; there are: .*kl_div"):
            fxfuse.optimize(model, patterns=patterns)


@pytest.mark.parametrize("patterns", [[3], [None], [F.relu]])
def test_patterns_of_a_wrong_type(patterns):
    with pytest.raises(TypeError, match="patterns are names or"):
        fxfuse.optimize(Halved(), patterns=patterns)


@pytest.mark.parametrize("example", [3, "x", object(), X.numpy()])
def test_examples_of_a_wrong_type(example):
    with pytest.raises(TypeError, match="example_inputs is a tensor, a tuple of positional arguments or a dict"):
        fxfuse.optimize(Halved(), example)


@pytest.mark.parametrize("example", [(X, X), {"y": X}, (), {"x": X, "y": X}])
def test_examples_that_do_not_fit_the_signature(example):
    with pytest.raises(TypeError, match=r"example_inputs do not fit forward\(x\)"):
        fxfuse.optimize(Halved(), example)
    with pytest.raises(TypeError, match=r"example_inputs do not fit"):
        fxfuse.optimize(lambda x: x + 1, example)


@pytest.mark.parametrize("example", [torch.randn(5, 7), torch.randn(8), torch.randn(2, 3, 8, 8)])
def test_examples_that_do_not_run_through_the_model(example):
    model = ScaleNorm()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"example_inputs do not run through the model: ."):
        fxfuse.optimize(model, example)
    assert_untouched(before, model)


def test_verify_wants_examples():
    with pytest.raises(ValueError, match="needs example_inputs"):
        fxfuse.optimize(Halved(), verify=True)


@pytest.mark.parametrize("limit", ["x", "-1", "1.5"])
def test_a_limit_that_is_no_number(monkeypatch, limit):
    monkeypatch.setenv("FXFUSE_LIMIT", limit)
    with pytest.raises(ValueError, match="FXFUSE_LIMIT must be a whole number"):
        fxfuse.optimize(Halved())


def test_a_limit_stops_and_says_so(monkeypatch):
    monkeypatch.setattr(Fuel, "used", 0)
    monkeypatch.setenv("FXFUSE_LIMIT", "1")
    fused = fxfuse.optimize(Branching())
    assert len(patterns_in(fused)) == 1
    assert any("FXFUSE_LIMIT=1" in n.reason for n in fxfuse.report(fused).near_misses)
    torch.testing.assert_close(fused(X).shape, torch.Size([5, 6]))


def test_disabled_patterns(monkeypatch):
    monkeypatch.setenv("FXFUSE_DISABLE", "linear_activation_scale, kl_div")
    assert patterns_in(fxfuse.optimize(Branching())) == ["linear_scale_batchnorm1d"]


def test_a_log_level_that_does_not_exist(monkeypatch):
    monkeypatch.setattr(fuse.logger, "handlers", [])
    monkeypatch.setenv("FXFUSE_LOG", "loud")
    with pytest.raises(ValueError, match="FXFUSE_LOG must be debug, info, warning or error, not 'loud'"):
        fxfuse.optimize(Halved())


def test_the_log_tells_what_was_replaced(monkeypatch, capsys):
    monkeypatch.setattr(fuse.logger, "handlers", [])
    monkeypatch.setenv("FXFUSE_LOG", "info")
    try:
        fxfuse.optimize(Branching())
    finally:
        fuse.logger.setLevel(logging.NOTSET)
    assert "replaced linear_scale_batchnorm1d in first: linear → mul → batch_norm1d" in capsys.readouterr().err


def test_a_model_that_fails_fails_the_same():
    model = Halved()
    fused = fxfuse.optimize(model)
    with pytest.raises(RuntimeError) as theirs:
        model(torch.randn(5, 7))
    with pytest.raises(RuntimeError) as ours:
        fused(torch.randn(5, 7))
    assert str(ours.value) == str(theirs.value)


def test_a_model_that_always_raises_raises_its_own_error():
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("its own")

    fused = fxfuse.optimize(Broken())
    assert "its own" in fxfuse.report(fused).untraceable[0].reason
    with pytest.raises(KeyError, match="its own"):
        fused(X)


def test_nothing_is_left_patched_behind_a_failed_trace():
    call, getattribute = nn.Module.__call__, nn.Module.__getattr__
    apply = torch.autograd.Function.__dict__["apply"]
    enter = torch.no_grad.__enter__
    for model in (Branching(), nn.Sequential(Branching())):
        fused = fxfuse.optimize(model)
        assert all("_fxfuse_watches" not in type(m).__dict__ for m in fused.modules())
    assert nn.Module.__call__ is call and nn.Module.__getattr__ is getattribute
    assert torch.autograd.Function.__dict__["apply"] is apply and torch.no_grad.__enter__ is enter


IMPORT = """
import sys, torch, ctypes
import torch.utils
loaded = []
before, opened = set(sys.modules), ctypes.CDLL.__init__
def spy(self, *args, **kwargs):
    loaded.append(args)
    return opened(self, *args, **kwargs)
ctypes.CDLL.__init__ = spy
import fxfuse
new = set(sys.modules) - before
heavy = [m for m in new if m.split(".")[0] in ("sympy", "matplotlib", "tqdm", "triton", "numpy", "pip")]
late = ("torch._dynamo", "torch._inductor", "fxfuse.kernels.loader", "fxfuse.patterns.")
heavy += [m for m in new if m.startswith(late)]
print(loaded, heavy, torch.cuda.is_initialized(), not loaded and not heavy and not torch.cuda.is_initialized())
"""


def test_importing_loads_nothing_native_and_nothing_heavy():
    out = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("True"), out
