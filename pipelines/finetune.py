"""Tune a diffusion model's LoRA for matching; see --help and docs/finetuning.md."""

from diffitm.command import main
from diffitm.distributed.finetune import run
from diffitm.training.options import Config

if __name__ == "__main__":
    main(Config, run, __doc__)
