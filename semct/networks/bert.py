"""BERT (arXiv 1810.04805), as transformers' BertModel computes it, without its pooler."""

from __future__ import annotations

from typing import Literal

import msgspec
from torch import Tensor
from torch.nn import functional

from semct.networks.weights import Weights


class BertConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``config.json`` of an encoder, as far as the weights do not tell it."""

    model_type: Literal["bert"]
    hidden_act: Literal["gelu"]
    num_attention_heads: int
    num_hidden_layers: int
    layer_norm_eps: float


class Bert:
    """The last states (n, length, width) of token ids (n, length); a mask (n, length) tells tokens from padding."""

    def __init__(self, weights: Weights, config: BertConfig) -> None:
        self._weights = weights
        self._config = config
        self._layers = [weights.below(f"encoder.layer.{i}.") for i in range(config.num_hidden_layers)]

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        weights = self._weights
        x = functional.embedding(ids, weights["embeddings.word_embeddings.weight"])
        x = x + weights["embeddings.token_type_embeddings.weight"][0]
        x = x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self._normed(weights, "embeddings.LayerNorm", x)
        # Without padding there is nothing to mask, and attention has a faster kernel.
        seen = None if mask.all() else mask[:, None, None, :].bool()
        for layer in self._layers:
            x = self._layer(layer, x, seen)
        return x

    def _layer(self, layer: Weights, x: Tensor, seen: Tensor | None) -> Tensor:
        heads = self._config.num_attention_heads
        query, key, value = (
            layer.linear(f"attention.self.{part}", x).view(*x.shape[:2], heads, -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        taken = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2)
        x = self._normed(layer, "attention.output.LayerNorm", layer.linear("attention.output.dense", taken) + x)
        inner = functional.gelu(layer.linear("intermediate.dense", x))
        return self._normed(layer, "output.LayerNorm", layer.linear("output.dense", inner) + x)

    def _normed(self, weights: Weights, norm: str, x: Tensor) -> Tensor:
        return weights.layer_norm(norm, x, eps=self._config.layer_norm_eps)
