"""The ops in the dispatcher: opcheck, meta tensors, make_fx, symbolic traces, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _op_samples import EVERY, Sample, copies, first_of
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse import ops


@pytest.mark.parametrize("road", ["own", "closed"])
@EVERY
def test_opcheck(sample: Sample, road: str, request: pytest.FixtureRequest) -> None:
    if road == "closed":
        request.getfixturevalue("closed_form")
    overload = ops.get(sample.op).overload
    torch.library.opcheck(overload, copies(sample.args))
    torch.library.opcheck(overload, copies(sample.args, sample.differentiable))


@EVERY
def test_meta_tensors(sample: Sample) -> None:
    meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in sample.args)
    out, expected = sample.fused(*meta), sample.plain(*copies(sample.args))
    assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("sample", [first_of(name) for name in ops.names()], ids=str)
def test_make_fx_sees_one_op(sample: Sample) -> None:
    places = [i for i, a in enumerate(sample.args) if isinstance(a, Tensor)]

    def function(*tensors: Tensor) -> Tensor:
        full = list(sample.args)
        for place, value in zip(places, tensors, strict=True):
            full[place] = value
        if sample.op == "linear_scale_batchnorm1d":
            full[10] = False  # training gives way to ATen on the CPU
        return sample.fused(*full)

    tensors = [sample.args[i] for i in places]
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(function, tracing_mode=mode)(*tensors).graph
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert f"fxfuse.{sample.op}.default" in targets


@pytest.mark.parametrize("name", ops.names())
def test_symbolic_trace_names_the_public_callable(name: str) -> None:
    sample = first_of(name)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return ops.get(name).call(x, y, *sample.args[2:])

    traced = torch.fx.symbolic_trace(function)
    assert next(n.target for n in traced.graph.nodes if n.op == "call_function") is ops.get(name).call
    assert f"fxfuse_ops_{name}_{name}(" in traced.code or f"{name}.{name}(" in traced.code
    expected = sample.plain(*copies(sample.args))
    torch.testing.assert_close(traced(*copies(sample.args)[:2]), expected)


COMPILED = [
    first_of("kl_div", "batchmean"),
    first_of("distillation_kl", "batchmean"),
    first_of("matmul_div_sum_scale", "bias"),
    first_of("linear_activation_scale", "gelu"),
    first_of("linear_scale_batchnorm1d", "full-train"),
    first_of("linear_scale_batchnorm1d", "full-eval"),
]


def compiled_matches(sample: Sample, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    seen: list[str] = []

    def spy(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.extend(str(n.target) for n in gm.graph.nodes)
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    call = ops.get(sample.op).call
    compiled = torch.compile(lambda *args: call(*args), backend=spy, fullgraph=True, dynamic=dynamic)
    for factor in (1.0, 1.5):
        scaled = tuple(a * factor if isinstance(a, float) else a for a in sample.args)
        mine, theirs = copies(scaled, sample.differentiable), copies(scaled, sample.differentiable)
        a, b = compiled(*mine), sample.plain(*theirs)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        a.sum().backward()
        b.sum().backward()
        for i in sample.differentiable:
            torch.testing.assert_close(mine[i].grad, theirs[i].grad, rtol=1e-8, atol=1e-10)
        for i in (8, 9) if sample.op == "linear_scale_batchnorm1d" else ():
            torch.testing.assert_close(mine[i], theirs[i])
    assert f"fxfuse.{sample.op}.default" in seen


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sample", COMPILED, ids=str)
def test_compile_aot_eager(sample: Sample, dynamic: bool, closed_form: None) -> None:
    compiled_matches(sample, "aot_eager", dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sample", COMPILED, ids=str)
def test_compile_inductor(sample: Sample, dynamic: bool, closed_form: None) -> None:
    compiled_matches(sample, "inductor", dynamic)
