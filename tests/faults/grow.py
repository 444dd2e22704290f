"""A traced run on a cluster of Ray's fake provider that has no worker node until there is demand.

`python -m tests.faults.grow OUT TRACE FIGURES ACTORS`. It stops whatever Ray it finds: give it
namespaces of its own for processes and network, as tests/cluster/test_autoscaling.py does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import AutoscalingCluster

ADDRESS = "127.0.0.1:6379"
HEAD = "ray.head.default"  # what the fake provider calls it: one of another name it would add to it
IDLE = 15  # seconds until an idle node goes down
WAIT = 300
CPUS = 1.2  # of an actor: the head has no room for one, a worker node for one
STORE = 80 * 2**20


class Cluster(AutoscalingCluster):
    """Ray's own reads its configuration from a file that the wheel lacks."""

    def _generate_config(
        self, head_resources: dict, worker_node_types: dict, autoscaler_v2: bool = False, **_: Any
    ) -> dict[str, Any]:
        head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
        empty = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray")
        commands = {f"{name}_commands": [] for name in (*empty, "worker_start_ray")}
        return {
            "cluster_name": "fake",
            "max_workers": 3,
            "upscaling_speed": 8,
            "idle_timeout_minutes": IDLE / 60,
            "provider": {
                "type": "fake_multinode",
                "use_node_id_as_ip": True,  # the nodes share an address
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            "head_node_type": HEAD,
            "available_node_types": {HEAD: head, **worker_node_types},
            **commands,
        }


def workers() -> int:
    """Living nodes besides the head."""
    return sum(node["Alive"] for node in ray.nodes()) - 1


def watch(done: Callable[[int], bool]) -> int:
    """The most worker nodes that were seen until `done` says so of their number."""
    most, end = 0, time.monotonic() + WAIT
    while not done(now := workers()):
        most = max(most, now)
        if time.monotonic() > end:
            raise TimeoutError(f"{now} worker nodes after {WAIT} s")
        time.sleep(0.2)
    return most


def main(out: str, trace: str, figures: str, actors: str) -> None:
    node = {"resources": {"CPU": 2, "object_store_memory": STORE}, "node_config": {}}
    cluster = Cluster(
        {"CPU": 1, "object_store_memory": STORE},
        {"worker": {**node, "min_workers": 0, "max_workers": 3}},
    )
    cluster.start(override_env={"RAY_enable_autoscaler_v2": "0"})
    ray.init(ADDRESS, log_to_driver=False)
    before = workers()
    call = [sys.executable, "-m", "tests.traced", out, trace, actors]
    run = subprocess.Popen([*call, "--scenes=20", f"--cpus={CPUS}", f"--ray={ADDRESS}"])
    most = watch(lambda _: run.poll() is not None)
    start = time.monotonic()
    watch(lambda now: now == 0)
    down = time.monotonic() - start
    found = {"code": run.returncode, "before": before, "most": most, "idle_seconds": down}
    Path(figures).write_text(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # it calls `ray`
    main(*sys.argv[1:])
