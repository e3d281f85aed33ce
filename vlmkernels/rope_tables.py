# SPDX-License-Identifier: Apache-2.0
"""The cos and sin tables of every rotary embedding: for each channel pair one frequency and one position axis.

Text has one axis, a vision tower has two (height, width), M-RoPE has three (time, height, width). What differs between models
is only which axis a pair follows and how fast it turns. Everything here runs on the device of the positions, without a host
sync. The angle is the fp32 product of position and frequency, as in Hugging Face transformers, so the tables are bit for bit
those of the models.
"""

from collections.abc import Sequence

import torch

from vlmkernels.ops._op import bad_argument

Tables = tuple[torch.Tensor, torch.Tensor]


def frequencies(rotary_dim: int, theta: float = 10000.0, device: torch.device | str | None = None) -> torch.Tensor:
    """``theta ** (-2 p / R)`` for the pairs ``p`` of ``R = rotary_dim`` channels: ``[R/2]`` fp32.

    Computed on the CPU and moved, as the models do it: a GPU's power function may differ in the last bit. Call it once, when a
    layer is made. A vision tower with two axes takes ``frequencies(head_dim // 2)``, head_dim / 4 values.

    Raises:
        ValueError: ``rotary_dim`` is odd or negative.
    """
    if rotary_dim < 0 or rotary_dim % 2:
        raise bad_argument("rotary_dim", rotary_dim, "an even number of channels")
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / max(rotary_dim, 1)
    return (1.0 / theta**exponent).to(device)


def rope_tables(
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    axes: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tables:
    """``cos`` and ``sin`` of ``positions[axes[p], b, s] * inv_freq[p]``: the general form, of which the others are cases.

    Args:
        positions: ``[A, B|1, S]`` for A axes, or ``[B|1, S]`` or ``[S]`` for one; any integer or floating dtype.
        inv_freq: ``[R/2]``, radians per step of each pair.
        axes: ``[R/2]`` integer, the axis that each pair follows, on the device of the positions; None where there is one axis.
        scale: factor on both tables (YaRN's attention factor; ``attention_scaling`` in transformers).
        dtype: of the tables. Models that round them to bf16 are reproduced with it; fp32 is more exact.

    Returns:
        ``cos`` and ``sin``, ``[B|1, S, R/2]``, contiguous.

    Raises:
        ValueError: the shapes do not fit together, or axes are missing or not wanted.
    """
    if inv_freq.dim() != 1:
        raise bad_argument("inv_freq", tuple(inv_freq.shape), "[R/2]")
    if positions.dim() not in (1, 2, 3):
        raise bad_argument("positions", tuple(positions.shape), "[A, B|1, S], [B|1, S] or [S]")
    if (axes is not None) != (positions.dim() == 3):
        got = "None" if axes is None else tuple(axes.shape)
        raise bad_argument("axes", got, "[R/2] with positions [A, B, S], None with positions [B, S] or [S]")
    if axes is None:
        steps = positions.unsqueeze(0) if positions.dim() == 1 else positions
        steps = steps.unsqueeze(-1)
    else:
        if axes.shape != inv_freq.shape:
            raise bad_argument("axes", tuple(axes.shape), f"[{inv_freq.shape[0]}], one axis for each frequency")
        steps = positions.movedim(0, -1).index_select(-1, axes)
    angle = steps.to(torch.float32) * inv_freq.to(torch.float32)
    cos, sin = angle.cos(), angle.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return cos.to(dtype), sin.to(dtype)


def text_1d(positions: torch.Tensor, inv_freq: torch.Tensor, *, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tables:
    """Tables of a language model: ``positions`` ``[B|1, S]`` or ``[S]``, ``inv_freq`` ``[R/2]``; see ``rope_tables``."""
    return rope_tables(positions, inv_freq, scale=scale, dtype=dtype)


def vision_2d(positions: torch.Tensor, inv_freq: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> Tables:
    """Tables of a vision tower: the first half of the pairs turns with the height, the second half with the width.

    Args:
        positions: ``[2, S]`` or ``[2, B|1, S]``, height then width, as ``vision_positions`` gives them.
        inv_freq: ``[R/4]``, used for both axes: ``frequencies(head_dim // 2)``.
        dtype: of the tables.

    Returns:
        ``cos`` and ``sin``, ``[B|1, S, R/2]``.
    """
    positions = positions.unsqueeze(1) if positions.dim() == 2 else positions
    if positions.dim() != 3 or positions.shape[0] != 2:
        raise bad_argument("positions", tuple(positions.shape), "[2, S] or [2, B, S]")
    count = inv_freq.shape[0]
    axes = (torch.arange(2 * count, device=positions.device) >= count).long()
    return rope_tables(positions, inv_freq.repeat(2), axes, dtype=dtype)


def _check_sections(positions: torch.Tensor, inv_freq: torch.Tensor, sections: Sequence[int]) -> None:
    if positions.dim() != 3 or positions.shape[0] != 3:
        raise bad_argument("positions", tuple(positions.shape), "[3, B, S]: time, height, width")
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != inv_freq.shape[0]:
        raise bad_argument("sections", list(sections), f"three counts of pairs that add up to {inv_freq.shape[0]}")


def mrope_sectioned(
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    sections: Sequence[int] = (16, 24, 24),
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tables:
    """M-RoPE of Qwen2-VL and Qwen2.5-VL: the first ``sections[0]`` pairs follow time, then height, then width.

    Args:
        positions: ``[3, B|1, S]``: time, height, width. All three are equal for text.
        inv_freq: ``[R/2]``, ``sum(sections)`` values.
        sections: pairs for time, height and width.
        scale: see ``rope_tables``.
        dtype: of the tables.

    Raises:
        ValueError: the shapes or the sections do not fit together.
    """
    _check_sections(positions, inv_freq, sections)
    pair = torch.arange(inv_freq.shape[0], device=positions.device)
    axes = (pair >= sections[0]).long() + (pair >= sections[0] + sections[1]).long()
    return rope_tables(positions, inv_freq, axes, scale=scale, dtype=dtype)


def mrope_interleaved(
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    sections: Sequence[int] = (24, 20, 20),
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tables:
    """M-RoPE of Qwen3-VL: the axes take turns (time, height, width, time, ...) until height and width have had their share.

    Pair ``p`` follows height where ``p % 3 == 1`` and ``p < 3 sections[1]``, width where ``p % 3 == 2`` and ``p < 3
    sections[2]``, else time. The pairs themselves are still the halves of the head: ``rope(..., interleaved=False)``.

    Args:
        positions: ``[3, B|1, S]``: time, height, width. All three are equal for text.
        inv_freq: ``[R/2]``, ``sum(sections)`` values.
        sections: pairs for time, height and width.
        scale: see ``rope_tables``.
        dtype: of the tables.

    Raises:
        ValueError: the shapes or the sections do not fit together.
    """
    _check_sections(positions, inv_freq, sections)
    pair = torch.arange(inv_freq.shape[0], device=positions.device)
    height = (pair % 3 == 1) & (pair < 3 * sections[1])
    width = (pair % 3 == 2) & (pair < 3 * sections[2])
    return rope_tables(positions, inv_freq, height.long() + 2 * width.long(), scale=scale, dtype=dtype)


def _block_order(
    local: torch.Tensor, height: int | torch.Tensor, width: int | torch.Tensor, merge: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the ``local``-th patch of an image whose patches are ordered by merge blocks; frames repeat."""
    within_frame = local % (height * width)
    block_row, rest = within_frame // (merge * width), within_frame % (merge * width)
    block_column, inside = rest // (merge * merge), rest % (merge * merge)
    return block_row * merge + inside // merge, block_column * merge + inside % merge


def vision_positions(
    grid_thw: torch.Tensor | Sequence[Sequence[int]],
    *,
    merge_size: int = 2,
    device: torch.device | str | None = None,
    total: int | None = None,
) -> torch.Tensor:
    """Row and column of every patch of packed images and videos, in the order of the Qwen vision towers.

    Patches come frame by frame, inside a frame by ``merge_size x merge_size`` blocks in raster order, inside a block in raster
    order. ``merge_size=1`` is plain raster order. Windowed towers (Qwen2.5-VL) index the result with their permutation.

    Args:
        grid_thw: frames, rows and columns of patches of each image: a list of triples, or a CPU tensor ``[N, 3]``, or a tensor
            ``[N, 3]`` on the GPU, which is read there: no host sync.
        merge_size: side of a merge block.
        device: where to build the positions; by default where ``grid_thw`` is.
        total: the number of patches of all images, needed where ``grid_thw`` is on the GPU. Positions past the last patch
            (padding) are 0.

    Returns:
        ``[2, T]`` int64, rows then columns.

    Raises:
        ValueError: a side is not a multiple of ``merge_size``, ``total`` is missing, or it is not the sum of a grid in memory.
    """
    if isinstance(grid_thw, torch.Tensor):
        if grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
            raise bad_argument("grid_thw", tuple(grid_thw.shape), "[N, 3]")
        if grid_thw.device.type != "cpu":
            return _device_positions(grid_thw, merge_size, total)
        grid_thw = grid_thw.tolist()
    parts = [torch.empty(2, 0, dtype=torch.int64, device=device)]
    for frames, height, width in grid_thw:
        if height % merge_size or width % merge_size:
            raise bad_argument("grid_thw", (frames, height, width), f"rows and columns that are multiples of {merge_size}")
        local = torch.arange(frames * height * width, dtype=torch.int64, device=device)
        parts.append(torch.stack(_block_order(local, max(height, 1), max(width, 1), merge_size)))
    positions = torch.cat(parts, 1)
    if total is not None and total != positions.shape[1]:
        raise bad_argument("total", total, f"{positions.shape[1]}, the patches of grid_thw")
    return positions


def _device_positions(grid_thw: torch.Tensor, merge_size: int, total: int | None) -> torch.Tensor:
    """``vision_positions`` of a grid whose values the host does not know."""
    if total is None:
        raise bad_argument("total", None, "the number of patches, because grid_thw is on the GPU and is not read back")
    index = torch.arange(total, dtype=torch.int64, device=grid_thw.device)
    if grid_thw.shape[0] == 0:
        return index.new_zeros(2, total)
    grid = grid_thw.to(torch.int64)
    ends = grid.prod(1).cumsum(0)
    image = torch.searchsorted(ends, index, right=True)
    inside = image < grid.shape[0]
    image = image.clamp(max=grid.shape[0] - 1)
    sides = grid.clamp(min=1)[image]
    local = index - (ends - grid.prod(1))[image]
    rows, columns = _block_order(local, sides[:, 1], sides[:, 2], merge_size)
    return torch.stack((rows, columns)) * inside
