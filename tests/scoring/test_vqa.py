"""VQAScore and image-text matching heads, on tiny models made from configs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    Blip2ForImageTextRetrieval,
    BlipForImageTextRetrieval,
    LlavaForConditionalGeneration,
)

import diffitm
from diffitm.core.errors import InputError
from diffitm.scoring.custom import CustomSpec, find_scorer
from diffitm.scoring.itm import Itm
from diffitm.scoring.vqa import Vqa
from tests import tiny_vision

TEXTS = ["a red circle", "blue", "a blue circle and a red square"]
QUESTION = 'Does this figure show " ? Please answer yes or no .'


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    made = [Image.new("RGB", (20, 16), colour) for colour in ("red", "blue")]
    made[0].paste("green", (0, 0, 10, 8))
    return made


@pytest.fixture(scope="module", params=[False, True])
def llava(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    return tiny_vision.write_llava(folder, [*TEXTS, QUESTION], chat=request.param)


def test_the_probability_of_yes(llava: Path, images: list[Image.Image]) -> None:
    """That of a plain forward of each pair alone, whatever stands beside it in a batch."""
    found = Vqa(str(llava), "cpu")(images, TEXTS)
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = AutoProcessor.from_pretrained(llava)
    for i, image in enumerate(images):
        for t, text in enumerate(TEXTS):
            asked = f'Does this figure show "{text}"? Please answer yes or no.'
            prompt = f"USER <image> {asked} BOT" if processor.chat_template else f"<image>\n{asked}"
            inputs = processor(images=[image], text=[prompt], return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs).logits[0, -1]
            yes = processor.tokenizer.convert_tokens_to_ids("Yes")
            assert found[i, t] == pytest.approx(float(logits.softmax(-1)[yes]), rel=1e-4)
    assert found.shape == (2, 3) and len(np.unique(found.round(7))) == 6


def test_another_question(llava: Path, tmp_path: Path, images: list[Image.Image]) -> None:
    """From a file; it is a part of what a score depends on, and so are the weights."""
    file = tmp_path / "question.txt"
    file.write_text("red {text} ?\n")
    names = (str(llava), f"{llava},question={file}")
    first, second = (Vqa(name, "cpu")(images, TEXTS) for name in names)
    assert not np.allclose(first, second)
    assert Vqa(names[1], "cpu").prompt("blue").find("red blue ?") >= 0
    known = [CustomSpec(find_scorer(f"vqa:{name}"), "").store_config() for name in names]
    assert known[0] != known[1] and known[0]["score"] == "probability"
    assert str(llava) not in str(known[0]), "another place of the same weights is the same scorer"
    file.write_text("no place for it")
    with pytest.raises(InputError, match=r"holds no \{text\}"):
        find_scorer(f"vqa:{names[1]}")
    with pytest.raises(InputError, match="cannot be read"):
        find_scorer(f"vqa:{llava},question={tmp_path}/none.txt")


@pytest.mark.parametrize("kind", ["blip", "blip-2"])
def test_matching_heads(kind: str, tmp_path: Path, images: list[Image.Image]) -> None:
    """The second class's share of the head's two logits, of each pair alone."""
    write = tiny_vision.write_blip if kind == "blip" else tiny_vision.write_blip2
    folder = write(tmp_path, TEXTS)
    found = Itm(str(folder), "cpu")(images, TEXTS)
    processor = AutoProcessor.from_pretrained(folder)
    loads = BlipForImageTextRetrieval if kind == "blip" else Blip2ForImageTextRetrieval
    model = loads.from_pretrained(folder).eval()
    for i, image in enumerate(images):
        for t, text in enumerate(TEXTS):
            inputs = processor(images=image, text=text, return_tensors="pt")
            with torch.no_grad():
                if kind == "blip":
                    logits = model(**inputs).itm_score
                else:
                    logits = model(**inputs, use_image_text_matching_head=True).logits_per_image
            assert found[i, t] == pytest.approx(float(logits.softmax(-1)[0, 1]), rel=1e-4)
    assert len(np.unique(found.round(7))) == 6


def test_from_python(tmp_path: Path, images: list[Image.Image]) -> None:
    scorer = diffitm.load_scorer(f"itm:{tiny_vision.write_blip(tmp_path, TEXTS)}")
    scores = scorer(images, TEXTS)
    assert scores.dtype == np.float32 and ((scores > 0) & (scores < 1)).all()


def test_what_cannot_be_loaded(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, text in (
        ("vqa", "name the model"),
        ("itm", "name the model"),
        (f"vqa:{tmp_path}/empty", "the folder has no config.json"),
        ("vqa:nothing", "is neither a folder nor a Hub id"),
    ):
        with pytest.raises(InputError, match=text):
            find_scorer(name)
    with pytest.raises(InputError, match="a llava model is none of blip, blip-2"):
        Itm(str(llava), "cpu")
    weights = tiny_vision.write_blip(tmp_path / "cut", TEXTS) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(InputError, match="cannot be loaded"):
        Itm(str(weights.parent), "cpu")
