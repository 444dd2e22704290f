"""Which addresses are connected to: public ones only, on every redirect."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from diffitm.datasets import client as requests
from diffitm.datasets import network
from diffitm.datasets.client import Client, fetch_bytes
from diffitm.datasets.network import BrokenError, Deadline, RefusedError, check_address
from tests.loopback import (
    QUICK,
    Server,
)


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 127.8.9.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0
    255.255.255.255 224.0.0.1 239.1.2.3 240.0.0.1 192.0.2.1 198.18.0.1 ::1 :: fe80::1 fe80::1%eth0
    fc00::1 fd12::1 ff02::1 fec0::1 2001:db8::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 2002:7f00:1::
    64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 192.0.0.192 192.88.99.1 168.63.129.16 3fff::1""".split(),
)
def test_private_addresses_are_refused(address: str) -> None:
    with pytest.raises(RefusedError, match="not an address of the public internet"):
        check_address(address)


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"]
)
def test_public_addresses_pass(address: str) -> None:
    check_address(address)


def forms(address: str) -> dict[str, str]:
    """The addresses of IPv6 that carry one of IPv4; the other one of Teredo is public."""
    first, last = bytes(map(int, address.split("."))).hex(" ", 2).split()
    client = f"{int(first, 16) ^ 0xFFFF:x}:{int(last, 16) ^ 0xFFFF:x}"
    return {
        "mapped": f"::ffff:{address}",
        "NAT64": f"64:ff9b::{first}:{last}",
        "6to4": f"2002:{first}:{last}::1",
        "Teredo's client": f"2001:0:808:808:8000:63bf:{client}",
        "Teredo's server": f"2001:0:{first}:{last}:8000:63bf:f7f7:f7f7",
    }


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 10.1.2.3 169.254.169.254 100.64.0.1 192.0.0.192 192.88.99.1 168.63.129.16
    224.0.0.1 240.0.0.1 0.0.0.0""".split(),
)
def test_an_address_that_carries_another_is_judged_as_that(address: str) -> None:
    """What is refused in plain is refused in every form that leads there, and nothing else is."""
    for carrier in forms(address).values():
        with pytest.raises(RefusedError, match=f"^{carrier} is not an address of the public"):
            check_address(carrier)
    for carrier in forms("93.184.216.34").values():
        check_address(carrier)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]"])
def test_loopback_is_not_reached(server: Server, host: str) -> None:
    """However it is written: numbers that the system's resolver takes for 127.0.0.1 too."""
    with pytest.raises((RefusedError, BrokenError)):
        fetch_bytes(Client(), f"http://{host}:{server.server_port}/picture", 10**6, QUICK)
    assert not server.visits


def test_redirect_into_private_network(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first address is taken for a public one; the redirect is checked anew."""
    real = check_address
    monkeypatch.setattr(
        network, "check_address", lambda ip: None if ip == "127.0.0.1" else real(ip)
    )
    target = f"http://127.0.0.2:{server.server_port}/picture"
    with pytest.raises(RefusedError, match=r"127\.0\.0\.2 is not an address of the public"):
        fetch_bytes(Client(), f"{server.url}/to?{target}", 10**6, QUICK)
    assert server.visits["/picture"] == 0


def resolver(*answers: list[str]) -> Callable[..., list]:
    """A getaddrinfo that gives these answers in turn, the last one for ever."""
    left = list(answers)

    def resolve(host: str, port: int, **_: Any) -> list:
        found = left.pop(0) if len(left) > 1 else left[0]
        kinds = [socket.AF_INET6 if ":" in ip else socket.AF_INET for ip in found]
        return [
            (k, socket.SOCK_STREAM, 6, "", (ip, port)) for k, ip in zip(kinds, found, strict=True)
        ]

    return resolve


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Where sockets were asked to connect to; nothing leaves the machine."""
    tried: list[tuple] = []

    class Fake:
        def __init__(self, *_: Any) -> None: ...
        def settimeout(self, *_: Any) -> None: ...
        def close(self) -> None: ...
        def connect(self, address: tuple) -> None:
            tried.append(address)
            raise OSError("no network in tests")

    monkeypatch.setattr(network.socket, "socket", Fake)
    return tried


def test_dns_rebinding(connected: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    """Public at first, loopback at the second look: the checked address is the one connected to."""
    monkeypatch.setattr(socket, "getaddrinfo", resolver(["93.184.216.34"], ["127.0.0.1"]))
    with pytest.raises(RefusedError, match=r"127\.0\.0\.1 is not an address of the public"):
        fetch_bytes(Client(), "http://rebind.example/x", 10**6, QUICK)
    assert connected == [("93.184.216.34", 80)]


def test_a_name_with_one_private_address_is_refused(
    connected: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolver(["93.184.216.34", "10.0.0.1"]))
    with pytest.raises(RefusedError, match=r"10\.0\.0\.1"):
        fetch_bytes(Client(), "https://mixed.example/x", 10**6, QUICK)
    assert connected == []


def test_addresses_are_tried_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the time that a connection may take; what did not answer is closed."""
    steps = list[tuple]()

    class Fake:
        def __init__(self, family: int, *_: Any) -> None:
            self.name = "six" if family == socket.AF_INET6 else "four"

        def settimeout(self, seconds: float) -> None:
            steps.append((self.name, seconds))

        def setsockopt(self, *option: int) -> None:
            steps.append((self.name, option))

        def close(self) -> None:
            steps.append((self.name, "closed"))

        def connect(self, address: tuple) -> None:
            steps.append((self.name, address))
            if self.name == "six":
                raise OSError("no route")

    monkeypatch.setattr(network.socket, "socket", Fake)
    monkeypatch.setattr(socket, "getaddrinfo", resolver(["2606:4700::1111", "93.184.216.34"]))
    wanted = SimpleNamespace(_dns_host="a.example", port=80, timeout=3.0)
    made: Any = network._connect(wanted, False)
    assert made.name == "four"
    assert steps == [
        ("six", 3.0), ("six", ("2606:4700::1111", 80)), ("six", "closed"),
        ("four", 3.0), ("four", ("93.184.216.34", 80)),
        ("four", (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)),
    ]  # fmt: skip


def test_a_deadline_ends_at_its_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """For its thread and while it lasts; without seconds there is none."""
    now = [100.0]
    monkeypatch.setattr(network, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Deadline(60.0) as deadline:
        Deadline.register("one")
        now[0] = 159.9
        deadline.check()
        assert deadline.connections == ["one"]
        now[0] = 160.0
        with pytest.raises(BrokenError, match="took longer than 60 s"):
            deadline.check()
        with pytest.raises(BrokenError, match="took longer than 60 s"):
            Deadline.register("two")
    Deadline.register("three")
    with Deadline(None) as endless:
        endless.check()
    assert (deadline.connections, endless.connections) == (["one"], [])


def test_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such name is dead; a resolver that fails for now is not."""

    def fail(code: int) -> Callable[..., list]:
        def resolve(*_: Any, **__: Any) -> list:
            raise socket.gaierror(code, "no")

        return resolve

    monkeypatch.setattr(socket, "getaddrinfo", fail(socket.EAI_NONAME))
    with pytest.raises(RefusedError, match=r"unknown host gone\.example") as caught:
        fetch_bytes(Client(), "http://gone.example/x", 10**6, QUICK)
    assert caught.value.dead
    monkeypatch.setattr(socket, "getaddrinfo", fail(socket.EAI_AGAIN))
    with pytest.raises(BrokenError):
        fetch_bytes(Client(), "http://gone.example/x", 10**6, QUICK)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("file:///etc/passwd", "not an http or https address"),
        ("ftp://example.org/x", "not an http or https address"),
        ("http://user:pw@example.org/x", "a user name"),
        ("http://[bad/x", "not an address"),
    ],
)
def test_redirect_to_what_is_not_followed(
    server: Server, client: Client, target: str, why: str
) -> None:
    with pytest.raises(RefusedError, match=why) as caught:
        fetch_bytes(client, f"{server.url}/to?{target}", 10**6, QUICK)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "no address", "http://", "http://a b/x", "http://x:99999/", "//x/y"]
)
def test_what_is_not_an_address_is_dead(client: Client, url: str) -> None:
    with pytest.raises(RefusedError) as caught:
        fetch_bytes(client, url, 10**6, QUICK)
    assert caught.value.dead


def test_redirect_loop(server: Server, client: Client) -> None:
    with pytest.raises(RefusedError, match="more than 5 redirects"):
        fetch_bytes(client, f"{server.url}/loop", 10**6, QUICK)
    assert server.visits["/loop"] == requests.REDIRECTS + 1


def test_downgrade_is_refused_for_files() -> None:
    with pytest.raises(RefusedError, match="redirected from https"):
        Client()._check_url("http://example.org/x", "https")
