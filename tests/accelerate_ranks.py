# SPDX-License-Identifier: Apache-2.0
"""One of the ranks of tests/test_accelerate_training.py: an accelerated model on its share of a batch, against the whole."""

import copy
import datetime
import sys
from typing import Any

import hf_vlms
import torch
import torch.distributed as dist
from ranks import leave
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from vlmkernels import accelerate


def step(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    logits = model(**inputs).logits
    (logits.square() * inputs["attention_mask"][..., None]).sum(-1).mean().backward()


def sharded(model: Any, mesh: Any, first: bool) -> Any:
    """A copy on all ranks, accelerated before or after that."""
    replica = copy.deepcopy(model)
    report = accelerate(replica) if first else None
    for layer in (*replica.model.vision_tower.encoder.layers, *replica.model.language_model.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(replica, mesh=mesh)
    report = report or accelerate(replica)
    # A layer that is sharded by itself has a class of its own before: the tower's two keep their norms and sums.
    assert len(report.replaced) == (16 if first else 14) and not [row for row in report.attention if row.reason], report
    return replica


def main(rank: int, size: int, path: str) -> None:
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size, timeout=timeout)
    torch.manual_seed(0)
    model, inputs = hf_vlms.llava()
    model = model.double()
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    mine = {key: x[rank::size] for key, x in inputs.items()}
    whole = copy.deepcopy(model)
    accelerate(whole)
    step(whole, inputs)
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}

    replica = copy.deepcopy(model)
    accelerate(replica)
    step(DistributedDataParallel(replica, find_unused_parameters=True), mine)
    for name, x in replica.named_parameters():
        if name in wanted:
            torch.testing.assert_close(x.grad, wanted[name])

    mesh = init_device_mesh("cpu", (size,))
    for first in (True, False):
        replica = sharded(model, mesh, first)
        step(replica, mine)
        for name, x in replica.named_parameters():
            if name in wanted:
                torch.testing.assert_close(x.grad.full_tensor(), wanted[name])
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
