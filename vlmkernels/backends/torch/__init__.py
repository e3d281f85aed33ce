# SPDX-License-Identifier: Apache-2.0
"""The best that stock torch does for every operator: what runs where there is no GPU."""

import torch


def why_not_importable() -> str | None:
    return None


def why_not(device: torch.device) -> str | None:
    return None
