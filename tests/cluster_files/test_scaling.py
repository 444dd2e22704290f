"""How Ray's autoscalers read the cluster files: which nodes come for which demand, and the manifest."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import jsonschema
import pytest
from ray.autoscaler._private import node_launcher
from ray.autoscaler._private.event_summarizer import EventSummarizer
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as autoscaling_of,
)
from ray.autoscaler._private.node_provider_availability_tracker import (
    NodeAvailabilityRecord,
    NodeAvailabilitySummary,
    NodeProviderAvailabilityTracker,
)
from ray.autoscaler._private.resource_demand_scheduler import ResourceDemandScheduler
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler as SecondScheduler
from ray.autoscaler.v2.scheduler import SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from diffitm.distributed.autoscaler import spot_first
from diffitm.distributed.session import SPARE_CPUS
from tests.cluster_files.test_files import IMAGE, SCORER, load

ACTOR = {"GPU": 1.0, "CPU": 0.25}


class Market(MagicMock):
    """A provider that has these types and no others: (machine, whether as spot)."""

    stock: frozenset[tuple[str, bool]] = frozenset()

    def create_node_with_resources_and_labels(
        self, conf: dict[str, Any], tags: dict[str, str], count: int, *more: Any
    ) -> dict[str, Any]:
        if (conf["InstanceType"], "InstanceMarketOptions" in conf) not in self.stock:
            raise NodeLaunchException("InsufficientInstanceCapacity", "none", None)
        return {f"node-{i}": {} for i in range(count)}


def launches(
    rounds: int, stock: set[tuple[str, bool]], minutes: float, patch: pytest.MonkeyPatch
) -> list[str]:
    """The type that autoscaler v1 launches for three waiting actors, round by round, so far apart."""
    config, clock = prepare_config(load("cluster.yaml")), [1e9]
    patch.setattr(node_launcher, "time", SimpleNamespace(time=lambda: clock[0]))
    types = config["available_node_types"]
    tracker = NodeProviderAvailabilityTracker(timer=lambda: clock[0])
    market = Market(stock=frozenset(stock))
    launcher = node_launcher.BaseNodeLauncher(
        market, MagicMock(), EventSummarizer(), tracker, None, MagicMock(), types
    )
    scheduler = ResourceDemandScheduler(market, types, config["max_workers"], "head", 1.0)
    launched = []
    for _ in range(rounds):
        wanted, left = scheduler.get_nodes_to_launch(
            [], {}, [ACTOR] * 3, {}, [], {}, [], tracker.summary()
        )
        wanted.pop("head", None)
        ((kind, count),) = wanted.items()
        assert (left, count) == ([], 3)
        launcher.launch_node(config, count, kind)
        launched.append(kind)
        clock[0] += 60 * minutes
    return launched


SPOT = ["gpu_spot_1", "gpu_spot_2", "gpu_spot_3"]
BOUGHT = ["gpu_on_demand_1", "gpu_on_demand_2"]


@pytest.mark.parametrize(
    ("stock", "minutes", "expected"),
    [
        ({("g6.2xlarge", True), ("g6.2xlarge", False)}, 0.1, ["gpu_spot_1"] * 3),
        ({("g5.2xlarge", True), ("g6.2xlarge", False)}, 0.1, [*SPOT[:2], "gpu_spot_2"]),
        ({("g6.2xlarge", False)}, 0.1, [*SPOT, BOUGHT[0], BOUGHT[0]]),
        # Nothing: all have their turn. After half an hour spot is asked again, though on demand is there.
        (set(), 0.1, [*SPOT, *BOUGHT, *SPOT, *BOUGHT, SPOT[0]]),
        ({("g6.2xlarge", False)}, 10.1, [*SPOT, SPOT[0], SPOT[1]]),
        ({("g6.2xlarge", False)}, 8, [*SPOT, BOUGHT[0], SPOT[0]]),
    ],
)
def test_aws_asks_spot_types_in_turn_then_on_demand(
    stock: set[tuple[str, bool]],
    minutes: float,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_AUTOSCALER_UTILIZATION_SCORER", SCORER)
    assert launches(len(expected), stock, minutes, monkeypatch) == expected


def test_gpu_nodes_are_for_gpu_work() -> None:
    """A node without GPU comes first where none is asked for, refused or not."""
    summary = NodeAvailabilitySummary({"cpu": NodeAvailabilityRecord("cpu", False, 1e9, None)})
    nodes = {"cpu": {"CPU": 8}, "gpu_spot_1": {"CPU": 8, "GPU": 1}}
    cpu, gpu = (
        spot_first(node, [{"CPU": 1}], kind, node_availability_summary=summary)
        for kind, node in nodes.items()
    )
    assert cpu > gpu


def test_rays_own_ranking_asks_for_one_type_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(set(launches(5, {("g6.2xlarge", True)}, 0.1, monkeypatch))) == 1


@pytest.mark.parametrize(
    ("demand", "expected"),
    [
        ([], {}),
        ([ACTOR] * 4, {"gpu_spot_1": 4}),
        ([ACTOR] * 6, {"gpu_spot_1": 4, "gpu_spot_2": 2}),
        ([ACTOR] * 9, {"gpu_spot_1": 4, "gpu_spot_2": 2, "gpu_on_demand_1": 2}),
    ],
)
def test_gcp_takes_spot_first_and_starts_from_zero(
    demand: list[dict[str, float]], expected: dict[str, int]
) -> None:
    config = AutoscalingConfig(prepare_config(load("clusters/gcp.yaml")), skip_content_hash=True)
    types = config.get_node_type_configs()
    del types["head"]
    request = SchedulingRequest(
        node_type_configs=types,
        disable_launch_config_check=True,
        max_num_nodes=config.get_max_num_worker_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(
            [ResourceRequestUtil.make(bundle) for bundle in demand]
        ),
    )
    reply = SecondScheduler(MagicMock()).schedule(request)
    assert {launch.instance_type: launch.count for launch in reply.to_launch} == expected


def closed(**properties: Any) -> dict[str, Any]:
    """A schema of an object that has these fields and no others."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


# The fields in use, as KubeRay 1.6's RayJob definition has them.
TEXT, COUNT, FLAG, OPEN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {}
QUANTITIES = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
RESOURCES = closed(requests=QUANTITIES, limits=QUANTITIES)
CONTAINER = closed(
    name=TEXT, image=TEXT, env=OPEN, ports=OPEN, securityContext=OPEN, resources=RESOURCES
)
POD = closed(spec=closed(
    restartPolicy={"const": "Never"}, automountServiceAccountToken=FLAG, serviceAccountName=TEXT,
    securityContext=OPEN, affinity=OPEN, tolerations=OPEN,
    containers={"type": "array", "items": CONTAINER, "minItems": 1, "maxItems": 1},
))  # fmt: skip
PARAMS = {"type": "object", "additionalProperties": TEXT}
HEAD = closed(serviceType={"const": "ClusterIP"}, rayStartParams=PARAMS, template=POD)
GROUP = closed(
    groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=PARAMS,
    template=POD,
)  # fmt: skip
CLUSTER = closed(
    rayVersion=TEXT, authOptions=closed(mode={"enum": ["token"]}), enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed(
        version={"const": "v2"}, idleTimeoutSeconds=COUNT, securityContext=OPEN, resources=RESOURCES
    ),
    headGroupSpec=HEAD, workerGroupSpecs={"type": "array", "items": GROUP},
)  # fmt: skip
JOB = closed(
    apiVersion={"const": "ray.io/v1"}, kind={"const": "RayJob"}, metadata=OPEN,
    spec=closed(
        entrypoint=TEXT, submissionMode=TEXT, shutdownAfterJobFinishes=FLAG, backoffLimit=COUNT,
        ttlSecondsAfterFinished=COUNT, activeDeadlineSeconds=COUNT, submitterPodTemplate=POD,
        rayClusterSpec=CLUSTER,
    ),
)  # fmt: skip


BAKED = "/home/ray/diffitm"  # the checkout in the image
GPU = {"karpenter.k8s.aws/instance-gpu-name", "cloud.google.com/gke-accelerator"}
EKS = {"karpenter.sh/capacity-type", "karpenter.k8s.aws/instance-gpu-name"}
GKE = {"cloud.google.com/gke-spot", "cloud.google.com/gke-accelerator"}


def manifest_problems(job: dict[str, Any]) -> list[str]:
    """The names of what is wrong with the RayJob."""
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    read = autoscaling_of({"metadata": job["metadata"] | {"namespace": "x"}, "spec": cluster})
    nodes = read["available_node_types"]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    pods = [spec["submitterPodTemplate"]["spec"], *(group["template"]["spec"] for group in groups)]
    boxes = [container for pod in pods for container in pod["containers"]]
    variables = [variable for box in boxes for variable in box.get("env", [])]
    prefer = groups[1]["template"]["spec"]["affinity"]["nodeAffinity"]
    terms = sorted(
        prefer["preferredDuringSchedulingIgnoredDuringExecution"], key=lambda term: -term["weight"]
    )
    names = [term["preference"]["matchExpressions"] for term in terms]
    keys = [{name["key"] for name in both} for both in names]
    kinds = [len(name["values"]) for both in names for name in both if name["key"] in GPU]
    rights = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    checks = {
        "head without work": nodes["headgroup"]["resources"]["GPU"] == 0,
        "head reads": nodes["headgroup"]["resources"]["CPU"] > SPARE_CPUS,
        "from zero": cluster["enableInTreeAutoscaling"]
        and nodes["gpu"]["min_workers"] == cluster["workerGroupSpecs"][0]["replicas"] == 0,
        "a GPU each": nodes["gpu"]["resources"]["GPU"] == 1 and nodes["gpu"]["max_workers"] > 0,
        "ends": spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] <= 3600,
        "idle": 0 < read["idle_timeout_minutes"] <= 15,
        "bucket": all(f"--{name} s3://" in spec["entrypoint"] for name in ("data", "out")),
        "asks for GPUs": "--gpus-per-actor 1 --actors" in spec["entrypoint"],
        "image": {box["image"] for box in boxes} == {IMAGE}
        and IMAGE.endswith(f"-{cluster['rayVersion']}"),
        "codes": spec["entrypoint"].startswith(f"sh {BAKED}/clusters/entrypoint.sh python {BAKED}/")
        and spec["backoffLimit"] > 0,
        "token": cluster.get("authOptions") == {"mode": "token"},
        # Spot of several types first, the same on demand after, and nothing that has to be.
        "several types": keys == [EKS, GKE, EKS & GPU, GKE & GPU]
        and min(kinds) > 1
        and len(prefer) == 1,
        "no root": all(
            pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
            for pod in pods
        ),
        "no rights": all(
            item["securityContext"] == rights for item in (*boxes, cluster["autoscalerOptions"])
        ),
        "limits": all(box["resources"].keys() == {"requests", "limits"} for box in boxes),
        "secrets": bool(variables)
        and all(set(v.get("valueFrom", {})) == {"secretKeyRef"} for v in variables),
    }
    return [name for name, holds in checks.items() if not holds]


def test_manifest() -> None:
    job = load("clusters/kuberay.yaml")
    jsonschema.validate(job, JOB)
    assert manifest_problems(job) == []


BROKEN: dict[str, Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], Any]] = {
    "head without work": lambda s, h, w: h["rayStartParams"].update({"num-gpus": "1"}),
    "head reads": lambda s, h, w: h["rayStartParams"].update({"num-cpus": "2"}),
    "from zero": lambda s, h, w: w.update(minReplicas=1),
    "a GPU each": lambda s, h, w: w.update(maxReplicas=0),
    "ends": lambda s, h, w: s.update(shutdownAfterJobFinishes=False),
    "idle": lambda s, h, w: s["rayClusterSpec"]["autoscalerOptions"].update(idleTimeoutSeconds=0),
    "bucket": lambda s, h, w: s.update(entrypoint="--data s3://a --out /tmp"),
    "asks for GPUs": lambda s, h, w: s.update(entrypoint="--data s3://a --out s3://a"),
    "image": lambda s, h, w: s["rayClusterSpec"].update(rayVersion="2.59.0"),
    "codes": lambda s, h, w: s.update(
        entrypoint="python pipelines/gdbench.py --data s3://a --out s3://a"
    ),
    "token": lambda s, h, w: s["rayClusterSpec"].pop("authOptions"),
    "several types": lambda s, h, w: w["template"]["spec"]["affinity"]["nodeAffinity"].update(
        requiredDuringSchedulingIgnoredDuringExecution={}
    ),
    "no root": lambda s, h, w: h["template"]["spec"]["securityContext"].update(runAsUser=0),
    "no rights": lambda s, h, w: w["template"]["spec"]["containers"][0].update(securityContext={}),
    "limits": lambda s, h, w: w["template"]["spec"]["containers"][0]["resources"].pop("requests"),
    "secrets": lambda s, h, w: h["template"]["spec"]["containers"][0]["env"].append({"value": "x"}),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_manifest_is_seen(problem: str) -> None:
    job = load("clusters/kuberay.yaml")
    cluster = job["spec"]["rayClusterSpec"]
    BROKEN[problem](job["spec"], cluster["headGroupSpec"], cluster["workerGroupSpecs"][0])
    assert problem in manifest_problems(job)


def test_fields_that_kuberay_does_not_know_are_seen() -> None:
    job = load("clusters/kuberay.yaml")
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["serviceType"] = "LoadBalancer"
    with pytest.raises(jsonschema.ValidationError, match="ClusterIP"):
        jsonschema.validate(job, JOB)
    job = load("clusters/kuberay.yaml")
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 0
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(job, JOB)
