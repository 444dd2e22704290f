"""The expressions with boxes of a DPT run: read, compared with its rows, written where workers read them."""

from __future__ import annotations

import logging
from typing import NamedTuple

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.distributed.item_stage import work_folder
from diffitm.models.text_limits import tell_long_texts
from diffitm.training.dpt.annotations import read_annotations
from diffitm.training.dpt.expressions import (
    Expression,
    ExpressionsFile,
    GroundingData,
    GroundingWeights,
    digest_of,
    write_expressions,
)
from diffitm.training.dpt.options import SHAPES
from diffitm.training.job import DptJob
from diffitm.training.lora.options import FinetuneConfig

log = logging.getLogger("diffitm")
TRAIN, VALID = "grounding/train.json", "grounding/valid.json"  # of drawn scenes


class Said(NamedTuple):
    """The expressions to train on, and those to measure, if any."""

    train: list[Expression]
    check: list[Expression] | None


def read(config: FinetuneConfig, root: str, images: set[str]) -> Said:
    """What --grounding and --grounding-validation hold, of the former what the rows' images have.

    Raises InputError for files that are not MDETR's, and where no expression is of an image of the rows.
    """
    assert config.grounding is not None
    if config.grounding == SHAPES:
        train, valid = storage.join(root, TRAIN), storage.join(root, VALID)
        check: str | None = valid if config.validate_every else None
    else:
        train, check = config.grounding, config.grounding_validation
    found = _read(train, config, "grounding")
    kept = [one for one in found if one.image in images]
    if not kept:
        raise InputError(
            f": {train}: none of its images is one of the rows'; it has {found[0].image!r} and they "
            f"{min(images)!r}: --grounding-images says where its file names start",
            "grounding",
        )
    others = len(found) - len(kept)
    if others:
        log.warning("%s: left out %s expressions of images that no row has", train, f"{others:,}")
    bare = len(images) - len({one.image for one in kept})
    if bare:
        text = "%s: %s of %s images of the rows have no expression: they train matching alone"
        log.warning(text, train, f"{bare:,}", f"{len(images):,}")
    return Said(kept, None if check is None else _read(check, config, "grounding_validation"))


def _read(uri: str, config: FinetuneConfig, field: str) -> list[Expression]:
    uri = storage.absolute(uri)
    found = read_annotations(uri, config.grounding_images or "", config.resize, field)
    if found.outside:
        text = "%s: left out %s boxes with nothing inside of the picture"
        log.warning(text, uri, f"{found.outside:,}")
    return found.expressions


def handed_over(said: Said, config: FinetuneConfig, job: DptJob, out: str) -> GroundingData:
    """The expressions as files below work/ beside `out`, and the weights of their losses.

    Raises InputError where boxes are to be measured and nothing is validated.
    """
    tell_long_texts(job.source, (one.caption for one in said.train))
    check = None
    if said.check is not None and job.validation is not None:
        check = _write(said.check, out)
    elif said.check is not None and config.grounding != SHAPES:
        raise InputError(
            f"{config.grounding_validation}: boxes are measured at validations, which take "
            "--validation-data",
            "grounding_validation",
        )
    weights = GroundingWeights(*config.grounding_weights)
    return GroundingData(_write(said.train, out), check, weights)


def _write(expressions: list[Expression], out: str) -> ExpressionsFile:
    digest = digest_of(expressions)
    folder = work_folder(out, "expressions", {"expressions": digest})
    uri = storage.join(folder, "expressions.parquet")
    if not storage.exists(uri):
        write_expressions(uri, expressions, digest)
    return ExpressionsFile(uri, digest)
