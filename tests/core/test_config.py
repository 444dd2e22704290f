"""Configuration from YAML and options, the registry, and what their errors say."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pytest

from diffitm.core import registry
from diffitm.core.config import convert, find_outside, lacking, option, parse
from diffitm.core.errors import InputError, suggest
from diffitm.core.provenance import fingerprint, record, redact
from diffitm.evaluation.options import GdbenchConfig
from diffitm.models.denoiser import Denoiser
from diffitm.models.families import FAMILIES
from diffitm.scoring.protocols import FLOW_PROTOCOLS, PROTOCOLS
from diffitm.tasks.base import Task
from diffitm.tasks.registry import TASKS


@dataclass(frozen=True)
class Config:
    """One field of each kind."""

    model: list[str] = option([], "models")
    batch_size: int = option(64, "a number of 100%")
    share: float = option(0.5, "a share")
    dtype: Literal["auto", "fp32"] = option("auto", "a choice")
    limit: int | None = option(None, "may be none")
    name: str = option("x", "a text")
    resume: bool = option(False, "a switch")


def yaml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def problems(arguments: list[str]) -> str:
    with pytest.raises(InputError) as raised:
        parse(Config, arguments)
    return str(raised.value)


def test_defaults_are_not_shared() -> None:
    first, second = parse(Config, []), parse(Config, [])
    assert first == second == Config()
    assert first.model is not second.model


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = yaml(tmp_path, "batch_size: 8\nshare: 1\nmodel: [a, b]\nlimit: 5\n")
    found = parse(Config, ["--config", path, "--batch-size", "9"])
    assert found == Config(model=["a", "b"], batch_size=9, share=1.0, limit=5)
    assert isinstance(found.share, float)


def test_dashes_and_underscores() -> None:
    assert parse(Config, ["--batch-size", "3"]).batch_size == 3
    assert parse(Config, ["--batch_size=3"]).batch_size == 3


def test_booleans(tmp_path: Path) -> None:
    path = yaml(tmp_path, "resume: true\n")
    assert parse(Config, ["--resume"]).resume is True
    assert parse(Config, ["--config", path]).resume is True
    assert parse(Config, ["--config", path, "--no-resume"]).resume is False
    assert "resume: 'maybe' is not true or false" in problems(
        ["--config", yaml(tmp_path, "resume: maybe")]
    )


def test_lists_and_single_values(tmp_path: Path) -> None:
    assert parse(Config, ["--model", "a", "b"]).model == ["a", "b"]
    assert parse(Config, ["--config", yaml(tmp_path, "model: a")]).model == ["a"]


def test_optional_values(tmp_path: Path) -> None:
    assert parse(Config, ["--limit", "7"]).limit == 7
    path = yaml(tmp_path, "limit: 7")
    assert parse(Config, ["--config", path, "--limit", "none"]).limit is None
    assert parse(Config, ["--config", yaml(tmp_path, "limit: null")]).limit is None


def test_empty_file(tmp_path: Path) -> None:
    assert parse(Config, ["--config", yaml(tmp_path, "# nothing\n")]) == Config()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--batch-size", "many"], "batch_size: 'many' is not a whole number"),
        (["--batch-size", "1.5"], "batch_size: '1.5' is not a whole number"),
        (["--share", "half"], "share: 'half' is not a number"),
        (["--dtype", "fp8"], "dtype: 'fp8' is not one of auto, fp32"),
        (["--limit", "x"], "limit: 'x' is not a whole number"),
    ],
)
def test_bad_option_values_are_quoted(arguments: list[str], text: str) -> None:
    assert problems(arguments) == text


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("batch_size: 1.5", "batch_size: 1.5 is not a whole number"),
        ("batch_size: true", "batch_size: True is not a number"),
        ("name: 3", "name: 3 is not text"),
        ("model: [a, 3]", "model: ['a', 3] is not text"),
        ("dtype: [auto]", "dtype: ['auto'] is not one of auto, fp32"),
        ("batch_size: {a: 1}", "batch_size: {'a': 1} is not a whole number"),
    ],
)
def test_bad_file_values_are_quoted(tmp_path: Path, line: str, text: str) -> None:
    assert problems(["--config", yaml(tmp_path, line)]) == text


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = yaml(tmp_path, "bach_size: 3\nname: 3\n")
    found = problems(["--config", path, "--shar", "1", "--dtype", "fp8"]).splitlines()
    assert len(found) == 4
    assert found[0].startswith(
        "unknown option '--shar'; did you mean '--share'? Known: --batch-size"
    )
    assert "unknown key 'bach_size'; did you mean 'batch_size'? Known: batch_size" in found[1]
    assert path in found[1]
    assert set(found[2:]) == {"name: 3 is not text", "dtype: 'fp8' is not one of auto, fp32"}


def test_options_are_not_abbreviated() -> None:
    assert "unknown option '--batch'" in problems(["--batch", "3"])
    assert "unknown option '--sharp=3'; did you mean '--share'" in problems(["--sharp=3"])


def test_stray_argument() -> None:
    assert problems(["shapes"]) == "unexpected argument 'shapes'"


def test_file_that_cannot_be_used(tmp_path: Path) -> None:
    absent = str(tmp_path / "none.yaml")
    assert problems(["--config", absent]) == f"--config: there is no file {absent!r}"
    assert "must hold 'option: value' lines, got list" in problems(
        ["--config", yaml(tmp_path, "- a\n- b\n")]
    )
    assert "not YAML" in problems(["--config", yaml(tmp_path, "a: [1\n")])
    assert str(tmp_path) in problems(["--config", str(tmp_path)])
    (tmp_path / "run.yaml").write_bytes(b"name: \xff\xfe\n")
    assert "run.yaml" in problems(["--config", str(tmp_path / "run.yaml")])


def test_help_tells_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(Config, ["--help"])
    assert raised.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "a number of 100% (default: 64)" in text


def test_suggest() -> None:
    assert suggest("claver", ["clevr", "pets"]) == "; did you mean 'clevr'? Known: clevr, pets"
    assert suggest("zzz", ["clevr", "pets"]) == " Known: clevr, pets"


def test_registry_suggests_the_near_name() -> None:
    with pytest.raises(InputError, match="unknown task 'winogrond'; did you mean 'winoground'"):
        registry.find(TASKS, "winogrond", "task")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_registered_task_loads(name: str) -> None:
    """Under its own name, with where its files come from."""
    task = registry.find(TASKS, name, "task")()
    assert isinstance(task, Task)
    assert (task.name, task.version >= 1) == (name, True)
    assert task.source
    assert task.folder


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_registered_denoiser_loads(name: str) -> None:
    assert issubclass(registry.load(FAMILIES[name].denoiser), Denoiser)
    assert FAMILIES[name].parts


def test_pipeline_knows_every_protocol() -> None:
    """The choices that the user sees are those that exist."""
    assert set(get_args(get_type_hints(GdbenchConfig)["protocol"])) == {
        "auto",
        *PROTOCOLS,
        *FLOW_PROTOCOLS,
    }


@dataclass(frozen=True)
class Preset:
    """A preset with values of its own."""

    PRESETS = {"quick": {"steps": 3, "size": 1}, "slow": {"steps": 9}}  # noqa: RUF012
    preset: str | None = option(None, "preset")
    steps: int = option(5, "steps")
    size: float | None = option(2.0, "size")
    either: int | Literal["auto"] = option("auto", "either")


def test_presets_speak_where_nothing_was_said() -> None:
    assert parse(Preset, ["--preset", "quick", "--steps", "7"]) == Preset("quick", 7, 1.0)
    assert parse(Preset, []) == Preset(None, 5, 2.0)
    assert parse(Preset, ["--preset", "slow", "--size", "none"]) == Preset("slow", 9, None)
    with pytest.raises(InputError, match="--preset fast: must be one of quick, slow"):
        parse(Preset, ["--preset", "fast"])


@dataclass(frozen=True)
class Bounded:
    """A config with bounds beside its numbers."""

    steps: int = option(5, "steps", at_least=5)
    rate: float | None = option(None, "rate", above=0)
    size: float = option(2.0, "size", at_least=2, at_most=8)
    free: int = option(-1, "no bounds")


def test_numbers_at_their_bounds() -> None:
    """The least and the most are allowed; what is none is no number; nor is NaN one within bounds."""
    assert find_outside(Bounded(steps=5, size=8.0)) == []
    assert find_outside(Bounded(steps=2**31 - 1, rate=1e-9)) == []
    assert find_outside(Bounded(rate=1e30)) == []
    assert find_outside(Bounded(steps=4, rate=0.0, size=9.0, free=-9)) == [
        "--steps 4: must be at least 5",
        "--rate 0: must be above 0",
        "--size 9.0: must be at most 8",
    ]
    assert find_outside(Bounded(steps=2**31)) == [f"--steps {2**31}: must be at most {2**31 - 1}"]
    assert len(find_outside(Bounded(rate=float("nan"), size=float("nan")))) == 2


def test_what_has_no_value_is_asked_for() -> None:
    assert lacking(Config(), {"model": "shapes", "batch_size": "8"}) == [
        "give --model, such as --model shapes"
    ]


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("3", int, 3), (3.0, int, 3), ("1e-3", float, 0.001), (None, int | None, None),
        ("none", str | None, None), ("x", list[str], ["x"]), (["1", 2], list[int], [1, 2]),
        ("4", int | Literal["auto"], 4), ("auto", int | Literal["auto"], "auto"), (True, bool, True),
    ],
)  # fmt: skip
def test_values_become_what_their_field_is(value: object, kind: object, expected: object) -> None:
    found = convert(value, kind)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "kind", "told"),
    [
        (3.5, int, "a whole number"), ("3.0", int, "a whole number"), (True, int, "a number"),
        ("x", float, "a number"), (1, bool, "true or false"), (1, str, "text"), (None, str, "text"),
        ("z", Literal["x", "y"], "one of x, y"),
    ],
)  # fmt: skip
def test_values_that_are_not(value: object, kind: object, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}$"):
        convert(value, kind)


def test_an_object_of_a_users_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("VALUE = 7\n")
    assert registry.load(f"{tmp_path}/mine.py:VALUE") == 7
    assert registry.load("diffitm.core.errors:InputError") is InputError


def test_secrets_stay_out_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of variables that are named like one, the longest first, and keys in addresses."""
    for name, value in (
        ("A_TOKEN", "abcdefgh"),
        ("B_KEY", "abcdefgh-more"),
        ("C_SECRET", "abcdefg"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KEYS", "visible-value")
    assert redact("abcdefgh abcdefgh-more abcdefg visible-value") == "*** *** abcdefg visible-value"
    assert redact("s3://b/a?client_secret=xy&region=z") == "s3://b/a?client_secret=***&region=z"
    found = record({"model": "abcdefgh", "out": "s3://KEY:pass@b"})
    assert found["config"] == {"model": "***", "out": "s3://***@b"}
    assert found["config_sha256"] == fingerprint({"out": "s3://KEY:pass@b", "model": "abcdefgh"})
    assert set(found["versions"]) >= {"torch", "ray", "numpy"} and found["versions"]["torch"]


def test_a_fingerprint_is_of_values_whatever_their_order() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    others = [{"a": 1, "b": [2, 1]}, {"a": 1}, {"a": "1", "b": [1, 2]}, {"a": 2, "b": [1, 2]}]
    assert len({fingerprint(other) for other in others}) == 4
    # printf '{"a":1}' | sha256sum
    assert fingerprint({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()


def test_help_names_the_words_and_no_empty_default(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Own:
        kind: Literal["one", "two"] = option("one", "which of them")
        told: Literal["a1", "b2"] | None = option(None, "a1 or b2")
        words: list[Literal["x9", "y9"]] = option(["x9"], "some")
        many: int | None = option(None, "how many (default: as many as fit)")
        check: bool = option(False, "look only")

    with pytest.raises(SystemExit):
        parse(Own, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "which of them [one, two] (default: one)" in text
    assert "a1 or b2 --" in text and "some [x9, y9] (default: x9)" in text
    assert "(default: as many as fit) --" in text and "None" not in text and "False" not in text
