"""Hard negatives: rules, checks of proposals, files, prompts, a tiny language model."""

from __future__ import annotations

import csv
import hashlib
import json
import string
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffitm.commands.negatives import PROMPT, NegativesConfig, _check, _info_uri, _read, _related
from diffitm.commands.stages.propose import AnswerActor, Question
from diffitm.core.config import parse
from diffitm.core.errors import InputError
from diffitm.models.causal_lm import (
    CUT_OFF,
    TOO_LONG,
    LanguageModel,
    LanguageSource,
    _Gumbel,
    resolve_language_model,
)
from diffitm.negatives.merge import GIVEN, MODEL, Rejected, mine, read_pairs, write_rows
from diffitm.negatives.rules import SWAPS, checker, normal, rules, tidy
from diffitm.tasks.coco_neg import CocoNegText
from diffitm.tasks.perturb import KINDS, foils
from diffitm.training.rows import TrainingRow, read_rows
from tests.tiny_language import write_llama

CAPTIONS = [
    "A child holding a flowered umbrella and petting a yak.",
    "a large red circle is to the left of a small blue square",
    'A "big" dog, an old cat & the man\'s well-known bird, in front of a house?',
    "Two men.",
    "A tiny elephant under an orange tent near a quiet lake",
    "A red helmet is on a yellow toilet in the dirt.",
]
TEMPLATE = "Change this: {caption} now"


@pytest.mark.parametrize("caption", CAPTIONS)
def test_rules_are_a_function_of_caption_and_seed(caption: str) -> None:
    """The same words, none the caption or another's, each time the same; seeds differ."""
    for seed in range(20):
        made = rules(caption, seed)
        assert made == rules(caption, seed)
        assert list(made) == [kind for kind in (*SWAPS, *KINDS) if kind in made]
        said = [normal(text) for text in (caption, *made.values())]
        assert len(set(said)) == len(said)
        for text in said[1:]:
            lost = set(text.split()) ^ set(said[0].split())
            assert lost <= {"a", "an"}, "only an article may change"
    assert len({tuple(rules(caption, seed).values()) for seed in range(20)}) > 1 or len(made) < 2


@pytest.mark.parametrize("caption", CAPTIONS)
def test_rules_leave_no_trace_but_the_words(caption: str) -> None:
    """Punctuation, spaces and the first capital stay where they are."""
    marks = [char for char in caption if char in string.punctuation.replace("-", "")]
    for made in rules(caption, 3).values():
        assert [char for char in made if char in string.punctuation.replace("-", "")] == marks
        assert made[0].isupper() == caption[0].isupper()
        assert made.split() == made.split(" ")


@pytest.mark.parametrize(
    ("caption", "kind", "expected"),
    [
        ("A dog chases a cat.", "noun swap", "A cat chases a dog."),
        ("An owl chases a cat.", "noun swap", "A cat chases an owl."),
        ("The owl chases a cat.", "noun swap", "The cat chases an owl."),
        ("A toilet is on the yak's umbrella", "noun swap", None),
        ("a red bus near a blue house", "adjective swap", "a blue bus near a red house"),
        ("An old man near a young tree", "adjective swap", "A young man near an old tree"),
        ("a big red bus", "adjective swap", None),
        ("a dog and a cat", "noun swap", None),
        ("red and white", "adjective swap", None),
        ("Two men.", "noun swap", None),
        ("...", "noun swap", None),
        ("", "noun swap", None),
    ],
)
def test_swaps(caption: str, kind: str, expected: str | None) -> None:
    """Two words change places with their articles; words of one expression do not."""
    made = {rules(caption, seed).get(kind) for seed in range(10)}
    if caption.startswith("A toilet"):  # one of two pairs: the third is one expression
        assert made == {
            "A yak is on the toilet's umbrella",
            "An umbrella is on the yak's toilet",
        }
    else:
        assert made == {expected}


def test_the_drawn_pair_is_that_of_plain_code() -> None:
    """Of two pairs of nouns in their order, by the hash of seed, kind and words."""
    words = "a toilet is on the yak umbrella"
    made = [
        "A yak is on the toilet's umbrella",
        "An umbrella is on the yak's toilet",
    ]
    for seed in range(5):
        digest = hashlib.sha256(f"{seed}\nnoun swap\n{words}".encode()).hexdigest()
        rng = np.random.default_rng(int(digest[:32], 16))
        expected = made[int(rng.integers(2))]
        assert rules("A toilet is on the yak's umbrella", seed)["noun swap"] == expected


def test_words_that_differ_in_case_alone_are_not_exchanged() -> None:
    """Which would say the caption again, and cost the kind."""
    caption = "a red Dog meets a dog near a big cat"
    made = {rules(caption, seed).get("noun swap") for seed in range(20)}
    assert made == {
        "a red cat meets a dog near a big Dog",
        "a red Dog meets a cat near a big dog",
    }
    assert normal("A  Dog's Toy-box!") == normal("a dog s toy box") == "a dog s toy box"


@pytest.mark.parametrize(
    ("caption", "answer", "reason"),
    [
        ("one two three four five six", "one two three four five six x y z", None),
        ("one two three four five six", "one two three four five six w x y z", "other length"),
        ("one two three four five six", "six five four", None),
        ("one two three four five six", "six five", "other length"),
        ("one two", "two one x y", None),
        ("one two", "two one x y z", "other length"),
        ("one two three four", "one two x y", None),  # half of the words
        ("one two three four", "one x y z", "other words"),
        ("one one one two", "one two x y", None),
        ("one two three four", "one one one x", "other words"),  # each counts once
        ("one two three four", "it is a small four two", None),  # four words of the prompt
        ("one two three four", "it is a small thing two one", "copies the prompt"),
        ("two three", "two three one\nx", "several lines"),
    ],
)
def test_bounds_of_checks(caption: str, answer: str, reason: str | None) -> None:
    check = checker("{caption}: it is a small thing")
    assert check(caption, answer) == reason


def test_rules_use_aros_orders() -> None:
    """A plain caption's orders are those of the order task where no swap took one."""
    caption = "a woman in a red dress holds an old umbrella"
    made, orders = rules(caption, 0), foils(caption, 0)
    assert [made[kind] for kind in list(KINDS)[1:]] == list(orders)[1:]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("a cat chases a white dog", None),
        ("A white dog chases a cat!", "equals the caption"),
        ("a white  DOG chases a cat", "equals the caption"),
        ("", "empty"),
        ("...", "empty"),
        ("a cat chases\na white dog", "several lines"),
        ("a cat chases a white dog that runs", None),
        ("a cat chases a white dog that runs very fast through town", "other length"),
        ("a dog", "other length"),
        ("two birds sit on roofs", "other words"),
        ("please change the caption so that a dog", "copies the prompt"),
    ],
)
def test_checks(answer: str, reason: str | None) -> None:
    check = checker("Please change the caption so that it is false: {caption}\nNew:")
    assert check("a white dog chases a cat", answer) == reason


def test_a_run_of_the_prompt_in_the_caption_is_no_copy() -> None:
    check = checker("it stands to the left of it: {caption}")
    assert (
        check("a cat, it stands to the left of a dog", "a dog, it stands to the left of a cat")
        is None
    )


def test_tidy() -> None:
    assert tidy(' "a dog"\n') == "a dog"
    assert tidy("“a dog's toy”") == "a dog's toy"


def test_the_default_prompt() -> None:
    """One place for the caption; its own example is told as a copy."""
    text = PROMPT.read_text()
    assert text.count("{caption}") == 1
    copied = checker(text)("a small dog chases a cat", "a white dog chases a black cat")
    assert copied == "copies the prompt"


ROWS = [
    TrainingRow("a.jpg", "a dog near a cat", ("a cat near a dog", "A dog near a cat!"), ("b.jpg",)),
    TrainingRow("a.jpg", "a big dog", ("a dog near a cat", "...")),
    TrainingRow("b.jpg", 'it\'s "x"\tand\ny', ()),
]


def test_mine() -> None:
    """Kinds in order, nothing twice, nothing true, an answer's problem before its check."""
    made = {"a dog near a cat": {"noun swap": "A cat near a dog.", "trigrams": "near a cat a dog"}}
    answers = {"a dog near a cat": ("a pig near a cat", None), "a big dog": ("a big", CUT_OFF)}
    check = checker(TEMPLATE)
    rows, kinds, rejected = mine(ROWS, made, answers, {"a.jpg": ["b.jpg", "c.jpg"]}, check)
    assert rows[0].negative_captions == ("a cat near a dog", "near a cat a dog", "a pig near a cat")
    assert kinds == [(GIVEN, "trigrams", MODEL), (), ()]
    assert [row.negative_images for row in rows] == [("b.jpg", "c.jpg"), ("b.jpg", "c.jpg"), ()]
    assert rejected == [
        Rejected("a dog near a cat", "A dog near a cat!", GIVEN, "equals the caption"),
        Rejected("a dog near a cat", "A cat near a dog.", "noun swap", "repeats another"),
        Rejected("a big dog", "a dog near a cat", GIVEN, "another caption of the image"),
        Rejected("a big dog", "...", GIVEN, "empty"),
        Rejected("a big dog", "a big", MODEL, CUT_OFF),
    ]


@pytest.mark.parametrize("ending", ["tsv", "parquet"])
def test_files_come_back_as_they_were(tmp_path: Path, ending: str) -> None:
    """Quotes, tabs and line ends too; training's reader and this one agree."""
    rows = [ROWS[0], TrainingRow("a.jpg", "a big dog", ("a 'small' dog",)), ROWS[2]]
    path = tmp_path / "new" / f"out.{ending}"
    write_rows(str(path), rows, [(GIVEN, "llm"), ("llm",), ()])
    assert read_rows(str(path))[0] == read_pairs(str(path))[0] == rows
    if ending == "parquet":
        table = pq.read_table(path)
        assert table["kinds"].to_pylist() == [[GIVEN, "llm"], ["llm"], []]
    assert not list(path.parent.glob("*.part"))


def test_a_negative_image_is_the_first_line_that_has_it(tmp_path: Path) -> None:
    rows = [
        TrainingRow("a.jpg", "x"),
        TrainingRow("b.jpg", "y"),
        TrainingRow("b.jpg", "z", (), ("a.jpg",)),
    ]
    rows.append(TrainingRow("c.jpg", "w", ("it's",), ("b.jpg", "a.jpg")))
    write_rows(str(tmp_path / "out.tsv"), rows, [()] * 4)
    lines = (tmp_path / "out.tsv").read_text().splitlines()
    assert lines[0] == "\ttitle\tfilepath\tneg_caption\tneg_image"
    assert lines[3:] == ["2\tz\tb.jpg\t[]\t[0]", '3\tw\tc.jpg\t"[""it\'s""]"\t[1, 0]']


def test_the_authors_file(published: Path, tmp_path: Path) -> None:
    """Read, given rules' captions, written: the same lines with more captions."""
    source = published / "annotations" / "coco_neg" / "valid_neg_clip.tsv"
    rows, _ = read_pairs(str(source))
    made = {row.caption: rules(row.caption, 0) for row in rows}
    done, kinds, _ = mine(rows, made, {}, {}, checker(TEMPLATE))
    target = tmp_path / "coco_neg" / "valid_neg_clip.tsv"
    write_rows(str(target), done, kinds)
    lines = [
        list(csv.reader(file.read_text().splitlines(), delimiter="\t")) for file in (source, target)
    ]
    assert lines[0][0] == lines[1][0]
    assert [line[:3] for line in lines[0]] == [line[:3] for line in lines[1]]
    examples = list(CocoNegText().examples(str(tmp_path)))
    assert len(examples) == len(rows)
    for row, line, example in zip(rows, done, examples, strict=True):
        assert line.negative_captions[: len(row.negative_captions)] == row.negative_captions
        assert len(line.negative_captions) >= len(row.negative_captions) + 3
        assert example.failure is None


def test_captions_files_of_candidates(tmp_path: Path) -> None:
    """The Karpathy layout gives a row a caption."""
    path = tmp_path / "karpathy.json"
    path.write_text(json.dumps([{"image": "x/a.jpg", "caption": ["a dog", "a cat"]}]))
    assert read_pairs(str(path))[0] == [
        TrainingRow("x/a.jpg", "a dog"),
        TrainingRow("x/a.jpg", "a cat"),
    ]


@pytest.mark.parametrize(
    ("image", "caption", "told"),
    [
        ("", "a dog", "the row names no image"),
        ("a.jpg", " ", "the row has no text"),
        ("a.jpg", "...", "its caption '...' has no word"),
    ],
)
def test_a_row_that_cannot_be_used_costs_itself(
    tmp_path: Path, image: str, caption: str, told: str
) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": ["b.jpg", image], "caption": ["a cat", caption]}), path)
    rows, lost = read_pairs(str(path))
    assert rows == [TrainingRow("b.jpg", "a cat")]
    assert [(row.place, row.failure) for row in lost] == [("rows.parquet, row 1", told)]
    pq.write_table(pa.table({"image": [image], "caption": [caption]}), path)
    with pytest.raises(InputError, match=r"rows\.parquet.*row 0"):
        read_pairs(str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="captions: there is no file"):
        read_pairs(str(tmp_path / "other.tsv"))


def config(tmp_path: Path, *more: str) -> NegativesConfig:
    path = tmp_path / "rows.parquet"
    lists = [["far.jpg"], []]
    names = {"image": ["a.jpg", "b.jpg"], "caption": ["a dog", "a cat"], "negative_images": lists}
    pq.write_table(pa.table(names), path)
    options = ("--captions", str(path), "--out", str(tmp_path / "out.parquet"))
    return parse(NegativesConfig, [*options, *more])


def test_all_problems_of_options_together(tmp_path: Path) -> None:
    options = ("--kinds", "llm", "images", "--near", "0", "--temperature", "-1", "--prompt", "no")
    made = config(tmp_path, *options, "--out", str(tmp_path / "rows.parquet"), "--images", "/no")
    with pytest.raises(InputError) as raised:
        _check(made)
    told = str(raised.value)
    for part in (
        "--kinds llm needs --llm", "--kinds images needs --clip", "--near 0: must be at least 1",
        "--temperature -1.0: must be at least 0", "--prompt: there is no file",
        "would replace the captions file", "--images: there is no file",
    ):  # fmt: skip
        assert part in told
    with pytest.raises(InputError, match="--llm is for --kinds llm"):
        _check(config(tmp_path, "--llm", "org/name"))
    with pytest.raises(InputError, match="give --captions"):
        _check(NegativesConfig())
    with pytest.raises(InputError, match="kinds"):
        config(tmp_path, "--kinds", "rule")


def test_the_preset(tmp_path: Path) -> None:
    made = config(tmp_path, "--preset", "softneg-sd15")
    assert made.kinds == ["rules", "llm"] and made.llm == "meta-llama/Llama-3.1-8B-Instruct"
    assert config(tmp_path, "--preset", "softneg-sd15", "--llm", "x/y").llm == "x/y"


@pytest.mark.parametrize("text", ["Change it.", "{caption} {caption}", ""])
def test_a_prompt_without_a_place(tmp_path: Path, text: str) -> None:
    (tmp_path / "prompt.txt").write_text(text)
    made = config(tmp_path, "--kinds", "llm", "--llm", "x/y", "--prompt", f"{tmp_path}/prompt.txt")
    with pytest.raises(InputError, match=r"must hold \{caption\} once"):
        _read(made)


def test_a_negative_image_that_a_tsv_cannot_name(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"row 0: negative image 'far\.jpg' is the image of no row"
    ):
        _read(config(tmp_path, "--out", "x.tsv"))
    kept = _read(config(tmp_path, "--out", "x.tsv", "--no-keep-given"))
    assert not kept.rows[0].negative_images


def test_the_info_beside_the_file() -> None:
    assert _info_uri("/a.b/out.tsv") == "/a.b/out.info.json"
    assert _info_uri("s3://b/out.parquet?region=x") == "s3://b/out.info.json?region=x"


def test_images_that_share_a_caption_are_no_negatives() -> None:
    rows = [
        TrainingRow("a", "A dog."),
        TrainingRow("a", "x"),
        TrainingRow("b", "a dog"),
        TrainingRow("c", "y"),
        TrainingRow("d", "X"),
    ]
    assert _related(rows, ["a", "b", "c", "d"]) == [[0, 1, 3], [0, 1], [2], [0, 3]]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "chat"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Llama, without and with a chat template."""
    return write_llama(tmp_path_factory.mktemp("llama"), CAPTIONS, chat=request.param)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_answers_do_not_depend_on_the_batch(llama: Path, temperature: float) -> None:
    """Prompts of other lengths beside it, or none; a seed gives the same samples again."""
    source = resolve_language_model(str(llama))
    model = LanguageModel(source, temperature=temperature, seed=1, max_new_tokens=10)
    together = model.answer(CAPTIONS)
    assert together == [model.answer([caption])[0] for caption in CAPTIONS]
    assert len({answer.text for answer in together}) > 1
    other = LanguageModel(source, temperature=temperature, seed=2, max_new_tokens=10)
    assert (other.answer(CAPTIONS) == together) == (temperature == 0)


def test_a_greedy_answer_is_the_likeliest_words(llama: Path) -> None:
    """Word by word, by the bare model without padding or cache."""
    model = LanguageModel(resolve_language_model(str(llama)), max_new_tokens=6)
    for caption, answer in zip(CAPTIONS, model.answer(CAPTIONS), strict=True):
        text = model._as_chat(caption)
        plain = model.tokenizer.chat_template is None
        ids = model.tokenizer(text, add_special_tokens=plain)["input_ids"]
        assert (ids[0], ids.count(0)) == (0, 1), "one begin, whoever writes it"
        start = len(ids)
        with torch.inference_mode():
            while len(ids) < start + 6 and (len(ids) == start or ids[-1] != 1):
                ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer.text == model.tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert answer.problem == (None if ids[-1] == 1 else CUT_OFF)


def test_samples_follow_the_softmax(llama: Path) -> None:
    """One word drawn 400 times at temperature 1 against the model's own probabilities."""
    model = LanguageModel(resolve_language_model(str(llama)), temperature=1.0, max_new_tokens=1)
    text = model._as_chat(CAPTIONS[0])
    ids = model.tokenizer(text, return_tensors="pt", add_special_tokens=text == CAPTIONS[0])
    with torch.inference_mode():
        wanted = model.model(ids["input_ids"]).logits[0, -1].double().softmax(-1)
    counts = torch.zeros(len(wanted), dtype=torch.float64)
    for seed in range(400):
        model.seed = seed
        made = model._generate([text], [CAPTIONS[0]], text == CAPTIONS[0])
        counts[made[0, 0]] += 1
    assert (counts / 400 - wanted).abs().max() < 0.1
    assert counts.max() < 400


def test_a_prompt_that_is_too_long(tmp_path: Path) -> None:
    """It is told; the others are answered."""
    folder = write_llama(tmp_path / "llama", CAPTIONS, positions=24)
    model = LanguageModel(resolve_language_model(str(folder)), max_new_tokens=8)
    answers = model.answer(["a dog " * 20, "a dog"])
    assert answers[0] == ("", TOO_LONG)
    assert answers[1] == model.answer(["a dog"])[0]
    assert answers[1].problem != TOO_LONG


def test_weights_that_are_not_whole(tmp_path: Path) -> None:
    """No random weights in their place."""
    from safetensors.torch import load_file, save_file

    folder = write_llama(tmp_path / "llama", CAPTIONS)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"its weights lack \d+, such as model\.layers\.1"):
        LanguageModel(resolve_language_model(str(folder)))


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no .safetensors"),
        ("tokenizer", "no tokenizer"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path: Path, broken: str, told: str) -> None:
    folder = write_llama(tmp_path / "llama", CAPTIONS)
    for path in folder.glob(f"{broken}*"):
        path.unlink()
    with pytest.raises(InputError, match=told):
        resolve_language_model(str(folder))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_type": "clip_text_model"}, "no causal language model"),
        ({"model_type": "unheard-of", "auto_map": {"AutoConfig": "x.Y"}}, "cannot be used"),
    ],
)
def test_a_model_of_another_kind(tmp_path: Path, settings: dict, told: str) -> None:
    """No code of a model's folder runs."""
    folder = write_llama(tmp_path / "llama", CAPTIONS)
    (folder / "x.py").write_text("raise SystemExit('ran')")
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=told):
        resolve_language_model(str(folder))


@pytest.mark.parametrize("name", ["no/such/folder", "./none", "plain"])
def test_a_name_that_is_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(InputError, match="neither a folder nor a Hub id"):
        resolve_language_model(name)


def test_an_unreadable_model_is_told_at_its_start(tmp_path: Path) -> None:
    source = LanguageSource("x", str(tmp_path), None, "")
    with pytest.raises(InputError, match="llm 'x' cannot be loaded"):
        AnswerActor(Question(source, TEMPLATE, "fp32", 0.0, 0, 8), 4, "cpu", None)


def test_a_sample_is_one_of_the_softmax() -> None:
    """Of logits / temperature; each token by noise of its own, which the prompt and the seed give."""
    logits = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    prompts = [f"prompt {i}" for i in range(3000)]
    noise = _Gumbel(prompts, 0, 0.5)
    scores = logits.expand(3000, 4)
    first, second = noise(torch.tensor([]), scores), noise(torch.tensor([]), scores)
    squares = torch.tensor([0.01, 0.04, 0.09, 0.16])
    for drawn in (first, second):
        shares = torch.bincount(drawn.argmax(1), minlength=4) / 3000
        torch.testing.assert_close(shares, squares / squares.sum(), atol=0.03, rtol=0)
    assert not torch.equal(first, second)
    alone = _Gumbel(prompts[7:8], 0, 0.5)(torch.tensor([]), scores[:1])
    assert torch.equal(alone[0], first[7])
    assert not torch.equal(_Gumbel(prompts[7:8], 1, 0.5)(torch.tensor([]), scores[:1])[0], first[7])


class _Counter:
    """Stands in for the counter's handle."""

    def __init__(self) -> None:
        self.add, self.count = self, 0

    def remote(self, count: int) -> None:
        self.count += count


def test_answers_of_a_model_that_knows_some(tmp_path: Path) -> None:
    """From the captions through the model and its checks to the rows."""
    wanted = {
        "a dog chases a cat": "a cat chases a dog",
        "a red bus": "a blue bus",
        "two men sit": "two men sit",
        "an old tree": "it is",
        "a cup on a table": "a cup under a table",
    }
    pairs = [(f"Change this: {caption} now", answer) for caption, answer in wanted.items()]
    folder = write_llama(tmp_path / "llama", [], chat=True, pairs=pairs)
    question = Question(resolve_language_model(str(folder)), TEMPLATE, "fp32", 0.0, 0, 12)
    counter = _Counter()
    actor = AnswerActor(question, 2, "cpu", counter)
    groups = [(0, 0, list(wanted)[:3]), (1, 3, list(wanted)[3:])]
    lines = [{"row": r, "start": s, "names": names, "truth": []} for r, s, names in groups]
    found = actor(pa.Table.from_pylist(lines)).to_pylist()
    assert counter.count == 5
    assert [(line["row"], line["position"]) for line in found] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 3),
        (1, 4),
    ]
    assert [line["text"] for line in found] == list(wanted.values())
    answers = {c: (line["text"], line["problem"]) for c, line in zip(wanted, found, strict=True)}
    rows, kinds, rejected = mine(
        [TrainingRow("a.jpg", c) for c in wanted], {}, answers, {}, checker(TEMPLATE)
    )
    assert [len(row.negative_captions) for row in rows] == [1, 1, 0, 0, 1]
    assert kinds == [("llm",), ("llm",), (), (), ("llm",)]
    assert [item.reason for item in rejected] == ["equals the caption", "other words"]
