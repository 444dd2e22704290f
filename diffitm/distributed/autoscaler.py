"""Spot nodes first, on-demand ones when no spot is to be had: how Ray's autoscaler ranks node types.

Autoscaler v2 of Ray 2.60 never learns that a launch was refused and asks for the same type for ever.
Its predecessor keeps a record for half an hour, which its own ranking ignores and this one reads.
"""

from __future__ import annotations

import re
from typing import Any

from ray.autoscaler._private import resource_demand_scheduler as ray_scheduler


def spot_first(
    node_resources: dict[str, float],
    resources: list[dict[str, float]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """The rank of a node type for these demands, None if it serves none; the highest is launched.

    For RAY_AUTOSCALER_UTILIZATION_SCORER: GPU nodes only for GPU work, then types whose last launch was
    not refused, then, where all were, the one whose refusal is the oldest; then Ray's own ranking, types
    with 'spot' in their name, and a low number at the end of it (gpu_spot_1 before gpu_spot_2).
    """
    rank = ray_scheduler._default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if rank is None:
        return None
    last = node_availability_summary.node_availabilities.get(node_type)
    refused = 0 if last is None or last.is_available else last.last_checked_timestamp
    number = re.search(r"\d+$", node_type)
    order = ("spot" in node_type, -int(number[0]) if number else 0)
    return (rank[0], -refused, *rank[1:], *order)
