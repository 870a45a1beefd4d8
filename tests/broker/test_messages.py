import math
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect

from broker.messages import (
    MAX_PAYLOAD,
    AnyMessage,
    Ask,
    Latent,
    MalformedMessage,
    Picture,
    Work,
    decode,
    encode,
)

types = get_args(AnyMessage)


def values(kind: Any) -> st.SearchStrategy[Any]:  # noqa: PLR0911, PLR0912
    """A strategy for all values that a message field's type admits, derived from the type itself."""
    match inspect.type_info(kind) if not isinstance(kind, inspect.Type) else kind:
        case inspect.StructType(cls=cls) if cls is Latent:
            return latents()
        case inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: values(field.type) for field in fields})
        case inspect.UnionType(types=members):
            return st.one_of(*map(values, members))
        case inspect.VarTupleType(item_type=item, min_length=shortest):
            return st.lists(values(item), min_size=shortest or 0, max_size=3).map(tuple)
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(values(key), values(value), max_size=3)
        case inspect.LiteralType(values=literals):
            return st.sampled_from(literals)
        case inspect.StrType(pattern=str() as pattern):
            return st.from_regex(pattern, fullmatch=True)
        case inspect.StrType(min_length=shortest, max_length=longest):
            return st.text(min_size=shortest or 0, max_size=min(longest or 20, 20))
        case inspect.IntType(ge=low, le=high):
            return st.integers(-(2**63) if low is None else low, 2**63 - 1 if high is None else high)
        case inspect.FloatType(ge=low, gt=above, le=high):
            return st.floats(above if low is None else low, high, allow_nan=False, exclude_min=above is not None)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.BytesType():
            return st.binary(max_size=100)
        case inspect.MemoryViewType():
            return st.binary(max_size=100).map(memoryview)
        case inspect.RawType():
            return st.integers().filter(lambda n: abs(n) < 2**63).map(msgspec.msgpack.encode).map(msgspec.Raw)
        case other:
            raise NotImplementedError(other)


@st.composite
def latents(draw: st.DrawFn) -> Latent:
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    dtype = draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    size = math.prod(shape) * (4 if dtype == "float32" else 2)
    data = draw(st.binary(min_size=size, max_size=size))
    return Latent(dtype=dtype, shape=shape, data=memoryview(data), padding=memoryview(bytes(draw(st.integers(0, 9)))))


messages = st.one_of(*map(values, types))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    payload = bytearray(encode(draw(messages)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(payload)))
        cut = draw(st.integers(0, 3))
        payload[at : at + cut] = draw(st.binary(max_size=3))
    return bytes(payload)


@pytest.mark.parametrize("kind", types)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_encoded_decodes_to_the_same(kind: type, data: st.DataObject) -> None:
    message = data.draw(values(kind))
    assert decode(encode(message)) == message


@settings(max_examples=500, deadline=None)
@given(st.binary() | damaged())
def test_any_bytes_are_a_message_or_malformed(payload: bytes) -> None:
    try:
        message = decode(payload)
    except MalformedMessage:
        return
    assert decode(encode(message)) == message


def test_a_payload_over_the_limit_is_neither_encoded_nor_decoded() -> None:
    with pytest.raises(MalformedMessage, match=f"a picture message of .* is over the limit of {MAX_PAYLOAD}"):
        encode(Picture(round="r", request="q", png=bytes(MAX_PAYLOAD)))
    with pytest.raises(MalformedMessage, match="is over the limit"):
        decode(bytes(MAX_PAYLOAD + 1))


def test_nesting_without_end_is_malformed() -> None:
    with pytest.raises(MalformedMessage):
        decode(b"\x91" * 1_000_000)


@pytest.mark.parametrize("deadline", [math.nan, -1.0])
def test_a_time_that_is_none_is_malformed(deadline: float) -> None:
    ask = Ask(round="r", request="q", prompt="a fox", seed=1, steps=28, deadline=deadline)
    with pytest.raises(MalformedMessage, match="deadline"):
        decode(encode(ask))


def test_a_latent_has_the_bytes_of_its_shape() -> None:
    with pytest.raises(ValueError, match=r"a float16 latent of shape \(2, 3\) has 12 bytes, not 11"):
        Latent(dtype="float16", shape=(2, 3), data=memoryview(bytes(11)))
    latent = {"dtype": "float16", "shape": [2, 3], "data": bytes(11)}
    work = {"type": "work", "round": "r", "request": "q", "reply": "d", "seed": 1, "steps": 28, "route": []}
    with pytest.raises(MalformedMessage, match="12 bytes, not 11"):
        decode(msgspec.msgpack.encode(work | {"sent": 0.0, "deadline": 0.0, "latent": latent}))


def test_a_latent_is_read_without_a_copy() -> None:
    latent = Latent(dtype="float16", shape=(16, 128, 128), data=memoryview(bytes(512 * 1024)))
    work = Work(round="r", request="q", reply="d", seed=1, steps=28, route=(), latent=latent, sent=0.0, deadline=0.0)
    payload = encode(work)
    message = decode(payload)
    assert isinstance(message, Work)
    assert message.latent is not None
    assert message.latent.data.obj is payload
