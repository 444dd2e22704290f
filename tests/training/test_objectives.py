"""The objectives of tuning against the published code's values and gradients."""

from __future__ import annotations

import json

import pytest
import torch

from diffitm.core.errors import InputError
from diffitm.training.lora.objectives import OBJECTIVES, Objective
from tests.conftest import DATA

CASES = json.loads((DATA / "hard_neg.json").read_text())


@pytest.mark.parametrize("over", ["example", "microbatch"])
def test_golden(over: str) -> None:
    """Every published value and gradient, also where the contrast equals its bound."""
    for case in CASES:
        name = "hard-neg-unclipped" if case["unhinged"] else "hard-neg"
        right, wrong = (torch.tensor([case[k]], requires_grad=True) for k in ("L_pos", "L_neg"))
        loss, _ = Objective(name, case["factor"], over)(right, wrong)
        loss.backward()
        assert loss.item() == pytest.approx(case["total"], abs=1e-6), case
        assert (float(right.grad), float(wrong.grad)) == (case["grad_L_pos"], case["grad_L_neg"])


def test_bound_of_examples_and_of_means() -> None:
    """Right 1 and 1, wrong 0.5 and 3: an example's bound holds the second, the means' both."""
    right, wrong = torch.ones(2), torch.tensor([0.5, 3.0])
    each, held = Objective("hard-neg")(right, wrong)
    assert (each.item(), held.item()) == (0.25, 0.5)
    whole, held = Objective("hard-neg", clip_over="microbatch")(right, wrong)
    assert (whole.item(), held.item()) == (0.0, 1.0)
    right, wrong = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0])
    whole, held = Objective("hard-neg", clip_over="microbatch")(right, wrong)
    assert (whole.item(), held.item()) == (0.0, 1.0)  # means 2 and 2.5
    half, held = Objective("hard-neg", 0.5)(right, torch.tensor([0.4, 1.6]))
    assert half.item() == pytest.approx((0.6 + 1.5) / 2) and held.item() == 0.5


def test_soft_neg_and_its_guards() -> None:
    right, empty = torch.tensor([1.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    loss, held = Objective("soft-neg")(right, empty)
    assert (loss.item(), held.item()) == (-2.0, 0.0)
    loss, held = Objective("soft-neg", guard="clip")(right, empty)
    assert (loss.item(), held.item()) == (0.0, 1.0)
    loss.backward()
    assert float(empty.grad) == 0


def test_no_neg_is_the_error() -> None:
    assert float(Objective("no-neg")(torch.tensor([1.0, 3.0]), None)[0]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "hardneg"}, "objective 'hardneg' is unknown; did you mean 'hard-neg'"),
        ({"name": "hard-neg", "bound": -1}, "lambda -1: must be 0 or more"),
        ({"name": "hard-neg", "bound": float("nan")}, "lambda nan"),
        ({"name": "hard-neg", "clip_over": "batch"}, "clip_over batch"),
        ({"name": "hard-neg", "guard": "clip"}, "only soft-neg takes one"),
        ({"name": "soft-neg", "guard": "both"}, "guard both"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Objective(**options)


def test_what_needs_negatives() -> None:
    needs = [name for name in OBJECTIVES if Objective(name).has_wrong_pairs]
    assert needs == ["hard-neg", "hard-neg-unclipped", "relativistic"]


def test_contrasts() -> None:
    assert {name: Objective(name).contrast for name in OBJECTIVES} == {
        "no-neg": "none",
        "hard-neg": "wrong",
        "hard-neg-unclipped": "wrong",
        "relativistic": "distance",
        "soft-neg": "empty",
    }
