"""What is fetched for each data set, and from where: plain data.

Addresses come from the authors' own repositories (docs/data.md says which). Text files of GitHub are
pinned to a commit, so their size and checksum are known; 'git:' is the blob's id, which git computes
from the content. None of the addresses was tried from the machines that this was written on.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffitm.core.errors import InputError, suggest
from diffitm.datasets.recipe import DatasetRecipe, Download, Hub, ImageList, Named, Need, Rule
from diffitm.datasets.set_sources import DRIVE, GIB, SET_SOURCES

GDBENCH = (
    "https://raw.githubusercontent.com/McGill-NLP/diffusion-itm/"
    "7d5a9c0bcfd32754f26461a2f8fee73e2f01c7a2/"
)
IMAGECODE = (
    "https://raw.githubusercontent.com/McGill-NLP/imagecode/"
    "609f07611aed2599f946c30d730f40a41af1079b/data/"
)
MMBIAS = (
    "https://raw.githubusercontent.com/sepehrjng92/MMBias/"
    "3d6c3d898c4109f0628e5e95e3e1e3adf7b7b145/data/"
)
SVO = (
    "https://raw.githubusercontent.com/deepmind/svo_probes/"
    "206219e2afd9640b8bbe6ef95f49b52b0d4ed350/"
)
KARPATHY = "https://storage.googleapis.com/sfr-vision-language-research/datasets/"
# Size in bytes and sha256 of the files that are pinned to a commit.
PINNED = """
clevr/captions/binding_color_shape.json 60895 f4b548a2ad9e6aa858262a2c7c9ae7162b6a3d3fbd7ae234c08ff1c8167ce930
clevr/captions/binding_shape_color.json 60895 db9c8df71a138f555c384226b5a20e75a089fbe38b5812ad2e4427b9505636a8
clevr/captions/pair_binding_color.json 103565 64cbc8a9d3b7e0b02484413af3ecd9d4cd5c168e68795ec73950f3764ba745ba
clevr/captions/pair_binding_size.json 105201 3db44662c7700b3b1042a12e46b50a0ce5373b08cdce0afb606af9f9e0975d03
clevr/captions/recognition_color.json 61026 d81d2ffaa2a384bce0c92e2c1a866888e6a8376a75125d2751e6270ece15ec32
clevr/captions/recognition_shape.json 48141 191a807c2aae056b83cf86d629ed63d9a6d1596114968fdfe67a62e1984b7c9f
clevr/captions/spatial.json 96483 2319f549c1de1f40f7a1019bcbce57ea5f6d9cdcffa4b35191d34be080070c29
coco_neg/valid_neg_clip.tsv 1018978 a9d00160062384faa2423df728ee3c15db05503fcbb28c212de11a6c8741eff4
flickr30k/val_top10_RN50x64.json 3025012 ea4abb1fe6cce65acd73c1983c4a9c954c21644f48cad61981fb0b03af81a2b5
flickr30k/val_top10_RN50x64_text.json 853171 e70ce1a3308ecc489b1757e1744b8f38d1b1ccc462b3dd9baaf830078d43a31f
imagecode/test_data_unlabeled.json 316435 b8cc677826af2e5fd1a61c0d1b165054b7d27989551a4d98a15954e93e660d5b
imagecode/train_data.json 2392766 0de229dcffd6e160208a9173b8829fa31e35db040f058170c1f770e08f305b69
imagecode/valid_data.json 321098 cb4b8482354ba9bac62b6e101f145f9e59722dcf3b3fd42583f5b6de12bc698a
mmbias/textual_phrases.txt 6070 3e980ebcfa6ff5476eb39c360c3351d0b3bdcd223633a019387dc9e7979846a9
pets/classes.txt 469 86e36d851ccfe8be671250c8c57b52360d9a97d90fff1471dbb6bdf82cdf9c7a
"""
KNOWN = {to: (size, sha256) for to, size, sha256 in map(str.split, PINNED.strip().splitlines())}
CAPTIONS = [Path(to).stem for to in KNOWN if to.startswith("clevr/")]
GROUPS = (
    "Religion/Christian Religion/Muslim Religion/Jewish Religion/Hindu Religion/Buddhist "
    "Nationality/American Nationality/Arab"
).split() + ["Sexual Orientation/Heterosexual", "Sexual Orientation/LGBT"]


def _pinned(url: str, to: str) -> Download:
    size, sha256 = KNOWN[to]
    return Download(to, (url,), int(size), "sha256:" + sha256)


def _bias(kind: str, blob: str) -> Download:
    return Download(
        f"mmbias/data/Images/{kind}.zip",
        (MMBIAS + f"Images/{kind.replace(' ', '%20')}.zip",),
        checksum="git:" + blob,
        rules=(Rule(r"(?:.*/)?([^/]+/[^/.][^/]*\.jpg)", rf"mmbias/data/Images/{kind}/\1"),),
        unpacked=GIB,
    )


def _anywhere(name: str, to: str) -> tuple[Rule, ...]:
    """Files with this name in whatever folder of the archive."""
    return (Rule(rf"(?:.*/)?({name})", to + r"/\1"),)


SOURCES: dict[str, DatasetRecipe] = {
    "winoground": DatasetRecipe(
        steps=(
            Hub(
                "facebook/winoground",
                ("data/examples.jsonl", "data/images.zip"),
                (Rule(r"(data/(?:examples\.jsonl|images\.zip))", r"winoground/\1"),),
                archives=("winoground/data/images.zip",),
                rules=_anywhere(r"ex_\d+_img_[01]\.png", "winoground/data/images"),
                unpacked=4 * GIB,
                gated=True,
            ),
        ),
        needs=(Need("winoground/data/examples.jsonl"), Need("winoground/data/images", 800)),
        licence="Meta's research licence, which the Hub asks you to accept",
    ),
    "clevr": DatasetRecipe(
        steps=(
            *(
                _pinned(GDBENCH + f"data/clevr/captions/{name}.json", f"clevr/captions/{name}.json")
                for name in CAPTIONS
            ),
            Download(
                "clevr/images.zip",
                ("https://zenodo.org/record/8096756/files/images.zip",),
                most=20 * GIB,
                rules=_anywhere(r"CLEVR_[^/]+\.png", "clevr/images"),
                unpacked=40 * GIB,
            ),
        ),
        needs=(Named("clevr/captions/spatial.json", "clevr/images"),),
        licence="not stated with the captions; CLEVR itself is CC BY 4.0",
    ),
    "imagecode": DatasetRecipe(
        steps=(
            _pinned(IMAGECODE + "valid_data.json", "imagecode/valid_data.json"),
            _pinned(IMAGECODE + "train_data.json", "imagecode/train_data.json"),
            _pinned(IMAGECODE + "test_data_unlabeled.json", "imagecode/test_data_unlabeled.json"),
            Download(
                "imagecode/image-sets.zip",
                ("https://zenodo.org/record/6518944/files/image-sets.zip",),
                most=60 * GIB,
                rules=(Rule(r"(?:.*/)?([^/]+/img\d+\.jpg)", r"imagecode/image-sets/\1"),),
                unpacked=100 * GIB,
            ),
        ),
        needs=(Named("imagecode/valid_data.json", "imagecode/image-sets"),),
        licence="MIT (descriptions); the images keep their owners' licences",
        tasks=("imagecode_video",),
    ),
    "pets": DatasetRecipe(
        steps=(
            _pinned(GDBENCH + "data/pets/classes.txt", "pets/classes.txt"),
            Download(
                "pets/images.tar.gz",
                (
                    "https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz",
                    "https://thor.robots.ox.ac.uk/~vgg/data/pets/images.tar.gz",
                ),
                size=791918971,
                checksum="md5:5c4f3ee8e5d25df40f4fd59a7f44e54c",
                rules=_anywhere(r"[A-Za-z][^/]*_\d+\.jpg", "pets/images"),
                unpacked=2 * GIB,
            ),
        ),
        needs=(Need("pets/classes.txt"), Need("pets/images", 7390)),
        licence="CC BY-SA 4.0",
    ),
    "svo": DatasetRecipe(
        steps=(
            Download(
                "svo/svo_probes.csv",
                (SVO + "svo_probes.csv",),
                checksum="git:2dbab46af1169c2d6feb8b2cee26fe7140ffda19",
            ),
            ImageList(
                "svo/svo_probes.csv",
                (("pos_url", "pos_image_id"), ("neg_url", "neg_image_id")),
                "svo/images",
            ),
        ),
        needs=(Need("svo/svo_probes.csv"),),
        licence="CC BY 4.0 (the list); every image keeps its owner's licence",
        tasks=("svo_subj", "svo_verb", "svo_obj"),
    ),
    "aro": DatasetRecipe(
        steps=(
            Download(
                "aro/visual_genome_relation.json", (DRIVE + "1kX2iCHEv0CADL8dSO1nMdW-V0NqIAiP3",)
            ),
            Download(
                "aro/visual_genome_attribution.json",
                (DRIVE + "13tWvOrNOLHxl3Rm9cR3geAdHx2qR3-Tw",),
            ),
            Download(
                "aro/vgr_vga_images.zip",
                (DRIVE + "1qaPlrwhGNMrR3a11iopZUT_GPP_LrgP9",),
                most=20 * GIB,
                rules=_anywhere(r"[^/.][^/]*\.jpg", "aro/images"),
                unpacked=20 * GIB,
            ),
        ),
        needs=(
            Named("aro/visual_genome_relation.json", "aro/images", "image_path"),
            Named("aro/visual_genome_attribution.json", "aro/images", "image_path"),
        ),
        licence="MIT (annotations); Visual Genome's images are CC BY 4.0",
        tasks=("vg_relation", "vg_attribution"),
    ),
    "coco": DatasetRecipe(
        steps=(
            Download(
                "coco/coco_karpathy_test.json",
                (KARPATHY + "coco_karpathy_test.json",),
                checksum="md5:3ff34b0ef2db02d01c37399f6a2a6cd1",
            ),
            _pinned(GDBENCH + "aro/temp_data/valid_neg_clip.tsv", "coco_neg/valid_neg_clip.tsv"),
            Download(
                "coco/val2014.zip",
                ("http://images.cocodataset.org/zips/val2014.zip",),
                size=6645013297,
                checksum="md5:a3d79f5ed8d289b7a7554ce06a5782b3",
                rules=_anywhere(r"COCO_val2014_\d+\.jpg", "coco/val2014"),
                unpacked=10 * GIB,
            ),
        ),
        needs=(
            Named("coco/coco_karpathy_test.json", "coco", "image"),
            Need("coco_neg/valid_neg_clip.tsv"),
            Need("coco/val2014", 40504),
        ),
        licence="CC BY 4.0 (annotations); the images keep their Flickr licences",
        tasks=("coco_order", "coco_neg", "coco_neg_text", "coco_neg_image"),
    ),
    "flickr30k": DatasetRecipe(
        steps=(
            _pinned(
                GDBENCH + "data/flickr30k/val_top10_RN50x64.json",
                "flickr30k/val_top10_RN50x64.json",
            ),
            _pinned(
                GDBENCH + "data/flickr30k/val_top10_RN50x64_text.json",
                "flickr30k/val_top10_RN50x64_text.json",
            ),
            Download("flickr30k/flickr30k_val.json", (KARPATHY + "flickr30k_val.json",)),
        ),
        needs=(
            Need("flickr30k/flickr30k_val.json"),
            Named("flickr30k/val_top10_RN50x64_text.json", "", cut="datasets/"),
        ),
        licence="images: on request, for research only",
        by_hand=(
            "Flickr30K's images are on request only: ask at https://forms.illinois.edu/sec/229675 "
            "and put them into flickr30k/images/<number>.jpg"
        ),
        tasks=("flickr30k_text", "flickr30k_order", "flickr30k_variance"),
    ),
    "mmbias": DatasetRecipe(
        steps=(
            _pinned(MMBIAS + "textual_phrases.txt", "mmbias/textual_phrases.txt"),
            _bias("Nationality", "de2e2899a186053841d1ed9ebc55ca6beff578a1"),
            _bias("Religion", "7478e33ade8c9bf8c1992ed6363f3664606167b8"),
            _bias("Sexual Orientation", "8ed717eab52b9ea0cc89e377fb218ef62ea08b82"),
        ),
        needs=(
            Need("mmbias/textual_phrases.txt"),
            *(Need(f"mmbias/data/Images/{group}", suffixes=(".jpg",)) for group in GROUPS),
        ),
        licence="MIT (collection); the images keep their Flickr licences",
    ),
    "mmvp_vlm": DatasetRecipe(
        steps=(
            Hub(
                "MMVP/MMVP_VLM",
                ("Questions.csv", "MLLM_VLM*Images/*"),
                (
                    Rule(r"(Questions\.csv)", r"mmvp_vlm/\1"),
                    Rule(r"MLLM_VLM[_ ]Images/([^/]+/[^/]+\.jpg)", r"mmvp_vlm/MLLM_VLM_Images/\1"),
                ),
            ),
        ),
        needs=(Need("mmvp_vlm/Questions.csv"), Need("mmvp_vlm/MLLM_VLM_Images/*", 270)),
        licence="see the data set's page on the Hub",
    ),
    **SET_SOURCES,
}


def find(
    names: Iterable[str], table: dict[str, DatasetRecipe] | None = None
) -> dict[str, DatasetRecipe]:
    """The data sets of these names; a task of GDBench stands for the data set that it reads.

    Raises InputError with every unknown name and the nearest known one.
    """
    table = SOURCES if table is None else table
    owners = {task: name for name, source in table.items() for task in source.tasks}
    known = dict.fromkeys([*table, *owners])
    wrong = [f"unknown task {name!r}{suggest(name, known)}" for name in names if name not in known]
    if wrong:
        raise InputError("\n".join(wrong))
    return {owner: table[owner] for owner in (owners.get(name, name) for name in names)}
