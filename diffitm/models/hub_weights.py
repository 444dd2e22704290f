"""Weights of the Hub: fetched once, by the driver, and mirrored where the workers of other machines look."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffitm.core import storage
from diffitm.core.errors import InputError, Unavailable
from diffitm.core.outside import is_transient, patiently
from diffitm.models.weight_cache import content_digest, on_disk

log = logging.getLogger("diffitm")
WEIGHTS = (".safetensors", ".bin")  # the first that a part has is read
WITHOUT_WEIGHTS = ("tokenizer", "scheduler")  # how names of such parts begin
READ = (".json", ".txt", ".model", ".jinja")  # how names of settings and vocabularies end
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")  # how names of weights begin
ANSWERS_WITHIN = 5.0  # seconds
FOREIGN = (".msgpack", ".h5", ".onnx", ".onnx_data", ".ckpt", ".pt", ".pth", ".gguf", ".xml", ".py")


@dataclass(frozen=True)
class Weights:
    """Files of a model: in the folder `local` of the machine that fetched them (and of others with the
    same image), and, if so, in the folder `mirror`, a path or URI, where their content has `digest`."""

    name: str
    local: str
    files: tuple[str, ...]
    mirror: str | None = None
    digest: str | None = None

    def on_machine(self) -> Path:
        """A local folder with the files. Raises InputError where there is none to be had."""
        if _lacking(Path(self.local), self.files) is None:
            return Path(self.local)
        if self.mirror is None:
            lacking = _lacking(Path(self.local), self.files)
            raise InputError(f"{self.name}: this machine has no {lacking} in {self.local}")
        if "://" not in self.mirror:
            return Path(self.mirror)
        there = storage.sizes(self.mirror, recursive=True)
        listed = {name: there[name] for name in self.files if name in there}
        return on_disk(self.mirror, listed, self._digest, self.digest)[0]

    def _digest(self, folder: Path) -> str:
        return content_digest([folder / name for name in self.files])

    def mirrored(self, above: str) -> Weights:
        """The same, with a copy in a folder below `above`; files that lie there already stay."""
        folder = storage.join(above, "weights", re.sub(r"[^\w.-]+", "--", self.name))
        sizes = {name: (Path(self.local) / name).stat().st_size for name in self.files}
        there = storage.sizes(folder, recursive=True)
        missing = [n for n, size in sizes.items() if n not in there or there[n][0] != size]
        if missing:
            total = sum(sizes[name] for name in missing) / 1e6
            log.info("%s: mirroring %.0f MB to %s", self.name, total, storage.without_query(folder))
        for name in missing:
            storage.upload(str(Path(self.local) / name), storage.join(folder, name))
        return replace(self, mirror=folder, digest=self._digest(Path(self.local)))


def _lacking(folder: Path, files: Iterable[str]) -> str | None:
    return next((name for name in files if not (folder / name).is_file()), None)


def go_offline_if_away() -> None:
    """Ask the Hub once whether it answers. Where it does not, this process no longer asks it, and takes
    what the cache has: its client would try each file again for minutes. Said in the log."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not _answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes that this one starts
        text = (
            "%s does not answer: from now on only what the Hub's cache on this machine has is used"
        )
        log.warning(text, constants.ENDPOINT)


@functools.cache
def _answers(endpoint: str) -> bool:
    """Whether there is a server at all, whatever it says."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=ANSWERS_WITHIN)
    except Exception as error:
        if not is_transient(error):
            raise
        return False
    return True


def fetch(
    repo: str, commit: str, choose: Callable[[list[str]], Iterable[str]], field: str
) -> Weights:
    """Fetch the files that `choose` takes of a Hub repository's into the Hub's cache on this machine.

    Raises InputError for a repository that gives none, Unavailable where the Hub does not answer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    go_offline_if_away()
    try:
        files = tuple(sorted(choose(_names(repo, commit))))
        where = patiently(
            lambda: snapshot_download(repo, revision=commit, allow_patterns=list(files))
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        text = f"{repo!r}: its weights cannot be fetched: {error}"
        if is_transient(error):
            raise Unavailable(f"{field} {text}") from error
        raise InputError(text, field) from error
    return Weights(f"{repo}-{commit[:12]}", where, files)


def _names(repo: str, commit: str) -> list[str]:
    """The files of a repository; where the Hub is not to be asked, those in its cache."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if not constants.HF_HUB_OFFLINE:
        return patiently(lambda: HfApi().list_repo_files(repo, revision=commit))
    here = Path(snapshot_download(repo, revision=commit, local_files_only=True))
    return [path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()]


def needed(names: Iterable[str], parts: Sequence[str], variant: str | None = None) -> list[str]:
    """What is read of a repository's folders `parts`, '' for its top: their settings and vocabularies, and
    their weights in one format, those of the variant where it has any."""
    chosen: list[str] = []
    for part in parts:
        inside = [n for n in names if n.rpartition("/")[0] == part and not n.endswith(FOREIGN)]
        weights = [n for n in inside if any(ending in n for ending in WEIGHTS)]
        chosen += [n for n in inside if n not in weights and _is_read(n.rpartition("/")[2])]
        chosen += _weights([n.rpartition("/")[2] for n in weights], variant, part)
    return chosen


def _is_read(name: str) -> bool:
    """Whether a file beside weights is one that loading reads, and no note for people or of a system."""
    return name.endswith(READ) and not name.lower().startswith((".", "readme", "license"))


def _weights(names: Sequence[str], variant: str | None, part: str) -> list[str]:
    known = [n for n in names if not part or _stem(n).partition(".")[0] in STEMS]
    for kind in dict.fromkeys((variant or "", "")):
        for ending in WEIGHTS:
            found = [n for n in known if ending in n and variant_of(n) == kind]
            if found:
                return [f"{part}/{n}".lstrip("/") for n in found]
    return []


def variant_of(name: str) -> str:
    """'fp16' of model.fp16.safetensors, of its shards and of their index; '' of files without one."""
    return _stem(name).partition(".")[2]


def _stem(name: str) -> str:
    """'model.fp16' of model.fp16-00001-of-00002.safetensors and the like."""
    stem = name.replace(".index", "").removesuffix(".json")
    for ending in WEIGHTS:
        stem = stem.replace(ending, "")
    return re.sub(r"-\d+-of-\d+", "", stem)


def variants(names: Iterable[str], part: str) -> set[str]:
    """The variants that a part has weights of, '' for those without one."""
    inside = (n.rpartition("/")[2] for n in names if n.rpartition("/")[0] == part)
    known = [n for n in inside if _stem(n).partition(".")[0] in STEMS and not n.endswith(FOREIGN)]
    return {variant_of(n) for n in known if any(ending in n for ending in WEIGHTS)}


def choose_variant(names: Iterable[str], part: str, variant: str | None) -> str | None:
    """The variant to read of a part: the one asked for where the part has it, else None for its plain
    weights.

    Raises InputError, which names the part, where it has neither.
    """
    there = variants(names, part)
    if variant and variant in there:
        return variant
    if "" in there:
        return None
    asked = f"of the variant {variant}" if variant else "without a variant"
    hint = " or ".join(f"--variant {other}" for other in sorted(there))
    right = f": give {hint}" if hint else f" ({', '.join(WEIGHTS)})"
    raise InputError(f"its {part} has no weights {asked if there else ''}".rstrip() + right)


def check_variant(names: Sequence[str], parts: Sequence[str], variant: str | None) -> None:
    """Raises InputError where no part of a model has weights of the variant, or a part has none to read."""
    weighed = [part for part in parts if not part.startswith(WITHOUT_WEIGHTS)]
    there = set[str]().union(*(variants(names, part) for part in weighed))
    if variant and there and variant not in there:
        others = ", ".join(sorted(there - {""})) or "none"
        raise InputError(f"no part has weights of the variant {variant}; there are: {others}")
    for part in weighed:
        choose_variant(names, part, variant)
