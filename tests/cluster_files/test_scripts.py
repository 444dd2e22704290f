"""The scripts of clusters/, run as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.core.test_revision import git
from tests.pipeline import ROOT

ENTRYPOINT = ["sh", str(ROOT / "clusters" / "entrypoint.sh")]
# Says its process, and ends as a pipeline does that is interrupted.
PIPELINE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
print(os.getpid(), flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    sys.exit(130)
"""
# In the place of Ray's command: what it was called with.
RAY = """#!{python}
import json, os, sys
print(json.dumps([sys.argv[1:], os.environ.get("RAY_AUTH_MODE"), os.getcwd()]))
"""


@pytest.mark.parametrize(
    ("code", "expected"), [(0, 0), (1, 1), (2, 0), (3, 0), (75, 75), (130, 130), (137, 137)]
)
def test_codes_for_a_scheduler_that_retries(code: int, expected: int) -> None:
    """2 and 3, which would come again, are said and not retried."""
    command = [sys.executable, "-c", "import sys; print(sys.argv[1]); sys.exit(int(sys.argv[2]))"]
    done = subprocess.run(
        [*ENTRYPOINT, *command, "two words", str(code)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (expected, "two words\n")
    assert (f"exit code {code}, not tried again" in done.stderr) == (code != expected)


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGTERM, 130), (signal.SIGKILL, 137)])
def test_a_signal_for_the_whole_job(sent: signal.Signals, expected: int) -> None:
    """Ray sends SIGTERM to each process: the shell stays until the pipeline has ended, and has its code.
    SIGKILL reaches the pipeline alone, as where memory runs out."""
    command = [*ENTRYPOINT, sys.executable, "-c", PIPELINE]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert run.stdout is not None
    pipeline = int(run.stdout.readline())
    if sent == signal.SIGTERM:
        os.killpg(run.pid, sent)
    else:
        os.kill(pipeline, sent)
    assert run.wait(30) == expected


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    """A checkout with the script, and a stand-in for Ray's command first in its bin folder."""
    root = tmp_path / "checkout"
    (root / "clusters").mkdir(parents=True)
    shutil.copy(ROOT / "clusters" / "submit.sh", root / "clusters")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "x")
    git(root, "tag", "-a", "v1", "-m", "a tag is no commit")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ray").write_text(RAY.format(python=sys.executable))
    (tmp_path / "bin" / "ray").chmod(0o755)
    return root


def submitted(root: Path, **env: str) -> tuple[list[str], str, str]:
    """Ray's arguments, its RAY_AUTH_MODE and folder for a job from somewhere else."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    path = f"{root.parent / 'bin'}:{os.environ['PATH']}"
    call = [root / "clusters" / "submit.sh", "job-1", "python", "x.py", "--name", "two words"]
    done = subprocess.run(
        call, cwd="/", env={**kept, **env, "PATH": path}, capture_output=True, text=True, check=True
    )
    return tuple(json.loads(done.stdout))


def test_a_job_is_submitted_with_its_commit(launcher: Path) -> None:
    head = git(launcher, "rev-parse", "HEAD")
    arguments, mode, folder = submitted(launcher)
    split = arguments.index("--")
    assert arguments[:2] == ["job", "submit"]
    options = dict(zip(arguments[2:split:2], arguments[3:split:2], strict=True))
    assert json.loads(options.pop("--metadata-json")) == {"commit": head}
    assert options == {
        "--address": "http://127.0.0.1:8265", "--submission-id": "job-1",
        "--runtime-env": "runtime_env.yaml", "--working-dir": ".",
    }  # fmt: skip
    assert arguments[split + 1 :] == ["python", "x.py", "--name", "two words"]
    assert (mode, folder) == ("token", str(launcher))


def test_a_changed_checkout_and_another_cluster(launcher: Path) -> None:
    (launcher / "clusters" / "submit.sh").open("a").write("\n")
    env = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1", "RAY_AUTH_MODE": "disabled"}
    arguments, mode, _ = submitted(launcher, **env)
    metadata = json.loads(arguments[arguments.index("--metadata-json") + 1])
    assert metadata == {"commit": git(launcher, "rev-parse", "HEAD") + "-dirty"}
    assert arguments[arguments.index("--address") + 1] == env["RAY_API_SERVER_ADDRESS"]
    assert mode == "disabled"


@pytest.mark.parametrize(
    ("command", "script", "file"),
    [
        ("aws", ("aws-account.sh", "bucket", "192.0.2.1"), "cluster.yaml"),
        ("gcloud", ("gcp-account.sh", "project", "bucket", "192.0.2.1"), "clusters/gcp.yaml"),
    ],
)
def test_an_account(tmp_path: Path, command: str, script: tuple[str, ...], file: str) -> None:
    """The gaps of the file are filled, and port 22 is open to the address alone. The provider's command
    is a stand-in that notes its calls."""
    root = Path(shutil.copytree(ROOT / "clusters", tmp_path / "root" / "clusters")).parent
    shutil.copy(ROOT / "cluster.yaml", root)
    (tmp_path / command).write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\necho ID-1\n')
    (tmp_path / command).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    call = [root / "clusters" / script[0], *script[1:]]
    subprocess.run(call, env=os.environ | {"PATH": path}, check=True, capture_output=True)
    text = (root / "my-cluster.yaml").read_text()
    assert "FILL-IN" in (root / file).read_text()
    assert "FILL-IN" not in text
    config = yaml.safe_load(text)
    validate_config(prepare_config(config))
    assert config["provider"]["type"] == {"aws": "aws", "gcloud": "gcp"}[command]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [c for c in calls if "22" in c and "192.0.2.1/32" in c]
    assert not re.search(r"(?<!\d)0\.0\.0\.0", " ".join(calls))


def test_the_gaps_of_the_manifest() -> None:
    """By the command of the docs."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    command = re.search(r"^(sed .* clusters/kuberay\.yaml) \| kubectl", text, re.M)[1]
    env = os.environ | {"REGISTRY": "registry.example.org/a", "BUCKET": "my-bucket"}
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if not line.lstrip().startswith("#")]
    assert "FILL-IN" not in "\n".join(lines)
    assert done.stdout.count("s3://my-bucket/") == 2
