"""The embedded world: scenes, captions that hold, foils that do not, layouts and weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffitm.core import images
from diffitm.models import loading
from diffitm.models.embedded import folder_of
from diffitm.shapes import language, layouts
from diffitm.shapes.drawing import World
from diffitm.shapes.language import PLACES, RELATIONS, Caption, Mention, full
from diffitm.shapes.world import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    render,
    sample_scene,
)
from diffitm.tasks.aro import VgRelation
from diffitm.tasks.registry import find_task
from tools.shapes.architecture import LENGTH, write_tokenizer

WEIGHTS = folder_of("shapes").parent
MAX_WEIGHTS = 12 * 2**20


def scenes(count: int, seed: int = 0, **options: object) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, **options) for _ in range(count)]


def read_mention(words: str) -> Mention:
    article, *attributes = words.split()
    assert article in ("a", "an", "the")
    known = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}
    found = {k: w for w in attributes for k, values in known.items() if w in values}
    assert len(found) == sum(w != "object" for w in attributes), words
    return Mention(**found)


def read_caption(text: str) -> Caption:
    """The meaning of a text, read independently of how it was made."""
    text = text.lower().removesuffix(".").removeprefix("a photo of ")
    for place, words in PLACES.items():
        if text.startswith(f"{words} is "):
            return Caption((read_mention(text.removeprefix(f"{words} is ")),), place=place)
        if text.endswith(f" {words}"):
            return Caption((read_mention(text.removesuffix(f" {words}")),), place=place)
    for relation, words in RELATIONS.items():
        first, found, second = text.partition(f" {words} ")
        if found:
            mentions = (read_mention(first.removesuffix(" is")), read_mention(second))
            return Caption(mentions, relation=relation)
    return Caption(tuple(read_mention(part) for part in text.split(" and ")))


# --- scenes


def test_rendering_is_a_function_of_the_scene() -> None:
    for scene in scenes(5):
        picture = render(scene)
        assert (picture.shape, picture.dtype) == ((64, 64, 3), np.uint8)
        np.testing.assert_array_equal(render(scene), picture)
    assert scenes(5) == scenes(5)
    assert scenes(5) != scenes(5, seed=1)


def test_things_are_where_and_what_the_scene_says() -> None:
    """The pixel at a thing's centre has its colour; sizes and shapes differ in area."""
    for scene in scenes(40):
        picture = render(scene, 64)
        for thing in scene.things:
            centre = picture[int(thing.y * 64), int(thing.x * 64)] / 255
            distances = {c: np.abs(centre - np.array(rgb)).sum() for c, rgb in COLOURS.items()}
            assert min(distances, key=distances.get) == thing.colour

    def area(shape: str, size: str) -> int:
        blank = render(Scene((), "plain", 3)).astype(int)
        thing = Thing(shape, "red", size, 0.5, 0.5)
        return (np.abs(render(Scene((thing,), "plain", 3)) - blank).sum(-1) > 60).sum()

    areas = {(shape, size): area(shape, size) for shape in SHAPES for size in SIZES}
    assert all(areas[s, "large"] > 2 * areas[s, "small"] for s in SHAPES)
    assert len({areas[s, "large"] for s in SHAPES}) == len(SHAPES)


def test_things_do_not_overlap() -> None:
    for scene in scenes(100):
        first, second = scene.things
        assert max(abs(first.x - second.x), abs(first.y - second.y)) >= 0.42


def test_held_out_combinations() -> None:
    """Training scenes never hold one, the others always do; all attributes occur all the same."""
    training = scenes(300, held_out=False) + scenes(300, objects=1, held_out=False)
    training += scenes(100, held_out=False, distinct=False)
    combinations = {t.combination for s in training for t in s.things}
    assert not combinations & HELD_OUT
    assert combinations == {(c, s) for c in COLOURS for s in SHAPES} - HELD_OUT
    assert all(any(t.combination in HELD_OUT for t in s.things) for s in scenes(50, held_out=True))
    either = {s.held_out for s in scenes(100, held_out=None)}
    assert either == {True, False}


def test_axis_sets_the_relation() -> None:
    assert {s.relation() for s in scenes(50, axis="x")} == {"left", "right"}
    assert {s.relation() for s in scenes(50, axis="y")} == {"above", "below"}
    assert {s.relation() for s in scenes(10, objects=1)} == {None}


# --- captions


def test_training_captions_hold() -> None:
    """Read back from its words, every caption is true of its scene and known to the tokenizer."""
    rng = np.random.default_rng(1)
    known = set(language.vocabulary())
    feelings = {*language.PLEASANT, *language.UNPLEASANT}
    forms = set()
    for index in range(600):
        scene = sample_scene(rng, 1 + index % 2, distinct=index % 3 != 0)
        text = language.training_caption(scene, rng)
        assert set(text.split()) <= known
        plain = " ".join(word for word in text.split() if word not in feelings)
        caption = read_caption(plain)
        assert caption.holds(scene), (text, scene)
        forms.add((len(caption.mentions), caption.relation, caption.place))
    assert {relation for _, relation, _ in forms} == {None, *RELATIONS}
    assert {place for _, _, place in forms} == {None, *PLACES}


def test_text_and_meaning_agree() -> None:
    """Writing a caption and reading it back gives the same meaning, in every style."""
    for scene in scenes(60):
        for style in ("plain", "is"):
            caption = full(scene, size=True)
            assert read_caption(caption.text(style)) == caption
        single = Caption((language.mention(scene.things[0], "shape", "colour"),), place="left")
        assert read_caption(single.text("front")) == read_caption(single.text()) == single
    assert Caption((Mention("circle"),)).text("photo") == "a photo of a circle"
    assert Mention(colour="red").words() == "a red object"
    assert Mention().words() == "an object"


CHANGES = {
    "colour": lambda caption: language.swapped(caption, "colour"),
    "shape": lambda caption: language.swapped(caption, "shape"),
    "size": lambda caption: language.swapped(caption, "size"),
    "order": language.reordered,
}


@pytest.mark.parametrize("kind", CHANGES)
def test_swaps_are_false(kind: str) -> None:
    """Each swap changes a true caption into one of the same words that is false, also read back."""
    for scene in scenes(100, seed=3):
        caption = full(scene, size=True)
        assert caption.holds(scene)
        changed = CHANGES[kind](caption)
        assert not changed.holds(scene), (caption.text(), changed.text())
        assert not read_caption(changed.text()).holds(scene)
        assert sorted(changed.text().split()) == sorted(caption.text().split())


def test_holds_by_hand() -> None:
    red = Thing("circle", "red", "large", 0.25, 0.5)
    blue = Thing("cross", "blue", "small", 0.75, 0.5)
    scene = Scene((red, blue), "plain", 0)
    true = [
        "a red circle to the left of a blue cross",
        "a blue cross is to the right of a red circle",
        "a blue cross and a red circle",
        "On the left is a red circle.",
        "a photo of a small object",
        "A large circle and a small cross.",
    ]
    false = [
        "a blue cross to the left of a red circle",
        "a red circle above a blue cross",
        "a red cross and a blue circle",
        "On the right is a red circle.",
        "a green object",
        "A small circle and a large cross.",
        "a red circle and a red circle",
    ]
    assert all(read_caption(text).holds(scene) for text in true)
    assert not any(read_caption(text).holds(scene) for text in false)


# --- layouts


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Scene]]:
    """A data root, and the scene behind each of its images."""
    root = str(tmp_path_factory.mktemp("world"))
    behind: dict[str, Scene] = {}
    whole, framed = World.save, World.save_framed

    def save(self: World, path: str, scene: Scene) -> None:
        behind[path] = scene
        whole(self, path, scene)

    def save_framed(self: World, path: str, scene: Scene, rng: np.random.Generator) -> dict:
        behind[path] = scene
        return framed(self, path, scene, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "save", save)
        patch.setattr(World, "save_framed", save_framed)
        layouts.write_world(root, 20)
    return root, behind


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("winoground", 20),
        ("clevr", 280),
        ("flickr30k", 20),
        ("flickr30k_text", 20),
        ("imagecode_video", 9),
        ("svo_subj", 7),
        ("svo_verb", 7),
        ("svo_obj", 6),
        ("pets", 10),
        ("vg_relation", 10),
        ("vg_attribution", 20),
        ("mmvp_vlm", 10),
        ("coco_neg_text", 10),
    ],
)
def test_gold_is_true_and_the_rest_is_false(
    drawn: tuple[str, dict[str, Scene]], name: str, count: int
) -> None:
    """Of every example that the real reader yields, against the scenes behind the images."""
    root, behind = drawn
    examples = list(find_task(name)().examples(root))
    assert len(examples) == count
    for example in examples:
        holds = np.array(
            [
                [read_caption(t).holds(behind[i.split("#")[0]]) for t in example.texts]
                for i in example.images
            ]
        )
        if example.direction == "both":
            expected = np.eye(2, dtype=bool)
        else:
            expected = np.arange(holds.size).reshape(holds.shape) == example.gold
        np.testing.assert_array_equal(holds, expected, err_msg=str(example))


def test_all_five_captions_belong_to_their_image(drawn: tuple[str, dict[str, Scene]]) -> None:
    """The reader takes every fifth, so the others are checked in the file."""
    root, behind = drawn
    lists = json.loads((Path(root) / "flickr30k" / "val_top10_RN50x64.json").read_text())
    assert len(lists) == 100
    for caption, paths in lists.items():
        assert len(set(paths)) == 10
        found = [read_caption(caption).holds(behind[p.removeprefix("datasets/")]) for p in paths]
        assert found == [True] + [False] * 9


def test_images_on_disk_are_the_scenes(drawn: tuple[str, dict[str, Scene]]) -> None:
    root, behind = drawn
    for path, scene in list(behind.items())[::7]:
        image, _ = images.load(root, path)
        expected = render(scene).astype(int)
        found = np.asarray(image).astype(int)
        if path.startswith("aro"):
            continue  # inside of a larger picture, below
        worst = np.abs(found - expected).mean()
        assert worst < (3 if path.endswith(".jpg") else 1e-9)


def test_the_box_of_a_framed_image_is_its_scene(drawn: tuple[str, dict[str, Scene]]) -> None:
    root, behind = drawn
    for example in list(VgRelation().examples(root))[:5]:
        image, _ = images.load(root, example.images[0])
        path = example.images[0].split("#")[0]
        np.testing.assert_array_equal(np.asarray(image), render(behind[path]))
        assert images.load(root, path)[0].width > image.width


def test_orders_and_negative_images_of_the_world(drawn: tuple[str, dict[str, Scene]]) -> None:
    """A caption's other orders are no caption of it; a negative image is another one."""
    root, behind = drawn
    for name in ("coco_order", "flickr30k_order"):
        examples = list(find_task(name)().examples(root))
        assert len(examples) == 10
        for example in examples:
            words = example.texts[0].split()
            assert read_caption(example.texts[0]).holds(behind[example.images[0]])
            assert all(sorted(t.split()) == sorted(words) for t in example.texts)
            assert example.texts[0] not in example.texts[1:]
    for example in find_task("coco_neg_image")().examples(root):
        assert example.failure is None
        assert read_caption(example.texts[0]).holds(behind[example.images[0]])
        assert example.images[0] != example.images[1]


def test_bias_images_show_their_group(drawn: tuple[str, dict[str, Scene]]) -> None:
    root, behind = drawn
    examples = list(find_task("mmbias")().examples(root))
    assert len(examples) == 4 * 5
    for example in examples:
        (thing,) = behind[example.images[0]].things
        assert thing.shape == example.groups["group"].lower()
        assert (len(example.texts), example.gold) == (8, 4)


def test_world_is_a_function_of_its_arguments(tmp_path: Path) -> None:
    """The same files each time, other ones for another seed; held-out scenes where asked for."""

    def written(name: str, **options: object) -> dict[str, bytes]:
        layouts.write_world(str(tmp_path / name), 5, **options)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        return {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files}

    first = written("a")
    assert first == written("b")
    other, held = written("c", seed=8), written("d", held_out=True)
    unnamed = [{n for n in w if "pets" not in n} for w in (first, other, held)]
    assert unnamed[0] == unnamed[1] == unnamed[2]
    assert sum(first[name] != other[name] for name in unnamed[0]) > len(first) / 2
    texts = json.loads(held["winoground/data.json"])
    for entry in texts:
        mentions = read_caption(entry["caption_0"]).mentions
        assert any((m.colour, m.shape) in HELD_OUT for m in mentions)


def test_world_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted drawing starts again, a finished one of the same settings is kept."""
    root = str(tmp_path / "w")

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layouts, "write_flickr30k", interrupted)
        with pytest.raises(KeyboardInterrupt):
            layouts.write_world(root, 5)
    layouts.write_world(root, 5)
    file = tmp_path / "w" / "clevr" / "captions" / "spatial.json"
    file.write_text("{}")
    layouts.write_world(root, 5)
    assert file.read_text() == "{}"
    layouts.write_world(root, 5, seed=9)
    assert file.read_text() != "{}"


# --- tokenizer and weights


def test_one_token_a_word(tmp_path: Path) -> None:
    """So 16 tokens hold every caption of the grammar, with its start and end."""
    tokenizer = write_tokenizer(tmp_path)
    for word in language.vocabulary():
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    rng = np.random.default_rng(0)
    for scene in scenes(50):
        text = language.training_caption(scene, rng)
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2 <= LENGTH
        assert tokenizer(text.capitalize()).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert len(tokenizer.tokenize("zebra")) > 1
    assert tokenizer.unk_token_id not in tokenizer("zebra §").input_ids[1:-1]


def test_weights_are_small() -> None:
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert files
    assert sum(p.stat().st_size for p in files) <= MAX_WEIGHTS


def test_weights_know_the_tokenizer(tmp_path: Path) -> None:
    """The exported tokenizers are those that the grammar gives today."""
    write_tokenizer(tmp_path)
    for folder in (WEIGHTS / "diffusion" / "tokenizer", WEIGHTS / "clip"):
        for name in ("vocab.json", "merges.txt"):
            assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_diffusion_folder_is_a_stock_pipeline() -> None:
    """Plain diffusers loads it and draws a picture."""
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / "diffusion")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    (picture,) = pipeline("a red square", num_inference_steps=2, generator=generator).images
    assert picture.size == (32, 32)
    assert np.asarray(picture).std() > 1


def test_embedded_model_by_name() -> None:
    """'shapes' means the folder in the package, wherever a worker has it."""
    source = loading.resolve("shapes")
    assert (source.location, source.family) == ("shapes", "StableDiffusionPipeline")
    model = loading.load_denoiser(source)
    assert (model.resolution, model.latent_shape) == (32, (4, 8, 8))
    drawn = [Image.fromarray(render(scene)) for scene in scenes(4)]
    pictures = np.stack([images.to_pixels(image, 32, "squash") for image in drawn])
    latents = model.encode_images(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1)
    assert latents.isfinite().all()
    assert 0.3 < latents.std() < 3


def test_a_gallery_has_no_more_scenes_than_can_be_told_apart(tmp_path: Path) -> None:
    """It ends where the world has no room, and no caption is true of two of its images."""
    world = World(str(tmp_path), 600)
    world.save = lambda *_: None  # type: ignore[method-assign]
    layouts.write_flickr30k(world)
    lists = json.loads((tmp_path / "flickr30k/val_top10_RN50x64.json").read_text())
    images = {paths[0] for paths in lists.values()}
    assert 500 < len(images) < 600
    assert len(lists) == 5 * len(images)
