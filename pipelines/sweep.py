"""Sweep settings with Ray Tune: sweep.py lambda|timesteps|recap-density [--config FILE] key=value ...

Keys are the options below and those of the pipeline that is swept (finetune.py, gdbench.py, diva.py).
Several values, lr=1e-5,1e-4, or a range, lr=loguniform(1e-5,1e-3), are swept. See docs/sweeps.md.
"""

from diffitm.cli import execute
from diffitm.commands.sweep import KINDS, run
from diffitm.sweep.options import read_sweep

if __name__ == "__main__":
    execute(lambda: run(read_sweep(KINDS, description=__doc__)))
