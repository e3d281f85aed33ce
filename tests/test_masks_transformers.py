# SPDX-License-Identifier: Apache-2.0
"""KeyRanges against the masks that the models of Hugging Face transformers give their attention layers, on tiny random models."""

from typing import Any

import pytest
import torch

from vlmkernels.masks import KeyRanges, compact_keys, even_spans
from vlmkernels.testing.compare import compare

pytest.importorskip("transformers")
import hf_masks  # noqa: E402
from transformers import DynamicCache  # noqa: E402

S = 12
IDS = torch.arange(2 * S).reshape(2, S) % 50 + 5
# Nonzero at real tokens. The first row is padded on the left, the second on the right.
PADDED = torch.tensor([[0] * 3 + [1] * (S - 3), [1] * (S - 2) + [0] * 2])
NO_PADDING = torch.ones_like(PADDED)
with_and_without_padding = pytest.mark.parametrize("real", [NO_PADDING, PADDED], ids=["full", "padded"])


def key_padding(real: torch.Tensor) -> KeyRanges:
    return KeyRanges.key_padding(real.shape[1], mask=real, validate=True)


def assert_masks(ranges: KeyRanges, seen: torch.Tensor) -> None:
    """``ranges`` are what the model lets through, both ways: as a dense mask, and read back from it."""
    dense = ranges.dense(seen.shape[2]).expand_as(seen)
    assert torch.equal(dense, seen), f"first difference at (batch, query, key) {(dense != seen).nonzero()[0].tolist()}"
    assert torch.equal(KeyRanges.from_dense(seen).dense(seen.shape[2]), seen)


def attention_of(model: Any, **inputs: Any) -> list[torch.Tensor]:
    """What each attention call of one forward pass lets through, in the order of the layers."""
    with hf_masks.probing(model) as calls:
        model(**inputs)
    return [call.seen for call in calls]


@with_and_without_padding
@pytest.mark.parametrize("generation", [1, 2])
def test_paligemma(generation: int, real: torch.Tensor) -> None:
    prefix = torch.tensor([7, 5])
    # The processor gives padding the type 0 too, on either side.
    types = ((torch.arange(S) >= prefix[:, None]) & (real == 1)).long()
    model = hf_masks.paligemma(generation)
    layers = attention_of(model, input_ids=IDS, token_type_ids=types, attention_mask=real, use_cache=False)
    assert len(layers) == generation
    windows = {"full_attention": None, "sliding_attention": 3}
    kinds = getattr(model.config.text_config, "layer_types", None) or ["full_attention"]
    for kind, seen in zip(kinds, layers, strict=True):
        window = windows[kind]
        by_types = KeyRanges.image_text(types, image_type=0, window=window, window_rule="image_outside")
        by_length = KeyRanges.prefix_lm(S, prefix, window=window)
        if window is None:
            assert_masks(by_types & key_padding(real), seen)
            assert_masks(by_length & key_padding(real), seen)
            continue
        # Padding on the right has the prefix's type: its rows, which no one reads, see the prefix beyond a gap.
        is_real = real.bool()
        for ranges in (by_types, by_length):
            assert torch.equal((ranges & key_padding(real)).dense(S)[is_real], seen[is_real])
    if generation == 2:
        assert set(kinds) == set(windows)


@with_and_without_padding
def test_gemma3(real: torch.Tensor) -> None:
    # Two images, the first longer than the window of 3; in the other row they touch text at both ends of the sequence.
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]])
    model = hf_masks.gemma3()
    layers = attention_of(model, input_ids=IDS, token_type_ids=types, attention_mask=real, use_cache=False)
    local, everywhere = layers
    assert_masks(KeyRanges.image_text(types) & key_padding(real), everywhere)
    assert_masks(KeyRanges.image_text(types, window=3, window_rule="window_outside") & key_padding(real), local)
    ids = torch.where(types == 1, torch.tensor([[0] * 9 + [1] * 3, [4] * 4 + [2] * 8]), -1)
    assert_masks(KeyRanges.image_text(image_ids=ids) & key_padding(real), everywhere)


def test_gemma3_text_is_causal_with_a_window() -> None:
    local, everywhere = attention_of(hf_masks.gemma3(), input_ids=IDS, use_cache=False)
    assert_masks(KeyRanges.causal(S, window=3), local)
    assert_masks(KeyRanges.causal(S), everywhere)


def test_packed_rows() -> None:
    """Position ids that start again: transformers keeps the sequences of a row apart."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    layers = attention_of(hf_masks.gemma3().model.language_model, input_ids=IDS[:1], position_ids=positions, use_cache=False)
    packed = KeyRanges.packed(torch.tensor([0, 5, 8, 12]), S, causal=True)
    assert_masks(packed & KeyRanges.causal(S, window=3), layers[0])
    assert_masks(packed, layers[1])


def test_key_value_cache() -> None:
    """A later chunk of the text attends to the cache too: bottom-right alignment, and padding of the whole context."""
    model, cache = hf_masks.paligemma(1).model.language_model, DynamicCache()
    attention_of(model, input_ids=IDS[:, :8], attention_mask=PADDED[:, :8], past_key_values=cache)
    (seen,) = attention_of(model, input_ids=IDS[:, 8:], attention_mask=PADDED, past_key_values=cache)
    padding = KeyRanges.key_padding(4, mask=PADDED)
    assert_masks(KeyRanges.causal(4, S) & padding, seen)
    assert_masks(KeyRanges.causal(4, S, offset=torch.tensor([8, 8])) & padding, seen)
    assert_masks((KeyRanges.causal(S) & key_padding(PADDED))[8:], seen)


@with_and_without_padding
def test_git(real: torch.Tensor) -> None:
    model, seen = hf_masks.git().eval(), []
    hf_masks.mask_argument(model.encoder.layer[0], seen)
    with torch.no_grad():
        model(input_ids=IDS, pixel_values=torch.randn(2, 3, 28, 28), attention_mask=real)
    image = seen[0].shape[2] - S
    assert image == 5
    # Text padded on the left leaves a hole between the image and the text, so pad on the right.
    right = slice(1, 2) if real is PADDED else slice(0, 2)
    keys = torch.cat([torch.ones(2, image, dtype=real.dtype), real], dim=1)[right]
    assert_masks(KeyRanges.prefix_lm(S + image, image) & key_padding(keys), seen[0][right])


def mllama_inputs(num_tiles: list[list[int]], images_at: list[list[int]]) -> dict[str, Any]:
    """Inputs of Llama-3.2-Vision with the cross-attention mask that its own processor makes."""
    processing = pytest.importorskip("transformers.models.mllama.processing_mllama")
    ids = IDS.clone()
    for row, places in enumerate(images_at):
        ids[row, places] = 63
    spans = [processing.get_cross_attention_token_mask(row, 63) for row in ids.tolist()]
    cross = processing.convert_sparse_cross_attention_mask_to_dense(spans, num_tiles, max_num_tiles=4, length=S)
    tiles = torch.tensor([[n > tile for tile in range(4)] for row in num_tiles for n in row]).reshape(2, -1, 4)
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(2, tiles.shape[1], 4, 3, 28, 28),
        "aspect_ratio_ids": torch.ones(tiles.shape[:2], dtype=torch.int64),
        "aspect_ratio_mask": tiles.long(),
        "cross_attention_mask": torch.from_numpy(cross),
        "use_cache": False,
    }


@pytest.mark.parametrize("tiles", [[[4, 4, 4], [4, 4, 4]], [[1, 4, 2], [3, 2, 1]]], ids=["all tiles", "padded tiles"])
def test_mllama(tiles: list[list[int]]) -> None:
    # Images apart and in a group; one at the start, and text before the first one.
    inputs = mllama_inputs(tiles, [[0, 4, 5], [2, 3, 9]])
    tower, cross, text = [], [], []
    model = hf_masks.mllama()
    with hf_masks.probing(model) as calls:
        model(**inputs)
    for call in calls:
        kind = type(call.module).__name__
        (tower if "Vision" in kind else cross if "Cross" in kind else text).append(call.seen)
    assert (len(tower), len(cross), len(text)) == (2, 1, 1)
    assert_masks(KeyRanges.causal(S), text[0])

    valid = (inputs["aspect_ratio_mask"] == 1)[..., None].expand(-1, -1, -1, 5)
    order, key_start, key_stop = compact_keys(valid.flatten(2))
    seen = cross[0].gather(2, order[:, None].expand_as(cross[0]))
    image_tokens = inputs["input_ids"] == 63
    if all(n == 4 for row in tiles for n in row):
        ranges = KeyRanges.mllama(image_tokens, key_start, key_stop, before_image="everything")
        assert_masks(ranges, seen)
        assert_masks(KeyRanges.mllama(image_tokens, *even_spans(3, 20), before_image="everything"), cross[0])
    else:
        # Before the first image the model lets padded tiles through too.
        before = image_tokens.cumsum(1) == 0
        ranges = KeyRanges.mllama(image_tokens, key_start, key_stop).dense(seen.shape[2])
        assert before.any() and seen[before].all()
        assert torch.equal(ranges[~before], seen[~before]) and not ranges[before].any()

    # The tower pads each tile from 5 to 8 tokens, and attends over the 4 tiles of one image.
    valid = torch.nn.functional.pad(valid, (0, 3)).reshape(6, 1, 32)
    order, _, lengths = compact_keys(valid)
    for seen in tower:
        sorted_queries = seen.gather(1, order[..., None].expand_as(seen))
        assert_masks(KeyRanges.mllama_vision(lengths[:, 0], 32), sorted_queries.gather(2, order[:, None].expand_as(seen)))
        with pytest.raises(ValueError, match="a hole"):
            KeyRanges.from_dense(seen)


def test_qwen2_5_vision() -> None:
    model, given = hf_masks.qwen2_5_vision(), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda m, a, kw: given.append((m, kw["cu_seqlens"])), with_kwargs=True)
    grid = torch.tensor([[1, 20, 12], [2, 4, 10]])  # an image whose windows don't divide it, and a video of two frames
    total = int(grid.prod(1).sum())
    with hf_masks.probing(model) as calls:
        model(torch.randn(total, 3 * 2 * 14 * 14), grid_thw=grid)
    lengths = []
    for module, cu_seqlens in given:
        # Without a flash kernel the layer calls attention once per window, or per frame.
        seen = torch.block_diag(*(call.seen[0] for call in calls if call.module is module)).bool()[None]
        assert seen.shape == (1, total, total)
        assert_masks(KeyRanges.windows(cu_seqlens, total), seen)
        assert_masks(KeyRanges.packed(cu_seqlens, total), seen)
        lengths.append(cu_seqlens.diff().tolist())
    windowed, full = lengths
    assert full == [240, 40, 40] and max(windowed) == 64 and min(windowed) < 64


def test_qformer_itm_and_itc() -> None:
    model = hf_masks.blip2_retrieval()
    text_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    inputs = {"pixel_values": torch.randn(2, 3, 28, 28), "input_ids": IDS[:, :4], "attention_mask": text_mask}

    def self_attention(matching: bool) -> list[torch.Tensor]:
        with hf_masks.probing(model) as calls:
            model(**inputs, use_image_text_matching_head=matching)
        names = {module: name for name, module in model.named_modules()}
        return [c.seen for c in calls if "qformer" in names[c.module] and "crossattention" not in names[c.module]]

    itm = self_attention(True)
    assert len(itm) == 2
    for seen in itm:
        assert_masks(KeyRanges.qformer("itm", 3, 4, text_mask=text_mask, validate=True), seen)
        assert_masks(KeyRanges.qformer("itm", 3, 4, text_lengths=text_mask.sum(1)), seen)

    itc = KeyRanges.qformer("itc", 3, 4, text_mask=text_mask)
    queries, text = self_attention(False)[::2]  # two passes of two layers
    assert_masks(itc[:3].key_chunk(0, 3), queries)
    assert_masks(itc[3:].key_chunk(3, 7), text)
    assert not itc.dense(7)[:, :3, 3:].any() and not itc.dense(7)[:, 3:, :3].any()


def test_qformer_itg() -> None:
    """transformers builds no such mask, but its Q-Former runs one: what each output row depends on."""
    model = hf_masks.blip2_retrieval().qformer.eval()
    ranges = KeyRanges.qformer("itg", 3, 4, text_lengths=torch.tensor([4, 3]))
    tokens, image = torch.randn(2, 7, 16), torch.randn(2, 5, 16)

    @torch.no_grad()
    def run(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        image_states = image.to(tokens.dtype)
        out = model(query_embeds=tokens, query_length=3, attention_mask=mask, encoder_hidden_states=image_states)
        return out.last_hidden_state

    mask = ranges.dense(7)[:, None]
    out = run(tokens, mask)
    depends = torch.zeros(2, 7, 7, dtype=torch.bool)
    for key in range(7):
        other = tokens.clone()
        other[:, key] = torch.randn(2, 16)
        depends[:, :, key] = (run(other, mask) != out).any(-1)
    # A row also depends on itself, where it is padding, and on what those rows depend on: nothing more here.
    assert torch.equal(depends, ranges.dense(7) | torch.eye(7, dtype=torch.bool))
    model.double()
    with_text, alone = run(tokens.double(), mask)[:, :3], run(tokens[:, :3].double(), None)
    assert compare(with_text.float(), alone, "gemm")


def test_idefics_text_sees_the_image_before_it() -> None:
    """IDEFICS says which image each token sees; an end of document lets go of it."""
    processing = pytest.importorskip("transformers.models.idefics.processing_idefics")

    class Tokenizer:
        eos_token_id = 2

        def convert_tokens_to_ids(self, token: str) -> int:
            return 63

    ids = IDS.clone()
    ids[0, [0, 4, 5]] = 63
    ids[1, [3, 9]] = 63
    image_of, _ = processing.image_attention_mask_for_packed_input_ids(ids, Tokenizer(), "pt")
    seen = processing.incremental_to_binary_attention_mask(image_of.clone(), "pt", num_classes=3).bool()
    spans = even_spans(3, 4)
    assert_masks(KeyRanges.flamingo(ids == 63, *spans), seen.repeat_interleave(4, dim=2))
    ids[0, 7] = 2
    image_of, _ = processing.image_attention_mask_for_packed_input_ids(ids, Tokenizer(), "pt")
    seen = processing.incremental_to_binary_attention_mask(image_of.clone(), "pt", num_classes=3).bool()
    assert not seen[0, 8:].any()
    assert_masks(KeyRanges.cross(image_of, *spans), seen.repeat_interleave(4, dim=2))
