"""Addresses as people write them."""

from __future__ import annotations

import pytest

from splitwise_llm.errors import SpecError
from splitwise_llm.wire.address import is_loopback, parse_address, show_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7070", "127.0.0.1", 7070),
        ("localhost:0", "localhost", 0),
        (" worker-1.lan:65535\n", "worker-1.lan", 65535),
        ("[::1]:80", "::1", 80),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
    ],
)
def test_host_and_port_are_read_and_shown_again(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)
    assert show_address(host, port) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        ":80",
        "localhost:",
        "localhost:http",
        "::1:80",
        "[::1]",
        "[localhost]:80",
        "a b:80",
        "a:65536",
        "a:-1",
    ],
)
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SpecError, match=r"host:port|IPv6|0 to 65535"):
        parse_address(text)


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("LocalHost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("localhost.example.org", False),
    ],
)
def test_only_what_nobody_outside_can_reach_is_loopback(host: str, is_local: bool) -> None:
    assert is_loopback(host) is is_local
