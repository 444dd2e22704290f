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
from diffitm.matching.plan import plan_timesteps
from tests.pipeline import ROOT

LAUNCHER = ("cluster.yaml", "clusters/gcp.yaml")
FILES = (*LAUNCHER, "clusters/kuberay.yaml", "clusters/Dockerfile", "runtime_env.yaml")
SCORER = "diffitm.distributed.fallback.spot_first"
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


def launcher_problems(config: dict[str, Any]) -> list[str]:
    """The names of what is wrong with a file for `ray up`."""
    nodes = dict(config["available_node_types"])
    head = nodes.pop(config["head_node_type"])
    confs = [node["node_config"] for node in (head, *nodes.values())]
    pairs = [(s, d) for s in nodes.values() for d in nodes.values() if is_spot(s) > is_spot(d)]
    start = " ".join(config["head_start_ray_commands"])
    ports = set(re.findall(r"port=(\S+)", " ".join([start, *config["worker_start_ray_commands"]])))
    extras = re.findall(r"[\w-]+==\S+$", " ".join(config["head_setup_commands"]))
    checks = {
        "head without work": head["resources"]["GPU"] == 0 and head["max_workers"] == 0,
        "head reads": head["resources"]["CPU"] > SPARE_CPUS,
        "from zero": all(n["min_workers"] == 0 < n["resources"]["GPU"] for n in nodes.values()),
        "on demand": any(
            s["resources"] == d["resources"] and s["priority"] > d["priority"] for s, d in pairs
        ),
        "at once": config["upscaling_speed"] >= config["max_workers"],
        "idle": 0 < config["idle_timeout_minutes"] <= 15,
        "disks": config["provider"]["cache_stopped_nodes"] is False,
        "ports": ports == {"6379", "8076"} and "security_group" not in config["provider"],
        "dashboard": "--dashboard-host=127.0.0.1" in start,
        "world": "0.0.0.0" not in str(config),
        "pinned": "-c /tmp/build/constraints.txt /tmp/build" in str(config["setup_commands"]),
        "extras": bool(extras),
        "mounts": all((ROOT / local).is_dir() for local in config["file_mounts"].values()),
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
    return [name for name, holds in checks.items() if not holds]


@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_files(name: str) -> None:
    """Ray takes the file, and what is asked of it holds."""
    validate_config(prepare_config(load(name)))
    assert launcher_problems(load(name)) == []


BROKEN: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "head without work": lambda c, n: n["head"]["resources"].update(GPU=1),
    "head reads": lambda c, n: n["head"]["resources"].update(CPU=SPARE_CPUS),
    "from zero": lambda c, n: n["gpu_on_demand"].update(min_workers=1),
    "on demand": lambda c, n: n["gpu_on_demand"].update(priority=10),
    "at once": lambda c, n: c.update(upscaling_speed=1),
    "idle": lambda c, n: c.update(idle_timeout_minutes=60),
    "disks": lambda c, n: c["provider"].update(cache_stopped_nodes=True),
    "ports": lambda c, n: c["worker_start_ray_commands"].append("ray start --port=8265"),
    "dashboard": lambda c, n: c.update(head_start_ray_commands=["ray start --head"]),
    "world": lambda c, n: c["provider"].update(rule="0.0.0.0/0"),
    "pinned": lambda c, n: c.update(setup_commands=["pip install /tmp/build"]),
    "extras": lambda c, n: c.update(head_setup_commands=["pip install boto3"]),
    "mounts": lambda c, n: c.update(file_mounts={"~/diffitm": "absent"}),
    "own group": lambda c, n: n["gpu_spot"]["node_config"].pop("SecurityGroupIds"),
    "IMDSv2": lambda c, n: n["head"]["node_config"]["MetadataOptions"].update(HttpTokens="no"),
    "role by name": lambda c, n: n["head"]["node_config"]["IamInstanceProfile"].update(Arn=""),
    "falls back": lambda c, n: c.update(head_start_ray_commands=["ray start --head"]),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_launcher_file_is_seen(problem: str) -> None:
    config = load("cluster.yaml")
    BROKEN[problem](config, config["available_node_types"])
    assert problem in launcher_problems(config)


def test_networks_and_spot_of_gcp_are_looked_at() -> None:
    config = load("clusters/gcp.yaml")
    del config["available_node_types"]["head"]["node_config"]["networkInterfaces"]
    del config["available_node_types"]["gpu_spot"]["node_config"]["scheduling"]["provisioningModel"]
    config["provider"]["availability_zone"] = "us-central1-b"
    assert launcher_problems(config) == ["on demand", "own network", "disks for G2"]


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
        f: f != "runtime_env.yaml" for f in found
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
    rate = float(re.search(r"R = (\d+) forwards", text)[1])
    steps = [len(plan_timesteps("diffusionitm", count, 0)) for count in (10, 50, 250)]
    titles = re.search(r"\| task \| pairs .* at (\d+) .* at (\d+) .* at (\d+) \|", text)
    assert [int(title) for title in titles.groups()] == steps
    lines = re.findall(r"^\| `\w+`.*?\| ([\d,]+) \| ([\d,]+) \| (.*) \|$", text, re.M)
    assert len(lines) == 12
    for pairs, unconditional, hours in lines:
        count = int(pairs.replace(",", ""))
        assert 3 * int(unconditional.replace(",", "")) <= count
        expected = [f"{count * number / rate / 3600:,.1f}" for number in steps]
        assert hours.split(" | ") == expected, pairs
