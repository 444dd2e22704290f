"""Scorers of one's own: found by name, asked for pairs, and what they may give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffitm.core.errors import InputError
from diffitm.core.schema import PairRow
from diffitm.evaluation.evaluate import evaluate
from diffitm.evaluation.examples import data_root, write_examples
from diffitm.scoring.custom import CustomScorer, CustomSpec, find_scorer
from diffitm.scoring.image_reader import Loaded
from diffitm.store.pair_table import write_work
from diffitm.store.score_store import open_store
from tests.tiny import read_images

CODE = """
import numpy as np

class Red:
    version = 3
    score = "redness"

    def __init__(self, device):
        self.device = device

    def __call__(self, images, texts):
        red = [np.asarray(image)[..., 0].mean() for image in images]
        return [[r + len(text) for text in texts] for r in red]

class Scaled(Red):
    def __init__(self, factor, device):
        self.factor = float(factor)

    @classmethod
    def identity(cls, argument):
        return {"factor": float(argument)}

    def __call__(self, images, texts):
        return self.factor * np.asarray(super().__call__(images, texts))

class Bare:
    def __init__(self, device):
        pass

def function(images, texts):
    return []
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def loaded(*colours: str | None) -> list[list[Loaded]]:
    """All at once."""
    return [
        [
            Loaded(Image.new("RGB", (4, 4), colour), "d", None)
            if colour
            else Loaded(None, None, "gone")
            for colour in colours
        ]
    ]


def rows(*texts: Sequence[str]) -> list[PairRow]:
    return [PairRow(i, f"{i}.jpg", list(line)) for i, line in enumerate(texts)]


def test_by_file(file: Path) -> None:
    """Pairs of images with other texts each; a failed image fails its own pairs."""
    spec = CustomSpec(find_scorer(f"{file}:Red"), str(file.parent))
    scorer = spec.build("cpu")
    lines = scorer.score_loaded(
        rows(["a", "bb"], ["ccc"], ["a", "bb"], ["a"]), loaded("red", None, "black", "#0a0000")
    )
    found = {(x["image"], x["text"]): x["similarity"] or x["failure"] for x in lines}
    assert found == {
        ("0.jpg", "a"): 256, ("0.jpg", "bb"): 257, ("1.jpg", "ccc"): "gone", ("2.jpg", "a"): 1,
        ("2.jpg", "bb"): 2, ("3.jpg", "a"): 11,
    }  # fmt: skip
    assert (spec.label, spec.cost, scorer.measure_rate()) == (f"{file}:Red", 1, 0.0)


def test_what_a_store_depends_on(file: Path, tmp_path: Path) -> None:
    """The class, its version and argument, and what it adds; not the folder it lies in."""
    config = CustomSpec(find_scorer(f"{file}:Red"), "/data").store_config()
    assert (config["kind"], config["score"], config["scorer"]) == (
        "scorer",
        "redness",
        "mine.py:Red",
    )
    moved = tmp_path / "elsewhere" / "mine.py"
    moved.parent.mkdir()
    moved.write_text(CODE)
    assert CustomSpec(find_scorer(f"{moved}:Red"), "/data").store_config() == config
    moved.write_text(CODE.replace("version = 3", "version = 4"))
    assert CustomSpec(find_scorer(f"{moved}:Red"), "/data").store_config() != config
    scaled = [CustomSpec(find_scorer(f"{file}:Scaled:{x}"), "/data").store_config() for x in "234"]
    assert len({json.dumps(config) for config in scaled}) == 3
    assert open_store(str(tmp_path), "x", config).similarity == "redness"


def test_an_argument(file: Path) -> None:
    (line,) = (
        CustomSpec(find_scorer(f"{file}:Scaled:2.5"), "")
        .build("cpu")
        .score_loaded(rows(["a"]), loaded("black"))
    )
    assert line["similarity"] == 2.5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("{file}:None", "cannot be imported"),
        ("/none/at/all.py:Red", "cannot be imported"),
        ("{file}:Bare", "has no version"),
        ("{file}:function", "has no version"),
        ("redness", "is unknown"),
    ],
)
def test_what_is_no_scorer(file: Path, name: str, text: str) -> None:
    with pytest.raises(InputError, match=text) as error:
        find_scorer(name.format(file=file))
    assert error.value.field == "scorer"


@pytest.mark.parametrize(("name", "text"), [("Red:2", "without the argument"), ("Scaled", "float")])
def test_arguments_that_do_not_fit(file: Path, name: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        find_scorer(f"{file}:{name}").make("cpu")


class Giving:
    """A scorer that gives what it is told."""

    version, score = 1, "x"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Any:
        return self.answer


@pytest.mark.parametrize("answer", [None, [1.0, 2.0], [[1.0]], "text", [[1.0, 2.0], [3.0]]])
def test_wrong_answers_end_the_run(answer: Any) -> None:
    """A shape other than [images, texts], or no numbers."""
    scorer = CustomScorer(Giving(answer), "mine", "")
    with pytest.raises(InputError, match="'mine' gave"):
        scorer.score_loaded(rows(["a", "b"]), loaded("red"))


def test_tensors_and_numbers_that_are_none() -> None:
    """A tensor of a model is read; one that is not finite fails its own pair."""
    answer = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    lines = CustomScorer(Giving(answer), "mine", "").score_loaded(rows(["a", "b"]), loaded("red"))
    assert [(x["similarity"], x["failure"]) for x in lines] == [
        (1.0, None),
        (None, "the scorer gave nan"),
    ]


def test_a_large_batch_is_cut() -> None:
    sizes = []

    class Counting(Giving):
        def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Any:
            sizes.append(len(images))
            return np.arange(len(images))[:, None]

    scorer = CustomScorer(Counting(None), "mine", "", batch_size=2)
    lines = scorer.score_loaded(rows(["a"], ["a"], ["a"]), loaded("red", "red", "red"))
    assert sizes == [2, 1]
    assert [line["similarity"] for line in lines] == [0.0, 1.0, 0.0]


def test_images_that_come_some_at_a_time(file: Path) -> None:
    """Each goes with its own row."""
    scorer = CustomSpec(find_scorer(f"{file}:Red"), "").build("cpu")
    some = [*loaded("#010000", None), *loaded("#030000")]
    lines = scorer.score_loaded(rows(["a"], ["a"], ["bb", "a"]), some)
    found = [(x["row"], x["text"], x["similarity"] or x["failure"]) for x in lines]
    assert found == [(0, "a", 2), (1, "a", "gone"), (2, "bb", 5), (2, "a", 4)]


def test_from_examples_to_rows(file: Path, tmp_path: Path) -> None:
    """Under the scorer's own kind of score, and no pair with the empty text is asked for."""
    import pyarrow as pa
    from pyarrow import parquet

    from diffitm.core.schema import SCORES

    out = str(tmp_path / "out")
    root = data_root("shapes", 10, out)
    examples = write_examples(["winoground"], root, out)
    spec = CustomSpec(find_scorer(f"{file}:Red"), root)
    store = open_store(out, spec.label, spec.store_config())
    work = write_work([e.uri for e in examples.values()], store, f"{out}/work.parquet")
    asked = read_images(work.uri)
    assert not [row for row in asked if "" in row.texts]
    lines = spec.build("cpu").score(asked)
    parquet.write_table(pa.Table.from_pylist(lines, SCORES), f"{store.uri}/a.parquet")
    result = evaluate({name: e.uri for name, e in examples.items()}, [store])
    assert {row.score for row in result.rows} == {"redness"}
    assert {row.model for row in result.rows} == {f"{file}:Red"}
    assert result.failures == []
