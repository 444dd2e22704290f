"""Tune a CLIP's image tower under a frozen diffusion model (DIVA); see --help and docs/diva.md."""

from diffitm.cli import main
from diffitm.commands.diva import run
from diffitm.training.diva.options import DivaConfig

if __name__ == "__main__":
    main(DivaConfig, run, __doc__)
