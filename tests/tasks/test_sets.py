"""The sets beyond GDBench on files of the published form, ours against a plain open_clip loop, and wrong
ones. The plain readers below are written apart from ours, after the authors' loaders."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from scipy import stats

import diffitm
from diffitm.commands.gdbench import GdbenchConfig, run
from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.evaluation.evaluate import evaluate
from diffitm.metrics.figures import Decision
from diffitm.metrics.intervals import jackknife
from diffitm.metrics.pairwise import agreement_intervals, pairwise_accuracy
from diffitm.models.clip import SHAPES
from diffitm.shapes.language import full
from diffitm.shapes.layouts import write_world
from diffitm.shapes.sets import foils, write_sets
from diffitm.shapes.world import sample_scene
from diffitm.store import pair_table
from diffitm.store.score_store import open_store
from diffitm.sweep.score_settings import read_errors
from diffitm.tasks.base import PairTask, RetrievalTask
from diffitm.tasks.check import check
from diffitm.tasks.groups import GROUPS
from diffitm.tasks.registry import GDBENCH, SETS, SUITES, TASKS, find_task, named
from tests.tiny import score_row, write_scores

Rule = Callable[[np.ndarray], dict[str, bool]]


class Item(NamedTuple):
    """What a published loader gives, and what is right of its scores [images, texts]."""

    images: list[Image.Image]
    texts: list[str]
    rule: Rule


def choose(right: int = 0) -> Rule:
    return lambda s: {"accuracy": bool(s.ravel()[right] > np.delete(s.ravel(), right).max())}


def triple(s: np.ndarray) -> dict[str, bool]:
    text = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
    image = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
    return {"text": bool(text), "image": bool(image), "group": bool(text and image)}


def cola_triple(s: np.ndarray) -> dict[str, bool]:
    found = triple(s)
    return {"image": found["image"], "text (ours)": found["text"], "group (ours)": found["group"]}


def picture(path: Path) -> Image.Image:
    if path.suffix == ".npy":
        return Image.fromarray(np.load(path)[:, :, [2, 1, 0]])
    return Image.open(path).convert("RGB")


def loaded(path: Path) -> Any:
    return json.loads(path.read_text())


def sugarcrepe(root: Path) -> Iterator[Item]:
    for file in sorted((root / "sugarcrepe/data").iterdir()):
        for row in loaded(file).values():
            texts = [row["caption"], row["negative_caption"]]
            yield Item([picture(root / "coco/val2017" / row["filename"])], texts, choose())


def sugarcrepe_pp(root: Path) -> Iterator[Item]:
    def rule(s: np.ndarray) -> dict[str, bool]:
        return {"accuracy": bool(s[0, 0] > s[0, 2] and s[0, 1] > s[0, 2])}

    for file in sorted((root / "sugarcrepe_pp/data").iterdir()):
        for row in loaded(file):
            texts = [row["caption"], row["caption2"], row["negative_caption"]]
            yield Item([picture(root / "coco/val2017" / row["filename"])], texts, rule)


def whatsup(name: str) -> Callable[[Path], Iterator[Item]]:
    def read(root: Path) -> Iterator[Item]:
        for row in loaded(root / f"whatsup/{name}.json"):
            path = root / "whatsup" / row["image_path"].removeprefix("data/")
            yield Item([picture(path)], row["caption_options"], choose())

    return read


def spatial(name: str, form: str) -> Callable[[Path], Iterator[Item]]:
    def read(root: Path) -> Iterator[Item]:
        for number, right, wrong in loaded(root / f"whatsup/{name}.json"):
            yield Item([picture(root / form.format(number))], [right, wrong], choose())

    return read


def valse(root: Path) -> Iterator[Item]:
    places = {path.name: path for path in root.rglob("*.jpg")}
    for file in sorted((root / "valse/data").iterdir()):
        for row in loaded(file).values():
            if row["mturk"]["caption"] >= 2:
                texts = [row["caption"], row["foil"]]
                yield Item([picture(places[row["image_file"]])], texts, choose())


def cola(root: Path) -> Iterator[Item]:
    for one, first, two, second in loaded(
        root / "cola/data/COLA_multiobjects_matching_benchmark.json"
    ):
        images = [picture(root / "cola/images" / url.split("/")[-1]) for url in (one, two)]
        yield Item(images, [first, second], cola_triple)


def colorswap(root: Path) -> Iterator[Item]:
    with zipfile.ZipFile(root / "colorswap/data/images.zip") as archive:
        for row in loaded(root / "colorswap/data/test.json"):
            images = [Image.open(archive.open(row[f"image_{k}"])).convert("RGB") for k in (1, 2)]
            yield Item(images, [row["caption_1"], row["caption_2"]], triple)


def eqben(file: str, folder: str) -> Callable[[Path], Iterator[Item]]:
    def read(root: Path) -> Iterator[Item]:
        for row in loaded(root / "eqben" / file):
            images = [picture(root / "eqben" / folder / row[f"image{k}"]) for k in (0, 1)]
            yield Item(images, [row["caption0"], row["caption1"]], triple)

    return read


def embedded(folder: str, *names: str) -> Callable[[Path], Iterator[Item]]:
    def read(root: Path) -> Iterator[Item]:
        for file in sorted((root / folder / "data").iterdir()):
            for row in parquet.read_table(file).to_pylist():
                images = [Image.open(io.BytesIO(row[n]["bytes"])).convert("RGB") for n in names[:2]]
                yield Item(images, [row[n] for n in names[2:]], triple)

    return read


def naturalbench(root: Path) -> Iterator[Item]:
    top = root / "NaturalBench-Retrieval"
    for row in loaded(top / "metadata.json"):
        images = [picture(top / row[f"image_{k}"]) for k in (0, 1)]
        yield Item(images, [row["caption_0"], row["caption_1"]], triple)


def spec_i2t(root: Path) -> Iterator[Item]:
    for file in sorted((root / "spec/data").glob("*/image2text.json")):
        for row in loaded(file):
            yield Item([picture(file.parent / row["query"])], row["keys"], choose(row["label"]))


def spec_t2i(root: Path) -> Iterator[Item]:
    for file in sorted((root / "spec/data").glob("*/text2image.json")):
        for row in loaded(file):
            images = [picture(file.parent / name) for name in row["keys"]]
            yield Item(images, [row["query"]], choose(row["label"]))


def vl_checklist(root: Path) -> Iterator[Item]:
    top = root / "vl_checklist"
    for file in sorted((top / "data").rglob("*.json")):
        folder = next((name for name in ("hake", "swig") if name in file.stem), "vg")
        for path, texts in loaded(file):
            both = texts["POS"] + texts["NEG"]
            yield Item([picture(top / folder / path)], both, choose())


def genai_bench(root: Path) -> Iterator[Item]:
    for number, row in loaded(root / "genai_bench/genai_image.json").items():
        for generator in row["models"]:
            image = picture(root / "genai_bench" / generator / f"{number}.jpeg")
            yield Item([image], [row["prompt"]], lambda s: {})


def selfbench(root: Path) -> Iterator[Item]:
    for model in sorted((root / "selfbench/outputs/9").iterdir()):
        folders = sorted(model.iterdir())
        rows = [loaded(folder / "metadata.jsonl") for folder in folders]
        for folder, row in zip(folders, rows, strict=True):
            same = {r["prompt"]: None for r in rows if r["tag"] == row["tag"]}
            others = [t for t in row.get("candidates", same) if t != row["prompt"]]
            for k in (0, 1):
                image = picture(folder / "samples" / f"0000{k}.png")
                yield Item([image], [row["prompt"], *others], choose())


PLAIN: dict[str, Callable[[Path], Iterator[Item]]] = {
    "sugarcrepe": sugarcrepe,
    "sugarcrepe_pp": sugarcrepe_pp,
    "whatsup_a": whatsup("controlled_images_dataset"),
    "whatsup_b": whatsup("controlled_clevr_dataset"),
    "coco_spatial_one": spatial("coco_qa_one_obj", "coco/val2017/{:012d}.jpg"),
    "coco_spatial_two": spatial("coco_qa_two_obj", "coco/val2017/{:012d}.jpg"),
    "gqa_spatial_one": spatial("vg_qa_one_obj", "whatsup/vg_images/{}.jpg"),
    "gqa_spatial_two": spatial("vg_qa_two_obj", "whatsup/vg_images/{}.jpg"),
    "valse": valse,
    "cola": cola,
    "colorswap": colorswap,
    "eqben_mini": eqben("eqben_vllm/all_select.json", "eqben_vllm/images"),
    "eqben": eqben("ann.json", "images"),
    "bivlc": embedded("bivlc", "image", "negative_image", "caption", "negative_caption"),
    "vismin": embedded("vismin", "image_0", "image_1", "text_0", "text_1"),
    "naturalbench": naturalbench,
    "spec_i2t": spec_i2t,
    "spec_t2i": spec_t2i,
    "vl_checklist": vl_checklist,
    "genai_bench": genai_bench,
    "selfbench": selfbench,
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    write_sets(str(root), 10)
    return root


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(drawn, tmp_path / "root"))


@pytest.fixture(scope="module")
def plain_clip() -> Callable[[Item], np.ndarray]:
    """Cosines [images, texts] of the embedded CLIP, by open_clip alone."""
    folder = f"local-dir:{SHAPES / 'clip'}"
    model, preprocess = open_clip.create_model_from_pretrained(folder)
    tokenizer = open_clip.get_tokenizer(folder)

    @torch.inference_mode()
    def score(item: Item) -> np.ndarray:
        pixels = torch.stack([preprocess(image) for image in item.images])
        seen = torch.nn.functional.normalize(model.eval().encode_image(pixels), dim=-1)
        read = torch.nn.functional.normalize(model.encode_text(tokenizer(item.texts)), dim=-1)
        return (seen @ read.T).numpy()

    return score


@pytest.fixture(scope="module")
def scorer() -> diffitm.ImageTextScorer:
    return diffitm.load_scorer("clip:shapes", device="cpu")


def test_every_part_of_a_mean_is_a_figure(drawn: Path, tmp_path: Path) -> None:
    """A group's pattern that is misspelt would leave its figure out of the mean in silence."""
    root = Path(shutil.copytree(drawn, tmp_path / "root"))
    write_world(str(root), 10)
    figures = set[tuple[str, str, str]]()
    for name in TASKS:
        task = find_task(name)()
        for example in task.examples(str(root)):
            parts = ["all", *(f"{key}={value}" for key, value in example.groups.items())]
            figures |= {(name, part, metric) for part in parts for metric in task.chance(example)}
    for group, patterns in GROUPS.items():
        for pattern in patterns:
            assert any(all(map(fnmatchcase, figure, pattern)) for figure in figures), (
                group,
                pattern,
            )


def test_every_set_has_a_plain_reader() -> None:
    assert set(PLAIN) == set(SETS)


@pytest.mark.parametrize("name", SETS)
def test_against_a_plain_loop(
    name: str,
    drawn: Path,
    tmp_path: Path,
    plain_clip: Callable[[Item], np.ndarray],
    scorer: diffitm.ImageTextScorer,
) -> None:
    """The same cosines for the same texts, and the same share of right decisions."""
    items = list(PLAIN[name](drawn))
    cosines = [plain_clip(item) for item in items]
    found = diffitm.evaluate(scorer, name, str(drawn), out=str(tmp_path))
    (store,) = (tmp_path / "scores").iterdir()
    stored = [row for f in store.glob("*.parquet") for row in parquet.read_table(f).to_pylist()]
    ours = sorted((row["text"], row["similarity"]) for row in stored)
    plain = {
        (text, float(value))
        for item, table in zip(items, cosines, strict=True)
        for row in table
        for text, value in zip(item.texts, row, strict=True)
    }
    for text, value in ours:
        assert any(t == text and abs(v - value) < 1e-5 for t, v in plain), (text, value)
    for text, value in plain:
        assert any(t == text and abs(v - value) < 1e-5 for t, v in ours), (text, value)
    whole = found[found["group"] == "all"].set_index("metric")
    decided = [item.rule(table) for item, table in zip(items, cosines, strict=True)]
    for metric in decided[0]:
        assert whole.loc[metric, "value"] == pytest.approx(np.mean([d[metric] for d in decided]))
        assert whole.loc[metric, "n"] == len(items)
    assert set(found["failures"]) == {0}


@pytest.mark.parametrize("name", SETS)
def test_ready(name: str, drawn: Path) -> None:
    state = check(find_task(name)(), str(drawn))
    assert (state.state, state.missing, state.unreadable, state.failed) == ("ready", 0, 0, 0)


def test_published_numbers_are_told(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there are more or fewer examples; parts of the published numbers add up."""
    config = GdbenchConfig(
        tasks=["whatsup_a", "naturalbench"], data=str(drawn), out=str(tmp_path), check=True
    )
    run(config)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith("16 examples, 16 images (published are 412 examples)")
    assert second.endswith("4 examples, 8 images")
    parts = (692, 2062, 788, 1652, 1406, 666, 245)
    assert find_task("sugarcrepe").published == sum(parts)
    valid = (505, 851, 868, 900, 691, 535, 648, 949, 708, 104, 943)
    assert find_task("valse").published == sum(valid)


@pytest.mark.parametrize("name", SETS)
def test_absent(name: str, tmp_path: Path) -> None:
    """With the file that is missing, and where it comes from."""
    task = find_task(name)()
    state = check(task, str(tmp_path))
    assert state.state == "absent"
    assert task.source in state.problem
    assert str(tmp_path / task.folder) in state.problem


def test_suites() -> None:
    """Tasks without --tasks are GDBench's; names of suites are no names of tasks."""
    assert named(["gdbench"]) == list(GDBENCH)
    assert named(["all", "winoground"]) == list(TASKS)
    assert set(named(["composition"])) <= set(TASKS)
    assert not set(SUITES) & set(TASKS)


# --- groups and metrics


def examples(name: str, root: Path) -> list[Example]:
    return list(find_task(name)().examples(str(root)))


def test_sugarcrepe_parts(drawn: Path) -> None:
    """All values count, though a part lacks a number; categories join parts."""
    found = examples("sugarcrepe", drawn)
    assert len(found) == 7 * 4 - 1
    assert sum(e.groups["part"] == "swap_obj" for e in found) == 3
    assert sum(e.groups["category"] == "replace" for e in found) == 12
    table = diffitm.evaluate("clip:shapes", "sugarcrepe", str(drawn))
    parts = table[table["group"].str.startswith("part=")]
    macro = table[table["metric"] == "macro accuracy"]["value"].item()
    assert macro == pytest.approx(parts["value"].mean())


def test_sugarcrepe_pp_needs_both() -> None:
    task = find_task("sugarcrepe_pp")()
    example = Example("0", ("a",), ("c", "c2", "n"), "text")

    def credit(*scores: float) -> tuple[float, bool]:
        found = task.credits(example, np.array([scores]))["accuracy"]
        return found.value, found.tied

    assert credit(3, 2, 1) == (1.0, False)
    assert credit(2, 3, 1) == (1.0, False)
    assert credit(3, 1, 2) == (0.0, False)
    assert credit(1, 2, 3) == (0.0, False)
    assert credit(3, 1, 1) == (0.5, True)
    assert credit(1, 1, 1) == (pytest.approx(1 / 3), True)
    assert not task.credits(example, np.array([[1, np.nan, 0]]))["accuracy"].finite
    (contest,) = task.contests(example)
    assert (contest.kept, contest.about) == (2, 2)
    assert task.chance(example) == {"accuracy": pytest.approx(1 / 3)}


def test_valse_takes_valid_items(drawn: Path) -> None:
    found = examples("valse", drawn)
    assert len(found) == 11 * 3
    assert not any(e.id.endswith("_1") for e in found)
    hard = [e for e in found if e.groups["piece"] == "coreference-hard"]
    assert all(e.images[0].startswith("visdial/VisualDialog_val2018/") for e in hard)


def decision(things: str, preposition: str, value: float | None) -> Decision:
    from diffitm.metrics.credit import Credit

    credits = None if value is None else {"accuracy": Credit(value)}
    groups = {"things": things, "preposition": preposition}
    return Decision(things, groups, {"accuracy": 0.25}, credits, value is None)


def test_whatsup_pairs_and_sets() -> None:
    """Two opposite prepositions, and all four, of the same two things."""
    task = find_task("whatsup_a")()
    right = {"cup": "left right on under", "dog": "left on under", "mug": "right on"}
    decisions = [
        decision(things, word, float(word in words.split()))
        for things, words in right.items()
        for word in ("left", "right", "on", "under")
    ]
    decisions += [decision("jar", word, None) for word in ("left", "right", "on", "under")]
    figures = {f.metric: f for f in task.figures(decisions) if f.group == "all"}
    assert figures["accuracy"].value == pytest.approx(9 / 12)
    assert figures["pair accuracy"].value == pytest.approx(3 / 6)
    assert figures["pair accuracy"].chance == pytest.approx(1 / 16)
    assert figures["set accuracy"].value == pytest.approx(1 / 3)
    assert figures["set accuracy"].chance == pytest.approx(1 / 256)
    assert (figures["set accuracy"].n, figures["set accuracy"].failures) == (3, 1)
    groups = {f.group for f in task.figures(decisions)}
    assert groups == {"all", *(f"preposition={w}" for w in ("left", "right", "on", "under"))}


def test_cola_image_first() -> None:
    """The published metric is the first; the others say that they are ours."""
    task = find_task("cola")()
    example = Example("0", ("a", "b"), ("x", "y"), "both")
    scores = np.array([[2.0, 3.0], [1.0, 4.0]])
    found = task.credits(example, scores)
    assert list(found) == ["image", "text (ours)", "group (ours)"]
    assert [credit.value for credit in found.values()] == [1.0, 0.0, 0.0]
    each = task.credits_each([example], np.array([0]), scores[None])
    assert {n: c.values[0] for n, c in each.items()} == {n: c.value for n, c in found.items()}
    assert len(task.contests(example)) == 4


def test_colorswap_from_the_hub(root: Path) -> None:
    """Parquet with the images inside gives what the authors' archive gives."""
    import pyarrow as pa

    published = [e.texts for e in examples("colorswap", root)]
    folder = root / "colorswap/data"
    rows = loaded(folder / "test.json")
    with zipfile.ZipFile(folder / "images.zip") as archive:
        for row in rows:
            row |= {
                f"image_{k}": {"bytes": archive.read(row[f"image_{k}"]), "path": None}
                for k in (1, 2)
            }
    (folder / "test.json").unlink()
    for number, part in enumerate((rows[:1], rows[1:])):
        name = f"test-0000{number}-of-00002.parquet"
        parquet.write_table(pa.Table.from_pylist(part), folder / name)
    found = examples("colorswap", root)
    assert [e.texts for e in found] == published
    assert [e.id for e in found] == [str(number) for number in range(len(rows))]
    assert found[1].images[1] == "colorswap/data/test-00001-of-00002.parquet#row=0,column=image_2"
    assert check(find_task("colorswap")(), str(root)).state == "ready"


def test_a_folder_of_images_may_be_a_zip(root: Path) -> None:
    """With the folder inside of it, as COCO's, or without."""
    folder = root / "coco/val2017"
    shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
    shutil.rmtree(folder)
    first = examples("sugarcrepe", root)[0]
    assert first.images == ("coco/val2017.zip/val2017/000000000001.jpg",)
    assert check(find_task("sugarcrepe")(), str(root)).state == "ready"
    assert check(find_task("coco_spatial_one")(), str(root)).state == "ready"


def test_foils_of_the_drawn_sets_are_wrong() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        scene = sample_scene(rng, 2)
        assert full(scene).holds(scene)
        for part, (right, wrong) in foils(scene, rng).items():
            assert right.holds(scene) and not wrong.holds(scene), part


def test_pairwise_accuracy() -> None:
    """Against a plain count over pairs and thresholds."""
    rng = np.random.default_rng(0)
    ratings, scores = rng.integers(1, 4, 30).astype(float), rng.normal(size=30).round(1)

    def share(threshold: float) -> float:
        right = 0
        for i in range(30):
            for j in range(i):
                gap = scores[i] - scores[j]
                order = 0.0 if abs(gap) <= threshold else np.sign(gap)
                right += order == np.sign(ratings[i] - ratings[j])
        return right / (30 * 29 / 2)

    gaps = np.abs(scores[:, None] - scores[None]).ravel()
    accuracy, threshold = pairwise_accuracy(ratings, scores)
    assert accuracy == pytest.approx(max(map(share, gaps))) == share(threshold)
    assert pairwise_accuracy(ratings, ratings) == (1.0, 0.0)


def test_agreement_intervals() -> None:
    """Against every statistic computed anew without each cluster, whatever clusters are called."""
    rng = np.random.default_rng(1)
    ratings = rng.integers(1, 5, 300).astype(float)
    scores = (ratings + rng.normal(size=300)).round(1)
    clusters = rng.permutation(np.repeat(np.arange(60), 5)).astype(str)
    _, threshold = pairwise_accuracy(ratings, scores)

    def share(r: np.ndarray, s: np.ndarray) -> float:
        i, j = np.triu_indices(len(r), 1)
        gap = np.where(np.abs(s[i] - s[j]) <= threshold, 0.0, np.sign(s[i] - s[j]))
        return float(np.mean(gap == np.sign(r[i] - r[j])))

    kept = [clusters != name for name in set(clusters)]
    statistics = (
        lambda r, s: stats.kendalltau(r, s).statistic,
        lambda r, s: np.corrcoef(r, s)[0, 1],
        share,
    )
    found = agreement_intervals(ratings, scores, clusters, threshold)
    for statistic, (low, high) in zip(statistics, found, strict=True):
        values = np.array([statistic(ratings[k], scores[k]) for k in kept])
        half = stats.t.ppf(0.975, 59) * np.sqrt(59 * values.var())
        assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half))
        assert low < statistic(ratings, scores) < high
    assert jackknife(np.array([0.5]), -1, 1) == (-1, 1)
    assert jackknife(np.array([0.9, 0.1]), 0, 1) == (0, 1)


def test_genai_bench_figures(drawn: Path, plain_clip: Callable[[Item], np.ndarray]) -> None:
    """Kendall's tau-b and Pearson's r with the mean ratings of all images."""
    scores = [plain_clip(item).item() for item in genai_bench(drawn)]
    table = loaded(drawn / "genai_bench/genai_image.json")
    ratings = [np.mean(r) for row in table.values() for r in row["models"].values()]
    figures = diffitm.evaluate("clip:shapes", "genai_bench", str(drawn)).set_index("metric")
    found = figures["value"]
    assert ((figures["low"] <= found) & (found <= figures["high"])).all()
    assert found["Kendall tau-b"] == pytest.approx(stats.kendalltau(ratings, scores).statistic)
    assert found["Pearson r"] == pytest.approx(np.corrcoef(ratings, scores)[0, 1], abs=1e-4)
    assert 0.5 < found["pairwise accuracy"] <= 1


# --- wrong files


def first(file: str, change: Callable[[Any], None], *way: Any) -> Callable[[Path], None]:
    """Change what lies at the end of the way into a JSON file."""

    def spoil(root: Path) -> None:
        content = loaded(root / file)
        place = content
        for step in way:
            place = place[step]
        change(place)
        (root / file).write_text(json.dumps(content))

    return spoil


def set_to(key: Any, value: Any) -> Callable[[Any], None]:
    return lambda place: place.__setitem__(key, value)


def rewritten(folder: str, name: str, value: Any) -> Callable[[Path], None]:
    """Another value in the last row of the first Parquet file."""

    def spoil(root: Path) -> None:
        import pyarrow as pa

        file = next(iter(sorted((root / folder / "data").glob("test-*.parquet"))))
        rows = parquet.read_table(file).to_pylist()
        rows[-1][name] = value
        parquet.write_table(pa.Table.from_pylist(rows), file)

    return spoil


CONTROLLED = "whatsup/controlled_images_dataset.json"
COLA = "cola/data/COLA_multiobjects_matching_benchmark.json"
COLOUR = "vl_checklist/data/Attribute/vg/color.json"
SPEC = "spec/data/count/{}.json"
EQBEN = "eqben/eqben_vllm/all_select.json"
NATURAL = "NaturalBench-Retrieval/metadata.json"
DRAWN = "selfbench/outputs/9/stable-diffusion-v1-5/00001/metadata.jsonl"
GENAI = "genai_bench/genai_image.json"
WRONG: list[tuple[str, Callable[[Path], None], str]] = [
    ("sugarcrepe", first("sugarcrepe/data/swap_att.json", set_to("negative_caption", 3), "2"),
     "swap_att.json, key 2: negative_caption is '3', it must be a text"),
    ("sugarcrepe", first("sugarcrepe/data/add_obj.json", lambda row: row.pop("filename"), "0"),
     "add_obj.json, key 0: there is no filename, the path of an image"),
    ("sugarcrepe_pp", first("sugarcrepe_pp/data/swap_att.json", set_to("caption2", None), 1),
     "swap_att.json, entry 1: caption2 is 'null', it must be a text"),
    ("whatsup_a", first(CONTROLLED, set_to("image_path", "data/controlled_images/x.jpeg"), 3),
     "entry 3: image_path is 'data/controlled_images/x.jpeg', it must be FOLDER/THING_PREP"),
    ("whatsup_a", first(CONTROLLED, set_to("caption_options", ["a", "b"]), 0),
     "entry 0: caption_options is '[\"a\", \"b\"]', it must be a list of 4 texts"),
    ("coco_spatial_one", first("whatsup/coco_qa_one_obj.json", lambda row: row.pop(), 2),
     "entry 2: it is "),
    ("gqa_spatial_two", first("whatsup/vg_qa_two_obj.json", set_to(1, 7), 0),
     "entry 0: right text is '7', it must be a text"),
    ("valse", first("valse/data/plurals.json", set_to("mturk", {"caption": "3"}), "plurals_0"),
     "plurals.json, key plurals_0, mturk: caption is '3', it must be a whole number"),
    ("cola", first(COLA, set_to(2, "https://x/"), 1), "entry 1: url 2 is 'https://x/', it must"),
    ("cola", first(COLA, lambda row: row.append("x"), 1), "entry 1: it is "),
    ("colorswap", first("colorswap/data/test.json", set_to("image_1", 5), 2),
     "test.json, entry 2: image_1 is '5', it must be the path of an image"),
    ("eqben_mini", first(EQBEN, set_to("image0", "x.jpg"), 4),
     "entry 4: image0 is 'x.jpg', it must be PART/NAME"),
    ("eqben", first("eqben/ann.json", set_to("caption1", []), 4), "entry 4: caption1 is '[]'"),
    ("bivlc", rewritten("bivlc", "caption", None), "row 3: caption is 'null', it must be a text"),
    ("vismin", rewritten("vismin", "category", "colour"),
     "row 1: category is 'colour', it must be one of object, attribute, relation, counting"),
    ("naturalbench", first(NATURAL, set_to("caption_1", 1.5), 3), "entry 3: caption_1 is '1.5'"),
    ("spec_i2t", first(SPEC.format("image2text"), set_to("label", 2), 1),
     "count/image2text.json, entry 1: label is '2', it must be a whole number of 0 to 1"),
    ("spec_t2i", first(SPEC.format("text2image"), set_to("keys", ["0/0.jpg"]), 1),
     "entry 1: keys is '[\"0/0.jpg\"]', it must be a list of 2 paths"),
    ("vl_checklist", first(COLOUR, set_to("NEG", []), 2, 1),
     "color.json, entry 2, texts: NEG is '[]', it must be a list of 1 texts or more"),
    ("vl_checklist", first(COLOUR, set_to("NEG", ["a", "b"]), 2, 1), "as many texts as POS has, 1"),
    ("genai_bench", first(GENAI, set_to("DALLE_3", []), "00001", "models"),
     "key 00001, models: DALLE_3 is '[]', it must be a list of ratings"),
    ("selfbench", first(DRAWN, set_to("prompt", None)),
     "00001/metadata.jsonl, line 1: prompt is 'null', it must be a text"),
    ("selfbench", first(DRAWN, set_to("tag", "counting")),
     "the candidates of tag counting need a prompt with one, as"),
    ("selfbench", lambda root: [p.unlink() for p in (root / DRAWN).parent.rglob("*.png")],
     "00001/samples: holds no .png"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "told"), WRONG)
def test_first_wrong_line(name: str, spoil: Callable[[Path], None], told: str, root: Path) -> None:
    """Its file, place, field and value, and what is right."""
    spoil(root)
    with pytest.raises(InputError) as raised:
        examples(name, root)
    assert told in str(raised.value)
    assert str(root / find_task(name).folder) in str(raised.value)


@pytest.mark.parametrize("name", ["coco_spatial_one", "gqa_spatial_one"])
@pytest.mark.parametrize("number", [None, "", True, -1, "../../x"])
def test_image_ids_are_numbers(name: str, number: Any, tmp_path: Path) -> None:
    task: Any = find_task(name)
    file = tmp_path / "whatsup" / task.file
    file.parent.mkdir()
    file.write_text(json.dumps([[7, "a", "b"], [number, "a", "b"]]))
    with pytest.raises(InputError, match=r"entry 1: image id is .*, it must be the number of an"):
        examples(name, tmp_path)


def test_wrong_lines_are_tested_of_every_set() -> None:
    assert set(SETS) - {name for name, _, _ in WRONG} == {
        "whatsup_b",
        "coco_spatial_two",
        "gqa_spatial_one",
    }  # of the same readers
    kinds = (PairTask, RetrievalTask)
    assert all(issubclass(find_task(name), kinds) for name in SETS if name != "genai_bench")


def test_sugarcrepe_pp_has_two_right_texts_everywhere(tmp_path: Path) -> None:
    """In the gallery, the curves and what learned weights of timesteps compare, too."""
    store = open_store(
        str(tmp_path),
        "m",
        {"kind": "diffusion", "protocol": "diffusionitm", "timesteps": [10, 110]},
    )
    errors = {"c": 2.0, "c2": 1.0, "n": 9.0}
    found = [
        Example(f"{i}", (f"i{i}",), tuple(errors), "text", 0, f"i{i}", {"part": "swap_att"})
        for i in range(12)
    ]
    lines = [score_row(e.images[0], t, [v, v]) for e in found for t, v in errors.items()]
    write_scores(store, lines)
    name = "sugarcrepe_pp"
    uri = pair_table.write_examples(name, found, str(tmp_path / "examples"), None)[0]
    made = evaluate({name: uri}, [store], "l2")
    assert {(case.kind, case.margin) for case in made.cases} == {("surest right", 7.0)}
    assert {pair.text: pair.right for pair in made.cases[0].pairs} == {"c": True, "n": False}
    (curve,) = made.curves
    assert (curve.right, curve.wrong) == ([1.5, 1.5], [9.0, 9.0])
    tasks = read_errors(find_task(name)(), uri, store, "l2")
    assert tasks is not None and set(tasks.contrasts.values.ravel()) == {7.0, 8.0}
