"""Which node types may take what leaves the server, where images leave only after they were judged.

Everything that writes, shows or sends (output nodes and ComfyUI's API nodes) and is not named here or by the policy
takes no image, latent, mask, sound or video. The names are those of ComfyUI's own types, as of the versions in
comfy_host/versions.py; one that a later version adds is refused until somebody has looked at what it does.
"""

from __future__ import annotations

from .policy import OperatorPolicy

SHOWING = frozenset((  # write, show or send what they are given, and nothing beside
    "LossGraphNode",
    "MaskPreview",
    "Preview3D",
    "PreviewAny",
    "PreviewAudio",
    "PreviewImage",
    "SaveAnimatedPNG",
    "SaveAnimatedWEBP",
    "SaveAudio",
    "SaveAudioMP3",
    "SaveAudioOpus",
    "SaveGLB",
    "SaveImage",
    "SaveImageDataSetToFolder",
    "SaveImageTextDataSetToFolder",
    "SaveImageWebsocket",
    "SaveLatent",
    "SaveSVGNode",
    "SaveTrainingDataset",
    "SaveVideo",
    "SaveWEBM",
))  # fmt: skip
SOURCES = frozenset(("EmptyAudio", "LoadAudio", "LoadVideo", "RecordAudio"))  # their sound is a file's, or silence
SOUND_EDITS = frozenset((  # sound of sound, and of nothing else
    "AudioAdjustVolume",
    "AudioConcat",
    "AudioMerge",
    "GetVideoComponents",
    "SplitAudioChannels",
    "TrimAudioDuration",
))  # fmt: skip
DECODERS = frozenset(("VAEDecodeAudio", "VAEDecodeHunyuan3D", "VoxelToMesh", "VoxelToMeshBasic"))  # of a run's latents
PLAIN = frozenset(("STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"))  # types that hold no tensor


def closed(policy: OperatorPolicy) -> bool:
    """Whether anything that leaves is judged."""
    return policy.gate.required or attested(policy)


def attested(policy: OperatorPolicy) -> bool:
    """Whether images leave only where a guarded run made them."""
    return bool(policy.guard.required) and not policy.open.unattested


def rule(policy: OperatorPolicy) -> str:
    """The policy's key for what may not leave for want of a judgement."""
    return "gate.required" if policy.gate.required else "open.unattested"


def may_show(names: frozenset[str], core: bool, policy: OperatorPolicy) -> bool:
    """Whether a node of these names is known to show what it is given and nothing beside; ``core``: it is ComfyUI's."""
    return bool((core and names & SHOWING) or names & set(policy.nodes.showing) or trusted(names, policy))


def trusted(names: frozenset[str], policy: OperatorPolicy) -> bool:
    """Whether the operator answers for a node, whatever it takes and gives."""
    return bool(names & set(policy.nodes.trusted))


def unknown_type(kind: str, input: str, type: str, policy: OperatorPolicy) -> tuple[str, str, str]:
    """(rule, reason, remedy) of a type that is not known to show what was judged and nothing beside."""
    what = f"{input} brings {type} to a node that writes, shows or sends, and nobody has said what {kind} does with it"
    return rule(policy), what, f"use Save Image (Guarded), or ask the operator to name {kind} under [nodes] showing"
