"""Spot nodes first, on-demand ones when no spot is to be had: how Ray's autoscaler ranks node types.

Autoscaler v2 of Ray 2.60 never learns that a launch was refused and asks for the same type for ever.
Its predecessor keeps a record for half an hour, which its own ranking ignores and this one reads.
"""

from __future__ import annotations

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

    For RAY_AUTOSCALER_UTILIZATION_SCORER: GPU nodes only for GPU work, then types whose last launch
    was not refused, then Ray's own ranking, then those with 'spot' in their name.
    """
    rank = ray_scheduler._default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if rank is None:
        return None
    last = node_availability_summary.node_availabilities.get(node_type)
    return (rank[0], last is None or last.is_available, *rank[1:], "spot" in node_type)
