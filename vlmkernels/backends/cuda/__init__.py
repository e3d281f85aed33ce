# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels for Hopper (sm_90a), in one shared library behind a plain C interface (``csrc/vlmkernels.h``)."""

import functools

import torch

from vlmkernels.backends.cuda import _library


@functools.cache
def why_not_importable() -> str | None:
    return _library.why_not_loadable()


@functools.cache
def why_not(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs CUDA tensors, these are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return "it needs compute capability 9.0, this GPU has {}.{}".format(*capability)
    return _library.why_not_this_driver()
