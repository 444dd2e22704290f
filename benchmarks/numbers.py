"""Run a pipeline script in a Ray whose GPUs are numbers: python -m benchmarks.numbers SCRIPT OPTION.."""

from __future__ import annotations

import runpy
import sys

import ray

from tests.processors import WITHOUT_CUDA

if __name__ == "__main__":
    ray.init("local", num_cpus=4, num_gpus=1, include_dashboard=False, runtime_env=WITHOUT_CUDA)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
