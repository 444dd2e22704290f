"""Pick each caption's and each image's top-k candidates with CLIP; see --help and the README."""

from diffitm.cli import main
from diffitm.commands.candidates import CandidatesConfig, run

if __name__ == "__main__":
    main(CandidatesConfig, run, __doc__)
