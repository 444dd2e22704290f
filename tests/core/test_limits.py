"""What of a machine a process may use, by the files of its control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffitm.core.limits import limits


def group(root: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = root / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "own").write_text(own)
    return root / "groups", root / "own"


@pytest.mark.parametrize(
    ("own", "files", "memory", "processors"),
    [
        ("0::/a/b\n", {"a/memory.max": "1000\n", "a/b/memory.max": "max\n"}, 1000, None),
        ("0::/a/b\n", {"a/b/memory.max": "500\n", "memory.max": "900", "a/cpu.max": "50000 100000"}, 500, 1),
        ("0::/outside\n", {"memory.max": "700\n", "cpu.max": "max 100000\n"}, 700, None),
        (
            "4:memory:/x\n2:cpu,cpuacct:/x\n",
            {"memory/x/memory.limit_in_bytes": "800", "cpu,cpuacct/cpu.cfs_quota_us": "-1",
             "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            800, None,
        ),
        ("2:cpu,cpuacct:/x\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": "100000",
                                "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, None, 1),
    ],
)  # fmt: skip
def test_the_least_of_all_groups_counts(
    tmp_path: Path, own: str, files: dict[str, str], memory: int | None, processors: int | None
) -> None:
    machine = limits(tmp_path / "none", tmp_path / "none")
    assert machine.memory > 2**20 and machine.processors >= 1
    found = limits(*group(tmp_path, own, files))
    assert found == (memory or machine.memory, processors or machine.processors)
