"""What a guarded model does around a run besides counting it, and text that a guarded encoder writes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence

import comfy.utils
import torch

from ..modular_lora.errors import GuardError
from .bases import CLIP, ModelPatcher


class KeptMixin(ModelPatcher):
    """In front of a ModelPatcher's class: nothing that another run left enters a guarded one, nothing of it stays."""

    def pre_run(self):
        forget(self.model)
        super().pre_run()

    def cleanup(self):
        try:
            super().cleanup()
        finally:
            forget(self.model)
            unwatch(self.model)


def watch(model, check: Callable[[dict], object]) -> None:
    """Have ``check`` see every conditioning that the model is handed until the run's end.

    The guider's own and those that a node encodes on the way (PerpNeg): encode_model_conds calls the model's
    ``extra_conds`` with all entries of each.
    """
    extra_conds = model.extra_conds

    def checked(**entry):
        check(entry)
        return extra_conds(**entry)

    vars(checked)["former"] = vars(model).get("extra_conds")  # an object patch of another node
    model.extra_conds = checked


def unwatch(model) -> None:
    """Take the check off and put back what stood there."""
    while hasattr(checked := vars(model).get("extra_conds"), "former"):
        del model.extra_conds
        if checked.former is not None:
            model.extra_conds = checked.former


def forget(model) -> None:
    """Keys and values of a prompt, and features of its images (HiDreamO1Transformer.clear_kv_cache, 0.33.0)."""
    clear = getattr(getattr(model, "diffusion_model", None), "clear_kv_cache", None)
    if clear is not None:
        clear()


def streams(packed: torch.Tensor, *, latent_shapes: Sequence | None = None, **_) -> Iterator[torch.Tensor]:
    """Every latent of a batch; of several that are sampled as one (sound beside video), each by itself.

    ``latent_shapes``: what CFGGuider.sample hands on.
    """
    several = latent_shapes is not None and len(latent_shapes) > 1
    for batch in comfy.utils.unpack_latents(packed, latent_shapes) if several else (packed,):
        yield from batch


def given_out(model, x0: torch.Tensor, *, latent_shapes: Sequence | None = None, **_) -> Iterator[torch.Tensor]:
    """Latents of a step's x0 as they leave a sampler, those of several kinds by themselves (comfy.nested_tensor)."""
    if latent_shapes is not None and len(latent_shapes) > 1 and not x0.is_nested:
        import comfy.nested_tensor  # 0.33.0

        x0 = comfy.nested_tensor.NestedTensor(comfy.utils.unpack_latents(x0, latent_shapes))
    made = model.process_latent_out(x0)
    for batch in made.unbind() if made.is_nested else (made,):
        yield from batch


class GenerateMixin(CLIP):
    """In front of ComfyUI's CLIP: it writes text with the branches on (CLIP.generate, 0.33.0), unrecorded."""

    def load_model(self, *tokens):
        """0.33.0 reckons by the tokens how much memory they take; 0.3.75 is not told them."""
        told = inspect.signature(super().load_model).parameters
        return super().load_model(*(tokens if told else ()))

    def generate(self, tokens, *args, **kwargs):
        self.load_model(tokens)
        run = self.patcher.guard_begin()
        _, before = self.patcher.branches.counts()
        try:
            text = super().generate(tokens, *args, **kwargs)
        finally:
            run.discard()  # each token runs the layers, without an evaluation of what holds them
        self.patcher.guard_attachment.verify()
        check_even(self.patcher.branches, before)
        return text


def check_even(branches, before: dict[str, int]) -> None:
    """GuardError where a layer ran less often than others of its encoder, or none ran at all."""
    calls = {path: n - before[path] for path, n in branches.counts()[1].items() if path not in branches.varying}
    most = {branches.root_of(path): 0 for path in calls}
    for path, n in calls.items():
        most[branches.root_of(path)] = max(most[branches.root_of(path)], n)
    short = [path for path, n in calls.items() if n < most[branches.root_of(path)]]
    short += [path for path in branches.layers if path.endswith(".lm_head")]  # read as a weight, without its branch
    if short or not any(calls.values()):
        first = short[0] if short else next(iter(calls), "none")
        raise GuardError(
            f"The guard's branches did not all run while text was generated: {len(short) or len(calls)} of "
            f"{len(calls)} layers fell short, first {first}: generate with the unguarded CLIP, encode with this one.",
            code="run.short",
        )
