"""Public prompts say what members share, are the same for the same seed, and survive a bad language model."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semct import public_prompt
from semct.language_model import TransformersModel, prepare
from semct.prompts import SentenceEncoder, load_sentence_encoder
from semct.public_prompt import (
    LanguageModelWriter,
    MeanWriter,
    MedoidWriter,
    PublicPrompt,
    RandomMemberWriter,
    Writer,
    _draw,
    embed_prompts,
    leaks,
    shared_wording,
)

SNOW = ["a penguin in the snow", "a dog in the snow", "a panda in the snow"]
NIGHT = ["a bus at night", "a red car at night", "a tractor at night"]
UNUSED: Any = None  # where no language model is asked
CATS = ["a cat in the snow", "a picture of a cat in the snow", "a big cat in the snow", "a kitten in the snow"]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return load_sentence_encoder()


@pytest.fixture(scope="module")
def smollm2(encoder: SentenceEncoder) -> LanguageModelWriter:
    return LanguageModelWriter.load("smollm2", encoder)


def writer_with(network: Any, encoder: SentenceEncoder) -> LanguageModelWriter:
    """A writer with SmolLM2's tokenizer and another network."""
    from transformers import AutoTokenizer  # noqa: PLC0415 (slow import)

    return LanguageModelWriter(TransformersModel(network, AutoTokenizer.from_pretrained(prepare())), encoder)


def rambling_network() -> Any:
    """A language model with random weights: it writes, but never to the point, and never ends."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 (slow import)

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=49152, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()


def broken_network(*_: object, **__: object) -> Any:
    raise RuntimeError("out of memory\nwith a long trace")


def test_the_language_model_says_what_members_share(smollm2: LanguageModelWriter, encoder: SentenceEncoder) -> None:
    clusters = [SNOW, NIGHT, CATS]
    prompts = smollm2.write(clusters, seed=0)
    for prompt, members in zip(prompts, clusters, strict=True):
        assert prompt.similarity == pytest.approx(float(encoder.similarity([prompt.text], members).mean()), abs=1e-5)
        assert prompt.candidates >= 1
        assert prompt.source != "medoid"
        assert not leaks(prompt.text, members)
    assert "snow" in prompts[0].text
    assert "night" in prompts[1].text
    assert "cat" in prompts[2].text
    assert "llm" in {prompt.source for prompt in prompts}


def test_same_seed_same_prompts(smollm2: LanguageModelWriter) -> None:
    assert smollm2.write([SNOW, NIGHT], seed=3) == smollm2.write([SNOW, NIGHT], seed=3)


ON_A_PROCESSOR_WITHOUT_VECTORS = """
import sys
import msgspec
from semct.prompts import load_sentence_encoder
from semct.public_prompt import LanguageModelWriter
writer = LanguageModelWriter.load("smollm2", load_sentence_encoder())
clusters, seeds = msgspec.json.decode(sys.argv[1])
print(msgspec.json.encode([[p.text for p in writer.write(clusters, seed)] for seed in seeds]).decode())
"""


def test_same_seed_same_words_on_other_processors(smollm2: LanguageModelWriter) -> None:
    clusters, seeds = [SNOW, NIGHT, CATS, ["a dog on a sandy beach", "a cat on a sandy beach"]], [0, 1, 7]
    asked = msgspec.json.encode([clusters, seeds]).decode()
    other = subprocess.run(
        [sys.executable, "-c", ON_A_PROCESSOR_WITHOUT_VECTORS, asked],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
        capture_output=True,
        check=True,
    )
    written = [[prompt.text for prompt in smollm2.write(clusters, seed)] for seed in seeds]
    assert msgspec.json.decode(other.stdout.splitlines()[-1]) == written


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -9.0]).repeat(4000, 1)
    drawn = _draw(logits, torch.arange(4000) < 100, torch.Generator().manual_seed(1))
    assert (drawn[:100] == 0).all()
    found = drawn[100:].bincount(minlength=4) / 3900
    chances = (logits[0, :3] / 0.8).softmax(dim=0)
    assert found[:3].tolist() == pytest.approx(chances.tolist(), abs=0.025)
    assert found[3] == 0  # too unlikely beside the likeliest


def test_clusters_without_a_choice_need_no_language_model(encoder: SentenceEncoder) -> None:
    writer: Writer = LanguageModelWriter(UNUSED, encoder)
    assert writer.write([["a cat"], ["a dog"] * 3], seed=0) == [
        PublicPrompt("a cat", "member", pytest.approx(1, abs=1e-5), 1),
        PublicPrompt("a dog", "member", pytest.approx(1, abs=1e-5), 1),
    ]
    assert writer.write([], seed=0) == []


def test_a_rambling_language_model_leaves_the_medoid(encoder: SentenceEncoder) -> None:
    members = ["a cat on a windowsill", "a rocket under the stars", "the old harbour of Genoa"]
    prompt = writer_with(rambling_network(), encoder).write([members], seed=0)[0]
    assert prompt == MedoidWriter(encoder).write([members], seed=0)[0].__replace__(candidates=1)


def test_a_failing_language_model_is_logged_and_done_without(
    encoder: SentenceEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    writer = writer_with(rambling_network(), encoder)
    writer._model.read = broken_network  # type: ignore[method-assign]
    prompts = writer.write([SNOW, CATS], seed=0)
    assert {prompt.source for prompt in prompts} <= {"medoid", "extract"}
    assert all(prompt.credit.endswith("; the language model failed") for prompt in prompts)
    assert "The language model failed (out of memory); clusters do without it." in caplog.text


def test_a_language_model_that_takes_too_long_is_done_without(
    encoder: SentenceEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    writer = writer_with(rambling_network(), encoder)
    writer._patience = 0.0
    members = ["a cat on a windowsill", "a rocket under the stars", "the old harbour of Genoa"]
    prompt = writer.write([members], seed=0)[0]
    assert prompt.text == MedoidWriter(encoder).write([members], seed=0)[0].text
    assert prompt.credit == "medoid; the language model took too long"
    assert "The language model took over 0 s" in caplog.text


def test_a_candidate_worse_than_the_medoid_loses(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LanguageModelWriter(UNUSED, encoder)
    monkeypatch.setattr(writer, "_complete", lambda *_: [["a spreadsheet of tax returns", "a panda in the snow", ""]])
    prompt = writer.write([SNOW], seed=0)[0]
    assert (prompt.source, prompt.text) == ("medoid", MedoidWriter(encoder).write([SNOW], seed=0)[0].text)


def test_a_ramble_is_no_candidate(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LanguageModelWriter(UNUSED, encoder)
    ramble = "an animal in the snow, an animal in the snow, an animal in the snow"
    monkeypatch.setattr(writer, "_complete", lambda *_: [[ramble, "an animal in the snow"]])
    assert writer.write([SNOW], seed=0)[0].text == "an animal in the snow"


def test_words_of_one_member_are_barred(smollm2: LanguageModelWriter) -> None:
    barred = {smollm2._model.decode([token]).strip() for token in smollm2._barred(SNOW)}
    assert "dog" in barred
    assert not barred & {"snow", "a", "in", "the", "animal"}


@pytest.mark.parametrize(
    ("text", "leaking"),
    [
        ("an animal in the snow", False),
        ("a dog in the snow", True),
        ("dogs and other animals", True),
        ("snow", False),
        ("", False),
    ],
)
def test_leaks(text: str, leaking: bool) -> None:
    assert leaks(text, SNOW) is leaking


def test_shared_wording() -> None:
    assert shared_wording(SNOW) == ["in the snow"]
    assert shared_wording(["a red car by the sea", "at night, a red car"]) == ["a red car"]
    assert shared_wording(["a red car by the sea", "a red car at night by the sea"])[-1] == "a red car by the sea"
    assert shared_wording(["a cat", "the moon"]) == []


@settings(max_examples=50)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_shared_wording_never_leaks(members: list[str]) -> None:
    assert not any(leaks(text, members) for text in shared_wording(members))


@pytest.mark.parametrize("kind", [RandomMemberWriter, MedoidWriter])
def test_members_prompts(kind: type[RandomMemberWriter | MedoidWriter], encoder: SentenceEncoder) -> None:
    writer: Writer = kind(encoder)
    clusters: Sequence[Sequence[str]] = [SNOW, CATS, ["a tent"]]
    prompts = writer.write(clusters, seed=5)
    assert prompts == writer.write(clusters, seed=5)
    for prompt, members in zip(prompts, clusters, strict=True):
        assert prompt.text in members
        assert prompt.similarity == pytest.approx(float(encoder.similarity([prompt.text], members).mean()), abs=1e-5)


def test_every_member_may_be_drawn(encoder: SentenceEncoder) -> None:
    writer = RandomMemberWriter(encoder)
    assert {writer.write([SNOW], seed)[0].text for seed in range(12)} == set(SNOW)


def test_a_mean_has_no_words_and_the_mean_similarity_of_its_members(encoder: SentenceEncoder) -> None:
    clusters: list[list[str]] = [SNOW, CATS, ["a tent", "a tent"]]
    means = MeanWriter(encoder).write(clusters, seed=0)
    assert [m.text for m in means] == [tuple(sorted(SNOW)), tuple(sorted(CATS)), "a tent"]
    assert [m.source for m in means] == ["mean", "mean", "member"]
    for mean, members in zip(means, clusters, strict=True):
        assert mean.similarity == pytest.approx(float(encoder.similarity(members, members).mean()), abs=1e-5)
    assert len(embed_prompts(encoder, [])) == 0


def test_a_prompt_below_its_medoid_says_so(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LanguageModelWriter(UNUSED, encoder)
    vague = "some animal in a snowy place"
    monkeypatch.setattr(writer, "_complete", lambda *_: [[vague]])
    monkeypatch.setattr(public_prompt, "shared_wording", lambda _: [])
    found = writer.write([SNOW], seed=0)[0]
    medoid = MedoidWriter(encoder).write([SNOW], seed=0)[0]
    assert found.text == vague
    assert found.similarity < medoid.similarity
    assert (found.credit, medoid.credit) == ("llm, below its medoid", "medoid")


def test_the_medoid_is_at_least_as_similar_as_any_member(encoder: SentenceEncoder) -> None:
    best = MedoidWriter(encoder).write([CATS], seed=0)[0]
    assert all(RandomMemberWriter(encoder).write([CATS], s)[0].similarity <= best.similarity for s in range(8))
