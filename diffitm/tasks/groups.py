"""What figures of different benchmarks have in common: the groups whose means stand beside their parts."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple


class Pattern(NamedTuple):
    """Figures of a task: their group (with * for any text) and metric."""

    task: str
    group: str
    metric: str


PAIR, SHARE, FIRST = "group", "accuracy", "R@1"  # metrics
GROUPS: dict[str, tuple[Pattern, ...]] = {
    "objects": (
        Pattern("sugarcrepe", "part=*_obj", SHARE),
        Pattern("sugarcrepe_pp", "part=*_obj", SHARE),
        Pattern("valse", "piece=existence", SHARE),
        Pattern("valse", "piece=foil-it", SHARE),
        Pattern("vismin", "category=object", PAIR),
        Pattern("vl_checklist", "part=Object_*", SHARE),
        Pattern("winoground", "collapsed_tag=Object", PAIR),
        Pattern("svo_subj", "all", SHARE),
        Pattern("svo_obj", "all", SHARE),
        *(Pattern(f"spec_{way}", "part=existence", SHARE) for way in ("i2t", "t2i")),
    ),
    "attributes": (
        Pattern("sugarcrepe", "part=*_att", SHARE),
        Pattern("sugarcrepe_pp", "part=*_att", SHARE),
        Pattern("cola", "all", "image"),
        Pattern("colorswap", "all", PAIR),
        Pattern("vismin", "category=attribute", PAIR),
        Pattern("eqben*", "part=eqbenkubric_attr", PAIR),
        Pattern("vl_checklist", "part=Attribute_*", SHARE),
        Pattern("vg_attribution", "all", SHARE),
        Pattern("clevr", "subtask=*_color*", SHARE),
    ),
    "relations": (
        Pattern("sugarcrepe*", "part=replace_rel", SHARE),
        Pattern("whatsup_*", "all", SHARE),
        Pattern("*_spatial_*", "all", SHARE),
        Pattern("valse", "piece=relations", SHARE),
        Pattern("valse", "piece=act*", SHARE),
        Pattern("vismin", "category=relation", PAIR),
        Pattern("eqben*", "part=eqbenkubric_loc", PAIR),
        Pattern("spec_*", "part=*_spatial", SHARE),
        Pattern("vl_checklist", "part=Relation_*", SHARE),
        Pattern("winoground", "collapsed_tag=Relation", PAIR),
        Pattern("vg_relation", "all", SHARE),
        Pattern("svo_verb", "all", SHARE),
        Pattern("clevr", "subtask=spatial", SHARE),
    ),
    "order": (Pattern("*_order", "all", "P@1"),),
    "counting": (
        Pattern("valse", "piece=counting-*", SHARE),
        Pattern("vismin", "category=counting", PAIR),
        Pattern("eqben*", "part=eqbenkubric_cnt", PAIR),
        Pattern("spec_*", "part=count", SHARE),
    ),
    "retrieval": (
        Pattern("flickr30k", "all", FIRST),
        Pattern("flickr30k_text", "all", FIRST),
        Pattern("imagecode", "all", FIRST),
        Pattern("naturalbench", "all", PAIR),
        Pattern("bivlc", "all", PAIR),
    ),
}


def belongs(group: str, task: str, part: str, metric: str) -> bool:
    """Whether a figure is one of those of a group."""
    return any(
        fnmatchcase(task, pattern.task)
        and fnmatchcase(part, pattern.group)
        and metric == pattern.metric
        for pattern in GROUPS[group]
    )
