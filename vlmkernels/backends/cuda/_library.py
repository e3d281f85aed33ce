# SPDX-License-Identifier: Apache-2.0
"""The shared library: found, loaded once with ctypes, checked for its version, and called on the stream that torch is using.

The structures are those of ``csrc/vlmkernels.h``; ``tests/test_build.py`` compares their layouts with the compiler's.
"""

import ctypes
import functools
import importlib.metadata
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ABI_VERSION = 16
FILE = "vlmkernels/lib/libvlmkernels.so"
#: The types of elements, as the structures name them.
TYPES = {torch.uint8: 0, torch.float16: 1, torch.bfloat16: 2}


class TileBoundsParams(ctypes.Structure):
    """``VlmkTileBoundsParams``."""

    _fields_ = [
        ("start", ctypes.c_void_p),
        ("stop", ctypes.c_void_p),
        ("q_bounds", ctypes.c_void_p),
        ("k_bounds", ctypes.c_void_p),
        ("start_stride_b", ctypes.c_int64),
        ("start_stride_q", ctypes.c_int64),
        ("stop_stride_b", ctypes.c_int64),
        ("stop_stride_q", ctypes.c_int64),
        ("batch", ctypes.c_int32),
        ("num_queries", ctypes.c_int32),
        ("num_keys", ctypes.c_int32),
    ]


class PatchEmbedParams(ctypes.Structure):
    """``VlmkPatchEmbedParams``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pixels", "weight", "bias", "prefix", "pos", "norm_weight", "norm_bias")),
        *((name, ctypes.c_void_p) for name in ("out", "total", "scratch")),
        *((f"pixel_stride_{name}", ctypes.c_int64) for name in ("b", "gy", "c", "y")),
        *((f"pos_stride_{name}", ctypes.c_int64) for name in ("b", "n")),
        *((name, ctypes.c_int32) for name in ("batch", "grid_y", "grid_x", "patch", "depth", "frames", "frame_run", "dim")),
        *((name, ctypes.c_int32) for name in ("num_prefix", "pos_on_prefix", "pixel_type", "token_type")),
        ("pixel_scale", ctypes.c_float * 3),
        ("pixel_shift", ctypes.c_float * 3),
        ("eps", ctypes.c_float),
    ]


class PatchEmbedBwdParams(ctypes.Structure):
    """``VlmkPatchEmbedBwdParams``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad", "pixels", "total", "norm_weight", "d_total")),
        *((name, ctypes.c_void_p) for name in ("d_norm_weight", "d_norm_bias", "d_weight", "d_bias", "d_prefix", "d_pos")),
        ("workspace", ctypes.c_void_p),
        *((f"pixel_stride_{name}", ctypes.c_int64) for name in "bcy"),
        ("workspace_bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("batch", "grid_y", "grid_x", "patch", "dim")),
        *((name, ctypes.c_int32) for name in ("num_prefix", "pos_prefix", "type")),
        ("eps", ctypes.c_float),
    ]


class AttentionParams(ctypes.Structure):
    """``VlmkAttentionParams``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "start", "stop", "out", "lse", "counter")),
        *((f"{name}_stride_{axis}", ctypes.c_int64) for name in "qkv" for axis in "bsh"),
        ("range_stride_b", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("batch", "num_queries", "num_keys", "num_heads", "num_kv_heads")),
        *((name, ctypes.c_int32) for name in ("dim", "value_dim", "type", "causal")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class AttentionBwdParams(ctypes.Structure):
    """``VlmkAttentionBwdParams``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dout", "q", "k", "v", "out", "lse", "dlse", "start", "stop", "dq", "dk", "dv")),
        ("workspace", ctypes.c_void_p),
        *((f"{name}_stride_{axis}", ctypes.c_int64) for name in ("dout", "q", "k", "v") for axis in "bsh"),
        *((f"{name}_stride_s", ctypes.c_int64) for name in ("dq", "dk", "dv")),
        *((name, ctypes.c_int64) for name in ("range_stride_b", "workspace_bytes")),
        *((name, ctypes.c_int32) for name in ("batch", "num_queries", "num_keys", "num_heads", "num_kv_heads")),
        *((name, ctypes.c_int32) for name in ("dim", "value_dim", "type", "causal", "deterministic")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class ContrastiveParams(ctypes.Structure):
    """``VlmkContrastiveParams``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "scale", "bias", "dloss", "start", "stop", "row", "column")),
        *((name, ctypes.c_void_p) for name in ("row_positive", "column_positive", "lse_a", "lse_b", "shifted", "numbers")),
        *((name, ctypes.c_void_p) for name in ("share_a", "share_b", "panel", "low_a", "low_b", "counters")),
        *((name, ctypes.c_void_p) for name in ("da", "db", "sums", "loss", "totals")),
        *((f"{name}_stride", ctypes.c_int64) for name in "ab"),
        *((name, ctypes.c_int32) for name in ("rows", "columns", "valid_rows", "valid_columns", "dim", "panel_rows")),
        *((name, ctypes.c_int32) for name in ("panel_columns", "kept_panels", "slots", "wide_b")),
        ("weight", ctypes.c_float),
    ]


class ActivatedLinearParams(ctypes.Structure):
    """``VlmkActivatedLinearParams``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "up", "out")),
        *((name, ctypes.c_int32) for name in ("rows", "depth", "dim", "activation", "type")),
    ]


class FeedForwardParams(ctypes.Structure):
    """``VlmkFeedForwardParams``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "before", "turned", "out", "sums")),
        *((name, ctypes.c_int32) for name in ("rows", "depth", "dim", "activation", "type")),
    ]


def _places() -> Iterator[Path]:
    """Beside this package, else where it is installed: a source tree on ``sys.path`` hides the installed package."""
    yield Path(__file__).resolve().parents[3] / FILE
    for distribution in importlib.metadata.distributions(name="vlmkernels"):
        yield Path(str(distribution.locate_file(FILE)))


@functools.cache
def path() -> Path | None:
    """The library's file: that of the environment variable ``VLMKERNELS_LIBRARY``, else the package's."""
    named = os.environ.get("VLMKERNELS_LIBRARY")
    return Path(named) if named else next((place for place in _places() if place.exists()), None)


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    file = path()
    if file is None:
        return "the CUDA library was not built (install with nvcc on the PATH and VLMKERNELS_CUDA=1)"
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    library.vlmk_last_error.restype = ctypes.c_char_p
    version = library.vlmk_abi_version()
    if version != ABI_VERSION:
        return f"the CUDA library {file} is of interface version {version}, wanted {ABI_VERSION}: install vlmkernels again"
    return library


def why_not_loadable() -> str | None:
    library = _load()
    return library if isinstance(library, str) else None


@functools.cache
def why_not_this_driver() -> str | None:
    library = _loaded()
    return _last_error(library) if library.vlmk_check_driver() else None


def _last_error(library: ctypes.CDLL) -> str:
    text: bytes = library.vlmk_last_error()
    return text.decode(errors="replace")


def _loaded() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


@functools.cache
def _pointers(structure: type[ctypes.Structure]) -> struct.Struct:
    """Those that such a structure begins with."""
    kinds = [field[1] for field in structure._fields_]
    return struct.Struct(f"{next(i for i, kind in enumerate(kinds) if kind is not ctypes.c_void_p)}P")


class EntryPoint:
    """A function ``int vlmk_<op>(const Params*, void* stream)`` of the library."""

    def __init__(self, name: str) -> None:
        self._name = name

    @functools.cached_property
    def _function(self) -> Any:
        # No argtypes: bytes, byref() and c_void_p need no conversion, and checking them would cost as much as the call.
        return getattr(_loaded(), self._name)

    def why_not(self, params: ctypes.Structure) -> str | None:
        """What the library says against these parameters; for an entry point ``vlmk_<op>_check(const Params*)``."""
        return _last_error(_loaded()) if self._function(ctypes.byref(params)) else None

    def launcher(self, params: ctypes.Structure, device: torch.device) -> Callable[..., None]:
        """A launch with these parameters. It is given what the structure begins with pointers to, in its order; None is NULL."""
        pointers = _pointers(type(params))
        behind = bytes(params)[pointers.size :]

        def launch(*tensors: torch.Tensor | None) -> None:
            self(pointers.pack(*[0 if x is None else x.data_ptr() for x in tensors]) + behind, device)

        return launch

    def __call__(self, params: bytes, device: torch.device) -> None:
        """Launch on the current stream of ``device``, which must be current: every op makes it so before it calls a backend.

        Args:
            params: the structure as it lies in memory.

        Raises:
            RuntimeError: the entry point returned an error; the message is the library's.
        """
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device.index))
        code = self._function(params, stream)
        if code:
            raise RuntimeError(f"{self._name} failed with CUDA error {code}: {_last_error(_loaded())}")
