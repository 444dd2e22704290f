"""The files for Ray's launcher and for jobs, offline; every check is shown to fail on a broken copy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from diffitm.distributed.session import SPARE_CPUS
from diffitm.scoring.protocols import plan_timesteps
from tests.pipeline import ROOT

LAUNCHER = ("cluster.yaml", "clusters/gcp.yaml")
OTHERS = ("clusters/kuberay.yaml", "clusters/Dockerfile", "clusters/entrypoint.sh")
SCRIPTS = ("clusters/submit.sh", "clusters/aws-account.sh", "clusters/gcp-account.sh")
FILES = (*LAUNCHER, *OTHERS, *SCRIPTS, "runtime_env.yaml")
IMAGE = "FILL-IN-REGISTRY/diffitm:ray-2.60.0"
TOKEN = "~/.ray/auth_token"  # where Ray looks for it, and `ray get-auth-token --generate` writes it
# Memory in GB of machine types with one GPU that computes in bf16.
GPUS = {
    "g6.2xlarge": 24, "g5.2xlarge": 24, "g6e.2xlarge": 48, "g2-standard-8": 24, "a2-highgpu-1g": 40,
}  # fmt: skip
SCORER = "diffitm.distributed.autoscaler.spot_first"
# Keys of Amazon, Google and the Hub, private keys, and fields that would hold a secret's value.
SECRET = re.compile(
    r"(AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}|hf_\w{20}|-----BEGIN|ssh_private_key|"
    r"(aws|gcp)_credentials|(?i:password|secret_access_key|token)['\"]?\s*[:=]\s*['\"]?(?!false|true)\w"
)
# An image's name or tag, rayVersion, or a requirement, then the version.
VERSION = re.compile(r"(?:ray[:-]|rayVersion: |ray(?:\[\w+\])?==)(\d+\.\d+\.\d+)")


def load(name: str) -> dict[str, Any]:
    """A file's content, no two parts of it the same object."""
    return json.loads(json.dumps(yaml.safe_load((ROOT / name).read_text())))


def is_spot(node: dict[str, Any]) -> bool:
    conf = node["node_config"]
    market = conf.get("InstanceMarketOptions", {}).get("MarketType")
    return market == "spot" or conf.get("scheduling", {}).get("provisioningModel") == "SPOT"


def machine(node: dict[str, Any]) -> str:
    conf = node["node_config"]
    return conf.get("InstanceType") or conf.get("machineType")


def launcher_problems(config: dict[str, Any]) -> list[str]:
    """The names of what is wrong with a file for `ray up`."""
    nodes = dict(config["available_node_types"])
    head = nodes.pop(config["head_node_type"])
    confs = [node["node_config"] for node in (head, *nodes.values())]
    spot = [node for node in nodes.values() if is_spot(node)]
    others = [node for node in nodes.values() if not is_spot(node)]
    ranks = [node["priority"] for node in nodes.values()]
    start = " ".join(config["head_start_ray_commands"])
    ports = set(re.findall(r"port=(\S+)", " ".join([start, *config["worker_start_ray_commands"]])))
    setup = [config.get(f"{kind}setup_commands") for kind in ("", "head_", "worker_")]
    checks = {
        "head without work": head["resources"]["GPU"] == 0 and head["max_workers"] == 0,
        "head reads": head["resources"]["CPU"] > SPARE_CPUS,
        "from zero": all(n["min_workers"] == 0 < n["resources"]["GPU"] for n in nodes.values()),
        "several spot types": len({machine(node) for node in spot}) == len(spot) >= 2,
        "equal": all(n["resources"] == {"CPU": 8, "GPU": 1} for n in nodes.values()),
        "any actor fits": all(GPUS.get(machine(node), 0) >= 24 for node in nodes.values()),
        # Autoscaler v1 goes by the names, v2 by the priorities: both are in the order of the file.
        "spot first": [*spot, *others] == [*nodes.values()]
        and len(others) > 0
        and ranks == sorted(set(ranks), reverse=True),
        "numbered": [*nodes]
        == [f"gpu_spot_{i + 1}" for i in range(len(spot))]
        + [f"gpu_on_demand_{i + 1}" for i in range(len(others))],
        "at once": config["upscaling_speed"] >= config["max_workers"],
        "idle": 0 < config["idle_timeout_minutes"] <= 15,
        "disks": config["provider"]["cache_stopped_nodes"] is False,
        "ports": ports == {"6379", "8076"} and "security_group" not in config["provider"],
        "dashboard": "--dashboard-host=127.0.0.1" in start,
        "world": "0.0.0.0" not in str(config),
        "one image": config["docker"].get("image") == IMAGE
        and not {"head_image", "worker_image"} & config["docker"].keys(),
        "nothing to install": setup == [[], [], []],
        "token": config["file_mounts"] == {TOKEN: TOKEN}
        and "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"],
        "docker at once": "chown $USER /var/run/docker.sock"
        in config["initialization_commands"][0],
    }
    if config["provider"]["type"] == "aws":
        checks |= {
            "own group": all(c.get("SecurityGroupIds") for c in confs),
            "IMDSv2": all(c["MetadataOptions"]["HttpTokens"] == "required" for c in confs),
            "role by name": all(c["IamInstanceProfile"].keys() == {"Name"} for c in confs),
            "falls back": f"v2=0 RAY_AUTOSCALER_UTILIZATION_SCORER={SCORER} ray start" in start,
        }
    else:
        disks = [d["initializeParams"].get("diskType", "") for c in confs for d in c["disks"]]
        zone = config["provider"]["availability_zone"]
        checks["own network"] = all(c.get("networkInterfaces") for c in confs)
        checks["disks for G2"] = set(disks) == {f"zones/{zone}/diskTypes/pd-balanced"}
        most = max(node["max_workers"] for node in nodes.values())
        checks["no type has all"] = most < config["max_workers"]
    return [name for name, holds in checks.items() if not holds]


@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_files(name: str) -> None:
    """Ray takes the file, and what is asked of it holds."""
    validate_config(prepare_config(load(name)))
    assert launcher_problems(load(name)) == []


BROKEN: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "head without work": lambda c, n: n["head"]["resources"].update(GPU=1),
    "head reads": lambda c, n: n["head"]["resources"].update(CPU=SPARE_CPUS),
    "from zero": lambda c, n: n["gpu_on_demand_1"].update(min_workers=1),
    "several spot types": lambda c, n: n["gpu_spot_2"].update(n["gpu_spot_1"]),
    "equal": lambda c, n: n["gpu_spot_3"]["resources"].update(CPU=4),
    "any actor fits": lambda c, n: n["gpu_spot_2"]["node_config"].update(
        InstanceType="g4dn.2xlarge"
    ),
    "spot first": lambda c, n: n["gpu_on_demand_1"].update(priority=20),
    "numbered": lambda c, n: n.update(gpu_on_demand_4=n.pop("gpu_on_demand_2")),
    "at once": lambda c, n: c.update(upscaling_speed=1),
    "idle": lambda c, n: c.update(idle_timeout_minutes=60),
    "disks": lambda c, n: c["provider"].update(cache_stopped_nodes=True),
    "ports": lambda c, n: c["worker_start_ray_commands"].append("ray start --port=8265"),
    "dashboard": lambda c, n: c.update(head_start_ray_commands=["ray start --head"]),
    "world": lambda c, n: c["provider"].update(rule="0.0.0.0/0"),
    "one image": lambda c, n: c["docker"].update(head_image="rayproject/ray:2.60.0-py311-cpu"),
    "nothing to install": lambda c, n: c.pop("head_setup_commands"),
    "token": lambda c, n: c["docker"]["run_options"].pop(),
    "docker at once": lambda c, n: c["initialization_commands"].pop(0),
    "own group": lambda c, n: n["gpu_spot_1"]["node_config"].pop("SecurityGroupIds"),
    "IMDSv2": lambda c, n: n["head"]["node_config"]["MetadataOptions"].update(HttpTokens="no"),
    "role by name": lambda c, n: n["head"]["node_config"]["IamInstanceProfile"].update(Arn=""),
    "falls back": lambda c, n: c.update(head_start_ray_commands=["ray start --head"]),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_launcher_file_is_seen(problem: str) -> None:
    config = load("cluster.yaml")
    BROKEN[problem](config, config["available_node_types"])
    assert problem in launcher_problems(config)


def test_networks_and_shares_of_gcp_are_looked_at() -> None:
    config = load("clusters/gcp.yaml")
    nodes = config["available_node_types"]
    del nodes["head"]["node_config"]["networkInterfaces"]
    del nodes["gpu_spot_2"]["node_config"]["scheduling"]["provisioningModel"]
    nodes["gpu_spot_1"]["max_workers"] = 8
    config["provider"]["availability_zone"] = "us-central1-b"
    problems = ["several spot types", "numbered", "own network", "disks for G2", "no type has all"]
    assert launcher_problems(config) == problems


def test_ray_refuses_a_misspelt_field() -> None:
    with pytest.raises(ValidationError, match="idle_timeout_minuts"):
        validate_config(prepare_config(load("cluster.yaml") | {"idle_timeout_minuts": 5}))


@pytest.mark.parametrize("name", FILES)
def test_no_secret_in_a_file(name: str) -> None:
    assert SECRET.search((ROOT / name).read_text()) is None


@pytest.mark.parametrize(
    "line", ["id: AKIA" + "A" * 16, "HF_TOKEN: " + "x" * 8, "aws_secret_access_key = abc",
             "'token': 'hf_" + "a" * 34, "-----BEGIN RSA"]
)  # fmt: skip
def test_a_secret_would_be_seen(line: str) -> None:
    assert SECRET.search(line)


def test_one_version_of_ray() -> None:
    """Images, manifest and docs name the version of constraints.txt."""
    found = {f: VERSION.findall((ROOT / f).read_text()) for f in (*FILES, "docs/cluster.md")}
    found["constraints.txt"] = VERSION.findall((ROOT / "constraints.txt").read_text())
    assert {f: len(versions) > 0 for f, versions in found.items()} == {
        f: f != "runtime_env.yaml" and not f.endswith(".sh") for f in found
    }
    assert len({version for versions in found.values() for version in versions}) == 1


def test_runtime_environment() -> None:
    """Ray takes it, knows each field, and the upload keeps what pipelines need."""
    config = load("runtime_env.yaml")
    assert dict(RuntimeEnv(**config)) == config
    assert config.keys() <= RuntimeEnv.known_fields
    assert not {"pip", "uv", "conda", "image_uri"} & config.keys()
    kept = {"diffitm", "pipelines", "pyproject.toml"}
    assert all((ROOT / name.strip("/")).is_dir() for name in config["excludes"])
    assert not kept & {name.strip("/") for name in config["excludes"]}
    with pytest.raises(TypeError, match="env_vars"):
        RuntimeEnv(**config | {"env_vars": {"A": 1}})


def test_cost_table_follows_from_its_own_counts() -> None:
    """Hours = pairs x timesteps / R, with the timesteps that the protocol really uses."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    rate = float(re.search(r"(\d+) forwards a second, an assumption", text)[1])
    steps = [len(plan_timesteps("diffusionitm", count, 0)) for count in (10, 50, 250)]
    titles = re.search(r"\| task \| pairs \| hours at (\d+) \| hours at (\d+) \|", text)
    assert [int(title) for title in titles.groups()] == steps[:2]
    assert f"{steps[2]} timesteps take {steps[2] / steps[0]} times" in text
    lines = re.findall(r"^\| `\w+`.*?\| ([\d,]+) \| (.*) \|$", text, re.M)
    assert len(lines) == 12
    for pairs, hours in lines:
        count = int(pairs.replace(",", ""))
        expected = [f"{count * number / rate / 3600:,.1f}" for number in steps[:2]]
        assert hours.split(" | ") == expected, pairs
