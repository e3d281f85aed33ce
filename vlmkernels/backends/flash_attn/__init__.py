# SPDX-License-Identifier: Apache-2.0
"""FlashAttention, where it is installed and forced: version 4 from Hopper on, else version 2; not imported before."""

import functools

import torch

from vlmkernels.backends.flash_attn._libraries import LIBRARIES, Library


def why_not_importable() -> str | None:
    reasons = [candidate.why_not_importable() for candidate in LIBRARIES]
    return None if None in reasons else "; ".join(filter(None, reasons))


@functools.cache
def library(device: torch.device) -> Library | str:
    """The newest version that runs on this GPU, or why none does."""
    reasons = []
    for candidate in LIBRARIES:
        reason = candidate.why_not_importable() or candidate.why_not_on(device)
        if reason is None:
            return candidate
        reasons.append(reason)
    return "; ".join(reasons)


def why_not(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs CUDA tensors, these are on {device.type}"
    found = library(device)
    return found if isinstance(found, str) else None
