"""Counters of launches: zeros for each stream, and of their own for each stream of each capture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxfuse.kernels import counters, loader
from fxfuse.ops.linear_scale_batchnorm1d import linear_scale_batchnorm1d_module

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.captures,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    assert loader.library() is not None, loader.why_unavailable()
    for name in ("_zeros", "_captured", "_spare"):
        monkeypatch.setattr(counters, name, {})


def of(stream: torch.cuda.Stream, count: int = 100) -> torch.Tensor:
    return counters.counters_of(stream.device, stream.cuda_stream, count)


def test_a_stream_keeps_its_own():
    here, other = torch.cuda.current_stream(), torch.cuda.Stream()
    first = of(here)
    assert of(here).data_ptr() == first.data_ptr() != of(other).data_ptr()
    assert of(here, 5000).numel() >= 5000 and not of(here, 5000).any()


def captured() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The counters of two calls in a row and of a third on another stream of one capture."""
    fork = torch.cuda.Stream()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        here = torch.cuda.current_stream()
        one, two = of(here), of(here)
        fork.wait_stream(here)
        with torch.cuda.stream(fork):
            three = of(fork)
            torch.ones(1, device="cuda")
        here.wait_stream(fork)
        torch.ones(1, device="cuda")
    return one, two, three


def test_each_capture_has_its_own():
    outside = of(torch.cuda.current_stream())
    one, two, three = captured()
    later, _, _ = captured()
    assert one.data_ptr() == two.data_ptr()
    assert len({t.data_ptr() for t in (outside, one, three, later)}) == 4
    for t in (one, three, later):
        assert t.numel() == 100 and not t.any()


def test_without_any_set_aside_zeros_are_in_the_graph(monkeypatch):
    monkeypatch.setattr(counters, "_SPARE", 150)
    one, two, _ = captured()
    assert one.data_ptr() != two.data_ptr(), "nothing was called before the capture"
    of(torch.cuda.current_stream())
    one, two, three = captured()
    assert one.data_ptr() == two.data_ptr() and not counters._spare, "the third found too few"
    of(torch.cuda.current_stream())
    again, _, _ = captured()
    assert again.data_ptr() not in (one.data_ptr(), three.data_ptr())


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper's GEMM"
)
def test_graphs_of_one_launch_beside_each_other():
    torch.manual_seed(0)
    layer, bn = nn.Linear(1024, 1024, device="cuda", dtype=torch.bfloat16), nn.BatchNorm1d(1024, device="cuda")
    x = torch.randn(16384, 1024, device="cuda", dtype=torch.bfloat16)

    def call() -> torch.Tensor:
        return linear_scale_batchnorm1d_module(bn, x, layer.weight, layer.bias)

    graphs = []
    with torch.no_grad():
        want = call()
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outs = call(), call()
            graphs.append((graph, outs, torch.cuda.Stream()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graphs[0][0].replay()
        torch.cuda.synchronize()
    ran = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(ran) == 2 and all("gemm_kernel" in name for name in ran), ran
    for _, outs, _ in graphs:
        for out in outs:
            out.fill_(float("nan"))
    torch.cuda.synchronize()
    for _ in range(10):
        for graph, _, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for _, outs, _ in graphs:
        for out in outs:
            assert torch.equal(out, want)
