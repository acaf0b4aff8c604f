"""torch.compile(model, backend="fxfuse"), its options, and the Inductor pass."""

from __future__ import annotations

import copy
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from models import BertLayer, Branching, Halved, LeViTBlock, MixerBlock, Plain, ScaleNorm, assert_same
from torch import nn

import fxfuse

torch.set_num_threads(1)
X = torch.randn(5, 8)
INNERS = ["eager", "aot_eager"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*isinstance.*LeafSpec.*")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Losses(nn.Module):
    """The two losses and a collapsed product: what no module says."""

    def forward(self, x, w, teacher):
        logits = x @ w.t()
        distilled = F.kl_div(F.log_softmax(logits / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean") * 4
        plain = F.kl_div(torch.log(logits.softmax(-1)), teacher.softmax(-1), reduction="sum")
        return distilled + plain, (x @ w.t() / 3).sum(-1)


def newest() -> list[str]:
    return sorted(r.pattern for r in fxfuse.reports()[-1].replacements)


def compiled(model, inner="aot_eager", backend="fxfuse", **kwargs):
    return torch.compile(model, backend=backend, options={"inner": inner}, fullgraph=True, **kwargs)


def step(module, *args):
    """Outputs, and gradients of the parameters and of the arguments that want one."""
    wanted = [*module.parameters(), *(a for a in args if a.requires_grad)]
    for leaf in wanted:
        leaf.grad = None
    out = module(*args)
    total = sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,)))
    total.backward()
    return out, [leaf.grad.clone() for leaf in wanted]


def test_it_is_found_by_name():
    names = {e.name: e.value for e in metadata.entry_points(group="torch_dynamo_backends")}
    assert names.get("fxfuse") == "fxfuse.backend:backend", "install the package: pip install -e ."
    assert "fxfuse" in torch._dynamo.list_backends(None)
    model = Halved()
    assert_same(torch.compile(model, backend="fxfuse", options={"inner": "eager"})(X), model(X), rtol=1e-4, atol=1e-5)
    assert newest() == ["linear_activation_scale"]


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("build", [ScaleNorm, Halved, LeViTBlock, MixerBlock])
def test_training_and_inference(build, inner):
    torch.manual_seed(0)
    model = build().train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    x = X if build in (ScaleNorm, Halved) else torch.randn(2, 6, 16)
    reference = copy.deepcopy(model)
    fast = compiled(model, inner)
    for mode in (True, False):
        model.train(mode), reference.train(mode)
        (got, grads), (expected, wanted) = step(fast, x), step(reference, x)
        assert newest() and fxfuse.reports()[-1].title.startswith("torch.compile")
        assert_same(got, expected, rtol=1e-4, atol=1e-5)
        assert_same(grads, wanted, rtol=1e-3, atol=1e-4)
        for a, b in zip(model.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    for region in (torch.no_grad, torch.inference_mode):
        with region():
            assert_same(fast(x), reference(x), rtol=1e-4, atol=1e-5)
            assert newest()


@pytest.mark.parametrize("inner", INNERS)
def test_losses(inner):
    args = [torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True), torch.randn(4, 6)]
    got, expected = compiled(Losses(), inner)(*args), Losses()(*args)
    assert newest() == ["distillation_kl", "kl_div", "matmul_div_sum_scale"]
    assert_same(got, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got[0] + got[1].sum(), args[:2]),
                    torch.autograd.grad(expected[0] + expected[1].sum(), args[:2]), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("build", [ScaleNorm, Halved])
def test_batches_of_changing_sizes(build, inner, dynamic):
    model = build()
    reference = copy.deepcopy(model)
    fast = compiled(model, inner, dynamic=dynamic)
    made = []
    for rows in (4, 7, 16, 33):
        before = len(fxfuse.reports())
        x = torch.randn(rows, 8)
        assert_same(fast(x), reference(x), rtol=1e-4, atol=1e-5)
        assert newest()
        made.append(len(fxfuse.reports()) - before)
    assert made[0] and made[2:] == [0, 0], "a new batch size alone needs no new graph"
    assert bool(made[1]) == (dynamic is None)


def test_a_region_of_autocast_around_and_inside():
    class Inside(Halved):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    for model, outer in ((Halved(), True), (Inside(), False)):
        fast = compiled(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
            got, expected = fast(X), model(X)
        assert got.dtype == expected.dtype == torch.bfloat16 and newest()
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_a_graph_break_of_the_users_own_is_no_obstacle():
    model = Branching()
    reference = copy.deepcopy(model)
    before = len(fxfuse.reports())
    fast = torch.compile(model, backend="fxfuse", options={"inner": "eager"})
    assert_same(fast(X), reference(X), rtol=1e-4, atol=1e-5)
    made = [r.pattern for report in fxfuse.reports()[before:] for r in report.replacements]
    assert sorted(made) == ["linear_activation_scale", "linear_scale_batchnorm1d"]


def test_bert_layer_with_flags():
    model = BertLayer().eval()
    fast = compiled(model)
    x, mask = torch.randn(2, 4, 16), torch.randn(2, 1, 1, 4)
    for kwargs in ({}, {"attention_mask": mask}, {"output_attentions": True}):
        assert_same(fast(x, **kwargs), model(x, **kwargs), rtol=1e-4, atol=1e-5)
        assert "linear_activation_scale" in newest()


def test_patterns_option_and_reports_in_order():
    model = ScaleNorm()
    options = {"inner": "eager", "patterns": ["kl_div"]}
    torch.compile(model, backend="fxfuse", options=options)(X)
    assert newest() == []
    torch.compile(Halved(), backend="fxfuse", options={"inner": "eager"})(X)
    assert newest() == ["linear_activation_scale"] and fxfuse.reports()[-2].replacements == []
    fxfuse.reports().clear()  # a copy
    assert newest() == ["linear_activation_scale"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"inner": "nope"}, "the inner compiler is one of inductor, aot_eager, eager"),
        ({"inner": "eager", "max_autotune": True}, "are Inductor's"),
        ({"inner": "eager", "patterns": ["nope"]}, "no pattern is named 'nope'"),
    ],
)
def test_wrong_options(options, why):
    with pytest.raises(Exception, match=why):
        torch.compile(Halved(), backend="fxfuse", options=options)(X)
    with pytest.raises(ValueError, match=why):
        fxfuse.backend(torch.fx.symbolic_trace(Plain()), [X], options=options)


def test_mode_without_inductor_is_refused():
    with pytest.raises(ValueError, match="Inductor's"):
        fxfuse.backend(torch.fx.symbolic_trace(Plain()), [X], options={"inner": "eager"}, mode="max-autotune")


# --- Inductor ----------------------------------------------------------------------------------------------------


@pytest.fixture
def inner_calls(monkeypatch):
    """What reaches Inductor, without the time its C++ takes: (graph, patches) per graph; run by eager."""
    import torch._inductor.compile_fx as inductor

    calls = []

    def fake(gm, inputs, config_patches=None, **kwargs):
        calls.append((gm, config_patches))
        return gm.forward

    monkeypatch.setattr(inductor, "compile_fx", fake)
    return calls


def test_options_and_mode_reach_inductor(inner_calls):
    model = Halved()
    torch.compile(model, backend="fxfuse", options={"max_autotune": True, "epilogue_fusion": False})(X)
    assert inner_calls[-1][1] == {"max_autotune": True, "epilogue_fusion": False}
    torch._dynamo.reset()
    torch.compile(model, backend="fxfuse")(X)
    assert not inner_calls[-1][1]
    fxfuse.backend(torch.fx.symbolic_trace(model), [X], mode="max-autotune")
    assert inner_calls[-1][1]["max_autotune"] is True


def test_on_cpu_what_inductor_fuses_itself_is_left_to_it(inner_calls):
    model = Halved()
    assert_same(torch.compile(model, backend="fxfuse")(X), model(X))
    report = fxfuse.reports()[-1]
    assert report.replacements == [] and "left to Inductor" in report.notes[0] and "aot_eager" in report.notes[0]
    assert "left to Inductor" in str(report)
    assert any("Inductor fuses the same" in n.reason for n in report.near_misses)

    args = (torch.randn(4, 8), torch.randn(6, 8), torch.randn(4, 6))
    assert_same(torch.compile(Losses(), backend="fxfuse")(*args), Losses()(*args), rtol=1e-4, atol=1e-5)
    assert newest() == ["matmul_div_sum_scale"], "an algebraic gain is made whoever compiles"


@pytest.mark.slow
@pytest.mark.parametrize("build", [ScaleNorm, Losses])
def test_inductor_itself_trains(build):
    torch.manual_seed(0)
    model = build()
    args = (X,) if build is ScaleNorm else (torch.randn(4, 8, requires_grad=True), torch.randn(6, 8), torch.randn(4, 6))
    reference = copy.deepcopy(model)
    fast = torch.compile(model, backend="fxfuse", fullgraph=True)
    (got, grads), (expected, wanted) = step(fast, *args), step(reference, *args)
    assert_same(got, expected, rtol=1e-4, atol=1e-5)
    assert_same(grads, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_as_an_inductor_pass():
    from torch._inductor import config

    args = (torch.randn(4, 8), torch.randn(6, 8), torch.randn(4, 6))
    with config.patch(pre_grad_custom_pass=fxfuse.pre_grad_pass):
        got = torch.compile(Losses(), fullgraph=True)(*args)
    assert fxfuse.reports()[-1].title.startswith("Inductor pre-grad") and newest() == ["matmul_div_sum_scale"]
    assert_same(got, Losses()(*args), rtol=1e-4, atol=1e-5)
