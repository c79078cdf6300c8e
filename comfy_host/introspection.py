"""What a loaded model consists of: its layers, their names, W0, and their hashes; ComfyUI's objects are only read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping

import comfy.lora
import comfy.model_patcher
import torch

from ..modular_lora.branches.layer_spec import LayerSpec, layer_spec, layer_specs
from ..modular_lora.branches.module_tree import modules_at, tree_identity
from ..modular_lora.errors import GuardError
from ..modular_lora.guard.build import ModelInfo
from ..modular_lora.tensor_hashing import weights_sha256
from .call_counts import parts, text_parts

_weights: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # loaded module -> sha256
_norms: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # loaded module -> norms of its weights, by key
_layouts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # loaded module -> its mark (tree), names, layers


def model_info(model, remembered: bool = False) -> ModelInfo:
    """Key map and layers of a MODEL (comfy.lora.model_lora_keys_unet); ``remembered``: _layout."""
    keys, specs = _layout(model.model, comfy.lora.model_lora_keys_unet, remembered)
    weight = lambda key: original_weight(model, key)  # noqa: E731
    varying = parts(model.model.diffusion_model, "diffusion_model")
    return ModelInfo(family(model), keys, specs, ("diffusion_model",), weight, varying, _norms_of(model.model, weight))


def clip_info(clip, remembered: bool = False) -> ModelInfo:
    """Key map, layers and evaluated parts of a CLIP (comfy.lora.model_lora_keys_clip)."""
    encoders = clip.cond_stage_model
    keys, specs = _layout(encoders, comfy.lora.model_lora_keys_clip, remembered)
    weight = lambda key: original_weight(clip.patcher, key)  # noqa: E731
    roots, varying = tuple(_text_roots(encoders)), text_parts(encoders)
    return ModelInfo(type(encoders).__name__, keys, specs, roots, weight, varying, _norms_of(encoders, weight))


def _norms_of(module: torch.nn.Module, weight: Callable[[str], torch.Tensor]) -> Callable[[str], float]:
    """The norm of W0 by key, read once while the model is loaded."""
    known = _norms.setdefault(module, {})

    def norm(key: str) -> float:
        if key not in known:
            known[key] = float(torch.linalg.vector_norm(weight(key)))
        return known[key]

    return norm


def _layout(module: torch.nn.Module, names: Callable, remembered: bool) -> tuple[dict, dict]:
    """(key map, specs); ``remembered``: as they were last, which the caller holds against the layers (is_current)."""
    mark, known = tree_identity(module), _layouts.get(module)
    if not remembered or known is None or known[0] is not mark:
        known = _layouts[module] = mark, names(module, {}), _specs(module)
    return known[1:]


def is_current(module: torch.nn.Module, specs: Iterable[LayerSpec]) -> bool:
    """Whether these layers are still what their specs say."""
    own = {spec.path: spec.own for spec in specs}
    return all(layer_spec(path, layer) == own[path] for path, layer in modules_at(module, own).items())


def _text_roots(encoders: torch.nn.Module) -> Iterator[str]:
    """What a prompt evaluates, each by itself: it may leave an encoder out (ByT5), or the part that sees images.

    SDClipModel calls its ``transformer``, and by ``preprocess_embed`` what the transformer holds beside its text
    ``model``; an encoder of another kind is taken to be called as a whole.
    """
    for name, encoder in encoders.named_children():
        transformer = getattr(encoder, "transformer", None)
        yield name if transformer is None else f"{name}.transformer"
        if transformer is not None and hasattr(transformer, "preprocess_embed"):
            yield from (f"{name}.transformer.{part}" for part, _ in transformer.named_children() if part != "model")


def original_weight(patcher, key: str) -> torch.Tensor:
    """W0 of one key as float32 on the CPU, dequantised; raises GuardError where a layer does not say how.

    ModelPatcher.backup and hook_backup hold what merged LoRAs replaced; get_key_weight gives a layer's own
    dequantisation.
    """
    current, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    held = patcher.backup.get(key)
    weight = held.weight if held else patcher.hook_backup.get(key, (current,))[0]
    weight = weight if convert is None else convert(weight, inplace=False)
    if hasattr(weight, "__tensor_flatten__"):  # torchao's
        weight = weight.dequantize()
    layer = patcher.model.get_submodule(key.rpartition(".")[0])
    if hasattr(layer, "get_weight") and not getattr(weight, "patches", None):  # ComfyUI-GGUF's layers (2.0.0)
        weight = layer.get_weight(weight, torch.float32)
    if not weight.is_floating_point():
        raise GuardError(
            f"{key} is stored as {weight.dtype}: a DoRA or OFT needs its value; leave that LoRA out.",
            code="layer.dtype",
        )
    return weight.detach().to("cpu", torch.float32)


def _specs(module: torch.nn.Module) -> dict:
    _refuse_fused_kernels(module)
    return layer_specs(module)


def _refuse_fused_kernels(module: torch.nn.Module) -> None:
    """GuardError for nunchaku's layers (by its package, 1.2): its kernels run past the forward of single layers."""
    for path, m in module.named_modules():
        if type(m).__module__.partition(".")[0] == "nunchaku":
            raise GuardError(
                f"Layer {path} is a {type(m).__name__} of nunchaku, whose kernels take no branch: load this model in "
                "fp16, bf16, fp8 or GGUF instead.",
                code="layer.nunchaku",
            )


def family(model) -> str:
    return type(model.model.model_config).__name__


def model_sha256(patcher) -> str:
    """SHA-256 of W0: contents as float32, merged LoRAs taken back out; remembered while the model is loaded."""
    module = patcher.model
    if module not in _weights:
        backup = {key: entry[0] for key, entry in patcher.hook_backup.items()}
        backup |= {key: entry.weight for key, entry in patcher.backup.items()}  # a hook's is of the merged weight
        _weights[module] = weights_sha256(_stored(module, backup))
    return _weights[module]


def _stored(module: torch.nn.Module, backup: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The contents of a model's weights, quantised ones as they are stored."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for key, weight in module.state_dict().items():
        if weight.is_meta and key not in parameters:
            continue
        weight = parameters[key] if weight.is_meta else weight  # ComfyUI-GGUF's layers say sizes only (2.0.0)
        yield from _parts(key, backup.get(key, weight))


def _parts(key: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor made of others (QuantizedTensor, torchao's) by its parts, any other by its own numbers."""
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _parts(f"{key}.{name}", getattr(weight, name))
    else:
        yield key, weight.detach().as_subclass(torch.Tensor)


def vae_sha256(vae) -> str:
    """SHA-256 of a VAE's weights; remembered while it is loaded (VAE.first_stage_model)."""
    module = vae.first_stage_model
    if module not in _weights:
        _weights[module] = weights_sha256(module.state_dict().items())
    return _weights[module]
