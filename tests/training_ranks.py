# SPDX-License-Identifier: Apache-2.0
"""One of the ranks of tests/test_training.py: a step on its share of a batch, against the whole batch in this process."""

import copy
import datetime
import sys

import captioner
import torch
import torch.distributed as dist
from ranks import leave
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


class Loss(torch.nn.Module):
    """What DistributedDataParallel calls must be the module's own call."""

    def __init__(self, model: captioner.Captioner) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
        return self.model.loss(pixels, names)


def main(rank: int, size: int, path: str) -> None:
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size, timeout=timeout)
    pixels, names = captioner.named_photos(4 * size, 48, torch.device("cpu"))
    torch.manual_seed(0)
    model = Loss(captioner.Captioner(32, 2, 2, 48, names.shape[1] - 1)).double()
    wanted = torch.autograd.grad(model(pixels, names), list(model.parameters()))
    mine = pixels[rank::size], names[rank::size]

    replica = copy.deepcopy(model)
    wrapped = DistributedDataParallel(replica)  # in a name: its hooks go with it
    wrapped(*mine).backward()
    for x, y in zip(replica.parameters(), wanted, strict=True):
        torch.testing.assert_close(x.grad, y)

    mesh = init_device_mesh("cpu", (size,))
    for block in model.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(*mine).backward()
    for x, y in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(x.grad.full_tensor(), y)
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
