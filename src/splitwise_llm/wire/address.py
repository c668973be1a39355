"""`host:port` as people write it; it opens no socket and resolves no name."""

from __future__ import annotations

import ipaddress
import re

from splitwise_llm.errors import SpecError

_ADDRESS = re.compile(r"^(?:\[(?P<v6>[^\[\]\s]+)\]|(?P<name>[^\[\]:/\s]+)):(?P<port>[0-9]{1,5})$")


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) from `host:port` or `[ipv6]:port`; the host comes without brackets, the port is 0..65535.

    Port 0 means "any free port" where one listens. Raises SpecError.
    """
    found = _ADDRESS.match(text.strip())
    if found is None:
        raise SpecError(
            f"{text!r} is not an address: write host:port, as in '127.0.0.1:7070', with IPv6 in brackets, "
            "as in '[::1]:7070'"
        )
    host, port = found["v6"] or found["name"], int(found["port"])
    if found["v6"] and not _is_ipv6(host):
        raise SpecError(f"{text!r}: {host!r} is not an IPv6 address; brackets are only for those, as in '[::1]:7070'")
    if port > 65535:
        raise SpecError(f"{text!r}: port {port} is too large; write one of 0 to 65535")
    return host, port


def show_address(host: str, port: int) -> str:
    """The text that `parse_address` reads: `host:port`, with IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether `host` (as `parse_address` gives it) can be reached from this machine only.

    A name other than `localhost` is not resolved and counts as reachable from outside.
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
