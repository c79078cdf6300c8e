"""Options of Make Safety LoRA and Combine Safety LoRAs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....modular_lora.options import OptionError, Texts, opt
from ....modular_lora.validation import raises
from ...choices import SavePrecision
from .activity import CALIBRATE
from .everything_else import EverythingElse, chosen
from .null_space import THRESHOLD
from .rece import ROUNDS
from .words import PLACE, Tokens

Method = Literal["null-space", "alphaedit", "uce", "rece"]


@raises(OptionError)
@dataclass(frozen=True)
class MakeOptions:
    """A safety LoRA made of words, in closed form."""

    output_name: str = opt("safety", "file name of the LoRA, without ending")
    output_dir: str = opt("output", "folder of the LoRA")
    method: Method = opt(
        "null-space",
        "null-space (SPEED: what is kept does not change at all), alphaedit (the same, keeping the change small), uce "
        "(ridge regression), rece (uce, then what brings the concept back, round after round)",
    )
    concept: Texts = opt((), "prompts of the concept to erase")
    synonyms: Texts = opt((), "more prompts of the concept; what is not named is not erased")
    templates: Texts = opt((PLACE,), "sentences with {} for the concept, e.g. 'a photo of {}'")
    guide: Texts = opt(
        (), "what the concept is moved to: one prompt, or one for each of the concept's; none: no prompt"
    )
    preserve: Texts = opt((), "prompts that must stay as they are; the empty prompt and the guide always do")
    everything_else: EverythingElse = opt(
        "none", "a list of prompts to preserve as well: none, things, people, places, styles, all of them"
    )
    tokens: Tokens = opt(
        "all", "all (the words and what comes behind them), subject (the words), last (their last token, as UCE has it)"
    )
    layers: Texts = opt(
        (), "parts of layer names, e.g. to_v for values alone (SPEED's choice); empty: all that qualify"
    )
    ridge: float = opt(0.0, "weight against a large change; 0: 1 % of the concept's mean energy (uce, rece: 0.5)", ge=0)
    threshold: float = opt(
        THRESHOLD,
        "null-space: where the kept prompts leave the concept no room, directions that they use less than this are "
        "given "
        "up, and they change a little; 0: refuse instead",
        ge=0,
    )
    rounds: int = opt(ROUNDS, "rece: rounds of finding what brings the concept back", gt=0)
    network_dim: int = opt(
        0, "largest rank; beyond it the nearest change of this rank is taken; 0: what comes out, exactly", ge=0
    )
    save_precision: SavePrecision = opt("float", "type of the saved LoRA: fp16, bf16, float")
    calibrate: bool = opt(True, CALIBRATE)
    no_dataset_metadata: bool = opt(False, "leave the output's name out of the file's metadata")

    def __post_init__(self):
        if not self.concept or not all(text.strip() for text in (*self.concept, *self.synonyms)):
            raise OptionError(
                "concept: a prompt is missing or blank: name what is to be erased, e.g. 'a vehicle'.",
                code="option.no-concept",
            )
        if wrong := [text for text in self.templates if PLACE not in text]:
            raise OptionError(
                f"templates: {wrong[0]!r} has no {PLACE} for the concept: write 'a photo of {PLACE}'.",
                code="option.templates",
            )
        if not self.templates:
            raise OptionError(
                f"templates: none is given: leave the option out, or give {PLACE!r}.", code="option.templates"
            )
        if len(self.guide) not in (0, 1, len(self.erased)):
            raise OptionError(
                f"guide: {len(self.guide)} prompts for {len(self.erased)} of the concept: give one, or one for each.",
                code="option.guide",
            )
        if both := [text for text in self.kept if text in self.erased]:
            raise OptionError(
                f"Prompt {both[0]!r} is both erased and preserved: take it out of one of the lists.",
                code="option.both-lists",
            )

    @property
    def erased(self) -> tuple[str, ...]:
        """Concept and synonyms, each once."""
        return tuple(dict.fromkeys((*self.concept, *self.synonyms)))

    @property
    def guides(self) -> tuple[str, ...]:
        """The guide of every prompt of `erased`."""
        return self.guide if len(self.guide) > 1 else (self.guide or ("",)) * len(self.erased)

    @property
    def kept(self) -> tuple[str, ...]:
        """Prompts to preserve, those of the chosen list that do not name the concept included."""
        own = chosen(self.everything_else, self.erased)
        return tuple(dict.fromkeys((*(text for text in self.preserve if text.strip()), *own)))


@raises(OptionError)
@dataclass(frozen=True)
class CombineOptions:
    """Several safety LoRAs as one file, each on its own concept only."""

    output_name: str = opt("combined", "file name of the LoRA, without ending")
    output_dir: str = opt("output", "folder of the LoRA")
    preserve: Texts = opt((), "prompts that none of them is to change; the empty prompt is always one")
    everything_else: EverythingElse = opt(
        "none", "a list of prompts to preserve as well: none, things, people, places, styles, all of them"
    )
    tokens: Tokens = opt(
        "all", "all (the words and what comes behind them), subject (the words), last (their last token)"
    )
    ridge: float = opt(0.0, "weight against a large change; 0: 0.1 % of the concepts' mean energy", ge=0)
    save_precision: SavePrecision = opt("float", "type of the saved LoRA: fp16, bf16, float")
    calibrate: bool = opt(True, CALIBRATE)
    no_dataset_metadata: bool = opt(False, "leave the output's name out of the file's metadata")
