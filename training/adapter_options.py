"""Options of what is trained beside a layer, under the names that sd-scripts and LyCORIS use."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from ..modular_lora.options import OptionError, Texts, opt

Algo = Literal["lora", "loha", "lokr", "diag-oft"]


@dataclass(frozen=True)
class AdapterOptions:
    """What both trainings put beside the layers; checked as part of their options."""

    algo: Algo = opt(
        "lora", "what is trained beside a layer: lora (with target conv LoCon), loha, lokr, diag-oft (OFT)"
    )
    dora_wd: bool = opt(False, "DoRA: a length for every row of the changed weight as well; algo lora")
    conv_dim: int = opt(0, "rank of the convolutions larger than 1×1 that target conv trains; 0: network_dim", ge=0)
    conv_alpha: float = opt(0.0, "their alpha; 0: network_alpha", ge=0)
    factor: int = opt(0, "lokr: a size that the first factor is not to exceed; 0 (LyCORIS' -1): about the root", ge=0)
    decompose_both: bool = opt(False, "lokr: the first factor as a product as well")
    use_tucker: bool = opt(False, "loha: kernels of convolutions by themselves (Tucker form), so fewer numbers")
    network_reg_dims: Texts = opt(
        (), "PATTERN=RANK: the rank of layers whose whole name the regular expression matches; alpha stays"
    )
    network_reg_lrs: Texts = opt((), "PATTERN=RATE: their learning rate; the first pattern that matches counts")

    def __post_init__(self):
        if self.dora_wd and self.algo != "lora":
            raise OptionError(
                f"dora_wd: PEFT has DoRA for LoRA alone, not for {self.algo}: use algo lora, or leave it out.",
                code="option.adapter",
            )
        if self.use_tucker and self.algo != "loha":
            why = "ComfyUI leaves such layers of a LoKr out" if self.algo == "lokr" else f"PEFT has none of {self.algo}"
            raise OptionError(f"use_tucker: {why}: use algo loha, or leave it out.", code="option.adapter")
        pairs(self.network_reg_dims, "network_reg_dims", whole=True)
        pairs(self.network_reg_lrs, "network_reg_lrs")

    @property
    def is_lora(self) -> bool:
        """Whether a layer's change is s·B·A and nothing else."""
        return self.algo == "lora" and not self.dora_wd

    @property
    def adapter(self) -> str:
        """What errors call it."""
        return "dora_wd" if self.dora_wd else f"algo {self.algo}"


def pairs(texts: Texts, option: str, whole: bool = False) -> list[tuple[re.Pattern[str], float]]:
    """Regular expressions and their numbers, above 0, of PATTERN=NUMBER; OptionError for one that is none."""
    found = []
    for text in texts:
        pattern, equals, number = text.rpartition("=")
        try:
            value = float(int(number) if whole else float(number))
            if not equals or not pattern or not 0 < value < math.inf:
                raise ValueError(f"no PATTERN={'RANK' if whole else 'RATE'}, the number above 0")
            found.append((re.compile(pattern), value))
        except (ValueError, re.error) as error:
            raise OptionError(
                f"{option}: {text!r}: {error}: write e.g. '.*attn2.*=4', the pattern a regular expression.",
                code="option.pattern",
            ) from error
    return found
