"""DistributedDataParallel around fused modules: gradients are those of the unfused ones, and the same on every rank."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxfuse

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(1024, 2048), nn.Linear(2048, 1024)
        self.scale, self.bn = nn.Parameter(torch.rand(2048) + 0.5), nn.BatchNorm1d(2048)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.head(self.bn(self.linear(x) * self.scale))) / 2


def worker(rank: int, world: int, store: str) -> None:
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        plain = Block().to(rank)
        fused = fxfuse.optimize(copy.deepcopy(plain))
        assert len(fxfuse.report(fused).replacements) == 2
        judge = copy.deepcopy(plain).double()
        models = [DistributedDataParallel(m, device_ids=[rank]) for m in (judge, plain, fused)]
        for step in range(3):
            torch.manual_seed(100 * step + rank)
            x, weights = torch.randn(4096, 1024, device=rank), torch.randn(4096, 1024, device=rank)
            for model in models:
                model.zero_grad()
                dtype = next(model.parameters()).dtype
                (model(x.to(dtype)) * weights.to(dtype)).mean().backward()
            for name, ours in fused.named_parameters():
                exact, other = judge.get_parameter(name), plain.get_parameter(name)
                if name == "linear.bias":  # exactly zero; eager's is rounding noise
                    assert not ours.grad.any()
                    continue
                error, allowed = ((p.grad.double() - exact.grad).norm() for p in (ours, other))
                assert error <= 1.25 * allowed, (name, step, float(error / allowed))
                gathered = [torch.empty_like(ours.grad) for _ in range(world)]
                torch.distributed.all_gather(gathered, ours.grad)
                assert all(torch.equal(g, ours.grad) for g in gathered), (name, step)
        torch.testing.assert_close(fused.bn.running_var.double(), judge.bn.running_var, rtol=1e-5, atol=1e-6)
        assert int(fused.bn.num_batches_tracked) == 3
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_under_ddp(world: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices")
    torch.multiprocessing.spawn(worker, (world, str(tmp_path / "store")), nprocs=world)
