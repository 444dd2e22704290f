"""Fetch models of the Hub once, so that its cache in the image has all that a run reads of them.

clusters/Dockerfile runs this: python clusters/bake.py --models ORG/NAME .. --clips NAME:TAG ..
"""

from __future__ import annotations

import argparse

from diffitm.cli import execute
from diffitm.models.clip import load_clip, resolve_clip
from diffitm.models.loading import resolve


def bake(arguments: argparse.Namespace) -> None:
    for name in arguments.models:
        resolve(name, variant=arguments.variant or None).fetched()
    for name in arguments.clips:
        load_clip(resolve_clip(name).fetched())  # which fetches tokenizers, too


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[], help="as gdbench.py's --model")
    parser.add_argument("--clips", nargs="*", default=[], help="as gdbench.py's --clip")
    parser.add_argument("--variant", help="of the models' files, such as fp16")
    given = parser.parse_args()
    execute(lambda: bake(given))
