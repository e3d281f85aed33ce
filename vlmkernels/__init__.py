# SPDX-License-Identifier: Apache-2.0
"""Vision-language layers at the speed of the hardware: kernels, drop-in modules, and the masks between images and text."""

from typing import TYPE_CHECKING, Any

from vlmkernels import nn
from vlmkernels.masks import KeyRanges
from vlmkernels.ops._op import BackendError, use_backend
from vlmkernels.ops.attention import attention
from vlmkernels.ops.contrastive import clip_loss, siglip_loss
from vlmkernels.ops.cross_attention import cross_attention
from vlmkernels.ops.patch_embed import patch_embed
from vlmkernels.ops.pos_embed import resample_pos_embed
from vlmkernels.ops.rope import rope, rope_qkv_

if TYPE_CHECKING:
    from vlmkernels.integrations.accelerate import accelerate, restore

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "KeyRanges",
    "accelerate",
    "attention",
    "clip_loss",
    "cross_attention",
    "nn",
    "patch_embed",
    "resample_pos_embed",
    "restore",
    "rope",
    "rope_qkv_",
    "siglip_loss",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """``accelerate`` and ``restore`` when they are asked for: what they know of other libraries is a fifth of the import."""
    if name not in ("accelerate", "restore"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlmkernels.integrations import accelerate

    return getattr(accelerate, name)
