"""Content quality: scorers that measure it and fitted curves that predict it.

A scorer compares pictures with prompts and returns cosines. A quality model predicts the mean score of a
picture whose first k of T denoising steps ran with a public prompt of cosine similarity phi to the personal
prompt. `semct.quality_fit` fits one to measurements.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from msgspec import Meta
from scipy.special import expit
from torch import nn
from torch.nn import functional

from semct.prompts import SentenceEncoder, load_sentence_encoder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

EMBEDDED = "embedded"
"""The name of the scorer that comes with the embedded model."""

CLIP = "openai/clip-vit-large-patch14-336"
"""The scorer of the published SD3 Medium measurements."""

_GOOD_AND_BAD = ("Good photo.", "Bad photo.")
"""The antonyms of CLIP-IQA."""

_ASSETS = Path(__file__).parent / "assets"


class ScorerError(RuntimeError):
    """A scorer cannot be loaded, or was given pictures and prompts that do not belong together."""


class QualityModelError(ValueError):
    """A quality model cannot be loaded or makes no sense."""


class Scorer(Protocol):
    """Measures how well pictures show what prompts ask for."""

    def score(self, pictures: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Score each picture against its prompt.

        Args:
            pictures: RGB pictures, uint8 (n, height, width, 3).
            prompts: n prompts.

        Returns:
            Cosine similarities, float32 (n,), higher is better.

        Raises:
            ScorerError: The number or form of pictures does not fit the prompts.
        """
        ...


class ScorerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `scorer.json` says beside the weights of an embedded scorer."""

    encoder: str
    channels: tuple[int, ...]
    width: int
    picture_size: int


class ScorerNetwork(nn.Module):
    """Two towers into one space: a convolutional one for pictures, a perceptron on sentence vectors.

    Args:
        config: The sizes.
    """

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((3, *config.channels)):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.GroupNorm(8, after),
                nn.GELU(),
                nn.Conv2d(after, after, 3, padding=1),
                nn.GroupNorm(8, after),
                nn.GELU(),
            ]
        side = config.picture_size >> len(config.channels)
        layers += [nn.Flatten(), nn.Linear(config.channels[-1] * side * side, config.width)]
        self.picture_tower = nn.Sequential(*layers)
        self.prompt_tower = nn.Sequential(nn.Linear(384, 256), nn.GELU(), nn.Linear(256, config.width))
        self.log_temperature = nn.Parameter(torch.tensor(2.5))

    def embed_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return unit vectors of pictures in -1..1, float32 (n, 3, size, size)."""
        return functional.normalize(self.picture_tower(pictures), dim=-1)

    def embed_prompts(self, sentences: torch.Tensor) -> torch.Tensor:
        """Return unit vectors of unit sentence vectors, float32 (n, 384)."""
        return functional.normalize(self.prompt_tower(sentences), dim=-1)


class EmbeddedScorer:
    """The scorer of the embedded model's domain.

    Args:
        network: Its trained network.
        config: The network's sizes.
        encoder: The sentence encoder that the network was trained with.
    """

    def __init__(self, network: ScorerNetwork, config: ScorerConfig, encoder: SentenceEncoder) -> None:
        self._network = network.eval()
        self._config = config
        self._encoder = encoder

    def score(self, pictures: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """See `Scorer.score`. Pictures of another size are scaled to the network's."""
        seen, asked = self.vectors(pictures, prompts)
        return np.asarray((seen * asked).sum(axis=1), np.float32)

    def vectors(
        self, pictures: NDArray[np.uint8], prompts: Sequence[str]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the unit vectors of pictures and of prompts, float32 (n, width) each."""
        _check_pairs(pictures, prompts)
        if not prompts:
            empty = np.empty((0, self._config.width), np.float32)
            return empty, empty
        size = self._config.picture_size
        with torch.inference_mode():
            tensor = torch.from_numpy(np.ascontiguousarray(pictures)).movedim(-1, 1).float() / 127.5 - 1
            if tensor.shape[-2:] != (size, size):
                tensor = functional.interpolate(tensor, (size, size), mode="area")
            sentences = torch.from_numpy(self._encoder.embed(prompts))
            seen = torch.cat([self._network.embed_pictures(part) for part in torch.split(tensor, 256)])
            asked = self._network.embed_prompts(sentences)
        return seen.numpy(), asked.numpy()


class Assessment(NamedTuple):
    """Subjective and objective quality of n pictures, float32 (n,) each: cosines, and fidelities in 0..1."""

    score: NDArray[np.float32]
    fidelity: NDArray[np.float32]


class ClipScorer:
    """CLIP's cosine of picture and prompt, and CLIP-IQA beside it.

    Args:
        model: A Hugging Face id or a local folder of a CLIP model with its processor.
        device: Where the model runs.

    Raises:
        ScorerError: There is no such model, or it cannot be loaded.
    """

    def __init__(self, model: str | Path = CLIP, *, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor  # noqa: PLC0415 (slow import)

        try:
            self._processor = CLIPProcessor.from_pretrained(model)
            network = CLIPModel.from_pretrained(model, dtype=torch.float32)
        except (OSError, ValueError) as error:
            msg = f"There is no CLIP model {str(model)!r}; give 'embedded', a folder or a Hugging Face id."
            raise ScorerError(msg) from error
        self._network = network.to(device).eval()  # type: ignore[arg-type]  # (decorated in transformers)
        self._longest: int = network.text_model.config.max_position_embeddings

    def score(self, pictures: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
        """See `Scorer.score`. Prompts are cut at the model's longest, 77 tokens."""
        return self.assess(pictures, prompts).score

    def assess(self, pictures: NDArray[np.uint8], prompts: Sequence[str]) -> Assessment:
        """Score pictures against their prompts, and by themselves, from one pass of the model.

        The fidelity is CLIP-IQA (Wang et al., AAAI 2023), a measure without reference: how much likelier the model
        finds "Good photo." than "Bad photo.". It makes sense on pictures like those that CLIP has seen: photographs
        and paintings of a few hundred pixels, not drawings of 64.

        Raises:
            ScorerError: The number or form of pictures does not fit the prompts.
        """
        _check_pairs(pictures, prompts)
        scores, fidelities = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
        for rows in _slices(len(prompts), 32):
            inputs = self._processor(
                text=[*prompts[rows], *_GOOD_AND_BAD],
                images=list(pictures[rows]),
                padding=True,
                truncation=True,
                max_length=self._longest,
                return_tensors="pt",
            ).to(self._network.device)
            with torch.inference_mode():
                outputs = self._network(**inputs)
            cosines = functional.cosine_similarity(outputs.image_embeds, outputs.text_embeds[:-2])
            scores.append(cosines.cpu().numpy())
            fidelities.append(outputs.logits_per_image[:, -2:].softmax(dim=1)[:, 0].cpu().numpy())
        return Assessment(np.concatenate(scores), np.concatenate(fidelities))


def load_scorer(name: str = EMBEDDED, *, device: str = "cpu") -> Scorer:
    """Return a scorer: "embedded", a folder (of either sort), or the Hugging Face id of a CLIP model.

    Raises:
        ScorerError: There is no such scorer.
    """
    folder = _ASSETS / "scorer" if name == EMBEDDED else Path(name)
    if name == EMBEDDED or (folder / "scorer.json").exists():
        return _load_embedded(folder)
    return ClipScorer(name, device=device)


def _load_embedded(folder: Path) -> EmbeddedScorer:
    from safetensors.torch import load_file  # noqa: PLC0415 (needed here only)

    try:
        config = msgspec.json.decode((folder / "scorer.json").read_bytes(), type=ScorerConfig)
        network = ScorerNetwork(config)
        weights = load_file(folder / "model.safetensors")
        network.load_state_dict({name: value.float() for name, value in weights.items()})
    except (OSError, msgspec.MsgspecError, RuntimeError) as error:
        msg = f"The scorer in {folder} cannot be read: {error}"
        raise ScorerError(msg) from error
    return EmbeddedScorer(network, config, load_sentence_encoder(config.encoder))


def _check_pairs(pictures: NDArray[np.uint8], prompts: Sequence[str]) -> None:
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        msg = f"Pictures must be uint8 (n, height, width, 3), not {pictures.dtype} {pictures.shape}."
        raise ScorerError(msg)
    if len(pictures) != len(prompts):
        msg = f"{len(pictures)} pictures cannot be scored against {len(prompts)} prompts."
        raise ScorerError(msg)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


class Coefficients(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The family's coefficients; u = 1 - phi is how far the public prompt is from the personal one.

    What sharing all T steps costs is drop(u) = fall u^power (1 + bend) / (1 + bend u^power): nothing at u = 0,
    `fall` at u = 1, and the larger `bend`, the sooner it levels off. When in the T steps it is lost is a logistic
    of k with its midpoint at step `middle + middle_slope phi` and the steepness `exp(steepness + steepness_slope
    phi)`, scaled to 0 at k = 0 and 1 at k = T, to the power of `onset`: below 1, some of it is lost in the first steps.

    The public prompt may be the mean of several. Then phi is the mean cosine to them, and `own` is the part of the
    personal prompt in that mean, which makes phi larger than what the picture owes to it: `own_discount` of it does not
    count. What is lost is lost `own_delay` steps later. Both are for means that hold the personal prompt (own > 0);
    another mean is as good as a sentence of the same phi.
    """

    ceiling: float
    fall: Annotated[float, Meta(ge=0)]
    power: Annotated[float, Meta(gt=0)]
    bend: Annotated[float, Meta(ge=0)]
    middle: float
    middle_slope: float
    steepness: float
    steepness_slope: float
    onset: Annotated[float, Meta(gt=0)] = 1.0
    own_discount: Annotated[float, Meta(ge=0)] = 0.0
    own_delay: Annotated[float, Meta(ge=0)] = 0.0

    def losses(
        self, phi: NDArray[np.float64], shared: NDArray[np.float64], steps: int, own: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """How much of the score is lost after so many of `steps` shared steps; arrays broadcast."""
        others = np.divide(1 - phi, 1 - own, out=np.zeros(np.broadcast_shapes(phi.shape, own.shape)), where=own < 1)
        phi = phi - self.own_discount * own * others  # `others` is how far the rest of the mean is
        far = np.maximum(1 - phi, 0) ** self.power
        drop = self.fall * (1 + self.bend) * far / (1 + self.bend * far)
        middle = self.middle + self.middle_slope * phi + self.own_delay * (own > 0)
        steepness = np.exp(self.steepness + self.steepness_slope * phi)
        first, last = expit(-steepness * middle), expit(steepness * (steps - middle))
        part = (expit(steepness * (shared - middle)) - first) / (last - first)
        return np.asarray(drop * np.maximum(part, 0) ** self.onset)


class Errors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Root mean square errors on single scores, noise of the pictures included.

    `fitted` is on the pairs of the fit. All others are on *unseen* pairs, neither of whose prompts took part in it
    (None where there were too few prompts): `unseen` of the model; `interpolated` of sigmoids fitted to bands of
    similarity and interpolated between them, the paper's way; `mean` of the mean score at each k, whatever the
    similarity. The last three are on unseen pairs between the first and the last measured k: `inner` of the model,
    which knows texts only; `ceiling_known` where one picture of the personal prompt alone has been scored before;
    `ends_known` where one of the public prompt alone has been scored against the personal prompt as well. `means` is on
    means of prompts as public ones, predicted from means of other personal prompts, and `means_as_sentences` what it
    would be if they counted as sentences (both None where none were measured).
    """

    fitted: float
    unseen: float | None = None
    interpolated: float | None = None
    mean: float | None = None
    inner: float | None = None
    ceiling_known: float | None = None
    ends_known: float | None = None
    means: float | None = None
    means_as_sentences: float | None = None


class QualityModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Predicts content quality from similarity phi and shared steps k: Q(phi, k) = ceiling - drop(phi) lost(phi, k).

    A file without the coefficients `onset`, `own_discount` and `own_delay` is one whose family did not know them.
    `model` is the diffusion model, `scorer` and `steps` (T) what it was measured with, `source` where that was,
    `pairs` the number of (public, personal) pairs, `measurements` that of single scores.
    """

    version: Literal[2] = 2
    model: str
    scorer: str
    steps: Annotated[int, Meta(ge=1)]
    source: str
    pairs: int
    measurements: int
    errors: Errors
    coefficients: Coefficients

    def quality(self, phi: ArrayLike, shared: ArrayLike, own: ArrayLike = 0.0) -> NDArray[np.float64]:
        """Return the predicted mean score after `shared` of `steps` steps with a public prompt.

        Args:
            phi: Cosine similarity of public and personal prompt, or mean cosine to the prompts whose mean the public
                one is; above 1 counts as 1.
            shared: Shared steps in 0..T, of any real value; it broadcasts with `phi`.
            own: The part of the personal prompt in that mean, 0..1 (`routes.part`); 0 for one in words, or without it.
        """
        values = (np.asarray(given, np.float64) for given in (phi, shared, own))
        return self.coefficients.ceiling - self._losses(*values)

    def quality_of_segments(self, phi: ArrayLike, stops: ArrayLike, own: ArrayLike = 0.0) -> NDArray[np.float64]:
        """Return the predicted mean score of routes with several shared segments before the personal one.

        Each segment costs what its own curve loses between its first step and its last, so one segment gives
        `quality(phi, stop)`, and a segment cut in two gives the same as a whole one.

        Args:
            phi: Similarity of each segment's prompt and the personal prompt, (..., segments).
            stops: The step at which each segment ends and the next begins, not falling along the last axis,
                (..., segments); it broadcasts with `phi`. The first segment begins at step 0; equal
                neighbours make an empty segment, which costs nothing whatever its phi.
            own: The part of the personal prompt in each segment's mean, as in `quality`; it broadcasts with `phi`.

        Returns:
            The scores, (...).
        """
        values = (np.asarray(given, np.float64) for given in (phi, stops, own))
        at, ends, parts = np.broadcast_arrays(*values)
        starts = np.concatenate([np.zeros_like(ends[..., :1]), ends[..., :-1]], axis=-1)
        losses = self._losses(at, ends, parts) - self._losses(at, starts, parts)
        return self.coefficients.ceiling - np.asarray(losses.sum(axis=-1))

    def _losses(
        self, phi: NDArray[np.float64], shared: NDArray[np.float64], own: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        return self.coefficients.losses(phi, shared, self.steps, own)


def load_quality_model(name_or_path: str | Path) -> QualityModel:
    """Return a shipped quality model by its name ("sd3-medium", "embedded") or one from a JSON file.

    Raises:
        QualityModelError: There is no such model, or the file is not one.
    """
    shipped = {path.stem: path for path in sorted((_ASSETS / "quality").glob("*.json"))}
    path = shipped.get(str(name_or_path), Path(name_or_path))
    try:
        return msgspec.json.decode(path.read_bytes(), type=QualityModel)
    except OSError as error:
        names = ", ".join(shipped)
        msg = f"There is no quality model {str(name_or_path)!r}; there are {names}, or give a file."
        raise QualityModelError(msg) from error
    except msgspec.MsgspecError as error:
        msg = f"{path} is not a quality model: {error}"
        raise QualityModelError(msg) from error
