"""Published figures to print beside ours, labelled as published."""

from __future__ import annotations

# DiffusionITM (Krojer et al. 2023, table 2): Stable Diffusion 2.1 at 10 timesteps, normalised for
# images, ImageCoDe's static sets. (task, metric) -> vanilla, tuned without and with hard negatives.
LABEL = "published: SD 2.1 (NoNeg, HardNeg)"
TIMESTEPS = 10
FIGURES = {
    ("winoground", "image"): (9.0, 10.3, 9.8),
    ("winoground", "text"): (32.3, 35.0, 30.8),
    ("imagecode", "R@1"): (30.1, 29.7, 31.9),
}


def published(task: str, metric: str, group: str) -> str:
    """'9.0 (10.3, 9.8)' or nothing."""
    if group != "all" or (task, metric) not in FIGURES:
        return ""
    vanilla, without, with_negatives = FIGURES[task, metric]
    return f"{vanilla:.1f} ({without:.1f}, {with_negatives:.1f})"
