"""Public benchmarks through clip-benchmark, and the user's own evaluation of a multimodal model."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffitm.core.errors import InputError
from diffitm.models.clip import LoadedClip, load_clip, resolve_clip
from diffitm.probes.benchmark import benchmark, classification
from diffitm.probes.mllm import find_hook, run_hook
from diffitm.shapes.world import SHAPES, Scene, render, sample_scene

FACES = ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")
FAKE = {
    "__init__.py": "",
    "datasets/__init__.py": "",
    "metrics/__init__.py": "",
    "datasets/builder.py": """
import torch

dataset_collection = {"retrieval": ["flickr8k", "flickr30k"]}
asked = {}


class Pictures(torch.utils.data.Dataset):
    classes, templates = ["one", "two"], ["a {c}"]

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.full((2,), float(index)), index % 2


def build_dataset(dataset_name, root, transform, split, task):
    asked.update(root=root, transform=transform, split=split, task=task)
    if dataset_name == "cifar10":
        return Pictures()
    elif dataset_name == "exits":
        raise SystemExit(1)
    raise ValueError(f"Unsupported dataset: {dataset_name}.")


def get_dataset_default_task(dataset):
    return "zeroshot_classification"


def get_dataset_collate_fn(dataset_name):
    return torch.utils.data.default_collate
""",
    "metrics/zeroshot_classification.py": """
import torch

asked = {}


def zero_shot_classifier(model, tokenizer, classnames, templates, device, amp):
    asked.update(model=model, tokenizer=tokenizer, classnames=classnames, templates=templates)
    return torch.eye(2)


def run_classification(model, classifier, dataloader, device, amp):
    asked.update(device=device, amp=amp, sizes=[len(images) for images, _ in dataloader])
    return torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1, 0])
""",
}
CLIP = LoadedClip("model", "preprocess", "tokenizer")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of the name that says what it was asked."""
    folder = tmp_path / "site" / "clip_benchmark"
    for name, text in FAKE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "clip_benchmark"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder.parent))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "clip_benchmark"]:
        del sys.modules[name]


@pytest.fixture
def installed() -> Path:
    """The folder of the real package."""
    found = importlib.util.find_spec("clip_benchmark")
    if found is None or found.origin is None:
        pytest.skip("clip_benchmark is not installed (pip install 'diffitm[clip-benchmark]')")
    return Path(found.origin).parent


def scenes(number: int) -> list[Scene]:
    return [sample_scene(np.random.default_rng(k), 1) for k in range(number)]


def png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(scene)).save(buffer, "PNG")
    return buffer.getvalue()


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


# Benchmarks


def test_what_the_package_is_asked(fake: Path) -> None:
    found = benchmark(CLIP, "cifar10", "data/{dataset}/x", "cpu", batch_size=2)
    assert found == {"acc1": pytest.approx(2 / 3), "mean_per_class_recall": 0.5}
    built = sys.modules["clip_benchmark.datasets.builder"].asked  # type: ignore[attr-defined]
    task = "zeroshot_classification"
    expected = {"root": "data/cifar10/x", "transform": "preprocess", "split": "test", "task": task}
    assert built == expected
    asked = sys.modules[f"clip_benchmark.metrics.{task}"].asked  # type: ignore[attr-defined]
    assert (asked["model"], asked["tokenizer"]) == ("model", "tokenizer")
    assert (asked["classnames"], asked["templates"]) == (["one", "two"], ["a {c}"])
    assert (asked["device"], asked["amp"], asked["sizes"]) == ("cpu", False, [2, 1])


def test_unknown_data_set(fake: Path) -> None:
    with pytest.raises(
        InputError, match=r"unknown data set 'cifar1O'; did you mean 'cifar10'\?"
    ) as e:
        benchmark(CLIP, "cifar1O", "data")
    assert "Known: cifar10, exits, flickr30k, flickr8k" in str(e.value)


def test_data_set_that_cannot_be_built(fake: Path) -> None:
    """The package ends the process where a download tool is missing."""
    with pytest.raises(
        InputError, match="data set 'exits' at 'data' cannot be built: SystemExit: 1"
    ):
        benchmark(CLIP, "exits", "data")


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    with pytest.raises(InputError, match=r"pip install 'diffitm\[clip-benchmark\]'"):
        benchmark(CLIP, "cifar10", "data")


def test_package_without_what_it_needs(fake: Path) -> None:
    (fake / "metrics/zeroshot_classification.py").write_text("import no_sklearn_here\n")
    with pytest.raises(InputError, match=r"No module named 'no_sklearn_here'.*pip install"):
        benchmark(CLIP, "cifar10", "data")


def test_classification_metrics() -> None:
    """Against their definitions in plain loops; a class without an image has no recall."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(60, 8)), rng.integers(0, 6, 60)
    logits[np.arange(60), labels] += 1
    found = classification(torch.from_numpy(logits), torch.from_numpy(labels))
    order = np.argsort(-logits, axis=1)
    assert found["acc1"] == pytest.approx(np.mean(order[:, 0] == labels))
    assert found["acc5"] == pytest.approx(np.mean((order[:, :5] == labels[:, None]).any(1)))
    recalls = [np.mean(order[labels == k, 0] == k) for k in range(6)]
    assert found["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    assert 0 < found["acc1"] < found["acc5"] < 1
    few = classification(torch.from_numpy(logits[:, :4]), torch.from_numpy(labels % 4))
    assert sorted(few) == ["acc1", "mean_per_class_recall"]


def test_real_classification(installed: Path, tmp_path: Path) -> None:
    """Folders of images, offline, with the package's class names and templates."""
    names = json.loads((installed / "datasets/en_classnames.json").read_text())["fer2013"]
    templates = json.loads(
        (installed / "datasets/en_zeroshot_classification_templates.json").read_text()
    )["fer2013"]
    pixels, labels = [], []
    clip = load_clip(resolve_clip("shapes"))
    for k, scene in enumerate(scenes(28)):
        folder = tmp_path / "fer2013/test" / FACES[k % 7]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.png").write_bytes(png(scene))
        pixels.append(clip.preprocess(Image.fromarray(render(scene))))
        labels.append(k % 7)
    before = sorted(path for path in installed.rglob("*.*") if path.suffix != ".pyc")
    found = benchmark(resolve_clip("shapes"), "fer2013", str(tmp_path / "{dataset}"), batch_size=5)
    assert sorted(path for path in installed.rglob("*.*") if path.suffix != ".pyc") == before
    with torch.no_grad():
        texts = [clip.tokenizer([template.format(c=n) for template in templates]) for n in names]
        classes = torch.stack([unit(unit(clip.model.encode_text(t)).mean(0)) for t in texts])
        logits = unit(clip.model.encode_image(torch.stack(pixels))) @ classes.T
    assert found == pytest.approx(classification(logits, torch.tensor(labels)))
    assert sorted(found) == ["acc1", "acc5", "mean_per_class_recall"]


def test_real_retrieval(installed: Path, tmp_path: Path) -> None:
    drawn = [scene for scene in scenes(60) if scene.things[0].size == "large"][:20]
    captions = [f"a {scene.things[0].colour} {scene.things[0].shape}" for scene in drawn]
    lines = ["image,caption"]
    for k, (scene, caption) in enumerate(zip(drawn, captions, strict=True)):
        Image.fromarray(render(scene)).save(tmp_path / f"{k}.jpg", quality=97, subsampling=0)
        lines.append(f"{k}.jpg,{caption}")
    (tmp_path / "flickr8k_test_karpathy.txt").write_text("\n".join(lines))
    found = benchmark(resolve_clip("shapes"), "flickr8k", str(tmp_path), batch_size=7)
    clip = load_clip(resolve_clip("shapes"))
    pixels = [clip.preprocess(Image.open(tmp_path / f"{k}.jpg")) for k in range(20)]
    with torch.no_grad():
        images = unit(clip.model.encode_image(torch.stack(pixels)))
        scores = unit(clip.model.encode_text(clip.tokenizer(captions))) @ images.T
    for kind, matrix in (("image", scores), ("text", scores.T)):
        ranks = (matrix > matrix.diagonal()[:, None]).sum(1)
        for k in (5, 10):
            expected = (ranks < k).float().mean().item()
            assert found[f"{kind}_retrieval_recall@{k}"] == pytest.approx(expected, abs=0.051)
    assert found["image_retrieval_recall@5"] > 0.6  # 5 of 20 by chance


def test_real_webdataset(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test/nshards.txt").write_text("1")
    (tmp_path / "classnames.txt").write_text("\n".join(SHAPES))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}")
    drawn = [scene for scene in scenes(60) if scene.things[0].size == "large"]
    with tarfile.open(tmp_path / "test/0.tar", "w") as tar:
        for k, scene in enumerate(drawn):
            label = str(SHAPES.index(scene.things[0].shape)).encode()
            for kind, data in (("png", png(scene)), ("cls", label)):
                member = tarfile.TarInfo(f"{k:04d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    found = benchmark(resolve_clip("shapes"), "wds/own", str(tmp_path), batch_size=8)
    assert sorted(found) == ["acc1", "mean_per_class_recall"]
    assert found["acc1"] > 0.4  # a quarter by chance


# A hook

HOOK = """
import numpy as np

value = 3


def good(name, folder):
    return {"mmvp": 0.25, f"{name} in {folder}": (np.float32(0.5), 0.25, 1)}


def fails(name, folder):
    raise KeyError("no such answer")


class Returns:
    def __init__(self, value):
        self.value = value

    def __call__(self, name, folder):
        return self.value


text, empty, key, nan = Returns("0.3"), Returns({}), Returns({3: 0.1}), Returns({"a": float("nan")})
word, flag, two = Returns({"a": "0.3"}), Returns({"a": True}), Returns({"a": (0.1, 0.2)})
turned = Returns({"a": (0.1, 0.3, 0.2)})
"""


@pytest.fixture
def hooks(tmp_path: Path) -> str:
    (tmp_path / "hook.py").write_text(HOOK)
    return str(tmp_path / "hook.py")


def test_hook(hooks: str) -> None:
    found = run_hook(find_hook(f"{hooks}:good"), "tuned", "folder")
    assert found == {"mmvp": (0.25, None, None), "tuned in folder": (0.5, 0.25, 1.0)}
    assert all(type(value) is float for value in found["tuned in folder"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", "returned '0.3', expected a mapping of metric names to numbers"),
        ("empty", "returned {}, expected a mapping"),
        ("key", "returned the key 3, expected a name"),
        ("nan", "returned 'a': nan, expected a finite number"),
        ("word", "returned 'a': '0.3', expected a finite number"),
        ("flag", "returned 'a': True, expected a finite number"),
        ("two", r"returned 'a': \(0.1, 0.2\), expected a finite number, or \(value, low, high\)"),
        ("turned", r"returned 'a': \(0.1, 0.3, 0.2\), expected"),
    ],
)
def test_wrong_results(hooks: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        run_hook(find_hook(f"{hooks}:{name}"), "tuned", "folder")
    assert f"mllm '{hooks}:{name}'" in str(raised.value)


def test_hook_that_fails(hooks: str) -> None:
    with pytest.raises(InputError, match=r"fails' failed on 'tuned': KeyError: 'no such") as raised:
        run_hook(find_hook(f"{hooks}:fails"), "tuned", "folder")
    assert isinstance(raised.value.__cause__, KeyError)


def test_hooks_that_are_none(hooks: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    wrong: dict[str, Any] = {
        hooks: "expected 'file.py:function'",
        f"{hooks}:": "expected 'file.py:function'",
        f"{hooks}:nothing": "cannot be imported: AttributeError",
        f"{hooks}:value": "is 3, expected a function",
        f"{tmp_path}/none.py:f": "cannot be imported: FileNotFoundError",
        f"{tmp_path}/broken.py:f": "cannot be imported: ZeroDivisionError",
        "no_such_module:f": "cannot be imported: ModuleNotFoundError",
    }
    for place, message in wrong.items():
        with pytest.raises(InputError, match=message) as raised:
            find_hook(place)
        assert f"mllm {place!r}" in str(raised.value)
