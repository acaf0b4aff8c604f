"""The cost model against counts made by hand, and the rates it divides by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse import rates
from fxfuse.cost import Cost, Unknown, collapsed, estimate, fused_once, step_cost
from fxfuse.known import UNKNOWN
from fxfuse.rates import Rates
from fxfuse.report import Replacement, Step, Tensor

torch.set_num_threads(1)

M, N, K = 16, 32, 64


def f32(*shape: int) -> Tensor:
    return Tensor(shape, "float32", "cpu")


def only(fused) -> Replacement:
    (replacement,) = fxfuse.report(fused).replacements
    return replacement


def product(dtype=torch.float32) -> Replacement:
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU()).to(dtype)
    return only(fxfuse.optimize(model, torch.randn(M, K, dtype=dtype)))


def test_what_is_recorded():
    found = product()
    linear, relu = found.steps
    assert linear == Step("linear", {"bias": f32(N), "x": f32(M, K), "weight": f32(N, K)}, f32(M, N))
    assert relu == Step("relu", {"x": f32(M, N)}, f32(M, N)) and found.result == f32(M, N)
    assert found.call["x"] == f32(M, K) and found.call["bias"] == f32(N) and found.call["activation"] == "relu"


def test_a_factor_made_of_two_is_known_too():
    scales = torch.randn(N), torch.randn(N)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bn = nn.Linear(K, N), nn.BatchNorm1d(N)
            self.a, self.b = (nn.Parameter(s) for s in scales)

        def forward(self, x):
            return self.bn(self.fc(x) * self.a * self.b)

    found = only(fxfuse.optimize(Two(), torch.randn(M, K)))
    assert found.call["scale"] == found.call["bn.running_mean"] == f32(N) and found.call["bn.training"] is True
    assert estimate(found).before.matrix == 2 * M * N * K


def test_a_product_and_an_activation_by_hand():
    found = estimate(product())
    moved = M * K + N * K + N + M * N
    assert found.before == Cost(4 * (moved + 2 * M * N), 2 * M * N * K, M * N, 4 * M * N, 2)
    assert found.after == Cost(4 * moved, 2 * M * N * K, M * N, 0, 1)
    assert found.speedup > 1 and found.pays


def test_half_the_bytes_in_half_precision():
    assert estimate(product(torch.bfloat16)).before.bytes * 2 == estimate(product()).before.bytes


def test_the_collapse_has_no_product():
    def function(x, w):
        return torch.sum(torch.matmul(x, w.t()) / 2, dim=1, keepdim=True) * 1.5

    found = only(fxfuse.optimize(function, (torch.randn(M, K), torch.randn(N, K))))
    pattern = fxfuse.pattern.available()["matmul_div_sum_scale"]
    after = estimate(found, pattern.cost).after
    assert after == collapsed(found) == Cost(4 * (M * K + N * K + M), 0, 2 * (M * K + N * K), 0, 2)
    assert estimate(found).after.matrix == 2 * M * N * K  # what one pass without the algebra would do
    assert [s.operation for s in found.steps] == ["t", "matmul", "div", "sum", "mul"]
    assert step_cost(found.steps[0]) == Cost(calls=0)  # a view moves nothing


def test_kl_div_by_hand():
    found = only(fxfuse.optimize(lambda p, t: F.kl_div(p, t, reduction="sum"), (torch.randn(M, N), torch.rand(M, N))))
    whole = 4 * M * N
    before = estimate(found).before
    assert before.bytes == 9 * whole + 4 and before.between == 3 * whole and before.calls == 4
    assert estimate(found).after.bytes == 2 * whole + 4


def test_training_reads_once_more_than_eval():
    bytes_ = [
        step_cost(Step("batch_norm1d_module", {"x": f32(M, N), "module.training": mode}, f32(M, N))).bytes
        for mode in (True, False)
    ]
    assert bytes_ == [3 * 4 * M * N, 2 * 4 * M * N]


def test_nothing_is_said_without_shapes():
    for model in (nn.Sequential(nn.Linear(K, N), nn.ReLU()), nn.Sequential(nn.Linear(K, N), nn.BatchNorm1d(N))):
        with pytest.raises(Unknown, match="give example_inputs"):
            estimate(only(fxfuse.optimize(model)))
    found = product()
    for known in ({**found.call, "x": UNKNOWN},):
        with pytest.raises(Unknown, match="an input's shape was not known"):
            fused_once(Replacement(found.pattern, found.op, (), "", steps=found.steps, call=known, result=found.result))


def test_dynamo_graphs_have_shapes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(K, N)

        def forward(self, x):
            return torch.relu(self.fc(x))

    torch.compile(Net(), backend=fxfuse.backend, options={"inner": "eager"}, dynamic=True)(torch.randn(M, K))
    (found,) = fxfuse.reports()[-1].replacements
    assert found.call["x"] == f32(M, K) and estimate(found).before.matrix == 2 * M * N * K


# --- rates -----------------------------------------------------------------------------------------------------------

FAST = Rates("a device", 1e12, {"float32": 1e13, "tf32": 1e14, "bfloat16": 4e14}, 1e13, 1e-6, "made up")


def test_time_is_bound_by_bytes_or_by_operations():
    assert Cost(bytes=10**9, calls=1).seconds(FAST, "float32") == pytest.approx(1e-3 + 1e-6)
    assert Cost(matrix=10**12, calls=2).seconds(FAST, "float32") == pytest.approx(0.1 + 2e-6)
    assert Cost(bytes=10**9, matrix=10**12, calls=0).seconds(FAST, "bfloat16") == pytest.approx(2.5e-3)
    assert Cost(vector=10**10, calls=0).seconds(FAST, "float32") == pytest.approx(1e-3)


def test_the_users_precision_is_obeyed():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert FAST.product("float32") == 1e13
        torch.set_float32_matmul_precision("high")
        assert FAST.product("float32") == 1e14 and FAST.product("bfloat16") == 4e14
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_cpu_is_timed_once(monkeypatch):
    drawn = torch.get_rng_state()
    first = rates.rates_of("cpu")
    assert rates.rates_of("cpu") is first and torch.equal(torch.get_rng_state(), drawn)
    assert 1e8 < first.bandwidth < 1e13 and 1e8 < first.product("float32") < 1e14
    assert "rough" in first.origin and "1 thread" in first.name


class _Properties:
    multi_processor_count, clock_rate, memory_clock_rate, memory_bus_width = 100, 1_500_000, 10_000_000, 384

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize(("name", "bandwidth"), [("NVIDIA H200", 4.2e12), ("NVIDIA H100 80GB HBM3", 2.85e12),
                                                 ("NVIDIA A100-SXM4-80GB", 1.6e12)])  # fmt: skip
def test_known_gpus(name, bandwidth, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: _Properties(name))
    rates._cuda.cache_clear()
    try:
        assert rates._cuda(0).bandwidth == bandwidth and rates._cuda(0).name == name
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: _Properties("GeForce"))
        rates._cuda.cache_clear()
        guessed = rates._cuda(0)
        assert guessed.bandwidth == pytest.approx(0.85 * 960e9) and "guessed" in guessed.origin
        assert guessed.product("float32") == pytest.approx(0.85 * 38.4e12)
    finally:
        rates._cuda.cache_clear()
