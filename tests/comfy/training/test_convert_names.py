"""Converted files in the real ComfyUI: every layer goes where the changed weight is, in each model's own names."""

from __future__ import annotations

import pytest
import torch
from modular_lora_guard.training.convert.convert import convert
from modular_lora_guard.training.convert.difference import ConvertOptions
from modular_lora_guard.training.convert.names import Blocks
from safetensors.torch import save_file
from support.encoder_toys import ENCODERS, toy_clip
from support.families import make
from support.families_dit import DITS
from support.families_image import IMAGE

FAMILIES = {family.name: family for family in (*IMAGE, *DITS)}


def applied(comfy, lora, info):
    """A file as a safety LoRA on a model: whole, or an error."""
    return comfy.host_guard.apply("safety", lora, tuple(lora.layers), 1.0, "", info)


def changed(weights: dict, names) -> dict[str, torch.Tensor]:
    """The weights with a change of rank 1 in some."""
    generator = torch.Generator().manual_seed(8)
    found = {}
    for name, weight in weights.items():
        weight = weight.detach().float().clone()
        if name in names:
            out, width = weight.shape[0], weight[0].numel()
            up, down = torch.randn(out, 1, generator=generator), torch.randn(1, width, generator=generator)
            weight += (0.002 * up @ down).reshape(weight.shape)
        found[name] = weight
    return found


@pytest.mark.parametrize("family", ["SD1.x", "SD2.x", "SDXL"])
def test_an_erased_u_net_under_diffusers_names_acts_where_it_was_changed(family, comfy, tmp_path):
    """Against ComfyUI's own table of diffusers' names (comfy.utils.unet_to_diffusers)."""
    from comfy.utils import unet_to_diffusers

    model = make(FAMILIES[family])
    table = unet_to_diffusers(model.model.model_config.unet_config)
    state = {name.removeprefix("diffusion_model."): w for name, w in model.model.state_dict().items()}
    table = {theirs: ours for theirs, ours in table.items() if ours in state}
    blocks = Blocks.of(table)
    assert {name: blocks.compvis(name) for name in table} == table
    ends = (
        "attn2.to_k.weight",
        "attn2.to_v.weight",
        "conv1.weight",
        "conv_shortcut.weight",
        "upsamplers.0.conv.weight",
    )
    wanted = {name for name in table if name.endswith(ends)}
    weights = {theirs: state[ours].detach().float() for theirs, ours in table.items()}
    save_file({name: w.contiguous() for name, w in changed(weights, wanted).items()}, tmp_path / "unet.safetensors")
    base = {f"model.diffusion_model.{name}": w.detach().float().contiguous().clone() for name, w in state.items()}
    save_file({name: w for name, w in base.items() if w.numel()}, tmp_path / "base.safetensors")
    made = convert(tmp_path / "unet.safetensors", tmp_path / "base.safetensors", tmp_path / "lora.safetensors",
                   ConvertOptions())  # fmt: skip
    part = applied(comfy, made.lora, comfy.anatomy.model_info(model))
    assert {target.key for target in part.match.targets.values()} == {f"diffusion_model.{table[n]}" for n in wanted}
    assert not part.match.unmatched


@pytest.mark.parametrize("encoder", ["CLIP-L (SD1.x)", "CLIP-L and CLIP-G (SDXL)"])
def test_an_erased_text_encoder_acts_where_it_was_changed(encoder, comfy, tmp_path):
    clip = toy_clip(ENCODERS[encoder])
    state = {
        n: w for n, w in clip.cond_stage_model.state_dict().items() if n.startswith("clip_l.transformer.text_model")
    }
    weights = {name.removeprefix("clip_l.transformer."): w.detach().float().contiguous() for name, w in state.items()}
    wanted = {n for n in weights if n.endswith(("q_proj.weight", "mlp.fc1.weight"))}
    norm = next(name for name in weights if name.endswith("final_layer_norm.weight"))
    erased = changed(weights, wanted)
    erased[norm] = erased[norm] + 0.1
    for name, tensors in (("base", weights), ("erased", erased)):
        (tmp_path / name / "text_encoder").mkdir(parents=True)
        save_file(tensors, tmp_path / name / "text_encoder" / "model.safetensors")
    made = convert(tmp_path / "erased", tmp_path / "base", tmp_path / "lora.safetensors", ConvertOptions())
    part = applied(comfy, made.lora, comfy.anatomy.clip_info(clip))
    assert {target.key for target in part.match.targets.values()} == {
        f"clip_l.transformer.{n}" for n in (*wanted, norm)
    }


def test_sliders_for_flux_go_where_diffusers_names_go(comfy, tmp_path):
    """LECO's prefix before diffusers' names, which ComfyUI's map does not have."""
    info = comfy.anatomy.model_info(make(FAMILIES["Flux dev"]))
    known = [n for n in info.key_map if n.startswith(("transformer.transformer_blocks.", "transformer.single_tr"))]
    known = [name for name in known if ".attn.to_" in name or ".attn.add_" in name]
    assert len(known) > 8
    targets = []
    for number, name_of in enumerate((str, lambda n: f"lora_unet_{n.removeprefix('transformer.').replace('.', '_')}")):
        tensors = {}
        for name in known:
            key, offset = (
                info.key_map[name][:2] if isinstance(info.key_map[name], tuple) else (info.key_map[name], None)
            )
            out, width = info.specs[key].weight_shape
            out, width = (offset[2], width) if offset and offset[0] == 0 else (out, offset[2] if offset else width)
            tensors[f"{name_of(name)}.lora_down.weight"] = torch.ones(1, width)
            tensors[f"{name_of(name)}.lora_up.weight"] = torch.ones(out, 1)
        save_file(tensors, tmp_path / f"{number}.safetensors")
        part = applied(comfy, comfy.host_files.read_lora(tmp_path / f"{number}.safetensors"), info)
        assert not part.match.unmatched
        targets.append({(target.key, target.offset) for target in part.match.targets.values()})
    assert targets[0] == targets[1]
