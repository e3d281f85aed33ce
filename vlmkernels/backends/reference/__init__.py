# SPDX-License-Identifier: Apache-2.0
"""What every operator means, in plain torch: any device, any floating dtype, forward and backward written out."""

import torch


def why_not_importable() -> str | None:
    return None


def why_not(device: torch.device) -> str | None:
    return None
