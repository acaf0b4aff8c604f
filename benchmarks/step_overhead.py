"""CPU time of a training step of linear_scale_batchnorm1d, beside eager: sizes so small that the device waits."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

from fxfuse.ops.linear_scale_batchnorm1d import linear_scale_batchnorm1d


def main() -> None:
    for m, n, k in [(64, 256, 256), (1024, 8192, 8192)]:
        make = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        x, w, bias, scale = make(m, k), make(n, k), make(n), make(n)
        g, s = torch.ones(n, device="cuda"), torch.zeros(n, device="cuda")
        rm, rv = s.clone(), g.clone()
        inputs = [t.requires_grad_() for t in (x, w, scale, g, s)]
        dy = make(m, n)

        def fused(x, w, scale, g, s):
            return linear_scale_batchnorm1d(x, w, bias, scale, None, 1.0, g, s, rm, rv, True)  # noqa: B023

        def eager(x, w, scale, g, s):
            return F.batch_norm(F.linear(x, w, bias) * scale, rm, rv, g, s, True)  # noqa: B023

        for name, op in (("fused", fused), ("eager", eager), ("fused", fused), ("eager", eager)):
            for count in (20, 300):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(count):
                    torch.autograd.grad(op(*inputs), inputs, dy)
                issued = time.perf_counter() - start
                torch.cuda.synchronize()
                total = time.perf_counter() - start
            print(f"{m}x{n}x{k} {name}: {1e6 * issued / count:.0f} us issued, {1e6 * total / count:.0f} us done")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(5):
                torch.autograd.grad(fused(*inputs), inputs, dy)
            torch.cuda.synchronize()
        print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=12, max_name_column_width=60))


if __name__ == "__main__":
    main()
