"""Tune a diffusion model's LoRA for matching; see --help and docs/finetuning.md."""

from diffitm.command import main
from diffitm.distributed.finetune import Config, run

if __name__ == "__main__":
    main(Config, run, __doc__)
