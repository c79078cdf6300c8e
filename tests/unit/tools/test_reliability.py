"""The corpus of corrupted LoRA files that docs/figures/reliability.json counts: every kind of it is refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from random import Random

import pytest
from modular_lora_guard.modular_lora.errors import LoraFileError
from modular_lora_guard.modular_lora.files.reader import read_lora
from support.errors import refuses

ROOT = Path(__file__).resolve().parents[3]
ASSETS = ROOT / "tools" / "world" / "assets"
_spec = importlib.util.spec_from_file_location("corrupted", ROOT / "tools" / "benchmarks" / "corrupted.py")
corrupted = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = corrupted
_spec.loader.exec_module(corrupted)


@pytest.mark.parametrize("kind", [*corrupted.KINDS, *corrupted.HEAVY], ids=lambda kind: kind.__name__)
def test_files_that_are_broken_for_any_reader_are_refused(kind, tmp_path, extent):
    count = extent(2, 34) if kind in corrupted.HEAVY else extent(20, 350)
    path = tmp_path / "a.safetensors"
    for _, sound, raw in corrupted.corpus(Random(7), (kind,), count, ASSETS):
        path.write_bytes(sound.raw)
        read_lora(path)
        path.write_bytes(raw)
        with pytest.raises(LoraFileError, match=r"^a\.safetensors: ") as error:
            read_lora(path)
        assert str(error.value).isprintable()


def test_the_corpus_is_the_same_for_the_same_seed_and_no_file_comes_twice():
    first, again = (list(corrupted.corpus(Random(3), corrupted.KINDS, 60, ASSETS)) for _ in range(2))
    assert [raw for *_, raw in first] == [raw for *_, raw in again]
    assert len({raw for *_, raw in first}) == 60


def test_a_file_that_is_written_over_whenever_it_is_read_is_refused(tmp_path, monkeypatch):
    path, opened, rng = tmp_path / "a.safetensors", Path.open, Random(11)
    for _ in range(10):
        sound = corrupted.sound_file(rng, ASSETS)
        path.write_bytes(sound.raw)
        contents = iter(lambda sound=sound: corrupted.other_values(rng, sound), None)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda *args, of=contents: corrupted.WrittenOver(opened(*args), of))
            with refuses("file.being-written", "a.safetensors"):
                read_lora(path)
