"""Public prompts: what the personal prompts of a cluster have in common, in words.

SemCT lets a small language model write them (the paper, step 1 of the framework); the semantic-free and the
clustering-free framework take a random member's prompt [10-12]; the medoid is the best that a member's prompt
can be.
"""

from __future__ import annotations

import functools
import logging
import re
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import msgspec
import numpy as np
import torch

from semct import language_model
from semct.clustering import EQUAL, first_best, medoid
from semct.language_model import LanguageModel, first_line
from semct.routes import Prompt, blend

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

Vectors: TypeAlias = "NDArray[np.float32]"

Source = Literal["llm", "extract", "medoid", "member", "mean"]
"""Who wrote a public prompt: the language model; nobody, it is the wording that members share; the most
central member; another member; nobody, it has no words and is the mean of the members' conditionings."""

_LONGEST_COMPLETION = 16  # tokens
_ENOUGH = 0.75  # of the completions have ended: those still going on are rambling
_LONGEST_LIST = 12  # prompts that the model reads of one cluster
_LONGEST_PROMPT = 50  # words that it reads of one prompt

_TASK = "Each list of image prompts is followed by the one thing that all of them show."
_EXAMPLES = (
    (
        ("a horse galloping across a field", "portrait of a white horse, soft light", "a brown horse by a river"),
        "a horse",
    ),
    (
        ("a cow in the rain", "a picture of a goose in the rain", "a sheep in the rain, on the left"),
        "a farm animal in the rain",
    ),
    (
        ("an old lighthouse above the cliffs", "a lighthouse on a stormy coast, oil painting", "a lighthouse at dusk"),
        "a lighthouse by the sea",
    ),
    (
        ("a pear on a wooden table", "grapes on a kitchen table", "there is a lemon on a table"),
        "fruit on a table",
    ),
    (("a train by a lake", "a motorbike by a lake"), "a vehicle by a lake"),
)

# English determiners, prepositions, conjunctions, pronouns and auxiliaries: words that carry no wish.
_CLOSED_CLASS = frozenset(
    re.findall(
        r"\w+",
        """a an the this that these those some any each every it its he his she her they their my your our who whose
        of in on at by to with from for into onto over under above below near beside behind between through across
        along around against inside outside up down out off as like and or but while which there
        is are be being was were has have had""",
    )
)

_log = logging.getLogger(__name__)


class PublicPrompt(msgspec.Struct, frozen=True):
    """The prompt of a cluster's shared inference.

    Attributes:
        text: The prompt, or the prompts whose mean it is.
        source: Who wrote it.
        similarity: Mean cosine to the cluster's personal prompts.
        candidates: How many different prompts it was chosen from.
        below_medoid: Whether the most central member's prompt has a higher mean cosine.
        trouble: Why the language model had no say, where it should have had one: it ``failed``, or it was ``late``.
    """

    text: Prompt
    source: Source
    similarity: float
    candidates: int
    below_medoid: bool = False
    trouble: Literal["", "failed", "late"] = ""

    @property
    def credit(self) -> str:
        """The source as the record gives it."""
        below = ", below its medoid" if self.below_medoid else ""
        trouble = {"": "", "failed": "; the language model failed", "late": "; the language model took too long"}
        return f"{self.source}{below}{trouble[self.trouble]}"


class Encoder(Protocol):
    """What a writer needs of a sentence encoder (``semct.prompts.SentenceEncoder`` has it)."""

    def embed(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors of n prompts, (n, d)."""
        ...


class Writer(Protocol):
    """Writes the public prompts of a batch's clusters."""

    def write(self, clusters: Sequence[Sequence[str]], seed: int) -> list[PublicPrompt]:
        """Return one public prompt for each cluster of personal prompts.

        The same seed and clusters give the same public prompts.
        """
        ...


class RandomMemberWriter:
    """Takes the prompt of a random member, as the semantic-free and clustering-free frameworks do [10-12]."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def write(self, clusters: Sequence[Sequence[str]], seed: int) -> list[PublicPrompt]:
        """Return a random member's prompt for each cluster."""
        rng = np.random.default_rng(seed)
        chosen = [int(rng.integers(len(members))) for members in clusters]
        return [
            _of_member(members, self._encoder.embed(members), i, "member")
            for members, i in zip(clusters, chosen, strict=True)
        ]


class MedoidWriter:
    """Takes the prompt of the member that is most similar to all others."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def write(self, clusters: Sequence[Sequence[str]], seed: int) -> list[PublicPrompt]:  # noqa: ARG002
        """Return the medoid's prompt for each cluster; there is no chance in it."""
        return [self._medoid(members) for members in clusters]

    def _medoid(self, members: Sequence[str]) -> PublicPrompt:
        vectors = self._encoder.embed(members)
        return _of_member(members, vectors, medoid(vectors), "medoid")


class MeanWriter:
    """Does without words: the shared steps run on the mean of the members' conditionings."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def write(self, clusters: Sequence[Sequence[str]], seed: int) -> list[PublicPrompt]:  # noqa: ARG002
        """Return the mean of each cluster's prompts; there is no chance in it."""
        return [self._mean(members) for members in clusters]

    def _mean(self, members: Sequence[str]) -> PublicPrompt:
        text = blend(members)
        similarity = (self._encoder.embed(members) @ embed_prompts(self._encoder, [text]).T).mean()
        return PublicPrompt(text, "mean" if isinstance(text, tuple) else "member", float(similarity), 1)


class LanguageModelWriter:
    """Lets a causal language model say what a cluster's prompts have in common.

    The model completes a list of examples (raw text, no chat), for all clusters and samples in one batch.
    Words that stand in the prompt of exactly one member are barred while it writes, so that it must
    generalise and gives no user's wish away. Its completions, the wording that members share and the medoid
    are the candidates; the one with the highest mean cosine to the members wins. A medoid with such words is
    judged by the other members only: that it serves its own user perfectly says nothing of the rest.

    Args:
        model: The language model.
        encoder: Judges the candidates.
        samples: Completions drawn for each cluster beside the greedy one.
        plain: Best-of-n and nothing else: no word is barred, no wish kept secret, and the only candidates are
            the completions (the medoid where there are none).
        patience: Seconds after which a batch does without what the model has not written yet.
    """

    def __init__(
        self,
        model: LanguageModel,
        encoder: Encoder,
        *,
        samples: int = 4,
        plain: bool = False,
        patience: float = 20.0,
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._rows = samples + 1
        self._plain = plain
        self._patience = patience

    @classmethod
    def load(
        cls, model: str | Path, encoder: Encoder, *, device: str = "cpu", plain: bool = False
    ) -> LanguageModelWriter:
        """Load a language model (see ``semct.language_model.load``) and let it read the examples.

        Raises:
            LanguageModelError: There is no usable language model under that name.
        """
        writer = cls(language_model.load(model, device=device), encoder, plain=plain)
        _ = writer._beginning  # read once now rather than in the first batch
        return writer

    def write(self, clusters: Sequence[Sequence[str]], seed: int) -> list[PublicPrompt]:
        """Return a public prompt for each cluster; a cluster with only one wish keeps its wording."""
        vectors = [self._encoder.embed(members) for members in clusters]
        divided = [i for i, members in enumerate(clusters) if len(set(members)) > 1]
        trouble: Literal["", "failed", "late"] = ""
        try:
            completed = self._complete([(clusters[i], vectors[i]) for i in divided], seed)
        except RuntimeError as error:
            _log.warning("The language model failed (%s); clusters do without it.", first_line(error))
            completed, trouble = [[] for _ in divided], "failed"
        except TimeoutError:
            _log.warning("The language model took over %g s; clusters do without it.", self._patience)
            completed, trouble = [[] for _ in divided], "late"
        written = dict(zip(divided, completed, strict=True))
        return [
            msgspec.structs.replace(self._best(members, vectors[i], written[i]), trouble=trouble)
            if i in written
            else _of_member(members, vectors[i], 0, "member")
            for i, members in enumerate(clusters)
        ]

    def _best(self, members: Sequence[str], vectors: Vectors, written: Sequence[str]) -> PublicPrompt:
        longest = max(8, *(len(prompt.split()) for prompt in members))
        sources: dict[str, Source] = {} if self._plain else dict.fromkeys(shared_wording(members), "extract")
        sources.update({text: "llm" for text in written if text and len(text.split()) <= longest})
        if not self._plain:
            sources = {text: source for text, source in sources.items() if not leaks(text, members)}
        central = medoid(vectors)
        if not (self._plain and sources):
            sources.setdefault(members[central], "medoid")

        texts = list(sources)
        cosines = self._encoder.embed(texts) @ vectors.T
        means = cosines.mean(axis=1)
        scores = means.copy()
        if sources[texts[-1]] == "medoid" and leaks(members[central], members):
            others = [prompt != members[central] for prompt in members]
            scores[-1] = cosines[-1, others].mean()
        best = first_best(scores)
        below = bool(means[best] < (vectors @ vectors[central]).mean() - EQUAL)
        return PublicPrompt(texts[best], sources[texts[best]], float(means[best]), len(texts), below)

    @torch.inference_mode()
    def _complete(self, clusters: Sequence[tuple[Sequence[str], Vectors]], seed: int) -> list[list[str]]:
        """Return the completions of each cluster that came to an end, all written in one batch, or ``TimeoutError``."""
        if not clusters:
            return []
        until = time.monotonic() + self._patience
        logits, state = self._model.read([_question(_central(*cluster)) for cluster in clusters], self._beginning)
        logits = logits.repeat_interleave(self._rows, dim=0)
        barred = torch.zeros_like(logits, dtype=torch.bool)
        for i, (members, _) in enumerate(clusters if not self._plain else ()):
            barred[i * self._rows : (i + 1) * self._rows, self._barred(members)] = True
        greedy = torch.arange(len(logits)) % self._rows == 0
        generator = torch.Generator().manual_seed(seed)
        written: list[list[int]] = [[] for _ in logits]
        texts: dict[int, str] = {}
        for _ in range(_LONGEST_COMPLETION):
            drawn = _draw(logits.masked_fill(barred, -torch.inf), greedy, generator)
            for i, token in enumerate(drawn.tolist()):
                if i not in texts and ("\n" in self._model.decode([token]) or token in self._model.ends):
                    texts[i] = self._model.decode(written[i]).strip(' ."')
                written[i].append(token)
            if len(texts) >= _ENOUGH * len(written):
                break
            if time.monotonic() > until:
                raise TimeoutError
            logits, state = self._model.go_on(drawn, state)
        return [
            [texts[i] for i in range(first, first + self._rows) if i in texts]
            for first in range(0, len(written), self._rows)
        ]

    @functools.cached_property
    def _beginning(self) -> Any:
        """The model's state behind the examples."""
        return self._model.begin(_TASK + "".join(_question(prompts) + f" {answer}" for prompts, answer in _EXAMPLES))

    def _barred(self, members: Sequence[str]) -> list[int]:
        """Return the tokens with which a word begins that stands in exactly one member's prompt."""
        spellings: dict[str, set[str]] = defaultdict(set)
        for prompt in members:
            for word in _words(prompt):
                spellings[_stem(word)] |= {word, _stem(word), _stem(word) + "s"}
        single = _of_one(members)
        begins: dict[bool, set[int]] = {True: set(), False: set()}
        for stem, words in spellings.items():
            for word in words | {word.capitalize() for word in words}:
                token = self._model.encode(f" {word}")[0]
                # A single letter begins too many other words.
                if len(self._model.decode([token]).strip()) >= min(3, len(word)):
                    begins[stem in single].add(token)
        return sorted(begins[True] - begins[False])


def embed_prompts(encoder: Encoder, prompts: Sequence[Prompt]) -> Vectors:
    """Return the vectors of prompts, float32 (n, d): at unit length, but for a blend the mean of its prompts'.

    So the similarity to a blend is the mean cosine to its prompts. At unit length it would be the cosine to their
    centroid, which overrates a blend: pictures come out as with a sentence of the lower figure.
    """
    words = [[p] if isinstance(p, str) else list(p) for p in prompts]
    return np.stack([encoder.embed(w).mean(axis=0) for w in words]) if words else encoder.embed([])


def shared_wording(members: Sequence[str]) -> list[str]:
    """Return phrases that members share word for word, the most telling first, each with those before it.

    A phrase stands in at least two members and, but for the first, in half of them. What counts is members
    times content words.
    """
    places: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for prompt in members:
        words = _words(prompt)
        spans = [(i, j) for i in range(len(words)) for j in range(i + 1, min(i + 8, len(words)) + 1)]
        for phrase, start in {tuple(words[i:j]): i / len(words) for i, j in reversed(spans)}.items():
            if phrase[-1] not in _CLOSED_CLASS:
                places[phrase].append(start)

    def weight(phrase: tuple[str, ...]) -> tuple[int, int, tuple[str, ...]]:
        return len(places[phrase]) * len(_content(phrase)), len(phrase), phrase

    chosen: list[tuple[str, ...]] = []
    texts = []
    for phrase in sorted((p for p in places if len(places[p]) > 1), key=weight, reverse=True):
        rare = len(places[phrase]) < len(members) / 2
        if len(chosen) == 3 or (chosen and rare):
            break
        if not any(_content(phrase) & _content(other) for other in chosen):
            chosen.append(phrase)
            in_order = sorted(chosen, key=lambda p: (float(np.mean(places[p])), p))
            texts.append(" ".join(word for p in in_order for word in p))
    return texts


def leaks(text: str, members: Sequence[str]) -> bool:
    """Tell whether a content word of the text stands in exactly one member's prompt: it gives a wish away."""
    return bool(_content(_words(text)) & _of_one(members))


def _draw(logits: torch.Tensor, greedy: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a token for each row (temperature 0.8, top 40, nucleus 0.95, min-p 0.05) or take the likeliest."""
    top = (logits / 0.8).topk(min(40, logits.shape[1]))
    chances = top.values.double().softmax(dim=-1)
    kept = (chances.cumsum(dim=-1) - chances < 0.95) & (chances >= 0.05 * chances[:, :1])
    # torch.multinomial draws other tokens on other processors.
    reached = (chances * kept).cumsum(dim=-1)
    point = reached[:, -1:] * torch.rand(len(reached), 1, generator=generator, dtype=torch.float64)
    choice = torch.searchsorted(reached, point, right=True)[:, 0]
    return top.indices.gather(1, choice.masked_fill(greedy, 0)[:, None])[:, 0]


def _question(prompts: Iterable[str]) -> str:
    return "\n\nPrompts:\n" + "".join(f"- {prompt}\n" for prompt in prompts) + "All of them show:"


def _central(members: Sequence[str], vectors: Vectors) -> list[str]:
    """Return the members nearest to the mean, as many as the model reads, in their order."""
    nearest = np.argsort(-(vectors @ vectors.sum(axis=0)), kind="stable")[:_LONGEST_LIST]
    return [" ".join(members[i].split()[:_LONGEST_PROMPT]) for i in sorted(nearest)]


def _of_member(members: Sequence[str], vectors: Vectors, index: int, source: Source) -> PublicPrompt:
    similarity = float((vectors @ vectors[index]).mean())
    return PublicPrompt(members[index], source, similarity, len(set(members)))


def _of_one(members: Sequence[str]) -> set[str]:
    """Return the content words that stand in exactly one member's prompt."""
    holders = Counter(word for prompt in members for word in _content(_words(prompt)))
    return {word for word, count in holders.items() if count == 1}


def _content(words: Iterable[str]) -> set[str]:
    return {_stem(word) for word in words if word not in _CLOSED_CLASS}


def _words(prompt: str) -> list[str]:
    return re.findall(r"\w+(?:[-'’]\w+)*", prompt.lower())  # noqa: RUF001


def _stem(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
