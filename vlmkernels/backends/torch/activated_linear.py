# SPDX-License-Identifier: Apache-2.0
"""``activated_linear`` in stock torch operations; on a GPU cuBLAS has GELU with tanh behind a product of 16 bit."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "silu": F.silu,
}


def activated_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None, activation: str) -> Tensor:
    if up is not None:
        # Activated and multiplied in fp32, as in the kernels: rounded each time, one of 2,000 cases was over 3 floors off.
        gate = F.linear(x, weight, bias).to(torch.promote_types(x.dtype, torch.float32))
        return ACTIVATIONS[activation](gate).mul_(F.linear(x, up)).to(x.dtype).contiguous()
    if activation == "gelu_tanh" and bias is not None and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        # torch's own encoder layers call it; on a GPU it is this GELU.
        flat = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return flat.view(*x.shape[:-1], weight.shape[0])
    return ACTIVATIONS[activation](F.linear(x, weight, bias)).contiguous()
