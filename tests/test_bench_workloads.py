"""The bench's workloads and the cases that are planned from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_cases import CPU, tiny
from torch import nn

from fxfuse.bench.cases import Runner, Setup, parse_shapes, plan
from fxfuse.bench.workloads import WORKLOADS, Work

# Workloads ------------------------------------------------------------------------------------------------------------


def reference(name: str, model: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Each workload's formula, written out another way."""
    if name.startswith("linear_scale"):
        y = (inputs[0] @ model.linear.weight.T + model.linear.bias) * model.scale
        mean, var = (y.mean(0), y.var(0, unbiased=False)) if model.training else (torch.zeros(6), torch.ones(6))
        return (y - mean) / (var + 1e-5).sqrt()
    if name == "matmul_div_sum_scale":
        return (inputs[0] * model.weight.sum(0)).sum(1, keepdim=True) * 0.75
    if name == "linear_activation_scale":
        return (inputs[0] @ model.linear.weight.T + model.linear.bias).clamp(min=0) * 0.5
    p, t = inputs
    if name == "distillation_kl":
        p, t = F.softmax(p / 2, -1), F.softmax(t / 2, -1)
    return (t * (t / p).log()).sum() / len(p) * (4 if name == "distillation_kl" else 1)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_computes_its_formula(name: str) -> None:
    setup = Setup.make(tiny(name), CPU, seed=3, cache_bytes=0)
    inputs = setup.input_sets[0]
    with torch.no_grad():
        expected = reference(name, setup.model, inputs)
        torch.testing.assert_close(setup.fresh_model()(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_issue_s_sizes_are_the_defaults() -> None:
    assert WORKLOADS["matmul_div_sum_scale"].sizes["cpu"] == [(1024, 8192, 8192)]
    assert (16384, 4096, 4096) in WORKLOADS["linear_scale_batchnorm1d_train"].sizes["cuda"]
    assert WORKLOADS["kl_div"].sizes["cuda"] == [(16384, 16384)]
    assert WORKLOADS["distillation_kl"].sizes["cuda"] == [(4096, 128256)]


def test_least_work_counts_each_tensor_once() -> None:
    product = WORKLOADS["linear_activation_scale"].work
    assert product((2, 3, 5), 4, False) == Work(bytes=4 * (10 + 15 + 6), matrix_ops=2 * 30)
    assert product((2, 3, 5), 4, True).matrix_ops == 3 * 2 * 30
    collapsed = WORKLOADS["matmul_div_sum_scale"].work((2, 3, 5), 2, False)
    assert collapsed == Work(bytes=2 * (10 + 15), matrix_ops=0)
    assert WORKLOADS["kl_div"].work((7, 11), 4, True).bytes == 3 * 4 * 77


# Planning -------------------------------------------------------------------------------------------------------------


def test_shapes_are_parsed_and_go_to_workloads_of_their_rank() -> None:
    shapes = parse_shapes("4,5,6; 7,8")
    assert shapes == [(4, 5, 6), (7, 8)]
    cases = plan(list(WORKLOADS), shapes, ["fp32", "tf32"], ["fwd", "fwdbwd"], CPU)
    assert {c.shape for c in cases if c.workload.has_product} == {(4, 5, 6)}
    assert {c.shape for c in cases if not c.workload.has_product} == {(7, 8)}
    assert not [c for c in cases if c.precision == "tf32" and not c.workload.has_product]
    assert not [c for c in cases if c.workload.name.endswith("eval") and c.mode == "fwdbwd"]


@pytest.mark.parametrize("text", ["", "4", "4,x", "0,1", "1,2,3,4"])
def test_a_bad_shape_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="shape"):
        parse_shapes(text)


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        plan(["kl_div"], [(1, 2, 3)], ["fp32"], ["fwd"], CPU)


def test_small_inputs_rotate_and_large_ones_do_not() -> None:
    case = tiny("kl_div")
    size = 2 * 8 * 6 * 4
    assert len(Setup.make(case, CPU, 0, cache_bytes=0).input_sets) == 1
    sets = Setup.make(case, CPU, 0, cache_bytes=2 * size).input_sets
    assert len(sets) == 4
    assert not torch.equal(sets[0][0], sets[1][0])
    seen = []
    runner = Runner(Setup.make(case, CPU, 0, 2 * size), nn.Module(), lambda p, t: seen.append(p.data_ptr()) or p.sum())
    for i in range(5):
        runner.step(i)
    assert len(set(seen)) == 4
    assert seen[0] == seen[4]


def test_every_rival_has_the_same_weights_inputs_and_its_own_statistics() -> None:
    setup = Setup.make(tiny("linear_scale_batchnorm1d_train"), CPU, seed=5, cache_bytes=0)
    again = Setup.make(tiny("linear_scale_batchnorm1d_train"), CPU, seed=5, cache_bytes=0)
    one, two = setup.fresh_model(), again.fresh_model()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(setup.input_sets[0][0], again.input_sets[0][0])
    before = setup.model.bn.running_mean.clone()
    Runner(setup, one, one).step(0)
    assert not torch.equal(one.bn.running_mean, before)
    assert torch.equal(setup.model.bn.running_mean, before)
