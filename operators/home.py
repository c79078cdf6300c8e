"""What a person at home sets in one line, without a policy: safety LoRAs that guard every model, and how strictly.

The line stands in the environment variable MODULAR_LORA_GUARD or in the file guard.txt, where an operator's policy
would lie, which is asked first. It reads ``always: NAME`` or ``family: NAME``, NAME being a file of the folders of
safety LoRAs and LoRAs. Several names have commas between them, each with the family of models that it is made for:
``always: one.safetensors for SD15, two.safetensors for Flux``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..modular_lora.files.reader import ENDINGS
from .policy import Gate, Guard, Open, OperatorPolicy, PolicyError, Required, beginning, there

FILE = "guard.txt"
VARIABLE = "MODULAR_LORA_GUARD"
MOST_BYTES = 4096
MODES = ("always", "family")
NAMED = re.compile(rf"(.+(?:{'|'.join(map(re.escape, ENDINGS))}))(?:\s+for\s+(\w+))?", re.IGNORECASE)  # file, family
USE = 'write "always: NAME" or "family: NAME", NAME being a file of the safety_loras or loras folder'


@dataclass(frozen=True)
class Home:
    """The line.

    Attributes:
        mode: "always": every model is guarded, and all else stays as it is. "family": besides, there is no way past it
            in a graph, and a gate is in front of every image.
        loras: Name and model family ("": any) of each safety LoRA.
        where: The file or variable that says so, for sentences.
    """

    mode: str
    loras: tuple[tuple[str, str], ...]
    where: str

    @property
    def said(self) -> str:
        """What is in force, and who says so."""
        return f'"{self.mode}", from {self.where}'


def read(path: Path, variable: str) -> Home | None:
    """The line of the environment variable or, where that is empty, of the file; None where neither says anything.

    Raises PolicyError.
    """
    if variable.strip():
        return parse(variable, f"the environment variable {VARIABLE}")
    if not there(path):
        return None
    content = beginning(path, MOST_BYTES + 1)
    try:
        text = content.decode("utf-8-sig")
    except ValueError as error:
        raise PolicyError(f"{path}: is not text: {USE}.", code="policy.home") from error
    if len(content) > MOST_BYTES:
        _wrong(str(path), "is too long")
    return parse(text, str(path))


def parse(text: str, where: str) -> Home:
    """The one line of a text; blank lines and those that begin with # count as none. Raises PolicyError."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(lines) != 1:
        _wrong(where, f"has {len(lines)} lines that say something, and must have one")
    mode, colon, names = lines[0].partition(":")
    if not colon or mode.strip() not in MODES:
        _wrong(where, f"begins with neither {' nor '.join(f'{one}:' for one in MODES)}")
    found = [NAMED.fullmatch(one.strip()) for one in names.split(",")]
    loras = tuple((one[1], one[2] or "") for one in found if one)
    if len(loras) < len(found):
        _wrong(where, "names something that is no .safetensors file")
    return Home(mode.strip(), loras, where)


def _wrong(where: str, what: str) -> NoReturn:
    raise PolicyError(f"{where}: {what}: {USE}.", code="policy.home")


def policy(home: Home, sha256: Sequence[str], folder: Path) -> OperatorPolicy:
    """What the line asks for.

    Args:
        home: The line.
        sha256: Of each of its files.
        folder: Where the record goes: into a folder of it.
    """
    required = tuple(
        Required(sha256=one, file=name, family=family) if family else Required(sha256=one, file=name)
        for (name, family), one in zip(home.loras, sha256, strict=True)
    )
    family = home.mode == "family"
    digest = hashlib.sha256(repr((home, tuple(sha256))).encode()).hexdigest()
    everything = Open(guarded_as_model=True, audit=True, training=True, unattested=True)
    return OperatorPolicy(
        guard=Guard(required=required, attach="always"),
        open=Open() if family else everything,
        gate=Gate(required=family),
        folder=folder,
        home=folder,
        sha256=digest,
        state=digest,
        one_line=home.said,
    )
