"""Evaluate diffusion models and CLIP on GDBench; see --help and the README."""

from diffitm.cli import main
from diffitm.commands.gdbench import run
from diffitm.evaluation.options import GdbenchConfig

if __name__ == "__main__":
    main(GdbenchConfig, run, __doc__)
