import pytest

from broker.address import Address, BadAddress


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("broker", "broker", 1883),
        ("10.0.0.7:1884", "10.0.0.7", 1884),
        ("mqtt://edge.example.org", "edge.example.org", 1883),
        ("mqtt://[::1]:1", "::1", 1),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    assert Address.parse(text) == Address(host, port)


def test_an_address_may_ask_for_tls() -> None:
    assert Address.parse("mqtts://broker") == Address("broker", 8883, tls=True)


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(BadAddress) as raised:
        Address.parse("mqtt://user:secret@broker")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["", ":1883", "http://broker", "mqtt://user:secret@broker", "broker:99999", "broker/x", "a b", "mqtt://["]
)
def test_anything_else_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(BadAddress, match="is no address of a broker"):
        Address.parse(text)
