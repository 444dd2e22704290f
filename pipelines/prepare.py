"""Fetch published data into the layout that the tasks read: prepare.py TASK.. --data DIR

TASK is winoground, clevr, imagecode, pets, svo, aro, coco, flickr30k, mmbias, mmvp_vlm, a task of
GDBench such as vg_relation, or all. docs/data.md says what each one fetches, its size and licence.
"""

import sys

from diffitm.cli import main
from diffitm.commands.prepare import run
from diffitm.datasets.options import DataConfig, with_tasks

if __name__ == "__main__":
    sys.argv[1:] = with_tasks(sys.argv[1:])
    main(DataConfig, run, __doc__)
