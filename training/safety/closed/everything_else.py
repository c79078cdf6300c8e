"""What people mean by "everything else": lists of everyday prompts that a safety LoRA may be asked to leave alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

EverythingElse = Literal["none", "things", "people", "places", "styles", "all"]
LISTS: dict[str, tuple[str, ...]] = {
    "things": (
        "a cat", "a dog", "a bird", "a horse", "a fish", "a flower", "a tree", "a house", "a chair", "a table",
        "a book", "a cup of coffee", "a pizza", "an apple", "a cake", "a bicycle", "a car", "a boat",
        "an airplane", "a guitar", "a clock", "a shoe", "a hat", "a ball", "a lamp", "a bottle", "a bridge",
        "a tower", "a computer", "a camera",
    ),
    "people": (
        "a man", "a woman", "a boy", "a girl", "a child", "a baby", "an old man", "an old woman", "a couple",
        "a family", "a crowd", "a face", "a portrait of a man", "a portrait of a woman", "a smiling person",
        "hands", "a doctor", "a nurse", "a teacher", "a cook", "a farmer", "a worker", "an athlete", "a swimmer",
        "a dancer", "a musician", "a person in a coat", "a person in a dress", "a person at the beach",
        "a person asleep",
    ),
    "places": (
        "a forest", "a mountain", "a beach", "a lake", "a river", "a city street", "a village", "a kitchen",
        "a bedroom", "a living room", "an office", "a school", "a hospital", "a church", "a castle", "a garden",
        "a park", "a farm", "a field of flowers", "a desert", "the night sky", "a sunset", "snow", "rain", "fog",
        "a train station", "an airport", "a market", "a restaurant", "a museum",
    ),
    "styles": (
        "a photo", "a painting", "an oil painting", "a watercolour", "a pencil sketch", "a drawing", "a cartoon",
        "an anime picture", "a comic", "a poster", "a logo", "an icon", "a 3D render", "pixel art", "a woodcut",
        "an etching", "a fresco", "a mosaic", "a black and white photo", "a macro photo", "an aerial photo",
        "a studio photo", "a portrait", "a landscape", "a still life", "an abstract picture", "impressionism",
        "cubism", "art nouveau", "minimalism",
    ),
}  # fmt: skip
LISTS["all"] = tuple(text for found in LISTS.values() for text in found)


def chosen(name: EverythingElse, erased: Iterable[str]) -> list[str]:
    """The prompts of the list of that name, without those that name what is to be erased."""
    return [] if name == "none" else others(LISTS[name], erased)


def others(listed: Iterable[str], erased: Iterable[str]) -> list[str]:
    """The prompts that name none of those to be erased."""
    names = [text.lower() for text in erased]
    return [text for text in listed if not any(_names(text.lower(), name) for name in names)]


def _names(text: str, name: str) -> bool:
    """Whether one of two texts has the words of the other, articles apart."""
    one, other = ({w for w in t.replace(",", " ").split() if w not in ("a", "an", "the")} for t in (text, name))
    return bool(one and other) and (one <= other or other <= one)
