"""Recap strategies: the published code's conditions, what is kept, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffitm.core.errors import InputError
from diffitm.models.clip_tokens import join_tokens, project
from diffitm.training.diva.options import DivaConfig
from diffitm.training.diva.recap import Recap, add_text, parse_recap
from tests.conftest import DATA

GOLDEN = np.load(DATA / "recap.npz")
# Patches at the presets' sizes, and the published number of tokens beside the first.
PRESETS = {
    "openai-224": (256, 76),
    "openai-336": (576, 76),
    "metaclip-l": (256, 256),
    "metaclip-h": (256, 256),
    "siglip-224": (256, 42),
    "siglip-384": (729, 72),
    "dfn-224": (256, 256),
    "dfn-378": (729, 364),
}


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def tokens(patches: int = 10, batch: int = 2) -> Tensor:
    return torch.arange(batch * (1 + patches) * 3.0).view(batch, 1 + patches, 3)


def test_openai_condition() -> None:
    """The published code's, from tokens before the final norm and its indices."""
    norm = nn.LayerNorm(16)
    norm.load_state_dict({k: golden(f"openai224_ln_post_{k}") for k in ("weight", "bias")})
    projected = project(golden("openai224_tokens"), norm, golden("openai224_proj"))
    recap = parse_recap(DivaConfig.PRESETS["openai-224"]["recap"])
    indices = golden("openai224_indices")
    assert indices.shape[1] == recap.kept(256)
    torch.testing.assert_close(
        recap(projected, indices), golden("openai224_condition"), atol=1e-5, rtol=0
    )


def test_siglip_condition() -> None:
    """The attention-pooled token, then 42 windows of 6, the last 4 tokens dropped."""
    joined = join_tokens(golden("siglip224_attn_pooled"), golden("siglip224_tokens"))
    recap = parse_recap(DivaConfig.PRESETS["siglip-224"]["recap"])
    torch.testing.assert_close(recap(joined), golden("siglip224_condition"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_keep_the_published_number_of_tokens(preset: str) -> None:
    patches, kept = PRESETS[preset]
    assert parse_recap(DivaConfig.PRESETS[preset]["recap"]).kept(patches) == kept


def test_every_preset_is_known() -> None:
    of_diva = {name for name in DivaConfig.PRESETS if not name.endswith("shapes")}
    assert set(PRESETS) == of_diva


@pytest.mark.parametrize(
    ("text", "patches", "kept"),
    [("class-only", 64, 0), ("all", 64, 64), ("random:0.29", 100, 29), ("pool:6", 64, 10)]
    + [("random:1", 64, 64), ("random:0.999", 64, 63), ("pool:64", 64, 1)],
)
def test_kept(text: str, patches: int, kept: int) -> None:
    recap = parse_recap(text)
    assert recap.kept(patches) == kept
    found = recap(tokens(patches), recap.draw([1, 2], patches))
    assert found.shape == (2, 1 + kept, 3)
    torch.testing.assert_close(found[:, 0], tokens(patches)[:, 0])


def test_random_draws_each_patch_at_most_once() -> None:
    indices = parse_recap("random:0.8").draw(range(50), 20)
    assert indices is not None and indices.shape == (50, 16)
    assert all(len(set(row)) == 16 for row in indices.tolist())
    assert set(indices.flatten().tolist()) == set(range(20))


def test_replaced_draws_some_twice() -> None:
    indices = parse_recap("random:0.8:replaced").draw(range(50), 20)
    assert indices is not None and indices.shape == (50, 16)
    assert any(len(set(row)) < 16 for row in indices.tolist())
    assert set(indices.flatten().tolist()) == set(range(20))


def test_a_draw_depends_on_its_own_seed_alone() -> None:
    recap = parse_recap("random:0.5")
    together, alone = recap.draw([3, 4, 5], 30), recap.draw([4], 30)
    assert together is not None and alone is not None
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_random_takes_the_drawn_patches() -> None:
    found = parse_recap("random:0.2")(tokens(), torch.tensor([[9, 0], [4, 4]]))
    assert torch.equal(found[0], tokens()[0][[0, 10, 1]])
    assert torch.equal(found[1], tokens()[1][[0, 5, 5]])


def test_pool_averages_neighbours_and_drops_the_rest() -> None:
    found = parse_recap("pool:4")(tokens())
    assert torch.equal(found[:, 1], tokens()[:, 1:5].mean(1))
    assert torch.equal(found[:, 2], tokens()[:, 5:9].mean(1))
    assert found.shape[1] == 3


@pytest.mark.parametrize("text", ["random", "random:0", "random:1.5", "random:nan", "random:x"])
@pytest.mark.parametrize("more", ["", ":twice"])
def test_unknown_forms(text: str, more: str) -> None:
    with pytest.raises(InputError, match="must be class-only, all, random:SHARE"):
        parse_recap(text + more)


@pytest.mark.parametrize("text", ["pool:0", "pool", "pool:2.5", "all:1", "everything", ""])
def test_more_unknown_forms(text: str) -> None:
    with pytest.raises(InputError, match="must be class-only, all, random:SHARE"):
        parse_recap(text)


@pytest.mark.parametrize(
    ("text", "least"), [("random:0.01", "random:0.0156"), ("pool:65", "pool:64")]
)
def test_a_recap_that_keeps_nothing(text: str, least: str) -> None:
    with pytest.raises(InputError, match=f"{text}: keeps none of this CLIP's 64 .* is {least}"):
        parse_recap(text).kept(64)


@pytest.mark.parametrize(
    "text", ["class-only", "all", "random:0.3", "random:0.5:replaced", "pool:6"]
)
def test_text_form_is_read_again(text: str) -> None:
    assert str(parse_recap(text)) == text
    assert parse_recap(str(parse_recap(text))) == parse_recap(text)


def test_text_meets_the_recap() -> None:
    recap, text = torch.ones(2, 3, 4), torch.arange(12.0).view(3, 4)
    assert torch.equal(add_text(recap, text, "none"), recap)
    assert torch.equal(add_text(recap, text, "tokens"), recap + text)
    mean = add_text(recap, text, "mean")
    assert torch.equal(mean[1, 2], 1 + text.mean(0))


def test_density() -> None:
    """A number from 0 to 1, whatever the strategy."""
    found = [parse_recap(t).density for t in ("class-only", "random:0.3", "pool:4", "all")]
    assert found == [0, 0.3, 0.25, 1]
    assert Recap("random", 0.3) == parse_recap("random:0.3")
