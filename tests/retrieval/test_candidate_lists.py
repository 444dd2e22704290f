"""Candidate lists: exact search against brute force, ties, blocks, lists, captions files."""

from __future__ import annotations

import hashlib
import itertools
import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffitm.commands.candidates import CandidatesConfig, _beside, _check
from diffitm.commands.stages.embed import GROUP, EmbedActor, located
from diffitm.core.config import parse
from diffitm.core.errors import InputError
from diffitm.metrics.intervals import interval, wilson
from diffitm.retrieval import candidate_lists
from diffitm.retrieval.candidate_lists import Side, read_captions
from diffitm.retrieval.exact_knn import gallery_blocks, on_grid, to_table, top_k
from diffitm.tasks.flickr30k import Flickr30kImage, Flickr30kText

WIDTH = 24


def unit(rng: np.random.Generator, count: int, width: int = WIDTH) -> np.ndarray:
    values = rng.standard_normal((count, width)).astype(np.float32)
    return on_grid(values / np.linalg.norm(values, axis=1, keepdims=True), str)


def blocks(gallery: np.ndarray, size: int, order: np.random.Generator | None = None):
    starts = np.arange(0, len(gallery), size)
    for s in order.permutation(starts) if order else starts:
        positions = np.arange(s, min(s + size, len(gallery)))
        yield positions, gallery[positions]


def brute_force(queries: np.ndarray, gallery: np.ndarray, excluded: list[list[int]], k: int):
    """Every score in exact arithmetic, sorted by (score, position)."""
    grid = [[[int(v * 2**26) for v in row] for row in np.float64(m)] for m in (queries, gallery)]
    out = np.full((len(queries), k), -1)
    for q, query in enumerate(grid[0]):
        scored = [
            (-Fraction(sum(a * b for a, b in zip(query, other, strict=True)), 2**52), g)
            for g, other in enumerate(grid[1])
            if g not in excluded[q]
        ]
        best = [g for _, g in sorted(scored)[:k]]
        out[q, : len(best)] = best
    return out


@pytest.fixture(scope="module")
def tied() -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Queries, a gallery in which most embeddings come several times, and excluded positions."""
    rng = np.random.default_rng(1)
    gallery = unit(rng, 40)[rng.integers(40, size=150)]
    queries = np.concatenate([unit(rng, 15), gallery[:5]])
    excluded = [rng.choice(150, size=rng.integers(4), replace=False).tolist() for _ in queries]
    return queries, gallery, excluded


@pytest.mark.parametrize("k", [1, 10, 149, 200])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_equals_brute_force(tied, k: int, size: int) -> None:
    """Exact ties, k above the gallery, any block size: the same positions as exact arithmetic."""
    queries, gallery, excluded = tied
    found = top_k(queries, excluded, blocks(gallery, size), k)
    np.testing.assert_array_equal(found, brute_force(queries, gallery, excluded, k))


def test_blocks_and_their_order_do_not_matter() -> None:
    """Near ties in the last bits, at CLIP's width: any blocks, order or split of the queries."""
    rng = np.random.default_rng(2)
    base = unit(rng, 30, 512)
    noise = rng.integers(-2, 3, size=(20, 30, 512)) * np.float32(2**-26)
    gallery = (base + noise).reshape(-1, 512).astype(np.float32)
    queries, none = unit(rng, 40, 512), [[]] * 40
    wanted = top_k(queries, none, blocks(gallery, 600), 10)
    for size in (13, 256):
        shuffled = blocks(gallery, size, np.random.default_rng(size))
        np.testing.assert_array_equal(top_k(queries, none, shuffled, 10), wanted)
    parts = [top_k(queries[i : i + 7], none[:7], blocks(gallery, 64), 10) for i in range(0, 40, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), wanted)
    scores = np.take_along_axis(queries.astype(float) @ gallery.astype(float).T, wanted, 1)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (np.diff(scores.astype(np.float32), axis=1) == 0).any(), "no near tie was tested"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same(tied) -> None:
    queries, gallery, excluded = tied
    found = top_k(queries, excluded, blocks(gallery, 64), 10, "cuda")
    np.testing.assert_array_equal(found, brute_force(queries, gallery, excluded, 10))


def test_all_alike_gives_the_first_positions() -> None:
    """Embeddings that say nothing give the gallery's first k to each query: no gold is favoured."""
    alike = np.repeat(unit(np.random.default_rng(3), 1), 50, 0)
    found = top_k(alike, [[]] * 50, blocks(alike, 8, np.random.default_rng(0)), 5)
    assert (found == np.arange(5)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 7.0])
def test_an_embedding_that_is_not_unit_is_named(bad: float) -> None:
    values = unit(np.random.default_rng(4), 3)
    values[1, 2] = bad
    with pytest.raises(InputError, match=r"the embedding of image 'b\.jpg' has length"):
        on_grid(values, lambda i: f"image {['a.jpg', 'b.jpg', 'c.jpg'][i]!r}")


def test_an_actor_names_a_caption_without_embedding() -> None:
    """What a broken CLIP gives ends the run; it never wins."""
    values = torch.full((GROUP["text"], 4), 0.5)
    values[1] = torch.nan
    actor = object.__new__(EmbedActor)
    actor.kind, actor.failure = "text", None
    actor.clip = SimpleNamespace(encode_texts=lambda texts: {"embedding": values[: len(texts)]})
    row = {"row": 0, "start": 0, "names": ["x", "y"], "truth": [[0], [0]]}
    with pytest.raises(InputError, match="the embedding of caption 'y' has length nan"):
        actor(pa.Table.from_pylist([row]))


def test_shards_are_streamed_without_unreadable_items(tmp_path: Path) -> None:
    values = unit(np.random.default_rng(5), 6)
    failures = [None, "there is no such file", None, None, None, None]
    table = to_table(0, range(10, 16), [[0]] * 6, failures, values)
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(to_table(1, [16], [[0]], ["unreadable"], None), tmp_path / "b.parquet")
    paths = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    read = list(gallery_blocks(str(tmp_path), paths, 4))
    assert [len(positions) for positions, _ in read] == [3, 2]
    assert np.concatenate([p for p, _ in read]).tolist() == [10, 12, 13, 14, 15]
    np.testing.assert_array_equal(np.concatenate([e for _, e in read]), values[[0, 2, 3, 4, 5]])


def side(direction: str, failed: dict[int, str] | None = None) -> Side:
    """Three images; caption 'x' is true for the first two."""
    images, captions = ["a.jpg", "b.jpg", "c.jpg"], ["x", "y", "z", "w"]
    if direction == "image":
        return Side("image", captions, images, [[0, 1], [0], [1], [2]], failed or {})
    return Side("text", images, captions, [[0, 1], [0, 2], [3]], failed or {})


@pytest.mark.parametrize(
    ("insert", "expected"),
    [
        (True, {"x": ["a.jpg", "c.jpg"], "y": ["a.jpg", "c.jpg"], "z": ["b.jpg", "a.jpg"]}),
        (False, {"x": ["a.jpg", "c.jpg"], "z": ["b.jpg", "a.jpg"]}),
    ],
)
def test_lists_with_and_without_the_gold(tmp_path: Path, insert: bool, expected: dict) -> None:
    """The right one comes first; one that was not found replaces the last, or its query goes."""
    found = [(0, [2, 0]), (1, [2, 1]), (2, [1, 0]), (3, [])]
    uri = str(tmp_path / "deep" / "list.json")
    Path(uri).parent.mkdir()
    info = candidate_lists.write_lists(uri, found, side("image", {2: "empty"}), 2, insert)
    assert json.loads(Path(uri).read_text()) == expected
    assert info["queries"] == 3
    assert info["gallery"] == 2
    assert info["recall_ceiling"] == pytest.approx(2 / 3)
    assert info["low"] < 2 / 3 < info["high"]
    assert info["inserted"] == (["y"] if insert else [])
    assert (info["gold_inserted"], info["left_out"]) == (insert, 0 if insert else 1)
    assert info["failures"] == [{"image": "c.jpg", "reason": "empty", "queries": 1}]


def test_captions_of_one_image_are_no_independent_witnesses(tmp_path: Path) -> None:
    """Five images with four captions each, found or not found together; images alone are alike."""
    truth = [[image] for image in range(5) for _ in range(4)]
    captions, names = [f"c{q}" for q in range(20)], [f"{i}.jpg" for i in range(5)]
    found = [(q, [gold if gold < 3 else (gold + 1) % 5]) for q, (gold,) in enumerate(truth)]
    many = Side("image", captions, names, truth, {})
    info = candidate_lists.write_lists(str(tmp_path / "a.json"), found, many, 1, False)
    hits = np.repeat([1.0, 1.0, 1.0, 0.0, 0.0], 4)
    clusters = np.repeat(np.arange(5), 4)
    assert (info["low"], info["high"]) == pytest.approx(interval(hits, clusters))
    narrow = wilson(12, 20)
    assert info["high"] - info["low"] > 1.5 * (narrow[1] - narrow[0])
    once = Side("text", names, captions, [[4 * i] for i in range(5)], {})
    few = [(q, [4 * q if q < 3 else 1]) for q in range(5)]
    info = candidate_lists.write_lists(str(tmp_path / "b.json"), few, once, 1, False)
    assert (info["low"], info["high"]) == pytest.approx(wilson(3, 5))
    assert (info["queries"], info["gallery"], info["left_out"]) == (5, 20, 2)


def test_what_is_said_of_a_list(tmp_path: Path) -> None:
    """Of unreadable images in the queries; the digest is the file's."""
    uri = tmp_path / "list.json"
    found = [(0, [2, 0]), (1, [2]), (2, [3, 1])]
    info = candidate_lists.write_lists(str(uri), found, side("text", {1: "torn"}), 2, True)
    assert json.loads(uri.read_text()) == {"a.jpg": ["x", "z"], "c.jpg": ["w", "y"]}
    assert info["sha256"] == hashlib.sha256(uri.read_bytes()).hexdigest()
    assert (info["direction"], info["top_k"], info["queries"], info["gallery"]) == ("text", 2, 2, 4)
    assert info["failures"] == [{"image": "b.jpg", "reason": "torn", "queries": 1}]
    assert (info["recall_ceiling"], info["short_lists"], info["inserted"]) == (1.0, 0, [])
    info = candidate_lists.write_lists(str(uri), [], side("image"), 2, False)
    assert json.loads(uri.read_text()) == {}
    assert [info[key] for key in ("recall_ceiling", "low", "high", "queries")] == [None] * 3 + [0]
    candidate_lists.write_info(str(uri), info)
    assert json.loads(uri.read_text()) == info


def test_short_lists_are_told(tmp_path: Path) -> None:
    uri = str(tmp_path / "list_text.json")
    found = [(0, [3, 0, 2]), (1, [0, 3, 1]), (2, [0, 1, 2, 3])]
    info = candidate_lists.write_lists(uri, found, side("text"), 4, True)
    assert info["short_lists"] == 2
    assert json.loads(Path(uri).read_text())["a.jpg"] == ["x", "w", "z"]


def retrieve(direction: str, kept: bool, insert: bool, folder: Path):
    """Both galleries of a captions file with duplicates, searched as the pipeline does it."""
    rows = {f"{i}.jpg": [f"caption {i} {j}" for j in range(3)] for i in range(12)}
    rows["3.jpg"].append("caption 5 0")  # true for two images
    rows["7.jpg"].insert(0, "caption 2 1")  # a gold that is another image's second
    (folder / "captions.json").write_text(json.dumps(rows))
    known = read_captions(str(folder / "captions.json"))
    rng = np.random.default_rng(6)
    pictures, texts = unit(rng, 12, 4), unit(rng, len(known.captions), 4)
    if direction == "image":
        this = Side("image", known.captions, known.images, known.of_caption, {})
        queries, gallery = texts, pictures
    else:
        this = Side("text", known.images, known.captions, known.of_image, {})
        queries, gallery = pictures, texts
    excluded = [[] if kept and direction == "text" else t[1:] for t in this.truth]
    found = top_k(queries, excluded, blocks(gallery, 5), 4)
    uri = str(folder / "list.json")
    near = zip(range(len(queries)), found.tolist(), strict=False)
    info = candidate_lists.write_lists(uri, near, this, 4, insert)
    return rows, json.loads(Path(uri).read_text()), info, (queries, gallery, this)


@pytest.mark.parametrize(
    ("direction", "kept", "insert"), itertools.product(("image", "text"), *[(False, True)] * 2)
)
def test_lists_against_brute_force(
    tmp_path: Path, direction: str, kept: bool, insert: bool
) -> None:
    """All options: the gold first and once, no other true one unless kept, the others by score."""
    rows, lists, info, (queries, gallery, this) = retrieve(direction, kept, insert, tmp_path)
    scores = queries.astype(float) @ gallery.astype(float).T
    retrieved = []
    for q, name in enumerate(this.queries):
        gold, *others = this.truth[q]
        hidden = set() if kept and direction == "text" else set(others)
        ranked = [g for g in np.argsort(-scores[q], kind="stable") if g not in hidden][:4]
        retrieved.append(gold in ranked)
        if gold not in ranked and not insert:
            assert name not in lists
            continue
        wanted = [gold, *(g for g in ranked if g != gold)][:4]
        assert lists[name] == [this.gallery[g] for g in wanted]
        true = rows[name] if direction == "text" else [i for i in rows if name in rows[i]]
        if hidden or not others:
            assert sum(one in true for one in lists[name]) == 1
        assert (name in info["inserted"]) == (gold not in ranked)
    assert 0 < sum(retrieved) < len(retrieved)
    assert info["recall_ceiling"] == pytest.approx(np.mean(retrieved))
    assert len(lists) == (len(retrieved) if insert else sum(retrieved))
    if kept and direction == "text":
        assert any(len(set(lists[name]) & set(rows[name])) > 1 for name in lists)


def test_the_tasks_read_the_lists(tmp_path: Path) -> None:
    """The published names below a data root: same queries, gold first, insertions told apart."""
    folder = tmp_path / "flickr30k"
    folder.mkdir()
    for direction, task in (("image", Flickr30kImage()), ("text", Flickr30kText())):
        _, lists, info, _ = retrieve(direction, False, True, folder)
        prefix = "datasets/flickr30k/images/"
        if direction == "image":
            lists = {caption: [prefix + path for path in paths] for caption, paths in lists.items()}
        else:
            lists = {prefix + path: captions for path, captions in lists.items()}
            info["inserted"] = [prefix + path for path in info["inserted"]]
        stem = f"val_top10_RN50x64{'_text' if direction == 'text' else ''}"
        text = json.dumps(lists)
        (folder / f"{stem}.json").write_text(text)
        info["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        candidate_lists.write_info(str(folder / f"{stem}.info.json"), info)
        examples = list(task.examples(str(tmp_path)))
        assert len(examples) == len(
            {paths[0] for paths in lists.values()} if direction == "image" else lists
        )
        inserted = {e.groups["gold"] for e in examples}
        assert inserted == {"inserted", "retrieved"}
        assert all(e.gold == 0 and e.images[0].startswith("flickr30k/images/") for e in examples)


FORMS = {
    "rows.json": '[{"image": "a.jpg", "caption": ["x", "y"]}, {"image": "b.jpg", "caption": "x"}]',
    "map.json": '{"a.jpg": ["x", "y"], "b.jpg": ["x"]}',
    "lines.tsv": "image\tcaption\na.jpg\tx\na.jpg\ty\nb.jpg\tx\n",
    "lines.csv": "id,caption,image\n1,x,a.jpg\n2,y,a.jpg\n3,x,b.jpg\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_captions_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FORMS[name])
    known = read_captions(str(tmp_path / name))
    assert (known.images, known.captions) == (["a.jpg", "b.jpg"], ["x", "y"])
    assert (known.of_image, known.of_caption) == ([[0, 1], [0]], [[0, 1], [0]])


def test_what_comes_again_is_the_same_one(tmp_path: Path) -> None:
    """A pair, an image and a caption; the first image with a caption is its gold."""
    rows = [["b.jpg", ["x", "y", "x"]], ["a.jpg", ["y"]], ["b.jpg", ["z", "y"]], ["a.jpg", "w"]]
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"image": i, "caption": c} for i, c in rows]))
    known = read_captions(str(file))
    assert (known.images, known.captions) == (["b.jpg", "a.jpg"], ["x", "y", "z", "w"])
    assert known.of_image == [[0, 1, 2], [1, 3]]
    assert known.of_caption == [[0], [0, 1], [0], [1]]
    file.write_text(file.read_text().replace('"w"', '"v"'))
    assert read_captions(str(file)).digest != known.digest


def test_embeddings_lie_on_a_grid() -> None:
    """The nearest multiple of 2^-26; a length of 1.001 is still one of a unit vector."""
    step = 2.0**-26
    values = np.array([[3.4 * step, 3.6 * step, -3.6 * step], [0.6, 0.8, 0.0]])
    found = on_grid(values, str)
    assert found.dtype == np.float32
    assert (found[0] / step).tolist() == [3, 4, -4]
    on_grid(np.array([[1.0009]]), str)
    with pytest.raises(InputError, match=r"the embedding of 1 has length 1\.002, must be 1"):
        on_grid(np.array([[1.0], [1.002]]), str)


def test_a_bad_caption_costs_itself(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a.jpg": ["x", " "], "b.jpg": null, "c.jpg": "y"}')
    known = read_captions(str(tmp_path / "a.json"))
    assert (known.images, known.captions) == (["a.jpg", "c.jpg"], ["x", "y"])
    told = [(row.place, row.image, row.failure) for row in known.lost]
    assert told == [
        ("a.json, key 'a.jpg'", "a.jpg", "the row has no text"),
        ("a.json, key 'b.jpg'", "b.jpg", "the row has no text"),
    ]


def test_all_problems_at_once(tmp_path: Path) -> None:
    options = ["--captions", str(tmp_path / "none.json"), "--top-k", "1", "--out", "x_text.json"]
    with pytest.raises(InputError) as raised:
        _check(parse(CandidatesConfig, [*options, "--images", str(tmp_path / "none")]))
    told = str(raised.value)
    for part in ("give --clip", "no folder", "no file", "--top-k 1: must be at least 2", "--out"):
        assert part in told


def test_names_beside_the_list() -> None:
    assert _beside("a/top.json", "_text.json") == "a/top_text.json"
    assert _beside("s3://b/top.json?region=x", ".info.json") == "s3://b/top.info.json?region=x"


def test_images_by_path_or_by_name(tmp_path: Path) -> None:
    """The Karpathy files' own folder is dropped where only the bare names are there."""
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    root = str(tmp_path)
    known = ["flickr30k-images/a.jpg", "flickr30k-images/b.jpg"]
    assert located(root, known) == ["a.jpg", "b.jpg"]
    assert located(root, ["a.jpg", "sub/a.jpg"]) == ["a.jpg", "sub/a.jpg"]
    (tmp_path / "all.zip").touch()
    assert located(root, ["all.zip/in/a.jpg#xywh=0,0,2,2"]) == ["all.zip/in/a.jpg#xywh=0,0,2,2"]
    with pytest.raises(InputError, match=r"lacks the captions file's images, such as x/c\.jpg"):
        located(root, ["x/c.jpg"])
    with pytest.raises(InputError, match="same name without folder"):
        located(root, ["x/a.jpg", "y/a.jpg"])


def test_out_never_replaces_the_captions(tmp_path: Path) -> None:
    from diffitm.commands.candidates import CandidatesConfig, _check

    captions = tmp_path / "x_text.json"
    captions.write_text("{}")
    options = {"clip": "shapes", "images": str(tmp_path), "captions": str(captions)}
    with pytest.raises(InputError, match="would replace the captions file"):
        _check(CandidatesConfig(**options, out=str(tmp_path / "x.json")))
    _check(CandidatesConfig(**options, out=str(tmp_path / "y.json")))


def test_way_from_the_data_root() -> None:
    from diffitm.commands.candidates import _way

    assert _way("/data/flickr30k/images", "/data/flickr30k/list.json") == "flickr30k/images/"
    assert _way("s3://b/d/flickr30k/images", "s3://b/d/flickr30k/l.json") == "flickr30k/images/"
    assert _way("/pictures", "/data/flickr30k/list.json") == ""
    assert _way("/database/images", "/data/flickr30k/list.json") == ""
