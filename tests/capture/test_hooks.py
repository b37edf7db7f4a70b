"""Hooks: Hugging Face's mask functions read as facts, unknown ones refused, registries put back."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from autodeploy.capture.hooks import INTERFACE_NAME, Hooks, mask_facts
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


def test_registries_and_model_are_put_back() -> None:
    model = tiny.TINY["llama"]()
    with Hooks().installed(model):
        assert INTERFACE_NAME in AttentionInterface._global_mapping
        assert model.config._attn_implementation == INTERFACE_NAME
    assert INTERFACE_NAME not in AttentionInterface._global_mapping
    assert model.config._attn_implementation != INTERFACE_NAME


def test_a_fact_no_op_expresses_is_refused_by_name() -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(CaptureError, match="'position_bias'"):
        Hooks().attention(torch.nn.Identity(), q, q, q, None, position_bias=torch.zeros(1))
