"""The options of run.py's commands before anything is installed: help at once, and a wrong option refused at once.

The parsers of ``lora``, ``audit``, ``operator`` and of the evidence stand in modules that need PyTorch and pydantic.
What they take is written down in ``usage.json`` beside this file (``python -m tools.usage`` writes it anew), and a test
compares every help text that is made of it with the command's own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("usage.json")
TYPES: dict[str, type] = {"int": int, "float": float}  # others are left to the command itself
ACTIONS: dict[str, Any] = {
    "store_true": argparse._StoreTrueAction,
    "append": argparse._AppendAction,
    "boolean": argparse.BooleanOptionalAction,
    "store": argparse._StoreAction,
}
EPILOG = "run.py's own: --bundled (ignore COMFYUI_PATH and comfy-cli), --comfyui-git REF (ComfyUI at that tag)"
BUILT_IN = ("positional arguments", "options")  # argparse's own groups

Json = dict[str, Any]


def described(parser: argparse.ArgumentParser) -> Json:
    """What a parser takes and says, with all of its commands."""
    said: Json = {"description": parser.description, "allow_abbrev": parser.allow_abbrev, "groups": [], "arguments": []}
    group_of = {id(action): group for group in parser._action_groups for action in group._group_actions}
    said["groups"] = [[one.title, one.description] for one in parser._action_groups if one.title not in BUILT_IN]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {one.dest: one.help for one in action._choices_actions}
            said["commands"] = {
                "dest": action.dest,
                "parsers": {name: {"help": helps[name], **described(one)} for name, one in action.choices.items()},
            }
        elif not isinstance(action, argparse._HelpAction):
            said["arguments"].append({**_argument(action), "group": group_of[id(action)].title})
    return said


def _argument(action: argparse.Action) -> Json:
    kind = next(name for name, cls in ACTIONS.items() if type(action) is cls)
    flags = [flag for flag in action.option_strings if not (kind == "boolean" and flag.startswith("--no-"))]
    found = {
        "flags": flags or [action.dest],
        "action": kind,
        "nargs": action.nargs if kind in ("store", "append") else None,
        "choices": list(action.choices) if action.choices else None,
        "type": getattr(action.type, "__name__", None) if action.type in TYPES.values() else None,
        "metavar": action.metavar,
        "required": action.required if flags else None,
        "help": action.help,
    }
    return {name: value for name, value in found.items() if value is not None}


def built(said: Json, prog: str) -> argparse.ArgumentParser:
    """A parser with the help of the described one, which takes what that one takes."""
    made = argparse.ArgumentParser(prog=prog, description=said["description"], allow_abbrev=said["allow_abbrev"])
    _fill(made, said)
    return made


def _fill(parser: argparse.ArgumentParser, said: Json) -> None:
    groups: dict[str, Any] = {title: parser.add_argument_group(title, about) for title, about in said["groups"]}
    for one in said["arguments"]:
        given = {name: value for name, value in one.items() if name not in ("flags", "action", "group", "type")}
        if one["action"] == "boolean":
            given |= {"action": argparse.BooleanOptionalAction, "default": argparse.SUPPRESS}
        elif one["action"] != "store":
            given["action"] = one["action"]
        if "type" in one:
            given["type"] = TYPES[one["type"]]
        groups.get(one["group"], parser).add_argument(*one["flags"], **given)
    if commands := said.get("commands"):
        inner = parser.add_subparsers(dest=commands["dest"], required=True)
        for name, about in commands["parsers"].items():
            texts = {key: about[key] for key in ("help", "description", "allow_abbrev")}
            _fill(inner.add_parser(name, **texts), about)


def check(command: str, rest: Sequence[str]) -> None:
    """End the process for a command's help, and for what it cannot mean."""
    parser = parser_of(command)
    parsed, unknown = parser.parse_known_args(rest)
    if unknown and getattr(parsed, "engine", None) != "kohya":  # what sd-scripts takes is known to it alone
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def parser_of(command: str) -> argparse.ArgumentParser:
    """Of a command of run.py that has a command line of its own."""
    made = built(json.loads(FILE.read_text(encoding="utf-8"))[command], f"run.py {command}")
    made.epilog = EPILOG
    return made
