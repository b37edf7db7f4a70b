"""Hooks: Hugging Face's mask functions read as facts, unknown ones refused, registries put back."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from autodeploy.capture.hooks import INTERFACE_NAME, Hooks, MarkerCache, mask_facts
from autodeploy.errors import CaptureError
from autodeploy.ops.attention import MaskFacts
from tests import tiny


@pytest.mark.parametrize(
    ("function", "facts"),
    [
        (causal_mask_function, MaskFacts(causal=True)),
        (bidirectional_mask_function, MaskFacts()),
        (sliding_window_causal_mask_function(7), MaskFacts(causal=True, sliding_window=7)),
        (chunked_causal_mask_function(8, torch.zeros(1)), MaskFacts(causal=True, chunk_size=8)),
        (
            and_masks(sliding_window_causal_mask_function(7), sliding_window_causal_mask_function(5)),
            MaskFacts(causal=True, sliding_window=5),
        ),
        (None, MaskFacts()),
    ],
)
def test_facts_of_known_masks(function, facts: MaskFacts) -> None:  # type: ignore[no-untyped-def]
    assert mask_facts(function) == facts


def test_unknown_masks_are_refused_never_assumed_causal() -> None:
    with pytest.raises(CaptureError, match="or_masks"):
        mask_facts(or_masks(causal_mask_function, bidirectional_mask_function))
    with pytest.raises(CaptureError, match="refused rather than assumed causal"):
        mask_facts(lambda b, h, q, k: q > k)


def test_an_unknown_mask_function_is_run_over_all_queries_and_keys() -> None:
    """Such as blocks of tokens that see each other: recognised by value later, or refused there."""
    blocks = torch.tensor([[-1, 0, 0, -1, 1, 1]])
    function = or_masks(causal_mask_function, blockwise_overlay(blocks))
    hooks = Hooks(torch.tensor([0, 6], dtype=torch.int32), torch.arange(6)[None])
    mask = hooks.mask(1, 6, 6, mask_function=function)
    expected = torch.ones(6, 6).tril().bool()
    expected[1, 2] = expected[4, 5] = True
    assert torch.equal(mask, expected[None, None])
    with pytest.raises(CaptureError, match="or_masks"):
        hooks.mask(1, 6, 6, q_offset=2, mask_function=function)


def test_registries_and_model_are_put_back() -> None:
    model = tiny.TINY["llama"]()
    with Hooks().installed(model):
        assert INTERFACE_NAME in AttentionInterface._global_mapping
        assert model.config._attn_implementation == INTERFACE_NAME
    assert INTERFACE_NAME not in AttentionInterface._global_mapping
    assert model.config._attn_implementation != INTERFACE_NAME


def test_a_fact_no_op_expresses_is_refused_by_name() -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(CaptureError, match="'head_mask'"):
        Hooks().attention(torch.nn.Identity(), q, q, q, None, head_mask=torch.zeros(1))
    with pytest.raises(CaptureError, match=r"sinks of shape \[2, 3\]"):
        Hooks(torch.tensor([0, 3])).attention(torch.nn.Identity(), q, q, q, None, sinks=torch.zeros(2, 3))


@pytest.mark.parametrize("spelling", ["s_aux", "sinks"])
def test_sinks_in_every_spelling(spelling: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    hooks = Hooks(torch.tensor([0, 5], dtype=torch.int32))
    per_head = torch.tensor([0.5, -1.0])
    expected, _ = hooks.attention(torch.nn.Identity(), q, k, v, None, s_aux=per_head)
    result, _ = hooks.attention(
        torch.nn.Identity(), q, k, v, None, **{spelling: per_head[None, :, None, None].expand(1, 2, 5, 1)}
    )
    torch.testing.assert_close(result, expected)
    without, _ = hooks.attention(torch.nn.Identity(), q, k, v, None)
    assert not torch.allclose(without, expected)


def test_the_marker_cache_counts_by_kind_and_has_nothing() -> None:
    hooks = Hooks()
    cache = MarkerCache(hooks, 3)
    x = torch.zeros(1, 4, 5)
    assert cache.update_conv_state(x, 0, state_idx=1, conv_kernel_size=4) is x
    assert cache.update_recurrent_state(x, 1) is x and cache.update_indexer(x, 2) is x
    cache.set_linear_cache(1, x)
    cache.update(x, x, 2)
    assert cache.layers[1].update_index(x) is x
    assert hooks.state_writes == {"convolution": 1, "recurrence": 2, "indexer": 2, "attention": 1}
    assert cache.get_conv_state(0, state_idx=1) is None and cache.get_recurrent_state(0) is None
    assert not cache.has_previous_state(0) and not cache.is_recording_past(0) and cache.get_seq_length() == 0
