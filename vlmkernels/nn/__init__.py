# SPDX-License-Identifier: Apache-2.0
"""torch.nn modules over the operators: parameters and one call each, with the state_dict of the layer they replace."""

from vlmkernels.nn._attention import ATTENTION_LAYOUTS, AttentionLayout
from vlmkernels.nn.attention_pool import AttentionPool
from vlmkernels.nn.contrastive import ClipLoss, SigLipLoss
from vlmkernels.nn.cross_attention import CrossAttention
from vlmkernels.nn.gated_cross_attention import GatedCrossAttention
from vlmkernels.nn.kosmos import KosmosResampler
from vlmkernels.nn.mllama import MllamaCrossAttention
from vlmkernels.nn.native_resolution import NaFlexPatchEmbed, PackedPatchEmbed3d
from vlmkernels.nn.patch_embed import PATCH_EMBED_LAYOUTS, PatchEmbed, PatchEmbedLayout
from vlmkernels.nn.patch_embed3d import PatchEmbed3d
from vlmkernels.nn.perceiver_resampler import PerceiverResampler
from vlmkernels.nn.qformer import QFormer, QFormerLayer
from vlmkernels.nn.self_attention import SelfAttention

__all__ = [
    "ATTENTION_LAYOUTS",
    "PATCH_EMBED_LAYOUTS",
    "AttentionLayout",
    "AttentionPool",
    "ClipLoss",
    "CrossAttention",
    "GatedCrossAttention",
    "KosmosResampler",
    "MllamaCrossAttention",
    "NaFlexPatchEmbed",
    "PackedPatchEmbed3d",
    "PatchEmbed",
    "PatchEmbed3d",
    "PatchEmbedLayout",
    "PerceiverResampler",
    "QFormer",
    "QFormerLayer",
    "SelfAttention",
    "SigLipLoss",
]
