"""The policy file: every key, errors that name line and key, reading it again, and the key that must have signed it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.gate.settings import ACTIONS
from modular_lora_guard.modular_lora.provenance import keys, signing
from modular_lora_guard.operators import lines
from modular_lora_guard.operators.policy import FILE, TRUSTED, OperatorPolicy, PolicyError, Tables, Watched, load, parse
from support.errors import refuses

A, B = "a" * 64, "b" * 64
EMPTY = "[guard]\nrequired = []\n"
WHOLE = f"""
[guard]
required = [
  {{sha256 = "{A.upper()}", min_net_strength = 0.9}},
  {{signed_by = "team"}},
]
interference_is_error = true
contamination_is_error = true

[tasks]
allow = ["{A}", "{B}"]
deny = ["{B}"]

[open]
guarded_as_model = true
audit = true
training = true
unattested = true

[gate]
required = true
thresholds = {{FACE = 0.45}}
actions = ["blur", "block"]

[nodes]
allow = ["KSampler"]
deny = ["PreviewImage"]
sampling = ["KSampler"]
patching = ["FreeU_V2"]

[record]
folder = "elsewhere"
prompts = true
max_bytes = 100000
signing_key = "host.pem"

[keys]
team = "keys/team.pub"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / FILE


def said_of(content: bytes) -> str:
    try:
        assert isinstance(parse(content, Path(FILE)), OperatorPolicy)
    except PolicyError as error:
        return str(error)
    return f"{FILE} is one"


def error(text: str | bytes) -> str:
    """What is said of a policy that is none."""
    with pytest.raises(PolicyError) as caught:
        parse(text.encode() if isinstance(text, str) else text, Path(FILE))
    assert "\n" not in str(caught.value).strip()
    return str(caught.value)


def test_every_key_is_read(place: Path) -> None:
    place.write_text(WHOLE, encoding="utf-8")
    policy = load(place)
    first, second = policy.guard.required
    assert (first.sha256, first.min_net_strength) == (A, 0.9)
    assert (second.signed_by, second.min_net_strength) == ("team", 0.5)
    assert policy.guard.interference_is_error
    assert policy.guard.contamination_is_error
    assert policy.tasks.allow == (A, B)
    assert policy.tasks.deny == (B,)
    assert all(vars(policy.open).values())
    assert (policy.gate.required, policy.gate.thresholds, policy.gate.allowed) == (
        True,
        {"FACE": 0.45},
        ("blur", "block"),
    )
    assert (policy.nodes.allow, policy.nodes.deny) == (("KSampler",), ("PreviewImage",))
    assert (policy.nodes.sampling, policy.nodes.patching) == (("KSampler",), ("FreeU_V2",))
    assert policy.record_folder == place.parent / "elsewhere"
    assert policy.record.prompts
    assert policy.record.max_bytes == 100_000
    assert policy.signing_key == place.parent / "host.pem"
    assert policy.key_paths() == {"team": place.parent / "keys" / "team.pub"}
    assert not policy.signed


def test_what_a_policy_does_not_open_is_closed() -> None:
    policy = parse(EMPTY.encode(), Path(FILE))
    assert not any(vars(policy.open).values())
    assert policy.tasks.allow is policy.nodes.allow is None
    assert policy.nodes.sampling == policy.nodes.patching == ()
    assert policy.gate.allowed == ACTIONS
    assert "report" not in parse(f"{EMPTY}[gate]\nrequired = true".encode(), Path(FILE)).gate.allowed


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        ("", 1, "guard", "is missing"),
        ("[open]\naudit = true", 1, "guard", "is missing"),
        ("[guard]\ninterference_is_error = true", 1, "guard.required", "is missing"),
        ("[guard]\n\nrequierd = []", 3, "guard.requierd", "did you mean required?"),
        (f"{EMPTY}[nodse]\ndeny = []", 3, "nodse", "did you mean nodes?"),
        ("guard = 1", 1, "guard", "must be a table"),
        ("[guard]\nrequired = true", 2, "guard.required", "must be a list"),
        ("[guard]\nrequired = [\n  true,\n]", 3, "guard.required[0]", "must be a table"),
        ("[guard]\nrequired = [\n  {},\n]", 3, "guard.required[0]", "either sha256 or signed_by"),
        (f'[guard]\nrequired = [\n  {{sha256 = "{A}"}}, # a "comment", {{\n  {{sha256 = "12"}},\n]', 4,
         "guard.required[1].sha256", "64 hexadecimal digits"),
        (f'[[guard.required]]\nsha256 = "{A}"\n[[guard.required]]\nsha256 = "{B}"\nmin_net_strength = -1', 5,
         "guard.required[1].min_net_strength", "must be at least 0, not -1: correct it."),
        (f'[guard]\nrequired = [{{sha256 = "{A}", min_net_strength = nan}}]', 2,
         "guard.required[0].min_net_strength", "must be a finite number, not nan"),
        (f'[guard]\nrequired = [{{sha256 = "{A}", min_net_strength = 10.5}}]', 2,
         "guard.required[0].min_net_strength", "must be at most 10, not 10.5: correct it."),
        (f'[guard]\nrequired = [{{sha256 = "{A}", min_net_strength = true}}]', 2,
         "guard.required[0].min_net_strength", "a number"),
        ('[guard]\nrequired = [{signed_by = "me"}]\n[keys]\nyou = "x"', 2,
         "guard.required[0].signed_by", "[keys]: you"),
        (f'[guard]\nrequired = [{{sha256 = "{A}", signed_by = "you"}}]\n[keys]\nyou = "x"', 2,
         "guard.required[0]", "one of the two"),
        (f"{EMPTY}[open]\naudit = 1", 4, "open.audit", "must be true or false"),
        (f"{EMPTY}open.audit = 'yes'", 3, "guard.open", "does not exist: known here: required, "),
        (f"open.audit = 'yes'\n{EMPTY}", 1, "open.audit", "must be true or false"),
        (f'{EMPTY}[tasks]\nallow = ["{A}",\n"x"]', 5, "tasks.allow[1]", "64 hexadecimal digits"),
        (f'{EMPTY}[nodes]\ndeny = ["A",\n\n 3]', 6, "nodes.deny[1]", "a text in quotes"),
        (f'{EMPTY}[nodes]\nsampling = [""]', 4, "nodes.sampling[0]", "a text in quotes"),
        (f"{EMPTY}[gate.thresholds]\nA = 0.5\n'B C' = 2", 5, "gate.thresholds.B C", "must be at most 1, not 2"),
        (f"{EMPTY}[gate.thresholds]\nA = 0", 4, "gate.thresholds.A", "must be at least 0.001, not 0"),
        (f"{EMPTY}[gate]\nthresholds = 0.5", 4, "gate.thresholds", "must be a table"),
        (f'{EMPTY}[gate]\nactions = ["blur",\n"no"]', 5, "gate.actions[1]", "must be 'report', 'blur', 'pixelate'"),
        (f"{EMPTY}[record]\nmax_bytes = 1000", 4, "record.max_bytes", "at least 65536"),
        (f"{EMPTY}[keys]\nme = 3", 4, "keys.me", "a text in quotes"),
    ],
)  # fmt: skip
def test_an_error_names_file_line_key_and_what_is_allowed(text: str, line: int, key: str, words: str) -> None:
    said = error(text)
    assert said.startswith(f"{FILE}: line {line}, {key} ")
    assert words in said


def keys_of(table: type, place: str = "") -> Iterator[tuple[str, object]]:
    """Every key that a policy may hold, with its type."""
    for key, hint in get_type_hints(table).items():
        if is_dataclass(hint):
            yield from keys_of(hint, f"{place}{key}.")
        else:
            yield place + key, hint


@pytest.mark.parametrize(("key", "hint"), list(keys_of(Tables)))
def test_no_value_of_another_type_is_turned_into_one_that_fits(key: str, hint: object) -> None:
    text = "" if key.startswith("guard.required") else "guard.required = []\n"
    wrong = ["1979-05-27", "'true'", "'1'", "1e999"] if hint is not str else ["1979-05-27", "1", "true", "['a']"]
    wrong += {bool: ["1", "0", "1.0"], float: ["true"], int: ["true", "65536.0"]}.get(hint, [])
    for value in wrong:
        assert f"{key} must be " in error(f"{text}{key} = {value}\n")


@pytest.mark.parametrize("content", [b"[guard\n", b"\xff\xfe", b"a = 1\na = 2", b"[" * 5000, b'{"audit": true}'])
def test_what_is_no_toml_is_refused_with_its_place(content: bytes) -> None:
    with refuses("policy.toml", FILE):
        parse(content, Path(FILE))


def test_a_byte_order_mark_and_windows_line_ends_are_taken() -> None:
    assert parse(b"\xef\xbb\xbf" + EMPTY.replace("\n", "\r\n").encode(), Path(FILE)) == parse(
        EMPTY.encode(), Path(FILE)
    )


@given(st.binary(max_size=300))
def test_any_bytes_are_a_policy_or_an_error_of_ours(content: bytes) -> None:
    assert said_of(content).startswith(FILE)


VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(-9, 9), st.floats(), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [("guard", "required"), ("gate", "thresholds"), ("nodes", "deny"), ("open", "audit"), ("x", "y")]
)


@given(KEYS, VALUES)
def test_any_value_anywhere_is_a_policy_or_an_error_that_names_the_key(key: tuple[str, str], value: object) -> None:
    text = f"[{key[0]}]\n{key[1]} = {toml(value)}\n" + (EMPTY if key[0] != "guard" else "")
    said = said_of(text.encode())
    assert said == f"{FILE} is one" or re.match(rf"{FILE}: (line [12], {key[0]}|cannot be read as TOML)", said)


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(k)} = {toml(v)}' for k, v in value.items())}}}"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(c):08x}" for c in value if not 0xD800 <= ord(c) < 0xE000) + '"'
    return repr(value)


@pytest.mark.parametrize("key", ["[", "\\u005b"])
def test_the_line_of_a_key_is_found_however_it_is_written(key: str) -> None:
    said = said_of(f'[gate]\nthresholds = {{"{key}" = false}}\n[guard]\nrequired = []\n'.encode())
    assert said.startswith(f"{FILE}: line 2, gate.thresholds.[ ")


@given(st.lists(st.sampled_from("abcdef"), unique=True, min_size=1), st.integers(0, 3))
def test_the_line_of_a_key_is_the_line_that_it_stands_in(names: list[str], blank: int) -> None:
    rows = ["# a = 1", "[table]"] + ["" for _ in range(blank)] + [f"{name} = [1, 2]" for name in names]
    for name in names:
        assert lines.line_of("\n".join(rows), ("table", name, 1)) == rows.index(f"{name} = [1, 2]") + 1


def test_no_file_is_no_policy(place: Path) -> None:
    assert load(place) is None
    assert load(place.parent / "no folder" / FILE) is None
    assert Watched(place).current() is None


@pytest.mark.parametrize("what", ["a link to nowhere", "a folder", "a link to itself"])
def test_what_lies_there_and_cannot_be_read_is_an_error_and_not_no_policy(what: str, place: Path) -> None:
    if what == "a folder":
        place.mkdir()
    else:
        place.symlink_to(place if "itself" in what else place.parent / "gone")
    with refuses("policy.unreadable", place):
        load(place)
    with pytest.raises(PolicyError):
        Watched(place).current()


def test_a_policy_of_a_mebibyte_is_refused(place: Path) -> None:
    place.write_bytes(EMPTY.encode() + b"#" * (1 << 20))
    with refuses("policy.too-long", place):
        load(place)


def test_a_policy_is_read_once_and_again_when_it_changes(place: Path) -> None:
    watched = Watched(place)
    place.write_text(EMPTY, encoding="utf-8")
    first = watched.current()
    assert watched.current() is first
    before = place.stat()
    place.write_text(EMPTY.replace("[]", "  ")[:-1] + "\n", encoding="utf-8")  # the same size, broken
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with refuses("policy.toml", place):
            watched.current()
    place.write_text(WHOLE, encoding="utf-8")
    assert watched.current().record.prompts
    place.unlink()
    assert watched.current() is None


def test_a_changed_key_changes_the_state_that_caches_hang_on(place: Path) -> None:
    watched = Watched(place)
    place.write_text(WHOLE, encoding="utf-8")
    first = watched.current()
    key = place.parent / "keys" / "team.pub"
    key.parent.mkdir()
    key.write_text("a key", encoding="utf-8")
    second = watched.current()
    assert first.sha256 == second.sha256
    assert first.state != second.state
    assert watched.current() is second


@pytest.fixture
def signed(place: Path) -> Path:
    """The private key; its public key is the one that must have signed the policy."""
    private = place.parent / "host.pem"
    (place.parent / TRUSTED).parent.mkdir()
    keys.keygen(private)
    private.with_suffix(".pub").rename(place.parent / TRUSTED)
    return private


def test_with_a_trusted_key_only_a_signed_policy_counts_and_none_is_an_error(place: Path, signed: Path) -> None:
    watched = Watched(place)
    with refuses("policy.missing"):
        watched.current()
    place.write_text(EMPTY, encoding="utf-8")
    with refuses("policy.signature"):
        watched.current()
    signing.sign(place, signed)
    assert watched.current().signed
    place.write_text(EMPTY + "# more\n", encoding="utf-8")
    with refuses("policy.signature"):
        watched.current()


def test_a_policy_signed_by_another_key_is_refused(place: Path, signed: Path, tmp_path: Path) -> None:
    place.write_text(EMPTY, encoding="utf-8")
    keys.keygen(tmp_path / "other.pem")
    signing.sign(place, tmp_path / "other.pem")
    with refuses("policy.signature"):
        load(place)


def test_bases_are_named_by_the_sha256_of_their_files():
    text = '[guard]\nrequired = []\n[base]\nallow = ["' + "A" * 64 + '"]\n'
    assert parse(text.encode(), Path(FILE)).base.allow == ("a" * 64,)
    assert parse(b"[guard]\nrequired = []\n", Path(FILE)).base.allow is None
    with refuses("policy.wrong-value", "base.allow[0]"):
        parse(text.replace("A" * 64, "A").encode(), Path(FILE))


@pytest.mark.parametrize(
    ("acted", "measured", "refused"),
    [({A: 0.8}, 2, False), ({A: 0.4}, 2, True), ({A: None}, 2, False), ({}, 0, True), ({A: float("nan")}, 2, True)],
)
def test_what_was_left_as_it_acted_is_asked_for_after_a_run(acted, measured, refused):
    from modular_lora_guard.modular_lora.provenance.attestation import Attestation, LoraRecord
    from modular_lora_guard.operators.rules import RefusedError, check_run

    lora = LoraRecord("safety", "s.safetensors", A, 1.0, 1.0)
    run = Attestation("not sampled", "pack", "SD15", "0" * 64, False, (lora,), {A: 1.0})
    policy = parse(f'[guard]\nrequired = [{{sha256 = "{A}"}}]'.encode(), Path(FILE))
    check_run(policy, run, lambda *_: "")  # before it: nothing is known yet
    run = run.of(status="guarded", evaluations=4, acted_strength=acted, measured_evaluations=measured)
    if refused:
        with pytest.raises(RefusedError) as error:
            check_run(policy, run, lambda *_: "")
        assert error.value.rule == "guard.required"
    else:
        check_run(policy, run, lambda *_: "")


@pytest.mark.parametrize(
    ("acts", "named", "refused"),
    [("", "", False), ("", "metadata", False), ("metadata", "", True), ("metadata", "tensors", True),
     ("metadata", "metadata", False)],
)  # fmt: skip
def test_of_two_scales_the_one_that_the_policy_names_must_act(acts, named, refused):
    from modular_lora_guard.modular_lora.provenance.attestation import Attestation, LoraRecord
    from modular_lora_guard.operators.rules import RefusedError, check_run

    lora = LoraRecord("safety", "s.safetensors", A, 1.0, 1.0, scale=acts)
    run = Attestation("not sampled", "pack", "SD15", "0" * 64, False, (lora,), {A: 1.0})
    policy = parse(f'[guard]\nrequired = [{{sha256 = "{A}", scale = "{named}"}}]'.encode(), Path(FILE))
    if refused:
        with pytest.raises(RefusedError):
            check_run(policy, run, lambda *_: "")
    else:
        check_run(policy, run, lambda *_: "")


@pytest.mark.parametrize(("asked", "refused"), [("", False), ("safety first", True), ("sum", False)])
def test_the_way_in_which_loras_are_put_together_is_the_one_that_is_asked_for(asked, refused):
    from modular_lora_guard.modular_lora.provenance.attestation import Attestation
    from modular_lora_guard.operators.rules import RefusedError, check_run

    run = Attestation("not sampled", "pack", "SD15", "0" * 64, False, (), {})
    policy = parse(f'[guard]\nrequired = []\ncombine = "{asked}"'.encode(), Path(FILE))
    if not refused:
        return check_run(policy, run, lambda *_: "")
    with pytest.raises(RefusedError) as error:
        check_run(policy, run, lambda *_: "")
    assert error.value.rule == "guard.combine"
    return check_run(policy, run.of(combine=asked), lambda *_: "")
