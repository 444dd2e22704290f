"""Connect to Ray: the job's or the given cluster, else a quiet one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# A killed driver's share of the cluster is kept for that many seconds, 180 by default. For so long the
# run that goes on would have none for its writer.
os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
# What frees the share of a training that was stopped gives up where the cluster is slower than this.
os.environ.setdefault("RAY_py_gcs_connect_timeout_s", "600")

import ray
import ray.data
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffitm.core.errors import InputError, Unavailable
from diffitm.distributed import devices

log = logging.getLogger("diffitm")
T = TypeVar("T")
# Readers, the writer and Ray Data's checkpoint filter need processors beside the scoring actors.
SPARE_CPUS = 2
# Where an object store is and how it is spoken to. Keys are no part of it: Ray shows its job's settings
# to whoever reaches the dashboard.
PASSED_ON = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"),
)
ANSWERED = 120.0  # seconds within which a node answers
PATIENCE = 15  # seconds for a head that is starting
_joined = False  # a cluster that was there before can grow


@dataclass(frozen=True)
class ActorPool:
    """The actor pool: how many actors, and the share of the machine that each one takes."""

    min_actors: int
    max_actors: int
    cpus: float
    gpus: float

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


def is_elsewhere(address: str | None) -> bool:
    """Whether the address, or RAY_ADDRESS (a job has it), is that of a cluster; so is the Ray that this
    process is in already."""
    return ray.is_initialized() or (address or os.environ.get("RAY_ADDRESS") or "local") != "local"


def connect(address: str | None, dashboard: bool = False, verbose: bool = False) -> None:
    """Start or join Ray. `address` None means RAY_ADDRESS (a job has it), else this machine alone,
    with a `dashboard` (on loopback, a free port) where asked for. Ray's own log is heard on clusters, where
    it tells of dead actors and spent memory, and on this machine where `verbose`.

    A local start gives Ray a few more logical processors than there are, so that the actors cannot
    starve the readers on a small machine.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Version 2 starts 32 processes to list one file, and fails if a node goes away meanwhile.
    context.use_datasource_v2 = False
    # A run may wait for a spot GPU, and a block may take, longer than any bound; Watch says so meanwhile.
    context.execution_no_progress_timeout_s = -1
    # Attempts decides when actors that cannot start end a run.
    context.max_consecutive_actor_init_deaths = -1
    global _joined
    if ray.is_initialized():
        _joined |= ray.get_runtime_context().worker.mode == ray.WORKER_MODE  # a trial of a sweep
        return
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    # Few rows need few actors, which is no fault of the user's.
    warnings.filterwarnings(
        "ignore", message="The minimum number of concurrent actors", module="ray"
    )
    handler = signal.getsignal(signal.SIGTERM)
    _joined = is_elsewhere(address)
    heard = _joined or verbose
    log_to: dict[str, Any] = {
        "log_to_driver": heard,
        "logging_level": logging.WARNING if heard else logging.ERROR,
    }
    if not heard:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if _joined:
        _join(address, log_to)
    else:
        _start(dashboard, log_to)
    # Ray's own handler would end the process without a word.
    if callable(handler) and signal.getsignal(signal.SIGTERM) is not handler:
        signal.signal(signal.SIGTERM, handler)
    for name in ("ray", "ray.data"):  # what fails reaches the caller as an exception, too
        logging.getLogger(name).setLevel(logging.WARNING if heard else logging.CRITICAL)


def _start(dashboard: bool, options: dict[str, Any]) -> None:
    cpus = _processors() + SPARE_CPUS
    # Ray warns on stdout of more processes than a few times this, which every run here has.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(8 * cpus))
    where = {"include_dashboard": dashboard, "dashboard_host": "127.0.0.1"}
    try:
        ray.init(address="local", num_cpus=cpus, **where, **options)
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray has no type of its own for it
            raise
        text = "Ray did not start in time; the machine is too busy, or out of memory"
        raise Unavailable(f"{text} ({str(error).splitlines()[0]})") from error


def _join(address: str | None, options: dict[str, Any]) -> None:
    """Join the cluster at the address; raises InputError where there is none, or where it refuses."""
    told = f"--ray {address}" if address else "RAY_ADDRESS"
    address = address or os.environ["RAY_ADDRESS"]
    try:
        _await(address)
        ray.init(address=address, runtime_env=_passed_on(), **options)
    except (OSError, ValueError, RuntimeError, AuthenticationError) as error:
        why = "; ".join([str(error), *str(error.__cause__ or "").strip().splitlines()[-1:]])
        raise InputError(
            f"{told}: no cluster could be joined ({why}). What is right: on a node of the cluster, "
            "host:port of its head, as `ray start --head` prints it, or 'auto'. A cluster that asks "
            "for a token takes this run with the same RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error


def _await(address: str) -> None:
    """Until something listens there. Ray would wait as well, but then end this process."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:
        return
    if int(port) > 65535:
        raise ValueError(f"port {port} is above 65535")
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
        time.sleep(1)


def _passed_on() -> dict[str, dict[str, str]] | None:
    """Settings that workers on other machines lack. Inside of a job they have the job's."""
    found = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return {"env_vars": found} if found and not in_job else None


def choose_pool(
    actors: int | None, max_actors: int | None, cpus: float | None, gpus: float | None
) -> ActorPool:
    """The pool of the options, with defaults from the cluster: an actor a GPU, else one a processor.

    Where nothing is asked for, an actor takes one processor, or less on a cluster so small that
    the readers would have none. If what is asked for leaves them none, raises InputError where this
    run started Ray itself, and warns elsewhere, because nodes can come up; likewise of GPUs.
    """
    total = ray.cluster_resources()
    if gpus is None:
        gpus = 1.0 if total.get("GPU", 0) >= 1 else 0.0
        if _joined and not gpus:
            text = "the cluster has no GPU now: the actors take processors. Where nodes with GPUs come "
            log.warning(text + "up on demand, ask for them: --gpus-per-actor 1 --actors N")
    free = max(0.0, total.get("CPU", 0) - SPARE_CPUS)
    if actors is None:
        fitting = total.get("GPU", 0) / gpus if gpus else free / (cpus or 1.0)
        actors = max(1, int(fitting))
    most = max_actors or actors
    if not 1 <= actors <= most:
        raise InputError(f"--actors {actors}, --max-actors {most}: must be 1 or more, and rising")
    if cpus is None:
        cpus = min(1.0, int(100 * free / most) / 100)
        if gpus == 0 and actors > max(1.0, free):
            cpus = 1.0  # what a cluster that grows is asked for
            refuse(_too_many(actors, cpus, free))
    elif actors * cpus > free:
        refuse(_too_many(actors, cpus, free))
    if gpus and total.get("GPU", 0) < actors * gpus:
        has = f"the cluster has {total.get('GPU', 0):g} GPUs"
        refuse(f"--actors {actors} with {gpus:g} GPUs each: {has}")
    return ActorPool(actors, most, cpus, gpus)


def refuse(text: str) -> None:
    """Raise InputError, or warn on a cluster that was there before this run and may grow."""
    if not _joined:
        raise InputError(text)
    log.warning("%s; unless the cluster grows, this run waits for ever", text)


def standing(pool: ActorPool) -> str:
    """What the cluster has, and what the pool wants of it."""
    total, free = ray.cluster_resources(), ray.available_resources()
    has = " and ".join(
        f"{total.get(key, 0):g} {name} ({free.get(key, 0):g} free)"
        for key, name in (("CPU", "processors"), ("GPU", "GPUs"))
    )
    wants = f"{pool.min_actors} actors want {pool.cpus:g} and {pool.gpus:g} each"
    return f"{has} on {len([n for n in ray.nodes() if n['Alive']])} nodes; {wants}"


def other_nodes() -> dict[str, str]:
    """Nodes beside this process's that are up: their ids, with the addresses by which people know
    them."""
    if not ray.is_initialized():
        return {}
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}


def ask_nodes(
    nodes: dict[str, str], function: Callable[..., T], *arguments: Any, gpus: float = 0.0
) -> dict[str, T]:
    """What a function returns on each of these nodes, by address; those that go away meanwhile are left
    out. It takes no processor, and so many GPUs."""
    task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(function)
    asked = {
        name: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(*arguments)
        for node, name in nodes.items()
    }
    answers = {}
    for name, reference in asked.items():
        try:
            answers[name] = ray.get(reference, timeout=ANSWERED)
        except (ray.exceptions.RaySystemError, ray.exceptions.WorkerCrashedError):
            log.warning("node %s went away", name)
        except ray.exceptions.GetTimeoutError:
            log.warning("node %s did not answer in %.0f s", name, ANSWERED)
    return answers


def start_here(kind: type, *arguments: Any) -> Any:
    """An actor of the class on the driver's node, so that it outlives those of the workers; it takes no
    processor."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(kind).options(scheduling_strategy=here).remote(*arguments)


def _too_many(actors: int, cpus: float, free: float) -> str:
    return (
        f"--actors {actors} with {cpus:g} processors each leaves none for the readers: the cluster "
        f"has {free + SPARE_CPUS:g} and {SPARE_CPUS} must stay free; at most {int(free / cpus)} fit"
    )


def _processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resources() -> dict[str, float]:
    """What the cluster has now."""
    return ray.cluster_resources()


def gpus() -> float:
    """GPUs of the cluster."""
    return float(ray.cluster_resources().get("GPU", 0))


def ask(cpus: float, gpus: float, function: Callable[..., T], *given: Any) -> T:
    """What a function returns as a task of Ray with its own process. Raises its InputError."""
    # Not in the share of a trial of Ray Tune that asks.
    options = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "DEFAULT"}
    task = ray.remote(max_retries=1, **options)(function)
    try:
        return ray.get(task.remote(*given))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise


def free_gpu_memory(gpus: float) -> list[int]:
    """Bytes that a GPU has free, of each node that has so many GPUs; where none is up yet, the first that
    comes. Nothing of those whose torch sees none."""
    nodes = {
        node["NodeID"]: node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU", 0) >= gpus
    }
    found = ask_nodes(nodes, devices.free_memory, gpus=gpus).values()
    return [free for free in found or [ask(0, gpus, devices.free_memory)] if free is not None]


def fitting(cpus: float, gpus: float) -> int:
    """How many shares of the cluster as it is fit beside the readers, at least one."""
    total = resources()
    count = int((total.get("CPU", 0) - SPARE_CPUS) / cpus)
    if gpus:
        count = min(count, int(total.get("GPU", 0) / gpus))
    return max(1, count)
