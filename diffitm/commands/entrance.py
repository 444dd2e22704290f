"""What a run does first: join the cluster, refuse folders that its nodes do not share, hold OUT."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from diffitm.core import storage
from diffitm.core.config import OnRay
from diffitm.core.errors import InputError
from diffitm.core.lease import held

# File systems that several machines mount, as /proc/mounts names them.
NETWORKED = ("nfs", "lustre", "ceph", "beegfs", "gpfs", "cifs", "smb", "9p", "glusterfs", "fuse.")
MOUNTS = Path("/proc/self/mounts")
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for a job's driver
PACKAGE = "/working_dir_files/"  # where Ray unpacks what a job took along
ADVICE = "give a URI (s3://BUCKET/..) or a folder that all nodes mount"


@contextlib.contextmanager
def entered(
    config: OnRay, out: str, read: Iterable[tuple[str, str | None]], is_file: bool = False
) -> Iterator[None]:
    """The block may write to `out`, a folder or a file. `read` are other options with what they name, of
    which workers read what is a path.

    Raises InputError where another node of the cluster does not see one of them, and where another run
    writes to `out`.
    """
    from diffitm.distributed import session

    if session.is_elsewhere(config.ray):
        session.connect(config.ray, verbose=config.verbose)
    folder = storage.parent(out) if is_file else out
    check_shared([("--out", folder)], writable=True)
    check_shared([(option, path) for option, path in read if path and os.path.exists(path)])
    with held(out, config.takeover, is_file):
        yield


def check_shared(paths: Iterable[tuple[str, str]], writable: bool = False) -> None:
    """Raises InputError, which names the option, for a local path that a node beside the driver's does
    not see, and for one of a job without such a node; a network's file system is taken for shared."""
    from diffitm.distributed import session

    for option, path in paths:
        if "://" in path:
            continue
        path = storage.absolute(path)
        if PACKAGE in path and JOB in os.environ:
            raise InputError(
                f"{option} {path}: lies in the package of this job, which goes with its node; {ADVICE}"
            )
        others = session.other_nodes()
        if not others:
            if JOB in os.environ and not is_networked(path):
                raise InputError(f"{option} {path}: is a disk of this job's own node; {ADVICE}")
            continue
        with _mark(path) if writable else contextlib.nullcontext():
            here = look(path)
            for node, there in session.ask_nodes(others, look, path).items():
                if there != here:
                    raise InputError(f"{option} {path}: node {node} does not see it; {ADVICE}")


@contextlib.contextmanager
def _mark(folder: str) -> Iterator[None]:
    """A new file in the folder, by which another node tells it from one of its own."""
    place = Path(folder)
    made = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    mark = place / f".{secrets.token_hex(8)}"
    mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):
                place.rmdir()


def look(path: str) -> list[str] | int | None:
    """What is at a path of this machine: a folder's names, a file's size, None for nothing."""
    with contextlib.suppress(NotADirectoryError):
        with contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(path))
        return None
    return os.stat(path).st_size


def is_networked(path: str) -> bool:
    """Whether a path lies on a file system of a network, as far as this machine's mounts tell."""
    try:
        mounts = [line.split()[1:3] for line in MOUNTS.read_text().splitlines()]
    except OSError:
        return False
    whole = f"{os.path.realpath(path)}/"
    above = [(len(at), kind) for at, kind in mounts if whole.startswith(f"{at.rstrip('/')}/")]
    return max(above, default=(0, ""))[1].startswith(NETWORKED)
