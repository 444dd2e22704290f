"""Tiny models of transformer families in diffusers' own layout, as its pipelines' tests build them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizerFast,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests import tiny
from tools.shapes.architecture import write_tokenizer

WIDTH = 32  # of texts
# As Qwen3's tokenizer has it, of messages that are texts.
CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}"
)
# As Mistral's processor has it, of a system's message and a user's.
MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set mark = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}"
    "{{ '[' + mark + ']' + message.content[0].text + '[/' + mark + ']' }}"
    "{% endfor %}"
)
LETTERS = [chr(code) for code in range(33, 127)]


def t5_tokenizer() -> Any:
    """Letters, each a token, with the marks of T5."""
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5TokenizerFast(vocab=[*marks, *((letter, -3.0) for letter in LETTERS)], extra_ids=0)


def t5(words: int) -> T5EncoderModel:
    settings = T5Config(
        vocab_size=words, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(settings)


def gemma_tokenizer() -> Any:
    """Letters, each a token, with the marks of Gemma."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = {word: i for i, word in enumerate([*marks, *bytes_, *LETTERS])}
    made = GemmaTokenizerFast(vocab=words, merges=[], add_bos_token=True)
    made.add_tokens([AddedToken("<bos>", special=True)])
    return made


def gemma(words: int) -> Gemma2Model:
    settings = Gemma2Config(
        vocab_size=words, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=4096,
        hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    return Gemma2Model(settings)


def qwen_tokenizer() -> Any:
    """Bytes, each a token, with the marks of Qwen."""
    made = Qwen2Tokenizer(
        vocab={byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]
    )
    made.add_tokens([AddedToken(f"<|im_{mark}|>", special=True) for mark in ("start", "end")])
    made.chat_template = CHAT
    return made


def qwen3(words: int, kind: Any = Qwen3Model, layers: int = 3) -> Any:
    settings = Qwen3Config(
        vocab_size=words, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return kind(settings)


def pixtral_processor() -> Any:
    """Bytes, each a token, with the marks of Mistral, beside the part that reads pictures."""
    marks = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]"]
    marks += ["[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    words = {word: i for i, word in enumerate([*marks, *sorted(ByteLevel.alphabet())])}
    plain = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    plain.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    plain.pre_tokenizer, plain.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", padding_side="left",
    )  # fmt: skip
    return PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=MISTRAL_CHAT)


def mistral3(words: int) -> Mistral3ForConditionalGeneration:
    text = {
        "model_type": "mistral", "vocab_size": words, "hidden_size": WIDTH, "head_dim": 16,
        "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 31,
        "num_key_value_heads": 1, "sliding_window": None,
    }  # fmt: skip
    sight = {
        "model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "image_size": 30,
        "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 6, "num_channels": 3,
    }  # fmt: skip
    settings = Mistral3Config(text_config=text, vision_config=sight, image_token_index=8)
    return Mistral3ForConditionalGeneration(settings)


def vae(channels: int = 4, shift: float | None = None) -> AutoencoderKL:
    """A VAE from 32 to 8 pixels a side."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.7,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def _lively(module: torch.nn.Module, factor: float = 1.0) -> None:
    """Give what begins as zeros values, so that every input changes the output, and matrices larger ones."""
    for value in module.parameters():
        if not value.any():
            torch.nn.init.normal_(value, std=0.1)
        if value.dim() == 2:
            value.data *= factor


def write_pixart(folder: Path, kind: Any = PixArtAlphaPipeline, sized: bool = False) -> Path:
    """Save a random PixArt; `sized` for one that takes the image's size."""
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=WIDTH, in_channels=4, cross_attention_dim=24, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        use_additional_conditions=sized,
    )  # fmt: skip
    _lively(transformer)
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    kind(
        tokenizer=tokenizer, text_encoder=t5(len(tokenizer)), vae=vae(), transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**betas),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_sd3(folder: Path, with_t5: bool = True) -> Path:
    """Save a random Stable Diffusion 3.5: its first block attends twice."""
    tokenizers = [write_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
    long = t5_tokenizer()
    clips = [CLIPTextModelWithProjection(tiny.text_config(tokenizer)) for tokenizer in tokenizers]
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=2 * WIDTH, caption_projection_dim=32,
        pooled_projection_dim=2 * tiny.POOLED, out_channels=16, pos_embed_max_size=16,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    _lively(transformer)
    settings = T5Config(
        vocab_size=len(long), d_model=2 * WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, 0.06),
        text_encoder=clips[0],
        text_encoder_2=clips[1],
        text_encoder_3=T5EncoderModel(settings) if with_t5 else None,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=long if with_t5 else None,
    ).save_pretrained(folder)
    return folder


def write_sd3_of_one_clip(folder: Path, taken: int = tiny.WIDTH, kind: Any = CLIPTextModel) -> Path:
    """Save a random SD3 with one CLIP and no T5, whose network takes texts so wide."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=taken, caption_projection_dim=32,
        pooled_projection_dim=taken, out_channels=4, pos_embed_max_size=4,
    )  # fmt: skip
    _lively(transformer)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=kind(tiny.text_config(tokenizer)),
        text_encoder_2=None,
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=None,
        tokenizer_3=None,
    ).save_pretrained(folder)
    return folder


def write_sana(folder: Path) -> Path:
    """Save a random Sana, with the published scheduler."""
    tokenizer = gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
        cross_attention_dim=8, caption_channels=WIDTH, sample_size=16, qk_norm=None,
    )  # fmt: skip
    _lively(transformer)
    blocks = {
        "attention_head_dim": 2,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "upsample_block_type": "interpolate",
        "downsample_block_type": "stride_conv",
        "decoder_act_fns": "silu",
    }
    SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma(len(tokenizer)),
        vae=AutoencoderDC(in_channels=3, latent_channels=4, scaling_factor=0.41407, **blocks),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ).save_pretrained(folder)
    return folder


def write_flux(folder: Path, guided: bool = True) -> Path:
    """Save a random FLUX.1, guided as dev, else as schnell; at 32 pixels, not at the published 1,024."""
    clip, long = write_tokenizer(folder / "tokenizer"), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=tiny.WIDTH,
        axes_dims_rope=(4, 4, 8), guidance_embeds=guided,
    )  # fmt: skip
    _lively(transformer)
    transformer.register_to_config(sample_size=8)
    shift = {"use_dynamic_shifting": True, "shift": 3.0} if guided else {"shift": 1.0}
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=vae(4, 0.1),
        text_encoder=CLIPTextModel(tiny.text_config(clip)),
        tokenizer=clip,
        text_encoder_2=t5(len(long)),
        tokenizer_2=long,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def write_qwen_image(folder: Path) -> Path:
    """Save a random Qwen-Image; at 32 pixels, not at the 1,024 that its pipeline takes."""
    tokenizer = qwen_tokenizer()
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=3, joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    _lively(transformer, 2.0)
    transformer.register_to_config(sample_size=8)
    rope = {"mrope_section": [2, 2, 4], "rope_type": "default", "rope_theta": 1e6}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_parameters": rope, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    sight = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": WIDTH,
    }  # fmt: skip
    encoder = Qwen2_5_VLConfig(text_config=text, vision_config=sight)
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1,
            temperal_downsample=[False, True], latents_mean=[-0.7, 0.1, 0.9, 0.0],
            latents_std=[2.8, 1.4, 0.6, 1.0],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(encoder),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_lumina2(folder: Path) -> Path:
    """Save a random Lumina-Image 2.0."""
    tokenizer = gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=16,
        axes_dim_rope=(4, 2, 2), axes_lens=(300, 32, 32), cap_feat_dim=WIDTH,
    )  # fmt: skip
    _lively(transformer, 2.0)
    Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(4, 0.06),
        text_encoder=gemma(len(tokenizer)),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder


def write_z_image(folder: Path) -> Path:
    """Save a random Z-Image; at 32 pixels, not at the 1,024 that its pipeline takes."""
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=WIDTH, axes_dims=(8, 4, 4), axes_lens=(1024, 32, 32),
    )  # fmt: skip
    _lively(transformer, 2.0)
    transformer.register_to_config(sample_size=8)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, 0.1),
        text_encoder=qwen3(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def write_flux2(folder: Path, guided: bool = True) -> Path:
    """Save a random FLUX.2, dev or klein; at 32 pixels, not at the 1,024 that its pipelines take."""
    tokenizer: Any = pixtral_processor() if guided else qwen_tokenizer()
    words = len(tokenizer.tokenizer if guided else tokenizer)
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=3 * WIDTH, axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=32, guidance_embeds=guided,
    )  # fmt: skip
    _lively(transformer, 2.0)
    transformer.register_to_config(sample_size=8)
    coder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=32,
    )  # fmt: skip
    torch.nn.init.normal_(coder.bn.running_mean)
    torch.nn.init.uniform_(coder.bn.running_var, 0.5, 2.0)
    (Flux2Pipeline if guided else Flux2KleinPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=coder,
        text_encoder=mistral3(words) if guided else qwen3(words, Qwen3ForCausalLM, 28),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


WRITERS: dict[str, Any] = {
    "PixArt-alpha": write_pixart,
    "PixArt-Sigma": lambda folder: write_pixart(folder, PixArtSigmaPipeline),
    "SD3": write_sd3,
    "SD3 without T5": lambda folder: write_sd3(folder, with_t5=False),
    "Sana": write_sana,
    "FLUX.1-dev": write_flux,
    "FLUX.1-schnell": lambda folder: write_flux(folder, guided=False),
    "Qwen-Image": write_qwen_image,
    "Lumina2": write_lumina2,
    "Z-Image": write_z_image,
    "FLUX.2-dev": write_flux2,
    "FLUX.2-klein": lambda folder: write_flux2(folder, guided=False),
}


def write(name: str, folder: Path) -> Path:
    """Save a tiny model of a family, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Path(WRITERS[name](folder))
