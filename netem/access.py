"""Usual kinds of access as links: a rate, delay, jitter and loss each way, and where the numbers come from.

They are typical, not exact: published figures are of speed tests over everything between a device and a server,
where a testbed wants the access alone. What is a rounded choice says so.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from netem.link import Duration, Link, LinkState, Probability, Rate


class Access(NamedTuple):
    """A kind of access."""

    link: Link
    source: str


def _state(
    rate: str, delay: str, jitter: str, loss: str, distribution: Literal["uniform", "normal", "pareto"] = "normal"
) -> LinkState:
    return LinkState(
        rate=Rate(rate),
        delay=Duration(delay),
        jitter=Duration(jitter),
        loss=Probability(loss),
        distribution=distribution,
    )


ACCESS: Final = {
    "5g-mid-band": Access(
        Link(up=_state("20mbit", "12ms", "3ms", "0.01%"), down=_state("250mbit", "7ms", "2ms", "0.01%")),
        "Rate down: between the median 5G downloads of T-Mobile US (287 Mbit/s) and Verizon (225 Mbit/s), both on "
        "mid-band, Ookla Speedtest Intelligence, March 2024. Rate up: median 5G upload worldwide, 21.08 Mbit/s, "
        "Ookla, Q3 2021. Delays: within the one-way delays that Rohde & Schwarz measured in a public 5G NSA "
        "network (Kottkamp, 2022: from under 7 ms down to around 18 ms up). Jitter and loss: rounded choices.",
    ),
    "lte": Access(
        Link(up=_state("16mbit", "15ms", "3ms", "0.01%"), down=_state("36mbit", "5ms", "3ms", "0.01%")),
        "Rates: mean speed tests at good signal in Telenor's 4G network in Norway, 35.6 Mbit/s down and 16.4 up "
        "(the profiles of ERRANT: Trevisan et al., Computer Networks 176, 2020). Delays: the round trip of 20 ms "
        "of Holma and Toskala, LTE for UMTS, 2nd edition, Fig. 11.25, of which 10 ms are the scheduling request, "
        "up. Jitter: a retransmission of 8 ms for a tenth of the blocks (ibid.). Loss: a rounded choice.",
    ),
    "wifi-6-good": Access(
        Link(up=_state("500mbit", "1.5ms", "1ms", "0.01%"), down=_state("580mbit", "1.5ms", "1ms", "0.01%")),
        "Rate down: TCP of 16 laptops near a Wi-Fi 6 access point at 80 MHz, 582 Mbit/s together (Alethea, "
        "iperf3); here one device has it all. Delay: half of the median hop of 3 ms that Sui et al. measured on "
        "a campus (MobiSys 2016). Rate up, jitter and loss: rounded choices.",
    ),
    "wifi-6-poor": Access(
        Link(
            up=_state("15mbit", "10ms", "10ms", "1%", "pareto"), down=_state("20mbit", "10ms", "10ms", "1%", "pareto")
        ),
        "Rate down: the lowest rate of one stream at 80 MHz, 36 Mbit/s (IEEE 802.11ax, HE-MCS 0), of which a good half "
        "is left above the medium access: a rounded choice. Delay: half of the 90th percentile of the hop, 20 ms, "
        "that Sui et al. measured on a campus (MobiSys 2016), whose 99th is 250 ms: hence a long tail. Rate up, "
        "jitter and loss: rounded choices.",
    ),
    "bluetooth-pan": Access(
        Link(up=_state("1.3mbit", "10ms", "5ms", "0.1%"), down=_state("1.3mbit", "10ms", "5ms", "0.1%")),
        "Rates: the largest symmetric rate of 3-DH5 packets, 1306.9 kbit/s (Bluetooth Core Specification, Vol 2 "
        "Part B, 6.7: 2178.1 and 177.1 kbit/s asymmetric), which BNEP's overhead is taken off of by rounding. "
        "Delay, jitter and loss: rounded choices of a few packets of 3.75 ms; links retransmit until they break.",
    ),
    "leo-satellite": Access(
        Link(up=_state("12mbit", "20ms", "5ms", "0.5%"), down=_state("105mbit", "20ms", "5ms", "0.5%")),
        "Rates and round trip: median Starlink speed test in the USA, 104.97 Mbit/s down, 12 up and 40 ms, "
        "Ookla, Q4 2021. Jitter: 2.6 to 5.7 ms in a stream of 1 Mbit/s (Sauter, wirelessmoves.com, July 2024, who "
        "also sees losses of 1 in 90 packets in some seconds). Loss: a rounded choice. The reconfiguration every 15 s "
        "(Mohan et al., WWW 2024) is not in it: give `interruptions` for it.",
    ),
    "ethernet": Access(
        Link(up=_state("1gbit", "0.2ms", "0ms", "0%"), down=_state("1gbit", "0.2ms", "0ms", "0%")),
        "Rate: 1000BASE-T (IEEE 802.3, clause 40), whose bit errors of 1e-10 lose one packet in a million. Delay: a "
        "rounded choice for two switches and the hosts' stacks.",
    ),
}
"""By name."""
