"""Jobs by clusters/submit.sh, on a cluster of its own on loopback that wants a token."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from ray.job_submission import JobDetails, JobSubmissionClient

from diffitm.core import storage
from diffitm.core.provenance import record
from tests import pipeline
from tests.objects import Objects, reachable, serve

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
SMALL = ("--model", "shapes", "--data", "shapes", "--scenes", "10", "--timesteps", "2")
# What driver and worker import, and what the upload left out.
WHERE = """
import os, ray, diffitm
ray.init()
worker = ray.remote(lambda: __import__("diffitm").__file__).remote()
print("DRIVER", diffitm.__file__)
print("WORKER", ray.get(worker))
print("FOUND", [name for name in ("tests", "docs", "pipelines") if os.path.exists(name)])
"""


class Cluster(NamedTuple):
    address: str
    env: dict[str, str]
    client: JobSubmissionClient
    bucket: Objects


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head as the cluster files start it, with the token in the home folder, beside any other Ray of
    the machine; ends with its process."""
    folder = tempfile.mkdtemp(prefix="ray")  # short, because sockets lie below it
    token, home = secrets.token_hex(32), Path(folder, "home")
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(token)
    env = pipeline.environment(PATH=f"{BIN}:/usr/bin:/bin", RAY_AUTH_MODE="token", HOME=str(home))
    gcs, dashboard, agent = free_ports(3)
    start = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address", "127.0.0.1"]
    start += ["--port", str(gcs), "--dashboard-host", "127.0.0.1", "--num-cpus", "3"]
    start += ["--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agent)]
    start += ["--temp-dir", folder, "--disable-usage-stats"]
    with (
        open(Path(folder) / "start.log", "w+") as log,
        serve(Path(folder, "objects")) as bucket,
        reachable(bucket),
    ):
        env |= bucket.environment
        head = subprocess.Popen(start, stdout=log, stderr=log, env=env)
        address = f"http://127.0.0.1:{dashboard}"
        try:
            client = wait_for(address, token, head, Path(log.name))
            yield Cluster(address, env, client, bucket)
        finally:
            head.terminate()
            head.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


def wait_for(
    address: str, token: str, head: subprocess.Popen[bytes], log: Path
) -> JobSubmissionClient:
    """The client, once the head answers and an agent can take jobs."""
    deadline = time.monotonic() + 180
    while True:
        assert head.poll() is None, log.read_text()
        try:
            client = JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
            client.list_jobs()
            return client
        except (ConnectionError, RuntimeError):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1)


def submit(cluster: Cluster, name: str, *entrypoint: str) -> tuple[int, JobDetails, str]:
    """As the docs say; the command's exit code, the job's details and its log."""
    done = call_submit(cluster, name, *entrypoint)
    return done.returncode, cluster.client.get_job_info(name), cluster.client.get_job_logs(name)


def call_submit(cluster: Cluster, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(pipeline.ROOT / "clusters" / "submit.sh"), *arguments],
        env={**cluster.env, "RAY_API_SERVER_ADDRESS": cluster.address, **env},
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_exit_codes_and_results(cluster: Cluster) -> None:
    """0 for a finished run, with its results in the bucket, whose provenance is that of this checkout,
    though .git stayed here; bad input is 2 in the job's details, where the command has 1."""
    out = cluster.bucket.uri("out")
    run = ("python", "pipelines/gdbench.py", *SMALL, "--out", out, "--tasks")
    code, details, log = submit(cluster, "good", *run, "winoground")
    assert (code, details.driver_exit_code) == (0, 0), log
    rows = json.loads(storage.read_text(storage.join(out, "results.json")))["rows"]
    assert {row["task"] for row in rows} == {"winoground"}
    assert details.runtime_env["env_vars"]["PYTHONUNBUFFERED"] == "1"
    job = json.loads(storage.read_text(storage.join(out, "provenance.json")))
    here = record({})
    assert here["commit"] is not None
    assert [job[key] for key in ("commit", "dirty", "tree")] == [
        here[key] for key in ("commit", "dirty", "tree")
    ]
    code, details, log = submit(cluster, "bad", *run, "winogrund")
    assert (code, details.driver_exit_code) == (1, 2), log
    assert "winogrund" in log


def test_results_that_would_stay_on_a_node_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    """The default OUT lies in the job's package; another folder is a disk of the one node."""
    run = ("python", "pipelines/gdbench.py", *SMALL)
    code, details, log = submit(cluster, "package", *run)
    assert (code, details.driver_exit_code) == (1, 2), log
    assert "out/gdbench: lies in the package of this job" in log
    code, details, log = submit(cluster, "disk", *run, "--out", str(tmp_path / "out"))
    assert (code, details.driver_exit_code) == (1, 2), log
    assert f"--out {tmp_path}/out: is a disk of this job's own node; give a URI" in log
    assert not (tmp_path / "out").exists()


def test_no_job_without_the_token(cluster: Cluster) -> None:
    """Neither without one nor with another."""
    done = call_submit(cluster, "none", "true", RAY_AUTH_MODE="disabled")
    assert done.returncode != 0
    assert "Authentication required" in done.stdout + done.stderr
    headers = {"Authorization": f"Bearer {secrets.token_hex(32)}"}
    request = urllib.request.Request(f"{cluster.address}/api/jobs/", b"{}", headers)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=30)
    assert "none" not in {job.submission_id for job in cluster.client.list_jobs()}


def test_driver_and_workers_run_the_uploaded_checkout(cluster: Cluster) -> None:
    """Not the nodes' installed package; what runtime_env.yaml excludes stays behind."""
    code, _, log = submit(cluster, "where", "python", "-c", WHERE)
    assert code == 0, log
    lines = dict(line.split(" ", 1) for line in log.splitlines() if line[:6].isupper())
    uploaded = "/runtime_resources/working_dir_files/"
    assert uploaded in lines["DRIVER"] and uploaded in lines["WORKER"], log
    assert lines["FOUND"] == "['pipelines']"
