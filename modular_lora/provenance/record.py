"""The operator's record: JSON lines in files, each line carrying the SHA-256 of the line before, across files.

A line is written whole and synced, then the head (head.json: number and hash of the last line) is written over, signed
where there is a key. ``verify`` finds lines that were changed, removed or reordered by the chain, and lines cut off the
end by the head; a writer goes on from the head, so that such a hole stays. Who can write the folder and sign with the
key can write another record: keep copies of the head elsewhere, and verify against them.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import GuardError
from ..util import atomic, bounds
from . import keys

START = "0" * 64  # what the first line names as the line before
HEAD, LOCK = "head.json", "record.lock"
PURPOSE = "record head"
KINDS = ("policy", "run", "opened", "gate", "refused", "ready", "recovered")
OWN = ("n", "time", "kind", "previous")
LINE_LIMIT = 2**20  # bytes
MOST_LINES = 2**63  # a number beyond is no line's
PATIENCE = 30.0  # seconds that a writer waits for the others
SHOWN = 20  # problems that are named
_NAME = re.compile(r"record-(\d{6,})\.jsonl")


class RecordError(GuardError):
    """The record cannot be written or read: what should have stood in it must not happen."""

    code = "record"


@dataclass(frozen=True)
class Head:
    """The last line: its number from 1 (0: none yet) and the SHA-256 of its bytes without the line end."""

    n: int = 0
    sha256: str = START


@dataclass(frozen=True)
class Verified:
    """What a check of a record found. ``problems`` name file and line; empty: the record is whole."""

    files: int
    lines: int
    head: Head  # of the last line that is there
    sealed_by: str  # name of the key that signed the head, or ""
    torn: int  # parts of lines that a crash left, kept aside
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def whole(self) -> bool:
        return not self.problems


class Record:
    """A folder of record files that several threads and processes append to.

    ``max_bytes``: a file that would grow beyond it is followed by the next. ``prompts``: whether the text of prompts
    is written. ``key``: private key (keys.private_key) that signs the head, or None.
    """

    def __init__(self, folder: Path, max_bytes: int = 16 * 2**20, *, prompts: bool = False, key: Any = None):
        self.folder, self.max_bytes, self.prompts, self.key = Path(folder), max_bytes, prompts, key
        with _written(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / LOCK, timeout=PATIENCE)

    def append(self, kind: str, *, prompts: Sequence[str] = (), **fields: Any) -> Head:
        """Write one line and sync it; the new head. Raises RecordError.

        ``fields``: JSON values; long texts in them are cut, and their length and SHA-256 stand in the line.
        """
        if taken := set(fields) & set(OWN):
            raise ValueError(f"fields {sorted(taken)} are the record's own")
        if prompts and self.prompts:
            fields["prompts"] = bounds.texts(prompts)
        fields = bounds.bounded(fields)
        try:
            with self._lock, _written(self.folder):
                number, last, lost = self._recover()
                if lost:
                    number, last = self._write(number, last, "recovered", lost)
                return self._write(number, last, kind, fields)[1]
        except Timeout as error:
            raise RecordError(f"{self.folder}: locked for {PATIENCE:g} s by another process: end that one") from error

    def _recover(self) -> tuple[int, Head, dict[str, Any]]:
        """Number of the last file (0: none), the line to go on from, and what a crash left of one, put aside."""
        files = _files(self.folder)
        if not files and not (self.folder / HEAD).exists():
            self._seal(Head())
        head, last, lost = self._sealed(), Head(), {}
        for path in reversed(files):  # the newest may be empty: a writer ended right after it made it
            with path.open("rb") as file:
                good, found = _last_line(file)
                file.seek(good)
                torn = file.read()
            if torn and path == files[-1]:
                lost = _set_aside(path, good, torn)
            if found is not None:
                last = found
                break
        return _number(files[-1]) if files else 0, last if last.n > head.n else head, lost

    def _sealed(self) -> Head:
        """The head as it was written; RecordError where it was not, or not with our key."""
        said = _read_head(self.folder / HEAD, HEAD)
        if self.key is not None:
            try:
                keys.verify_own(said, PURPOSE, self.key, HEAD)
            except GuardError as error:
                raise RecordError(
                    f"{error}; verify the record, then name another record folder", code="record.damaged"
                ) from error
        return Head(said["n"], said["sha256"])

    def _write(self, number: int, last: Head, kind: str, fields: Mapping[str, Any]) -> tuple[int, Head]:
        """Append a line to file ``number`` or, where that is full or none, to the next; then the head."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        said = {"n": last.n + 1, "time": now, "kind": kind, "previous": last.sha256, **fields}
        try:
            line = json.dumps(said, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RecordError(f"record: a line of kind {kind} cannot be written as JSON ({error})") from error
        if len(line) >= LINE_LIMIT:
            raise RecordError(
                f"record: a line of {len(line)} bytes, at most {LINE_LIMIT} are written: record less of it"
            )
        path = _path(self.folder, number)
        if number == 0 or (path.stat().st_size and path.stat().st_size + len(line) >= self.max_bytes):
            number += 1
            path = _path(self.folder, number)
        _append(path, line + b"\n")
        head = Head(last.n + 1, _sha256(line))
        self._seal(head)
        return number, head

    def _seal(self, head: Head) -> None:
        said = asdict(head)
        if self.key is not None:
            said = keys.sign_statement(said, PURPOSE, self.key)
        elif (self.folder / HEAD).exists() and keys.SIGNATURE in _read_head(self.folder / HEAD, HEAD):
            return  # a signed head is left to the writers that have the key
        _replace(self.folder / HEAD, json.dumps(said, sort_keys=True).encode() + b"\n")


def verify(folder: Path, public_keys: Mapping[str, Path] | None = None, *, earlier: Path | None = None) -> Verified:
    """Check every line of a record against the chain, and its end against the head.

    ``public_keys``: the head must be signed by one of them. ``earlier``: a copy of head.json kept elsewhere, whose
    line must stand in the record. Raises RecordError where there is no record to read.
    """
    folder = Path(folder)
    seals = [(HEAD, folder / HEAD), *([(f"earlier head {earlier.name}", earlier)] if earlier else [])]
    problems, heads, sealed_by = [], [], ""
    for name, path in seals:  # before the lines: a record that is being written only grows
        try:
            said = _read_head(path, name)
            heads.append((name, Head(said["n"], said["sha256"])))
            if public_keys:
                signer = keys.verify_statement(said, PURPOSE, public_keys, name)
                sealed_by = sealed_by or (signer if path == folder / HEAD else "")
        except GuardError as error:
            problems.append(str(error))
    chain = _Chain({head.n for _, head in heads})
    files = _existing(folder)
    for path in files:
        chain.read(path, path == files[-1])
    problems += chain.problems
    problems += [text for name, head in heads if (text := chain.compare(name, head))]
    notes = list(chain.notes)
    if heads and heads[0][0] == HEAD and chain.head.n > heads[0][1].n:
        notes.append(f"{chain.head.n - heads[0][1].n} lines are newer than {HEAD}: it was written before them")
    if not public_keys:
        notes.append(f"{HEAD} was not checked against a key: whoever can write the folder can cut the end off")
    torn = len(list(folder.glob("record-*.torn-*")))
    return Verified(len(files), chain.lines, chain.head, sealed_by, torn, _few(problems), tuple(notes))


def lines(folder: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """File, line number in it and content of every line, unchecked; what is no line is left out."""
    for path in _existing(Path(folder)):
        with _reading(path), path.open("rb") as file:
            for i, raw in enumerate(iter(lambda: file.readline(LINE_LIMIT), b""), 1):
                if (said := _parsed(raw)) is not None:
                    yield path, i, said


class _Chain:
    """The lines of a record one after the other, and what is wrong with them."""

    def __init__(self, wanted: set[int]):
        self.lines, self.head = 0, Head()
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._hashes = {0: START}  # of the lines that heads name
        self._wanted = wanted
        self._before = "the start of the record"
        self._file = 0

    def read(self, path: Path, newest: bool) -> None:
        number = _number(path)
        if number != self._file + 1:
            gone = f"record-{self._file + 1:06}.jsonl" + f" to {number - 1:06}" * (number > self._file + 2)
            self.problems.append(f"{gone}: removed; the record goes on in {path.name}")
        self._file = number
        with _reading(path), path.open("rb") as file:
            for i, raw in enumerate(iter(lambda: file.readline(LINE_LIMIT), b""), 1):
                self._line(f"{path.name} line {i}", raw, newest)

    def _line(self, place: str, raw: bytes, newest: bool) -> None:
        if newest and not raw.endswith(b"\n") and len(raw) < LINE_LIMIT:
            self.notes.append(
                f"{place}: torn, {len(raw)} bytes: a crash or a write in progress; the next line mends it"
            )
            return
        if not raw.endswith(b"\n") and len(raw) < LINE_LIMIT:
            self.problems.append(f"{place}: has no end of line: the end of its file was cut off")
        said, sha256 = _parsed(raw), _sha256(raw.removesuffix(b"\n"))
        self.lines += 1
        if said is None:
            self.problems.append(f"{place}: is not a line of a record: it was changed")
            self.head, self._before = Head(self.head.n + 1, sha256), place
            return
        n, wanted = said["n"], self.head.n + 1
        if n > wanted:
            many = f"lines {wanted} to {n - 1} were" if n - 1 > wanted else f"line {wanted} was"
            self.problems.append(f"{place}: number {n} after {wanted - 1}: {many} removed or moved")
        elif n < wanted:
            self.problems.append(f"{place}: number {n} after {wanted - 1}: it was moved or written twice")
        elif said["previous"] != self.head.sha256:
            self.problems.append(f"{self._before}: is not the line that {place} was written after: it was changed")
        self.head, self._before = Head(n, sha256), place
        if n in self._wanted:
            self._hashes[n] = sha256

    def compare(self, name: str, head: Head) -> str:
        """What is wrong between the lines and a head, or "" where nothing is."""
        if head.n > self.head.n:
            return f"{self._before}: is the last, number {self.head.n}; {name} names {head.n}: the end was cut off"
        if self._hashes.get(head.n) != head.sha256:
            return f"number {head.n} is not the line that {name} names: it was changed or the record was written anew"
        return ""


def _read_head(path: Path, name: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            said = json.loads(file.read(LINE_LIMIT))
    except FileNotFoundError as error:
        raise RecordError(
            f"{name}: is not there: it was removed, and the record's end cannot be checked", code="record.file-missing"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{name}: cannot be read as JSON: it was changed") from error
    if not isinstance(said, dict) or not _is_number(said.get("n"), 0) or not isinstance(said.get("sha256"), str):
        raise RecordError(f"{name}: names no line: it was changed")
    return said


def _files(folder: Path) -> list[Path]:
    """Record files in order."""
    try:
        found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    except OSError as error:
        raise RecordError(f"{folder}: cannot be read ({error.strerror}): check the policy's record folder") from error
    return sorted(found, key=_number)


def _existing(folder: Path) -> list[Path]:
    files = _files(folder)
    if not files and not (folder / HEAD).exists():
        raise RecordError(f"{folder}: holds no record: name the policy's record folder")
    return files


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("record-"))


def _path(folder: Path, number: int) -> Path:
    return folder / f"record-{number:06}.jsonl"


def _last_line(file: Any) -> tuple[int, Head | None]:
    """Where what is whole ends, and the last whole line (None: there is none)."""
    end = file.seek(0, os.SEEK_END)
    first = max(0, end - 2 * LINE_LIMIT)
    file.seek(first)
    tail = file.read()
    stop = tail.rfind(b"\n")
    while stop >= 0:
        start = tail.rfind(b"\n", 0, stop)
        line = tail[start + 1 : stop]
        if (said := _parsed(line)) is not None:
            return first + stop + 1, Head(said["n"], _sha256(line))
        stop = start  # a crash of the machine may leave anything, line ends too
    if first:
        raise RecordError("record: its last file ends in more than a line's length of no record: put it aside")
    return 0, None


def _set_aside(path: Path, good: int, torn: bytes) -> dict[str, Any]:
    """Keep what a crash left behind the last whole line in a file of its own, then cut it off."""
    aside = path.with_name(f"{path.stem}.torn-{good}")
    _replace(aside, torn)
    with path.open("r+b") as file:
        file.truncate(good)
        os.fsync(file.fileno())
    return {"torn_file": aside.name, "torn_bytes": len(torn), "torn_sha256": _sha256(torn)}


def _append(path: Path, line: bytes) -> None:
    """Write a line whole or, where that fails, not at all."""
    new = not path.exists()
    with path.open("ab") as file:
        size = file.tell()
        try:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise
    if new:
        atomic.sync_folder(path.parent)


def _replace(path: Path, content: bytes) -> None:
    atomic.write(path, content, sync=True)
    atomic.sync_folder(path.parent)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line's content, or None where it is no line of a record."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(said, dict) and _is_number(said.get("n"), 1) and isinstance(said.get("previous"), str)
    return said if whole else None


def _is_number(value: Any, least: int) -> bool:
    """Whether a value is the number of a line; Python reads and prints whole numbers of thousands of digits."""
    return type(value) is int and least <= value < MOST_LINES


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _few(problems: Sequence[str]) -> tuple[str, ...]:
    more = len(problems) - SHOWN
    return (*problems[:SHOWN], *([f"and {more} more"] if more > 0 else []))


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{folder}: the record cannot be written ({error.strerror or error}): free space or mend its permissions",
            code="record.not-written",
        ) from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordError(f"{path.name}: cannot be read ({error.strerror or error}): check its permissions") from error
