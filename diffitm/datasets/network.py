"""Connections that go to checked addresses only, and that end when their time is over.

A name is resolved once for a connection, every address that it stands for is checked, and the
connection goes to the checked address itself.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from typing import Any

from urllib3.exceptions import NameResolutionError, NewConnectionError

NO_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


class RefusedError(Exception):
    """The address, or what it answers, is not acceptable: another try would not help.

    `dead` says that the file is gone for good (404, 410, no such name, not what it should be).
    """

    def __init__(self, reason: str, dead: bool = False, unknown_host: bool = False) -> None:
        super().__init__(reason)
        self.dead, self.unknown_host = dead, unknown_host


class BrokenError(Exception):
    """The download failed on its way; another try may help."""


# Ranges that Python's tables take for public: special purposes, documentation, platform services.
NOT_PUBLIC = [
    ipaddress.ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "3fff::/20", "5f00::/16")
]
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # on networks without IPv4


def check_address(text: str) -> None:
    """Raises RefusedError unless the IP address is one of the public internet.

    One of IPv6 that carries addresses of IPv4 is judged by those alone.
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    carried: list[Any] = _carried(address) if isinstance(address, ipaddress.IPv6Address) else []
    if not all(_is_public(each) for each in carried or [address]):
        raise RefusedError(
            f"{text} is not an address of the public internet (--allow-private allows it)"
        )


def _carried(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The addresses of IPv4 that traffic to one of IPv6 can end at: of Teredo two, server and client."""
    if address in NAT64:
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    single = address.ipv4_mapped or address.sixtofour
    return [single] if single else list(address.teredo or ())


def _is_public(address: Any) -> bool:
    if any(address in network for network in NOT_PUBLIC if network.version == address.version):
        return False
    site_local = getattr(address, "is_site_local", False)  # of IPv6 alone
    return address.is_global and not (address.is_multicast or address.is_reserved or site_local)


class Deadline:
    """Bounds everything that its thread does on connections, headers that drip in included."""

    current = threading.local()

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.end = None if seconds is None else time.monotonic() + seconds
        self.connections: list[Any] = []
        self.timer = threading.Timer(seconds or 0, self._cut)
        self.timer.daemon = True

    @staticmethod
    def register(connection: Any) -> None:
        """The connection is used by this thread now. Raises BrokenError when its time is over."""
        deadline: Deadline | None = getattr(Deadline.current, "value", None)
        if deadline is not None:
            deadline.check()
            deadline.connections.append(connection)

    def __enter__(self) -> Deadline:
        if self.seconds is not None:
            Deadline.current.value = self
            self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        Deadline.current.value = None
        self.timer.cancel()

    def _cut(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def check(self) -> None:
        """Raises BrokenError when the time is over."""
        if self.end is not None and time.monotonic() >= self.end:
            raise BrokenError(f"took longer than {self.seconds:g} s")


def _connect(connection: Any, allow_private: bool) -> socket.socket:
    """A socket to the first address of the host that answers, all of them checked before."""
    host = connection._dns_host
    try:
        found = socket.getaddrinfo(host.strip("[]"), connection.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in NO_NAME:
            raise RefusedError(f"unknown host {host}", dead=True, unknown_host=True) from error
        raise NameResolutionError(host, connection, error) from error
    except UnicodeError as error:
        raise RefusedError(f"unknown host {host!r}", dead=True) from error
    if not allow_private:
        for *_, address in found:
            check_address(str(address[0]))
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        made = socket.socket(family, kind, protocol)
        try:
            made.settimeout(connection.timeout)
            made.connect(address)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return made
        except OSError as error:
            made.close()
            failure = error
    raise NewConnectionError(connection, f"no connection: {failure}") from failure


def guarded(base: Any, allow_private: bool) -> Any:
    """A connection class that checks addresses and is cut when its thread's time is over."""

    class Guarded(base):
        def _new_conn(self) -> socket.socket:
            Deadline.register(self)
            return _connect(self, allow_private)

        def request(self, *arguments: Any, **more: Any) -> Any:
            Deadline.register(self)  # also when a kept connection is used again
            return super().request(*arguments, **more)

    return Guarded
