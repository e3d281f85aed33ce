# SPDX-License-Identifier: Apache-2.0
"""Training through attention and patch_embed: what torch wraps around a step, and the way that the loss takes."""

import contextlib
import copy

import captioner
import pytest
import torch
from conftest import DEVICE, ON_GPU, needs_gloo, run_two_ranks
from torch.utils.checkpoint import checkpoint

from vlmkernels import KeyRanges, attention, use_backend
from vlmkernels.testing import compare

pytest.importorskip("skimage", reason="the photos are those of scikit-image")
SIZES = (
    {"width": 512, "heads": 8, "layers": 4, "resolution": 224}
    if ON_GPU
    else {"width": 32, "heads": 2, "layers": 2, "resolution": 48}
)
BATCH = 64 if ON_GPU else 8


@pytest.fixture(autouse=True)
def fast():
    """Without a GPU the first backend that runs would be Triton's interpreter."""
    with contextlib.nullcontext() if ON_GPU else use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def photos():
    return captioner.named_photos(BATCH, SIZES["resolution"], DEVICE)


def make_model(names):
    torch.manual_seed(0)
    return captioner.Captioner(**SIZES, length=names.shape[1] - 1).to(DEVICE)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, photos):
    """Blocks that are computed again in the backward pass give the same gradients."""
    model = make_model(photos[1])
    wanted = gradients(model, model.loss(*photos))

    def run(block, x, ranges):
        return checkpoint(lambda x: block(x, ranges), x, use_reentrant=reentrant)

    model.loss(*photos, run).backward()
    assert all(compare(x.grad, y.double(), "grad") for x, y in zip(model.parameters(), wanted, strict=True))


def test_autocast(photos):
    """Parameters in fp32, attention in bf16: gradients in fp32, as near to the exact ones as those of the reference.

    On a CPU torch adds up what a thread gives to the gradients of a LayerNorm in bf16, wherever the attention comes from.
    """
    model = make_model(photos[1])
    learned = [x for name, x in model.named_parameters() if ON_GPU or "norm" not in name]
    exact = torch.autograd.grad(model.loss(*photos), learned)

    def error(backend):
        with torch.autocast(DEVICE.type, torch.bfloat16), backend:
            got = torch.autograd.grad(model.loss(*photos), learned)
        assert all(x.dtype == torch.float32 for x in got)
        return sum((x - y).norm() for x, y in zip(got, exact, strict=True)) / sum(y.norm() for y in exact)

    assert error(contextlib.nullcontext()) < 1.2 * error(use_backend("reference"))


def test_compiled_step(photos):
    """Forward and backward as one graph each; on the CPU without code generation, which needs a compiler."""
    model = make_model(photos[1])
    wanted = gradients(model, model.loss(*photos))
    step = torch.compile(model.loss, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    got = gradients(model, step(*photos))
    assert all(compare(x, y.double(), "grad", terms=1e-5) for x, y in zip(got, wanted, strict=True))


@pytest.mark.gpu
def test_graph_of_a_step(photos):
    """Forward, backward and the optimiser, captured; replayed it trains as it does step by step."""
    eager = make_model(photos[1])
    models = eager, copy.deepcopy(eager)
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-4, capturable=True) for model in models]

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(*photos)
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for model, optimizer in zip(models, optimizers, strict=True):
                step(model, optimizer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(models[1], optimizers[1])
    for _ in range(10):
        graph.replay()
        assert torch.allclose(step(models[0], optimizers[0]), loss, rtol=0.01)


@needs_gloo
def test_two_ranks(tmp_path):
    """DistributedDataParallel and FSDP2 over gloo, against the whole batch in one process."""
    run_two_ranks("training_ranks.py", tmp_path, CUDA_VISIBLE_DEVICES="")


def train(steps, photos, context):
    model = make_model(photos[1])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4 if ON_GPU else 3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with context():
            loss = model.loss(*photos)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def test_loss_goes_where_the_reference_goes(photos):
    """Real photos, the same seed; beside it the reference in fp32. In bf16 the curves may part where the loss is nearly 0."""
    steps = 300 if ON_GPU else 40
    wanted = train(steps, photos, lambda: use_backend("reference"))
    got = train(steps, photos, lambda: torch.autocast("cuda", torch.bfloat16) if ON_GPU else contextlib.nullcontext())
    assert wanted[-1] < wanted[0] / 4
    windows = [x.view(-1, 10).mean(1) for x in (got, wanted)]
    assert ((windows[0] - windows[1]).abs() < 0.03 * windows[1] + 0.02 * wanted[0]).all(), windows


def test_rows_that_see_nothing(photos):
    """Padding may come anywhere: rows that see nothing, and keys that nobody sees, get gradients of 0."""
    q, k, v = (torch.randn(2, 20, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    stop = torch.full((2, 20), 15, dtype=torch.int32, device=DEVICE)
    stop[1, 7:] = 0
    out = torch.autograd.grad(attention(q, k, v, KeyRanges(torch.zeros_like(stop), stop)).sum(), (q, k, v))
    assert (out[0][1, 7:] == 0).all() and (out[1][:, 15:] == 0).all() and (out[2][:, 15:] == 0).all()
