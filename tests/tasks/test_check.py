"""--check, and tasks that a user adds from outside of the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffitm.commands.gdbench import GdbenchConfig, run
from diffitm.core.errors import InputError
from diffitm.shapes.layouts import write_world
from diffitm.shapes.sets import write_sets
from diffitm.tasks.base import Task
from diffitm.tasks.check import check
from diffitm.tasks.registry import GDBENCH, TASKS, find_task

ROOT = Path(__file__).resolve().parents[2]
OWN_TASK = '''
from diffitm.core.schema import Example
from diffitm.tasks.base import RetrievalTask

class Mine(RetrievalTask):
    """lines.txt: image, right text, wrong text."""
    name = "mine"
    folder = "mine"
    source = "me"

    def examples(self, root):
        for line in self.read_text(root, "lines.txt").splitlines():
            image, right, wrong = line.split("|")
            yield Example(image, (f"mine/{image}",), (right, wrong), "text", cluster=image)

class NotATask:
    pass
'''


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_world(str(tmp_path / "world"), 10)
    return tmp_path / "world"


@pytest.mark.parametrize("name", sorted(GDBENCH))
def test_ready(world: Path, name: str) -> None:
    state = check(find_task(name)(), str(world))
    assert (state.state, state.missing, state.unreadable) == ("ready", 0, 0)
    assert state.can_run
    assert min(state.examples, state.images) > 0


def test_missing_and_unreadable_images(world: Path) -> None:
    """Counted apart, the first named with its reason; the rest can run."""
    images = sorted((world / "pets" / "images").iterdir())
    images[0].unlink()
    images[1].write_bytes(images[1].read_bytes()[:500])
    images[2].write_text("<html>404</html>")
    state = check(find_task("pets")(), str(world))
    # The reader lists the folder, so the file that was taken away is not part of the task.
    assert (state.state, state.missing, state.unreadable) == ("incomplete", 0, 2)
    file = world / "svo" / "images" / "1.jpg"
    file.unlink()
    state = check(find_task("svo_subj")(), str(world))
    assert (state.missing, state.unreadable, state.can_run) == (1, 0, True)
    assert state.first == "svo/images/1.jpg: there is no such file"


def test_no_images_at_all(world: Path) -> None:
    for path in (world / "clevr" / "images").iterdir():
        path.unlink()
    state = check(find_task("clevr")(), str(world))
    assert (state.state, state.missing, state.can_run) == ("incomplete", state.images, False)


def test_absent_and_incomplete_files(world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    state = check(find_task("winoground")(), str(tmp_path / "empty"))
    assert (state.state, state.can_run) == ("absent", False)
    assert "winoground/data/test-*.parquet" in state.problem
    (world / "flickr30k" / "flickr30k_val.json").unlink()
    state = check(find_task("flickr30k_order")(), str(world))
    assert (state.state, state.can_run) == ("incomplete", False)
    assert "flickr30k_val.json" in state.problem
    assert check(find_task("flickr30k")(), str(world)).state == "ready"


def test_check_command(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line a task, with where its files come from; refuses when a chosen task cannot run."""
    chosen = ["winoground", "clevr", "pets"]
    run(GdbenchConfig(tasks=chosen, data=str(world), out=str(world / "out"), check=True))
    text = capsys.readouterr().out
    assert text.count(" ready ") == 3
    assert "all 3 tasks can run" in text
    (world / "clevr" / "captions" / "spatial.json").unlink()
    with pytest.raises(InputError, match="1 of 3 tasks cannot run: clevr"):
        run(GdbenchConfig(tasks=chosen, data=str(world), out=str(world / "out"), check=True))
    text = capsys.readouterr().out
    assert "spatial.json" in text
    assert find_task("clevr").source in text


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "my_task.py"
    file.write_text(OWN_TASK)
    return file


def test_task_of_a_file_or_a_module(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_task(f"{own}:Mine").name == "mine"
    monkeypatch.syspath_prepend(str(own.parent))
    found = find_task("my_task:Mine")
    assert issubclass(found, Task)
    assert found.name == "mine"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("{file}:NotATask", "is not a subclass of"),
        ("{file}:Nothing", "cannot be imported"),
        ("nowhere.at.all:Mine", "cannot be imported"),
        ("{file}x.py:Mine", "cannot be imported"),
        ("winogruond", "did you mean 'winoground'?"),
    ],
)
def test_task_that_is_none(own: Path, name: str, told: str) -> None:
    with pytest.raises(InputError, match="task") as raised:
        find_task(name.format(file=own))
    assert told in str(raised.value)


def test_task_of_an_installed_package(own: Path, tmp_path: Path) -> None:
    """An entry point of the group diffitm.tasks makes a name of its own."""
    info = tmp_path / "my_task-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-task\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[diffitm.tasks]\nmine = my_task:Mine\n")
    code = "from diffitm.tasks.registry import find_task; print(find_task('mine').source)"
    path = f"{tmp_path}:{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path}
    )
    assert done.stdout.strip() == "me", done.stderr


def test_own_task_beside_ours_needs_another_name(own: Path, world: Path) -> None:
    own.write_text(OWN_TASK.replace('name = "mine"', 'name = "clevr"'))
    config = GdbenchConfig(model=["shapes"], tasks=["clevr", f"{own}:Mine"], data=str(world))
    with pytest.raises(InputError, match="two tasks have the name 'clevr'"):
        run(config)


def test_everything_missing_is_told_at_once(world: Path, tmp_path: Path) -> None:
    """Before anything is scored, with the way out."""
    (world / "pets" / "classes.txt").unlink()
    (world / "clevr" / "captions" / "spatial.json").unlink()
    config = GdbenchConfig(model=["shapes"], data=str(world), out=str(tmp_path / "out"))
    with pytest.raises(InputError) as raised:
        run(config)
    told = str(raised.value)
    assert "classes.txt" in told
    assert "spatial.json" in told
    assert "--check" in told
    assert not (tmp_path / "out" / "run.json").exists()


def test_all_stands_for_every_task(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sets(str(world), 10)
    run(GdbenchConfig(data=str(world), out=str(world / "out"), check=True, tasks=["all", "clevr"]))
    assert f"all {len(TASKS)} tasks can run" in capsys.readouterr().out
    assert json.loads((world / "world.json").read_text())["scenes"] == 10
