"""The sentences of all errors, in one file: a better one is one edit in the source and one command.

    .run/check/bin/python -m pytest tests/unit/tools/test_messages.py --update-messages

writes the file, and its diff shows the sentence.
"""

from __future__ import annotations

import ast
import pickle
from collections import defaultdict
from pathlib import Path

import pytest
from modular_lora_guard.modular_lora.errors import GuardError, HandleError, LoraFileError, writing
from modular_lora_guard.operators.rules import RefusedError
from support import messages
from support.errors import refuses

TESTS = Path(__file__).resolve().parents[2]
SNAPSHOT = TESTS / "unit" / "snapshots" / "messages.txt"


@pytest.fixture(scope="module")
def found() -> list[messages.Message]:
    return messages.read()


def test_every_message_is_in_the_snapshot(found, request):
    """No error says anything else than was read when its sentence was last looked at."""
    text = messages.written(found)
    if request.config.getoption("--update-messages"):
        SNAPSHOT.parent.mkdir(exist_ok=True)
        SNAPSHOT.write_text(text, encoding="utf-8", newline="\n")
    kept, now = SNAPSHOT.read_text(encoding="utf-8").splitlines(), text.splitlines()
    changed = [f"- {line.strip()}" for line in kept if line not in now]
    changed += [f"+ {line.strip()}" for line in now if line not in kept]
    assert now == kept, "read these, then run this test with --update-messages:\n" + "\n".join(changed)


def test_a_code_is_of_one_class_and_well_formed(found):
    """A program that reads a code knows what it may catch; a subclass's codes begin with the subclass's own."""
    kinds, own = defaultdict(set), dict(messages.classes())
    for message in found:
        if message.code not in (messages.NO_CODE, messages.COMPUTED):
            kinds[message.code].add(message.kind)
            assert messages.WELL_FORMED.fullmatch(message.code), message.place
            start = own[message.kind]
            assert start in ("guard", message.code) or message.code.startswith(f"{start}."), message.place
    assert {code: names for code, names in kinds.items() if len(names) > 1} == {}


def test_a_code_is_a_text_that_stands_in_the_source():
    """So that a search for a code finds where it is raised."""
    computed = {"f'{kind.code}.not-written'", "f'{kind.code}.unreadable'", "f'{kind.code}.{found.code}'"}
    computed |= {"f'policy.{wrong.code}'", "f'refused.{rule}'", "code", "error.code", "found.code"}
    assert {ast.unparse(given) for given in messages.computed()} == computed


def test_codes_that_tests_name_exist(found):
    ends = ("not-written", "unreadable", "unknown-key", "missing-key", "wrong-value")  # of codes that are computed
    known = {message.code for message in found} | {f"{code}.{end}" for _, code in messages.classes() for end in ends}
    named = list(messages.named_in(TESTS))
    assert named
    assert [place for place in named if place[0] not in known and not place[0].startswith("refused.")] == []


def test_an_error_keeps_its_code():
    assert (GuardError("a").code, GuardError("a", code="run.short").code, LoraFileError("a").code) == (
        "guard",
        "run.short",
        "file",
    )
    assert str(GuardError("a: b", code="run.short")) == "a: b"
    assert RefusedError("base.allow", "a", "b").code == "refused.base.allow"
    assert HandleError("a").code == "handle"
    again = pickle.loads(pickle.dumps(LoraFileError("a", code="file.empty")))
    assert (again.code, str(again)) == ("file.empty", "a")


def test_a_file_that_cannot_be_written_keeps_the_class_in_its_code(tmp_path):
    with refuses("file.not-written", "x.txt"), writing("x.txt", LoraFileError):
        (tmp_path / "no such folder" / "x").write_text("")


def test_refuses_tells_codes_and_names_apart():
    """The helper of all other tests fails where the code is another one or a name is missing, and without an error."""
    with pytest.raises(AssertionError, match=r"file\.empty was expected, guard came"), refuses("file.empty"):
        raise GuardError("a")
    with pytest.raises(AssertionError, match="no code came"), refuses("file.empty"):
        raise ValueError("a")
    with pytest.raises(AssertionError, match="'c'"), refuses("guard", "a", "c"):
        raise GuardError("a, b")
    with pytest.raises(pytest.fail.Exception), refuses("guard"):
        pass
    with refuses("guard", "b") as caught:
        raise GuardError("a, b")
    assert str(caught.value) == "a, b"


def test_the_reader_finds_every_kind_of_message(tmp_path):
    """Against sentences that are written here."""
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate" / "x.py").write_text(
        "class GuardError(RuntimeError):\n    code: str = 'guard'\n"
        "class FileError(GuardError):\n    code = 'file'\n"
        "class OwnError(FileError):\n    def __init__(self, a):\n"
        "        super().__init__(f'own {a}', code='file.own')\n"
        "def f(a, kind):\n"
        "    raise GuardError(f'{a.name}: is {\"one\" if a else \"two\"} of {len(a)}, {a!r:.2}' + ' more\\n')\n"
        "    error = FileError(f'{a[0]}: {f(a).strip()}', code='file.gone')\n"
        "    raise kind('any')\n"
        "    raise ValueError(f'{a}')\n"
        "    what = f'the whole {a}'\n"
        "    raise FileError(f'{a}: {what}', code=kind)\n"
        "    raise OSError(f'bare {a}') from None\n",
        encoding="utf-8",
    )
    assert messages.written(messages.read(tmp_path)).splitlines() == [
        "(computed code) FileError",
        "    {a}: the whole {a}",
        "(no code) OSError",
        "    bare {a}",
        "(no code) kind",
        "    any",
        "file.gone FileError",
        "    {a[…]}: {strip(…)}",
        "file.own OwnError",
        "    own {a}",
        "guard GuardError",
        "    {a.name}: is {one | two} of {len(a)}, {a} more\\n",
    ]
