"""The operator's policy: a TOML file outside every graph that says what this ComfyUI samples, shows and opens.

No policy file: today's behaviour, ``None``. A file that cannot be read, does not fit the schema or is not signed by the
trusted key that lies beside it: PolicyError, and whoever asked samples nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import hashlib
import math
import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from ..gate.settings import ACTIONS
from ..modular_lora.errors import GuardError
from ..modular_lora.util.file_state import FileState
from . import lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "policy.toml"
SIGNATURE = "policy.toml.sig"
TRUSTED = "keys/policy.pub"  # beside the policy: where it lies, a policy must be there and signed by it
MOST_BYTES = 1 << 20
LEAST_RECORD = 64 << 10  # bytes of a record file

T = TypeVar("T")
Check = Callable[[Any], Any]


class PolicyError(GuardError):
    """A policy that cannot be read, does not fit the schema or is not signed: nothing is sampled."""


class _Wrong(ValueError):
    """What a value must be, and which key below the one that is checked holds it."""

    def __init__(self, what: str, *below: str | int):
        super().__init__(what)
        self.what, self.below = what, below


def _yes_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong("must be true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or any(ord(c) < 32 for c in value):
        raise _Wrong("must be a text in quotes, of one line, not empty")
    return value


def _sha256(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise _Wrong("must be a SHA-256: 64 hexadecimal digits in quotes (sha256sum FILE prints it)")
    return value.lower()


def _number(low: float, high: float) -> Check:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise _Wrong(f"must be a number from {low:g} to {high:g}")
        if not low <= value <= high:
            raise _Wrong(f"must be a number from {low:g} to {high:g}")
        return float(value)

    return check


def _bytes(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < LEAST_RECORD:
        raise _Wrong(f"must be a whole number of bytes, at least {LEAST_RECORD}")
    return value


def _one_of(*known: str) -> Check:
    def check(value: Any) -> str:
        if value not in known:
            raise _Wrong(f"must be one of {', '.join(known)}")
        return value

    return check


def _list(item: Check, what: str) -> Check:
    def check(value: Any) -> tuple:
        if not isinstance(value, list):
            raise _Wrong(f"must be a list of {what}, in [ ]")
        return tuple(_below(item, entry, i) for i, entry in enumerate(value))

    return check


def _map(item: Check, what: str) -> Check:
    def check(value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise _Wrong(f"must be a table: name = {what}")
        return MappingProxyType({key: _below(item, entry, key) for key, entry in value.items()})

    return check


def _below(check: Check, value: Any, *key: str | int) -> Any:
    try:
        return check(value)
    except _Wrong as error:
        raise _Wrong(error.what, *key, *error.below) from None


def _table(kind: type[T]) -> Check:
    """A table as a frozen dataclass; its fields say what is allowed. ``_Wrong`` for an unknown or missing key."""
    known = {f.name: f for f in dataclasses.fields(kind) if "check" in f.metadata}

    def check(value: Any) -> T:
        if not isinstance(value, dict):
            raise _Wrong(f"must be a table with the keys {', '.join(known)}")
        for key in value:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                maybe = f"; did you mean {near[0]}?" if near else ""
                raise _Wrong(f"is not known{maybe or ';'} known here: {', '.join(known)}", key)
        for name, one in known.items():
            if name not in value and one.default is one.default_factory is dataclasses.MISSING:
                raise _Wrong(one.metadata["missing"], name)
        values = {key: _below(known[key].metadata["check"], entry, key) for key, entry in value.items()}
        return kind(**values)  # its __post_init__ may raise _Wrong

    return check


def _key(check: Check, default: Any) -> Any:
    return field(default=default, metadata={"check": check})


def _named(check: Check, what: str) -> Any:
    """A table of names that the operator chooses; empty where it is absent."""
    return field(default_factory=lambda: MappingProxyType({}), metadata={"check": _map(check, what)})


@dataclass(frozen=True)
class Required:
    """A safety LoRA that every sampling must carry: this file, or any file that this key has signed."""

    sha256: str = _key(_sha256, "")
    signed_by: str = _key(_text, "")  # a name in [keys]
    min_net_strength: float = _key(_number(0.0, 10.0), 0.5)
    min_acted_strength: float = _key(_number(0.0, 10.0), 0.5)
    min_functional_strength: float = _key(_number(0.0, 10.0), 0.0)  # 0: it need not be measured
    scale: str = _key(_one_of("", "tensors", "metadata"), "")  # of a file that gives two; "": such a file is none

    def __post_init__(self):
        if bool(self.sha256) == bool(self.signed_by):
            raise _Wrong("must have either sha256 or signed_by, one of the two")

    @property
    def name(self) -> str:
        """For sentences."""
        return f"signed by {self.signed_by}" if self.signed_by else f"sha256 {self.sha256[:16]}"


@dataclass(frozen=True)
class Guard:
    """What every sampling must carry, and which warnings of the guard are errors."""

    required: tuple[Required, ...] = field(
        metadata={
            "check": _list(_table(Required), "tables {sha256 = ..., min_net_strength = ...}"),
            "missing": "is missing: the safety LoRAs that every sampling must carry; [] leaves sampling unguarded",
        }
    )
    interference_is_error: bool = _key(_yes_no, False)
    contamination_is_error: bool = _key(_yes_no, False)


@dataclass(frozen=True)
class Base:
    """Diffusion models, text encoders and VAEs by their files' SHA-256. ``allow`` None: every one."""

    allow: tuple[str, ...] | None = _key(_list(_sha256, "SHA-256 values"), None)


@dataclass(frozen=True)
class Tasks:
    """Task LoRAs by SHA-256. ``allow`` None: every one that ``deny`` does not name."""

    allow: tuple[str, ...] | None = _key(_list(_sha256, "SHA-256 values"), None)
    deny: tuple[str, ...] = _key(_list(_sha256, "SHA-256 values"), ())

    def refused(self, sha256: str) -> bool:
        return sha256 in self.deny or (self.allow is not None and sha256 not in self.allow)


@dataclass(frozen=True)
class Open:
    """What is open although it samples or shows more than a guarded picture; all is closed that is not named."""

    guarded_as_model: bool = _key(_yes_no, False)
    audit: bool = _key(_yes_no, False)
    training: bool = _key(_yes_no, False)
    unattested: bool = _key(_yes_no, False)  # pictures that no guarded run made may be saved and shown


@dataclass(frozen=True)
class Gate:
    """``required``: no picture leaves that no gate judged. ``thresholds``: the highest that a graph may set.

    ``actions`` None: every one, but "report", which changes nothing, only where no gate is required.
    """

    required: bool = _key(_yes_no, False)
    thresholds: Mapping[str, float] = _named(_number(0.001, 1.0), "threshold")
    actions: tuple[str, ...] | None = _key(_list(_one_of(*ACTIONS), "actions"), None)

    @property
    def allowed(self) -> tuple[str, ...]:
        if self.actions is not None:
            return self.actions
        return tuple(action for action in ACTIONS if action != "report" or not self.required)


@dataclass(frozen=True)
class Nodes:
    """Node types of core and other packs. ``allow`` None: every one that ``deny`` does not name.

    A node that takes a MODEL is refused unless it is named: ``sampling`` may run on a guarded MODEL, ``patching`` may
    stand in front of Guard Model too (it changes or reads a MODEL and samples nothing).
    """

    allow: tuple[str, ...] | None = _key(_list(_text, "node types"), None)
    deny: tuple[str, ...] = _key(_list(_text, "node types"), ())
    sampling: tuple[str, ...] = _key(_list(_text, "node types"), ())
    patching: tuple[str, ...] = _key(_list(_text, "node types"), ())
    showing: tuple[str, ...] = _key(_list(_text, "node types"), ())  # write, show or send what they take, not more
    trusted: tuple[str, ...] = _key(_list(_text, "node types"), ())  # may take anything; texts and sound of theirs pass


@dataclass(frozen=True)
class Record:
    """Where the record goes; ``folder`` "": beside the policy."""

    folder: str = _key(_text, "")
    prompts: bool = _key(_yes_no, False)
    max_bytes: int = _key(_bytes, 16 << 20)
    signing_key: str = _key(_text, "")  # private key, relative to the policy: signs attestations and the record's head


@dataclass(frozen=True)
class Policy:
    """The whole file."""

    guard: Guard = field(
        metadata={"check": _table(Guard), "missing": "is missing: a table [guard] with the key required"}
    )
    base: Base = _key(_table(Base), Base())
    tasks: Tasks = _key(_table(Tasks), Tasks())
    open: Open = _key(_table(Open), Open())
    gate: Gate = _key(_table(Gate), Gate())
    nodes: Nodes = _key(_table(Nodes), Nodes())
    record: Record = _key(_table(Record), Record())
    keys: Mapping[str, str] = _named(_text, "path of a public key, relative to the policy")
    folder: Path = Path()  # of the file
    sha256: str = ""  # of the file's bytes
    state: str = ""  # changes with the file and with the keys that it names
    signed: bool = False  # by the trusted key beside it

    def __post_init__(self):
        for i, one in enumerate(self.guard.required):
            if one.signed_by and one.signed_by not in self.keys:
                raise _Wrong(
                    f"must be the name of a key in [keys]: {named(self.keys)}", "guard", "required", i, "signed_by"
                )

    @property
    def record_folder(self) -> Path:
        return self.folder / (self.record.folder or "record")

    @property
    def signing_key(self) -> Path | None:
        """Private key that signs attestations and the record's head; None: neither is signed."""
        return self.folder / self.record.signing_key if self.record.signing_key else None

    def key_paths(self) -> dict[str, Path]:
        """Name -> public key file."""
        return {name: self.folder / path for name, path in self.keys.items()}


def named(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def load(path: Path) -> Policy | None:
    """The policy in a file; None where there is none and no trusted key asks for one. Raises PolicyError."""
    trusted = path.parent / TRUSTED
    if not _there(path):
        if _there(trusted):
            raise PolicyError(f"{path.name} is not there, and {trusted} asks for one: put a signed policy there.")
        return None
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read ({error.strerror or error}): mend it.") from error
    if len(content) > MOST_BYTES:
        raise PolicyError(f"{path}: longer than {MOST_BYTES} bytes: a policy is a short text.")
    sha256 = hashlib.sha256(content).hexdigest()
    if signed := _there(trusted):
        _check_signature(path, trusted, sha256)
    found = dataclasses.replace(parse(content, path), folder=path.parent, sha256=sha256, signed=signed)
    return dataclasses.replace(found, state=hashlib.sha256(repr((sha256, *_key_stamps(found))).encode()).hexdigest())


def _key_stamps(policy: Policy) -> tuple[FileState | None, ...]:
    return tuple(_stamp(path) for path in policy.key_paths().values())


def parse(content: bytes, path: Path) -> Policy:
    """The policy in a file's bytes; ``path`` is for errors, which name line and key. Raises PolicyError."""
    try:
        text = content.decode("utf-8-sig")
        said = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise PolicyError(f"{path}: cannot be read as TOML: {error}: correct it.") from error
    try:
        return _table(Policy)(said)
    except _Wrong as error:
        where = f"line {lines.line_of(text, error.below)}, {lines.dotted(error.below)}" if error.below else "line 1"
        raise PolicyError(f"{path}: {where} {error.what}: correct it.") from None


def _check_signature(path: Path, trusted: Path, sha256: str) -> None:
    """PolicyError unless the trusted key signed what was read."""
    from . import signing  # asks for packages that a policy without signatures does not need

    try:
        signing.verify(path, {trusted.stem: trusted}, sha256=sha256)
    except GuardError as error:
        raise PolicyError(f"{path.name} is not accepted: {error}.") from error


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
        raise PolicyError(f"{path}: cannot be looked at ({error.strerror or error}): mend its folder.") from error
    return FileState.of(found)


class Watched:
    """A policy file that is read again when it, its signature, a key or, as signatures expire, the day changes."""

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self._stamps: tuple | None = None
        self._found: Policy | PolicyError | None = None

    def current(self) -> Policy | None:
        """The policy in force; None where there is none. Raises PolicyError, every time that it is asked."""
        with self._lock:
            if self._stamps is None or self._stamp() != self._stamps:
                self._read()
            found = self._found
        if isinstance(found, PolicyError):
            raise PolicyError(str(found))
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
        if not isinstance(self._found, Policy):
            return ()
        return _key_stamps(self._found), datetime.datetime.now(datetime.timezone.utc).date()
