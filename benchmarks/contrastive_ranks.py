# SPDX-License-Identifier: Apache-2.0
"""The contrastive losses of a batch that the GPUs of one machine share over NCCL, against the whole batch on one of them.

    torchrun --nproc-per-node 2 benchmarks/contrastive_ranks.py OUT.json [COMMIT]

A step is the loss and the gradients of features, scale and bias, as with open_clip's ``gather_with_grad``. Features are normal
deviates of length 1 in bf16. Each rank's gradients are compared with the fp64 ones of the whole batch. The time is that of the
slowest rank, the median of several runs of steps that follow each other as in training, so that the host is ahead of the GPUs.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from vlmkernels import clip_loss, siglip_loss
from vlmkernels.bench.environment import describe
from vlmkernels.testing import compare

STEPS, RUNS = 10, 5
LOSSES: dict[str, tuple[Callable[..., torch.Tensor], tuple[float, ...]]] = {
    "CLIP": (clip_loss, (100.0,)),
    "SigLIP": (siglip_loss, (10.0, -10.0)),
}
SIZES = ((32768, 512), (32768, 768), (32768, 1152), (65536, 768))


def leaves(features: list[torch.Tensor], numbers: tuple[float, ...]) -> list[torch.Tensor]:
    shared = [torch.tensor(x, device=features[0].device) for x in numbers]
    return [x.clone().requires_grad_() for x in (*features, *shared)]


def milliseconds(step: Callable[[], Any]) -> float:
    """Of a step on the slowest rank."""
    times = []
    for _ in range(RUNS + 1):
        dist.barrier()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(STEPS):
            step()
        stop.record()
        torch.cuda.synchronize()
        time = torch.tensor(start.elapsed_time(stop) / STEPS, device="cuda")
        dist.all_reduce(time, dist.ReduceOp.MAX)
        times.append(time.item())
    return sorted(times[1:])[RUNS // 2]


def measure(name: str, pairs: int, dim: int) -> dict[str, Any]:
    loss, numbers = LOSSES[name]
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = [F.normalize(torch.randn(pairs, dim, device="cuda"), dim=1).bfloat16() for _ in range(2)]
    mine = leaves([x.chunk(size)[rank] for x in whole], numbers)

    def shared_step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss(*mine, group=dist.group.WORLD), mine)

    alone = leaves(whole, numbers)
    exact_leaves = leaves([x.double() for x in whole], numbers)
    exact = torch.autograd.grad(loss(*exact_leaves, backend="torch"), exact_leaves)
    results = [
        compare(got, size * want.chunk(size)[rank], "grad") for got, want in zip(shared_step()[:2], exact[:2], strict=True)
    ]
    assert all(results), results
    del exact_leaves, exact
    torch.cuda.empty_cache()
    worst = torch.tensor(max(result.ratio for result in results), device="cuda")
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    one = milliseconds(lambda: torch.autograd.grad(loss(*alone), alone))
    many = milliseconds(shared_step)
    row = {
        "workload": f"{name} {pairs} D{dim}", "gpus": size, "error_over_floor": worst.item(),
        "ms_on_one": one, "ms_shared": many, "speedup": one / many,
    }  # fmt: skip
    if rank == 0:
        print("{workload}: {ms_on_one:.2f} ms on one GPU, {ms_shared:.2f} on {gpus}, {speedup:.2f} x".format(**row), flush=True)
    return row


def main(path: Path, commit: str | None = None) -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    rows = [measure(name, *size) for size in SIZES for name in LOSSES]
    if dist.get_rank() == 0:
        path.write_text(json.dumps({"run": describe(torch.device("cuda"), commit), "rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
