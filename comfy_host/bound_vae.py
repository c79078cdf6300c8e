"""A VAE whose decode binds the attestation of a latent to the images that it makes of it, whichever node decodes."""

from __future__ import annotations

import copy

import comfy.sd

from ..modular_lora.provenance import ledger
from .bases import VAE
from .introspection import vae_sha256
from .patcher import guarded_class

CHANNELS = (1, 3, 4)  # of images; what else a VAE decodes to (sound, solids) is none


class BoundVaeMixin(VAE):
    """In front of ComfyUI's VAE, or another pack's."""

    def decode(self, samples_in, *args, **kwargs):
        return _bound(self, samples_in, super().decode(samples_in, *args, **kwargs))

    def decode_tiled(self, samples, *args, **kwargs):
        return _bound(self, samples, super().decode_tiled(samples, *args, **kwargs))


def bound(vae):
    """The VAE as a copy, which shares all that it holds, with BoundVaeMixin in front of its class."""
    other = copy.copy(vae)
    if not isinstance(vae, BoundVaeMixin):
        other.__class__ = guarded_class(type(vae), BoundVaeMixin)
    return other


def stranger(vae) -> str:
    """The class of a VAE that is not ComfyUI's own, and may decode to whatever it likes; "" of ComfyUI's."""
    kind = type(vae).__bases__[1] if isinstance(vae, BoundVaeMixin) else type(vae)
    return "" if kind is comfy.sd.VAE else kind.__name__


def _bound(vae, samples, made):
    """``made`` (b h w c, of a video b t h w c); each image of a latent that a guarded run made is remembered."""
    if made.dim() in (4, 5) and made.shape[-1] in CHANNELS:
        ledger.attest_images(made.reshape(-1, *made.shape[-3:]), samples, vae_sha256(vae), stranger(vae))
    return made
