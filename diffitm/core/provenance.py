"""What made a result: commit, versions, configuration. Written beside every result."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffitm
from diffitm.core.revision import revision

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "open_clip_torch",
    "ray",
    "pyarrow",
    "numpy",
)
# Ends of the names of environment variables whose values are secrets, unless they are shorter.
SECRET = ("TOKEN", "SECRET", "PASSWORD", "KEY", "KEY_ID")
SHORTEST = 8


def fingerprint(value: Any) -> str:
    """sha256 of the value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def record(config: dict[str, Any]) -> dict[str, Any]:
    """The provenance of a run with this configuration."""
    found = {
        "diffitm": diffitm.__version__,
        **revision()._asdict(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "config": config,
        "config_sha256": fingerprint(config),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.loads(redact(json.dumps(found)))


def redact(text: str) -> str:
    """The text without the keys and passwords that a URI can hold (s3://KEY:SECRET@bucket), and without
    the values of environment variables that are named like a secret (HF_TOKEN, AWS_*)."""
    secrets = {
        v for k, v in os.environ.items() if k.upper().endswith(SECRET) and len(v) >= SHORTEST
    }
    for value in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, "***")
    # A key may hold a slash that should have been written as %2F.
    text = re.sub(r"://(?:[^/@\s\"]+|[^:/@\s\"]+:[^@\s\"]*)@", "://***@", text)
    return re.sub(r"([?&]\w*(?:secret|token|password)\w*=)[^&\s\"']+", r"\1***", text)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
