"""A file that another program writes while it is read: read again, then refused, and never a mixture of two."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
import torch
from modular_lora_guard.modular_lora.errors import LoraFileError
from modular_lora_guard.modular_lora.files import reader
from modular_lora_guard.modular_lora.files.reader import PIECE, READINGS, read_lora, sha256_file
from safetensors.torch import save
from support.errors import refuses


def make(value: float) -> bytes:
    """A LoRA of several pieces whose every number is ``value``."""
    return save(
        {"a.lora_down.weight": torch.full((8, PIECE // 8), value), "a.lora_up.weight": torch.full((3, 8), value)}
    )


def write(path: Path, data: bytes) -> None:
    """In place, as copying over a file does."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(data)


class Meanwhile:
    """Does something in the middle of the first ``times`` readings of a file."""

    def __init__(self, monkeypatch, action, times: int):
        self.count, check = 0, reader.sort_names

        def sort_names(*args):
            self.count += 1
            if self.count <= times:
                action()
            return check(*args)

        monkeypatch.setattr(reader, "sort_names", sort_names)  # between the header and the rest


def test_a_file_written_over_once_is_read_again(tmp_path, monkeypatch):
    path, new = tmp_path / "a.safetensors", make(2.0)
    write(path, make(1.0))
    reading = Meanwhile(monkeypatch, lambda: write(path, new), 1)
    lora = read_lora(path)
    assert reading.count == 2
    assert lora.sha256 == hashlib.sha256(new).hexdigest()
    assert {float(lora.layers["a"].down.min()), float(lora.layers["a"].down.max())} == {2.0}


@pytest.mark.parametrize("old", [False, True], ids=["just written", "written long ago"])
def test_a_file_written_over_in_every_reading_is_refused(tmp_path, monkeypatch, old):
    path, values = tmp_path / "a.safetensors", iter(range(2, 99))
    write(path, make(1.0))
    if old:
        os.utime(path, (1e9, 1e9))
    reading = Meanwhile(monkeypatch, lambda: write(path, make(float(next(values)))), 99)
    with refuses("file.being-written", "a.safetensors"):
        read_lora(path)
    assert reading.count == READINGS


def test_a_change_that_leaves_all_times_as_they_were_is_found_in_a_young_file(tmp_path, monkeypatch):
    """As within one tick of the file system's clock: the times and the size say nothing, the contents do."""
    path, values = tmp_path / "a.safetensors", iter(range(2, 99))
    write(path, make(1.0))
    kept = reader.file_state(path)
    monkeypatch.setattr(reader, "file_state", lambda _: kept)
    Meanwhile(monkeypatch, lambda: write(path, make(float(next(values)))), 99)
    with refuses("file.being-written"):
        read_lora(path)


def test_a_file_that_is_being_written_is_not_called_damaged(tmp_path, monkeypatch):
    """Cut off at first, whole when it is read again."""
    path, whole = tmp_path / "a.safetensors", make(1.0)
    write(path, whole)
    truncated = lambda: path.write_bytes(whole[: len(whole) // 2])  # noqa: E731
    states, state = iter([truncated, lambda: write(path, whole)]), reader.file_state

    def meanwhile(of):
        next(states, lambda: None)()
        return state(of)

    write(path, b"\0" * 8)
    monkeypatch.setattr(reader, "file_state", meanwhile)
    assert read_lora(path).sha256 == hashlib.sha256(whole).hexdigest()


def test_no_mixture_ever_comes_through_while_a_thread_writes_over_the_file(tmp_path):
    path, stop = tmp_path / "a.safetensors", threading.Event()
    contents = [make(value) for value in (1.0, 2.0)]
    hashes = {hashlib.sha256(data).hexdigest() for data in contents}
    write(path, contents[0])

    def writer():
        i = 0
        while not stop.is_set():
            i += 1
            write(path, contents[i % 2])

    thread = threading.Thread(target=writer)
    thread.start()
    try:
        outcomes = [_hash_or_error(path) for _ in range(6)]
    finally:
        stop.set()
        thread.join()
    assert all(outcome in hashes or "another program wrote to it" in outcome for outcome in outcomes)


def _hash_or_error(path: Path) -> str:
    try:
        return read_lora(path).sha256
    except LoraFileError as error:
        return str(error)


def test_the_hash_of_a_file_that_was_written_over_is_not_remembered(tmp_path):
    path = tmp_path / "a.safetensors"
    for value in range(20):  # faster than the clock of most file systems ticks
        data = bytes([value]) * 64
        path.write_bytes(data)
        os.utime(path, ns=(10**18, 10**18))
        assert sha256_file(path) == hashlib.sha256(data).hexdigest()
