"""Training curves while they grow: TensorBoard always, W&B and MLflow where the user has them."""

from __future__ import annotations

import functools
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffitm.core import storage
from diffitm.core.errors import suggest

log = logging.getLogger("diffitm")
Line = dict[str, float]
FOLDER, PROJECT = "tensorboard", "diffitm"


def track_problems(names: Sequence[str]) -> list[str]:
    """Trackers that are unknown or not installed."""
    found = []
    for name in names:
        if name not in TRACKERS:
            found.append(
                f"--track {name}: must be one of {', '.join(TRACKERS)}" + suggest(name, TRACKERS)
            )
        elif importlib.util.find_spec(name) is None:
            found.append(f"--track {name}: is not installed; pip install {name}")
    return found


class RunTracker:
    """Passes lines of the log on to TensorBoard (below a local OUT) and to the trackers `names`.

    `key` identifies the run, so that one that goes on continues its W&B run. `listen` gets each line
    first.
    """

    def __init__(
        self,
        names: Sequence[str],
        out: str,
        key: str,
        settings: dict[str, Any],
        listen: Callable[[Line], None] | None = None,
    ) -> None:
        self.listen = listen
        self.folder = Path(out) / FOLDER if "://" not in out else None
        self.events: Any = None
        self.opened = {name: TRACKERS[name](out, key, settings) for name in names}

    def add(self, line: Line) -> None:
        """Show a line; it has a step."""
        if self.listen is not None:
            self.listen(line)
        step, values = int(line["step"]), {k: v for k, v in line.items() if k != "step"}
        if self.folder is not None:
            if self.events is None:
                self.events = _writer(self.folder, purge_step=step, flush_secs=1)
            _write(self.events, step, values)
        for name, (show, _) in list(self.opened.items()):
            self._safely(name, functools.partial(show, values, step))

    def close(self) -> None:
        """End the trackers' runs."""
        if self.events is not None:
            self.events.close()
        for name, (_, end) in list(self.opened.items()):
            self._safely(name, end)

    def _safely(self, name: str, call: Callable[[], None]) -> None:
        """A tracker that fails is left out from then on; training does not hang on it."""
        try:
            call()
        except Exception as error:  # whatever a tracker raises
            del self.opened[name]
            log.warning("--track %s: gets no more lines: %s: %s", name, type(error).__name__, error)


def write_events(history: Sequence[Line], out: str) -> None:
    """The whole log as TensorBoard's events, in place of those that were written on the way."""
    where = storage.join(out, FOLDER)
    found, path = storage.filesystem(where)
    found.delete_dir_contents(path, missing_dir_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with _writer(Path(folder)) as writer:
            for line in history:
                _write(writer, int(line["step"]), {k: v for k, v in line.items() if k != "step"})
        for file in Path(folder).iterdir():
            storage.write_bytes(storage.join(where, file.name), file.read_bytes())


def _writer(folder: Path, **more: Any) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), **more)


def _write(writer: Any, step: int, values: Line) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)


Opened = tuple[Callable[[Line, int], None], Callable[[], None]]


def _wandb(out: str, key: str, settings: dict[str, Any]) -> Opened:
    import wandb

    run = wandb.init(project=PROJECT, id=key, name=out, config=settings, resume="allow")
    return lambda values, step: run.log(values, step=step), run.finish


def _mlflow(out: str, key: str, settings: dict[str, Any]) -> Opened:
    """Metrics name their run: MLflow's active run is that of a thread, and another one logs."""
    import mlflow

    mlflow.set_experiment(PROJECT)
    tags = {"diffitm.key": key}
    known = mlflow.search_runs(
        experiment_names=[PROJECT],
        filter_string=f"tags.`diffitm.key` = '{key}'",
        output_format="list",
    )
    run = known[0].info.run_id if known else None
    begun = mlflow.start_run(run_id=run, run_name=None if run else out, tags=None if run else tags)
    mlflow.log_params(settings)
    run = begun.info.run_id
    return lambda values, step: mlflow.log_metrics(values, step=step, run_id=run), mlflow.end_run


TRACKERS: dict[str, Callable[[str, str, dict[str, Any]], Opened]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
}
