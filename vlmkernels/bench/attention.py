# SPDX-License-Identifier: Apache-2.0
"""The workloads of attention: one length, towers on photos, images packed in one row; and what a mask costs by itself."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlmkernels import KeyRanges
from vlmkernels.bench import peers, towers
from vlmkernels.bench.peers import AttentionInputs, PackedInputs, Provider
from vlmkernels.bench.workloads import OURS, Case, num_bytes, work_dtype
from vlmkernels.ops.attention import attention
from vlmkernels.ops.tile_bounds import TileBounds, tile_bounds

Tensors = Sequence[torch.Tensor]

#: Queries and keys per block of FlexAttention's block masks, unless asked otherwise.
FLEX_BLOCK = 128


def attention_case(inputs: AttentionInputs, more_peers: Sequence[Provider] = (), backward: bool = False) -> Case:
    """Attention forward, or its backward pass alone. The last key head of the first and the last batch entry is checked."""
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, queries, heads, _ = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    mask: dict[str, Any] = {"causal": inputs.causal, "scale": inputs.scale, "softcap": inputs.softcap}
    dout = None
    if backward:
        dout = torch.randn(batch, queries, heads, v.shape[-1], device=q.device, dtype=q.dtype)
    entries = [0] if batch == 1 else [0, batch - 1]

    def part(i: int, x: torch.Tensor) -> torch.Tensor:
        """``i``: dq, dk, dv of a backward pass; a forward pass has one output, shaped like q."""
        return x[entries][:, :, -group:] if i == 0 else x[entries][:, :, kv_heads - 1 :]

    def exact() -> tuple[torch.Tensor, ...]:
        ranges = inputs.ranges
        if ranges is not None and ranges.start.shape[0] > 1:
            ranges = KeyRanges(ranges.start[entries], ranges.stop[entries])
        cut = [part(i, x) for i, x in enumerate((q, k, v))]
        return _exact(cut, None if dout is None else part(0, dout), ranges=ranges, **mask)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attention(q, k, v, inputs.ranges, **mask)

    flops, moved = _work(q, k, v, batch * _visible_pairs(inputs), backward)
    return Case(
        ours=peers.provider(OURS, inputs, dout, lambda: forward),
        peers=(*more_peers, *peers.attention_peers(inputs, dout)),
        outputs=("dq", "dk", "dv") if backward else ("out",),
        exact=exact,
        part=part,
        rule="gemm",
        flops=flops,
        bytes=moved,
        dtype=q.dtype,
    )


def _exact(qkv: Tensors, dout: torch.Tensor | None, **mask: Any) -> tuple[torch.Tensor, ...]:
    """The fp64 result of attention on these tensors; with ``dout`` the gradients."""
    q, k, v = wide = [x.double().requires_grad_(dout is not None) for x in qkv]
    with torch.set_grad_enabled(dout is not None):
        out: Any = attention(q, k, v, **mask, backend="reference")
    return (out,) if dout is None else torch.autograd.grad(out, wide, dout.double())


def _work(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: float, backward: bool) -> tuple[float, float]:
    """Operations and bytes of attention over this many visible pairs of a query and a key, counted for one head."""
    dim, value_dim = q.shape[-1], v.shape[-1]
    moved = num_bytes(q, k, v) + q.numel() // dim * value_dim * q.element_size()
    # Backward: five products instead of two (QK, dOV, dV, dQ, dK); out and dout are read too, dq, dk, dv written.
    per_pair = 3 * dim + 2 * value_dim if backward else dim + value_dim
    return 2.0 * q.shape[-2] * pairs * per_pair, 2.0 * moved if backward else float(moved)


def _visible_pairs(inputs: AttentionInputs) -> float:
    """Pairs of a query and a key it sees, for one head, averaged over the batch."""
    queries, keys = inputs.q.shape[1], inputs.k.shape[1]
    ranges = inputs.ranges
    if inputs.causal:
        ranges = KeyRanges.causal(queries, keys)
    if ranges is None:
        return float(queries * keys)
    return (ranges.stop - ranges.start).clamp(min=0).double().sum().item() / ranges.start.shape[0]


def random_attention(
    shape: tuple[int, int, int, int, int, int],
    mask: str = "",
    backward: bool = False,
    softcap: float = 0.0,
) -> Callable[[torch.device], Case]:
    """A builder for attention on normal deviates; shape is ``(B, H, Hk, Sq, Sk, D)``, mask is causal, prefix or image_blocks."""

    def build(device: torch.device) -> Case:
        batch, heads, kv_heads, queries, keys, dim = shape
        torch.manual_seed(0)
        sizes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
        q, k, v = (torch.randn(batch, *size, dim, device=device, dtype=work_dtype(device)) for size in sizes)
        ranges = MASKS[mask](queries, device) if mask in MASKS else None
        inputs = AttentionInputs(q, k, v, 1 / math.sqrt(dim), mask == "causal", ranges, softcap)
        return attention_case(inputs, backward=backward)

    return build


def _prefix(length: int, device: torch.device) -> KeyRanges:
    return KeyRanges.prefix_lm(length, length // 4, device=device)


def _image_blocks(length: int, device: torch.device) -> KeyRanges:
    """Gemma-3's images of 256 tokens, one in every 512 tokens, text between them."""
    ids = torch.full((1, length), -1, dtype=torch.int32)
    for image, first in enumerate(range(32, length - 255, 512)):
        ids[:, first : first + 256] = image
    return KeyRanges.image_text(image_ids=ids.to(device))


MASKS = {"prefix": _prefix, "image_blocks": _image_blocks}


def tower_attention(tower: towers.Tower | None) -> Callable[[torch.device], Case]:
    """A builder for the attention of a tower on photos; None is the Q-Former's cross-attention."""

    def build(device: torch.device) -> Case:
        dtype = work_dtype(device)
        call = towers.qformer_cross_attention(device, dtype) if tower is None else towers.self_attention(tower, device, dtype)
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        inputs = AttentionInputs(q, k, v, call.scale)
        return attention_case(inputs, peers.transformers_peers(call, inputs))

    return build


def packed_case(inputs: PackedInputs, backward: bool = False) -> Case:
    """Packed attention forward, or its backward pass alone. All heads of the first and the last image are checked."""
    q, k, v = inputs.q, inputs.k, inputs.v
    dout = torch.randn_like(q) if backward else None
    ranges = KeyRanges.packed(inputs.cu_seqlens, len(q))
    ends = slice(0, inputs.lengths[0]), slice(len(q) - inputs.lengths[-1], len(q))

    def exact() -> tuple[torch.Tensor, ...]:
        """Each end by itself, without a mask."""
        results = [_exact([x[end] for x in (q, k, v)], None if dout is None else dout[end]) for end in ends]
        return tuple(torch.cat(both) for both in zip(*results, strict=True))

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attention(q, k, v, ranges)

    flops, moved = _work(q, k, v, float(sum(length**2 for length in inputs.lengths)), backward)
    return Case(
        ours=peers.provider(OURS, inputs, dout, lambda: forward),
        peers=tuple(peers.packed_peers(inputs, dout)),
        outputs=("dq", "dk", "dv") if backward else ("out",),
        exact=exact,
        part=lambda i, x: torch.cat([x[end] for end in ends]),
        rule="gemm",
        flops=flops,
        bytes=moved,
        dtype=q.dtype,
    )


def packed_attention(lengths: Sequence[int], heads: int, dim: int, backward: bool = False) -> Callable[[torch.device], Case]:
    """A builder for attention within images (or windows) of these lengths, packed in one row, on normal deviates."""

    def build(device: torch.device) -> Case:
        torch.manual_seed(0)
        q, k, v = (torch.randn(sum(lengths), heads, dim, device=device, dtype=work_dtype(device)) for _ in range(3))
        return packed_case(PackedInputs(q, k, v, tuple(lengths)), backward)

    return build


def mask_cost(mask: str, length: int) -> Callable[[torch.device], Case]:
    """A builder for what must be known of a mask before attention starts: tile bounds, beside FlexAttention's block mask.

    Which of Flex's blocks are hidden, masked and whole is checked. ``length`` must be a multiple of them. Ranges are given, to
    Flex too.
    """

    def build(device: torch.device) -> Case:
        ranges = MASKS[mask](length, device)
        compiled = device.type == "cuda"

        def flex() -> Callable[[], Any]:
            make = peers.block_mask(peers.range_mask(ranges), length, length, device)
            return lambda: (make(),)

        def exact() -> tuple[torch.Tensor, ...]:
            pairs = ranges.dense(length)[0].unflatten(1, (-1, FLEX_BLOCK)).unflatten(0, (-1, FLEX_BLOCK))
            return (pairs.any(3).any(1).int() + pairs.all(3).all(1).int(),)

        def part(i: int, known: Any) -> torch.Tensor:
            return _bounds_blocks(known, length) if isinstance(known, TileBounds) else _flex_blocks(known)

        return Case(
            ours=Provider(OURS, lambda: lambda: (tile_bounds(ranges, length),)),
            peers=(Provider(f"flex create_block_mask{' compiled' if compiled else ''}", flex, compiled),),
            outputs=("blocks",),
            exact=exact,
            part=part,
            rule="exact",
            flops=0.0,
            bytes=float(num_bytes(ranges.start, ranges.stop, *tile_bounds(ranges, length))),
            dtype=torch.int32,
            clock="replay",  # the compiled function keeps the host longer than the GPU
        )

    return build


def _bounds_blocks(bounds: TileBounds, length: int) -> torch.Tensor:
    """Flex's blocks by the bounds of the query tiles in them: 0 is hidden, 1 masked, 2 whole."""
    tiles: torch.Tensor = bounds.q_bounds[0].unflatten(0, (length // FLEX_BLOCK, -1))
    lo, hi, full_lo, full_hi = tiles.unbind(-1)
    first = torch.arange(0, length, FLEX_BLOCK, device=lo.device)
    last = first + FLEX_BLOCK
    visible = (lo.amin(1, keepdim=True) < last) & (hi.amax(1, keepdim=True) > first)
    whole = (full_lo.amax(1, keepdim=True) <= first) & (full_hi.amin(1, keepdim=True) >= last)
    return visible.int() + whole.int()


def _flex_blocks(mask: Any) -> torch.Tensor:
    """The same of a block mask, which lists the blocks to mask and those to take whole in each row."""

    def listed(count: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        counts = torch.arange(indices.shape[-1], device=indices.device) < count[..., None]
        return torch.zeros_like(indices).scatter_add(-1, indices.long(), counts.to(indices.dtype))[0, 0]

    return listed(mask.kv_num_blocks, mask.kv_indices) + 2 * listed(mask.full_kv_num_blocks, mask.full_kv_indices)
