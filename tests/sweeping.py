"""A sweep, and which processors are free after it: `python -m tests.sweeping KIND key=value ..`."""

from __future__ import annotations

import sys
import time

import ray

from diffitm.commands.sweep import KINDS, run
from diffitm.sweep.options import read_sweep

PATIENCE = 180.0

if __name__ == "__main__":
    run(read_sweep(KINDS, sys.argv[1:]))
    total, deadline = ray.cluster_resources()["CPU"], time.monotonic() + PATIENCE
    while (free := ray.available_resources().get("CPU", 0)) < total and time.monotonic() < deadline:
        time.sleep(0.5)
    sys.stdout.write(f"{free:g} of {total:g} processors are free\n")
