"""The operator's policy: a TOML file outside every graph that says what this ComfyUI samples, shows and opens.

No policy file: today's behaviour, ``None``. A file that cannot be read, does not fit the schema or is not signed by the
trusted key that lies beside it: PolicyError, and whoever asked samples nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
import re
import stat
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictStr, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ..gate.settings import ACTIONS, Action
from ..modular_lora.errors import GuardError
from ..modular_lora.options import tomllib
from ..modular_lora.util.file_state import FileState
from ..modular_lora.validation import Place, Problem, dotted, problem
from . import lines

FILE = "policy.toml"
SIGNATURE = "policy.toml.sig"
TRUSTED = "keys/policy.pub"  # beside the policy: where it lies, a policy must be there and signed by it
MOST_BYTES = 1 << 20
LEAST_RECORD = 64 << 10  # bytes of a record file


class PolicyError(GuardError):
    """A policy that cannot be read, does not fit the schema or is not signed: nothing is sampled."""

    code = "policy"


def _text(value: str) -> str:
    if not value.strip() or any(ord(c) < 32 for c in value):
        raise ValueError("must be a text in quotes, on one line and not blank")
    return value


def _sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise ValueError("must be a SHA-256: 64 hexadecimal digits in quotes (sha256sum FILE prints it)")
    return value.lower()


T = TypeVar("T")
# Tables and lists come as TOML gives them, so the classes are not strict; the values in them are, each by its type.
CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)
Text = Annotated[StrictStr, AfterValidator(_text)]
Sha256 = Annotated[StrictStr, AfterValidator(_sha256)]
Strength = Annotated[float, Field(strict=True, ge=0, le=10)]
Attached = Annotated[float, Field(strict=True, gt=0, le=10)]
Threshold = Annotated[float, Field(strict=True, ge=0.001, le=1)]
Bytes = Annotated[int, Field(strict=True, ge=LEAST_RECORD)]
# Names that the operator chooses.
Named = Annotated[Mapping[str, T], AfterValidator(lambda names: MappingProxyType(names))]


def _named() -> Any:
    return field(default_factory=lambda: MappingProxyType({}))


def _must(description: str) -> Any:
    """A key that must be given, and what the error says where it is missing."""
    return field(metadata={"description": description})


@dataclass(frozen=True, config=CLOSED)
class Required:
    """A safety LoRA that every sampling must carry: this file, or any file that this key has signed."""

    sha256: Sha256 = ""
    signed_by: Text = ""  # a name in [keys]
    family: Text = ""  # of the models that it is made for, as attestations name it; "": all models
    file: Text = ""  # its name in the folders of safety LoRAs and LoRAs, for ``attach``
    strength: Attached = 1.0  # at which ``attach`` puts it beside the weights
    min_net_strength: Strength = 0.5
    min_acted_strength: Strength = 0.5
    min_functional_strength: Strength = 0.0  # 0: it need not be measured
    scale: Literal["", "tensors", "metadata"] = ""  # of a file that gives two; "": such a file is none

    def __post_init__(self):
        if bool(self.sha256) == bool(self.signed_by):
            raise ValueError("must have either sha256 or signed_by, one of the two")

    @property
    def name(self) -> str:
        """For sentences."""
        of = f" for {self.family}" if self.family else ""
        return (f"signed by {self.signed_by}" if self.signed_by else f"sha256 {self.sha256[:16]}") + of


@dataclass(frozen=True, config=CLOSED)
class Guard:
    """What every sampling must carry, who puts it there, and which warnings of the guard are errors.

    ``attach`` "always": every MODEL, CLIP and VAE that leaves a node is guarded with it, whatever the graph says.
    ``other_families``: what becomes of models of a family for which nothing is required.
    """

    required: tuple[Required, ...] = _must(
        "the safety LoRAs that every sampling must carry; [] leaves sampling unguarded"
    )
    attach: Literal["never", "always"] = "never"
    other_families: Literal["refuse", "gate"] = "refuse"
    combine: Literal["", "sum", "safety first"] = ""  # how every sampling must put its LoRAs together; "": either
    interference_is_error: StrictBool = False
    contamination_is_error: StrictBool = False

    def __post_init__(self):
        if self.attach == "always" and not self.required:
            raise ValueError('attach = "always" needs a safety LoRA under required')
        if self.attach == "never" and any(one.file or one.strength != 1 for one in self.required):
            raise ValueError('required.file and required.strength do something with attach = "always" alone')
        if self.attach == "never" and self.other_families == "gate":
            raise ValueError('other_families = "gate" needs attach = "always", which puts the gate there')

    def for_family(self, family: str) -> tuple[Required, ...]:
        """What models of a family must carry; nothing: they are of another family than all that is named."""
        return tuple(one for one in self.required if one.family in ("", family))

    @property
    def families(self) -> tuple[str, ...]:
        """Those that are named, each once."""
        return tuple(dict.fromkeys(one.family for one in self.required if one.family))


@dataclass(frozen=True, config=CLOSED)
class Base:
    """Diffusion models, text encoders and VAEs by their files' SHA-256. ``allow`` None: every one."""

    allow: tuple[Sha256, ...] | None = None


@dataclass(frozen=True, config=CLOSED)
class Tasks:
    """Task LoRAs by SHA-256. ``allow`` None: every one that ``deny`` does not name."""

    allow: tuple[Sha256, ...] | None = None
    deny: tuple[Sha256, ...] = ()


@dataclass(frozen=True, config=CLOSED)
class Open:
    """What is open although it samples or shows more than a guarded picture; all is closed that is not named."""

    guarded_as_model: StrictBool = False
    audit: StrictBool = False
    training: StrictBool = False
    unattested: StrictBool = False  # pictures that no guarded run made may be saved and shown


@dataclass(frozen=True, config=CLOSED)
class Gate:
    """``required``: no picture leaves that no gate judged. ``thresholds``: the highest that a graph may set.

    ``actions`` None: every one, but "report", which changes nothing, only where no gate is required.
    """

    required: StrictBool = False
    thresholds: Named[Threshold] = _named()
    actions: tuple[Action, ...] | None = None

    @property
    def allowed(self) -> tuple[Action, ...]:
        if self.actions is not None:
            return self.actions
        return tuple(action for action in ACTIONS if action != "report" or not self.required)


@dataclass(frozen=True, config=CLOSED)
class Nodes:
    """Node types of core and other packs. ``allow`` None: every one that ``deny`` does not name.

    A node that takes a MODEL is refused unless it is named: ``sampling`` may run on a guarded MODEL, ``patching`` may
    stand in front of Guard Model too (it changes or reads a MODEL and samples nothing).
    """

    allow: tuple[Text, ...] | None = None
    deny: tuple[Text, ...] = ()
    sampling: tuple[Text, ...] = ()
    patching: tuple[Text, ...] = ()
    showing: tuple[Text, ...] = ()  # write, show or send what they take, not more
    trusted: tuple[Text, ...] = ()  # may take anything; texts and sound of theirs pass


@dataclass(frozen=True, config=CLOSED)
class Record:
    """Where the record goes; ``folder`` "": beside the policy."""

    folder: Text = ""
    prompts: StrictBool = False
    activity: StrictBool = False  # of the safety LoRAs, in record and files: it tells what a prompt was about
    max_bytes: Bytes = 16 << 20
    signing_key: Text = ""  # private key, relative to the policy: signs attestations and the record's head


@dataclass(frozen=True, config=CLOSED)
class History:
    """How much of what the nodes answer stands in ``/history``, which ComfyUI shows to everybody who asks for it."""

    verdict: Literal["full", "brief", "none"] = "full"


@dataclass(frozen=True, config=CLOSED)
class Credentials:
    """Content Credentials (C2PA) in the images that this pack's nodes save; neither key: none."""

    certificate: Text = ""  # PEM, the signer's first, relative to the policy
    key: Text = ""  # its private key

    def __post_init__(self):
        if bool(self.certificate) != bool(self.key):
            raise ValueError("must have certificate and key, both of them")


@dataclass(frozen=True, config=CLOSED)
class Tables:
    """The whole file."""

    guard: Guard = _must("a table [guard] with the key required")
    base: Base = field(default_factory=Base)
    tasks: Tasks = field(default_factory=Tasks)
    open: Open = field(default_factory=Open)
    gate: Gate = field(default_factory=Gate)
    nodes: Nodes = field(default_factory=Nodes)
    record: Record = field(default_factory=Record)
    history: History = field(default_factory=History)
    credentials: Credentials = field(default_factory=Credentials)
    keys: Named[Text] = _named()


@dataclasses.dataclass(frozen=True)
class OperatorPolicy(Tables):
    """What a file says, and where it comes from."""

    folder: Path = Path()  # of the file
    sha256: str = ""  # of the file's bytes
    state: str = ""  # changes with the file and with the keys that it names
    signed: bool = False  # by the trusted key beside it
    home: str = ""  # what a person at home has set, and where (home.py); "": it is an operator's policy

    @property
    def attaches(self) -> bool:
        """Whether every MODEL, CLIP and VAE is guarded as it leaves a node."""
        return self.guard.attach == "always"

    @property
    def gates_others(self) -> bool:
        """Whether images that no guarded run made leave where a gate let them pass."""
        return self.guard.other_families == "gate"

    @property
    def record_folder(self) -> Path:
        return self.folder / (self.record.folder or "record")

    @property
    def signing_key(self) -> Path | None:
        """Private key that signs attestations and the record's head; None: neither is signed."""
        return self.folder / self.record.signing_key if self.record.signing_key else None

    @property
    def credential_files(self) -> tuple[Path, Path] | None:
        """Certificate and private key of Content Credentials; None: images get none."""
        said = self.credentials
        return (self.folder / said.certificate, self.folder / said.key) if said.certificate else None

    def key_paths(self) -> dict[str, Path]:
        """Name -> public key file."""
        return {name: self.folder / path for name, path in self.keys.items()}


def named(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def load(path: Path) -> OperatorPolicy | None:
    """The policy in a file; None where there is none and no trusted key asks for one. Raises PolicyError."""
    trusted = path.parent / TRUSTED
    if not _there(path):
        if _there(trusted):
            raise PolicyError(
                f"{path.name} is not there, and {trusted} asks for one: put a signed policy there.",
                code="policy.missing",
            )
        return None
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise PolicyError(
            f"{path}: cannot be read ({error.strerror or error}): mend it.", code="policy.unreadable"
        ) from error
    if len(content) > MOST_BYTES:
        raise PolicyError(f"{path}: longer than {MOST_BYTES} bytes: a policy is a short text.", code="policy.too-long")
    sha256 = hashlib.sha256(content).hexdigest()
    if signed := _there(trusted):
        _check_signature(path, trusted, sha256)
    found = dataclasses.replace(parse(content, path), folder=path.parent, sha256=sha256, signed=signed)
    return dataclasses.replace(found, state=hashlib.sha256(repr((sha256, *_key_stamps(found))).encode()).hexdigest())


def _key_stamps(policy: OperatorPolicy) -> tuple[FileState | None, ...]:
    return tuple(_stamp(path) for path in policy.key_paths().values())


def parse(content: bytes, path: Path) -> OperatorPolicy:
    """The policy in a file's bytes; ``path`` is for errors, which name line and key. Raises PolicyError."""
    try:
        text = content.decode("utf-8-sig")
        said = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not UTF-8, no TOML, or more digits than Python reads
        raise PolicyError(f"{path}: cannot be read as TOML: {error}: correct it.", code="policy.toml") from error
    try:
        found = TypeAdapter(Tables).validate_python(said)
        wrong = _without_key(found) or _without_effect(found)
    except ValidationError as error:
        wrong = problem(Tables, error)
    if wrong:
        raise PolicyError(f"{path}: line {lines.line_of(text, wrong.place)}, {wrong.text}", code=f"policy.{wrong.code}")
    return OperatorPolicy(**vars(found))


def _without_key(tables: Tables) -> Problem | None:
    """The first required safety LoRA that is signed by a key without a name."""
    for i, one in enumerate(tables.guard.required):
        if one.signed_by and one.signed_by not in tables.keys:
            place: Place = ("guard", "required", i, "signed_by")
            known = named(tables.keys)
            said = f"{dotted(place)} {one.signed_by!r} must be the name of a key in [keys]: {known}: correct it."
            return Problem(place, said)
    return None


def _without_effect(tables: Tables) -> Problem | None:
    """A gate for images that no guarded run made, where all of these may leave."""
    if tables.guard.other_families == "gate" and tables.open.unattested:
        place: Place = ("guard", "other_families")
        said = f'{dotted(place)} "gate" does nothing where open.unattested is true: take one of the two out.'
        return Problem(place, said)
    return None


def _check_signature(path: Path, trusted: Path, sha256: str) -> None:
    """PolicyError unless the trusted key signed what was read."""
    from ..modular_lora.provenance import signing  # asks for packages that a policy without signatures does not need

    try:
        signing.verify(path, {trusted.stem: trusted}, sha256=sha256)
    except GuardError as error:
        raise PolicyError(f"{path.name} is not accepted: {error}.", code="policy.signature") from error


def _there(path: Path) -> bool:
    """Whether anything lies there, a dangling link included. PolicyError where that cannot be told."""
    return _stamp(path) is not None


def _stamp(path: Path) -> FileState | None:
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            with suppress(FileNotFoundError):
                found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise PolicyError(
            f"{path}: cannot stat it ({error.strerror or error}): check the folder's permissions.",
            code="policy.unreadable",
        ) from error
    return FileState.of(found)


class Watched:
    """A policy file that is read again when it, its signature, a key or, as signatures expire, the day changes."""

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self._stamps: tuple | None = None
        self._found: OperatorPolicy | PolicyError | None = None

    def current(self) -> OperatorPolicy | None:
        """The policy in force; None where there is none. Raises PolicyError, every time that it is asked."""
        with self._lock:
            if self._stamps is None or self._stamp() != self._stamps:
                self._read()
            found = self._found
        if isinstance(found, PolicyError):
            raise PolicyError(str(found), code=found.code)
        return found

    def _read(self) -> None:
        before = self._files()  # first: what changes while it is read is read again
        try:
            self._found = load(self.path)
        except PolicyError as error:
            self._found = error
        self._stamps = (before, *self._rest())

    def _stamp(self) -> tuple:
        return (self._files(), *self._rest())

    def _files(self) -> tuple:
        return tuple(map(_stamp, (self.path, self.path.with_name(SIGNATURE), self.path.parent / TRUSTED)))

    def _rest(self) -> tuple:
        """Of keys and day, which count only where there is a policy."""
        if not isinstance(self._found, OperatorPolicy):
            return ()
        return _key_stamps(self._found), datetime.datetime.now(datetime.timezone.utc).date()
