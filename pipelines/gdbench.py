"""Evaluate diffusion models and CLIP on GDBench; see --help and the README."""

from diffitm.command import main
from diffitm.distributed.gdbench import Config, run

if __name__ == "__main__":
    main(Config, run, __doc__)
