"""Make hard negative captions and images for a captions file; see --help and docs/negatives.md."""

from diffitm.cli import main
from diffitm.commands.negatives import NegativesConfig, run

if __name__ == "__main__":
    main(NegativesConfig, run, __doc__)
