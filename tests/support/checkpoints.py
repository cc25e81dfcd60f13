"""Single-file checkpoints as people have them: small models written in the key layouts of their authors.

Each function is the inverse of what diffusers' `from_single_file` does.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

UNET = "model.diffusion_model."
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MID = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_OPENCLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}
_EMBEDDERS = {
    "time_text_embed.timestep_embedder.linear_1": ("t_embedder.mlp.0", "time_in.in_layer"),
    "time_text_embed.timestep_embedder.linear_2": ("t_embedder.mlp.2", "time_in.out_layer"),
    "time_text_embed.text_embedder.linear_1": ("y_embedder.mlp.0", "vector_in.in_layer"),
    "time_text_embed.text_embedder.linear_2": ("y_embedder.mlp.2", "vector_in.out_layer"),
    "time_text_embed.guidance_embedder.linear_1": ("", "guidance_in.in_layer"),
    "time_text_embed.guidance_embedder.linear_2": ("", "guidance_in.out_layer"),
    "context_embedder": ("context_embedder", "txt_in"),
    "x_embedder": ("", "img_in"),
    "pos_embed.proj": ("x_embedder.proj", ""),
    "proj_out": ("final_layer.linear", "final_layer.linear"),
    "norm_out.linear": ("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.1"),
}
"""Diffusers' name, SD 3's and FLUX's."""
_SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_SD3_FUSED = {
    "attn.to_q": ("x_block.attn.qkv", "attn.to_k", "attn.to_v"),
    "attn.add_q_proj": ("context_block.attn.qkv", "attn.add_k_proj", "attn.add_v_proj"),
    "attn2.to_q": ("x_block.attn2.qkv", "attn2.to_k", "attn2.to_v"),
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_DOUBLE_FUSED = {
    "attn.to_q": ("img_attn.qkv", "attn.to_k", "attn.to_v"),
    "attn.add_q_proj": ("txt_attn.qkv", "attn.add_k_proj", "attn.add_v_proj"),
}
_FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
_FLUX_SINGLE_FUSED = {"attn.to_q": ("linear1", "attn.to_k", "attn.to_v", "proj_mlp")}


def part(folder: Path, role: str) -> Tensors:
    name = "model" if role.startswith("text_encoder") else "diffusion_pytorch_model"
    return load_file(folder / role / f"{name}.safetensors")


def write(tensors: Tensors, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    return file


def sd(folder: Path) -> Tensors:
    """Stable Diffusion 1.x: U-Net, VAE and CLIP."""
    text = {
        f"cond_stage_model.transformer.text_model.{_bare(name)}": v for name, v in part(folder, "text_encoder").items()
    }
    return {**ldm_unet(folder), **ldm_vae(folder), **text}


def sd2(folder: Path) -> Tensors:
    """Stable Diffusion 2.x: U-Net, VAE and OpenCLIP, whose projection nothing reads."""
    text = openclip(folder, "cond_stage_model.model.", "text_encoder")
    width = text["cond_stage_model.model.ln_final.weight"].shape[0]
    text["cond_stage_model.model.text_projection"] = torch.zeros(width, width, dtype=torch.float16)
    return {**ldm_unet(folder), **ldm_vae(folder), **text}


def sdxl(folder: Path) -> Tensors:
    """SDXL: U-Net, VAE, CLIP-L and OpenCLIP."""
    clip = part(folder, "text_encoder")
    text = {f"conditioner.embedders.0.transformer.text_model.{_bare(name)}": value for name, value in clip.items()}
    return {**ldm_unet(folder), **ldm_vae(folder), **text, **openclip(folder, "conditioner.embedders.1.model.")}


def sdxl_refiner(folder: Path) -> Tensors:
    """SDXL's refiner: U-Net, VAE and OpenCLIP."""
    return {**ldm_unet(folder), **ldm_vae(folder), **openclip(folder, "conditioner.embedders.0.model.")}


def sd3(folder: Path) -> Tensors:
    """SD 3's transformer, with Stability AI's prefix."""
    tensors = part(folder, "transformer")
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    # SD 3 has shift before scale in the last of these alone.
    swapped = ("norm_out.linear.", f"transformer_blocks.{layers - 1}.norm1_context.linear.")
    out: Tensors = {"pos_embed": tensors.pop("pos_embed.pos_embed")}
    for name, value in tensors.items():
        value = torch.cat(value.chunk(2)[::-1]) if name.startswith(swapped) else value
        out |= dict(_mmdit(name, value, tensors, 0))
    return {f"{UNET}{name}": value for name, value in out.items()}


def sd3_text(folder: Path) -> Tensors:
    """SD 3's text encoders, as they are put beside its transformer."""
    out: Tensors = {}
    for role, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        tensors = {_bare(key): value for key, value in part(folder, role).items()}
        out |= {
            f"text_encoders.{name}.transformer.{'' if key.startswith('text_projection') else 'text_model.'}{key}": value
            for key, value in tensors.items()
        }
    t5 = part(folder, "text_encoder_3")
    return out | {f"text_encoders.t5xxl.transformer.{key}": value for key, value in t5.items()}


def flux(folder: Path) -> Tensors:
    """FLUX.1's transformer, as Black Forest Labs have it."""
    tensors = part(folder, "transformer")
    out: Tensors = {}
    for name, value in tensors.items():
        value = torch.cat(value.chunk(2)[::-1]) if name.startswith("norm_out.linear.") else value
        out |= dict(_mmdit(name, value, tensors, 1))
    return out


def ldm_unet(folder: Path) -> Tensors:
    """LDM numbers the layers of all blocks through; a resampler follows its block's last layer."""
    unet = part(folder, "unet")
    per_block = json.loads((folder / "unet" / "config.json").read_text())["layers_per_block"]
    attended = {found[1] for name in unet if (found := re.match(r"up_blocks\.(\d)\.attentions", name))}
    return {f"{UNET}{_unet_key(name, per_block, attended)}": value for name, value in unet.items()}


def ldm_vae(folder: Path, prefix: str = "first_stage_model.") -> Tensors:
    blocks = len(json.loads((folder / "vae" / "config.json").read_text())["up_block_types"])
    vae = part(folder, "vae")
    # Its attention has convolutions of one pixel for matrices.
    squares = {name for name, value in vae.items() if "attentions" in name and value.ndim == 2}
    return {
        f"{prefix}{_vae_key(name, blocks)}": value[:, :, None, None] if name in squares else value
        for name, value in vae.items()
    }


def openclip(folder: Path, prefix: str, role: str = "text_encoder_2") -> Tensors:
    """open_clip has one matrix for queries, keys and values, and the projection transposed."""
    text = {_bare(name): value for name, value in part(folder, role).items()}
    out: Tensors = {}
    for name, value in text.items():
        if name == "text_projection.weight":
            out[f"{prefix}text_projection"] = value.T
            continue
        if re.search(r"self_attn\.[kv]_proj", name):
            continue
        if "q_proj" in name:
            value = torch.cat([text[name.replace("q_proj", f"{each}_proj")] for each in "qkv"])
            name = name.replace("q_proj.", "in_proj_")
        for ours, theirs in _OPENCLIP.items():
            name = name.replace(ours, theirs)
        out[f"{prefix}{name}"] = value
    return out


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")


def _unet_key(name: str, per_block: int, attended: set[str]) -> str:
    for ours, theirs in _TOP.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    if mid := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        return f"middle_block.{_MID[f'{mid[1]}.{mid[2]}']}.{_layer(mid[1], mid[3])}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)
    assert found is not None, name
    side, block, kind, index, rest = found.groups()
    number = int(block) * (per_block + 1) + int(index)
    if kind == "downsamplers":
        return f"input_blocks.{number + per_block + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{number + per_block}.{2 if block in attended else 1}.{rest}"
    place = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
    return f"{place}.{1 if kind == 'attentions' else 0}.{_layer(kind, rest)}"


def _layer(kind: str, rest: str) -> str:
    first, _, last = rest.partition(".")
    return f"{_RESNET[first]}.{last}" if kind == "resnets" else rest


def _vae_key(name: str, blocks: int) -> str:
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{blocks - 1 - int(found[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    for ours, theirs in (
        ("down_blocks", "down"),
        ("resnets", "block"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
        ("mid_block.attentions.0", "mid.attn_1"),
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
    ):
        name = name.replace(ours, theirs)
    return name


def _mmdit(name: str, value: torch.Tensor, tensors: Tensors, column: int) -> Iterator[tuple[str, torch.Tensor]]:
    """`column` is 0 for SD 3, 1 for FLUX. What is fused there is given by its first matrix, the others by none."""
    block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if block is None:
        layer, _, kind = name.rpartition(".")
        yield f"{_EMBEDDERS[layer][column]}.{kind}", value
        return
    single, number, layer, kind = block.groups()
    if column == 0:
        place, names, fused = "joint_blocks", _SD3_BLOCK, _SD3_FUSED
    elif single:
        place, names, fused = "single_blocks", _FLUX_SINGLE, _FLUX_SINGLE_FUSED
    else:
        place, names, fused = "double_blocks", _FLUX_DOUBLE, _FLUX_DOUBLE_FUSED
    if layer in fused:
        theirs, *rest = fused[layer]
        others = [tensors[f"{single or ''}transformer_blocks.{number}.{other}.{kind}"] for other in rest]
        yield f"{place}.{number}.{theirs}.{kind}", torch.cat([value, *others])
    elif layer in names:
        ending = "scale" if names[layer].endswith("_norm") else kind
        yield f"{place}.{number}.{names[layer]}.{ending}", value
