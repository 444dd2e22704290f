"""Evaluate diffusion models and CLIP on GDBench; see --help and the README."""

from diffitm.cli import main
from diffitm.commands.gdbench import GdbenchConfig, run

if __name__ == "__main__":
    main(GdbenchConfig, run, __doc__)
