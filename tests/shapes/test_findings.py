"""What the page of findings is made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.findings import stay_with_models


def test_a_folder_stays_with_its_models(tmp_path: Path) -> None:
    """What is measured of other models, or of nobody knows which, is never joined with today's."""
    folder = tmp_path / "findings"
    stay_with_models(folder)
    (folder / "measured").mkdir()
    stay_with_models(folder)
    note = folder / "models.json"
    models = json.loads(note.read_text())
    note.write_text(json.dumps(models | {"clip": "another"}))
    with pytest.raises(SystemExit, match="is of other embedded models: give a new folder"):
        stay_with_models(folder)
    note.unlink()
    with pytest.raises(SystemExit, match="is of other embedded models"):
        stay_with_models(folder)
    assert not note.exists()
