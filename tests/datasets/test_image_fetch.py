"""Single images of many hosts, and the record of dead links."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.datasets import image_fetch as fetching
from diffitm.datasets.client import Client, Limits
from diffitm.datasets.image_fetch import fetch_image, fetch_shard, shards
from tests.loopback import (
    QUICK,
    Server,
    picture,
)


@pytest.mark.parametrize(
    ("route", "status", "reason"),
    [
        ("picture", "fetched", ""),
        ("flaky", "fetched", ""),
        ("404", "dead", "404 Not Found"),
        ("410", "dead", "410 Gone"),
        ("page", "dead", "not an image: a web page"),
        ("good", "dead", "not an image: the file is not"),
        ("cut", "dead", "not an image: "),
        ("huge", "dead", "bytes are more than"),
        ("loop", "dead", "redirects"),
        ("403", "failed", "403"),
        ("500", "failed", "500"),
        ("short", "failed", "broke off after"),
        ("bomb", "failed", "Content-Encoding 'gzip'"),
    ],
)
def test_images(
    server: Server, client: Client, tmp_path: Path, route: str, status: str, reason: str
) -> None:
    got = fetch_image(client, f"{server.url}/{route}", tmp_path / "1.jpg", QUICK)
    assert got[0] == status
    assert reason in got[1]
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert kept == ({"1.jpg": picture()} if status == "fetched" else {})


def test_a_shard(server: Server, client: Client, tmp_path: Path) -> None:
    rows = [("1", f"{server.url}/picture"), ("2", f"{server.url}/404"), ("3", "no address")]
    told = Counter[str]()
    lines = fetch_shard(
        rows, tmp_path, client, 2, lambda status, size: told.update([status]), QUICK
    )
    assert {line["id"]: line["status"] for line in lines} == {
        "1": "fetched",
        "2": "dead",
        "3": "dead",
    }
    assert told == {"fetched": 1, "dead": 2}
    assert pa.Table.from_pylist(lines, fetching.RESULT).num_rows == 3


def test_a_host_that_only_fails_is_left_alone(
    server: Server, client: Client, tmp_path: Path
) -> None:
    rows = [(str(i), f"{server.url}/500?{i}") for i in range(30)]
    lines = fetch_shard(rows, tmp_path, client, 1, limits=Limits(retries=0))
    assert {line["status"] for line in lines} == {"failed"}
    assert sum(server.visits.values()) == fetching.GIVE_UP


def test_connections_are_few(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many hosts too, whatever a host takes."""
    threads = set()

    def fetch(*_: Any) -> tuple[str, str, int]:
        threads.add(threading.get_ident())
        time.sleep(0.01)
        return "fetched", "", 1

    monkeypatch.setattr(fetching, "fetch_image", fetch)
    rows = [(str(i), f"http://h{i}.example/{i}") for i in range(20)]
    fetch_shard(rows, tmp_path, client, 4, threads=2)
    assert len(threads) == 2


def test_connections_to_a_host_are_few(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def fetch(*_: Any) -> tuple[str, str, int]:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1
        return "fetched", "", 1

    monkeypatch.setattr(fetching, "fetch_image", fetch)
    fetch_shard([(str(i), f"http://a.example/{i}") for i in range(20)], tmp_path, client, 3)
    assert most[0] == 3


def test_shards_keep_a_host_together() -> None:
    rows = [(f"{h}{i}", f"http://h{h}.example/{i}") for h in range(50) for i in range(1 + h % 7)]
    rows += [(f"x{i}", f"http://large.example/{i}") for i in range(100)]
    groups = shards(rows, 20)
    assert sorted(row for group in groups for row in group) == sorted(rows)
    homes = Counter(host for group in groups for host in {url.split("/")[2] for _, url in group})
    assert set(homes.values()) == {1}
    assert sorted(map(len, groups))[-2] <= 20


def test_groups_are_filled_to_the_last_place() -> None:
    """Large hosts first; one row too many begins another group. Within one, hosts take turns."""
    rows = [
        (f"{h}{i}", f"http://{h}/{i}") for h, n in (("a", 1), ("b", 3), ("c", 2)) for i in range(n)
    ]
    assert [[name for name, _ in group] for group in shards(rows, 5)] == [
        ["b0", "b1", "b2", "c0", "c1"],
        ["a0"],
    ]
    assert [len(group) for group in shards(rows, 4)] == [3, 3]
    assert [name for name, _ in fetching._mixed(rows)] == ["a0", "b0", "c0", "b1", "c1", "b2"]


def test_a_success_gives_a_host_new_tries(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures in a row count, of each host by itself; a dead link is an answer too."""
    tried, told = list[str](), list[tuple[str, int]]()

    def fetch(_: Client, url: str, to: Path, __: Limits) -> tuple[str, str, int]:
        assert to == tmp_path / f"{url[-2:]}.jpg"
        tried.append(url[-2:])
        good = {"a4": "fetched", "a9": "dead"}.get(url[-2:])
        return (good, "", 7) if good else ("failed", "500", 0)

    monkeypatch.setattr(fetching, "fetch_image", fetch)
    rows = [(f"{h}{i}", f"http://{h}.example/{h}{i}") for h in "ab" for i in range(10)]
    lines = fetch_shard(rows, tmp_path, client, 1, lambda *line: told.append(line), threads=1)
    assert sum(name[0] == "a" for name in tried) == 10
    assert sum(name[0] == "b" for name in tried) == fetching.GIVE_UP
    assert sum(line["reason"] == "its host failed 5 times in a row" for line in lines) == 5
    assert sorted(told)[:1] == [("dead", 7)] and told.count(("fetched", 7)) == 1
    assert {line["id"]: line["bytes"] for line in lines}["a4"] == 7


def test_images_that_are_there(tmp_path: Path) -> None:
    """Whole files of the right kind; none without a folder."""
    for name, content in (("1.jpg", b"x"), ("2.jpg", b""), ("3.png", b"x")):
        (tmp_path / name).write_bytes(content)
    assert fetching.fetched_ids(tmp_path) == {"1"}
    assert fetching.fetched_ids(tmp_path / "none") == set()


def results(folder: Path, *rows: tuple[str, str, str]) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"id": str(i), "url": url, "status": status, "reason": reason, "bytes": 0}
        for i, (url, status, reason) in enumerate(rows)
    ]
    parquet.write_table(pa.Table.from_pylist(lines, fetching.RESULT), folder / "a.parquet")
    return folder


def test_dead_links_are_recorded(tmp_path: Path) -> None:
    rows = [("u1", "dead", "404 Not Found"), ("u2", "fetched", ""), ("u3", "failed", "500 x: y")]
    found = results(tmp_path / "r", *rows, ("u4", "dead", "unknown host u4"))
    counts = fetching.merge_results(found, tmp_path / "svo" / "images")
    assert counts == {"fetched": 1, "dead": 2, "failed": 1}
    assert counts.most_common_reasons() == " (500 x: 1)"
    dead = fetching.read_dead(tmp_path / "svo" / "images")
    assert {url: row["reason"] for url, row in dead.items()} == {
        "u1": "404 Not Found",
        "u4": "unknown host u4",
    }
    assert (dead["u4"]["image_id"], dead["u1"]["image_id"]) == ("3", "0")
    assert not (tmp_path / "r").exists()
    again = results(tmp_path / "r2", ("u1", "fetched", ""))
    fetching.merge_results(again, tmp_path / "svo" / "images")
    assert list(fetching.read_dead(tmp_path / "svo" / "images")) == ["u4"]


def test_an_unplugged_machine_declares_no_link_dead(tmp_path: Path) -> None:
    rows = [
        ("u1", "dead", "unknown host"),
        ("u2", "dead", "not an image"),
        ("u3", "dead", "410 Gone"),
    ]
    counts = fetching.merge_results(results(tmp_path / "r", *rows), tmp_path / "svo" / "images")
    assert counts == {"failed": 2, "dead": 1}
    assert list(fetching.read_dead(tmp_path / "svo" / "images")) == ["u3"]
