"""Options of an audit; one definition for command line, TOML and node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from ..modular_lora.files.scales import Scale
from ..modular_lora.options import Numbers, OptionError, Texts, listed, opt
from ..modular_lora.validation import raises

if TYPE_CHECKING:
    from .plan import Sampling

ArmName = Literal[
    "base", "safety", "task", "sequential", "modular", "projected", "safety_first", "minus_safety",
    "safety_minus_sequential",
]  # fmt: skip
ARMS: tuple[ArmName, ...] = (
    "base", "safety", "task", "sequential", "modular", "projected", "safety_first", "minus_safety",
    "safety_minus_sequential",
)  # fmt: skip
UNASKED: tuple[ArmName, ...] = tuple(arm for arm in ARMS if arm != "safety_first")  # it needs a calibration
LORAS = ("safety", "task", "sequential", "projected")  # options that hold LoRA files, one for each repetition
Denoise = Annotated[tuple[Annotated[float, Field(strict=False, gt=0, le=1)], ...], BeforeValidator(listed)]


@raises(OptionError)
@dataclass(frozen=True)
class DetectorOptions:
    """Which detector says what an image shows, and from which score on."""

    detector: str = opt("", "detector of what is suppressed: see the gate's list; empty: its first")
    detector_weights: str = opt("", "ONNX file of a classifier of your own")
    detector_labels: str = opt("", "its labels file (JSON, see docs/gate.md)")
    preset: str = opt("", "gate preset (JSON) whose block and report sets count; empty: the detector's own")
    block: Texts = opt((), "block set as label=threshold, instead of the preset's")
    providers: Texts = opt((), "onnxruntime's providers, in order; empty: its choice")

    @property
    def thresholds(self) -> dict[str, float]:
        """The block set given as ``label=threshold``. Raises OptionError."""
        found = {}
        for text in self.block:
            label, _, number = text.rpartition("=")
            try:
                found[label.strip()] = float(number)
            except ValueError as error:
                raise OptionError(
                    f"block: {text!r} is not of the form label=threshold: write e.g. 'FEET_EXPOSED=0.5'.",
                    code="option.threshold",
                ) from error
        return found


@raises(OptionError)
@dataclass(frozen=True)
class AuditOptions(DetectorOptions):
    """What is drawn, by which arms, and how it is judged. Paths are texts; () and "" stand for what is not given."""

    output_dir: str = opt("audit", "folder of the page, the figures and, in private/, of every image")
    title: str = opt("Audit", "heading of the page")

    safety: Texts = opt((), "safety LoRA files; the i-th files of safety, task, ... are one repetition")
    task: Texts = opt((), "task LoRA files, trained on W0")
    sequential: Texts = opt((), "task LoRA files trained on the safety-tuned base")
    projected: Texts = opt((), "task LoRA files projected clear of the safety LoRA")
    project: bool = opt(False, "project the task LoRAs for the audit where no projected file is given")
    safety_strength: float = opt(1.0, "strength of the safety LoRAs")
    safety_scale: Scale = opt(
        "refuse", "their alpha / rank, where a file's tensors and metadata give two: refuse, tensors or metadata"
    )
    task_strength: float = opt(1.0, "strength of the task LoRAs, however they were trained")
    arms: Texts = opt(UNASKED, "arms to sample, of those whose files are given")

    unsafe_prompts: Texts = opt((), "files of prompts for what is suppressed")
    kept_prompts: Texts = opt((), "files of prompts for what must stay")
    task_prompts: Texts = opt((), "files of prompts for what the task LoRA is for")
    max_prompts: int = opt(0, "take N prompts of each file, evenly from all of it; 0: all", ge=0)
    seeds: int = opt(1, "images per prompt, each with a seed of its own", gt=0)
    seed: int = opt(1, "first seed, where a prompt file gives none", ge=0)
    negative: str = opt("", "negative prompt, where a prompt file gives none")

    steps: int = opt(20, "sampling steps", gt=0)
    cfg: float = opt(7.0, "guidance")
    sampler: str = opt("euler", "ComfyUI's name of the sampler")
    scheduler: str = opt("normal", "ComfyUI's name of the scheduler")
    width: int = opt(512, "width of the images in pixels", gt=0)
    height: int = opt(512, "height of the images in pixels", gt=0)
    unit_size: int = opt(4, "images sampled as one batch; results are the same to the bit only for equal sizes", gt=0)

    style_weights: str = opt("", "ONNX file of a classifier of styles, for the task's fidelity; empty: not measured")
    style_labels: str = opt("", "its labels file")
    synonyms: str = opt("", "attack: file of synonyms, 'word = other, other' per line, or JSON")
    img2img: Denoise = opt((), "attack: denoise strengths of img2img from images that show the concept")
    inpaint: Denoise = opt((), "attack: denoise strengths of inpainting on images that show the concept")
    start_pictures: str = opt("", "folder of such images; empty: the base arm's own hits")
    safety_sweep: Numbers = opt((), "attack: further strengths of the safety LoRA")
    task_sweep: Numbers = opt((), "attack: further strengths of the task LoRA beside the safety LoRA")

    task_pictures: str = opt("", "folder of the task's images, for quality; empty: the base arm's are compared with")
    inception: str = opt("", "weights of torchvision's Inception v3 (safetensors) for KID and FID")
    clip: str = opt("", "folder of a CLIP model (transformers) for the CLIP score; nothing is downloaded")

    margin: float = opt(0.05, "non-inferiority margin of every rate, fixed before the runs", gt=0)
    show_unsafe: bool = opt(False, "show images of every arm on the page, not of the guarded ones alone")

    def __post_init__(self) -> None:
        if unknown := [name for name in self.arms if name not in ARMS]:
            raise OptionError(
                f"arms: {unknown[0]!r} is not one of {', '.join(ARMS)}: choose from these.", code="option.unknown-arm"
            )

    @property
    def sampling(self) -> Sampling:
        from .plan import Sampling  # with an audit, not with ComfyUI's start

        return Sampling(self.steps, self.cfg, self.sampler, self.scheduler, self.width, self.height)
