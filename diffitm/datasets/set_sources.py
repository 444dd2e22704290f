"""The same for the sets beyond GDBench. Their text files are those of a repository's main branch, so what
is known of them is that they can be read."""

from __future__ import annotations

from diffitm.datasets.recipe import DatasetRecipe, Download, Hub, Named, Need, Rule

DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
GITHUB = "https://raw.githubusercontent.com/"
GIB = 2**30
COCO_VAL = Download(
    "coco/val2017.zip",
    ("http://images.cocodataset.org/zips/val2017.zip",),
    size=815585330,
    checksum="md5:442b8da7639aecaf257c1dceb8ba8c80",
    rules=(Rule(r"(?:.*/)?(\d{12}\.jpg)", r"coco/val2017/\1"),),
    unpacked=2 * GIB,
)
SUGARCREPE = "add_att add_obj replace_att replace_obj replace_rel swap_att swap_obj".split()
VALSE = (
    "existence plurals counting-hard counting-small-quant counting-adversarial relations "
    "action-replacement actant-swap coreference-standard coreference-hard foil-it"
).split()
QUESTIONS = {
    "coco_qa_one_obj": "1RsMdpE9mmwnK4zzMPpC1-wTU_hNis-dq",
    "coco_qa_two_obj": "1TCEoM0mgFmz8T4cF7PQ3XJmO6JjtiQ-s",
    "vg_qa_one_obj": "1ARMRzRdohs9QTr1gpIfzyUzvW20wYp_p",
    "vg_qa_two_obj": "1sjVG5O3QMY8s118k7kQM8zzDZH12i_95",
    "controlled_images_dataset": "1ap8mmmpQjLIjPGuplkpBgc1hoEHCj4hm",
    "controlled_clevr_dataset": "1unNNosLbdy9NDjgj4l8fsQP3WiAAGA6z",
}
WHATSUP_IMAGES = {
    "controlled_images": "19KGYVQjrV3syb00GgcavB2nZTW5NXX0H",
    "controlled_clevr": "13jdBpg8t3NqW3jrL6FK8HO93vwsUjDxG",
    "vg_images": "1idW7Buoz7fQm4-670n-oERw9U-2JLJvE",
}
GENERATORS = "DALLE_3 DeepFloyd_I_XL_v1 Midjourney_6 SDXL_2_1 SDXL_Base SDXL_Turbo".split()


def _parquet(repo: str, name: str, licence: str) -> DatasetRecipe:
    """A data set of the Hub whose test split is Parquet with the images inside."""
    rules = (Rule(r"(data/test-[^/]+\.parquet)", rf"{name}/\1"),)
    return DatasetRecipe(
        steps=(Hub(repo, ("data/test-*.parquet",), rules),),
        needs=(Need(f"{name}/data", suffixes=(".parquet",)),),
        licence=licence,
    )


SET_SOURCES: dict[str, DatasetRecipe] = {
    "sugarcrepe": DatasetRecipe(
        steps=(
            *(
                Download(
                    f"sugarcrepe/data/{part}.json",
                    (f"{GITHUB}RAIVNLab/sugar-crepe/main/data/{part}.json",),
                )
                for part in SUGARCREPE
            ),
            COCO_VAL,
        ),
        needs=tuple(
            Named(f"sugarcrepe/data/{part}.json", "coco/val2017", "filename") for part in SUGARCREPE
        ),
        licence="MIT (texts); the images keep their Flickr licences",
    ),
    "sugarcrepe_pp": DatasetRecipe(
        steps=(
            *(
                Download(
                    f"sugarcrepe_pp/data/{part}.json",
                    (f"{GITHUB}Sri-Harsha/scpp/HEAD/data/{part}.json",),
                )
                for part in SUGARCREPE[2:]
            ),
            COCO_VAL,
        ),
        needs=tuple(
            Named(f"sugarcrepe_pp/data/{part}.json", "coco/val2017", "filename")
            for part in SUGARCREPE[2:]
        ),
        licence="CC BY 4.0 (texts); the images keep their Flickr licences",
    ),
    "whatsup": DatasetRecipe(
        steps=(
            *(Download(f"whatsup/{name}.json", (DRIVE + key,)) for name, key in QUESTIONS.items()),
            *(
                Download(
                    f"whatsup/{name}.tar.gz",
                    (DRIVE + key,),
                    most=20 * GIB,
                    rules=(Rule(rf"(?:.*/)?({name}/[^/.][^/]*\.jpe?g)", r"whatsup/\1"),),
                    unpacked=20 * GIB,
                )
                for name, key in WHATSUP_IMAGES.items()
            ),
            COCO_VAL,
        ),
        needs=(
            *(Need(f"whatsup/{name}.json") for name in QUESTIONS),
            Need("whatsup/controlled_images", 412),
            Need("whatsup/controlled_clevr", 408),
            Need("whatsup/vg_images"),
            Need("coco/val2017", 5000),
        ),
        licence="MIT (code and texts); COCO and Visual Genome keep theirs",
        tasks=(
            *("whatsup_a", "whatsup_b", "coco_spatial_one", "coco_spatial_two"),
            *("gqa_spatial_one", "gqa_spatial_two"),
        ),
    ),
    "valse": DatasetRecipe(
        steps=(
            *(
                Download(
                    f"valse/data/{piece}.json",
                    (f"{GITHUB}Heidelberg-NLP/VALSE/main/data/{piece}.json",),
                )
                for piece in VALSE
            ),
            COCO_VAL,
        ),
        needs=(
            *(Need(f"valse/data/{piece}.json") for piece in VALSE),
            Need("coco/val2017", 5000),
            *(Need(f"coco/{name}") for name in ("train2014", "val2014")),
            *(
                Need(name)
                for name in ("visual7w/images", "swig/images_512", "visdial/VisualDialog_val2018")
            ),
        ),
        licence="MIT (texts); the images keep their owners' licences",
        by_hand=(
            "VALSE's other images come from their data sets: COCO's train2014 and val2014 below coco/, "
            "visual7w/images, swig/images_512, visdial/VisualDialog_val2018; a zip of each name does as well"
        ),
    ),
    "cola": DatasetRecipe(
        steps=(
            Download(
                "cola/data/COLA_multiobjects_matching_benchmark.json",
                (
                    f"{GITHUB}arijitray1993/COLA/main/data/COLA_multiobjects_matching_benchmark.json",
                ),
            ),
        ),
        needs=(
            Need("cola/data/COLA_multiobjects_matching_benchmark.json"),
            Need("cola/images"),
        ),
        licence="MIT (texts); Visual Genome's images are CC BY 4.0",
        by_hand="fetch the images from the addresses in its .json into cola/images",
    ),
    "colorswap": DatasetRecipe(
        steps=(
            Download(
                "colorswap/colorswap.zip",
                (DRIVE + "1xdG94DQdz_eQVH1lrEeaHVz_BNkrVgb5",),
                most=20 * GIB,
                rules=(Rule(r"(?:.*/)?(test\.json|images\.zip)", r"colorswap/data/\1"),),
                unpacked=20 * GIB,
            ),
        ),
        needs=(Need("colorswap/data/test.json"), Need("colorswap/data/images.zip")),
        licence="MIT (repository)",
    ),
    "eqben": DatasetRecipe(
        steps=(
            Download(
                "eqben/eqben_vllm.zip",
                (DRIVE + "11YUTf06uzRHtFV8rYi96z4vTPi8_GNEM",),
                most=20 * GIB,
                rules=(
                    Rule(r"(?:.*/)?(all_select\.json)", r"eqben/eqben_vllm/\1"),
                    Rule(r"(?:.*/)?(images/eqben.+)", r"eqben/eqben_vllm/\1"),
                ),
                unpacked=20 * GIB,
            ),
        ),
        needs=(Need("eqben/eqben_vllm/all_select.json"), Need("eqben/eqben_vllm/images/*")),
        licence="Apache-2.0 (code); the images keep their owners' licences",
        tasks=("eqben_mini",),
        by_hand="the 10 % set and all of EqBen are linked from its repository: eqben/ann.json, eqben/images",
    ),
    "bivlc": _parquet("imirandam/BiVLC", "bivlc", "MIT"),
    "vismin": _parquet("mair-lab/vismin-bench", "vismin", "CC BY 4.0"),
    "naturalbench": DatasetRecipe(
        steps=(
            Hub(
                "BaiqiL/NaturalBench",
                ("NaturalBench-Retrieval.zip",),
                (Rule(r"(NaturalBench-Retrieval\.zip)", r"NaturalBench-Retrieval/\1"),),
                archives=("NaturalBench-Retrieval/NaturalBench-Retrieval.zip",),
                rules=(
                    Rule(
                        r"(?:.*/)?(metadata\.json|images/[^/.][^/]*)", r"NaturalBench-Retrieval/\1"
                    ),
                ),
                unpacked=20 * GIB,
            ),
        ),
        needs=(
            Need("NaturalBench-Retrieval/metadata.json"),
            Need("NaturalBench-Retrieval/images"),
        ),
        licence="Apache-2.0; the images keep their owners' licences",
    ),
    "spec": DatasetRecipe(
        steps=(
            Hub(
                "wjpoom/SPEC",
                ("data.zip",),
                (Rule(r"(data\.zip)", r"spec/\1"),),
                archives=("spec/data.zip",),
                rules=(
                    Rule(
                        r"(?:.*/)?((?:(?:absolute|relative)_(?:size|spatial)|existence|count)/[^.].*)",
                        r"spec/data/\1",
                    ),
                ),
                unpacked=40 * GIB,
            ),
        ),
        needs=(
            Need("spec/data/count/image2text.json"),
            Need("spec/data/absolute_size/text2image.json"),
        ),
        licence="not stated",
        tasks=("spec_i2t", "spec_t2i"),
    ),
    "vl_checklist": DatasetRecipe(
        steps=(),
        needs=(
            Need("vl_checklist/data"),
            *(Need(f"vl_checklist/{n}") for n in ("hake", "swig", "vg")),
        ),
        licence="not stated; the images keep their owners' licences",
        by_hand=(
            "put data/ of om-ai-lab/VL-CheckList to vl_checklist/data and the images to "
            "vl_checklist/hake, swig and vg, as its DATASETS.md says"
        ),
    ),
    "genai_bench": DatasetRecipe(
        steps=(
            Hub(
                "BaiqiL/GenAI-Bench-1600",
                ("genai_image.json", *(f"{name}.zip" for name in GENERATORS)),
                (Rule(r"([^/]+\.(?:json|zip))", r"genai_bench/\1"),),
                archives=tuple(f"genai_bench/{name}.zip" for name in GENERATORS),
                rules=(
                    Rule(rf"(?:.*/)?((?:{'|'.join(GENERATORS)})/\d+\.jpeg)", r"genai_bench/\1"),
                ),
                unpacked=60 * GIB,
            ),
        ),
        needs=(
            Need("genai_bench/genai_image.json"),
            *(Need(f"genai_bench/{name}") for name in GENERATORS),
        ),
        licence="not stated",
    ),
    "selfbench": DatasetRecipe(
        steps=(),
        needs=(Need("selfbench/outputs"),),
        licence="not stated",
        by_hand="put outputs/ of the Hub dataset eugene6923/Self-Bench to selfbench/outputs",
    ),
}
