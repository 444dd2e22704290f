"""The embedded diffusion models by name, as folders in diffusers' layout."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from diffitm.models.weight_cache import cache_folder, content_digest

SHAPES = Path(__file__).resolve().parents[1] / "shapes" / "weights"
UNET, FLOW = "shapes", "shapes-flow"
EMBEDDED = (UNET, FLOW)
SHARED = ("text_encoder", "tokenizer", "vae")  # parts of the U-Net that the flow model has, too


def folder_of(name: str) -> Path:
    """Where one of EMBEDDED lies on this machine. The flow model's folder is put together in the cache, as
    the package holds once what both models have."""
    if name == UNET:
        return SHAPES / "diffusion"
    shared = [file for part in SHARED for file in (SHAPES / "diffusion" / part).glob("*")]
    files = {file: file.relative_to(SHAPES / "diffusion") for file in sorted(shared)}
    own = sorted(file for file in (SHAPES / "flow").rglob("*") if file.is_file())
    files |= {file: file.relative_to(SHAPES / "flow") for file in own}
    kept = cache_folder() / f"{FLOW}-{content_digest(list(files))}"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".part-") as part:
            for file, place in files.items():
                (copy := Path(part, "copy", place)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
            try:
                Path(part, "copy").rename(kept)
            except OSError:
                if not kept.is_dir():  # else another process was first
                    raise
    return kept
