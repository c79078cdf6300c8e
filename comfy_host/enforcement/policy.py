"""The operator's policy where this pack's own nodes ask for it, and the record of what they did.

Every question begins with the policy in force; where there is none it costs a look at one file's state.
"""

from __future__ import annotations

import atexit
import contextvars
import datetime
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_execution.utils import get_executing_context

from ...gate.finding import Detector
from ...gate.gate import Outcome, Second
from ...gate.settings import Settings
from ...modular_lora.errors import GuardError, LoraFileError
from ...modular_lora.files.cache import kept_lora
from ...modular_lora.files.reader import sha256_file
from ...modular_lora.guard.build import CONTAMINATED_KEY, TRAINED_ON_KEY, Safety, Tasks
from ...modular_lora.provenance import keys, ledger, signing
from ...modular_lora.provenance.attestation import Attestation, GateRecord, LoraRecord
from ...modular_lora.provenance.record import Record
from ...modular_lora.util.cache import Cache
from ...modular_lora.util.file_state import find_file_state
from ...operators import home, rules
from ...operators import policy as policies
from ...operators.policy import OperatorPolicy, PolicyError
from ...operators.rules import RefusedError
from .. import patcher
from ..model_folders import SAFETY_FOLDERS

PROTECTED = "modular_lora"
UNREAD = "record_unread_policy"  # of refusals under a policy that was never readable: its key cannot sign their record
MOST = 4096  # of files and gates that are remembered
# Variables of the environment that say where the policy is, as the server was started: its file's path, or its text.
FILE_VARIABLE, TEXT_VARIABLE = "MODULAR_LORA_POLICY_FILE", "MODULAR_LORA_POLICY"
STARTED = {name: os.environ.get(name, "") for name in (FILE_VARIABLE, TEXT_VARIABLE)}
MOST_TENANTS = 1024  # whose policies are kept
MOST_WAITING = 1000  # lines that wait for the record; further ones are counted

log = logging.getLogger("modular_lora")


_watched: dict[Path, policies.Watched] = {}
_tenants: Cache[tuple[str, str], OperatorPolicy] = Cache(MOST_TENANTS)  # by the policy's state and the tenant
_records: dict[tuple, Record] = {}  # the one in use
_paths: Cache[str, Path] = Cache(MOST)  # SHA-256 of a LoRA -> its file
# file, SHA-256, key, states of file, signature and key, day -> why it does not hold, or ""
_signatures: Cache[tuple, str] = Cache(MOST)
_gates: Cache[tuple, bool] = Cache(MOST)  # detector, settings, state of the policy -> whether it accepts them
_waiting: deque[tuple[str, str, dict[str, Any]]] = deque()  # policy's SHA-256, kind and fields of lines to come
_beyond: Counter[str] = Counter()  # rules of refusals for which there was no room among them
_wake, _writer = threading.Event(), threading.Lock()
_writing: list[threading.Thread] = []
_lines: dict[tuple, home.Home | None] = {}  # variable, file, its state -> the line; the last
_homes: Cache[tuple, OperatorPolicy] = Cache(4)  # line, SHA-256 of its files -> what it asks for
execution: contextvars.ContextVar[str] = contextvars.ContextVar("modular_lora_execution", default="")  # server's own id
tenant: contextvars.ContextVar[str] = contextvars.ContextVar("modular_lora_tenant", default="")  # whose prompt this is
Listener = Callable[["OperatorPolicy | None", str, Mapping[str, Any]], None]
listeners: list[Listener] = []  # are told each line of the record: its policy, kind and fields; must not raise or wait
_last: list = []  # what the record last said of the policy
_lock = threading.RLock()


def folder() -> Path:
    """ComfyUI's protected folder for this pack, which HTTP does not reach."""
    own = getattr(folder_paths, "get_system_user_directory", None)
    return Path(own(PROTECTED)) if own else Path(folder_paths.get_user_directory()) / f"__{PROTECTED}"


def current() -> OperatorPolicy | None:
    """The policy in force for the tenant whose prompt runs; without one what a person at home has set, or None.

    Raises PolicyError where it cannot be told: sample nothing.
    """
    found = _watch().current()
    if found is None:
        return _at_home(folder())
    if not found.tenants.header:
        return found
    key = found.state, tenant.get()
    return _tenants.get(key) or _tenants.put(key, found.for_tenant(key[1]))


def _watch() -> policies.Watched:
    """Where the policy is: in the pack's folder, or where the server's environment says. Raises PolicyError."""
    place = folder()
    own, given = place / policies.FILE, [name for name, value in STARTED.items() if value]
    if len(given) + (bool(given) and os.path.lexists(own)) > 1:
        several = " and ".join([*given, str(own)] if os.path.lexists(own) else given)
        raise PolicyError(f"there is more than one policy: {several}: take away all but one.", code="policy.two")
    if not given:
        path, read = own, policies.load
    elif given == [FILE_VARIABLE]:
        path, read = Path(STARTED[FILE_VARIABLE]).absolute(), partial(policies.load, home=place)
    else:
        path, read = place / TEXT_VARIABLE, partial(policies.load_text, STARTED[TEXT_VARIABLE])
    return _watched.get(path) or _watched.setdefault(path, policies.Watched(path, read))


def _at_home(place: Path) -> OperatorPolicy | None:
    """What one line asks for, its files as they are now; see operators.home."""
    variable, file = os.environ.get(home.VARIABLE, ""), place / home.FILE
    asked = (variable, file, find_file_state(file))
    line = _lines[asked] if asked in _lines else home.read(file, variable)
    _lines.clear()
    _lines[asked] = line
    if line is None:
        return None
    sha256 = tuple(_sha256_at_home(line, name) for name, _ in line.loras)
    if (known := _homes.get((line, sha256))) is None:
        known = _homes.put((line, sha256), home.policy(line, sha256, place))
    return known


def _sha256_at_home(line: home.Home, name: str) -> str:
    """Of a safety LoRA by its name; found without ComfyUI's own search, which asks for the policy itself."""
    roots = (root for folder in SAFETY_FOLDERS for root in folder_paths.get_folder_paths(folder))
    paths = [path for root in roots if (path := Path(root, name)).is_file()]
    try:
        found = set(map(sha256_file, paths))
    except GuardError as error:
        raise PolicyError(f"{line.where}: {error}", code="policy.home") from error
    if len(found) != 1:
        several = "in several, with different contents: rename one" if found else "in none: put it there"
        said = f"{line.where}: {name} is looked for in the folders {' and '.join(SAFETY_FOLDERS)}, and is {several}."
        raise PolicyError(said, code="policy.home")
    return found.pop()


def check_open(key: str) -> None:
    """RefusedError where the policy does not open this (a key of [open])."""
    policy = current()
    if policy is not None and not getattr(policy.open, key):
        raise RefusedError(f"open.{key}", "the operator has not opened this node", "take the node out")


def records_activity() -> bool:
    """Whether files and record may tell of the safety LoRAs' activity (``record.activity``)."""
    policy = current()
    return policy is not None and policy.record.activity


def fingerprint() -> str:
    """Changes with the policy, so that what was built under another one is built again."""
    try:
        found = current()
    except PolicyError as error:
        return str(error)
    return f"{found.state} {found.tenant}" if found else ""


def unsigned(path: Path, sha256: str, key: str, policy: OperatorPolicy) -> str:
    """Why the signature of a LoRA file by a key of the policy does not hold; "" where it does."""
    public = policy.key_paths()[key]
    day = datetime.datetime.now(datetime.timezone.utc).date()
    asked = (str(path), sha256, key, *map(find_file_state, (path, signing.signature_path(path), public)), day)
    if (known := _signatures.get(asked)) is not None:
        return known
    try:
        signing.verify(path, {key: public}, sha256=sha256)
        return _signatures.put(asked, "")
    except GuardError as error:
        return _signatures.put(asked, str(error).rstrip("."))


def _unsigned_by(policy: OperatorPolicy) -> rules.Unsigned:
    def ask(lora: LoraRecord, key: str) -> str:
        path = _paths.get(lora.sha256)
        return unsigned(path, lora.sha256, key, policy) if path else f"the file of {lora.name} is not known"

    return ask


def known_file(sha256: str, path: Path) -> None:
    """Remember which file a LoRA is, for its signature."""
    _paths.put(sha256, path)


def values_sha256(path: Path) -> str:
    """SHA-256 of a LoRA file's tensors; "" where it cannot be read as one, which its loader says."""
    try:
        return kept_lora(path).values_sha256
    except LoraFileError:
        return ""


def _values(sha256: str) -> str:
    path = _paths.get(sha256)
    return values_sha256(path) if path else ""


def check_guarded(guarded: patcher.GuardedModel, clip, safety: Safety, tasks: Tasks) -> None:
    """RefusedError where a guard that was just built is not what the policy asks for, on U-Net or text encoder."""
    if current() is not None:
        check_attached(patcher.unwrap(guarded), clip, safety, tasks)


def check_attached(model: patcher.GuardMixin, clip, safety: Safety, tasks: Tasks = ()) -> None:
    """The same for a MODEL that is guarded."""
    if (policy := current()) is None:
        return
    for lora in (*(item.lora for item in safety), *(item.lora for item in tasks)):
        _paths.put(lora.sha256, lora.path)
    states = [model.guard_state]
    states += [clip.patcher.guard_state] if isinstance(clip, patcher.GuardedClipMixin) else []
    found = [(lora.sha256, result) for state in states for lora, result in state.part.interference]
    nets = {sha256: min(r.net_strength for key, r in found if key == sha256) for sha256, _ in found}
    check_run(policy, model.guard_record({}).of(net_strength=nets))
    if policy.guard.interference_is_error and (bad := next((w for _, r in found for w in r.warnings), None)):
        raise RefusedError("guard.interference_is_error", bad.partition(": ")[0], "use another task LoRA")
    if policy.guard.contamination_is_error:
        _check_contamination(tasks)


def check_built(state: patcher.GuardState, tasks: Tasks) -> None:
    """RefusedError where LoRAs that loaders put onto a guarded MODEL or CLIP are not what the policy takes."""
    if (policy := current()) is None:
        return
    for item in tasks:
        if not item.lora.pending:
            _paths.put(item.lora.sha256, item.lora.path)
    rules.check_tasks(policy, state.record, _values)
    found = (warning for _, result in state.part.interference for warning in result.warnings)
    if policy.guard.interference_is_error and (bad := next(found, None)):
        raise RefusedError("guard.interference_is_error", bad.partition(": ")[0], "use another task LoRA")
    if policy.guard.contamination_is_error:
        _check_contamination(tasks)


def _check_contamination(tasks: Tasks) -> None:
    for task in tasks:
        if said := next((s for k in (CONTAMINATED_KEY, TRAINED_ON_KEY) if (s := task.lora.metadata.get(k))), None):
            what = f"task LoRA {task.lora.name} says that it was trained on more than W0 ({said[:120]!r})"
            raise RefusedError("guard.contamination_is_error", what, "retrain it on W0")


def check_run(policy: OperatorPolicy, run: Attestation) -> None:
    """See rules.check_run."""
    rules.check_run(policy, run, _unsigned_by(policy), _values)


def check_image(policy: OperatorPolicy, image: torch.Tensor, attested: bool) -> None:
    """RefusedError for one image (h w c) that may not leave; see rules.check_image."""
    found = ledger.known(image)
    accepted = _is_accepted(policy, found.gate)
    rules.check_image(policy, found.run, found.gate, _unsigned_by(policy), accepted, attested, _values)


def lacks_gate(policy: OperatorPolicy, image: torch.Tensor) -> bool:
    """Whether an image (h w c) leaves only if a gate lets it pass, and none that the policy accepts has done so."""
    found = ledger.known(image)
    asked = policy.gate.required or (policy.gates_others and not found.guarded)
    passed = found.gate is not None and (found.gate.changed or not found.gate.flagged)
    return asked and not (passed and _is_accepted(policy, found.gate))


def _is_accepted(policy: OperatorPolicy, gate: GateRecord | None) -> bool:
    return gate is not None and bool(_gates.get((gate.detector_sha256, gate.settings_sha256, policy.state)))


def tightened(settings: Settings, detector: Detector) -> Settings:
    """A detector's own settings, as strict as the policy asks."""
    policy = current()
    return settings if policy is None else rules.tightened(policy.gate, settings, detector)


def check_gate(settings: Settings, settings_sha256: str, detector: Detector, second: Second | None = None) -> None:
    """RefusedError for a gate that is looser than the policy; images that others judged may leave."""
    if (policy := current()) is None:
        return
    rules.check_gate(policy.gate, settings, detector, second)
    _gates.put((detector.sha256, settings_sha256, policy.state), True)


def record_gate(
    settings_sha256: str, detector: Detector, outcome: Outcome, seconds: float, kept: Sequence[str]
) -> None:
    """A line of what a gate found in how many seconds, where a policy is in force; ``kept``: files for a person."""
    if (policy := current()) is None:
        return
    said = {"detector": detector.name, "detector_sha256": detector.sha256, "settings_sha256": settings_sha256}
    labels = dict(Counter(label for found in outcome.blocked for label in found))  # label -> images
    flags, changed = list(outcome.flags), list(outcome.changed)
    answers, overruled = list(outcome.answers), sum(map(bool, outcome.overruled))
    found = {"flags": flags, "changed": changed, "answers": answers, "labels": labels, "not_confirmed": overruled}
    if policy.record.activity and outcome.prompts:
        found["activity"] = list(outcome.prompts)
    record(policy, "gate", **said, **found, kept=list(kept), seconds=round(seconds, 3))


def record_run(
    policy: OperatorPolicy,
    run: Attestation | None,
    base: Sequence[str],
    texts: tuple[tuple[str, ...], int] | None,
    seconds: float,
) -> None:
    """A line of one sampling run of ``seconds``; ``run`` None: the policy asks for no guard, and there was none.

    ``base``: SHA-256 of the files that the diffusion model was made of, where the policy names bases. ``texts``: those
    of the embeddings that it used, and how many rows of these have none that is known.
    """
    if run is not None and not policy.record.activity:
        run = run.without_activity()
    said = {"status": "unguarded"} if run is None else asdict(run)
    known, unknown = texts or ((), 0)
    more: dict[str, Any] = {"rows_without_known_text": unknown} if texts is not None else {}
    more |= {"base_files": list(base)} if base else {}
    record(policy, "run", prompts=known, attestation=said, seconds=round(seconds, 3), **more)


def record(policy: OperatorPolicy | None, kind: str, **fields: Any) -> None:
    """One line, with the prompt and node that run. ``policy`` None: it cannot be read, its folder is the default.

    Raises GuardError where the line, or one that waits before it, cannot be written: what should have stood in it must
    not happen.
    """
    context = get_executing_context()
    where = {"prompt_id": context.prompt_id, "node": context.node_id} if context else {}
    if own := execution.get():
        where["execution"] = own
    if whose := tenant.get():
        where["tenant"] = whose
    said = where | fields
    if kind == "refused":  # it stays refused, whether or not its line can be written
        _tell(policy, kind, said)
    with _lock:
        write_waiting()
        notice(policy)
        _book(policy).append(kind, policy=policy.sha256 if policy else "", **said)
    if kind != "refused":
        _tell(policy, kind, said)


def _tell(policy: OperatorPolicy | None, kind: str, said: Mapping[str, Any]) -> None:
    for listener in listeners:
        listener(policy, kind, said)


def record_later(policy: OperatorPolicy | None, rule: str, **fields: Any) -> None:
    """A line of a refusal that a thread writes: whoever holds up the server's loop must not wait for the disc.

    It is written before any line of `record` that comes after it, and before the process ends. Where it cannot be
    written, no run is recorded, and so none goes on, until it is.
    """
    said = {"rule": rule, **fields}
    if whose := tenant.get():
        said["tenant"] = whose
    _tell(policy, "refused", said)
    if len(_waiting) < MOST_WAITING:
        _waiting.append((policy.sha256 if policy else "", "refused", said))
    else:
        _beyond[rule] += 1
    with _writer:
        if not _writing:
            _writing.append(threading.Thread(target=_write, name="modular_lora_record", daemon=True))
            _writing[0].start()
    _wake.set()


def retry() -> None:
    """Have lines that wait written, where an earlier try failed."""
    if _waiting or _beyond:
        _wake.set()


def write_waiting() -> None:
    """Write the lines that wait, in order, into the record of now. GuardError where that fails; they wait on."""
    while _waiting or _beyond:
        with _lock:
            policy = _noticed()
            if _waiting:
                sha256, kind, fields = _waiting[0]
                _book(policy).append(kind, policy=sha256, **fields)
                _waiting.popleft()
            elif _beyond:
                counted = Counter(_beyond)  # more may come while the line is written
                _book(policy).append("refused", policy=policy.sha256 if policy else "", **more_refused(counted))
                for rule, n in counted.items():
                    _beyond[rule] -= n
                    if not _beyond[rule]:
                        del _beyond[rule]


def more_refused(rules: Counter[str]) -> dict[str, Any]:
    """Fields of a line that stands for refusals which have none of their own."""
    told = ", ".join(f"{n} by {rule}" for rule, n in rules.most_common())
    return {"rule": "", "reason": f"and {rules.total()} more refusals: {told}", "more": dict(rules)}


def _noticed() -> OperatorPolicy | None:
    """The policy in force, which stands in the record; None where there is none, or where it cannot be read."""
    try:
        policy = current()
    except PolicyError:
        notice(None)
        return None
    if policy is not None:
        notice(policy)
    return policy


def _write() -> None:
    failed = False
    while _wake.wait():
        _wake.clear()
        try:
            write_waiting()
            failed = False
        except Exception:  # they wait, and nothing is sampled meanwhile
            if not failed:
                log.exception("%d refusals are not in the record yet.", len(_waiting) + _beyond.total())
            failed = True


@atexit.register
def _write_last() -> None:
    try:
        write_waiting()
    except Exception:
        log.exception("%d refusals are not in the record.", len(_waiting) + _beyond.total())


def notice(policy: OperatorPolicy | None) -> None:
    """A line where the policy is another than the record said last; None: it cannot be read."""
    now = (policy.sha256, policy.signed) if policy else ("", False)
    if _last == [now]:  # without waiting for a line that is being written
        return
    with _lock:
        if _last != [now]:
            _book(policy).append("policy", sha256=now[0], signed=now[1], readable=policy is not None)
            _last[:] = [now]


def gone() -> None:
    """A line for a policy that is there no more; the record is left as it is then."""
    with _lock:
        write_waiting()
        for book in _records.values():
            book.append("policy", sha256="", signed=False, readable=False, gone=True)
        _records.clear()
        _last.clear()


def _book(policy: OperatorPolicy | None) -> Record:
    """The record of a policy; where that cannot be read, the one that was in use."""
    place = (policy.record_folder, policy.record, policy.state) if policy else (folder() / UNREAD,)
    if place in _records or (policy is None and _records):
        return next(iter(_records.values()))
    key = keys.private_key(policy.signing_key) if policy and policy.signing_key else None
    asked = policy.record if policy else None
    limits = {"max_bytes": asked.max_bytes} if asked else {}
    book = Record(place[0], **limits, prompts=bool(asked and asked.prompts), key=key)
    _records.clear()
    return _records.setdefault(place, book)
