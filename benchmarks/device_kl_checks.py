"""kl_div's and distillation_kl's kernels beside float64 and eager; on streams, in CUDA graphs, past 2**31 elements."""

# Every lambda here runs before its loop goes on.
# ruff: noqa: B023
from __future__ import annotations

import itertools
import time

import torch
from device_kl_calls import DEVICE, NAMES, distillation, eager_distillation, eager_kl, kl, offset_copy, poisoned


def with_grads(function, *tensors, grads):
    leaves = [x.detach().requires_grad_(want) for x, want in zip(tensors, grads, strict=True)]
    loss = function(*leaves)
    if any(grads):
        loss.sum().backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


class Checks:
    """Compares with float64 beside eager; keeps the worst ratio and what failed.

    Comparisons of one name are draws of one case: their squared errors are added before they are judged. A draw of a
    few numbers says little, since eager's error in it may be nearly zero by chance.
    """

    def __init__(self) -> None:
        self.count, self.placed, self.sums = 0, [], {}

    def compare(self, what: str, ours, eager, exact) -> None:
        self.count += 1
        differ = (ours.isnan() != eager.isnan()) | (ours.isinf() | eager.isinf()) & (ours != eager)
        keep = ours.isfinite() & exact.isfinite()  # one may overflow where float64 does not, and the other way round
        o, e, x = (values.double().where(keep, 0.0) for values in (ours, eager, exact))
        more = [torch.sum(values, dtype=torch.float64) for values in (differ, (o - x) ** 2, (e - x) ** 2, x**2)]
        bad, *more = torch.stack(more).tolist()
        if bad:
            self.placed.append(f"{what}: inf or NaN differ at {bad:.0f} of {ours.numel()}")
            return
        # What storing a result may cost: half a unit of one number, less over many, whose roundings differ.
        stored = torch.finfo(ours.dtype).eps * (0.4 if ours.numel() < 5000 else 0.15)
        totals = self.sums.get(what, (0.0, 0.0, 0.0, 0, stored))
        self.sums[what] = *(a + b for a, b in zip(totals, (*more, 1), strict=False)), totals[-1]

    def failures(self) -> list[str]:
        """What differs. The error may be 1.25 times eager's, or what storing the results costs."""
        found = list(self.placed)
        self.worst = 0.0
        for what, (mine, eagers, square, draws, stored) in self.sums.items():
            error, peer = ((total / max(square, 1e-300)) ** 0.5 for total in (mine, eagers))
            ratio = error / max(peer, stored)
            self.worst = max(self.worst, ratio)
            if not ratio <= 1.25:
                found.append(f"{what}: error {error:.3g}, eager {peer:.3g}, ratio {ratio:.3g}, draws {draws}")
        return found

    def report(self, title: str) -> bool:
        """Prints what there is to say; whether anything failed."""
        failures = self.failures()
        print(f"{title}: {self.count} comparisons, {len(failures)} failed, worst ratio {self.worst:.3f}")
        for line in failures[:200]:
            print("   ", line)
        return bool(failures)


def check_kl(checks: Checks) -> None:
    inf = float("inf")
    special = torch.tensor([0.0, -0.0, -1.0, inf, -inf, float("nan"), 1.0, 1e-40, 3e38, 0.5, 60000.0, 2.0])
    for dtype, n in itertools.product(NAMES, (1, 7, 1023, 8192 + 3, 1_200_007)):
        rows = 1 if n < 1024 else 7 if n % 7 == 0 else 1
        p = torch.softmax(torch.randn(n, device=DEVICE) * 2, 0).to(dtype).view(rows, -1)
        q = torch.softmax(torch.randn(n, device=DEVICE) * 2, 0).to(dtype).view(rows, -1)
        if dtype == torch.float16:
            p, q = p.clamp_min(1e-4), q.clamp_min(1e-4)
        variants = [("plain", p, q), ("offset", offset_copy(p, 1), q), ("zeros", p, q * (torch.rand_like(q) > 0.5))]
        if n >= 1023:
            grid = torch.cartesian_prod(special, special).to(dtype).to(DEVICE)
            pad = torch.rand(n - len(grid), 2, device=DEVICE).to(dtype)
            both = torch.cat([grid, pad])
            variants.append(("special", both[:, 0].clone().view(1, -1), both[:, 1].clone().view(1, -1)))
        for (kind, x, t), lt, li, reduction, grads in itertools.product(
            variants, (False, True), (False, True), ("batchmean", "mean", "none"), ((0, 0), (1, 0), (1, 1))
        ):
            if n == 1_200_007 and kind != "plain" and reduction == "mean":
                continue
            a = x if li or kind == "special" else x.float().log().to(dtype)
            b = t.float().log().to(dtype) if lt and kind not in ("special",) else t
            if kind == "zeros" and lt:
                continue
            a = offset_copy(a, 1) if kind == "offset" else a
            function = lambda a, b: eager_kl(a, b, reduction, lt, li)  # noqa: E731
            eager = with_grads(function, a, b, grads=[bool(g) for g in grads])
            exact = with_grads(function, a.double(), b.double(), grads=[bool(g) for g in grads])
            for junk in range(2):  # freed blocks full of junk: what is not written shows
                poisoned(n + junk, dtype=dtype)
            ours = kl(a, b, reduction=reduction, log_target=lt, log_input=li, grad_input=grads[0], grad_target=grads[1])
            for name, o, e, x64 in zip(("loss", "grad_input", "grad_target"), ours, eager, exact, strict=True):
                if o is not None:
                    checks.compare(f"kl {NAMES[dtype]} n={n} {kind} {reduction} lt={lt} li={li} {name}", o, e, x64)


def draws(shape: tuple[int, int], kind: str) -> int:
    """How many draws say enough: a loss is one number, and in cold rows so are the gradients."""
    return 16 if shape[0] * shape[1] < 50_000 or kind in ("cold", "temperatures") else 4


def check_distillation(checks: Checks, shapes, roads=(0,), kinds=("plain",)) -> None:
    cases = [case for case in itertools.product(NAMES, shapes, kinds) for _ in range(draws(*case[1:]))]
    for dtype, (rows, vocab), kind in cases:
        s, t = torch.randn(2, rows, vocab, device=DEVICE).mul_(3).to(dtype)
        ts, tt = 2.0, 2.0
        if kind == "offset":
            s = offset_copy(s, 1)
        if kind == "temperatures":
            ts, tt = 0.7, 3.0
        if kind == "cold":
            ts = tt = 1e-2
        if kind == "large":
            s, t = s * 3000, t * 3000
            ts = tt = 1e3
        if kind == "masked":
            t = t.masked_fill(torch.rand_like(t, dtype=torch.float) < 0.3, -float("inf"))
        if kind == "special":
            s, t = s.clone(), t.clone()
            s[0, vocab // 2] = -float("inf")
            t[-1, 0] = float("inf")
            if rows > 2:
                s[1, vocab - 1] = float("nan")
                t[2, :] = -float("inf")
        for lt, road, grads in itertools.product((False, True), roads, ((0, 0), (1, 0), (1, 1))):
            function = lambda s, t: eager_distillation(s, t, ts, tt, ts * tt, "batchmean", lt)  # noqa: E731
            eager = with_grads(function, s, t, grads=[bool(g) for g in grads])
            exact = with_grads(function, s.double(), t.double(), grads=[bool(g) for g in grads])
            for _ in range(2):
                poisoned(rows, vocab, dtype=dtype)
            try:
                ours, again = (
                    distillation(
                        s,
                        t,
                        ts=ts,
                        tt=tt,
                        scale=ts * tt,
                        factor=1 / rows,
                        log_target=lt,
                        road=road,
                        grad_s=grads[0],
                        grad_t=grads[1],
                    )
                    for _ in range(2)
                )
            except RuntimeError as error:
                if "InvalidValue" in str(error):  # the road named does not take this shape
                    continue
                raise
            for name, o, o2, e, x64 in zip(("loss", "grad_s", "grad_t"), ours, again, eager, exact, strict=True):
                if o is None:
                    continue
                what = f"distill {NAMES[dtype]} {rows}x{vocab} {kind} lt={lt} road={road} grads={grads} {name}"
                checks.compare(what, o, e, x64)
                if not torch.equal(o.nan_to_num(), o2.nan_to_num()):
                    checks.placed.append(f"{what}: two runs differ")


def streams_and_graphs() -> None:
    s, t = torch.randn(2, 64, 32000, device=DEVICE)
    x, q = torch.log_softmax(s, -1), torch.softmax(t, -1)
    want = [*distillation(s, t, grad_s=True), *kl(x, q, grad_input=True)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = [*distillation(s, t, grad_s=True), *kl(x, q, grad_input=True)]
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True) if a is not None), "side stream"
    s2, t2 = torch.randn(2, 64, 32000, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = [*distillation(s, t, grad_s=True), *kl(x, q, grad_input=True)]
    s.copy_(s2)
    t.copy_(t2)
    x.copy_(torch.log_softmax(s, -1))
    q.copy_(torch.softmax(t, -1))
    graph.replay()
    want = [*distillation(s, t, grad_s=True), *kl(x, q, grad_input=True)]
    assert all(torch.equal(a, b) for a, b in zip(want, held, strict=True) if a is not None), "graph"
    print("default stream, side stream, CUDA graph: same bits")


def huge() -> None:
    """2.2 G elements in bfloat16: indices past 2**31."""
    n, v = 17_200, 128_000
    a, b = (torch.empty(n, v, dtype=torch.bfloat16, device=DEVICE).normal_() for _ in range(2))
    start = time.perf_counter()
    total, grad, _ = distillation(a, b, grad_s=True, factor=1.0)
    parts = [distillation(x, y, grad_s=True) for x, y in zip(a.split(4300), b.split(4300), strict=True)]
    assert torch.equal(grad[-4300:], parts[-1][1]), "distillation past 2**31"
    assert abs(total.item() / sum(p[0].item() for p in parts) - 1) < 5e-3
    del grad, parts
    loss, gi, _ = kl(a, b, log_target=True, reduction="sum", grad_input=True)
    tail = kl(a[-100:], b[-100:], log_target=True, reduction="sum", grad_input=True)
    assert torch.equal(gi[-100:], tail[1]), "kl_div past 2**31"
    del gi
    one = kl(a, b, log_target=True, reduction="none")[0]
    assert torch.equal(one[-100:], kl(a[-100:], b[-100:], log_target=True, reduction="none")[0])
    assert abs(one.sum(dtype=torch.float64).item() / loss.double().item() - 1) < 1e-2
    torch.cuda.synchronize()
    print(f"{n * v / 1e9:.2f} G elements: right ({time.perf_counter() - start:.1f} s)")
