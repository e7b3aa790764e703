"""From where images may be fetched. Owns the form of `--image-host`, and which addresses such a name may have.

    hosts = ImageHosts(["images.example.org", "scans.intranet:8443=10.1.2.0/24"])
    hosts.knows("images.example.org", 443)                       # → True
    hosts.allows("images.example.org", 443, "169.254.169.254")   # → False: no public address

A name is no promise: who runs its DNS, or sits between, can point it at this machine or at a cloud's metadata. So an
entry that is a name alone may have public addresses only. A host of an operator's own network is written with the
address or range that it has, and may then have no other one.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PORTS: Final = (80, 443)  # of an entry that names none
_ENTRY: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::([1-9][0-9]{0,4}))?(?:=([0-9A-Fa-f:./]+))?")
_NAME: Final = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9-]{1,63}(?<!-))*")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")  # of a last label: then some read the whole as an address
_LAST_PORT: Final = 65535
_MAX_NAME: Final = 253
_GLOBAL_UNICAST: Final = ipaddress.ip_network("2000::/3")
# What is_global says nothing of: addresses that carry another one, for a tunnel or a translation, and the last are for
# documentation, which older Pythons do not know.
_NOT_PUBLIC: Final = tuple(
    map(
        ipaddress.ip_network,
        ("2002::/16", "2001::/32", "64:ff9b::/96", "64:ff9b:1::/48", "192.88.99.0/24", "3fff::/20"),
    )
)
_OWN: Final = tuple(
    map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"))
)
_LOOPBACK: Final = tuple(map(ipaddress.ip_network, ("127.0.0.0/8", "::1/128")))


@dataclass(frozen=True, slots=True)
class _Host:
    name: str  # in small letters; an address as ipaddress writes it, without brackets
    ports: tuple[int, ...]
    network: Network | None  # None: any public address


class ImageHosts:
    """The entries of `--image-host`."""

    def __init__(self, entries: Iterable[str]) -> None:
        """`entries`: HOST, HOST:PORT, HOST=NETWORK, HOST:PORT=NETWORK. Raises ValueError for what is none of these."""
        self._hosts = [_parsed(entry) for entry in entries]

    def knows(self, host: str, port: int) -> bool:
        """Whether anything may be asked of it. `host`: as `normal` gives it."""
        return any(one.name == host and port in one.ports for one in self._hosts)

    def allows(self, host: str, port: int, address: str) -> bool:
        """Whether it may be asked at that address, as the system writes addresses."""
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        entries = [one for one in self._hosts if one.name == host and port in one.ports]
        return any(_may_be(found, one.network) for one in entries)


def normal(host: str) -> str:
    """One writing of a host: small letters, an address without brackets and as ipaddress writes it."""
    try:
        return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        return host.lower()


def is_public(address: Address) -> bool:
    """Whether it is an address of the internet, and none that leads to another one within it."""
    if getattr(address, "scope_id", None) or _is_in(address, _NOT_PUBLIC):
        return False
    is_unicast = isinstance(address, ipaddress.IPv4Address) or address in _GLOBAL_UNICAST  # without ::ffff:127.0.0.1
    return is_unicast and address.is_global and not address.is_multicast


def _may_be(address: Address, network: Network | None) -> bool:
    if network is None or not _is_own(network):
        return is_public(address) and (network is None or address in network)
    return not getattr(address, "scope_id", None) and address in network


def _is_in(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


def _parsed(entry: str) -> _Host:
    found = _ENTRY.fullmatch(entry)
    host = normal(found[1]) if found else ""
    port = int(found[2]) if found and found[2] else None
    address = _address(host)
    is_last_number = _NUMBER.fullmatch(host.rpartition(".")[2])
    if not found or len(host) > _MAX_NAME or (port or 0) > _LAST_PORT:
        raise ValueError(_wrong(entry))
    if address is None and (not _NAME.fullmatch(host) or is_last_number):
        raise ValueError(_wrong(entry))
    network = None
    if found[3] is not None:
        network = _network(entry, found[3])
    elif address is not None:  # who names an address means that one
        network = _network(entry, host)
    return _Host(host, PORTS if port is None else (port,), network)


def _wrong(entry: str) -> str:
    return (
        f"--image-host {entry:.300}: expected the exact name of a host, images.example.org, in letters of ASCII "
        "(xn--… of another script) and without a scheme; with a port where that is not 80 or 443, "
        "images.example.org:8443; with the address or range that it has in a network of your own, scans=10.1.2.0/24."
    )


def _network(entry: str, text: str) -> Network:
    """Raises ValueError for what a host may never be, and for a range that is partly one's own and partly not."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(f"{_wrong(entry)} {text:.60} is no address, and no range of them.") from None
    if not (_is_own(network) or (is_public(network.network_address) and is_public(network.broadcast_address))):
        raise ValueError(
            f"--image-host {entry:.300}: {text:.60} is neither a range of a private network (10.0.0.0/8, "
            "172.16.0.0/12, 192.168.0.0/16, 100.64.0.0/10, fc00::/7, or this machine) nor one of public addresses. "
            "Give a smaller one."
        )
    return network


def _is_own(network: Network) -> bool:
    ends = (network.network_address, network.broadcast_address)
    return any(all(end in other for end in ends) for other in (*_OWN, *_LOOPBACK))


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
