"""The operator's record: chained, synced, rotated, mended after a crash; whatever is done to it is found."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.provenance import keys
from modular_lora_guard.modular_lora.provenance import record as records
from modular_lora_guard.modular_lora.provenance.record import HEAD, START, Record, RecordError, lines, verify
from modular_lora_guard.operators import cli
from support.errors import refuses

ROOT = Path(__file__).resolve().parents[3]
WRITER = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1] + "/importable")
from modular_lora_guard.modular_lora.provenance.record import Record
record = Record(Path(sys.argv[2]), 4000)
for i in range(int(sys.argv[4])):
    head = record.append("run", writer=sys.argv[3], i=i)
    print(head.n, flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "record"


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key; the public one lies beside it."""
    path = tmp_path_factory.mktemp("keys") / "operator.pem"
    keys.keygen(path)
    return path


def public(key: Path) -> dict[str, Path]:
    return {"operator": key.with_suffix(".pub")}


def fill(folder: Path, count: int = 12, max_bytes: int = 900, key: Path | None = None) -> list[Path]:
    """A record of ``count`` runs in several files."""
    record = Record(folder, max_bytes, key=keys.private_key(key) if key else None)
    for i in range(count):
        record.append("run", prompt_id=f"p{i}")
    files = sorted(folder.glob("*.jsonl"))
    assert len(files) > 2
    return files


def edit(path: Path, change) -> None:
    """Write a file's lines anew, with their ends, as ``change`` gives them."""
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def spawn(folder: Path, writer: str, count: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(ROOT), str(folder), writer, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_every_line_names_the_line_before_across_files(folder):
    files = fill(folder)
    before = START
    for n, raw in enumerate((line for path in files for line in path.read_bytes().splitlines()), 1):
        said = json.loads(raw)
        assert (said["n"], said["kind"], said["previous"], said["prompt_id"]) == (n, "run", before, f"p{n - 1}")
        before = hashlib.sha256(raw).hexdigest()
    assert json.loads((folder / HEAD).read_text()) == {"n": 12, "sha256": before}
    assert all(path.stat().st_size <= 900 for path in files)
    found = verify(folder)
    assert found.whole
    assert (found.files, found.lines, found.torn) == (len(files), 12, 0)
    assert "not checked against a key" in found.notes[0]


def test_prompts_are_written_only_where_the_operator_wants_them(folder, tmp_path):
    Record(folder).append("run", prompts=["a secret"])
    Record(tmp_path / "open", prompts=True).append("run", prompts=["a secret"])
    assert "prompts" not in next(lines(folder))[2]
    assert next(lines(tmp_path / "open"))[2]["prompts"] == ["a secret"]


def test_a_line_that_is_no_json_is_refused_and_leaves_nothing(folder):
    record = Record(folder)
    for value in (float("nan"), object(), ["x"] * records.LINE_LIMIT):
        with pytest.raises(RecordError):
            record.append("run", value=value)
    with pytest.raises(ValueError):
        record.append("run", previous="x")
    record.append("run")
    assert verify(folder).lines == 1


def swapped(found):
    return [found[1], found[0], *found[2:]]


CUTS = {  # name -> (index of the file, change of its lines, what verify must say)
    "a changed word": (1, lambda f: [f[0].replace(b"run", b"ran"), *f[1:]], r"000002\.jsonl line 1: .* was changed"),
    "a changed number": (
        1,
        lambda f: [re.sub(rb'"n":\d+', b'"n":99', f[0]), *f[1:]],
        r"000002\.jsonl line 1: number 99",
    ),
    "no JSON": (0, lambda f: [b"junk\n", *f[1:]], r"000001\.jsonl line 1: is not a line"),
    "a removed first line": (0, lambda f: f[1:], r"000001\.jsonl line 1: number 2 after 0: line 1 was removed"),
    "a removed line": (1, lambda f: [f[0], *f[2:]], r"jsonl line \d: number \d+ after \d+: line \d+ was removed"),
    "reordered lines": (1, swapped, r"000002\.jsonl line 1: number \d+ after \d+: line \d+ was removed or moved"),
    "a line written twice": (0, lambda f: [f[0], f[0], *f[1:]], r"000001\.jsonl line 2: .* written twice"),
    "a file cut in a line": (0, lambda f: [*f[:-1], f[-1][:-9]], r"000001\.jsonl line \d: is not a line of a record"),
    "a file cut by a line": (0, lambda f: f[:-1], r"000002\.jsonl line 1: number \d+ after \d+: line \d+ was removed"),
    "an end cut off": (-1, lambda f: f[:-1], r"names 12: the end was cut off"),
    "a changed end": (-1, lambda f: [*f[:-1], f[-1].replace(b"p11", b"p12")], r"number 12 is not the line that head"),
    "a line too long": (0, lambda f: [b"x" * 2**21 + b"\n", *f], r"000001\.jsonl line 1: is not a line of a record"),
}


@pytest.mark.parametrize("name", CUTS)
def test_what_is_done_to_a_line_is_named_by_file_and_line(folder, name):
    index, change, says = CUTS[name]
    edit(fill(folder)[index], change)
    found = verify(folder)
    assert not found.whole
    assert any(re.search(says, problem) for problem in found.problems), found.problems


def test_removed_files_are_named(folder):
    files = fill(folder)
    files[1].unlink()
    assert any("record-000002.jsonl: removed" in problem for problem in verify(folder).problems)
    files[0].unlink()
    assert any("record-000001.jsonl to 000002: removed" in problem for problem in verify(folder).problems)


def test_a_head_that_was_removed_or_rewritten_is_found(folder, operator):
    files = fill(folder, key=operator)
    assert verify(folder, public(operator)).sealed_by == "operator"
    whole = (folder / HEAD).read_bytes()
    edit(files[-1], lambda found: found[:-1])
    last = files[-1].read_bytes().splitlines() or files[-2].read_bytes().splitlines()
    forged = {"n": 11, "sha256": hashlib.sha256(last[-1]).hexdigest()}
    (folder / HEAD).write_text(json.dumps(forged))
    assert verify(folder).whole, "without a key, a head written anew hides a cut end; the docs say so"
    assert "carries no signature" in verify(folder, public(operator)).problems[0]
    (folder / HEAD).write_text(json.dumps(json.loads(whole) | forged))
    assert "was changed after operator signed it" in verify(folder, public(operator)).problems[0]
    (folder / HEAD).unlink()
    assert "head.json: is not there" in verify(folder).problems[0]


def test_an_older_copy_of_the_whole_folder_is_found_with_a_head_kept_elsewhere(folder, operator, tmp_path):
    fill(folder, key=operator)
    shutil.copytree(folder, tmp_path / "old")
    Record(folder, 900, key=keys.private_key(operator)).append("run")
    kept = tmp_path / "kept.json"
    shutil.copy(folder / HEAD, kept)
    assert verify(folder, public(operator), earlier=kept).whole
    Record(folder, 900, key=keys.private_key(operator)).append("run")
    assert verify(folder, public(operator), earlier=kept).whole, "the record has grown since"
    assert verify(tmp_path / "old", public(operator)).whole
    found = verify(tmp_path / "old", public(operator), earlier=kept)
    assert "earlier head kept.json names 13: the end was cut off" in found.problems[0]


def test_a_writer_does_not_cover_up_a_cut(folder):
    files = fill(folder)
    edit(files[-1], lambda found: found[:-1])
    Record(folder, 900).append("run")
    assert any("number 13 after 11: line 12 was removed" in problem for problem in verify(folder).problems)
    for path in folder.glob("*.jsonl"):
        path.unlink()
    Record(folder, 900).append("run")
    assert any("number 14 after 0: lines 1 to 13 were removed" in problem for problem in verify(folder).problems)
    (folder / HEAD).unlink()
    with refuses("record.file-missing"):
        Record(folder).append("run")


def test_a_record_with_a_head_of_another_key_is_not_gone_on_with(folder, operator, tmp_path):
    fill(folder, key=operator)
    keys.keygen(tmp_path / "other.pem")
    with refuses("record.damaged"):
        Record(folder, key=keys.private_key(tmp_path / "other.pem")).append("run")


def test_a_writer_without_the_key_leaves_a_signed_head_as_it_is(folder, operator):
    fill(folder, key=operator)
    Record(folder, 900).append("refused")
    found = verify(folder, public(operator))
    assert (found.whole, found.lines, found.sealed_by) == (True, 13, "operator")
    assert "1 lines are newer than head.json" in found.notes[0]
    Record(folder, 900, key=keys.private_key(operator)).append("run")
    found = verify(folder, public(operator))
    assert (found.whole, found.lines, found.notes) == (True, 14, ())


def test_a_last_end_of_line_that_an_older_file_has_lost_is_found(tmp_path):
    first, *_ = fill(tmp_path, 9, 700)
    first.write_bytes(first.read_bytes()[:-1])
    (problem,) = verify(tmp_path).problems
    assert "the end of its file was cut off" in problem


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_any_cut_and_any_loss_of_lines_is_found(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    files = fill(folder, 9, 700)
    path = data.draw(st.sampled_from(files))
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, 2**20)) % len(raw)] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del raw[data.draw(st.integers(0, 2**20)) % len(raw) :]
    path.write_bytes(raw)
    assert not verify(folder).whole


def test_a_torn_line_is_put_aside_and_counted_and_the_chain_goes_on(folder):
    files = fill(folder)
    torn = b'{"n":13,"time":"2026-11-26T0'
    with files[-1].open("ab") as file:
        file.write(torn)
    found = verify(folder)
    assert found.whole
    assert "torn, 28 bytes" in found.notes[0]
    Record(folder, 900).append("run", prompt_id="next")
    found = verify(folder)
    assert found.whole, found.problems
    assert (found.lines, found.torn) == (14, 1)
    said = [content for *_, content in lines(folder)][-2:]
    assert [line["kind"] for line in said] == ["recovered", "run"]
    aside = folder / said[0]["torn_file"]
    assert aside.read_bytes() == torn
    assert said[0]["torn_sha256"] == hashlib.sha256(torn).hexdigest()


@pytest.mark.parametrize("junk", [b"\0" * 5000, b"\0\n" * 2000, b'{"n":13}\n', b"\n", b"{"])
def test_whatever_a_crash_of_the_machine_leaves_is_put_aside(folder, junk):
    files = fill(folder)
    with files[-1].open("ab") as file:
        file.write(junk)
    Record(folder, 900).append("run")
    found = verify(folder)
    assert found.whole, found.problems
    assert (found.lines, found.torn) == (14, 1)


def test_a_crash_between_any_two_writes_loses_nothing(folder, monkeypatch):
    fill(folder)
    done = {"n": 0}

    def failing(real):
        def call(*arguments):
            done["n"] -= 1
            if done["n"] < 0:
                raise KeyboardInterrupt
            return real(*arguments)

        return call

    for name in ("_append", "_replace", "_set_aside"):
        monkeypatch.setattr(records, name, failing(getattr(records, name)))
    for steps in (0, 1, 2, 3, 4):
        newest = sorted(folder.glob("*.jsonl"))[-1]
        with newest.open("ab") as file:
            file.write(b'{"n":')
        done["n"] = steps
        with pytest.raises(KeyboardInterrupt):
            Record(folder, 900).append("run")
        found = verify(folder)
        assert found.whole, found.problems
    done["n"] = 99
    Record(folder, 900).append("run")
    assert verify(folder).whole


def test_an_empty_newest_file_is_filled(folder):
    files = fill(folder)
    (folder / f"record-{len(files) + 1:06}.jsonl").touch()
    Record(folder, 900).append("run")
    found = verify(folder)
    assert found.whole, found.problems
    assert found.lines == 13


def test_a_failed_write_leaves_no_part_of_a_line(folder, monkeypatch):
    record = Record(folder)
    record.append("run")
    real = os.fsync
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(records.os, "fsync", full)
    with refuses("record.not-written", "No space left on device"):
        record.append("run")
    record.append("run")
    found = verify(folder)
    assert found.whole
    assert (found.lines, found.torn) == (2, 0)


def test_threads_and_processes_share_one_chain(folder):
    writers = [spawn(folder, f"process {i}", 40) for i in range(2)]
    record = Record(folder, 4000)

    def write(name: str) -> None:
        for i in range(40):
            record.append("run", writer=name, i=i)

    threads = [threading.Thread(target=write, args=(f"thread {i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    found = verify(folder)
    assert found.whole, found.problems
    assert found.lines == 200
    assert found.files > 2
    seen: dict[str, list[int]] = {}
    for *_, said in lines(folder):
        seen.setdefault(said["writer"], []).append(said["i"])
    assert all(order == list(range(40)) for order in seen.values())
    assert len(seen) == 5


def test_kill_9_loses_at_most_the_line_in_flight(folder):
    for round in range(3):
        writer = spawn(folder, f"round {round}", 100_000)
        said = [int(writer.stdout.readline()) for _ in range(7 + 5 * round)]
        writer.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        rest = [int(text) for text in writer.stdout.read().split() if text.strip()]
        writer.wait(60)
        written = max([*said, *rest])
        found = verify(folder)
        assert found.whole, found.problems
        assert found.head.n >= written, "a line whose append had returned is missing"
    Record(folder).append("run", writer="after")
    found = verify(folder)
    assert found.whole, found.problems


def test_the_command_says_in_one_line_what_is_wrong(folder, operator, capsys, caplog):
    files = fill(folder, key=operator)
    trusted = ["--keys", f"ours={operator.with_suffix('.pub')}"]
    assert cli.main(["record", "verify", str(folder), *trusted]) == 0
    said = capsys.readouterr().out
    assert "12 lines" in said
    assert "head signed by ours" in said
    assert cli.main(["record", "show", str(folder), "--last", "2"]) == 0
    assert [json.loads(line)["n"] for line in capsys.readouterr().out.splitlines()] == [11, 12]
    assert cli.main(["record", "show", str(folder), "--kind", "refused", "--last", "0"]) == 0
    assert capsys.readouterr().out == "\n"
    edit(files[0], lambda found: found[1:])
    assert cli.main(["record", "verify", str(folder), *trusted]) == 1
    assert len(caplog.messages) == 1
    assert "record-000001.jsonl line 1" in caplog.messages[0]
    assert cli.main(["record", "verify", str(folder.parent)]) == 1
    assert "holds no record" in caplog.messages[-1]


def test_refusals_are_counted_by_pack(folder: Path, capsys) -> None:
    record = Record(folder, 10_000)
    for pack, kind in (("packs.one", "Load"), ("packs.two", "Draw"), ("packs.two", "Draw")):
        record.append("refused", rule="guard.required", reason="x", type=kind, pack=pack)
    record.append("refused", rule="nodes.deny", reason="when it was queued", type="Draw")
    assert cli.main(["record", "packs", str(folder)]) == 0
    assert capsys.readouterr().out.split() == ["2", "packs.two", "Draw", "1", "packs.one", "Load"]
