"""The operator's command line: keygen, sign, verify, digest, record, policy. Nothing here needs ComfyUI or a network.

Exit code 0 where all is as it should be, 1 with one line that says what is not. What takes long to import is imported
by the commands that need it: help and the record's lines come at once.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..modular_lora.command import finish, typed
from ..modular_lora.errors import GuardError
from ..modular_lora.provenance import keys, record
from ..modular_lora.util.terminal import open_to_all

if TYPE_CHECKING:
    from ..modular_lora.provenance.attested import Attested


def main(arguments: Sequence[str]) -> int:
    open_to_all()
    chosen = parser().parse_args(arguments)
    return finish(lambda: chosen.run(chosen), "nothing was changed")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=typed("operators"), description=__doc__, allow_abbrev=False)
    commands = made.add_subparsers(dest="command", required=True)
    one = _command(commands, "keygen", _keygen, "make a key: FILE is the private one, FILE.pub goes to who verifies")
    one.add_argument("file", type=Path, metavar="FILE", help="private key to write, for instance operator.pem")
    one = _command(commands, "sign", _sign, "sign a safety LoRA or a policy; writes FILE.sig")
    one.add_argument("file", type=Path, metavar="FILE")
    one.add_argument("--key", type=Path, required=True, help="private key")
    one.add_argument("--expires", type=_date, metavar="YYYY-MM-DD", help="last day of the signature (none)")
    one = _command(commands, "verify", _verify, "check FILE against FILE.sig, or an image against what it carries")
    one.add_argument("file", type=Path, metavar="FILE")
    _keys_argument(one)
    one.add_argument(
        "--certificates",
        type=Path,
        nargs="+",
        default=[],
        metavar="PEM",
        help="an image must carry Content Credentials that come from these roots; with signers' certificates in them, "
        "of these signers",
    )
    one.add_argument("--identity", help="keyless: who signed, for instance an e-mail address")
    one.add_argument("--issuer", help="keyless: who vouched for the identity, an OpenID Connect address")
    one.add_argument("--trust", type=Path, help="keyless: trust configuration of the Sigstore instance (else: network)")
    one = _command(commands, "digest", _digest, "SHA-256 of LoRA files and of their tensors, for a policy's [tasks]")
    one.add_argument("files", type=Path, nargs="+", metavar="FILE")
    _record_commands(commands.add_parser("record", help="check and show the record"))
    inner = commands.add_parser("policy", help="check a policy").add_subparsers(dest="what", required=True)
    one = _command(inner, "check", _check, "read a policy as the server would, and say what it sets")
    one.add_argument("file", type=Path, metavar="FILE")
    return made


def _record_commands(made: argparse.ArgumentParser) -> None:
    inner = made.add_subparsers(dest="what", required=True)
    one = _command(inner, "verify", _record_verify, "find lines that were changed, removed, reordered or cut off")
    one.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of several workers: the record of each")
    _keys_argument(one)
    one.add_argument(
        "--head", type=Path, nargs="+", default=[], metavar="COPY",
        help="a head.json copied earlier and kept elsewhere; of several records one each, in their order",
    )  # fmt: skip
    one = _command(inner, "show", _record_show, "lines of the record, one JSON object each; of several by their time")
    one.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    one.add_argument("--kind", choices=record.KINDS, help="only lines of this kind")
    one.add_argument("--last", type=_count, default=20, metavar="N", help="how many, from the end (20); 0 for all")
    one = _command(inner, "packs", _record_packs, "count refusals of nodes as they ran, by pack and node type")
    one.add_argument("folder", type=Path, metavar="FOLDER")


def _record_packs(chosen: argparse.Namespace) -> str:
    refused = [said for *_, said in record.lines(chosen.folder) if said.get("kind") == "refused" and said.get("pack")]
    counts = Counter((str(said["pack"]), str(said.get("type", ""))) for said in refused)
    lines = [f"{n}  {pack}  {kind}" for (pack, kind), n in counts.most_common()]
    return "\n".join(lines) or "no node was refused as it ran"


def _command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    made = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    made.set_defaults(run=run)
    return made


def _keys_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--keys", nargs="+", default=[], metavar="[NAME=]PUB", help="trusted public keys (name: the file's)"
    )


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2027-12-31") from error


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def _named(given: Sequence[str]) -> dict[str, Path]:
    """Trusted keys by name, of ``name=path`` or ``path``."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.rpartition("=")
        place = Path(path if equals else text)
        name = name if equals else place.stem
        if name in found:
            raise GuardError(f"--keys: two keys are called {name}: name them, as in {name}2={place}")
        found[name] = place
    return found


def _keygen(chosen: argparse.Namespace) -> str:
    public = keys.keygen(chosen.file)
    return f"{chosen.file}: private key, keep it to yourself\n{public}: public key"


def _sign(chosen: argparse.Namespace) -> str:
    from ..modular_lora.provenance import signing

    return str(signing.sign(chosen.file, chosen.key, expires=chosen.expires))


def _verify(chosen: argparse.Namespace) -> str:
    from ..modular_lora.provenance import attested, signing

    if chosen.identity or chosen.issuer:
        if not (chosen.identity and chosen.issuer):
            raise GuardError("verify: --identity and --issuer are needed together: name both")
        who = signing.verify_keyless(chosen.file, chosen.identity, chosen.issuer, chosen.trust)
        return f"{chosen.file.name}: signed by {who}"
    if not chosen.keys and not chosen.certificates:
        raise GuardError("verify: no key is trusted: name public keys with --keys, or certificates with --certificates")
    trusted = _named(chosen.keys)
    if chosen.file.suffix.lower() in attested.MIMES:
        return _image(chosen.file, attested.verify(chosen.file, trusted, chosen.certificates))
    if chosen.certificates:
        raise GuardError(f"{chosen.file.name}: no image that has Content Credentials: leave --certificates out")
    return f"{chosen.file.name}: signed by {signing.verify(chosen.file, trusted)}"


def _image(path: Path, found: Attested) -> str:
    """What is said of an image whose signatures hold."""
    status = found.record.get("status", "")
    signed = [f"signed by {found.key}"] * bool(found.key)
    if found.credentials is not None:
        unchecked = ", whose certificate --certificates did not name" * (not found.credentials.trusted)
        unchecked += ", which has ended" * found.credentials.ended
        inputs = f", of {found.credentials.inputs} inputs" * bool(found.credentials.inputs)
        signed.append(f"Content Credentials of {found.credentials.signer}{unchecked}{inputs}")
    elif found.holds_credentials:
        from ..modular_lora.provenance.credentials import PACKAGE

        signed.append(f"Content Credentials not looked at: pip install {PACKAGE}")
    said = ", ".join(signed)
    if not str(status).startswith("guarded"):
        raise GuardError(f"{path.name}: {said}, and what is signed reads: {status}")
    return f"{path.name}: {status}, {said}\n{json.dumps(found.record, indent=1, sort_keys=True)}"


def _digest(chosen: argparse.Namespace) -> str:
    from ..modular_lora.files.reader import read_lora

    found = [(path, read_lora(path)) for path in chosen.files]
    return "\n".join(f"{path}\n  file    {lora.sha256}\n  tensors {lora.values_sha256}" for path, lora in found)


def _record_verify(chosen: argparse.Namespace) -> str:
    if chosen.head and len(chosen.head) != len(chosen.folders):
        raise GuardError(
            f"--head: {len(chosen.head)} copies for {len(chosen.folders)} records: give one for each, in their order"
        )
    trusted = _named(chosen.keys)
    said, broken = [], []
    for folder, head in zip(chosen.folders, chosen.head or [None] * len(chosen.folders), strict=True):
        place = f"{folder}: " * (len(chosen.folders) > 1)
        try:
            found = record.verify(folder, trusted, earlier=head)
        except record.RecordError as error:
            broken.append(str(error))
            continue
        if found.whole:
            said += [f"{place}{line}" for line in _whole(found)]
        else:
            broken.append(f"{place}record is not whole: " + "; ".join(found.problems))
    if broken:
        raise GuardError("; ".join(broken))
    return "\n".join(said)


def _whole(found: record.Verified) -> list[str]:
    said = [f"{found.lines} lines in {found.files} files, whole; last is number {found.head.n}, {found.head.sha256}"]
    if found.sealed_by:
        said.append(f"head signed by {found.sealed_by}")
    if found.torn:
        said.append(f"{found.torn} torn lines were put aside after a crash")
    return [*said, *found.notes]


def _record_show(chosen: argparse.Namespace) -> str:
    several = len(chosen.folders) > 1
    found = [
        ({"record": str(folder), **said} if several else said)
        for folder in chosen.folders
        for *_, said in record.lines(folder)
        if chosen.kind in (None, said.get("kind"))
    ]
    if several:
        found.sort(key=lambda said: str(said.get("time")))
    return "\n".join(json.dumps(said) for said in found[-chosen.last :])


def _check(chosen: argparse.Namespace) -> str:
    from ..modular_lora.provenance import credentials
    from . import policy

    found = policy.load(chosen.file)
    if found is None:
        raise GuardError(f"{chosen.file}: no such policy: check the path")
    keys.public_keys(found.key_paths())
    if found.signing_key is not None:
        keys.private_key(found.signing_key)
    signer = None
    if found.credential_files is not None:
        signer = credentials.signer(*found.credential_files)
        credentials.trial(signer)
    for said in filter(None, (found.monitor.token, found.webhook.secret)):
        if not said.startswith(policy.VARIABLE):  # variables are the server's
            found.secret(said)
    required = ", ".join(one.name for one in found.guard.required) or "no safety LoRA"
    return "\n".join(
        [
            f"{chosen.file}: a policy, SHA-256 {found.sha256}",
            f"signed: {'yes' if found.signed else f'no; it is asked for where {policy.TRUSTED} lies beside it'}",
            f"every sampling must carry: {required}",
            f"put onto every model: {'yes' if found.attaches else 'no, graphs must do it'}",
            f"tenants: {f'named by {found.tenants.header}' if found.tenants.header else 'not told apart'}",
            f"refusals are sent to: {found.webhook.url or 'nobody'}",
            f"record: {found.record_folder}, head and attestations {'signed' if found.signing_key else 'not signed'}",
            f"Content Credentials: {f'of {signer.name}, to the end of {signer.until}' if signer else 'none'}",
        ]
    )
