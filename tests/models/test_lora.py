"""LoRA files of every layout against what diffusers and PEFT themselves make of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from diffitm.core.errors import InputError
from diffitm.models.loading import load_denoiser, lora_digest, resolve
from diffitm.models.lora import lora_file, merge_lora, read_lora, text_encoders
from diffitm.models.model_check import check_loadable
from tests import tiny

RANK = 2
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
Tensors = dict[str, Tensor]


def fresh() -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny.unet()


def adapters() -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) for every attention projection."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, module in fresh().named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(PROJECTIONS) and "attn" in name:
            down = torch.randn(RANK, module.in_features, generator=generator)
            up = torch.randn(module.out_features, RANK, generator=generator)
            found[name] = (0.1 * down, 0.1 * up)
    return found


def named(prefix: str, down: str, up: str) -> Tensors:
    """Tensors '<prefix><module>.<down or up>.weight'."""
    pairs = adapters().items()
    tensors = {f"{prefix}{name}.{down}.weight": pair[0] for name, pair in pairs}
    return tensors | {f"{prefix}{name}.{up}.weight": pair[1] for name, pair in pairs}


def processor_layout() -> Tensors:
    """The file that diffusers' older attention processors wrote."""
    tensors = {}
    for name, (down, up) in adapters().items():
        block, _, projection = name.replace("to_out.0", "to_out").rpartition(".")
        tensors[f"{block}.processor.{projection}_lora.down.weight"] = down
        tensors[f"{block}.processor.{projection}_lora.up.weight"] = up
    return tensors


@pytest.fixture(scope="module")
def expected() -> Tensors:
    """The weights after diffusers' own load_lora_adapter and fuse_lora."""
    unet = fresh()
    unet.load_lora_adapter(named("", "lora_A", "lora_B"), prefix=None)
    unet.fuse_lora()
    state = unet.state_dict()
    return {k.replace(".base_layer", ""): v for k, v in state.items() if ".lora_" not in k}


def assert_merged(unet: torch.nn.Module, expected: Tensors) -> None:
    """Every weight equal, and the projections really changed."""
    found, before = unet.state_dict(), fresh().state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    changed = {k.removesuffix(".weight") for k in before if not torch.equal(before[k], found[k])}
    assert changed == set(adapters())


def test_old_attention_processor_file(tmp_path: Path, expected: Tensors) -> None:
    torch.save(processor_layout(), tmp_path / "pytorch_lora_weights.bin")
    tensors, scale = read_lora(str(tmp_path))
    assert scale is None
    unet = fresh()
    assert merge_lora(unet, tensors, scale) == len(tensors) == 2 * len(adapters())
    assert_merged(unet, expected)


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("unet.", "lora_A", "lora_B"),
        ("unet.", "lora.down", "lora.up"),
        ("", "lora_A", "lora_B"),
        ("base_model.model.", "lora_A.default", "lora_B.default"),
    ],
)
def test_plain_layouts(tmp_path: Path, expected: Tensors, prefix: str, down: str, up: str) -> None:
    file = tmp_path / "some-name.safetensors"
    save_file(named(prefix, down, up), file)
    tensors, scale = read_lora(str(file))
    unet = fresh()
    assert merge_lora(unet, tensors, scale) == len(tensors)
    assert_merged(unet, expected)


def test_file_that_diffusers_writes(tmp_path: Path) -> None:
    """save_lora_adapter of a U-Net with alpha != r: the scale comes from the file's metadata."""
    unet = fresh()
    unet.add_adapter(lora_config(alpha=6))
    randomise(unet)
    unet.save_lora_adapter(tmp_path)
    unet.fuse_lora()
    state = unet.state_dict()
    fused = {k.replace(".base_layer", ""): v for k, v in state.items() if ".lora_" not in k}
    tensors, _ = read_lora(str(tmp_path))
    pipeline_file = tmp_path / "pipeline" / "pytorch_lora_weights.safetensors"
    StableDiffusionPipeline.save_lora_weights(
        pipeline_file.parent,
        unet_lora_layers={k.removeprefix("unet."): v for k, v in tensors.items()},
        unet_lora_adapter_metadata={"r": RANK, "lora_alpha": 6},
    )
    for path in (tmp_path, pipeline_file):
        found, scale = read_lora(str(path))
        assert scale == 3.0
        merged = fresh()
        merge_lora(merged, found, scale)
        assert_merged(merged, fused)


def lora_config(alpha: int, **other: object) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(PROJECTIONS), **other)


def randomise(module: torch.nn.Module) -> None:
    """PEFT starts `up` at zero, which would merge to nothing."""
    generator = torch.Generator().manual_seed(2)
    for name, value in module.named_parameters():
        if "lora_B" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_folder(tmp_path: Path, rslora: bool) -> None:
    """adapter_config.json states lora_alpha != r, divided by r or by its root."""
    model = get_peft_model(fresh(), lora_config(alpha=5, use_rslora=rslora))
    randomise(model)
    model.save_pretrained(tmp_path)
    tensors, scale = read_lora(str(tmp_path))
    assert scale == pytest.approx(5 / (RANK**0.5 if rslora else RANK))
    unet = fresh()
    merge_lora(unet, tensors, scale)
    assert_merged(unet, model.merge_and_unload().state_dict())


@pytest.mark.parametrize("name", ["kohya.safetensors", "kohya.bin"])
def test_kohya_file(tmp_path: Path, expected: Tensors, name: str) -> None:
    """Its flat names, with an alpha each; merged as the same adapter in diffusers' names is."""
    tensors, file = {}, tmp_path / name
    for module, (down, up) in adapters().items():
        flat = "lora_unet_" + module.replace(".", "_")
        tensors[f"{flat}.lora_down.weight"] = down
        tensors[f"{flat}.lora_up.weight"] = up * 4
        tensors[f"{flat}.alpha"] = torch.tensor(RANK / 4)
    save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)
    unet = fresh()
    read, scale = read_lora(str(file))
    assert scale is None
    assert merge_lora(unet, read, scale) == len(tensors)
    assert_merged(unet, expected)


def test_kohya_file_of_every_module() -> None:
    """Each linear layer and convolution finds its own weights."""
    unet, tensors, changed = fresh(), {}, set()
    for module, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            flat, shape = "lora_unet_" + module.replace(".", "_"), layer.weight.shape
            tensors[f"{flat}.lora_down.weight"] = torch.ones(1, *shape[1:])
            tensors[f"{flat}.lora_up.weight"] = torch.ones(shape[0], 1, *[1] * (len(shape) - 2))
            changed.add(module)
    assert merge_lora(unet, tensors) == len(tensors)
    before = fresh().state_dict()
    for module, value in unet.state_dict().items():
        by = 1 if module.removesuffix(".weight") in changed else 0
        torch.testing.assert_close(value, before[module] + by)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "do not fit|strange"),
        ("lora_unet_conv_in.hada_w1_a", "is a LoHa .* file .*hada_w1_a"),
        ("lora_unet_no_such_module.lora_down.weight", "do not fit this U-Net|strange"),
    ],
)
def test_what_of_kohya_is_refused(key: str, text: str) -> None:
    flat = key.partition(".")[0]
    tensors = {key: torch.zeros(1, 4), f"{flat}.lora_up.weight": torch.zeros(4, 1)}
    unet, before = fresh(), fresh().state_dict()
    with pytest.raises(InputError, match=text):
        merge_lora(unet, tensors)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def kohya(model: torch.nn.Module, start: str, names: Sequence[str], seed: int) -> Tensors:
    """A kohya file's tensors for the layers of a model whose names end so, alphas that are not the rank."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and module.endswith(tuple(names)):
            module = (
                module if "text_model" in module or "te" not in start else f"text_model.{module}"
            )
            flat = f"{start}_{module.replace('.', '_')}"
            down = torch.randn(RANK, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, RANK, generator=generator)
            tensors[f"{flat}.lora_down.weight"], tensors[f"{flat}.lora_up.weight"] = down, up
            tensors[f"{flat}.alpha"] = torch.tensor(1.0)
    return tensors


TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_text_encoders(kind: str, layout: str, tmp_path: Path) -> None:
    """Their parts of a file are merged too, as diffusers' pipeline fuses them."""
    folder = (tiny.write_sd if kind == "sd" else tiny.write_sdxl)(tmp_path / kind)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    encoders = {"text_encoder": "lora_te" if kind == "sd" else "lora_te1"}
    if kind == "sdxl":
        encoders["text_encoder_2"] = "lora_te2"
    tensors = kohya(pipeline.unet, "lora_unet", PROJECTIONS, 1)
    for number, (name, start) in enumerate(encoders.items()):
        tensors |= kohya(getattr(pipeline, name), start, TEXT_LAYERS, 2 + number)
    file = tmp_path / "kohya.safetensors"
    save_file(tensors, file)
    pipeline.load_lora_weights(str(file))
    if layout == "diffusers":
        names, metadata = ("unet", *encoders), {"r": RANK, "lora_alpha": 1}
        layers = {
            f"{name}_lora_layers": get_peft_model_state_dict(
                getattr(pipeline, name), adapter_name="default_0"
            )
            for name in names
        }
        file = tmp_path / "again"
        alphas = {f"{name}_lora_adapter_metadata": metadata for name in names}
        type(pipeline).save_lora_weights(file, **layers, **alphas)
    pipeline.fuse_lora()
    source = resolve(str(folder))
    check_loadable(source, [str(file)])
    plain, merged = load_denoiser(source), load_denoiser(source, lora=str(file))
    for own, before, theirs in zip(
        [merged.unet, *text_encoders(merged)],
        [plain.unet, *text_encoders(plain)],
        [pipeline.unet, *(getattr(pipeline, name) for name in encoders)],
        strict=True,
    ):
        fused = {k.replace(".base_layer", ""): v for k, v in theirs.state_dict().items()}
        for name, value in own.state_dict().items():
            torch.testing.assert_close(value, fused[name], atol=1e-5, rtol=1e-4)
        assert not torch.equal(*(next(v for k, v in m.state_dict().items() if "to_q" in k or "q_proj" in k)
                                 for m in (own, before)))  # fmt: skip


OTHERS = {
    "LoHa": {"lora_unet_conv_in.hada_w1_a": 2, "lora_unet_conv_in.alpha": 0},
    "LoKr": {"lora_unet_conv_in.lokr_w1": 2},
    "DoRA": {"lora_unet_mid.lora_down.weight": 2, "lora_unet_mid.dora_scale": 2},
    "DoRA file (1": {"unet.conv_in.lora_magnitude_vector": 1},
    "Tucker": {"lora_unet_conv_in.lora_mid.weight": 4, "lora_unet_conv_in.lora_down.weight": 4},
    "full-difference": {"lora_unet_conv_in.diff": 2},
    "cloneofsimo": {"unet:0:up": 2, "unet:0:down": 2},
    "transformer": {"transformer.blocks.0.attn.to_q.lora_A.weight": 2},
    "whole model": {"model.diffusion_model.input_blocks.0.0.weight": 4},
    "textual inversion": {"<cat>": 2},
    "kohya's transformer": {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": 2},
    "IP-Adapter": {"image_proj.proj.weight": 2, "ip_adapter.1.to_k_ip.weight": 2},
    "ControlLoRA": {"lora_controlnet": 1, "input_blocks.1.1.proj_in.up": 2},
    "VeRA": {"base_model.vera_A": 2},
    "AdaLoRA": {"unet.conv_in.lora_E.weight": 2},
    "LyCORIS (its names": {"lycoris_conv_in.lora_down.weight": 4},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_by_name(kind: str, tmp_path: Path, sd_folder: Path) -> None:
    """A file of another format is refused by the format's name and its own, not as one of another model;
    before anything is loaded, and by what loads it."""
    file = tmp_path / "own.safetensors"
    save_file({key: torch.ones([1] * dims) for key, dims in OTHERS[kind].items()}, file)
    source = resolve(str(sd_folder))
    for call in (lambda: check_loadable(source, [str(file)]),
                 lambda: load_denoiser(source, lora=str(file))):  # fmt: skip
        with pytest.raises(
            InputError, match=rf"own\.safetensors(: it)? is an? .*{re.escape(kind)}"
        ) as raised:
            call()
        assert "do not fit" not in str(raised.value)


def test_a_list_of_tensors(tmp_path: Path) -> None:
    """cloneofsimo's .pt, which has no names."""
    torch.save([torch.ones(2, 4), torch.ones(4, 2)], tmp_path / "own.pt")
    with pytest.raises(InputError, match=r"own\.pt .*cloneofsimo file, a list of 2 tensors"):
        read_lora(str(tmp_path / "own.pt"))


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b""])
def test_a_lora_that_was_not_fetched(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.safetensors is (a pointer of Git LFS|empty)"):
        read_lora(str(tmp_path / "a.safetensors"))


def test_a_lora_of_another_model(tmp_path: Path, sd_folder: Path) -> None:
    """Is found without the model's weights, and the message names the file."""
    save_file(wrong_block(processor_layout()), tmp_path / "other.safetensors")
    source, file = resolve(str(sd_folder)), str(tmp_path / "other.safetensors")
    for call in (lambda: check_loadable(source, [file]), lambda: load_denoiser(source, lora=file)):
        with pytest.raises(InputError, match=r"other\.safetensors: .* do not fit this U-Net"):
            call()


FIRST = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def plain() -> Tensors:
    return named("unet.", "lora_A", "lora_B")


def raises_in_both(file: Path, folder: Path, text: str) -> None:
    """In the check and in what loads, with the file's name."""
    source = resolve(str(folder))
    for call in (
        lambda: check_loadable(source, [str(file)]),
        lambda: load_denoiser(source, lora=str(file)),
    ):
        with pytest.raises(InputError, match=text) as raised:
            call()
        assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, r"lora_\w.weight is of int8: quantised"),
        (lambda t: t | {f"{FIRST}.lora_A.weight": t[f"{FIRST}.lora_A.weight"] * torch.nan},
         r"to_q.lora_A.weight holds NaN or infinite values"),
        (lambda t: t | {f"{FIRST}.alpha": torch.tensor(torch.inf)}, "to_q.alpha holds NaN or infinite"),
        (lambda t: t | {f"{FIRST}.alpha": torch.ones(2)}, r"to_q.alpha is of shape \[2\], not one number"),
        (lambda t: {k.replace(".weight", f".{name}.weight"): v for k, v in t.items() for name in "xy"},
         r"to_. twice, as .*lora_A.x.weight and .*lora_A.y.weight: give a file of one"),
        (lambda t: t | {k.replace("lora_A", "lora.down").removeprefix("unet."): v for k, v in t.items()},
         "to_. twice, as .*lora.down.weight and unet.*lora_A.weight"),
        (lambda t: {k: v[:0] if "lora_A" in k else v[:, :0] for k, v in t.items()}, "do not fit this U-Net"),
        (lambda t: {k: v[0] for k, v in t.items()}, "do not fit this U-Net"),
        (lambda t: {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for k, v in t.items()},
         "lora_down and lora_up are kohya's, the rest of the name is not"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_weights(
    change: Callable[[Tensors], Tensors], text: str, plain: Tensors, tmp_path: Path, sd_folder: Path
) -> None:
    """Were merged as they are before, or the last of two."""
    save_file({k: v.clone() for k, v in change(plain).items()}, tmp_path / "own.safetensors")
    raises_in_both(tmp_path / "own.safetensors", sd_folder, text)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"r": 0, "lora_alpha": 4}, "r = 0 is not above 0"),
        ({"r": "two", "lora_alpha": 4}, "r = 'two' in its adapter_config.json or metadata is no number"),
        ({"r": 2, "lora_alpha": None}, "lora_alpha = None in its"),
        ({"r": 16, "lora_alpha": 16}, "its tensors have rank 2, its .* gives r 16: they are of two LoRAs"),
        ({"r": 2, "lora_alpha": 4}, r"to_q.alpha is 1, a scale of 0\.5; its .* gives 2: take away what"),
        ([1], "is no JSON object but list"),
    ],
)  # fmt: skip
def test_settings_of_another_lora(
    config: object, text: str, plain: Tensors, tmp_path: Path, sd_folder: Path
) -> None:
    """An adapter_config.json is of every LoRA in its folder; where it cannot be, it is said."""
    file = tmp_path / "own.safetensors"
    save_file(plain | {f"{FIRST}.alpha": torch.tensor(1.0)}, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    raises_in_both(file, sd_folder, text)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1}))
    assert read_lora(str(file))[1] == 0.5
    (tmp_path / "adapter_config.json").unlink()
    save_file(plain, file, metadata={"lora_adapter_metadata": "[1]"})
    with pytest.raises(InputError, match="lora_adapter_metadata is no JSON object but list"):
        read_lora(str(file))


@pytest.mark.parametrize(
    "key",
    ["sd_model_hash", "text_encoder.a.lora_linear_layer.up.weight"],
)
def test_a_strange_key_among_kohyas(key: str, tmp_path: Path, sd_folder: Path) -> None:
    """It is named, and the others are not called unfit."""
    tensors = kohya(fresh(), "lora_unet", PROJECTIONS, 1)
    save_file(tensors | {key: torch.ones(1)}, tmp_path / "own.safetensors")
    text = rf"holds {len(tensors)} keys in kohya's names .* and 1 in others; the fewer are {re.escape(key)}"
    raises_in_both(tmp_path / "own.safetensors", sd_folder, text)


def test_embeddings_beside_a_lora(
    tmp_path: Path, sd_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trigger words that Civitai's tools put into the file are left out with a word; the LoRA is merged."""
    tensors = kohya(fresh(), "lora_unet", PROJECTIONS, 1)
    plain, bundled = tmp_path / "plain.safetensors", tmp_path / "bundled.safetensors"
    save_file(tensors, plain)
    save_file(tensors | {"bundle_emb.cat.string_to_param.*": torch.ones(1)}, bundled)
    source = resolve(str(sd_folder))
    check_loadable(source, [str(bundled)])
    one, two = (
        load_denoiser(source, lora=str(file)).unet.state_dict() for file in (plain, bundled)
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert "trigger words are left out: cat" in caplog.text


@pytest.mark.parametrize("found", [torch.ones(2), {"state_dict": None}, {1: torch.ones(2)}])
def test_a_pickle_of_something_else(found: object, tmp_path: Path) -> None:
    torch.save(found, tmp_path / "own.pt")
    with pytest.raises(InputError, match=r"own\.pt (holds .*no tensors by name, but|has 1 where)"):
        read_lora(str(tmp_path / "own.pt"))


def test_alpha_inside_the_file(expected: Tensors) -> None:
    """'<module>.alpha' scales by alpha / r: alpha = r changes nothing, alpha = 0 merges nothing."""
    tensors = named("unet.", "lora.down", "lora.up")
    alphas = {f"unet.{name}.alpha": torch.tensor(float(RANK)) for name in adapters()}
    unet = fresh()
    assert merge_lora(unet, tensors | alphas) == len(tensors) + len(alphas)
    assert_merged(unet, expected)
    unet = fresh()
    merge_lora(unet, tensors | {name: torch.tensor(0.0) for name in alphas})
    before = fresh().state_dict()
    assert all(torch.equal(value, before[k]) for k, value in unet.state_dict().items())


def test_which_scale_counts() -> None:
    """The stated one, then alpha / r of the file for the modules that have it, then 1."""
    before, pairs = fresh(), adapters()
    name, other = list(pairs)[:2]
    tensors: Tensors = {}
    for module in (name, other):
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = pairs[module]
    tensors[f"{name}.alpha"] = torch.tensor(6.0)
    for stated, scales in ((None, (6 / RANK, 1.0)), (0.5, (0.5, 0.5))):
        unet = fresh()
        assert merge_lora(unet, tensors, stated) == 5
        for module, scale in zip((name, other), scales, strict=True):
            down, up = pairs[module]
            expected = before.get_submodule(module).weight + scale * up @ down
            torch.testing.assert_close(unet.get_submodule(module).weight, expected)


def test_convolution() -> None:
    """down [r, in, k, k] then up [out, r, 1, 1] is one convolution with the merged weight."""
    generator = torch.Generator().manual_seed(3)
    unet = fresh()
    before = unet.conv_in.weight.clone()
    down = torch.randn(RANK, 4, 3, 3, generator=generator)
    up = torch.randn(32, RANK, 1, 1, generator=generator)
    merge_lora(unet, {"unet.conv_in.lora.down.weight": down, "unet.conv_in.lora.up.weight": up})
    image = torch.randn(1, 4, 8, 8, generator=generator)
    conv = torch.nn.functional.conv2d
    low_rank = conv(conv(image, down, padding=1), up)
    expected = conv(image, before, unet.conv_in.bias, padding=1) + low_rank
    torch.testing.assert_close(unet.conv_in(image), expected, atol=1e-4, rtol=1e-4)


def wrong_block(tensors: Tensors) -> Tensors:
    return {k.replace("down_blocks.0", "down_blocks.7"): v for k, v in tensors.items()}


def wrong_width(tensors: Tensors) -> Tensors:
    return {k: torch.zeros(v.shape[0], 99) if ".down." in k else v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (wrong_block, "down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"),
        (wrong_width, "attn1.to_q"),
        (lambda tensors: {k: v for k, v in tensors.items() if "to_k_lora.up" not in k}, "to_k"),
        (lambda tensors: tensors | {"lora_te_text_model.alpha2": torch.ones(1)}, "lora_te_text"),
        (lambda tensors: tensors | {"conv_in.alpha": torch.ones(())}, "1 of 65 keys, such as conv"),
        (lambda _: {}, "no LoRA tensor at all"),
    ],
    ids=["unknown module", "wrong width", "half a pair", "unknown key", "stray alpha", "empty"],
)
def test_keys_that_do_not_fit(change: object, text: str) -> None:
    """The message names them; no weight changes, not even of modules that would fit."""
    unet = fresh()
    with pytest.raises(InputError, match="do not fit this U-Net") as raised:
        merge_lora(unet, change(processor_layout()))
    assert text in str(raised.value)
    before = fresh().state_dict()
    assert all(torch.equal(value, before[k]) for k, value in unet.state_dict().items())


@pytest.mark.parametrize("key", ["use_dora", "rank_pattern", "alpha_pattern"])
def test_other_kinds_of_adapter_are_refused(tmp_path: Path, key: str) -> None:
    """Merging them as plain LoRA would be silently wrong."""
    save_file(
        named("base_model.model.", "lora_A", "lora_B"), tmp_path / "adapter_model.safetensors"
    )
    settings = {"r": RANK, "lora_alpha": 4, key: {"to_q": 8}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"{key} = .* is not supported"):
        read_lora(str(tmp_path))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a file nor a folder") as raised:
        lora_file(str(tmp_path / "none"))
    assert str(tmp_path / "none") in str(raised.value)
    assert "pytorch_lora_weights.safetensors" in str(raised.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    """A download that broke off, or an HTML page in its place."""
    file = tmp_path / name
    if name.endswith(".bin"):
        torch.save(processor_layout(), file)
    else:
        save_file(processor_layout(), file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>not found</html>"):
        file.write_bytes(content)
        with pytest.raises(InputError, match=name):
            read_lora(str(file))


def test_loading_a_model_with_lora(tmp_path: Path, sd_folder: Path) -> None:
    """load_denoiser merges into the U-Net and the digest tells two LoRA files apart."""
    for strength, name in ((1.0, "a"), (2.0, "b")):
        tensors = {k: strength * v for k, v in processor_layout().items()}
        torch.save(tensors, tmp_path / f"{name}.bin")
    source = resolve(str(sd_folder))
    plain = load_denoiser(source).unet.state_dict()
    tuned = load_denoiser(source, lora=str(tmp_path / "a.bin")).unet.state_dict()
    name, (down, up) = next(iter(adapters().items()))
    torch.testing.assert_close(tuned[f"{name}.weight"], plain[f"{name}.weight"] + up @ down)
    assert lora_digest(str(tmp_path / "a.bin")) != lora_digest(str(tmp_path / "b.bin"))


@pytest.fixture(scope="module")
def sd21_unet() -> UNet2DConditionModel:
    """Stable Diffusion 2.1's U-Net in bf16 without initialisation: pages that are not written to
    take no memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
            layers_per_block=2,
        )
    unet = unet.to(torch.bfloat16).to_empty(device="cpu")
    for name, value in unet.named_parameters():
        if ".attn" in name:
            torch.nn.init.zeros_(value)
    return unet


def test_published_checkpoint(published: Path, sd21_unet: UNet2DConditionModel) -> None:
    """All 256 tensors of the authors' HardNeg LoRA find their place in SD 2.1."""
    file = published / "diffusionitm-hardneg-lora.bin"
    tensors, scale = read_lora(str(file))
    assert (len(tensors), scale) == (256, None)
    assert merge_lora(sd21_unet, tensors, scale) == 256
    changed = {
        name for name, value in sd21_unet.named_parameters() if ".attn" in name and value.any()
    }
    assert len(changed) == 128  # 16 blocks x attn1, attn2 x q, k, v, out
    weights = dict(sd21_unet.named_parameters())
    block = "mid_block.attentions.0.transformer_blocks.0.attn2"
    for ours, theirs in (("to_k", "to_k"), ("to_out.0", "to_out")):
        down, up = (
            tensors[f"{block}.processor.{theirs}_lora.{side}.weight"].float()
            for side in ("down", "up")
        )
        assert down.shape[0] == 4
        found = weights[f"{block}.{ours}.weight"]
        torch.testing.assert_close(found, (up @ down).to(torch.bfloat16))
