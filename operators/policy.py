"""The operator's policy: a TOML file outside every graph that says what this ComfyUI samples, shows and opens.

No policy file: today's behaviour, ``None``. A file that cannot be read, does not fit the schema or is not signed by the
trusted key that lies beside it: PolicyError, and whoever asked samples nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import ipaddress
import os
import re
import socket
import stat
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictStr, ValidationError

from ..gate.settings import ACTIONS, Action, Activity
from ..modular_lora.errors import GuardError
from ..modular_lora.options import tomllib
from ..modular_lora.util.file_state import FileState
from ..modular_lora.validation import Place, Problem, checks, dotted, problem
from . import lines

FILE = "policy.toml"
SIGNATURE = "policy.toml.sig"
TRUSTED = "keys/policy.pub"  # beside the policy: where it lies, a policy must be there and signed by it
MOST_BYTES = 1 << 20
LEAST_RECORD = 64 << 10  # bytes of a record file
WORKER = "{worker}"  # in the record's folder: this server's name
WORKER_VARIABLE = "MODULAR_LORA_WORKER"  # of the environment; without it the name is the machine's
VARIABLE = "env:"  # before the name of an environment variable that holds a secret
LEAST_SECRET, MOST_SECRET = 16, 4096  # bytes


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


def _header(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", value):
        raise ValueError("must be the name of an HTTP header: letters, digits and hyphens")
    return value


def _network(value: str) -> str:
    try:
        ipaddress.ip_network(value)
    except ValueError:
        raise ValueError("must be an address or a network, such as 10.0.0.2 or 10.1.0.0/16") from None
    return value


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        whole = False
    if not whole or "@" in value or not value.isascii() or any(c <= " " for c in value):
        raise ValueError("must be an address that begins with https:// or http://, without a name or password in it")
    return value


T = TypeVar("T")
Text = Annotated[StrictStr, AfterValidator(_text)]
Sha256 = Annotated[StrictStr, AfterValidator(_sha256)]
Strength = Annotated[float, Field(strict=True, ge=0, le=10)]
Attached = Annotated[float, Field(strict=True, gt=0, le=10)]
Threshold = Annotated[float, Field(strict=True, ge=0.001, le=1)]
Bytes = Annotated[int, Field(strict=True, ge=LEAST_RECORD)]
Seconds = Annotated[int, Field(strict=True, ge=1, le=86_400)]
Header = Annotated[StrictStr, AfterValidator(_header)]
Network = Annotated[StrictStr, AfterValidator(_network)]
Url = Annotated[StrictStr, AfterValidator(_url)]
# Names that the operator chooses.
Named = Annotated[Mapping[str, T], AfterValidator(lambda names: MappingProxyType(names))]


def _named() -> Any:
    return field(default_factory=lambda: MappingProxyType({}))


def _must(description: str) -> Any:
    """A key that must be given, and what the error says where it is missing."""
    return field(metadata={"description": description})


class Table:
    """A table of the file, in which no other key may stand.

    Tables and lists come as TOML gives them, so the classes are not strict; the values in them are, each by its type.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Required(Table):
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


@dataclass(frozen=True)
class Guard(Table):
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


@dataclass(frozen=True)
class Base(Table):
    """Diffusion models, text encoders and VAEs by their files' SHA-256. ``allow`` None: every one."""

    allow: tuple[Sha256, ...] | None = None


@dataclass(frozen=True)
class Tasks(Table):
    """Task LoRAs by SHA-256. ``allow`` None: every one that ``deny`` does not name."""

    allow: tuple[Sha256, ...] | None = None
    deny: tuple[Sha256, ...] = ()


@dataclass(frozen=True)
class Open(Table):
    """What is open although it samples or shows more than a guarded image; all is closed that is not named."""

    guarded_as_model: StrictBool = False
    audit: StrictBool = False
    training: StrictBool = False
    unattested: StrictBool = False  # images that no guarded run made may be saved and shown


@dataclass(frozen=True)
class Gate(Table):
    """``required``: no image leaves that no gate judged. ``thresholds``: the highest that a graph may set.

    ``confirm``: the same of a second detector, without which what the first flags passes; none may be used where it is
    empty and a gate is required or has thresholds. ``activity``: what a gate must do at least about an image
    whose prompt is about the concept of a safety LoRA. ``review_folder`` "": what a person should decide is not kept.
    ``actions`` None: every one, but "report", which changes nothing, only where no gate is required.
    """

    required: StrictBool = False
    thresholds: Named[Threshold] = _named()
    actions: tuple[Action, ...] | None = None
    confirm: Named[Threshold] = _named()
    activity: Activity = "ignore"
    review_folder: Text = ""

    @property
    def allowed(self) -> tuple[Action, ...]:
        if self.actions is not None:
            return self.actions
        return tuple(action for action in ACTIONS if action != "report" or not self.required)


@dataclass(frozen=True)
class Nodes(Table):
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


@dataclass(frozen=True)
class Record(Table):
    """Where the record goes; ``folder`` "": beside the policy."""

    folder: Text = ""
    prompts: StrictBool = False
    activity: StrictBool = False  # of the safety LoRAs, in record and files: it tells what a prompt was about
    max_bytes: Bytes = 16 << 20
    signing_key: Text = ""  # private key, relative to the policy: signs attestations and the record's head


@dataclass(frozen=True)
class History(Table):
    """How much of what the nodes answer stands in ``/history``, which ComfyUI shows to everybody who asks for it."""

    verdict: Literal["full", "brief", "none"] = "full"


@dataclass(frozen=True)
class Credentials(Table):
    """Content Credentials (C2PA) in the images that this pack's nodes save; neither key: none."""

    certificate: Text = ""  # PEM, the signer's first, relative to the policy
    key: Text = ""  # its private key

    def __post_init__(self):
        if bool(self.certificate) != bool(self.key):
            raise ValueError("must have certificate and key, both of them")


@dataclass(frozen=True)
class Monitor(Table):
    """What may be read over HTTP by those who have the token: counters, and whether the guard works.

    ``token`` "": nobody; see secret_text.
    """

    token: Text = ""
    ready_seconds: Seconds = 300  # how long the answer of a ready check is kept


@dataclass(frozen=True)
class Webhook(Table):
    """Where refusals are sent; ``secret`` signs them, see secret_text."""

    url: Url = ""
    secret: Text = ""

    def __post_init__(self):
        if bool(self.url) != bool(self.secret):
            raise ValueError("must have both url and secret: what is not signed could come from anybody")


@dataclass(frozen=True)
class Tenants(Table):
    """Whose prompt it is, as a reverse proxy says in a header; from any other address it says nothing.

    ``loras``: task LoRAs of each tenant, beside those that [tasks] allows to everybody.
    """

    header: Header = ""
    proxies: tuple[Network, ...] = ()
    loras: Named[tuple[Sha256, ...]] = _named()

    def __post_init__(self):
        if bool(self.header) != bool(self.proxies):
            raise ValueError("must have both header and proxies: anybody can send a header")
        if self.loras and not self.header:
            raise ValueError("must have header and proxies where it has loras")


@dataclass(frozen=True)
class Tables(Table):
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
    monitor: Monitor = field(default_factory=Monitor)
    webhook: Webhook = field(default_factory=Webhook)
    tenants: Tenants = field(default_factory=Tenants)
    keys: Named[Text] = _named()


@dataclass(frozen=True)
class OperatorPolicy(Tables):
    """What a file says, and where it comes from."""

    folder: Path = Path()  # of the file
    home: Path = Path()  # the server's own, which it can write to; that of the file unless the policy was mounted
    sha256: str = ""  # of the file's bytes
    state: str = ""  # changes with the file and with the keys that it names
    signed: bool = False  # by the trusted key beside it
    one_line: str = ""  # what a person at home has set, and where (home.py); "": it is an operator's policy
    tenant: str = ""  # whose prompt this is asked for; see for_tenant

    @property
    def attaches(self) -> bool:
        """Whether every MODEL, CLIP and VAE is guarded as it leaves a node."""
        return self.guard.attach == "always"

    @property
    def gates_others(self) -> bool:
        """Whether images that no guarded run made leave where a gate let them pass."""
        return self.guard.other_families == "gate"

    def for_tenant(self, name: str) -> OperatorPolicy:
        """The policy of one tenant's prompts: where [tenants] has LoRAs, those that it names are all they may use."""
        tasks = self.tasks
        if self.tenants.loras:
            tasks = dataclasses.replace(tasks, allow=(*(tasks.allow or ()), *self.tenants.loras.get(name, ())))
        return dataclasses.replace(self, tasks=tasks, tenant=name)

    def secret(self, said: str) -> bytes:
        """What a key of the policy names as its secret. Raises PolicyError."""
        return secret_text(said, self.folder)

    @property
    def record_folder(self) -> Path:
        return self.home / (self.record.folder or "record").replace(WORKER, worker())

    @property
    def review_folder(self) -> Path | None:
        """Where images are kept that a person should decide about; None: nowhere."""
        return self.home / self.gate.review_folder if self.gate.review_folder else None

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


def secret_text(said: str, folder: Path) -> bytes:
    """A token or secret: that of a file (relative to ``folder``) or, with ``env:NAME``, of a variable of the server's.

    White space around it is left out. Raises PolicyError where there is none, or one that could be guessed.
    """
    if said.startswith(VARIABLE):
        name = said.removeprefix(VARIABLE)
        content = os.environ.get(name, "").encode()
        what = f"environment variable {name}"
    else:
        what = str(folder / said)
        try:
            with (folder / said).open("rb") as file:
                content = file.read(MOST_SECRET + 1)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise PolicyError(f"{what}: the secret cannot be read ({why}): mend it.", code="policy.secret") from error
    content = content.strip()
    if not LEAST_SECRET <= len(content) <= MOST_SECRET:
        raise PolicyError(
            f"{what}: a secret of {len(content)} bytes: use {LEAST_SECRET} to {MOST_SECRET}, drawn at random.",
            code="policy.secret",
        )
    return content


def named(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def worker() -> str:
    """This server's name among several: of the environment or, without one, the machine's. Raises PolicyError."""
    found = os.environ.get(WORKER_VARIABLE) or socket.gethostname()
    if not re.fullmatch(r"(?!\.)[A-Za-z0-9._-]{1,64}", found):
        raise PolicyError(
            f"{WORKER_VARIABLE}: {found[:80]!r} cannot name a folder: use up to 64 letters, digits, dots and hyphens.",
            code="policy.worker",
        )
    return found


def load(path: Path, home: Path | None = None) -> OperatorPolicy | None:
    """The policy in a file; None where there is none and nothing asks for one.

    Args:
        path: The file.
        home: The server's own folder, where the file was mounted elsewhere: then there must be one.

    Raises:
        PolicyError: See the module.
    """
    trusted = path.parent / TRUSTED
    if not there(path):
        if home is not None or there(trusted):
            asks = "the server was started for one" if home is not None else f"{trusted} asks for one"
            raise PolicyError(
                f"{path.name} is not there, and {asks}: put a policy there, signed where there is a trusted key.",
                code="policy.missing",
            )
        return None
    content = beginning(path, MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise PolicyError(f"{path}: longer than {MOST_BYTES} bytes: a policy is a short text.", code="policy.too-long")
    sha256 = hashlib.sha256(content).hexdigest()
    if signed := there(trusted):
        _check_signature(path, trusted, sha256)
    return _taken(parse(content, path), path.parent, home or path.parent, sha256, signed)


def beginning(path: Path, most: int) -> bytes:
    """The first bytes of a file, at most so many. Raises PolicyError."""
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise PolicyError(
            f"{path}: cannot be read ({error.strerror or error}): mend it.", code="policy.unreadable"
        ) from error


def load_text(text: str, path: Path) -> OperatorPolicy:
    """The policy in a text that has no file; ``path``: its name for errors, in the folder of its keys.

    Raises PolicyError, also where a trusted key lies there: a text without a file has no signature.
    """
    if there(trusted := path.parent / TRUSTED):
        raise PolicyError(
            f"{path.name} is not accepted: {trusted} asks for a signed policy: put it into a file, with its signature.",
            code="policy.signature",
        )
    content = text.encode("utf-8", "surrogateescape")
    return _taken(parse(content, path), path.parent, path.parent, hashlib.sha256(content).hexdigest(), False)


def _taken(said: OperatorPolicy, folder: Path, home: Path, sha256: str, signed: bool) -> OperatorPolicy:
    found = dataclasses.replace(said, folder=folder, home=home, sha256=sha256, signed=signed)
    if WORKER in found.record.folder:
        worker()
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
        found = checks(Tables).validate_python(said)
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


def there(path: Path) -> bool:
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

    def __init__(self, path: Path, read: Callable[[Path], OperatorPolicy | None] = load):
        self.path, self._load, self._lock = path, read, threading.Lock()
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
            self._found = self._load(self.path)
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
