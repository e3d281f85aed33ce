# SPDX-License-Identifier: Apache-2.0
"""A tile of a matrix product, for kernels that do something with it before it is written."""

from typing import NamedTuple

import triton
import triton.language as tl


class Config(NamedTuple):
    """Tile, warps and pipeline stages of the product."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@triton.jit
def product_tile(
    a_src, w_src, M, stride_am, stride_wn, first_m, first_n, start_k, stop_k,
    N: tl.constexpr, K: tl.constexpr, USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns ``start_k`` to ``stop_k`` of ``a [M, K]`` times those of ``w [N, K]``, in fp32.

    The sources are pointers, or TMA descriptors of tiles.
    """
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_k in range(start_k, stop_k, BLOCK_K):
        if USE_TMA:
            a = a_src.load([first_m, first_k])
            w = w_src.load([first_n, first_k])
        else:
            offs_k = first_k + tl.arange(0, BLOCK_K)
            a_rows = a_src + offs_m.to(tl.int64)[:, None] * stride_am
            w_rows = w_src + offs_n.to(tl.int64)[:, None] * stride_wn
            mask_k = (offs_k < K)[None, :]
            a = tl.load(a_rows + offs_k[None, :], mask=(offs_m < M)[:, None] & mask_k, other=0.0)
            w = tl.load(w_rows + offs_k[None, :], mask=(offs_n < N)[:, None] & mask_k, other=0.0)
        acc = tl.dot(a, w.T, acc, input_precision="ieee")
    return acc
