"""Embeddings are unit vectors that depend on nothing but their own prompt."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semct.prompts import EncoderNotFound, SentenceEncoder, load_sentence_encoder

PROMPTS = ["a cat", "", "a colourful illustration of a dog on a sandy beach, on the left side", "snow " * 400]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return load_sentence_encoder()


def test_embeddings_are_unit_vectors(encoder: SentenceEncoder) -> None:
    vectors = encoder.embed(PROMPTS)
    assert vectors.shape == (4, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.permutations(PROMPTS[:3]))
def test_an_embedding_does_not_depend_on_its_company(encoder: SentenceEncoder, order: list[str]) -> None:
    together = encoder.embed(order)
    states, pooled = encoder.tokens(order, 16)
    for i, prompt in enumerate(order):
        assert np.array_equal(together[i], encoder.embed([prompt])[0])
        alone_states, alone_pooled = encoder.tokens([prompt], 16)
        assert torch.equal(states[i], alone_states[0])
        assert torch.equal(pooled[i], alone_pooled[0])


def test_token_states_are_padded_with_zeros_and_cut(encoder: SentenceEncoder) -> None:
    states, pooled = encoder.tokens(["a cat", "snow " * 40], 16)
    assert states.shape == (2, 16, 384)
    assert torch.all(states[0, 4:] == 0)  # [CLS] a cat [SEP]
    assert torch.all(states[0, :4].norm(dim=-1) > 0)
    assert torch.all(states[1].norm(dim=-1) > 0)
    np.testing.assert_array_equal(pooled.numpy(), encoder.embed(["a cat", "snow " * 40]))


def test_batches_agree_with_single_prompts_closely(encoder: SentenceEncoder) -> None:
    one, many = encoder.tokens(PROMPTS[:3], 16), encoder.tokens(PROMPTS[:3], 16, batch=3)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_similarity_orders_prompts_by_meaning(encoder: SentenceEncoder) -> None:
    likeness = encoder.similarity(
        ["a kitten at the beach"], ["a cat by the sea", "a dog on the beach", "a bus at night"]
    )
    assert likeness.shape == (1, 3)
    assert likeness[0, 0] > likeness[0, 1] > likeness[0, 2]


def test_no_prompts_give_no_rows(encoder: SentenceEncoder) -> None:
    states, pooled = encoder.tokens([], 16)
    assert encoder.embed([]).shape == (0, 384)
    assert states.shape == (0, 16, 384)
    assert pooled.shape == (0, 384)


def test_the_encoder_is_loaded_once() -> None:
    assert load_sentence_encoder() is load_sentence_encoder()


def test_a_missing_encoder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EncoderNotFound, match=r"^There is no sentence encoder .*\.$"):
        SentenceEncoder(tmp_path / "nothing")
