# SPDX-License-Identifier: Apache-2.0
"""FlashAttention as a backend: on a CPU through stand-ins for its two versions, on a GPU where one of them is installed."""

import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from test_attention import make_qkv, make_ranges
from test_layout import run_python

from vlmkernels import BackendError, KeyRanges, attention
from vlmkernels.backends import flash_attn
from vlmkernels.backends.flash_attn._libraries import LIBRARIES, Library
from vlmkernels.backends.reference.attention import attention_bwd, attention_fwd
from vlmkernels.cli import doctor
from vlmkernels.ops._op import OPS
from vlmkernels.testing import compare

ATTENTION = ("attention_fwd", "attention_bwd")
FA4, FA2 = LIBRARIES
BF16 = torch.bfloat16
CALLS: list[str] = []


def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, *others: torch.Tensor) -> None:
    """What both versions rely on: 16 bit, [B, S, H, D], rows at multiples of 16 bytes, and a key for every query."""
    batch, queries, heads, dim = q.shape
    assert q.dtype in (torch.float16, BF16) and k.shape[0] == batch and k.shape[3] == dim and heads % k.shape[2] == 0
    assert v.shape[:3] == k.shape[:3] and 0 not in (*q.shape, *k.shape)
    assert not causal or queries <= k.shape[1]
    for x in (q, k, v, *others):
        assert x.dtype == q.dtype and x.stride(3) == 1
        assert x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])


def fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, softcap: float) -> tuple:
    check_inputs(q, k, v, causal)
    assert not torch.is_grad_enabled()
    out, lse = attention_fwd(q, k, v, None, None, causal, scale, softcap, True)
    return torch.empty_like(q[..., :1].expand_as(out)).copy_(out), lse  # in strides of its own


def bwd(tensors: tuple, dlse: torch.Tensor | None, results: tuple, scale: float, causal: bool, softcap: float) -> None:
    dout, q, k, v, out, lse = tensors
    check_inputs(q, k, v, causal, out, dout)
    assert lse.dtype == torch.float32 and lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.is_contiguous()
    assert dlse is None or (dlse.dtype == torch.float32 and dlse.shape == lse.shape and dlse.is_contiguous())
    dq, dkv = attention_bwd(dout, dlse, q, k, v, out, lse, None, None, causal, scale, softcap)
    exact = (dq, *dkv.split((k.numel(), v.numel())))
    for x, result, right in zip((q, k, v), results, exact, strict=True):
        assert result.shape == x.shape and result.dtype == x.dtype and result.is_contiguous()
        result.copy_(right.view(x.shape))


def fake_fa4() -> dict[str, types.ModuleType]:
    def flash_attn_func(q, k, v, *, softmax_scale=None, causal=False, softcap=0.0, return_lse=False):
        CALLS.append("fa4 fwd")
        assert return_lse
        return fwd(q, k, v, softmax_scale, causal, softcap)

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, *, dq=None, dk=None, dv=None, dlse=None
    ):
        CALLS.append("fa4 bwd")
        bwd((dout, q, k, v, out, lse), dlse, (dq, dk, dv), softmax_scale, causal, softcap)
        return dq, dk, dv

    interface = types.ModuleType("flash_attn.cute.interface")
    interface.flash_attn_func, interface._flash_attn_bwd = flash_attn_func, _flash_attn_bwd
    return {"flash_attn.cute": types.ModuleType("flash_attn.cute"), interface.__name__: interface}


def fake_fa2() -> dict[str, types.ModuleType]:
    def flash_attn_func(q, k, v, *, softmax_scale=None, causal=False, softcap=0.0, return_attn_probs=False):
        CALLS.append("fa2 fwd")
        assert return_attn_probs and v.shape == k.shape
        return *fwd(q, k, v, softmax_scale, causal, softcap), None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        CALLS.append("fa2 bwd")
        assert (dropout_p, window_size_left, window_size_right, alibi_slopes, rng_state) == (0.0, -1, -1, None, None)
        bwd((dout, q, k, v, out, softmax_lse), None, (dq, dk, dv), softmax_scale, causal, softcap)
        return softmax_lse

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface.flash_attn_func, interface._flash_attn_backward = flash_attn_func, _flash_attn_backward
    return {interface.__name__: interface}


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes these fakes all that is installed of FlashAttention, on a GPU of this compute capability (without one, on none)."""

    def installed(*fakes: dict[str, types.ModuleType], capability: tuple[int, int] | None = (9, 0)) -> None:
        CALLS.clear()
        root = types.ModuleType("flash_attn")
        root.__path__, root.__version__ = [], "2.8.3"
        modules = dict.fromkeys(["flash_attn.cute", "flash_attn.cute.interface", "flash_attn.flash_attn_interface"])
        modules["flash_attn"] = root if fakes else None
        for fake in fakes:
            modules |= fake
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        if capability is not None:
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
            on_gpu = flash_attn.why_not
            monkeypatch.setattr(flash_attn, "why_not", lambda device: on_gpu(torch.device("cuda")))

    for name in ATTENTION:
        for memory in ("_found", "_choices", "_plans"):
            monkeypatch.setattr(OPS[name], memory, {})
    flash_attn.library.cache_clear()
    yield installed
    flash_attn.library.cache_clear()


FAKES = {"fa4": fake_fa4, "fa2": fake_fa2}


def check(inputs: list[torch.Tensor], with_lse: bool = True, dlse: bool = False, **options) -> None:
    """Output, log-sum-exp and gradients of the forced backend against the fp64 reference."""
    results = []
    for backend, tensors in (("flash_attn", inputs), ("reference", [x.detach().double().requires_grad_() for x in inputs])):
        out, lse = attention(*tensors, return_lse=True, backend=backend, **options)
        if not dlse:  # with return_lse a gradient of lse comes always, of zeros where nobody used it
            out = attention(*tensors, backend=backend, **options)
        outputs = [out, torch.where(torch.isfinite(lse), lse, 0.0)] if dlse else [out]
        weights = [torch.linspace(-1, 1, x.numel(), device=x.device).bfloat16().view(x.shape).to(x.dtype) for x in outputs]
        results.append([out, lse, *torch.autograd.grad(outputs, tensors, weights)])
    assert all(x.is_contiguous() for x in results[0])
    for name, got, exact in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        if name != "lse" or with_lse:
            result = compare(got, exact, "grad" if name.startswith("d") else "gemm")
            assert result, f"{name}: {result}"


SHAPES = {  # B, H, Hk, Sq, Sk, D, Dv
    "self": (2, 2, 2, 33, 33, 24, 24),
    "gqa, more keys": (1, 4, 2, 20, 50, 16, 16),
    "mqa, more queries": (2, 3, 1, 50, 20, 8, 8),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("version", FAKES)
def test_forced_forward_and_backward(version: str, causal: bool, shape: tuple[int, ...], install: Install) -> None:
    """With more queries than keys a causal mask leaves rows that see nothing: zeros, -inf and no gradient."""
    install(FAKES[version]())
    for dtype in (BF16, torch.float16):
        check(make_qkv(shape, dtype, torch.device("cpu")), causal=causal)
    check(make_qkv(shape, BF16, torch.device("cpu")), causal=causal, scale=0.3, softcap=2.0)
    assert set(CALLS) == {f"{version} fwd", f"{version} bwd"}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_gradient_of_the_log_sum_exp(shape: tuple[int, ...], install: Install) -> None:
    install(fake_fa4())
    check(make_qkv(shape, BF16, torch.device("cpu")), dlse=True, causal=True)


@pytest.mark.parametrize("version", FAKES)
def test_views(version: str, install: Install) -> None:
    """Slices of a packed QKV, heads first, and rows at addresses that the kernels can't read."""
    install(FAKES[version]())
    check(list(torch.randn(2, 33, 3, 2, 16).to(BF16).requires_grad_().unbind(2)), causal=True)
    check([x.transpose(1, 2) for x in torch.randn(3, 2, 2, 33, 16).to(BF16).requires_grad_()])
    check([torch.randn(2, 30, 2, 21).to(BF16).requires_grad_()[..., 1:17] for _ in range(3)])
    packed = [torch.randn(30, 2, 16).to(BF16).requires_grad_() for _ in range(3)]
    check(packed, causal=True)
    out, lse = attention(*packed, return_lse=True, backend="flash_attn")
    assert out.shape == (30, 2, 16) and lse.shape == (2, 30)


@pytest.mark.parametrize("version", FAKES)
def test_nothing_to_see_calls_nothing(version: str, install: Install) -> None:
    install(FAKES[version]())
    for b, sq, sk in ((0, 4, 4), (1, 0, 4), (1, 4, 0)):
        inputs = make_qkv((b, 2, 2, sq, sk, 16, 16), BF16, torch.device("cpu"))
        for causal in (False, True):
            check(inputs, causal=causal)
    assert not CALLS


def test_one_node_and_no_gradient(install: Install) -> None:
    """In a compiled graph, and where nobody wants a log-sum-exp or a gradient."""
    install(fake_fa4())
    inputs = make_qkv((1, 2, 1, 20, 30, 16, 16), BF16, torch.device("cpu"))

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, causal=True, backend="flash_attn").float().square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert torch.equal(x, y)
    with torch.no_grad():
        assert not attention(*inputs, backend="flash_attn").requires_grad
    settings = (None, None, True, 0.25, 0.0)
    q, k, v = (x.detach() for x in inputs)
    torch.library.opcheck(torch.ops.vlmkernels.attention_fwd.default, (q, k, v, *settings, False, "flash_attn"))
    out, lse = torch.ops.vlmkernels.attention_fwd(q, k, v, *settings, True, "flash_attn")
    arguments = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *settings, "flash_attn")
    torch.library.opcheck(torch.ops.vlmkernels.attention_bwd.default, arguments)


def test_which_version_runs(install: Install) -> None:
    """The newer from Hopper on; a version that is missing, or too old or too new to be called, leaves it to the other."""
    q, k, v = make_qkv((1, 2, 2, 8, 8, 16, 16), BF16, torch.device("cpu"))

    def runs(*fakes: dict[str, types.ModuleType], capability: tuple[int, int]) -> str:
        for name in ATTENTION:
            OPS[name]._found.clear(), OPS[name]._choices.clear()
        flash_attn.library.cache_clear()
        install(*fakes, capability=capability)
        attention(q, k, v, backend="flash_attn")
        return CALLS[0]

    both = (fake_fa4(), fake_fa2())
    assert runs(*both, capability=(9, 0)) == runs(*both, capability=(12, 0)) == "fa4 fwd"
    assert runs(*both, capability=(8, 0)) == runs(fake_fa2(), capability=(9, 0)) == "fa2 fwd"
    other = fake_fa4()
    other["flash_attn.cute.interface"]._flash_attn_bwd = lambda q, k, v, out, dout, lse, dq=None, dk=None, dv=None: None
    assert runs(other, fake_fa2(), capability=(9, 0)) == "fa2 fwd"


NO_FA4 = "FlashAttention 4 is not installed (pip install flash-attn-4)"
NO_FA2 = "FlashAttention 2 is not installed (pip install flash-attn)"


def no_library(install: Install) -> str:
    install()
    return (
        "FlashAttention 4 is not installed (pip install flash-attn-4); FlashAttention 2 is not installed (pip install flash-attn)"
    )


def ampere(install: Install) -> str:
    install(fake_fa4(), capability=(8, 0))
    return f"FlashAttention 4 needs compute capability 9.0 or newer; {NO_FA2}"


def old_fa2(install: Install) -> str:
    install(fake_fa2())
    sys.modules["flash_attn"].__version__ = "2.6.3"
    return f"{NO_FA4}; this flash-attn is 2.6.3, wanted 2.7 or newer"


def old_fa4(install: Install) -> str:
    fake = fake_fa4()
    fake["flash_attn.cute.interface"].flash_attn_func = lambda q, k, v: q
    install(fake)
    return f"this flash-attn-4 has no flash_attn_func that takes return_lse: another version is wanted; {NO_FA2}"


def no_gpu(install: Install) -> str:
    install(fake_fa4(), capability=None)
    return "it needs CUDA tensors, these are on cpu"


@pytest.mark.parametrize("case", [no_library, ampere, old_fa2, old_fa4, no_gpu])
def test_a_missing_library_says_so(case: Callable[[Install], str], install: Install) -> None:
    """To the caller who forces it and to the doctor."""
    reason = case(install)
    x = torch.zeros(1, 4, 2, 16, dtype=BF16)
    with pytest.raises(BackendError) as error:
        attention(x, x, x, backend="flash_attn")
    assert f"flash_attn: {reason}" in str(error.value)
    _, lines = doctor.support(torch.device("cpu"))
    assert any(backend == "flash_attn" and line.startswith(reason) for backend, line in lines), lines


def test_a_library_that_breaks_says_how(tmp_path, monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    install()
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("import a_missing_compiler")
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text("raise OSError('undefined symbol\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    assert FA4.why_not_importable() == "FlashAttention 4 doesn't import: No module named 'a_missing_compiler'"
    assert FA2.why_not_importable() == "FlashAttention 2 doesn't import: OSError: undefined symbol"


REFUSALS = {  # capability, (H, Hk, D, Dv), options, the reason; forward
    "fp32": ((9, 0), (2, 2, 16, 16), {"dtype": torch.float32}, "it takes bfloat16 and float16, these are torch.float32"),
    "dims": ((9, 0), (2, 2, 12, 16), {}, "it takes head dims of 8 to 256 in steps of 8, these are 12 and 16"),
    "scale": ((9, 0), (2, 2, 16, 16), {"scale": -1.0}, "it needs a positive scale, got -1.0"),
    "fa4 value dim": ((9, 0), (2, 2, 64, 128), {}, "q and v must be one up to 256 for both or 192 and 128 for FlashAttention 4"),
    "fa4 sm_100": ((10, 0), (2, 2, 136, 136), {}, "one up to 128 for both or 192 and 128 or 256 and 256 for FlashAttention 4"),
    "fa4 sm_120": (
        (12, 0),
        (2, 2, 256, 256),
        {},
        "one up to 128 for both for FlashAttention 4 on this GPU, these are 256 and 256",
    ),
    "fa2 value dim": ((8, 0), (2, 2, 192, 128), {}, "FlashAttention 2 takes q, k and v of one head dim, these are 192 and 128"),
}
BACKWARD_REFUSALS = {
    "fa2 dlse": (
        (8, 0),
        (2, 2, 16, 16),
        {"return_lse": True},
        "FlashAttention 2 takes no gradient of the log-sum-exp: leave out",
    ),
    "fa4 groups": ((9, 0), (2, 1, 192, 128), {}, "takes grouped heads of one head dim, these are 192 and 128"),
    "fa4 softcap": ((12, 0), (2, 2, 64, 64), {"softcap": 5.0}, "has no softcap, got 5.0"),
    "fa4 wide softcap": ((10, 0), (2, 2, 256, 256), {"softcap": 5.0}, "has no softcap at head dim 256, got 5.0"),
    "fa4 wide dlse": ((10, 0), (2, 2, 256, 256), {"return_lse": True}, "takes no gradient of the log-sum-exp at head dim 256"),
}


@pytest.mark.parametrize("case", [*REFUSALS, *BACKWARD_REFUSALS])
def test_refusals(case: str, install: Install) -> None:
    capability, (heads, key_heads, dim, value_dim), options, reason = (REFUSALS | BACKWARD_REFUSALS)[case]
    install(fake_fa4(), fake_fa2(), capability=capability)
    dtype = options.pop("dtype", BF16) if case in REFUSALS else BF16
    inputs = make_qkv((1, heads, key_heads, 4, 4, dim, value_dim), dtype, torch.device("cpu"))
    if case in REFUSALS:
        with pytest.raises(BackendError) as error:
            attention(*inputs, backend="flash_attn", **options)
        assert not CALLS
    else:
        result = attention(*inputs, backend="flash_attn", **options)
        with pytest.raises(BackendError) as error:
            (result[0] if isinstance(result, tuple) else result).sum().backward()
        assert "".join(CALLS) == f"{case[:3]} fwd"
    assert reason in str(error.value)


@pytest.mark.parametrize("causal", [False, True])
def test_ranges_are_refused(causal: bool, install: Install) -> None:
    install(fake_fa4())
    shape = (1, 2, 2, 8, 8, 16, 16)
    inputs = make_qkv(shape, BF16, torch.device("cpu"))
    with pytest.raises(BackendError, match="it takes no ranges, only causal=True or no mask: leave the backend free"):
        attention(*inputs, make_ranges("random", shape, torch.device("cpu")), causal=causal, backend="flash_attn")
    with pytest.raises(BackendError, match="it takes no ranges"):
        attention(*inputs, KeyRanges.causal(8), backend="flash_attn")


IMPORTS = """
import sys, torch, vlmkernels
x = torch.ones(1, 4, 2, 16)
vlmkernels.attention(x, x, x, causal=True)
assert not [name for name in sys.modules if name.partition(".")[0] == "flash_attn" or "backends.flash_attn" in name]
"""


def test_nothing_is_imported_before_it_is_forced() -> None:
    run_python(IMPORTS, TRITON_INTERPRET="0")


@pytest.fixture
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, install: Install) -> Library:
    """One version, the only one, where it is installed."""
    library: Library = request.param
    reason = library.why_not_importable() or library.why_not_on(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(flash_attn, "LIBRARIES", (library,))
    return library


GPU_SHAPES = {
    "D64": (2, 4, 4, 577, 577, 64, 64),
    "D72": (2, 4, 4, 729, 729, 72, 72),
    "D80 gqa": (1, 4, 2, 300, 500, 80, 80),
    "D128 gqa": (1, 8, 2, 515, 1030, 128, 128),
}
on_both_versions = pytest.mark.parametrize("version", LIBRARIES, ids=lambda library: library.package, indirect=True)


@pytest.mark.gpu
@on_both_versions
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_on_a_gpu(version: Library, shape: tuple[int, ...], causal: bool, device: torch.device) -> None:
    check(make_qkv(shape, BF16, device), causal=causal, dlse=version is FA4)


@pytest.mark.gpu
@on_both_versions
def test_more_on_a_gpu(version: Library, device: torch.device) -> None:
    """Rows that see nothing, views of packed QKV at odd addresses, and a softcap, whose tanh is rounded: no log-sum-exp there."""
    check(make_qkv((2, 4, 2, 300, 200, 64, 64), torch.float16, device), causal=True)
    check(list(torch.randn(2, 200, 3, 2, 65, device=device).to(BF16).requires_grad_()[..., 1:].unbind(2)), causal=True)
    check(make_qkv((1, 2, 2, 300, 300, 64, 64), BF16, device), softcap=5.0, with_lse=False)
