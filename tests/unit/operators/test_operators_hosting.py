"""The policy of a host: from a mounted file or a variable, secrets, tenants, the record of one worker among several."""

from __future__ import annotations

import re
import socket
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.gate.gate import Second
from modular_lora_guard.gate.settings import ACTIVITIES, Settings
from modular_lora_guard.modular_lora.provenance.record import Record
from modular_lora_guard.operators import cli
from modular_lora_guard.operators.policy import (
    FILE,
    WORKER_VARIABLE,
    OperatorPolicy,
    Watched,
    load,
    load_text,
    parse,
    worker,
)
from modular_lora_guard.operators.rules import check_gate, task_refused, tightened
from support.errors import refuses
from support.told_detector import Told

A, B, C = "a" * 64, "b" * 64, "c" * 64
EMPTY = "[guard]\nrequired = []\n"


def of(*more: str) -> OperatorPolicy:
    return parse("\n".join((EMPTY, *more)).encode(), Path(FILE))


TENANTS = f'[tenants]\nheader = "X-Tenant"\nproxies = ["10.0.0.2", "fd00::/8"]\nloras = {{acme = ["{A}"], shop = []}}'


@pytest.mark.parametrize(
    ("tenant", "shared", "allowed"),
    [
        ("acme", "", {A}),
        ("shop", "", set()),
        ("nobody's", "", set()),
        ("acme", f'[tasks]\nallow = ["{B}"]', {A, B}),
        ("shop", f'[tasks]\nallow = ["{B}"]', {B}),
        ("acme", f'[tasks]\ndeny = ["{A}"]', set()),
    ],
)
def test_a_tenant_may_use_its_own_task_loras_and_everybodys(tenant: str, shared: str, allowed: set[str]) -> None:
    own = of(TENANTS, shared).for_tenant(tenant)
    found = {sha for sha in (A, B, C) if task_refused(own, "x", sha, lambda: "") is None}
    assert (found, own.tenant) == (allowed, tenant)


def test_without_loras_of_their_own_all_tenants_have_the_same_rules() -> None:
    plain = TENANTS.partition("loras")[0]
    assert of(plain).for_tenant("acme").tasks.allow is None


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ('[tenants]\nheader = "X-Tenant"', "proxies"),
        ('[tenants]\nproxies = ["10.0.0.2"]', "header"),
        (f'[tenants]\nloras = {{acme = ["{A}"]}}', "header"),
        ('[tenants]\nheader = "X Tenant"\nproxies = ["10.0.0.2"]', "tenants.header"),
        ('[tenants]\nheader = "X-Tenant"\nproxies = ["10.0.0.1/8"]', "tenants.proxies[0]"),
        ('[webhook]\nurl = "https://a.example"', "secret"),
        ('[webhook]\nsecret = "a"', "url"),
        ('[webhook]\nurl = "file:///etc/passwd"\nsecret = "a"', "webhook.url"),
        ('[webhook]\nurl = "https://user:word@a.example"\nsecret = "a"', "webhook.url"),
        ('[webhook]\nurl = "https://a.example:99999"\nsecret = "a"', "webhook.url"),
        ("[monitor]\nready_seconds = 0", "monitor.ready_seconds"),
    ],
)
def test_half_a_table_or_a_wrong_value_is_named(table: str, named: str) -> None:
    with refuses("policy.wrong-value", named):
        of(table)


def test_a_secret_is_a_file_or_a_variable_and_not_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("0123456789abcdef\n", encoding="utf-8")
    monkeypatch.setenv("TOKEN", " fedcba9876543210 ")
    policy = load_text(EMPTY, tmp_path / FILE)
    assert policy.secret("token") == b"0123456789abcdef"
    assert policy.secret("env:TOKEN") == b"fedcba9876543210"
    (tmp_path / "token").write_text("short", encoding="utf-8")
    for said in ("token", "gone", "env:GONE", "."):
        with refuses("policy.secret"):
            policy.secret(said)


def test_a_mounted_policy_must_be_there_and_its_record_stays_at_home(tmp_path: Path) -> None:
    mounted, home = tmp_path / "etc" / "mine.toml", tmp_path / "home"
    read = partial(load, home=home)
    with refuses("policy.missing", "mine.toml"):
        read(mounted)
    mounted.parent.mkdir()
    mounted.write_text(EMPTY + '[keys]\nteam = "team.pub"', encoding="utf-8")
    policy = read(mounted)
    assert policy is not None
    assert policy.record_folder == home / "record"
    assert policy.key_paths() == {"team": mounted.parent / "team.pub"}
    watched = Watched(mounted, read)
    assert watched.current() is not None
    mounted.unlink()
    with refuses("policy.missing"):
        watched.current()


def test_a_policy_in_a_variable_cannot_pass_for_a_signed_one(tmp_path: Path) -> None:
    name = tmp_path / "MODULAR_LORA_POLICY"
    watched = Watched(name, partial(load_text, EMPTY))
    found = watched.current()
    assert found is not None
    assert not found.signed
    with refuses("policy.toml"):
        load_text("[guard", name)
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "policy.pub").write_text("a key", encoding="utf-8")
    with refuses("policy.signature", "MODULAR_LORA_POLICY"):
        watched.current()


@given(st.text(max_size=70))
def test_a_workers_name_is_one_folder_below_the_record(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        try:
            patch.setenv(WORKER_VARIABLE, name)
        except (ValueError, UnicodeEncodeError):
            return  # no environment holds it
        if not name:
            assert worker() == socket.gethostname()
        elif re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name):
            policy = of('[record]\nfolder = "of/{worker}"')
            assert policy.record_folder == Path("of") / name
        else:
            with refuses("policy.worker"):
                load_text(EMPTY + '[record]\nfolder = "of/{worker}"', Path(FILE))


@pytest.mark.parametrize(
    ("table", "threshold", "code"),
    [
        ("", 0.5, ""),
        ("[gate]\nrequired = true", 0.5, "refused.gate.confirm"),
        ("[gate]\nthresholds = {a = 0.5}", 0.5, "refused.gate.confirm"),
        ("[gate]\nrequired = true\nconfirm = {b = 0.5}", 0.5, ""),
        ("[gate]\nrequired = true\nconfirm = {b = 0.5}", 0.6, "refused.gate.confirm"),
        ("[gate]\nrequired = true\nconfirm = {c = 0.5}", 0.5, "refused.gate.confirm"),
    ],
)
def test_a_second_detector_decides_only_as_the_policy_says(table: str, threshold: float, code: str) -> None:
    gate = of(table).gate
    second = Second(Told([]), Settings({"b": threshold}))
    if not code:
        check_gate(gate, Settings({"a": 0.5}), Told([]), second)
        return
    with refuses(code):
        check_gate(gate, Settings({"a": 0.5}), Told([]), second)


@pytest.mark.parametrize("least", ACTIVITIES)
@pytest.mark.parametrize("set_to", ACTIVITIES)
def test_a_gate_takes_prompts_about_the_concept_at_least_as_the_policy_says(least: str, set_to: str) -> None:
    gate, settings = of(f'[gate]\nactivity = "{least}"').gate, Settings({"a": 0.5}, activity=set_to)
    if ACTIVITIES.index(set_to) < ACTIVITIES.index(least):
        with refuses("refused.gate.activity", set_to, least):
            check_gate(gate, settings, Told([]))
    else:
        check_gate(gate, settings, Told([]))
    check_gate(gate, made := tightened(gate, settings, Told([])), Told([]))
    assert made.activity == max(least, set_to, key=ACTIVITIES.index)


def test_records_of_several_workers_are_verified_and_shown_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    places = [tmp_path / name for name in ("one", "two")]
    for n in range(4):
        Record(places[n % 2]).append("run", turn=n)
    named = list(map(str, places))
    assert cli.main(["record", "verify", *named]) == 0
    assert [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()] == [
        name for name in named for _ in range(2)
    ]
    assert cli.main(["record", "show", *named, "--last", "3"]) == 0
    assert [f'"turn": {n}' in line for n, line in enumerate(capsys.readouterr().out.splitlines(), 1)] == [True] * 3
    heads = [str(place / "head.json") for place in places]
    assert cli.main(["record", "verify", *named, "--head", *heads]) == 0
    assert cli.main(["record", "verify", *named, "--head", *reversed(heads)]) == 1
    assert cli.main(["record", "verify", *named, "--head", heads[0]]) == 1
    assert "1 copies for 2 records" in caplog.messages[-1]
    (file,) = places[1].glob("*.jsonl")
    file.write_bytes(file.read_bytes().replace(b'"turn":1', b'"turn":9'))
    assert cli.main(["record", "verify", *named, str(tmp_path / "gone")]) == 1
    assert named[1] in caplog.messages[-1]
    assert "gone" in caplog.messages[-1]
    assert f"{named[0]}:" not in caplog.messages[-1]


def test_policy_check_reads_secrets_that_are_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / FILE
    path.write_text(f'{EMPTY}[monitor]\ntoken = "token"\n[webhook]\nurl = "https://a.example"\nsecret = "env:GONE"\n')
    assert cli.main(["policy", "check", str(path)]) == 1
    (tmp_path / "token").write_text("0123456789abcdef", encoding="utf-8")
    assert cli.main(["policy", "check", str(path)]) == 0
    assert "https://a.example" in capsys.readouterr().out
