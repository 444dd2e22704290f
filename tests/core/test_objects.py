"""Files, images and models on an S3-compatible server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from diffitm.captions.read import read
from diffitm.captions.row import Reading
from diffitm.core import images, outside, storage
from diffitm.core.config import parse
from diffitm.core.errors import InputError, Unavailable
from diffitm.core.provenance import redact
from diffitm.core.schema import PairRow
from diffitm.models.clip import load_clip, resolve_clip
from diffitm.models.embedded import SHAPES
from diffitm.models.loading import load_denoiser, lora_digest, resolve
from diffitm.models.lora import add_lora, locate, lora_file, lora_weights, save_lora, unpinned
from diffitm.models.weight_cache import cache_folder, content_digest, on_disk
from diffitm.scoring.image_reader import load_images
from diffitm.scoring.specs import ClipSpec
from diffitm.store.roots import take_over
from diffitm.store.score_store import open_store, stores_of
from diffitm.store.work_table import mend
from diffitm.training.image_pool import read_images
from diffitm.training.lora.options import FinetuneConfig
from tests.loopback import picture
from tests.objects import Objects, reachable, serve
from tests.pipeline import ROOT, environment
from tests.tiny import score_row, write_scores

WRITER = """
import sys, time
from diffitm.core import storage
found, path = storage.filesystem(sys.argv[1])
stream = found.open_output_stream(path)
stream.write(bytes(12 * 2**20))
time.sleep(600)
"""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Objects]:
    with serve(tmp_path_factory.mktemp("objects") / "served") as objects, reachable(objects):
        yield objects


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFITM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("form", ["uri", "whole_uri"])
def test_round_trip(bucket: Objects, form: str) -> None:
    """With the server in the environment, and in the URI."""
    root = getattr(bucket, form)(f"round-{form}")
    assert not storage.exists(root)
    assert storage.files(root, recursive=True) == []
    storage.make_folder(storage.join(root, "empty"))
    storage.write_bytes(storage.join(root, "a", "b.bin"), b"\x1f\x8b not really gzip")
    storage.write_text(storage.join(root, "c.json"), "é")
    assert storage.read_bytes(storage.join(root, "a", "b.bin")) == b"\x1f\x8b not really gzip"
    assert storage.read_text(storage.join(root, "c.json")) == "é"
    assert storage.read_range(storage.join(root, "a", "b.bin"), 3, 3) == b"not"
    assert storage.exists(root) and storage.exists(storage.join(root, "a"))
    top = f"bucket/round-{form}"
    assert storage.files(root) == [f"{top}/c.json"]
    assert storage.files(root, recursive=True) == [f"{top}/a/b.bin", f"{top}/c.json"]
    assert storage.files(root, ".bin", recursive=True) == [f"{top}/a/b.bin"]
    assert {name: size for name, (size, _) in storage.sizes(root, recursive=True).items()} == {
        "a/b.bin": 18,
        "c.json": 2,
    }
    assert storage.parent(storage.join(root, "c.json")) == root
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "absent"))


@pytest.mark.parametrize(
    "name", ["two words.jpg", "100%.jpg", "a%20b.jpg", "a#b.jpg", "é+.jpg", "a=b&c.jpg"]
)
def test_names_are_taken_as_they_are(bucket: Objects, name: str) -> None:
    for root in (bucket.uri("names"), bucket.whole_uri("names")):
        storage.write_bytes(storage.join(root, name), picture())
        assert storage.name(storage.files(root)[0]) == name
        assert images.load(root, name)[0].size == (8, 6)
        storage.delete(storage.join(root, name))
    assert storage.files(bucket.uri("names")) == []


def test_a_large_file_comes_back_whole(bucket: Objects) -> None:
    """Several parts of an upload."""
    data = bytes(range(256)) * 50_000
    storage.write_bytes(bucket.uri("large.bin"), data)
    assert storage.read_bytes(bucket.uri("large.bin")) == data
    assert ("POST", "/bucket/large.bin") in bucket.server.asked


def test_a_killed_writer_leaves_the_old_file(bucket: Objects) -> None:
    """Killed when the first part had been sent."""
    uri = bucket.uri("killed.bin")
    storage.write_bytes(uri, b"old")
    before = bucket.server.asked["PUT", "/bucket/killed.bin"]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, uri],
        env=environment(PYTHONPATH=str(ROOT)),
    )
    end = time.monotonic() + 60
    while bucket.server.asked["PUT", "/bucket/killed.bin"] == before:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert storage.read_bytes(uri) == b"old"
    assert storage.files(bucket.uri(""), "killed.bin") == ["bucket/killed.bin"]


def test_replacing(bucket: Objects) -> None:
    """The file is the old one until the new one is whole."""
    uri = bucket.whole_uri("lists/top.json")
    storage.write_text(uri, "old")
    with storage.replacing(uri) as sink:
        sink.write(b"new, ")
        assert storage.read_text(uri) == "old"
        sink.write(b"whole")
    assert storage.read_text(uri) == "new, whole"
    with pytest.raises(TypeError), storage.replacing(uri) as sink:
        sink.write(sink.write(b"half"))
    assert storage.read_text(uri) == "new, whole"


def test_readable_parquet(bucket: Objects) -> None:
    root = bucket.uri("tables")
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"row": list(range(100))}), sink)
    whole = sink.getvalue().to_pybytes()
    for name, data in {"a": whole, "b": whole[: len(whole) // 2], "c": b""}.items():
        storage.write_bytes(storage.join(root, f"{name}.parquet"), data)
    good, broken = storage.readable_parquet(root)
    assert good == ["bucket/tables/a.parquet"]
    assert broken == ["bucket/tables/b.parquet", "bucket/tables/c.parquet"]
    with bucket.busy(10**6, "/tables/a"), pytest.raises(OSError, match="503"):
        storage.readable_parquet(root)  # a server in trouble spoils no file
    with bucket.busy(10**6), pytest.raises(InputError, match="s3://bucket/tables cannot be looked"):
        storage.readable_parquet(root)
    assert storage.readable_parquet(root)[0] == good


def test_a_busy_server_is_asked_again(bucket: Objects) -> None:
    storage.write_text(bucket.uri("busy"), "x")
    with bucket.busy(2):
        assert storage.read_text(bucket.uri("busy")) == "x"
        assert bucket.server.refusals == 0


@pytest.mark.parametrize("form", ["uri", "whole_uri"])
def test_images_cost_two_requests(bucket: Objects, form: str) -> None:
    """Size and content of each, by one client."""
    root = getattr(bucket, form)("pictures")
    for i in range(5):
        storage.write_bytes(storage.join(root, f"{i}.jpg"), picture())
    images.load(root, "0.jpg")
    opened = storage._open.cache_info().misses
    bucket.server.asked.clear()
    for i in range(5):
        images.load(root, f"{i}.jpg")
    assert sum(bucket.server.asked.values()) == 10
    assert storage._open.cache_info().misses == opened


def refuse(bucket: Objects, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the server cannot be reached, or it takes the keys no more."""
    if how == "away":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    else:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    storage._open.cache_clear()


@pytest.mark.parametrize("how", ["away", "keys ran out"])
def test_images_of_a_store_that_answers_no_more(
    bucket: Objects, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Are not written off: the block is refused. One image that is missing is its own failure."""
    monkeypatch.setattr(outside, "DELAYS", (0.01,))
    root = bucket.upload(write_pictures(tmp := Path(os.environ["DIFFITM_CACHE"]), 3), "stays")
    rows = [PairRow(i, f"{i}.jpg", [""]) for i in range(4)]
    loaded = load_images(rows, root, lambda image: image.size)
    assert [item.failure for item in loaded] == [None, None, None, "there is no such file"]
    assert load_images(rows[3:], root, lambda image: image)[0].failure == "there is no such file"
    refuse(bucket, how, monkeypatch)
    with pytest.raises(Unavailable, match=r"none of 4 images could be read, such as 0\.jpg: .*AWS"):
        load_images(rows, root, lambda image: image)
    with pytest.raises(Unavailable, match="none of 1 images"):
        load_images(rows[:1], root, lambda image: image)
    storage._open.cache_clear()
    shutil.rmtree(tmp)


def test_images_of_a_folder_that_is_gone(tmp_path: Path) -> None:
    """A mount that went away; broken files are their own failures."""
    folder = write_pictures(tmp_path / "data", 2)
    (folder / "0.jpg").write_bytes(b"no image")
    (folder / "1.jpg").write_bytes(picture()[:100])
    rows = [PairRow(i, f"{i}.jpg", [""]) for i in range(2)]
    failures = [item.failure or "" for item in load_images(rows, str(folder), lambda image: image)]
    assert all(failure.startswith("unreadable image") for failure in failures)
    shutil.rmtree(folder)
    with pytest.raises(Unavailable, match=r"0\.jpg: there is no such file; there is no folder"):
        load_images(rows, str(folder), lambda image: image)


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(picture())
    return folder


def test_what_cannot_be_reached(bucket: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong keys and wrong options: a message with the URI and without the keys."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    storage._open.cache_clear()
    for call in (storage.exists, lambda uri: storage.write_text(uri, "x")):
        with pytest.raises(InputError, match=r"^s3://bucket/x\?endpoint.* cannot be ") as caught:
            call(bucket.whole_uri("x").replace("diffitm/x", "x"))
        assert "not-the-secret" not in str(caught.value)
    with pytest.raises(InputError, match=r"cannot open 's3://bucket\?place=x'.*place"):
        storage.exists("s3://bucket/x?place=x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage._open.cache_clear()
    with pytest.raises(InputError, match="s3://bucket/x cannot be looked at"):
        storage.exists("s3://bucket/x")
    storage._open.cache_clear()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:SEC%2FRET@bucket/a/b?region=x",
        "s3://KEY:SEC/RET+x@bucket/a",
        "ViT-B-32:s3://KEY:SECRET@bucket/a",
        "abfs://c@a/b?tenant_id=1&client_secret=SECRET",
        "s3://bucket/a?session_token=SECRET&region=x",
        "https://name:SECRET@host/a",
    ],
)
def test_a_uri_with_credentials_is_refused(uri: str) -> None:
    """At every door, and no message shows them."""
    with pytest.raises(InputError, match="holds credentials: give them by the environment") as told:
        storage.filesystem(uri)
    assert "SEC" not in str(told.value).replace("AWS_SECRET_ACCESS_KEY", "")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a@b:c?region=x",
        "abfs://container@account.dfs.core.windows.net/a",
        "hdfs://me@host:8020/a",
        "http://host:80/a@b",
        "s3://bucket/monkey?endpoint_override=h:1",
        "/a:b@c?key=x",
    ],
)
def test_a_uri_without_credentials(uri: str) -> None:
    storage.refuse_credentials(uri)


def test_what_people_read_holds_no_keys() -> None:
    uri = "s3://bucket/a/b?region=x"
    secret = "abfs://c@a/b?tenant_id=1&client_secret=hush"
    assert "hush" not in redact(f"x {secret} y")
    assert redact("x s3://KEY:SEC/RET+x@bucket/a y") == "x s3://***@bucket/a y"
    assert redact("s3://bucket/a@b and http://h/x") == "s3://bucket/a@b and http://h/x"
    assert storage.below(uri, "s3://bucket/a?region=y") == "b"
    assert storage.below(uri, "s3://bucket/other") == "s3://bucket/a/b?region=x"
    assert storage.below("/data/x", "/data/out") == "/data/x"


def test_a_commit_that_was_cut_in_two(bucket: Objects) -> None:
    """The copy was made and the original not yet deleted: the rows count as committed."""
    root = bucket.uri("checkpoint")
    for name in ("a.parquet", "a.pending.parquet", "b.pending.parquet", "c.parquet"):
        storage.write_text(storage.join(root, name), "")
    mend(root)
    assert sorted(storage.sizes(root)) == ["a.parquet", "b.pending.parquet", "c.parquet"]


def test_images_of_parquet(bucket: Objects) -> None:
    sink = pa.BufferOutputStream()
    data = [picture(), b"", picture()]
    parquet.write_table(pa.table({"image": data}), sink, row_group_size=2)
    storage.write_bytes(bucket.uri("pool/images.parquet"), sink.getvalue().to_pybytes())
    names, _ = read_images(bucket.uri("pool/images.parquet"))
    assert len(names) == 3
    for name in names[::2]:
        assert images.load(bucket.uri("pool"), name)[1] == hashlib.sha256(picture()).hexdigest()
    with pytest.raises(ValueError, match="empty"):
        images.load(bucket.uri("pool"), names[1])


def test_config_from_the_bucket(bucket: Objects) -> None:
    storage.write_text(bucket.uri("tune.yaml"), "lambda: 0.5\ndata: s3://bucket/data\n")
    found = parse(FinetuneConfig, ["--config", bucket.uri("tune.yaml"), "--seed", "3"])
    assert (found.lambda_, found.data, found.seed) == (0.5, "s3://bucket/data", 3)


# --- models


def test_one_copy_a_content(bucket: Objects) -> None:
    """Fetched once; changed content is fetched again, and refused where the old one was meant."""
    uri = bucket.uri("model")
    storage.write_text(storage.join(uri, "unet", "w.bin"), "one")

    def get(digest: str | None = None) -> tuple[Path, str]:
        listed = storage.sizes(uri, recursive=True)
        return on_disk(uri, listed, lambda f: content_digest([f / "unet" / "w.bin"]), digest)

    folder, first = get()
    assert (folder / "unet" / "w.bin").read_text() == "one"
    asked = bucket.server.asked["GET", "/bucket/model/unet/w.bin"]
    assert get() == get(first) == (folder, first)
    assert bucket.server.asked["GET", "/bucket/model/unet/w.bin"] == asked
    storage.write_text(storage.join(uri, "unet", "w.bin"), "other")
    assert get(first) == (folder, first), "a run goes on with what it began with"
    again, _ = get()
    assert again != folder and (again / "unet" / "w.bin").read_text() == "other"
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="s3://bucket/model changed while the run was going on"):
        get(first)
    assert {p.name for p in cache_folder().iterdir() if p.is_dir()} == {again.name}
    with pytest.raises(InputError, match=r"leads out of the folder"):
        on_disk(uri, {"../x": (1, 1)}, lambda f: "")


def test_two_addresses_of_one_content(bucket: Objects) -> None:
    """Fetched at the same time, by processes that cannot know of each other: one copy."""
    for name in ("first", "second"):
        storage.write_text(bucket.uri(f"{name}/w.bin"), "the same")

    def get(name: str, meanwhile: Callable[[], object] = list) -> tuple[Path, str]:
        def digest_of(folder: Path) -> str:
            meanwhile()
            return content_digest([folder / "w.bin"])

        return on_disk(bucket.uri(name), storage.sizes(bucket.uri(name), recursive=True), digest_of)

    others = []
    assert get("first", lambda: others.append(get("second"))) == others[0]
    assert [p.name for p in cache_folder().iterdir() if p.is_dir()] == [others[0][0].name]


def test_diffusion_model(bucket: Objects, sd_folder: Path) -> None:
    """The same weights and the same digest as from disk, so the same store; parts alone are fetched."""
    uri = bucket.upload(sd_folder, "models/sd")
    storage.write_bytes(storage.join(uri, "safety_checker", "big.bin"), bytes(100))
    found, local = resolve(uri), resolve(str(sd_folder))
    assert (found.digest, found.name) == (local.digest, uri)
    (copy,) = (p for p in cache_folder().iterdir() if p.is_dir())
    assert not (copy / "safety_checker").exists()
    shutil.rmtree(copy)  # another machine
    one, two = (load_denoiser(source).unet.state_dict() for source in (found, local))
    assert all(torch.equal(one[key], two[key]) for key in two)
    shutil.rmtree(cache_folder())
    scheduler = storage.join(uri, "scheduler", "scheduler_config.json")
    storage.write_text(scheduler, storage.read_text(scheduler).replace("epsilon", "sample"))
    with pytest.raises(InputError, match="changed while the run was going on"):
        load_denoiser(found)  # whose scores would go to the store of the other weights
    for wrong, text in ((bucket.uri("models"), "there is no model_index.json"),):
        with pytest.raises(InputError, match=f"--teacher .*{text}"):
            resolve(wrong, "--teacher")


def test_lora(bucket: Objects, sd_folder: Path, tmp_path: Path) -> None:
    """A folder and a file, with the query of a server; what was meant at first is what is loaded."""
    unet = load_denoiser(resolve(str(sd_folder))).unet
    add_lora(unet, 2, 0)
    weights = {key: value + 0.1 for key, value in lora_weights(unet).items()}
    save_lora(weights, str(tmp_path), 2)
    bucket.upload(tmp_path, "tuned")
    file = bucket.whole_uri("tuned/pytorch_lora_weights.safetensors")
    local = lora_digest(str(tmp_path))
    for given in (bucket.whole_uri("tuned"), file):
        located = locate(given)
        assert unpinned(located) == file
        assert lora_digest(located) == local
        assert lora_file(located).read_bytes() == lora_file(str(tmp_path)).read_bytes()
    merged = [
        load_denoiser(resolve(str(sd_folder)), lora=lora).unet.state_dict()
        for lora in (located, str(tmp_path), None)
    ]
    assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[1])
    assert any(not torch.equal(merged[0][key], merged[2][key]) for key in merged[2])
    save_lora({key: value * 2 for key, value in weights.items()}, bucket.uri("tuned"), 2)
    assert lora_digest(located) == local
    shutil.rmtree(cache_folder())
    with pytest.raises(InputError, match="changed while the run was going on"):
        lora_file(located)
    with pytest.raises(InputError, match="lora: 's3://bucket/models' is neither a file nor"):
        lora_file(bucket.uri("models"))


def test_clip(bucket: Objects, tmp_path: Path) -> None:
    """A folder; and a weights file of a named model."""
    uri = bucket.upload(SHAPES / "clip", "models/clip")
    storage.write_text(storage.join(uri, "train", "checkpoint", "state.pt"), "x")
    found, local = resolve_clip(uri), resolve_clip("shapes")
    assert (found.digest, found.folder) == (local.digest, uri)
    shutil.rmtree(cache_folder())
    one, two = (load_clip(source).model.state_dict() for source in (found, local))
    assert all(torch.equal(one[key], two[key]) for key in two)
    storage.write_bytes(bucket.uri("picture/a.jpg"), picture())
    rows = (
        ClipSpec(found, bucket.uri("picture"))
        .build("cpu")
        .score([PairRow(0, "a.jpg", ["a circle"])])
    )
    assert rows[0]["failure"] is None and -1 <= rows[0]["similarity"] <= 1
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    storage.write_bytes(bucket.uri("w.safetensors"), (tmp_path / "w.safetensors").read_bytes())
    by_name = [
        resolve_clip(f"RN50:{w}") for w in (bucket.uri("w.safetensors"), tmp_path / "w.safetensors")
    ]
    assert by_name[0].digest == by_name[1].digest
    assert by_name[0].pretrained == bucket.uri("w.safetensors")
    shutil.rmtree(cache_folder())
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    storage.write_bytes(bucket.uri("w.safetensors"), (tmp_path / "w.safetensors").read_bytes())
    config = storage.join(uri, "open_clip_config.json")
    storage.write_text(config, storage.read_text(config) + " ")
    for source in (found, by_name[0]):
        with pytest.raises(InputError, match="changed while the run was going on"):
            load_clip(source)
    with pytest.raises(InputError, match=r"clip: there is no file s3://bucket/none\.pt"):
        resolve_clip(f"RN50:{bucket.uri('none.pt')}")
    with pytest.raises(InputError, match=r"the folder has no open_clip_config\.json"):
        resolve_clip(bucket.uri("nowhere"))


def test_own_images_and_texts_in_every_layout(bucket: Objects, tmp_path: Path) -> None:
    """A bucket's tables, folders and shards are read as a disk's are, a bad row with its reason too."""
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "a.txt").write_text("a circle")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in ("a.jpg", "a.txt", "b.jpg", "b.txt"):
            tar.add(tmp_path / name, name)
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,a circle\nb.jpg,\n")
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 1, "caption": "a circle"}, {"image_id": 2, "caption": 3}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("a.jpg", "a.txt", "b.jpg", "b.txt"):
        shutil.copy(tmp_path / name, folder)
    there = bucket.upload(tmp_path, "own")
    for name in ("t.csv", "coco.json", "shard.tar", "files"):
        here = list(read(str(tmp_path / name), Reading()))
        far = list(read(storage.join(there, name), Reading()))
        assert far == here, name
        assert [row.failure is None for row in far] == [True, False], name
        root = storage.join(there, "files") if name == "files" else there
        assert images.load(root, far[0].image)[0].size


def test_a_copy_of_the_data_in_another_bucket_keeps_its_scores(
    bucket: Objects, tmp_path: Path
) -> None:
    for place in ("data", "copy", "changed"):
        storage.write_bytes(bucket.uri(f"{place}/a.jpg"), picture())
    out, config = bucket.uri("out"), {"kind": "clip"}
    first = open_store(out, "CLIP x", {**config, "root": bucket.uri("data").partition("?")[0]})
    digest = images.load(bucket.uri("data"), "a.jpg")[1]
    write_scores(first, [score_row("a.jpg", "t", digest=digest)])
    storage.write_bytes(bucket.uri("changed/a.jpg"), picture("blue"))
    known = list(stores_of(out))
    assert [store.config for store in known] == [first.config]
    for place, rows in (("copy", 1), ("changed", 0)):
        store = open_store(out, "CLIP x", {**config, "root": bucket.uri(place).partition("?")[0]})
        take_over([store], known, bucket.uri(place))
        assert store.dataset().count_rows() == rows
