"""Llama (arXiv 2302.13971), as transformers' LlamaForCausalLM computes it, for texts that begin alike.

A text is read in spans: first what all texts have in common, then what some have, then what each has alone. Keys and
values of a span are kept, and attended to, once for all texts that have it in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from semct.networks.weights import Weights

_ROWS = 16  # that matrices are laid out for


class Rope(msgspec.Struct, frozen=True, kw_only=True):
    """How positions are told."""

    rope_type: Literal["default"]
    rope_theta: float


class LlamaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``config.json`` of a language model, as far as the weights do not tell it."""

    model_type: Literal["llama"]
    hidden_act: Literal["silu"]
    tie_word_embeddings: Literal[True]
    rope_parameters: Rope
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    rms_norm_eps: float
    eos_token_id: int


class Span(NamedTuple):
    """The next tokens of some texts, as later ones see them: keys and values (texts, heads, length, width) by layer.

    Of each text so many count as its ``lengths`` (texts,) say; behind them is padding.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: Tensor

    def longer_by(self, other: Span) -> Span:
        """This one, which has no padding, and the next tokens of the same texts as one."""
        keys, values = (
            tuple(torch.cat(pair, dim=2) for pair in zip(mine, theirs, strict=True))
            for mine, theirs in ((self.keys, other.keys), (self.values, other.values))
        )
        return Span(keys, values, self.lengths + other.lengths)


class Llama:
    """Reads a span of n texts: the logits (n, vocabulary) of what comes next in each, and the span.

    The n texts, token ids (n, length) of which so many count, go on where the spans ``before`` end. Each of these is of
    n texts, or of fewer: theirs are then gone on with in equally many ways each, those of one text beside each other.

    Its weights, which ``read`` gives by name, are asked for one after the other: most are kept in another layout.
    """

    def __init__(self, read: Callable[[str], Tensor], config: LlamaConfig) -> None:
        self._embeddings = read("model.embed_tokens.weight")
        self._layers = [_Layer(read, f"model.layers.{i}", config) for i in range(config.num_hidden_layers)]
        self._norm = Weights({"norm.weight": read("model.norm.weight")})
        self._head = _matrix(self._embeddings)
        self._eps = config.rms_norm_eps
        width = self._embeddings.shape[1] // config.num_attention_heads
        self._speeds = config.rope_parameters.rope_theta ** -(torch.arange(0, width, 2) / width)

    def __call__(self, ids: Tensor, lengths: Tensor, before: Sequence[Span] = ()) -> tuple[Tensor, Span]:
        begun = torch.zeros_like(lengths)
        masks = []
        for span in before:
            reached = span.lengths.repeat_interleave(len(ids) // len(span.lengths))
            begun = begun + reached
            masks.append(
                (torch.arange(span.keys[0].shape[2]) >= reached[:, None])[:, None].expand(-1, ids.shape[1], -1)
            )
        masks.append(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1).expand(len(ids), -1, -1))
        unseen = torch.cat(masks, dim=-1)[:, None]  # padding, and what comes later in a text
        angles = (begun[:, None] + torch.arange(ids.shape[1]))[:, None, :, None] * self._speeds
        turn = angles.cos().tile(2), angles.sin().tile(2)
        x = functional.embedding(ids, self._embeddings)
        keys, values = [], []
        for number, layer in enumerate(self._layers):
            x, key, value = layer(x, turn, [(span.keys[number], span.values[number]) for span in before], unseen)
            keys.append(key)
            values.append(value)
        last = self._norm.rms_norm("norm", x[torch.arange(len(ids)), lengths - 1], eps=self._eps)
        return self._head(last), Span(tuple(keys), tuple(values), lengths)


class _Layer:
    def __init__(self, read: Callable[[str], Tensor], name: str, config: LlamaConfig) -> None:
        def matrix(block: str, *parts: str) -> Callable[[Tensor], Tensor]:
            return _matrix(*(read(f"{name}.{block}.{part}_proj.weight") for part in parts))

        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        self._norms = Weights({norm: read(f"{name}.{norm}") for norm in norms})
        self._eps = config.rms_norm_eps
        self._heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self._asked = matrix("self_attn", "q", "k", "v")
        self._taken = matrix("self_attn", "o")
        self._inner = matrix("mlp", "gate", "up")
        self._outer = matrix("mlp", "down")

    def __call__(
        self, x: Tensor, turn: tuple[Tensor, Tensor], known: Sequence[tuple[Tensor, Tensor]], unseen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed = self._norms.rms_norm("input_layernorm", x, eps=self._eps)
        asked = self._asked(normed).view(*x.shape[:2], sum(self._heads), -1).transpose(1, 2)
        query, key, value = torch.split(asked, self._heads, dim=1)
        query, key = _turned(query, *turn), _turned(key, *turn)
        x = x + self._taken(_attention(query, [*known, (key, value)], unseen).transpose(1, 2).flatten(2))
        normed = self._norms.rms_norm("post_attention_layernorm", x, eps=self._eps)
        gate, up = self._inner(normed).chunk(2, dim=-1)
        return x + self._outer(functional.silu(gate) * up), key, value


def _matrix(*weights: Tensor) -> Callable[[Tensor], Tensor]:
    """A linear layer of these weights, one below the other.

    For few rows a product waits for the matrix. oneDNN reads its own layout of it at memory's pace, twice as fast as
    others read it row by row; torch has that for its compiler.
    """
    weight = torch.cat(weights)
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return lambda x: functional.linear(x, weight)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, laid_out, None, "none", [], "")


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-right, left), dim=-1) * sine


def _attention(query: Tensor, spans: Sequence[tuple[Tensor, Tensor]], unseen: Tensor) -> Tensor:
    """Attention (texts, heads, length, width) to the keys and values of spans, but for what is ``unseen``."""
    texts, heads, length, width = query.shape

    def by_span(x: Tensor, kept: Tensor) -> Tensor:
        """Rows for each text and head as rows for each text and head of what a span keeps."""
        groups, of_span = kept.shape[:2]
        parts = x.reshape(groups, texts // groups, of_span, heads // of_span * length, -1)
        return parts.transpose(1, 2).flatten(2, 3)

    def by_text(x: Tensor) -> Tensor:
        parts = x.reshape(len(x), -1, texts // len(x), heads // x.shape[1] * length, x.shape[-1])
        return parts.transpose(1, 2).reshape(texts, heads, length, -1)

    query = query * width**-0.5
    scores = torch.cat([by_text(by_span(query, keys) @ keys.transpose(-1, -2)) for keys, _ in spans], dim=-1)
    shares = scores.masked_fill_(unseen, -torch.inf).softmax(dim=-1)
    parts = torch.split(shares, [keys.shape[2] for keys, _ in spans], dim=-1)
    taken = [by_text(by_span(part, values) @ values) for part, (_, values) in zip(parts, spans, strict=True)]
    return torch.stack(taken).sum(dim=0)
