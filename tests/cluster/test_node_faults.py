"""Faults of nodes and GPUs in a run of two nodes: no pair is lost, and the message says where it was."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import ray.data
from ray.cluster_utils import Cluster

from diffitm.commands.entrance import check_shared
from diffitm.core.errors import InputError
from diffitm.distributed import session
from tests.faults.broken import BrokenSpec
from tests.faults.large import measure
from tests.processors import IMPATIENT

pytestmark = pytest.mark.slow
PAIRS, ACTORS = 4000, 3
TIME_OUT = 4  # seconds without progress after which Ray Data would end a run
STORE = 80 * 2**20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with room for readers alone."""
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE}
    try:
        made = Cluster(initialize_head=True, head_node_args=head)
    except Exception as error:  # Ray gives a head 30 s, and the test before may still be ending
        if "timed out during startup" not in str(error):
            raise
        made = Cluster(initialize_head=True, head_node_args=head)
    # A log record that pytest keeps would keep an error, its frames, and in these Ray Data's actors.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_joined", True)
        ray.init(made.address, log_to_driver=False, runtime_env=IMPATIENT)
        yield made
        ray.shutdown()
    made.shutdown()


def run(cluster: Cluster, out: Path, spec: BrokenSpec) -> None:
    """Score all pairs; measure() checks each one's score."""
    ray.data.DataContext.get_current().execution_no_progress_timeout_s = TIME_OUT
    out.mkdir()
    given = argparse.Namespace(pairs=PAIRS, texts=5, actors=ACTORS, gpus=1.0)
    measure(str(out), spec, given, cluster.address)


@pytest.mark.long
def test_nodes_that_fail(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One cannot load the model, one cannot read images, one has a GPU that fails once; the first block,
    and the wait for nodes, are longer than Ray Data's time-out. No pair is lost, and the log names
    nodes and causes."""
    caplog.set_level(logging.INFO, "diffitm")
    faults = {"without": "bad", "away": "far", "fails": "images/0000301.jpg", "long": TIME_OUT + 4}
    spec = BrokenSpec(str(tmp_path / "trace"), 0.001, **faults)
    with ThreadPoolExecutor() as pool:  # Ray adds nodes from the main thread alone
        running = pool.submit(run, cluster, tmp_path / "out", spec)
        time.sleep(TIME_OUT + 4)
        nodes = {
            name: cluster.add_node(num_cpus=2, num_gpus=1, resources={name: 1}).node_id[:8]
            for name in ("good", "bad", "far")
        }
        running.result(200)
    told = [line for line in caplog.messages if line.endswith("others did its rows")]
    causes = {
        "good": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "bad": "InputError: --model sleeping: no driver here",
        "far": "Unavailable: none of 32 images could be read",
    }
    for name, cause in causes.items():
        (line,) = (line for line in told if nodes[name] in line)
        assert cause in line
    assert any("rows were left to others" in line for line in caplog.messages)


def test_what_nodes_share(cluster: Cluster, tmp_path: Path) -> None:
    """Asked of real nodes: a process's own files are not what another one finds there."""
    if not session.other_nodes():
        cluster.add_node(num_cpus=1)
    check_shared([("--out", str(tmp_path / "out"))], writable=True)
    with pytest.raises(InputError, match=r"^--data /proc/self/task: node .* does not see it"):
        check_shared([("--data", "/proc/self/task")])
