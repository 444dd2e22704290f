"""The table of data sets and the steps of prepare.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError

from diffitm.commands import prepare
from diffitm.commands.stages import fetch as fetch_on_ray
from diffitm.core.errors import Incomplete, InputError
from diffitm.datasets import options, recipe, sources, status
from diffitm.datasets.options import DataConfig
from diffitm.datasets.recipe import DatasetRecipe, Download, Hub, ImageList, Named, Need, Rule
from diffitm.datasets.unpack import whole
from tests.loopback import (
    zipped,
)


def test_the_table_is_sane() -> None:
    """Every address is https but COCO's, every archive is bounded and its rules are patterns."""
    for name, source in sources.SOURCES.items():
        assert source.licence
        assert source.needs
        for step in source.steps:
            if not isinstance(step, Download):
                continue
            assert step.to.partition("/")[0] in (name, "coco", "coco_neg")
            for url in step.urls:
                assert url.startswith("https://") or step.to.startswith("coco/val20")
            if step.urls[0].startswith("http://"):
                assert step.checksum
            assert bool(step.rules) == bool(step.unpacked) == step.to.endswith((".zip", ".gz"))


@pytest.mark.parametrize(
    ("task", "member", "place"),
    [
        ("pets", "images/Abyssinian_1.jpg", "pets/images/Abyssinian_1.jpg"),
        ("pets", "images/Abyssinian_100.mat", None),
        ("pets", "images/._Abyssinian_1.jpg", None),
        ("clevr", "images/CLEVR_val2_000138.png", "clevr/images/CLEVR_val2_000138.png"),
        ("imagecode", "image-sets/open-images-1_a/img7.jpg", "imagecode/image-sets/open-images-1_a/img7.jpg"),
        ("aro", "images/21.jpg", "aro/images/21.jpg"),
        ("coco", "val2014/COCO_val2014_000000000042.jpg", "coco/val2014/COCO_val2014_000000000042.jpg"),
        ("mmbias", "Religion/Jewish/3.jpg", "mmbias/data/Images/Religion/Jewish/3.jpg"),
        ("mmbias", "__MACOSX/Religion/Jewish/._3.jpg", None),
        ("sugarcrepe", "val2017/000000000139.jpg", "coco/val2017/000000000139.jpg"),
        ("whatsup", "controlled_images/mug_on_desk.jpeg", "whatsup/controlled_images/mug_on_desk.jpeg"),
        ("eqben", "eqben_vllm/all_select.json", "eqben/eqben_vllm/all_select.json"),
        ("eqben", "images/eqbensd/1_0.png", "eqben/eqben_vllm/images/eqbensd/1_0.png"),
        ("colorswap", "data/images.zip", "colorswap/data/images.zip"),
    ],
)  # fmt: skip
def test_members_go_to_their_places(task: str, member: str, place: str | None) -> None:
    from diffitm.datasets.unpack import target

    steps = [s for s in sources.SOURCES[task].steps if isinstance(s, Download) and s.rules]
    found = {target(member, step.rules) for step in steps}
    assert place in found


def test_images_that_sets_share_are_fetched_once(tmp_path: Path) -> None:
    """SugarCrepe and SugarCrepe++ together need COCO's images one time."""
    chosen = sources.find(["sugarcrepe", "sugarcrepe_pp"])
    steps = [s.to for s in prepare._needed(chosen, tmp_path) if isinstance(s, Download)]
    assert steps.count("coco/val2017.zip") == 1
    assert len(steps) == 7 + 5 + 1


def test_tasks_stand_for_their_data() -> None:
    assert list(sources.find(["svo_verb", "svo", "vg_relation"])) == ["svo", "aro"]
    with pytest.raises(InputError, match="unknown task 'pest'; did you mean 'pets'"):
        sources.find(["pest"])


def test_every_task_has_a_source() -> None:
    from diffitm.tasks.registry import TASKS

    for task in TASKS:
        assert sources.find([task])


def test_missing(tmp_path: Path) -> None:
    source = DatasetRecipe(
        steps=(),
        needs=(Need("a/images", 2), Named("a/list.json", "a/images", "image"), Need("a/c.txt")),
        licence="-",
    )
    assert [line.split(" is ")[1] for line in recipe.missing(source, tmp_path)] == ["not there"] * 3
    (tmp_path / "a/images").mkdir(parents=True)
    (tmp_path / "a/images/1.jpg").touch()
    (tmp_path / "a/c.txt").touch()
    (tmp_path / "a/list.json").write_text(json.dumps([{"image": "1.jpg"}, {"image": "2.jpg"}]))
    assert recipe.missing(source, tmp_path) == [
        "a/images holds 1 of 2 images",
        "1 of 2 images that a/list.json names are not below a/images",
    ]
    (tmp_path / "a/images/2.jpg").touch()
    assert recipe.missing(source, tmp_path) == []


def test_image_list(tmp_path: Path) -> None:
    listing = ImageList("l.csv", (("pos_url", "pos_id"), ("neg_url", "neg_id")), "images")
    text = "pos_url,neg_url,pos_id,neg_id\nhttp://a, http://b,1,2\nhttp://a,http://c,1,3\n"
    (tmp_path / "l.csv").write_text(text)
    found = dict(recipe.image_addresses(listing, tmp_path))
    assert found == {"1": "http://a", "2": "http://b", "3": "http://c"}
    (tmp_path / "l.csv").write_text(text + "http://a,http://b,../../x,4\n")
    with pytest.raises(InputError, match=r"l\.csv, line 4: image id '\.\./\.\./x' must be"):
        list(recipe.image_addresses(listing, tmp_path))
    (tmp_path / "l.csv").write_text("pos_url,pos_id\n")
    with pytest.raises(InputError, match="no column neg_id, neg_url"):
        list(recipe.image_addresses(listing, tmp_path))


def test_command_line() -> None:
    assert options.with_tasks(["pets", "svo", "--data", "D"]) == [
        "--tasks",
        "pets",
        "svo",
        "--data",
        "D",
    ]
    assert options.with_tasks(["--data", "D"]) == ["--data", "D"]
    assert options.with_tasks([]) == []


def test_options_are_checked_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        prepare.run(
            DataConfig(
                tasks=["pest"], data="s3://b/x", per_host=0, proxy="http://me:secret@proxy:1"
            )
        )
    for word in ("did you mean 'pets'", "must be a folder", "--per-host 0", "--proxy"):
        assert word in str(caught.value)
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="name what to fetch: all, or some of winoground"):
        prepare.run(DataConfig(data=str(tmp_path)))


HUB = Hub(
    "org/set",
    ("data/*",),
    (Rule(r"(data/(?:e\.jsonl|images\.zip))", r"hub/\1"),),
    archives=("hub/data/images.zip",),
    rules=(Rule(r"(?:.*/)?([^/]+\.png)", r"hub/images/\1"),),
    unpacked=1000,
    gated=True,
)
HUB_SOURCE = DatasetRecipe((HUB,), (Need("hub/data/e.jsonl"), Need("hub/images", 2)), "-")


def test_hub_files_are_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def snapshot(repo: str, *, local_dir: Path, **more: Any) -> None:
        calls.append((repo, more))
        (local_dir / "data").mkdir(parents=True)
        (local_dir / "data/e.jsonl").write_text("{}")
        (local_dir / "data/other").write_text("not wanted")
        zipped(local_dir / "data/images.zip", {"images/a.png": b"1", "images/b.png": b"2"})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(sources, "SOURCES", {"hub": HUB_SOURCE})
    for _ in range(2):
        prepare.run(DataConfig(tasks=["hub"], data=str(tmp_path)))
    assert not (tmp_path / ".prepare/hub/org__set").exists()
    assert calls == [("org/set", {"repo_type": "dataset", "allow_patterns": ["data/*"]})]
    placed = [p for p in (tmp_path / "hub").rglob("*") if p.is_file()]
    assert sorted(p.name for p in placed) == ["a.png", "b.png", "e.jsonl"]
    assert "hub         complete" in capsys.readouterr().out


def test_hub_files_brought_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All there: the Hub is not asked. Some there: nothing of them is replaced or deleted."""

    def snapshot(repo: str, *, local_dir: Path, **_: Any) -> None:
        (local_dir / "data").mkdir(parents=True, exist_ok=True)
        (local_dir / "data/e.jsonl").write_text("{}")
        zipped(local_dir / "data/images.zip", {"images/a.png": b"1", "images/b.png": b"2"})

    monkeypatch.setattr(sources, "SOURCES", {"hub": HUB_SOURCE})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "hub/data").mkdir(parents=True)
    (tmp_path / "hub/data/e.jsonl").write_text("my own notes")
    (tmp_path / "hub/data/images.zip").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"e\.jsonl is there with 12 bytes instead of 2: move it"):
        prepare.run(DataConfig(tasks=["hub"], data=str(tmp_path)))
    assert (tmp_path / "hub/data/e.jsonl").read_text() == "my own notes"
    (tmp_path / "hub/images").mkdir(exist_ok=True)
    for name in "ab":
        (tmp_path / "hub/images" / f"{name}.png").write_bytes(b"whole")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    prepare.run(DataConfig(tasks=["hub"], data=str(tmp_path)))
    assert (tmp_path / "hub/data/images.zip").read_bytes() == b"mine"


def test_list_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes("id,url\n1,é\n".encode("latin-1"))
    listing = ImageList("l.csv", (("url", "id"),), "images")
    with pytest.raises(InputError, match=r"l\.csv: not UTF-8"):
        list(recipe.image_addresses(listing, tmp_path))


def test_gated_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message says what to accept and which variable to set; a token is in no output."""

    def refuse(*_: Any, **__: Any) -> None:
        raise GatedRepoError.__new__(GatedRepoError)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("connection with hf_secret failed")

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(sources, "SOURCES", {"hub": HUB_SOURCE})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match="not complete"):
        prepare.run(DataConfig(tasks=["hub"], data=str(tmp_path)))
    shown = capsys.readouterr().out
    assert "accept its terms at https://huggingface.co/datasets/org/set" in shown
    assert "HF_TOKEN" in shown
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError) as caught:
        prepare.run(DataConfig(tasks=["hub"], data=str(tmp_path)))
    shown = capsys.readouterr().out + str(caught.value)
    assert "connection with *** failed" in shown
    assert "hf_secret" not in shown


def test_a_second_run_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        prepare._locked(tmp_path),
        pytest.raises(InputError, match=r"another run of prepare works"),
        prepare._locked(tmp_path),
    ):
        pass


def test_nodes_that_do_not_share_the_folder(tmp_path: Path) -> None:
    reach = fetch_on_ray.Reach(str(tmp_path), str(tmp_path / "marker"), False, None)
    with pytest.raises(InputError, match="not every node of the cluster sees this folder"):
        reach.open()


def test_classes_from_file_names(tmp_path: Path) -> None:
    (tmp_path / "pets" / "images").mkdir(parents=True)
    for name in ("Egyptian_Mau_1.jpg", "Egyptian_Mau_2.jpg", "american_bulldog_10.jpg"):
        (tmp_path / "pets" / "images" / name).touch()
    assert status.write_classes(tmp_path)
    assert not status.write_classes(tmp_path)
    made = tmp_path / "pets" / "classes.txt"
    assert made.read_text() == "american bulldog\negyptian mau\n"
    step = next(s for s in sources.SOURCES["pets"].steps if s.to == "pets/classes.txt")
    assert whole(step, tmp_path)  # the next run takes it for its own


def test_what_counts_as_there(tmp_path: Path) -> None:
    """Images by their ending, in all folders that fit; as many as needed are enough."""
    source = DatasetRecipe((), (Need("a/*/images", 3),), "-")
    for name in ("x/images/1.JPG", "x/images/.2.jpg", "x/images/3.txt", "y/images/4.jpeg"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).touch()
    assert recipe.missing(source, tmp_path) == ["a/*/images holds 2 of 3 images"]
    (tmp_path / "a/y/images/5.png").touch()
    assert recipe.missing(source, tmp_path) == []
    (tmp_path / "f").write_text("")
    assert recipe.missing(DatasetRecipe((), (Need("f", 99),), "-"), tmp_path) == []


def test_names_in_an_annotation_file(tmp_path: Path) -> None:
    """Its keys, without the beginning that is no part of the path; below the data root too."""
    named = DatasetRecipe((), (Named("l.json", "", cut="data/"),), "-")
    (tmp_path / "l.json").write_text('\ufeff{"data/1.jpg": 0, "2.jpg": 0, "data/2.jpg": 0}')
    (tmp_path / "1.jpg").touch()
    told = "2 of 3 images that l.json names are not below the data root"
    assert recipe.missing(named, tmp_path) == [told]
    (tmp_path / "2.jpg").touch()
    assert recipe.missing(named, tmp_path) == []
    (tmp_path / "l.json").write_text('[{"image": "1.jpg"}, {}]')
    field = DatasetRecipe((), (Named("l.json", "", "image"),), "-")
    assert recipe.missing(field, tmp_path)[0].startswith("l.json cannot be read: KeyError")


LISTED = DatasetRecipe((ImageList("svo/l.csv", (("url", "id"),), "svo/images"),), (), "free")


def test_a_list_of_images_is_complete_but_for_dead_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is there (though its link died since), one is dead, one is left to fetch."""
    folder = tmp_path / "svo" / "images"
    folder.mkdir(parents=True)
    (tmp_path / "svo/l.csv").write_text("url,id\nu1,1\nu2,2\nu3,3\n")
    (folder / "1.jpg").write_bytes(b"12345")
    (tmp_path / "svo/dead_links.csv").write_text(
        "url,image_id,reason,when\nu1,1,404,t\nu2,2,404,t\n"
    )
    lacking, line, gone = status.lacking_images(LISTED, tmp_path)
    assert lacking == ["1 images were not fetched yet: run the same command again"]
    assert (line, gone) == ("1 of 3 images, 1 dead links (svo/dead_links.csv)", 1)
    with pytest.raises(InputError, match=r"not complete\n  svo: 1 images were not fetched yet"):
        status.report({"svo": LISTED}, [], tmp_path)
    assert "svo         incomplete" in capsys.readouterr().out
    (folder / "3.jpg").write_bytes(b"1")
    with pytest.raises(Incomplete, match=r"^1 images have dead links"):
        status.report({"svo": LISTED}, [], tmp_path)
    (folder / "2.jpg").write_bytes(b"1")
    status.report({"svo": LISTED}, [], tmp_path)
    assert "svo         complete           0.0 MB  3 of 3 images" in capsys.readouterr().out


def test_a_failed_step_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of its own data set alone; what the user must do comes last and is the error."""
    one = DatasetRecipe((Download("one/f", ("u",)),), (), "free")
    two = DatasetRecipe((Download("two/f", ("u",)),), (Need("two/f"),), "free", "ask the authors")
    outcomes = [status.Outcome("one/f", False, "404"), status.Outcome("two/f", True, "there")]
    with pytest.raises(InputError) as raised:
        status.report({"one": one, "two": two}, outcomes, tmp_path)
    assert str(raised.value) == ("not complete\n  one: one/f: 404\n  two: by hand: ask the authors")
    printed = capsys.readouterr().out
    assert "    one/f: 404\n" in printed and "    two/f is not there\n" in printed
