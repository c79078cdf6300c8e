"""What every part of the pack does in one way: atomic writes, the bounded cache, file states, folders."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.errors import GuardError, one_line, writing
from modular_lora_guard.modular_lora.util import atomic, plain_json
from modular_lora_guard.modular_lora.util.cache import Cache
from modular_lora_guard.modular_lora.util.file_state import file_state, find_file_state
from modular_lora_guard.modular_lora.util.folders import try_writing
from modular_lora_guard.modular_lora.util.hashing import hash_file
from support.errors import refuses

ROOT = Path(__file__).resolve().parents[3]
OPERATIONS = st.lists(st.tuples(st.sampled_from(["get", "put"]), st.integers(0, 6), st.integers(0, 9)), max_size=60)


class Full(OSError):
    """The disk is full."""


def held(folder: Path) -> dict[str, bytes]:
    """Name and content of every file under a folder, and the names of its folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"folder" for p in folder.rglob("*")}


def fail(*_: object) -> None:
    raise Full(28, "No space left on device")


def test_util_needs_the_standard_library_alone() -> None:
    names = sorted(path.stem for path in (ROOT / "modular_lora" / "util").glob("[a-z]*.py"))
    code = "; ".join(f"import modular_lora.util.{name}" for name in names)
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]  # -S: no packages
    subprocess.run(command, check=True, timeout=60)


# The cache


@given(OPERATIONS, st.integers(1, 4))
def test_a_cache_holds_the_last_used_entries_of_its_count(operations: list, limit: int) -> None:
    cache: Cache[int, int] = Cache(limit)
    used: dict[int, int] = {}  # in the order of use
    for what, key, value in operations:
        if what == "put":
            assert cache.put(key, value) == value
            used.pop(key, None)
            used[key] = value
            used = dict(list(used.items())[-limit:])
        else:
            assert cache.get(key) == used.get(key)
            if key in used:
                used[key] = used.pop(key)
        assert len(cache) == cache.size == len(used)
    assert {key: cache.get(key) for key in range(7)} == {key: used.get(key) for key in range(7)}


@given(OPERATIONS, st.integers(1, 20))
def test_a_cache_holds_the_last_used_entries_that_fit_its_size(operations: list, limit: int) -> None:
    """A value is its own size."""
    cache: Cache[int, int] = Cache(limit, lambda value: value)
    used: dict[int, int] = {}
    for what, key, value in operations:
        if what == "put":
            cache.put(key, value)
            used.pop(key, None)
            used[key] = value
            while len(used) > 1 and sum(used.values()) > limit:
                del used[next(iter(used))]
        elif cache.get(key) is not None:
            used[key] = used.pop(key)
        assert cache.size == sum(used.values())
        assert cache.size <= limit or len(cache) == 1  # the last one stays even if it is too large
    assert {key: cache.get(key) for key in range(7)} == {key: used.get(key) for key in range(7)}


def test_a_cache_asks_for_sizes_anew_at_every_put() -> None:
    cache: Cache[str, bytearray] = Cache(10, len)
    grown = cache.put("grown", bytearray(1))
    cache.put("b", bytearray(1))
    grown.extend(bytes(20))
    cache.put("c", bytearray(1))
    assert [cache.get(key) is None for key in ("grown", "b", "c")] == [True, False, False]


@given(OPERATIONS)
def test_what_is_dropped_or_cleared_is_gone(operations: list) -> None:
    cache: Cache[int, int] = Cache(99)
    for _, key, value in operations:
        cache.put(key, value)
    cache.drop(lambda key: key % 2 == 0)
    assert [cache.get(key) for key in (0, 2, 4, 6)] == [None] * 4
    assert len(cache) == len({key for _, key, _ in operations if key % 2})
    cache.clear()
    assert len(cache) == 0


# Atomic writes


@given(st.binary(max_size=50), st.binary(max_size=50), st.booleans())
def test_a_written_file_has_the_new_content_alone(tmp_path_factory, old: bytes, new: bytes, sync: bool) -> None:
    folder = tmp_path_factory.mktemp("atomic")
    path = folder / "a.json"
    path.write_bytes(old)
    atomic.write(path, new, sync=sync)
    assert held(folder) == {"a.json": new}


def test_text_is_utf_8_and_its_line_ends_stay(tmp_path: Path) -> None:
    atomic.write(tmp_path / "a.txt", "é\n")
    assert held(tmp_path) == {"a.txt": "é\n".encode()}


def test_a_missing_folder_is_made_only_where_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic.write(tmp_path / "b" / "a.txt", "x")
    assert held(tmp_path) == {}
    atomic.write(tmp_path / "b" / "a.txt", "x", parents=True)
    assert held(tmp_path) == {"b": b"folder", str(Path("b", "a.txt")): b"x"}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_what_was_there_and_no_temporary_file(there, moment, tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.bin"
    if there:
        path.write_bytes(b"old")
    before = held(tmp_path)
    if moment != "write":
        monkeypatch.setattr(os, moment, fail)

    def write() -> None:
        with atomic.replacing(path, sync=True) as part:
            part.write_bytes(b"half")
            if moment == "write":
                fail()

    with pytest.raises(Full):
        write()
    assert held(tmp_path) == before


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_a_new_file_takes_a_free_name(links, tmp_path, monkeypatch) -> None:
    if not links:
        monkeypatch.setattr(os, "link", fail)
    with atomic.creating(tmp_path / "a.bin", ending=".end", sync=True) as part:
        part.write_bytes(b"new")
        assert (part.parent, part.suffix) == (tmp_path, ".end")
    assert held(tmp_path) == {"a.bin": b"new"}


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_name_that_is_taken_stays_as_it_is(when, links, tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.bin"
    if not links:
        monkeypatch.setattr(os, "link", fail)
    if when == "before":
        path.write_bytes(b"theirs")

    def write() -> None:
        with atomic.creating(path) as part:
            part.write_bytes(b"ours")
            path.write_bytes(b"theirs")

    with pytest.raises(FileExistsError):
        write()
    assert held(tmp_path) == {"a.bin": b"theirs"}


def test_a_failed_new_file_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(Full), atomic.creating(tmp_path / "a.bin") as part:
        part.write_bytes(b"new")
    assert held(tmp_path) == {}


def test_a_folder_replaces_the_one_before_and_clears_what_a_killed_process_left(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    for name in ("state", f"{atomic.PART}state"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_bytes(b"old")
    with atomic.replacing_folder(folder) as part:
        (part / "new").write_bytes(b"new")
        assert (folder / "old").exists()
    assert held(tmp_path) == {"state": b"folder", str(Path("state", "new")): b"new"}


def test_a_folder_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    before = held(tmp_path)

    def write() -> None:
        with atomic.replacing_folder(tmp_path / "state") as part:
            (part / "new").write_bytes(b"new")
            fail()

    with pytest.raises(Full):
        write()
    assert held(tmp_path) == before


def test_what_cannot_be_written_is_an_error_with_subject_and_remedy() -> None:
    class OtherError(GuardError):
        code = "other"

    with refuses(f"{OtherError.code}.not-written", "a.bin", "No space left on device"):
        with writing("a.bin", OtherError):
            fail()


@pytest.mark.parametrize(
    ("error", "said"),
    [(ValueError("a\n  b\x1bc"), "a b?c"), (ValueError(), "ValueError"), (ValueError("x" * 999), "x" * 300)],
)
def test_an_error_of_another_library_is_said_on_one_line(error: Exception, said: str) -> None:
    assert one_line(error) == said


# File states and folders


def test_a_file_is_hashed_whole(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x" * (2**20 + 1))
    assert hash_file(tmp_path / "a.bin") == hashlib.sha256(b"x" * (2**20 + 1)).hexdigest()


def rewritten(path: Path) -> None:
    path.write_bytes(b"new!")


def replaced(path: Path) -> None:
    atomic.write(path, b"new!")


@pytest.mark.parametrize("change", [rewritten, replaced])
def test_a_file_that_changed_has_another_state_even_with_its_old_time(change: Callable, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old!")
    os.utime(path, ns=(0, 0))
    before = file_state(path)
    assert file_state(path) == find_file_state(str(path)) == before
    change(path)
    os.utime(path, ns=(0, 0))
    after = file_state(path)
    assert (after.size, after.modified) == (before.size, before.modified)
    assert after != before


@pytest.mark.parametrize("name", ["missing", "a.bin/below", "nul\0"])
def test_what_is_not_there_has_no_state(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    path = f"{tmp_path}{os.sep}{name}"
    assert find_file_state(path) is None
    with pytest.raises((OSError, ValueError)):
        file_state(path)


def test_a_folder_is_tried_without_a_trace(tmp_path: Path) -> None:
    try_writing(tmp_path / "a" / "b")
    assert held(tmp_path) == {}
    (tmp_path / "file").write_bytes(b"")
    for taken in ("file", "file/b"):
        with pytest.raises(OSError):
            try_writing(tmp_path / taken)
    assert held(tmp_path) == {"file": b""}


# JSON


def test_an_object_is_read_from_a_json_file_and_anything_else_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    plain_json.write({"a": [1, None]}, path)
    assert plain_json.read_object(path) == {"a": [1, None]}
    for text in ("[1]", "3", "", "{", '{"a":' * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError):
            plain_json.read_object(path)
    with pytest.raises(FileNotFoundError):
        plain_json.read_object(tmp_path / "gone.json")
