"""ComfyUI's loaded MODEL, CLIP and VAE as the model that a training loop works on (training/model.py).

ComfyUI runs nodes in inference mode, and 0.3.75 loads checkpoints in it, so weights are inference tensors that
autograd cannot save (0.33.0: plain ones). While it is open, every weight stands in its module as a plain tensor
over the same storage, which costs no memory; in another precision than the model was loaded in, as a copy, which
costs the network's size once. On leaving, the parameters themselves are put back, bit for bit what they were.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_sampling
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules import openaimodel
from torch import Tensor, nn

from ..modular_lora.branches.attachment import Attachment
from ..modular_lora.errors import GuardError
from ..modular_lora.guard.build import GuardLimits, ModelInfo, SafetyLora, check_coverage, on_each
from ..modular_lora.tensor_hashing import weights_sha256
from ..training import presets
from ..training.in_place import writing_allowed
from ..training.kohya import engine
from ..training.kohya.engine import Base
from ..training.model import Cond, Text
from ..training.options import Options, SafetyOptions
from ..training.stored import MAIN_MEMORY, Storage
from . import conditions, introspection, noising, patcher, text_encoder_files, untrainable
from .convolutions import small_as_products
from .fused import with_gradients
from .model_folders import BASE_FOLDERS, find_model
from .run import forget
from .tokens import literal

TEXT_ENCODERS = {  # family -> what its CLIP's tokenizer calls them (comfy/text_encoders/*.py)
    "SD15": frozenset({"l"}),
    "SD20": frozenset({"h"}),
    "SDXL": frozenset({"l", "g"}),
    "SSD1B": frozenset({"l", "g"}),
    "Segmind_Vega": frozenset({"l", "g"}),
    "SD3": frozenset({"l", "g", "t5xxl"}),
    "Flux": frozenset({"l", "t5xxl"}),
    "FluxSchnell": frozenset({"l", "t5xxl"}),
    "Lumina2": frozenset({"gemma2_2b"}),
}
TASK_NODE, SAFETY_NODE = "Train Task LoRA", "Train Safety LoRA"
_OWN = "connect the checkpoint loader's own"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
logger = logging.getLogger("modular_lora")
ENGINE = f"{patcher.PACK}, embedded"
ALL = 1e32  # bytes of a model to load, as ComfyUI says it
CHUNK = 75  # tokens between start and end token


class ComfyHostModel:
    """See training.model.HostModel; made by `opened`."""

    def __init__(self, model, clip, vae, dtype: torch.dtype, max_token_length: int):
        self._model, self._clip, self._vae = model.model, clip, vae
        self.infos = introspection.model_info(model), introspection.clip_info(clip)  # as of now: PEFT changes paths
        self._loaded = self._model.state_dict()  # as of now: they may be rounded for the training
        self._chunks = max_token_length // CHUNK
        self.family, self.dtype, self.device = introspection.family(model), dtype, model.load_device
        self.base_sha256, self.patches = introspection.model_sha256(model), len(model.patches)
        self.unet, self.text_encoder = self._model.diffusion_model, clip.cond_stage_model
        self.unet_names: Mapping[str, str] = unet_names(self.infos[0], self.family)
        self.text_names: Mapping[str, str] = text_names(self.infos[1])
        self.downscale = vae.spacial_compression_encode()
        self._reference_name = ""  # see ask_reference
        ratios = vae.downscale_ratio, vae.upscale_ratio  # of a VAE of video: (frames -> frames, height, width)
        self._times = tuple(ratio[0] for ratio in ratios) if all(isinstance(r, tuple) for r in ratios) else None
        self.notes: tuple[str, ...] = tuple(slow_notes(self.device, dtype))
        self._sigmas = self._model.model_sampling.sigmas.float().to(self.device)  # T, rising
        self.schedule = noising.schedule_of(self._model.model_sampling)
        self._in_chunks = {
            name for name, chunks in clip.tokenize("a " * 2 * CHUNK).items() if len(chunks) > 1
        }  # the streams of tokens that CLIP reads a piece at a time; other encoders take a text whole

    def weights(self) -> Mapping[str, Tensor]:
        """The base's weights by the guard's keys, as they were loaded, for the contamination check."""
        return self._loaded

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """See HostModel; LatentFormat says how many dimensions there are, and channels."""
        form = self._model.latent_format
        latent_frames = 1 if frames == 1 or self._times is None else self._times[0](frames)
        times = [latent_frames] * (getattr(form, "latent_dimensions", 2) - 2)
        return (form.latent_channels, *times, height // self.downscale, width // self.downscale)

    def frames_of(self, latent_frames: int) -> int:
        """See HostModel; the VAE says how many frames it makes of so many latent ones."""
        if getattr(self._model.latent_format, "latent_dimensions", 2) < 3 or untrainable.is_still(self.family):
            return 0
        if self._times is None:
            raise GuardError(
                f"The VAE takes still images alone, and a {self.family} clips: connect the VAE of the same model.",
                code="train.other-vae",
            )
        return self._times[1](latent_frames)

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See HostModel: BaseModel.apply_model with its model_sampling handing on x_t, and giving the raw output."""
        return self._said(x_t, t, cond, self._reference_name)

    def _said(self, x_t: Tensor, t: Tensor, cond: Cond, reference_name: str) -> Tensor:
        sigmas, order, found = self._sigmas[t], [], []
        for rows, known in conditions.batches(self._model, x_t, cond, self.downscale, reference_name):
            x, sigma = (x_t, sigmas) if len(rows) == len(t) else (x_t[rows], sigmas[rows])
            options = conditions.transformer_options(sigma)
            forget(self._model)  # what another adapter made of the same prompt
            found.append(self._model.apply_model(x, sigma, transformer_options=options, **known))
            order += rows
        return found[0] if len(found) == 1 else torch.cat(found)[torch.tensor(order, device=x_t.device).argsort()]

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Conditioning of prompts taken literally (no weights in brackets), each padded to one number of tokens."""
        return Cond(tuple(self._encode(prompt) for prompt in prompts))

    def _encode(self, prompt: str) -> Text:
        tokens, empty = (literal(self._clip, words) for words in (prompt, ""))
        for name in self._in_chunks & tokens.keys():
            tokens[name] = (tokens[name] + empty[name] * self._chunks)[: self._chunks]
        made = self._clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
        further = {name: part for name, part in made.items() if part is None or isinstance(part, Tensor)}
        del further["cond"]
        return Text(made["cond"], further)

    def autoencoder_identity(self) -> str:
        """See HostModel."""
        scale = repr(sorted((name, repr(v)) for name, v in vars(self._model.latent_format).items()))
        weights = weights_sha256(self._vae.first_stage_model.state_dict().items())
        return f"{self.family} {scale} {self._vae.vae_dtype} {weights}"

    def text_identity(self) -> str:
        """See HostModel."""
        weights = weights_sha256(self._clip.cond_stage_model.state_dict().items())
        return f"{self.family} {self._clip.layer_idx} {self._chunks} {self._clip.patcher.model_dtype()} {weights}"

    def too_long(self, prompt: str) -> bool:
        """Whether a prompt is cut off at max_token_length: of several encoders, by all."""
        tokens = literal(self._clip, prompt)
        return all(name in self._in_chunks and len(chunks) > self._chunks for name, chunks in tokens.items())

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents of images (b h w 3, 0..1) or clips (b t h w 3), in the model's scale.

        One at a time: a VAE of video takes a batch of images as the frames of a clip.
        """
        latents = torch.cat([self._vae.encode(one if one.dim() == 4 else one[None]) for one in images])
        *times, height, width = images.shape[1:-1]
        if latents.shape[1:] != (wanted := self.latent_shape(height, width, *times)):
            raise GuardError(
                f"The VAE makes latents of {tuple(latents.shape[1:])} of an image or clip, a {self.family} takes "
                f"{wanted}: connect the VAE of the same model.",
                code="train.other-vae",
            )
        return self._model.process_latent_in(latents).float().to(self.device)

    @torch.no_grad()
    def encode_reference(self, image: Tensor) -> Tensor:
        """See HostModel; the VAE's own scale is what ComfyUI's conditionings hold."""
        return self._vae.encode(image[None]).float()

    @torch.no_grad()
    def ask_reference(self, latent: Tensor) -> None:
        """See HostModel: the one of REFERENCE_NAMES under which an image changes what the network says."""
        x, t = torch.zeros_like(latent, device=self.device), torch.tensor([len(self._sigmas) // 2], device=self.device)
        row = self.encode([""]).rows[0]
        shown = replace(row, reference=torch.ones_like(x))
        without = self.predict(x, t, Cond((row,)))
        for name in conditions.REFERENCE_NAMES:
            if conditions.wants_mask(self._model, x, shown, self.downscale, name):
                continue
            if not torch.equal(without, self._said(x, t, Cond((shown,)), name)):
                self._reference_name = name
                return
        raise GuardError(
            f"reference_dir: a {self.family} takes no image beside the text, or one with a mask, which a data set does "
            "not have: leave reference_dir out, or train on an edit model.",
            code="train.no-reference",
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents; of a model of video the one frame."""
        images = self._vae.decode(self._model.process_latent_out(latents)).float().clamp(0, 1).cpu()
        return images[:, 0] if images.dim() == 5 else images

    def release(self, text: bool) -> None:
        """Let go of the VAE and, with ``text``, of the text encoder; what nobody else holds is freed."""
        self._vae = None
        if text:
            self._clip, self.text_encoder = None, nn.Identity()

    @contextmanager
    def attached(self, safety: Sequence[SafetyLora]) -> Iterator[None]:
        """The safety LoRAs as frozen forward branches on U-Net and text encoder, as the guard serves them."""
        parts = on_each(*self.infos, tuple(safety), (), GuardLimits())
        check_coverage(parts, True)
        with ExitStack() as stack:
            for module, part in zip((self._model, self.text_encoder), parts, strict=True):
                if part.branches.layers:
                    part.branches.to(self.device, self.dtype)
                    attachment = Attachment(module, part.branches)
                    stack.callback(attachment.detach)
                    attachment.attach()
            yield


def slow_notes(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """A line where half precision is asked of a CPU that has no instructions for it."""
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    supported = getattr(torch.ops.mkldnn, names.get(dtype, ""), None) if device.type == "cpu" else None
    if supported is not None and not supported():
        text = f"this CPU has no instructions for {dtype}, which makes a step many times slower: use mixed_precision no"
        logger.warning(text)
        yield f"WARNING: {text}"


@contextmanager
def opened(model, clip, vae, options: Options, train_text_encoder: bool = False) -> Iterator[ComfyHostModel]:
    """A host model on what ComfyUI has loaded; everything is put back on leaving, in reverse order.

    Raises GuardError for a guarded MODEL, one with a LoRA merged in (unless accepted), and families it cannot train.
    """
    _check(model, clip, _node(options), getattr(options, "allow_contaminated_base", False))
    untrainable.check(model)
    clip = _clip_skip(clip, options.clip_skip)
    if getattr(model, "is_dynamic", lambda: False)():
        model = model.clone(disable_dynamic=True)  # 0.33.0 on a GPU: weights that are only paged in
    dtype, device = DTYPES[options.mixed_precision], model.load_device
    with ExitStack() as stack:
        stack.callback(comfy.model_management.soft_empty_cache)
        others = [clip.patcher, vae.patcher]
        if options.fp8_base_unet or options.blocks_to_swap:
            stack.enter_context(_in_main_memory(model))
            comfy.model_management.load_models_gpu(others, force_full_load=True)
        else:
            comfy.model_management.load_models_gpu([model, *others], force_full_load=True)
        host_model = ComfyHostModel(model, clip, vae, dtype, options.max_token_length)
        text_device = clip.patcher.load_device
        del clip, vae, others  # held by the host model alone, which may let go of them
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for change in with_gradients():
            stack.enter_context(_attribute(*change))
        storage = Storage(host_model.unet, options, dtype, device)
        stack.enter_context(_plain_weights(host_model.unet, dtype, device, storage))
        host_model.notes += tuple(storage.lines())
        stack.enter_context(small_as_products(host_model.unet, device.type == "cpu" and dtype == torch.float32))
        if not isinstance(host_model.unet, openaimodel.UNetModel):  # Flux, LTX and others write into their activations
            stack.enter_context(writing_allowed())
        if train_text_encoder:
            stack.enter_context(_plain_weights(host_model.text_encoder, dtype, text_device))
            stack.enter_context(_cloned_norm_inputs(host_model.text_encoder))
        stack.enter_context(_attribute(model.model, "manual_cast_dtype", dtype))  # compute dtype
        stack.enter_context(_attribute(model.model, "model_sampling", noising.plain(model.model.model_sampling)))
        yield host_model


@contextmanager
def _in_main_memory(model) -> Iterator[None]:
    """A model whole in main memory alone, with what is merged into it, though it is computed with elsewhere."""
    comfy.model_management.unload_all_models()
    model.partially_load(MAIN_MEMORY, ALL)
    try:
        yield
    finally:
        model.detach()


def _node(options: Options) -> str:
    return SAFETY_NODE if isinstance(options, SafetyOptions) else TASK_NODE


def _clip_skip(clip, skip: int):
    """CLIP.clip_layer, counted as sd-scripts counts; 1 is the family's own layer."""
    if skip == 1:
        return clip
    encoders = (m for m in clip.cond_stage_model.modules() if isinstance(m, comfy.sd1_clip.SDClipModel))
    if skip > (most := min(encoder.num_layers for encoder in encoders)):  # ComfyUI then takes the last one
        raise GuardError(f"clip_skip: {skip} of {most} layers: give at most {most}.", code="train.clip-skip")
    clip = clip.clone()
    clip.clip_layer(-skip)
    return clip


def load_checkpoint(
    path: Path,
    vae: Path | None,
    mixed_precision: str | None,
    as_stored: bool = False,
    text_encoders: Sequence[Path] = (),
    clip_type: str = "",
    pictures: bool = True,
):
    """(MODEL, CLIP, VAE) of a checkpoint, or of a file for each part.

    Args:
        path: A checkpoint, or the diffusion model alone.
        vae: Its VAE, in place of the checkpoint's.
        mixed_precision: What the U-Net is trained in; None: ComfyUI's own choice.
        as_stored: The U-Net in the file's precision, whatever the others are.
        text_encoders: Files of the text encoders, in place of the checkpoint's; see text_encoder_files.load.
        clip_type: What these are for.
        pictures: Whether a VAE is needed; else it is None.
    """
    if not path.is_file():
        raise GuardError(f"{path}: is not a file: name a checkpoint (.safetensors).", code="train.no-checkpoint")
    options = {} if mixed_precision is None else {"dtype": DTYPES[mixed_precision]}
    weights, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(weights)
    checkpoint = comfy.model_detection.model_config_from_unet(weights, prefix, metadata=metadata) is not None
    if as_stored:
        options["dtype"] = comfy.utils.weight_dtype(weights, prefix if checkpoint else "")
    model, clip, own_vae = None, None, None
    if checkpoint:
        wanted = {"output_vae": pictures and vae is None, "output_clip": not text_encoders}
        found = comfy.sd.load_state_dict_guess_config(weights, **wanted, model_options=options, metadata=metadata)
        model, clip, own_vae = found[:3]
    else:
        model = comfy.sd.load_diffusion_model_state_dict(weights, model_options=options, metadata=metadata)
    if model is None:
        raise GuardError(f"{path.name}: is no model that ComfyUI knows: check the file.", code="train.unknown-model")
    if text_encoders:
        clip = text_encoder_files.load(text_encoders, clip_type, model)
    if clip is None:
        raise GuardError(
            f"{path.name}: has no text encoder: name its files with --text_encoder, or use a whole checkpoint (an "
            "audit takes no other).",
            code="train.no-text-encoder",
        )
    return model, clip, _vae(path, vae, own_vae) if pictures else None


def _vae(path: Path, file: Path | None, own):
    """The VAE of a file of its own, or the checkpoint's ``own``, which is empty where it has none."""
    if file is not None:
        weights, metadata = comfy.utils.load_torch_file(str(file), return_metadata=True)
        own = comfy.sd.VAE(sd=weights, metadata=metadata)
    if own is None or own.first_stage_model is None:
        raise GuardError(
            f"{(file or path).name}: has no VAE that ComfyUI knows: name its file with --vae, or use a whole "
            "checkpoint (an audit takes no other).",
            code="train.no-vae",
        )
    return own


def preset_group(model) -> str:
    """The group of families (training/presets) that a loaded MODEL is of."""
    flow = noising.schedule_of(model.model.model_sampling).prediction == "velocity"
    return presets.group(introspection.family(model), flow)


def kohya_base(model, clip, ckpt_name: str, options: Options, files: Mapping[str, str]) -> Base:
    """The loaded model as sd-scripts is to find it; its memory is given back first. Raises GuardError.

    ``files``: names of further files of the model, see kohya_arguments.Family.parts.
    """
    _check(model, clip, _node(options), getattr(options, "allow_contaminated_base", False))
    kinds = dict(engine.family(introspection.family(model)).parts)
    if not (path := find_model(ckpt_name, *BASE_FOLDERS)):
        raise GuardError(
            "The kohya engine reads the checkpoint's file by itself: choose it as ckpt_name.",
            code="kohya.no-checkpoint-name",
        )
    base = Base(
        path,
        introspection.family(model),
        introspection.model_sha256(model),
        isinstance(model.model.model_sampling, comfy.model_sampling.V_PREDICTION),
        str(Path(inspect.getfile(comfy.sd1_clip)).parent / engine.COMFYUI_TOKENIZER.name),
        {part: _part(part, kinds, name) for part, name in files.items()},
    )
    comfy.model_management.unload_all_models()
    return base


def _part(part: str, kinds: Mapping[str, str], name: str) -> str:
    """Path of a file of the model, in ComfyUI's folder of its kind alone."""
    if part not in kinds:
        raise GuardError(
            f"kohya_files: {part!r} is not a file of this family: {', '.join(kinds) or 'it takes none'}.",
            code="kohya.unknown-file",
        )
    if not (path := find_model(name, kinds[part])):
        raise GuardError(
            f"kohya_files: {part} {name!r} is not in ComfyUI's {kinds[part]} folder: put it there.",
            code="kohya.no-such-file",
        )
    return str(path)


def checkpoint_infos(path: Path, text_encoders: Sequence[Path], clip_type: str) -> tuple[ModelInfo, ModelInfo]:
    """Key maps and layers of a model's U-Net and text encoder; see load_checkpoint."""
    model, clip, _ = load_checkpoint(path, None, "no", False, text_encoders, clip_type, pictures=False)
    return introspection.model_info(model), introspection.clip_info(clip)


def _check(model, clip, node: str, accept_merged: bool) -> None:
    """GuardError for what no LoRA can be trained on, whichever engine trains it."""
    patcher._check_types(model, clip, node)
    if clip is None:
        raise GuardError(f"{node} got no CLIP: connect the checkpoint's CLIP.", code="train.no-clip")
    if isinstance(model, patcher.GuardMixin) or isinstance(clip, patcher.GuardedClipMixin):
        raise GuardError(
            "The MODEL or CLIP is guarded, and a LoRA is trained on W0 alone: connect the checkpoint loader's own; the "
            "trainer takes the safety LoRA by name and shows it in the previews.",
            code="train.guarded-model",
        )
    remedies = {"merged": _OWN, "beside": f"beside its own weights: {_OWN}"}
    if node == TASK_NODE:
        remedies["merged"] += ", or set allow_contaminated_base, which the file will say"
    patcher._check_incoming(model, accept_merged, "The MODEL", **remedies)
    patcher._check_incoming(clip.patcher, accept_merged, "The CLIP", **remedies)
    check_pair(model, clip, node)


def check_pair(model, clip, node: str) -> None:
    """GuardError where MODEL and CLIP are of two families, as far as TEXT_ENCODERS tells."""
    family, found = introspection.family(model), frozenset(clip.tokenize(""))
    if (wanted := TEXT_ENCODERS.get(family)) and found != wanted:
        raise GuardError(
            f"{node} got a {family} MODEL, whose text encoders are {_named(wanted)}, and a CLIP with {_named(found)}: "
            "connect the CLIP of the same checkpoint.",
            code="train.other-clip",
        )


def _named(encoders: frozenset[str]) -> str:
    return " and ".join(sorted(encoders))


@contextmanager
def _plain_weights(
    module: nn.Module, dtype: torch.dtype, device: torch.device, storage: Storage | None = None
) -> Iterator[None]:
    """Every tensor of a module as a plain one, over the same storage or, in another dtype or place, copied.

    What is no weight (frequencies of positions) loses no digits to a smaller dtype. ``storage``: which weights are to
    be stored otherwise.
    """
    kept: list[tuple[dict, str, Tensor]] = []
    try:
        for part in module.modules():
            places: tuple[dict[str, Any], ...] = part._parameters, part._buffers, part.__dict__
            for tensors in places:
                for name, value in tensors.items():
                    if not isinstance(value, Tensor):
                        continue
                    kept.append((tensors, name, value))
                    weight = tensors is part._parameters
                    stored = storage.of(part, name, value) if weight and storage is not None else None
                    wanted = dtype if weight else _whole(value.dtype, dtype)
                    tensors[name] = _plain(value, wanted, device) if stored is None else stored
        yield
    finally:
        for tensors, name, value in reversed(kept):
            tensors[name] = value


def _whole(own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The type in which values of ``own`` lose nothing that ``dtype`` could hold as well; float8 does not promote."""
    return dtype if own.itemsize == 1 else torch.promote_types(own, dtype)


@torch.no_grad()
def _plain(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    wanted = dtype if value.is_floating_point() else value.dtype
    if value.dtype == wanted and value.device == device:
        view = (value.untyped_storage(), value.storage_offset(), value.size(), value.stride())
        plain = torch.empty(0, dtype=wanted, device=device).set_(*view)
    else:
        plain = value.detach().to(device, wanted, copy=True)
    return nn.Parameter(plain, requires_grad=False) if isinstance(value, nn.Parameter) else plain


@contextmanager
def _cloned_norm_inputs(text_encoder: nn.Module) -> Iterator[None]:
    """CLIPLayer adds to its input in place, and the norm before still needs it going back: a copy."""
    norms = (m for m in text_encoder.modules() if isinstance(m, nn.LayerNorm))
    hooks = [norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].clone(),)) for norm in norms]
    try:
        yield
    finally:
        for hook in reversed(hooks):
            hook.remove()


@contextmanager
def _attribute(owner, name: str, value) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def unet_names(info: ModelInfo, family: str) -> dict[str, str]:
    """Path of each Linear and Conv2d in the network -> kohya's name.

    It is the model's own, with underscores (LDM's for SDXL, Black Forest Labs' for Flux), and diffusers' for SD1.x and
    SD2.x.
    """
    ldm = re.match("SD15|SD2", family) is None
    found = {}
    for name, key in info.key_map.items():
        if not name.startswith("lora_unet_") or not isinstance(key, str) or not _trainable(info, key):
            continue
        path = info.specs[key].path.removeprefix("diffusion_model.")
        if (name == f"lora_unet_{path.replace('.', '_')}") == ldm:
            found[path] = name
    return found


def text_names(info: ModelInfo) -> dict[str, str]:
    """Path of each Linear of the text encoders -> kohya's name, or ComfyUI's own where kohya has none (Qwen, Gemma).

    CLIP is lora_te_, or lora_te1_ and lora_te2_ beside another encoder; the highest number that ComfyUI knows for T5 is
    sd-scripts' (lora_te3_).
    """
    keys = {name: key for name, key in info.key_map.items() if isinstance(key, str) and "_projection" not in name}
    names = sorted(keys)
    alone = not any(name.startswith(("lora_te2_", "lora_te3_")) for name in names)
    found: dict[str, str] = {}
    for name in names:
        if not _trainable(info, keys[name]):
            continue
        path = info.specs[keys[name]].path
        if name == f"text_encoders.{path}":
            found.setdefault(path, name)
        elif name.startswith("lora_te_text_model_" if alone else ("lora_te1_", "lora_te2_", "lora_te3_")):
            found[path] = name
        elif name.startswith("lora_te1_") and "text_model" not in name:
            found[path] = name  # T5 or BERT alone
    return found


def _trainable(info: ModelInfo, key: str) -> bool:
    spec = info.specs.get(key)
    return (
        spec is not None
        and not spec.problem
        and len(spec.weight_shape) in (2, 4)
        and not (spec.conv and spec.conv.dense)
    )
