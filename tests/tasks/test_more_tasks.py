"""The other readers on files of the published form, on malformed ones and on the authors' excerpts."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffitm.core.images import split_crop
from diffitm.core.schema import Example
from diffitm.metrics.credit import LOST, Credit
from diffitm.metrics.figures import Decision, Figure
from diffitm.tasks.aro import LEAST_CASES, SYMMETRIC
from diffitm.tasks.base import Task
from diffitm.tasks.flickr30k import Flickr30kImage
from diffitm.tasks.registry import find_task
from tests.tasks.test_tasks import BY_CAPTION, BY_IMAGE, failure, put

SETS = {
    "open-images-12_ab": {"7": "the left one", "0": "the right one"},
    "MSR-VTT-video7-shot1_0": {"9": "the last frame"},
    "open-images-3_cd": {"2": "no. 2"},
}
SVO_FIELDS = (
    "pos_url,neg_url,pos_image_id,neg_image_id,sentence,pos_triplet,neg_triplet,"
    "subj_neg,verb_neg,obj_neg"
).split(",")
PROBES = [
    [
        "http://a",
        "http://b",
        "10",
        "11",
        "A girl, standing.",
        "g,s,",
        "d,s,",
        "True",
        "False",
        "False",
    ],
    [
        "http://a",
        "http://c",
        "10",
        "12",
        'A man says "hi".',
        "m,s,",
        "m,r,",
        "False",
        "True",
        "False",
    ],
    ["http://d", "http://e", "13", "14", "A car passes.", "c,p,", "c,h,", "False", "False", "True"],
    ["http://f", "http://g", "15", "11", "A dog barks.", "d,b,", "c,b,", "TRUE", "false", "0"],
]
SVO_ROWS = [
    {"pos_id": "0.jpg", "neg_id": "1.jpg", "sentence": "Girl stands.", "neg_type": "subj"},
    {"pos_id": "6.jpg", "neg_id": "7.png", "sentence": "A car passes.", "neg_type": "verb"},
    {"pos_id": "8.jpg", "neg_id": "9.jpg", "sentence": "A cat eats.", "neg_type": "obj"},
]
VG_ROW = {
    "image_path": "2.jpg",
    "bbox_x": 10,
    "bbox_y": 20,
    "bbox_w": 300,
    "bbox_h": 40,
    "true_caption": "the dog is on the bed",
    "false_caption": "the bed is on the dog",
    "relation_name": "on",
    "attributes": ["white", "brown"],
}
KARPATHY = [
    {"image": "val2014/1.jpg", "caption": ["A black dog chases the cat, in a park.", "Dog!"]},
    {"image": "val2014/2.jpg", "caption": ["Two men play on the grass"]},
]
MMVP = [
    ["Question ID", "Type", "Statement"],
    ["1", "Camera Perspective", "a dog, seen from above"],
    ["2", "Camera Perspective", "a dog seen from the front"],
    ["3", "Color", 'a "red" car'],
    ["4", "Color", "a blue car"],
]
NEG_FIELDS = ["", "title", "filepath", "neg_caption", "neg_image"]
NEG_LINES = [
    ["0", "A child.", "coco/val2014/0.jpg", "['A \"yak\".', 'No child.']", "[99, 0, 2, 1]"],
    ["1", "A man's hat.", "coco/val2014/1.jpg", '["A hat\'s man."]', "[5, -1]"],
    ["2", "A man.", "coco/val2014/0.jpg", "['A man.']", "[0, 2]"],
    ["3", "A cup.", "coco/val2014/3.jpg", "[]", "[]"],
]
VG = ("vg_relation", "vg_attribution")
ORDER = {
    "coco_order": "coco/coco_karpathy_test.json",
    "flickr30k_order": "flickr30k/flickr30k_val.json",
}
FILES = {
    "imagecode": "imagecode/valid_data.json",
    "imagecode_video": "imagecode/valid_data.json",
    "svo_subj": "svo/svo_probes.csv",
    "pets": "pets/classes.txt",
    "vg_relation": "aro/visual_genome_relation.json",
    "vg_attribution": "aro/visual_genome_attribution.json",
    **ORDER,
    "mmvp_vlm": "mmvp_vlm/Questions.csv",
    "coco_neg_text": "coco_neg/valid_neg_clip.tsv",
    "coco_neg_image": "coco_neg/valid_neg_clip.tsv",
    "flickr30k_variance": "flickr30k/val_top10_RN50x64.json",
}
RN50 = "flickr30k/val_top10_RN50x64"


def table(lines: Iterable[Iterable[str]], delimiter: str = ",", end: str = "\n") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows(lines)
    return out.getvalue()


def probes(lines: list[list[str]]) -> str:
    return table([SVO_FIELDS, *lines])


def negatives(lines: list[list[str]]) -> str:
    return table([NEG_FIELDS, *lines], "\t")


def read(root: Path, name: str) -> list[Example]:
    examples = list(find_task(name)().examples(str(root)))
    assert len({example.id for example in examples}) == len(examples)
    return examples


def decisions(task: Task, lines: Iterable[tuple[Example, Credit | None]]) -> list[Decision]:
    """What became of examples of a task with one metric."""
    return [
        Decision(
            example.cluster,
            example.groups,
            task.chance(example),
            None if credit is None else dict.fromkeys(task.chance(example), credit),
            credit is None,
        )
        for example, credit in lines
    ]


def by_name(figures: Iterable[Figure]) -> dict[tuple[str, str], Figure]:
    return {(figure.group, figure.metric): figure for figure in figures}


def test_imagecode(tmp_path: Path) -> None:
    """Static sets alone; ten images by number, the described one is gold, its set the cluster."""
    put(tmp_path, FILES["imagecode"], SETS)
    examples = read(tmp_path, "imagecode")
    assert [example.id for example in examples] == [
        "open-images-12_ab/7",
        "open-images-12_ab/0",
        "open-images-3_cd/2",
    ]
    folder = "imagecode/image-sets/open-images-12_ab"
    assert examples[0] == Example(
        id="open-images-12_ab/7",
        images=tuple(f"{folder}/img{k}.jpg" for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)),
        texts=("the left one",),
        direction="image",
        gold=7,
        cluster="open-images-12_ab",
        groups={"kind": "static"},
    )
    assert examples[0].needs_unconditional


def test_imagecode_video_holds_all_sets(tmp_path: Path) -> None:
    """Static ones as in the other task, frames of videos as a group of their own."""
    put(tmp_path, FILES["imagecode"], SETS)
    examples = read(tmp_path, "imagecode_video")
    static = [example for example in examples if example.groups == {"kind": "static"}]
    assert static == read(tmp_path, "imagecode")
    (video,) = [example for example in examples if example.groups == {"kind": "video"}]
    assert (video.id, video.gold, video.texts) == (
        "MSR-VTT-video7-shot1_0/9",
        9,
        ("the last frame",),
    )


def test_imagecode_credits() -> None:
    """The gold's place decides: rank 4 is R@5 alone; chance is 1 and 5 of 10."""
    task = find_task("imagecode")()
    example = Example("0", tuple("abcdefghij"), ("x",), "image", gold=7)
    scores = np.array([9.0, 8, 7, 1, 1, 1, 1, 6, 1, 1])[:, None]
    found = {name: credit.value for name, credit in task.credits(example, scores).items()}
    assert found == {"R@1": 0.0, "R@5": 1.0}
    assert task.chance(example) == {"R@1": 0.1, "R@5": 0.5}


SVO_IN_BOTH = [
    ("svo_subj", [0, 3], [0]),
    ("svo_verb", [1], [1]),
    ("svo_obj", [2], [2]),
]


@pytest.mark.parametrize(("name", "lines", "_"), SVO_IN_BOTH)
def test_svo_probes(tmp_path: Path, name: str, lines: list[int], _: Any) -> None:
    """The csv form: rows of the kind, images <id>.jpg, the right one first and the cluster."""
    put(tmp_path, FILES["svo_subj"], probes(PROBES))
    assert read(tmp_path, name) == [
        Example(
            id=str(i),
            images=(f"svo/images/{PROBES[i][2]}.jpg", f"svo/images/{PROBES[i][3]}.jpg"),
            texts=(PROBES[i][4],),
            direction="image",
            gold=0,
            cluster=f"{PROBES[i][2]}.jpg",
        )
        for i in lines
    ]


@pytest.mark.parametrize(("name", "_", "lines"), SVO_IN_BOTH)
def test_svo_rows(tmp_path: Path, name: str, _: Any, lines: list[int]) -> None:
    """The json form: image files as they are named."""
    put(tmp_path, "svo/svo.json", SVO_ROWS)
    found = read(tmp_path, name)
    rows = [SVO_ROWS[i] for i in lines]
    assert [example.texts for example in found] == [(row["sentence"],) for row in rows]
    assert [example.images for example in found] == [
        (f"svo/images/{row['pos_id']}", f"svo/images/{row['neg_id']}") for row in rows
    ]
    assert {(e.direction, e.gold) for e in found} == {("image", 0)}
    assert all(example.needs_unconditional for example in found)


def test_svo_prefers_the_probes(tmp_path: Path) -> None:
    """The csv file is the whole benchmark, the json file an excerpt."""
    put(tmp_path, "svo/svo.json", SVO_ROWS)
    put(tmp_path, FILES["svo_subj"], probes(PROBES))
    assert len(read(tmp_path, "svo_subj")) == 2


def test_svo_columns_in_another_order(tmp_path: Path) -> None:
    """Columns are read by name, others are ignored, with either line end."""
    put(tmp_path, FILES["svo_subj"], probes(PROBES))
    expected = read(tmp_path, "svo_subj")
    turned = [[str(i), *line[::-1]] for i, line in enumerate([SVO_FIELDS, *PROBES])]
    put(tmp_path, FILES["svo_subj"], table(turned, end="\r\n").encode())
    assert read(tmp_path, "svo_subj") == expected


def test_pets(tmp_path: Path) -> None:
    """By file name, all classes as prompts in the file's order, names of several words too."""
    put(tmp_path, FILES["pets"], "maine coon\r\nabyssinian\r\n\r\n  pug \r\n")
    for file in ("pug_10.jpg", "Maine_Coon_191.jpg", "Abyssinian_2.jpg", "Abyssinian_2.mat"):
        put(tmp_path, f"pets/images/{file}", b"image")
    prompts = ("a photo of a maine coon", "a photo of a abyssinian", "a photo of a pug")
    assert read(tmp_path, "pets") == [
        Example(file, (f"pets/images/{file}",), prompts, "text", gold, cluster=file)
        for file, gold in (("Abyssinian_2.jpg", 1), ("Maine_Coon_191.jpg", 0), ("pug_10.jpg", 2))
    ]


def test_pets_of_an_unknown_class(tmp_path: Path) -> None:
    """It costs its image; what systems leave there is none, and endings are those of any image."""
    put(tmp_path, FILES["pets"], "pug\n")
    for name in (
        "Great_Dane_3.jpg",
        "pug_1.JPG",
        "pug_2.webp",
        "._pug_1.jpg",
        ".DS_Store",
        "pug.mat",
    ):
        put(tmp_path, f"pets/images/{name}", b"image")
    lost, *pugs = read(tmp_path, "pets")
    assert (lost.id, lost.failure) == (
        "Great_Dane_3.jpg",
        "its class 'great dane' is not a line of classes.txt",
    )
    assert [(pug.id, pug.failure) for pug in pugs] == [("pug_1.JPG", None), ("pug_2.webp", None)]


@pytest.mark.parametrize(
    ("name", "group"),
    [("vg_relation", {"relation": "on"}), ("vg_attribution", {"attributes": "white_brown"})],
)
def test_visual_genome(tmp_path: Path, name: str, group: dict[str, str]) -> None:
    """The true caption first, the image cropped to the box and the cluster."""
    put(tmp_path, FILES[name], [VG_ROW, {**VG_ROW, "bbox_x": 0, "bbox_w": 7.0}])
    first, second = read(tmp_path, name)
    assert first == Example(
        id="0",
        images=("aro/images/2.jpg#xywh=10,20,300,40",),
        texts=("the dog is on the bed", "the bed is on the dog"),
        direction="text",
        gold=0,
        cluster="2.jpg",
        groups=group,
    )
    assert not first.needs_unconditional
    put(tmp_path, FILES[name], [{**VG_ROW, "bbox_x": 10.9, "bbox_h": 40.5, "bbox_w": 3.5}])
    (cut,) = read(tmp_path, name)  # as ARO's own int()
    assert split_crop(cut.images[0])[1] == (10, 20, 3, 40)
    assert split_crop(second.images[0]) == ("aro/images/2.jpg", (0, 20, 7, 40))


def test_aros_symmetric_relations() -> None:
    """Its notebook's 157, one a word apart from its neighbours; not those that it keeps."""
    assert len(SYMMETRIC) == 157
    listed = {"adjusting", "climbing", "close to", "near", "next to", "with", "of", "around"}
    listed |= {"parked in front of", "sitting next to", "on the other side of", "going down"}
    assert listed <= SYMMETRIC
    kept = {"on", "in", "behind", "in front of", "holding", "above", "to the left of", "wearing"}
    kept |= {"under", "below", "standing on", "eating", "riding", "to the right of"}
    assert not kept & SYMMETRIC
    assert all(name == name.strip() != "" and "  " not in name for name in SYMMETRIC)


def vg_figures(name: str, cases: dict[str, list[float | None]]) -> dict[tuple[str, str], Figure]:
    """Figures of a task from the credits of each of its groups; None could not be scored."""
    task = find_task(name)()
    lines = [
        (Example("0", ("a",), ("x", "y"), "text", cluster=f"{g}{i}", groups={task.key: g}), value)
        for g, values in cases.items()
        for i, value in enumerate(values)
    ]
    made = [(example, None if value is None else Credit(value)) for example, value in lines]
    return by_name(task.figures(decisions(task, made)))


def test_relations_with_symmetric_ones() -> None:
    """They count in the accuracy over all cases, not in ARO's mean over relations."""
    cases = {"on": [1.0, 1.0, 0.0], "near": [0.0] * 5, "behind": [1.0], "with": [0.0, None]}
    found = vg_figures("vg_relation", cases)
    assert list(found) == [
        ("all", "accuracy"),
        ("all", "macro accuracy"),
        ("relation=on", "accuracy"),
        ("relation=behind", "accuracy"),
    ]
    whole, macro = found["all", "accuracy"], found["all", "macro accuracy"]
    assert (whole.value, whole.n, whole.failures) == (3 / 10, 10, 1)
    assert (macro.value, macro.n, macro.failures) == (pytest.approx((2 / 3 + 1) / 2), 4, 0)
    assert whole.chance == macro.chance == 0.5


def test_attribute_pairs_with_few_cases() -> None:
    """25 cases are enough, 24 are not; both count in the accuracy over all cases."""
    cases = {"red_blue": [1.0] * LEAST_CASES, "old_wet": [0.0] * (LEAST_CASES - 1)}
    found = vg_figures("vg_attribution", cases)
    assert LEAST_CASES == 25
    assert found["all", "accuracy"].value == pytest.approx(25 / 49)
    assert found["all", "macro accuracy"].value == 1.0
    assert ("attributes=red_blue", "accuracy") in found
    assert ("attributes=old_wet", "accuracy") not in found
    only_few = vg_figures("vg_attribution", {"old_wet": [1.0]})
    assert only_few["all", "macro accuracy"].value is None
    assert only_few["all", "accuracy"].value == 1.0


@pytest.mark.parametrize("name", ORDER)
def test_order(tmp_path: Path, name: str) -> None:
    """The cleaned caption first, four orders of its words, one example a caption."""
    put(tmp_path, ORDER[name], KARPATHY)
    first, short, second = read(tmp_path, name)
    assert (first.id, first.cluster) == ("val2014/1.jpg/0", "val2014/1.jpg")
    assert (short.id, second.id) == ("val2014/1.jpg/1", "val2014/2.jpg/0")
    assert first.texts[0] == "a black dog chases the cat, in a park"
    assert len(first.texts) == len(second.texts) == 5
    for foil in first.texts[1:]:
        assert foil != first.texts[0]
        assert sorted(foil.split()) == sorted(first.texts[0].split())
    assert (first.direction, first.gold, first.groups) == ("text", 0, {})
    assert find_task(name)().chance(first) == {"P@1": 0.2}
    assert read(tmp_path, name) == [first, short, second]


def test_order_places(tmp_path: Path) -> None:
    """COCO's images as the file names them, Flickr30K's those of the retrieval tasks."""
    put(tmp_path, ORDER["coco_order"], KARPATHY)
    assert read(tmp_path, "coco_order")[0].images == ("coco/val2014/1.jpg",)
    for image in ("flickr30k-images/7.jpg", "7.jpg"):
        rows = [{"image": image, "caption": ["a dog in a park"]}]
        put(tmp_path, ORDER["flickr30k_order"], rows)
        assert read(tmp_path, "flickr30k_order")[0].images == ("flickr30k/images/7.jpg",)


@pytest.mark.parametrize("caption", ["Dog!", "a a a a", "...", ""])
def test_caption_without_another_order_is_a_failure(tmp_path: Path, caption: str) -> None:
    """Not an example with one candidate, which would always be right; it names the caption."""
    put(tmp_path, ORDER["coco_order"], [{"image": "1.jpg", "caption": [caption]}])
    (example,) = read(tmp_path, "coco_order")
    assert example.failure is not None
    assert repr(caption) in example.failure


def test_candidates_of_an_order_differ(tmp_path: Path) -> None:
    """Two kinds may draw one order: as two candidates they would have one score, and chance be
    more than 1 of n."""
    captions = ["the of", "under with from", "of dog with", "dog cat", "red big small"]
    put(tmp_path, ORDER["coco_order"], [{"image": "1.jpg", "caption": captions}])
    repeated = [e.texts for e in read(tmp_path, "coco_order") if len(set(e.texts)) < len(e.texts)]
    assert repeated == []


@pytest.mark.parametrize("folder", ["MLLM_VLM_Images", "MLLM_VLM Images"])
def test_mmvp(tmp_path: Path, folder: str) -> None:
    """Two rows a pair, under either folder name; prompts, pattern and images of the type."""
    put(tmp_path, FILES["mmvp_vlm"], table(MMVP))
    put(tmp_path, f"mmvp_vlm/{folder}/Color/3.jpg", b"image")
    first, second = read(tmp_path, "mmvp_vlm")
    assert first == Example(
        id="1-2",
        images=tuple(f"mmvp_vlm/{folder}/Camera Perspective/{k}.jpg" for k in (1, 2)),
        texts=("a photo of a dog, seen from above", "a photo of a dog seen from the front"),
        direction="both",
        cluster="1",
        groups={"pattern": "Camera Perspective"},
    )
    assert second.texts == ('a photo of a "red" car', "a photo of a blue car")
    assert first.needs_unconditional


@pytest.mark.parametrize("header", [["lorem", "ipsum", "dolor"], ["Statement", "id", "type"]])
def test_mmvp_columns_by_position(tmp_path: Path, header: list[str]) -> None:
    """The first line is the header whatever it says; other columns and empty lines do not matter."""
    put(tmp_path, FILES["mmvp_vlm"], table(MMVP))
    expected = read(tmp_path, "mmvp_vlm")
    lines = [[*line, "more"] for line in MMVP[1:]]
    text = table([header, *lines[:1], [], *lines[1:]], end="\r\n") + "\r\n"
    put(tmp_path, FILES["mmvp_vlm"], text.encode())
    assert read(tmp_path, "mmvp_vlm") == expected


@pytest.mark.parametrize(
    ("scores", "value"),
    [
        ([[2.0, 1.0], [1.0, 2.0]], 1.0),
        ([[3.0, 2.0], [2.9, 2.5]], 1.0),  # image 1 prefers the wrong statement, statements do not
        ([[3.0, 2.0], [0.0, 1.0]], 0.0),  # both images prefer their statement, statement 1 does not
        ([[1.0, 1.0], [1.0, 1.0]], 0.25),
    ],
)
def test_mmvp_credits(scores: list[list[float]], value: float) -> None:
    """A pair counts when both statements pick their image; scores are [image, statement]."""
    task, example = find_task("mmvp_vlm")(), Example("0", ("a", "b"), ("x", "y"), "both")
    assert task.credits(example, np.array(scores))["pair"].value == value
    assert task.chance(example) == {"pair": 0.25}


def test_coco_neg_text(tmp_path: Path) -> None:
    """The caption, then the first negative one; lines of one image share its cluster."""
    put(tmp_path, FILES["coco_neg_text"], negatives(NEG_LINES))
    examples = read(tmp_path, "coco_neg_text")
    assert examples[0] == Example(
        id="0",
        images=("coco/val2014/0.jpg",),
        texts=("A child.", 'A "yak".'),
        direction="text",
        gold=0,
        cluster="coco/val2014/0.jpg",
    )
    assert examples[1].texts == ("A man's hat.", "A hat's man.")
    assert examples[0].cluster == examples[2].cluster
    assert [example.failure is None for example in examples] == [True, True, False, False]


def test_coco_neg_image(tmp_path: Path) -> None:
    """The first negative line inside the file that is another image; without one a failure."""
    put(tmp_path, FILES["coco_neg_image"], negatives(NEG_LINES))
    examples = read(tmp_path, "coco_neg_image")
    assert examples[0] == Example(
        id="0",
        images=("coco/val2014/0.jpg", "coco/val2014/1.jpg"),  # not line 99, itself or line 2
        texts=("A child.",),
        direction="image",
        gold=0,
        cluster="coco/val2014/0.jpg",
    )
    assert [example.failure is None for example in examples] == [True, False, False, False]
    assert "[5, -1]" in str(examples[1].failure)


def test_flickr30k_without_sidecar(tmp_path: Path) -> None:
    """Where the list's origin is not told there is no figure as retrieved."""
    put(tmp_path, f"{RN50}.json", BY_CAPTION)
    examples = read(tmp_path, "flickr30k")
    assert {str(example.groups) for example in examples} == {"{}"}
    assert set(Flickr30kImage().chance(examples[0])) == {"R@1", "R@5"}


def tell(root: Path, file: str, info: dict[str, Any]) -> None:
    """What candidates.py writes beside a list."""
    digest = hashlib.sha256((root / f"{file}.json").read_bytes()).hexdigest()
    put(root, f"{file}.info.json", {**info, "sha256": digest})


def test_flickr30k_sidecar_of_another_list(tmp_path: Path) -> None:
    put(tmp_path, f"{RN50}.json", BY_CAPTION)
    tell(tmp_path, RN50, {"inserted": []})
    put(tmp_path, f"{RN50}.json", dict(list(BY_CAPTION.items())[:5]))
    assert "belongs to another list than val_top10" in failure(tmp_path, "flickr30k")


def test_flickr30k_where_queries_were_left_out(tmp_path: Path) -> None:
    """All captions, since the first retrieved one of an image is an easier one than its first."""
    put(tmp_path, f"{RN50}.json", BY_CAPTION)
    tell(tmp_path, RN50, {"inserted": [], "gold_inserted": False})
    assert len(read(tmp_path, "flickr30k")) == len(BY_CAPTION)


@pytest.mark.parametrize(
    ("name", "file", "lists"),
    [("flickr30k", RN50, BY_CAPTION), ("flickr30k_text", f"{RN50}_text", BY_IMAGE)],
)
def test_flickr30k_as_retrieved(tmp_path: Path, name: str, file: str, lists: Any) -> None:
    """A query whose right answer was put in is lost as retrieved, the others stay as they are."""
    queries = list(lists)[:: 5 if name == "flickr30k" else 1]
    put(tmp_path, f"{file}.json", lists)
    tell(tmp_path, file, {"inserted": [queries[1], "not asked"], "model": "x"})
    examples, task = read(tmp_path, name), find_task(name)()
    golds = [example.groups["gold"] for example in examples]
    assert golds == ["retrieved", "inserted", "retrieved"]
    best = np.arange(10.0, 0, -1)
    for example, reached in zip(examples, (1.0, 0.0, 1.0), strict=True):
        shape = (len(example.images), len(example.texts))
        found = task.credits(example, best.reshape(shape))
        assert {metric: credit.value for metric, credit in found.items()} == {
            "R@1": 1.0,
            "R@5": 1.0,
            "R@1 as retrieved": reached,
            "R@5 as retrieved": reached,
        }
        chance = {"R@1": 0.1, "R@5": 0.5}
        chance |= {"R@1 as retrieved": 0.1 * reached, "R@5 as retrieved": 0.5 * reached}
        assert task.chance(example) == chance
        assert set(task.credits(example, np.full(shape, np.nan)).values()) == {LOST}


def test_flickr30k_recall_ceiling(tmp_path: Path) -> None:
    """Its figures: a perfect scorer reaches the share of queries that were retrieved, no more."""
    put(tmp_path, f"{RN50}.json", BY_CAPTION)
    tell(tmp_path, RN50, {"inserted": ["caption 5"]})
    task, made = Flickr30kImage(), []
    for example in read(tmp_path, "flickr30k"):
        credits = task.credits(example, np.arange(10.0, 0, -1)[:, None])
        made.append(Decision(example.cluster, example.groups, task.chance(example), credits))
    found = by_name(task.figures(made))
    assert found["all", "R@1"].value == 1.0
    assert found["all", "R@1 as retrieved"].value == pytest.approx(2 / 3)
    assert found["all", "R@5 as retrieved"].chance == pytest.approx(1 / 3)
    assert found["gold=inserted", "R@1 as retrieved"].value == 0.0


def test_flickr30k_none_inserted(tmp_path: Path) -> None:
    """An empty list tells as much: each query was retrieved."""
    put(tmp_path, f"{RN50}.json", BY_CAPTION)
    tell(tmp_path, RN50, {"inserted": []})
    assert {e.groups["gold"] for e in read(tmp_path, "flickr30k")} == {"retrieved"}


@pytest.mark.parametrize(
    "info",
    ["{cut", "[]", "{}", '{"inserted": 3}', '{"inserted": [["a"]]}', '{"inserted": "caption 5"}'],
)
def test_malformed_sidecar(tmp_path: Path, info: str) -> None:
    """The message names the file and the list, a lone string is none."""
    put(tmp_path, f"{RN50}.json", BY_CAPTION)
    put(tmp_path, f"{RN50}.info.json", info)
    message = failure(tmp_path, "flickr30k")
    assert message.startswith(f"{tmp_path / RN50}.info.json: ")
    assert "'inserted' list of queries" in message


@pytest.mark.parametrize("name", FILES)
def test_missing_file(tmp_path: Path, name: str) -> None:
    """The message names the task and the very file, or both that would do."""
    put(tmp_path, "other/file", b"")
    message = failure(tmp_path, name)
    assert message.startswith(f"task {name} needs {tmp_path / FILES[name]}")
    assert ("svo.json" in message) == name.startswith("svo")


@pytest.mark.parametrize("name", [n for n, file in FILES.items() if file.endswith(".json")])
@pytest.mark.parametrize("content", ["[{", "", b"\xff\xfe\x00", '"text"', "3", "null"])
def test_no_json_of_the_form(tmp_path: Path, name: str, content: Any) -> None:
    """Cut off, empty, no text or of another type: the message names the file."""
    put(tmp_path, FILES[name], content)
    assert str(tmp_path / FILES[name]) in failure(tmp_path, name)


def without(row: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in fields}


def expect(root: Path, name: str, file: str, content: Any, expected: str) -> None:
    """The message names file, task, what is expected and what was found."""
    put(root, file, content)
    message = failure(root, name)
    assert message.startswith(f"{root / file}: task {name} expects ")
    assert expected in message
    assert "found " in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], "{set id: {image index: text}}"),
        ({"open-images-1": ["a"]}, "{image index: text}"),
        ({"open-images-1": "a"}, "{image index: text}"),
        *(
            ({"open-images-1": {index: "a"}}, "an image index below 10 and a text")
            for index in ("10", "-1", "img3", "", "1.0", "\u00b2")
        ),
        ({"open-images-1": {"1": ["a"]}}, "an image index below 10 and a text"),
        ({"open-images-1": {"1": None}}, "an image index below 10 and a text"),
    ],
)
def test_malformed_imagecode(tmp_path: Path, content: Any, expected: str) -> None:
    """Sets that are no tables; an index that is none, a superscript 2 among them; no text."""
    expect(tmp_path, "imagecode", FILES["imagecode"], content, expected)


PROBE = dict(zip(SVO_FIELDS, PROBES[0], strict=True))
IMAGE_IDS = ["pos_image_id", "neg_image_id"]


@pytest.mark.parametrize(
    "row",
    [
        *(without(PROBE, field) for field in ("sentence", "subj_neg", *IMAGE_IDS)),
        {**PROBE, "verb_neg": "True"},
        {**PROBE, "subj_neg": "False"},
        {**PROBE, "subj_neg": ""},
    ],
)
def test_malformed_svo_probes(tmp_path: Path, row: dict[str, str]) -> None:
    """A column that is not there, or other than one kind of negative."""
    expected = "sentence, pos_image_id, neg_image_id and one true of subj_neg, verb_neg, obj_neg"
    expect(tmp_path, "svo_obj", FILES["svo_subj"], table([row, row.values()]), expected)


@pytest.mark.parametrize("last", [["sentence"], IMAGE_IDS, ["obj_neg"]])
def test_svo_probes_cut_off(tmp_path: Path, last: list[str]) -> None:
    """A row that ends before its last columns, whichever those are: no image 'None.jpg'."""
    short = without(PROBE, *last)
    lines = [[*short, *last], short.values()]
    expect(tmp_path, "svo_subj", FILES["svo_subj"], table(lines), "columns in row 2")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a": 1}, "a list of rows"),
        (["x"], "sentence, pos_id, neg_id and a neg_type of subj, verb, obj"),
        *(
            ([row], "sentence, pos_id, neg_id and a neg_type of subj, verb, obj")
            for row in (
                *(without(SVO_ROWS[0], field) for field in SVO_ROWS[0]),
                {**SVO_ROWS[0], "neg_type": "adverb"},
                {**SVO_ROWS[0], "pos_id": 3},
            )
        ),
    ],
)
def test_malformed_svo_rows(tmp_path: Path, content: Any, expected: str) -> None:
    """No list, a field that is not there, an unknown kind, an image that is no file name."""
    expect(tmp_path, "svo_verb", "svo/svo.json", content, expected)


@pytest.mark.parametrize("name", VG)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"rows": [VG_ROW]}, "a list of rows"),
        ([["x"]], "the fields image_path, true_caption"),
        *(
            ([VG_ROW, without(VG_ROW, field)], "the fields image_path, true_caption")
            for field in without(VG_ROW, "relation_name", "attributes")
        ),
        ([without(VG_ROW, "relation_name", "attributes")], "bbox_h"),
        *(([{**VG_ROW, "bbox_w": w}], "bbox_w") for w in ("300", None, [300], math.nan, math.inf)),
    ],
)
def test_malformed_visual_genome(tmp_path: Path, name: str, content: Any, expected: str) -> None:
    """No list, a field that is not there, a side of the box that is no finite number."""
    expect(tmp_path, name, FILES[name], content, expected)


@pytest.mark.parametrize("attributes", ["white_brown", ["white"], None])
def test_malformed_attributes(tmp_path: Path, attributes: Any) -> None:
    """Other than a pair."""
    rows = [{**VG_ROW, "attributes": attributes}]
    expect(tmp_path, "vg_attribution", FILES["vg_attribution"], rows, "bbox_h, attributes")


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize(
    "content",
    [
        {"a": 1},
        ["x"],
        [{"image": "1.jpg"}],
        [{"image": "1.jpg", "caption": "a dog"}],
        [{"image": "1.jpg", "caption": []}],
        [{"image": "1.jpg", "caption": ["a dog", 1]}],
        [{"image": 1, "caption": ["a dog"]}],
    ],
)
def test_malformed_order(tmp_path: Path, name: str, content: Any) -> None:
    """No list, or rows without an image and a list of captions."""
    expect(tmp_path, name, ORDER[name], content, "{image, caption: [...]}")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (MMVP[:-1], "an even number of rows"),
        ([MMVP[0], MMVP[1], MMVP[3]], "one type for both of a pair"),
        ([*MMVP, ["5", "Color"], ["6", "Color"]], "id (a number), type, statement (one line)"),
        ([*MMVP, ["5", "", "x"], ["6", "", "x"]], "id (a number), type, statement (one line)"),
        ([*MMVP, ["5", "Color", "x\ny"], ["6", "Color", "x"]], "statement (one line)"),
        ([*MMVP, MMVP[1], MMVP[2]], "an odd id and the next, once"),
        ([MMVP[0], MMVP[2], ["3", MMVP[2][1], "x"]], "an odd id and the next, once"),
        (MMVP[1:], "a header"),
    ],
)
def test_malformed_mmvp(tmp_path: Path, lines: list[list[str]], expected: str) -> None:
    """A row without its other one, a pair of two patterns, a row without a statement."""
    expect(tmp_path, "mmvp_vlm", FILES["mmvp_vlm"], table(lines), expected)


@pytest.mark.parametrize("name", ["coco_neg_text", "coco_neg_image"])
@pytest.mark.parametrize(
    "line",
    [
        ["1", "A cup.", "1.jpg", "not a list", "[1]"],
        ["1", "A cup.", "1.jpg", "[1]", "[1]"],
        ["1", "A cup.", "1.jpg", "'one caption'", "[1]"],
        ["1", "A cup.", "1.jpg", "['a']", "1"],
        ["1", "A cup.", "1.jpg", "['a']", "['x']"],
        ["1", "A cup.", "1.jpg", "['a']", "'12'"],
        ["1", "A cup.", "", "['a']", "[1]"],
    ],
)
def test_malformed_coco_neg(tmp_path: Path, name: str, line: list[str]) -> None:
    """No list (a lone string is none), one of other things, columns missing, no image."""
    wanted = "title, filepath, neg_caption, neg_image, the last two Python lists"
    expect(tmp_path, name, FILES[name], negatives([NEG_LINES[0], line]), wanted)


def test_csv_that_is_none(tmp_path: Path) -> None:
    """A quote that is never closed, in a file larger than csv takes for one field."""
    for name in ("mmvp_vlm", "svo_subj", "coco_neg_text"):
        mark = "\t" if name == "coco_neg_text" else ","
        text = f'a{mark}b\n1{mark}"' + "x\n" * 100_000
        put(tmp_path, FILES[name], text.encode())
        assert "not CSV" in failure(tmp_path, name)


def test_coco_neg_short_line(tmp_path: Path) -> None:
    line = ["1", "A cup.", "1.jpg", "['a']"]
    expect(
        tmp_path,
        "coco_neg_text",
        FILES["coco_neg_text"],
        negatives([NEG_LINES[0], line]),
        "5 columns",
    )


def test_coco_neg_second_negative(tmp_path: Path) -> None:
    """A first negative that is the caption itself is passed over."""
    line = ["0", "A cup.", "1.jpg", "['A cup.', 'A cap.']", "[]"]
    put(tmp_path, FILES["coco_neg_text"], negatives([line]).encode())
    assert read(tmp_path, "coco_neg_text")[0].texts == ("A cup.", "A cap.")


def test_coco_neg_with_commas(tmp_path: Path) -> None:
    """Separated by something else, no column is found."""
    file = FILES["coco_neg_text"]
    expect(tmp_path, "coco_neg_text", file, table([NEG_FIELDS, *NEG_LINES]), "title, filepath")


@pytest.mark.parametrize("candidates", [[], "a.jpg", [1], {}])
def test_malformed_variance_lists(tmp_path: Path, candidates: Any) -> None:
    """The retrieval list that it takes its captions from."""
    file = FILES["flickr30k_variance"]
    expect(tmp_path, "flickr30k_variance", file, {"c": candidates}, "a list of strings")


def test_published_imagecode(published: Path) -> None:
    """Each description of a set once, the static ones apart; golds as the file's keys say."""
    root = published / "annotations"
    raw = json.loads((root / FILES["imagecode"]).read_text())
    everything = {f"{key}/{k}": text for key, texts in raw.items() for k, text in texts.items()}
    found = read(root, "imagecode_video")
    assert {example.id: example.texts[0] for example in found} == everything
    assert all(example.id.endswith(f"/{example.gold}") for example in found)
    static = {example.id for example in read(root, "imagecode")}
    assert static == {key for key in everything if key.startswith("open-images")}
    assert 0 < len(static) < len(everything)


def test_published_svo(published: Path) -> None:
    """The three rows as distributed: two subjects, a verb, no object."""
    found = {k: read(published / "annotations", f"svo_{k}") for k in ("subj", "verb", "obj")}
    assert {kind: len(examples) for kind, examples in found.items()} == {
        "subj": 2,
        "verb": 1,
        "obj": 0,
    }
    (verb,) = found["verb"]
    assert verb.images == ("svo/images/6.jpg", "svo/images/7.jpg")


def test_published_pets(published: Path, tmp_path: Path) -> None:
    """37 classes, each found again from a file name as the Pets archive has it."""
    classes = (published / "annotations" / FILES["pets"]).read_text()
    put(tmp_path, FILES["pets"], classes)
    names = classes.split("\n")[:37]
    for name in names:
        put(tmp_path, f"pets/images/{name.title().replace(' ', '_')}_1.jpg", b"image")
    examples = read(tmp_path, "pets")
    assert len(examples) == len(set(names)) == 37
    assert sorted(example.gold for example in examples) == list(range(37))
    for example in examples:
        breed = example.id.removesuffix("_1.jpg").replace("_", " ").lower()
        assert example.texts[example.gold] == f"a photo of a {breed}"
        assert find_task("pets")().chance(example) == {"accuracy": 1 / 37}


def test_published_coco_neg(published: Path) -> None:
    """All lines as texts; each negative image lies outside of the excerpt, so none can be scored."""
    root = published / "annotations"
    texts, images = read(root, "coco_neg_text"), read(root, "coco_neg_image")
    assert len(texts) == len(images) == 20
    assert {(len(e.texts), e.failure, e.images[0][:13]) for e in texts} == {
        (2, None, "coco/val2014/")
    }
    assert all(example.failure is not None for example in images)


def test_published_flickr30k_variance(published: Path) -> None:
    """Every fifth of the excerpt's captions, all with all their images."""
    root = published / "annotations"
    queries = read(root, "flickr30k")
    examples = read(root, "flickr30k_variance")
    assert len(examples) == len({query.images[0] for query in queries}) ** 2 > 1
    right = {(query.images[0], query.texts[0]) for query in queries}
    diagonal = [e for e in examples if e.groups["image"] == e.groups["text"]]
    assert {(example.images[0], example.texts[0]) for example in diagonal} == right
