"""Tune a diffusion model's LoRA for matching; see --help and docs/finetuning.md."""

from diffitm.cli import main
from diffitm.commands.finetune import run
from diffitm.training.lora.options import FinetuneConfig

if __name__ == "__main__":
    main(FinetuneConfig, run, __doc__)
