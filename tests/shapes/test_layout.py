"""What captions say about places, and the training that is to read it."""

from __future__ import annotations

import argparse
import socket
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from diffitm import load_scorer
from diffitm.models.embedded import SHAPES as EMBEDDED
from diffitm.shapes.language import Caption, disordered, garbled, layout_caption, mention
from diffitm.shapes.world import COLOURS, SHAPES, SIZES, Scene, Thing, sample_scene
from tools.shapes import train
from tools.shapes.architecture import write_tokenizer
from tools.shapes.layout import (
    UNKNOWN,
    OrderLoss,
    TextLoss,
    _layers,
    _slots,
    _styled,
    layout_set,
    mixed_set,
    training_scene,
)
from tools.shapes.losses import ClipLoss

RED = Thing("circle", "red", "large", 0.25, 0.5)
BLUE = Thing("cross", "blue", "small", 0.75, 0.5)
SCENE = Scene((RED, BLUE), "plain", 0)
STARTS = ("a", "an", "the", "on", "at")
CIRCLE, CROSS, EMPTY = [0, 0, 1], [3, 2, 0], [4, 6, 2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_captions_that_say_where_hold() -> None:
    rng = np.random.default_rng(1)
    forms, placed = set(), 0
    for index in range(400):
        scene = sample_scene(rng, 1 + index % 2, distinct=index % 3 != 0)
        caption, things = layout_caption(scene, rng)
        assert caption.holds(scene), (caption, scene)
        assert all(m.fits(t) for m, t in zip(caption.mentions, things, strict=True))
        forms.add((len(caption.mentions), caption.relation or caption.place))
        placed += (caption.relation or caption.place) is not None
    assert len(forms) == 2 + 4 + 4
    assert 0.55 < placed / 400 < 0.8


def test_a_garbled_caption_keeps_the_words() -> None:
    """And says who has what no better than its twin with an attribute exchanged."""
    caption = Caption((mention(RED, "shape", "colour"), mention(BLUE, "shape", "colour")), "left")
    rng = np.random.default_rng(0)
    texts = {garbled(caption, rng) for _ in range(50)}
    assert {tuple(sorted(text.split())) for text in texts} == {
        tuple(sorted(caption.text().split()))
    }
    assert len(texts) > 40


def test_slots_of_a_relation() -> None:
    """The mentions in their order, then left, right, top, bottom; only what is named is said."""
    caption = Caption((mention(BLUE, "shape", "colour"), mention(RED, "shape")), "right")
    classes, said = _slots(SCENE, caption, [BLUE, RED])
    assert classes.tolist() == [CROSS, CIRCLE, CIRCLE, CROSS, EMPTY, EMPTY]
    one, both, none = [True, False, False], [True, True, False], [False] * 3
    assert said.tolist() == [both, one, one, both, none, none]


def test_slots_of_a_place() -> None:
    """What the caption leaves out is there, but not said; a second mention is not asked for."""
    classes, said = _slots(SCENE, Caption((mention(RED, "colour"),), place="left"), [RED])
    assert classes.tolist() == [CIRCLE, [UNKNOWN] * 3, CIRCLE, CROSS, EMPTY, EMPTY]
    assert np.argwhere(said).tolist() == [[0, 1], [2, 1]]
    upper = Scene((Thing("cross", "blue", "small", 0.5, 0.1), RED), "plain", 0)
    both = Scene((upper.things[0], Thing("circle", "red", "large", 0.6, 0.3)), "plain", 0)
    assert _slots(both, Caption((mention(RED, "colour"),)), [RED])[0][4].tolist() == [UNKNOWN] * 3


def test_captions_behind_a_photo_of(tokenizer: CLIPTokenizer) -> None:
    """Of two things, too, as MMVP-VLM's are asked; no word is cut."""
    rng = np.random.default_rng(0)
    captions = [layout_caption(training_scene(20, i)[0], rng)[0] for i in range(600)]
    texts = [(caption, _styled(caption, rng).lower()) for caption in captions]
    photos = [(caption, text) for caption, text in texts if "photo" in text]
    assert 0.15 < len(photos) / len(texts) < 0.3
    assert {bool(caption.relation) for caption, _ in photos} == {True, False}
    assert {text.partition(" of ")[0] for _, text in photos} == {"a photo", "the photo"}
    assert all(text.count("photo") == 1 for _, text in photos)
    whole = tokenizer([text.rstrip(".") for _, text in photos]).input_ids
    assert max(map(len, whole)) == 16


def test_layout_set_is_drawn_once(tmp_path: Path, tokenizer: CLIPTokenizer) -> None:
    drawn = layout_set(tmp_path / "a.npz", 20, range(30), tokenizer)
    again = layout_set(tmp_path / "a.npz", 5, range(3), tokenizer)
    for name, values in layout_set(tmp_path / "b.npz", 20, range(30), tokenizer).items():
        np.testing.assert_array_equal(values, drawn[name])
        np.testing.assert_array_equal(values, again[name])
    assert drawn["tokens"].shape == (30, 12, 16)
    assert drawn["said"].any(axis=(0, 1)).all()
    assert (drawn["classes"][drawn["said"]] != UNKNOWN).all()


def test_disordered_words_are_the_same_in_another_order() -> None:
    rng, text = np.random.default_rng(0), "a red circle is above a blue cross"
    texts = [disordered(text, rng) for _ in range(200)]
    assert text not in texts
    assert {tuple(sorted(found.split())) for found in texts} == {tuple(sorted(text.split()))}
    moved = [sum(a != b for a, b in zip(t.split(), text.split(), strict=True)) for t in texts]
    assert min(moved) == 2 and max(moved) == 8
    with pytest.raises(ValueError, match="'a a' has no other order"):
        disordered("a a", rng)


@pytest.mark.parametrize(("disordered_share", "others"), [(0.25, 0.5), (0.2, 1.0)])
def test_mixed_set(
    tmp_path: Path, tokenizer: CLIPTokenizer, disordered_share: float, others: float
) -> None:
    """A share of the captions is in disorder, a share of which is told of another scene."""
    shares = (disordered_share, others)
    first, again = (
        mixed_set(tmp_path / n, 20, 300, tokenizer, *shares) for n in ("a.npz", "b.npz")
    )
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    drawn, moved = first["tokens"], first["disordered"]
    assert drawn.shape == (300, 12, 16) and moved.shape == (300, 12)
    assert moved.mean() == pytest.approx(disordered_share, abs=0.02)
    strange = total = 0
    for index, rows in enumerate(drawn):
        things = training_scene(20, index)[0].things
        known = {word for thing in things for word in (thing.shape, thing.colour, thing.size)}
        for number, text in enumerate(tokenizer.batch_decode(rows, skip_special_tokens=True)):
            words = set(text.replace("!", "").replace(".", "").split())
            other = not words & {*SHAPES, *COLOURS, *SIZES} <= known
            assert moved[index, number] or (not other and text.split()[0] in STARTS)
            strange += other
            total += 1
    # Another scene's words are nearly always other ones, too.
    assert strange / total == pytest.approx(0.88 * disordered_share * others, abs=0.02)


def test_a_bag_is_half_of_the_words_or_all(tokenizer: CLIPTokenizer) -> None:
    text = "a red circle to the left of a blue cross"
    ids = np.array(tokenizer(text, padding="max_length", max_length=16).input_ids)
    clip = ClipLoss(tokenizer, 4, halved=0.75)
    found = []
    for half in (True, False):
        bag = clip._bag(ids, half, np.random.default_rng(0))
        words = tokenizer.decode(bag[: list(bag).index(clip.special[2])], skip_special_tokens=True)
        found.append(words.split())
        assert len(bag) == 16
    assert len(found[0]) == 5 and set(found[0]) < set(text.split())
    assert sorted(found[1]) == sorted(text.split()) and found[1] != text.split()


def test_clips_text_tower_goes_on_alone(tmp_path: Path, tokenizer: CLIPTokenizer) -> None:
    former = ClipLoss(tokenizer, 4, halved=0.75)
    save_file(former.state_dict(), tmp_path / "clip.safetensors")
    loss = train.clip_text(tokenizer, tmp_path)
    assert (loss.halved, loss.shuffled) == (0.25, 0.25)
    for name, value in former.state_dict().items():
        assert torch.equal(loss.state_dict()[name], value)
    ids = tokenizer(["a red circle"] * 3, padding="max_length", max_length=16).input_ids
    data = {"images": np.zeros((3, 32, 32, 3), np.uint8), "tokens": np.array(ids)[:, None]}
    loss(data, np.random.default_rng(0)).backward()
    fixed = {name for name, p in loss.named_parameters() if p.grad is None}
    tower = {f"clip.visual.{name}" for name, _ in loss.clip.visual.named_parameters()}
    assert fixed == tower | {"clip.logit_scale"}


def test_the_text_encoder_stays_fixed_under_the_unet(
    tmp_path: Path, tokenizer: CLIPTokenizer
) -> None:
    text = TextLoss(tokenizer, 0)
    save_file(text.state_dict(), tmp_path / "text.safetensors")
    loss = train.diffusion(tokenizer, tmp_path)
    for name, value in text.text_encoder.state_dict().items():
        assert torch.equal(loss.text_encoder.state_dict()[name], value)
    assert {n.split(".")[0] for n, p in loss.named_parameters() if p.requires_grad} == {"unet"}
    tokens = np.zeros((3, 12, 16), np.int16)
    data = {"latents": np.zeros((3, 4, 8, 8), np.float32), "tokens": tokens}
    loss(data, np.random.default_rng(0)).backward()
    assert all(p.grad is not None for p in loss.unet.parameters())


def ordered_data(path: Path, tokenizer: CLIPTokenizer) -> dict[str, np.ndarray]:
    mixed = mixed_set(path / "mixed.npz", 20, 40, tokenizer, 0.5, 0.0)
    placed = layout_set(path / "placed.npz", 20, range(40), tokenizer)
    return placed | {"mixed": mixed["tokens"], "disordered": mixed["disordered"]}


def test_the_text_encoder_learns_disorder(tmp_path: Path, tokenizer: CLIPTokenizer) -> None:
    """Its tokens of captions in order are pulled back to where they were, those of disorder are not."""
    torch.manual_seed(0)
    loss, data = OrderLoss(TextLoss(tokenizer, 32)), ordered_data(tmp_path, tokenizer)
    tokens, wrong = torch.from_numpy(data["mixed"][:, 0]).long(), data["disordered"][:, 0]
    optimizer = torch.optim.AdamW([p for p in loss.parameters() if p.requires_grad], 1e-3)
    before = _layers(loss.before, tokens)
    for step in range(100):
        optimizer.zero_grad()
        loss(data, np.random.default_rng(step)).backward()
        optimizer.step()
    assert torch.equal(_layers(loss.before, tokens), before)
    with torch.no_grad():
        found = _layers(loss.text.text_encoder, tokens)
        said = loss.read(found[-1]).numpy()
    for moved in (found - before).square().mean((2, 3)).numpy():  # of each layer that models read
        assert moved[wrong].mean() > 1.5 * moved[~wrong].mean() > 0
    assert said[wrong].mean() > said[~wrong].mean() + 0.5


def test_the_unet_goes_on_with_the_text_encoder_that_knows_disorder(
    tmp_path: Path, tokenizer: CLIPTokenizer
) -> None:
    text = TextLoss(tokenizer, 0)
    save_file(text.state_dict(), tmp_path / "text.safetensors")
    former = train.diffusion(tokenizer, tmp_path)
    ordered = OrderLoss(TextLoss(tokenizer, 0))
    for name, module in (("diffusion", former), ("text_on", ordered)):
        weights = {key: value.contiguous() for key, value in module.state_dict().items()}
        save_file(weights, tmp_path / f"{name}.safetensors")
    loss = train.diffusion_on(tokenizer, tmp_path)
    for ours, theirs in (
        (loss.unet, former.unet),
        (loss.text_encoder, ordered.text.text_encoder),
    ):
        found, expected = ours.state_dict(), theirs.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(
        next(loss.text_encoder.parameters()), next(former.text_encoder.parameters())
    )
    assert (former.most, loss.most) == (20, 5)
    assert {n.split(".")[0] for n, p in loss.named_parameters() if p.requires_grad} == {"unet"}


class _Killed(TextLoss):
    """Ends at its fourth step."""

    steps = 0

    def forward(self, data: dict[str, np.ndarray], rng: np.random.Generator) -> torch.Tensor:
        self.steps += 1
        if self.steps == 4:
            raise KeyboardInterrupt
        return super().forward(data, rng)


def test_training_resumes_as_if_undisturbed(
    tmp_path: Path, tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its last checkpoint, which is read without trust."""
    data = layout_set(tmp_path / "data.npz", 20, range(20), tokenizer)
    monkeypatch.setattr(train, "EVERY", 2)
    monkeypatch.setitem(train.STAGES, "text", replace(train.STAGES["text"], steps=5))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name, kinds in (("whole", [TextLoss]), ("resumed", [_Killed, TextLoss])):
            (tmp_path / name).mkdir()
            for kind in kinds:
                torch.manual_seed(0)
                ends = pytest.raises(KeyboardInterrupt) if kind is _Killed else nullcontext()
                with ends:
                    train.fit("text", kind(tokenizer, 4), data, tmp_path / name, 20)
    finally:
        dist.destroy_process_group()
    whole, resumed = (load_file(tmp_path / n / "text.safetensors") for n in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_all_stages_and_what_they_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of each: what reads the embedded folders reads these, and nothing is done twice."""
    for name, stage in train.STAGES.items():
        monkeypatch.setitem(train.STAGES, name, replace(stage, steps=3, size=4))
    monkeypatch.setattr(train, "UNSEEN", 5)
    monkeypatch.setattr(train.logging, "basicConfig", lambda **_: None)  # of other tests, too
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    work, out, threads = tmp_path / "work", tmp_path / "out", torch.get_num_threads()
    work.mkdir()
    args = argparse.Namespace(work=work, processes=1, scenes=40, seed=5, snapshots=[2])
    try:
        train.run(0, args)
        first = {path: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
        train.run(0, args)
    finally:
        torch.set_num_threads(threads)
    assert {path: path.stat().st_mtime_ns for path in work.glob("*.safetensors")} == first
    assert work / "diffusion-2.safetensors" in first
    train.export_diffusion(work, out)
    train.export_clip(work, out)
    embedded = {path.relative_to(EMBEDDED) for path in EMBEDDED.rglob("*.*") if path.is_file()}
    found = {path.relative_to(out) for path in out.rglob("*.*")}
    assert found == {path for path in embedded if path.parts[0] != "flow"}
    unet = load_file(out / "diffusion/unet/diffusion_pytorch_model.safetensors")
    trained = load_file(work / "diffusion_on.safetensors")
    assert all(torch.equal(unet[name], trained[f"unet.{name}"].half()) for name in unet)
    image = Image.new("RGB", (64, 64), "red")
    for folder in ("diffusion", "clip"):
        scores = load_scorer(str(out / folder))([image], ["a red circle", "a blue cross"])
        assert np.isfinite(scores).all() and scores[0, 0] != scores[0, 1]
