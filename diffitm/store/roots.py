"""Which data root a run's scores are of: the same images keep their scores wherever they lie now."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from diffitm.core import storage
from diffitm.core.images import encoded, split_crop
from diffitm.core.outside import patiently
from diffitm.store.pair_table import connect
from diffitm.store.score_store import Store, stores_of

log = logging.getLogger("diffitm")
READERS = 16
AT_ONCE = 256  # images between two looks at whether one differs


def known_root(root: str, out: str) -> str:
    """The root under whose name the scores of the images below `root` are kept: one that OUT has scores
    of, if it is the same place under another spelling, or if what was scored there and is here has
    the same content; else `root`.

    One image with another content is enough for scores of their own: an image is known by its path
    below the root, and a changed version of the data must not take over scores.
    """
    stores = [store for store in stores_of(out) if "root" in store.config]
    names = list(dict.fromkeys(str(store.config["root"]) for store in stores))
    for name in names:
        if _canonical(name) == _canonical(root):
            return name
    for name in names:
        scored = _scored(store for store in stores if store.config["root"] == name)
        equal, other = _compare(root, scored)
        if other is not None:
            log.info("%s: %s is another image than the one scored in %s", root, other, name)
        elif equal:
            text = "%s: %s images are those scored in %s, whose scores hold here"
            log.info(text, root, f"{equal:,}", name)
            return name
    return storage.without_query(root)


def _canonical(root: str) -> str:
    """A place without links, doubled or trailing slashes, and what else is spelling alone."""
    if "://" not in root:
        return os.path.realpath(root)
    scheme, _, rest = storage.without_query(root).partition("://")
    return f"{scheme.lower()}://{'/'.join(part for part in rest.split('/') if part)}"


def _scored(stores: Iterable[Store]) -> dict[str, str]:
    """Image -> sha256 of the file that was scored."""
    found: dict[str, str] = {}
    for store in stores:
        with connect(scores=store.dataset()) as connection:
            rows = connection.execute(
                "SELECT DISTINCT image, digest FROM scores WHERE digest IS NOT NULL ORDER BY hash(image)"
            ).fetchall()
        found |= {split_crop(image)[0]: digest for image, digest in rows}
    return found


def _compare(root: str, scored: dict[str, str]) -> tuple[int, str | None]:
    """How many of the images are below the root with the content that was scored, and the first that is
    there with another."""

    def same(image: str) -> bool | None:
        try:
            data = patiently(lambda: encoded(root, image))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError):
            return False
        return hashlib.sha256(data).hexdigest() == scored[image]

    names, equal = list(scored), 0
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(names), AT_ONCE):
            part = names[start : start + AT_ONCE]
            for name, found in zip(part, pool.map(same, part), strict=True):
                if found is False:
                    return equal, name
                equal += found is True
    return equal, None
