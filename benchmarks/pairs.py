"""What score.py costs beside the model: time and the driver's memory by the number of pairs.

python -m benchmarks.pairs --pairs 100000 1000000

The scorer is simulated (a number of the text's bytes), so that reading, streaming, storing, joining and
the report are what is measured. Images are 1,000 drawn squares, each asked for with the same texts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = 1000
SCORE = Path(__file__).resolve().parents[1] / "pipelines" / "score.py"
SCORER = """
import zlib
import numpy as np

class Simulated:
    version, score = 1, "simulated"

    def __init__(self, device):
        pass

    def __call__(self, images, texts):
        values = [zlib.crc32(text.encode()) % 1000 for text in texts]
        means = np.array([np.asarray(image).mean() for image in images], np.float32)
        return means[:, None] + np.array(values, np.float32)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 1_000_000])
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        print(f"{'pairs':>10} {'seconds':>8} {'driver MiB':>11}")
        for pairs in parser.parse_args().pairs:
            seconds, memory = measure(Path(folder), pairs)
            print(f"{pairs:>10,} {seconds:>8.0f} {memory / 1024:>11,.0f}", flush=True)


def prepare(folder: Path) -> None:
    """The images and the scorer."""
    (folder / "images").mkdir()
    (folder / "simulated.py").write_text(SCORER)
    numbers = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:04d}.png")


def measure(folder: Path, pairs: int) -> tuple[float, int]:
    """Seconds of the whole command, and the most memory of its process in KiB."""
    texts = folder / f"texts-{pairs}.txt"
    texts.write_text("\n".join(f"a text of number {n}" for n in range(pairs // IMAGES)))
    out = folder / f"out-{pairs}"
    command = [sys.executable, str(SCORE), "--scorer", "simulated.py:Simulated"]
    command += ["--data", "images", "--text-file", texts.name, "--top-k", "5", "--out", str(out)]
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - start, usage.ru_maxrss


if __name__ == "__main__":
    main()
