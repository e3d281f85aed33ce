# SPDX-License-Identifier: Apache-2.0
"""The workloads of cross-attention with what is around it: a layer with its projections, and the whole Q-Former.

Ours and theirs go through torch.compile alike where there is a GPU; theirs also as they are.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlmkernels import use_backend
from vlmkernels.bench import towers
from vlmkernels.bench.patch_embed import timed
from vlmkernels.bench.peers import Provider
from vlmkernels.bench.workloads import OURS, Case, num_bytes, work_dtype
from vlmkernels.nn import QFormer

#: Images in a batch on a GPU, unless asked otherwise, and on a CPU.
BATCH, CPU_BATCH = 64, 2


def _models(device: torch.device, dtype: torch.dtype, layers: int) -> tuple[Any, Any]:
    """transformers' Q-Former with its default attention (SDPA), and ours with its weights."""
    theirs: Any = towers.qformer(device, dtype, num_hidden_layers=layers)
    theirs.config._attn_implementation = "sdpa"
    config = theirs.config
    ours = QFormer(
        config.hidden_size, config.num_attention_heads, config.intermediate_size, layers, context_dim=config.encoder_hidden_size,
        text=False, device=device, dtype=dtype,
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    return theirs.requires_grad_(False), ours.requires_grad_(False).eval()


def _case(
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    call_theirs: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    direction: str,
    **counts: Any,
) -> Case:
    """Ours of ``inputs``, queries and image tokens, against theirs; a step has the gradients of the queries and all parameters.

    The image tokens have none: the tower before the Q-Former is frozen. Nor has the bias of the keys: a softmax does not see
    it, and what is left is rounding. The first and the last image of a forward pass are checked, of a step everything.
    """
    names = [name for name, _ in ours.named_parameters() if not name.endswith("key.bias")] if direction != "fwd" else []
    queries, context = inputs
    dtype, batch = context.dtype, context.shape[0]
    shape = (batch, *queries.shape[1:])
    dout = torch.randn(shape, device=context.device, dtype=dtype) if names else None
    ends = slice(0, batch, max(1, batch - 1)) if direction == "fwd" else slice(None)

    def call(form: Callable[..., torch.Tensor], module: torch.nn.Module, compiled: bool) -> Callable[[], Any]:
        run: Callable[..., torch.Tensor] = torch.compile(form, dynamic=False) if compiled else form
        named = dict(module.named_parameters())
        leaves = [queries, *(named[name] for name in names)]
        return timed(lambda: run(queries, context), direction, leaves, dout)

    def exact() -> tuple[torch.Tensor, ...]:
        wide = copy.deepcopy(ours).double()
        named, x = dict(wide.named_parameters()), (queries if queries.shape[0] == 1 else queries[ends]).detach().double()
        y = context[ends].double()
        with use_backend("reference"):
            leaves = [x, *(named[name] for name in names)]
            result = timed(lambda: wide(x, y), direction, leaves, None if dout is None else dout.double())()
        return (result,) if direction == "fwd" else tuple(result)

    on_gpu = context.is_cuda
    peers = [Provider("hf", lambda: call(call_theirs, theirs, False))]
    if on_gpu:
        peers.append(Provider("hf compiled", lambda: call(call_theirs, theirs, True), compiled=True))
    passes = 1.0 if direction == "fwd" else 2.0
    moved = num_bytes(*inputs) + torch.Size(shape).numel() * dtype.itemsize
    return Case(
        ours=Provider(OURS, lambda: call(ours, ours, on_gpu)),
        peers=tuple(peers),
        outputs=("out", "dqueries", *(f"d{name}" for name in names)) if names else ("out",),
        exact=exact,
        part=lambda i, x: x[ends] if direction == "fwd" else x,
        bytes=passes * moved + (2 * passes - 1) * num_bytes(*ours.parameters()),
        dtype=dtype,
        **counts,
    )


def _flops(batch: int, keys: int, config: Any) -> tuple[float, float]:
    """Operations of a cross-attention with its projections, and of the rest of a layer."""
    rows, width, inner = batch * towers.QUERIES, config.hidden_size, config.intermediate_size
    cross = 2 * rows * width**2 + batch * keys * width * (2 * config.encoder_hidden_size + 2 * towers.QUERIES)
    return 2.0 * cross, 2.0 * rows * width * (4 * width + 2 * inner + 2 * towers.QUERIES)


def layer(keys: int, direction: str = "fwd") -> Callable[[torch.device], Case]:
    """A builder for a layer's cross-attention: projections, attention, output, residual and LayerNorm, on normal deviates."""

    def build(device: torch.device) -> Case:
        dtype, batch = work_dtype(device), BATCH if device.type == "cuda" else CPU_BATCH
        models = _models(device, dtype, 1)
        config = models[0].config
        theirs, mine = (model.encoder.layer[0].crossattention for model in models)
        torch.manual_seed(0)
        x = torch.randn(batch, towers.QUERIES, config.hidden_size, device=device, dtype=dtype)
        context = torch.randn(batch, keys, config.encoder_hidden_size, device=device, dtype=dtype)

        def call_theirs(x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            y: Any = theirs(x, encoder_hidden_states=context)
            return y[0] if isinstance(y, tuple) else y  # type: ignore[no-any-return]  # by version

        # A step of three products for each of the forward pass, but the one for the image tokens.
        flops = _flops(batch, keys, config)[0] * (1.0 if direction == "fwd" else 2.0)
        return _case(
            mine, theirs, call_theirs, (x, context), direction, rule="module", flops=flops,
            clock="replay",
        )  # fmt: skip

    return build


def former(keys: int, batch: int = BATCH, clock: str = "device") -> Callable[[torch.device], Case]:
    """A builder for the whole Q-Former of 12 layers, learned queries and the tokens of ``batch`` images (normal deviates)."""

    def build(device: torch.device) -> Case:
        dtype, images = work_dtype(device), batch if device.type == "cuda" else min(batch, CPU_BATCH)
        theirs, mine = _models(device, dtype, towers.QFORMER_LAYERS)
        config = theirs.config
        torch.manual_seed(0)
        queries = torch.randn(1, towers.QUERIES, config.hidden_size, device=device, dtype=dtype)
        context = torch.randn(images, keys, config.encoder_hidden_size, device=device, dtype=dtype)

        def call_theirs(queries: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            x = queries.expand(len(context), -1, -1)
            return theirs(query_embeds=x, encoder_hidden_states=context).last_hidden_state  # type: ignore[no-any-return]

        layers = towers.QFORMER_LAYERS
        cross, rest = _flops(images, keys, config)
        flops = layers * rest + -(-layers // 2) * cross
        return _case(mine, theirs, call_theirs, (queries, context), "fwd", rule="model", flops=flops, clock=clock)

    return build
