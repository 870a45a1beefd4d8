"""Latents on the wire: what goes in comes out, and what does not fit is refused."""

from typing import Literal

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from broker.messages import Latent
from node.latents import MisshapenLatent, pack, unpack

Kind = Literal["float16", "bfloat16", "float32"]
kinds = st.sampled_from(["float16", "bfloat16", "float32"])
tensors = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5),
    elements=st.floats(-60000, 60000, width=32),
).map(torch.from_numpy)


@given(tensors, kinds, st.integers(0, 2000))
def test_a_latent_comes_out_as_its_type_keeps_it(tensor: torch.Tensor, kind: Kind, least: int) -> None:
    packed = pack(tensor, kind, least_bytes=least)
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(packed), type=Latent)
    found = unpack(sent, tuple(tensor.shape))
    assert found.dtype == torch.float32
    assert torch.equal(found, tensor.to(getattr(torch, kind)).float())


@given(tensors, kinds, st.integers(0, 2000))
def test_padding_fills_up_to_the_emulated_size(tensor: torch.Tensor, kind: Kind, least: int) -> None:
    packed = pack(tensor, kind, least_bytes=least)
    size = tensor.numel() * (4 if kind == "float32" else 2)
    assert len(packed.data) == size
    assert len(packed.data) + len(packed.padding) == max(size, least)
    assert not any(packed.padding)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_a_transposed_tensor_is_packed_in_order(kind: Kind) -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3).T
    assert torch.equal(unpack(pack(tensor, kind), (3, 2)), tensor)


def test_what_comes_out_does_not_hold_on_to_the_payload() -> None:
    payload = bytearray(msgspec.msgpack.encode(pack(torch.ones(4), "float32")))
    found = unpack(msgspec.msgpack.decode(payload, type=Latent), (4,))
    found += 1  # is writable
    payload[:] = bytes(len(payload))
    assert torch.equal(found, torch.full((4,), 2.0))


@given(tensors, kinds, hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5))
def test_another_shape_than_the_models_is_refused(tensor: torch.Tensor, kind: Kind, shape: tuple[int, ...]) -> None:
    if shape == tuple(tensor.shape):
        shape = (*shape, 1)
    with pytest.raises(MisshapenLatent, match="the model works on"):
        unpack(pack(tensor, kind), shape)


@given(kinds, st.integers(0, 64).filter(lambda n: n not in {16, 32}))
def test_bytes_that_do_not_fit_the_shape_never_become_a_latent(kind: str, size: int) -> None:
    with pytest.raises((ValueError, msgspec.ValidationError), match="bytes"):
        msgspec.convert({"dtype": kind, "shape": (2, 4), "data": memoryview(bytes(size))}, Latent)
