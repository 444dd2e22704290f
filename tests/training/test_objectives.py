"""The objectives of tuning against the published code's values and gradients."""

from __future__ import annotations

import json
import math

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
        ({"name": "hard-neg", "beta": 5.0}, "beta 5.0: only dpo takes one, not hard-neg"),
        ({"name": "softrepa", "preference": "ipo"}, "preference ipo: only dpo takes one"),
        ({"name": "dpo", "temperature": 1.0}, "temperature 1.0: only softrepa takes one, not dpo"),
        ({"name": "dpo", "preference": "bt"}, "preference bt: must be one of sigmoid, hinge, ipo"),
        ({"name": "dpo", "beta": 0.0}, "beta 0: must be above 0"),
        ({"name": "dpo", "beta": float("nan")}, "beta nan: must be above 0"),
        ({"name": "softrepa", "scale": -1.0}, "scale -1: must be above 0"),
        ({"name": "softrepa", "diagonal": -1.0}, "diagonal -1: must be 0 or more"),
        ({"name": "dpo", "bound": 2.0}, "lambda 2: dpo has no bound"),
        ({"name": "softrepa", "clip_over": "microbatch"}, "clip_over microbatch: softrepa has no"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Objective(**options)


def test_what_needs_negatives() -> None:
    needs = [name for name in OBJECTIVES if Objective(name).has_wrong_pairs]
    assert needs == ["hard-neg", "hard-neg-unclipped", "relativistic", "dpo"]


def test_contrasts() -> None:
    assert {name: Objective(name).contrast for name in OBJECTIVES} == {
        "no-neg": "none",
        "hard-neg": "wrong",
        "hard-neg-unclipped": "wrong",
        "relativistic": "distance",
        "soft-neg": "empty",
        "dpo": "base",
        "softrepa": "batch",
    }


def plain_preference(kind: str, u: float, beta: float) -> float:
    if kind == "hinge":
        return max(0.0, 1 - beta * u)
    return math.log1p(math.exp(-beta * u)) if kind == "sigmoid" else (u - 1 / (2 * beta)) ** 2


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_dpo_is_its_formula(kind: str) -> None:
    """Values and gradients, by differences of the formula for one example after the other; at the start,
    where the model is the base model, too."""
    objective = Objective("dpo", preference=kind, beta=3.0)
    base = [(0.5, 0.7), (0.9, 0.4), (0.3, 0.3)]
    for errors in (base, [(0.4, 0.8), (1.1, 0.3), (0.3, 0.9)]):
        right, wrong = (
            torch.tensor(v, dtype=torch.float64, requires_grad=True)
            for v in zip(*errors, strict=True)
        )
        before = tuple(torch.tensor(v, dtype=torch.float64) for v in zip(*base, strict=True))
        loss, held = objective.prefer(right, wrong, before)
        loss.backward()

        def plain(of: list[tuple[float, float]]) -> float:
            us = [(r[0] - r[1]) - (m[0] - m[1]) for m, r in zip(of, base, strict=True)]
            return sum(plain_preference(kind, u, 3.0) for u in us) / 3

        assert loss.item() == pytest.approx(plain(errors), rel=1e-9)
        for i in range(3):
            for place, found in ((0, right), (1, wrong)):
                up, down = ([list(e) for e in errors] for _ in range(2))
                up[i][place] += 1e-6
                down[i][place] -= 1e-6
                slope = (plain(up) - plain(down)) / 2e-6
                assert found.grad[i].item() == pytest.approx(slope, abs=1e-6)
        last = kind == "hinge" and errors is not base
        assert held.item() == (pytest.approx(1 / 3) if last else 0)


def test_dpo_starts_at_no_preference() -> None:
    one, two = torch.tensor([0.2, 0.9]), torch.tensor([0.4, 0.1])
    assert Objective("dpo").prefer(one, two, (one, two))[0].item() == pytest.approx(math.log(2))
    hinge = Objective("dpo", preference="hinge")
    assert hinge.prefer(one, two, (one, two))[0].item() == 1


def plain_match(e: list[list[float]], scale: float, temperature: float, diagonal: float) -> float:
    n, total = len(e), 0.0
    for i in range(n):
        logit = scale * math.exp(-e[i][i] / temperature)
        texts = sum(math.exp(scale * math.exp(-e[i][j] / temperature)) for j in range(n))
        images = sum(math.exp(scale * math.exp(-e[j][i] / temperature)) for j in range(n))
        total += (math.log(texts) - logit + math.log(images) - logit) / 2 / n
        total += diagonal * e[i][i] / n
    return total


@pytest.mark.parametrize("diagonal", [0.0, 10.0])
def test_softrepa_is_its_formula(diagonal: float) -> None:
    e = [[0.10, 0.14, 0.2], [0.15, 0.12, 0.11], [0.3, 0.05, 0.02]]
    errors = torch.tensor(e, dtype=torch.float64, requires_grad=True)
    loss = Objective("softrepa", diagonal=diagonal).match(errors)
    loss.backward()
    assert loss.item() == pytest.approx(plain_match(e, 4.0, 0.07, diagonal), rel=1e-9)
    for i in range(3):
        for j in range(3):
            up, down = ([list(row) for row in e] for _ in range(2))
            up[i][j] += 1e-6
            down[i][j] -= 1e-6
            slope = plain_match(up, 4.0, 0.07, diagonal) - plain_match(down, 4.0, 0.07, diagonal)
            assert errors.grad[i, j].item() == pytest.approx(slope / 2e-6, abs=1e-5)


def test_softrepa_of_flow_models() -> None:
    """The published diagonal of SD3 is another one than Stable Diffusion's; what was told stays."""
    errors = torch.rand(3, 3)
    for flow, told, diagonal in ((False, None, 10.0), (True, None, 0.0), (True, 3.0, 3.0)):
        loss = Objective("softrepa", diagonal=told).fitted(flow).match(errors)
        assert loss == Objective("softrepa", diagonal=diagonal).match(errors)
    assert Objective("dpo").fitted(True) == Objective("dpo")


def test_softrepa_of_one_example_has_no_contrast() -> None:
    loss = Objective("softrepa", diagonal=0.0).match(torch.tensor([[0.3]]))
    assert loss.item() == 0
