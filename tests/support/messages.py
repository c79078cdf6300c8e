"""Every message of the pack's errors, read from the source: the code, the class and the sentence with its placeholders.

`tests/unit/tools/test_messages.py` compares them with `tests/unit/snapshots/messages.txt`.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("modular_lora", "operators", "gate", "audit", "training", "comfy_host", "nodes", "tools")
COMPUTED = "(computed code)"  # made of the class's own where the error is raised
PART = "Problem"  # modular_lora/validation.py: sentences that an error is made of later
NAMING = {"refuses": 0, "stopped": 2}  # helper of the tests -> which of its arguments is a code
NO_CODE = "(no code)"  # an error of Python's own classes, which our callers catch or nobody tells apart
WELL_FORMED = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+(-[a-z0-9]+)*)*")
TEXTS = ast.JoinedStr, ast.Constant, ast.IfExp, ast.BoolOp, ast.BinOp
Parts = dict[str, str]  # name of a variable -> the text that it stands for
BUILT_IN = {name for name, one in vars(builtins).items() if isinstance(one, type) and issubclass(one, BaseException)}


class Message(NamedTuple):
    """One sentence of an error, and where it stands."""

    code: str
    kind: str  # the class's name
    text: str
    own: bool  # the code is given where the error is made; otherwise it is its class's
    place: str  # file:line


def read(root: Path = ROOT) -> list[Message]:
    """All messages of the source under ``root``, in the order of the files."""
    trees = _trees(root)
    codes = _codes(trees.values())
    return [message for name, tree in trees.items() for message in _messages(name, tree, codes)]


def classes(root: Path = ROOT) -> list[tuple[str, str]]:
    """(name, code) of every class of errors that has a code."""
    return [(name, code) for name, code in _codes(_trees(root).values()).items() if code != NO_CODE]


def computed(root: Path = ROOT) -> list[ast.expr]:
    """What is given as the code of an error and is no plain text."""
    trees = _trees(root)
    codes = _codes(trees.values())
    calls = (
        call for tree in trees.values() for call in _calls(tree) if _name(call.func) in {*codes, "kind", "__init__"}
    )
    given = (word.value for call in calls for word in call.keywords if word.arg == "code")
    return [value for value in given if not isinstance(value, ast.Constant)]


def written(messages: Iterable[Message]) -> str:
    """The snapshot: a line for every code and class, and below it their sentences, all in order."""
    lines, former = [], None
    for code, kind, text in sorted({message[:3] for message in messages}):
        if (code, kind) != former:
            lines.append(f"{code} {kind}")
        lines.append(f"    {text}")
        former = code, kind
    return "\n".join([*lines, ""])


def named_in(tests: Path) -> Iterator[tuple[str, str]]:
    """(code, file:line) wherever a test names a code for `support.errors.refuses`."""
    for path in sorted(tests.rglob("*.py")):
        for call in _calls(ast.parse(path.read_text(encoding="utf-8"))):
            place = NAMING.get(_name(call.func), len(call.args))
            for given in call.args[place : place + 1]:
                yield from ((code, f"{path.name}:{call.lineno}") for code in _constants(given))


def _constants(node: ast.AST) -> Iterator[str]:
    """The texts that an expression can be, as far as they stand in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for part in (node.body, node.orelse) if isinstance(node, ast.IfExp) else getattr(node, "elts", ()):
        yield from _constants(part)


@cache
def _trees(root: Path) -> Mapping[str, ast.AST]:
    files = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    return {path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def _codes(trees: Iterable[ast.AST]) -> dict[str, str]:
    """The code of every class of errors: its own, or that of the class it is made from."""
    found = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def code(name: str) -> str | None:
        """None: no error."""
        if name not in found:
            return NO_CODE if name in BUILT_IN else None
        for line in found[name].body:
            if isinstance(line, ast.Assign | ast.AnnAssign) and isinstance(line.value, ast.Constant):
                targets = line.targets if isinstance(line, ast.Assign) else [line.target]
                if [_name(target) for target in targets] == ["code"]:
                    return str(line.value.value)
        bases = [_name(base) for base in found[name].bases]
        return next((said for base in bases if base != name and (said := code(base)) is not None), None)

    return {name: said for name in {*found, *BUILT_IN} if (said := code(name)) is not None}


def _messages(file: str, tree: ast.AST, codes: dict[str, str]) -> Iterator[Message]:
    raised = {id(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise)}
    for owner, call, parts in _owned_calls(tree):
        name = _name(call.func)
        own_text = name == "__init__" and owner in codes  # super().__init__(...): a class that writes its own sentence
        if not call.args or not (own_text or name in (*codes, PART) or id(call) in raised):
            continue
        text = " · ".join(_text(given, parts) for given in call.args)
        if re.fullmatch(r"\{[\w.]*\}", text):  # a text that was made elsewhere is handed on
            continue
        given = next((word.value for word in call.keywords if word.arg == "code"), None)
        kind = owner if own_text else name
        code = given.value if isinstance(given, ast.Constant) else COMPUTED if given else codes.get(kind, NO_CODE)
        yield Message(str(code), kind, text, isinstance(given, ast.Constant), f"{file}:{call.lineno}")


def _owned_calls(tree: ast.AST, owner: str = "", parts: Parts | None = None) -> Iterator[tuple[str, ast.Call, Parts]]:
    """Every call with the class around it, and what names of texts stand for there, by the assignments before it."""
    parts = {} if parts is None else parts
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _owned_calls(node, owner, dict(parts))
            continue
        if isinstance(node, ast.Call):
            yield owner, node, dict(parts)
        yield from _owned_calls(node, node.name if isinstance(node, ast.ClassDef) else owner, parts)
        if isinstance(node, ast.Assign) and isinstance(node.value, TEXTS) and isinstance(node.targets[0], ast.Name):
            text = _text(node.value, parts)
            if re.search(r"[a-z]{3,} ", re.sub(r"\{[^{}]*\}", "", text)):  # words, not a format or a file's name
                parts[node.targets[0].id] = text


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _text(node: ast.AST, parts: Parts) -> str:
    """A sentence with {names} for what is put in; its own newlines are written \\n."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("\n", "\\n")
    if isinstance(node, ast.Name) and node.id in parts:
        return parts[node.id]
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, parts) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        holds = isinstance(node.value, ast.Name) or _holds_text(node.value)
        return _text(node.value, parts) if holds else f"{{{_label(node.value)}}}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, parts) + _text(node.right, parts)
    if isinstance(node, ast.IfExp):
        return f"{{{_text(node.body, parts)} | {_text(node.orelse, parts)}}}"
    if isinstance(node, ast.BoolOp):
        return f"{{{' | '.join(_text(value, parts) for value in node.values)}}}"
    return f"{{{_label(node)}}}"


def _holds_text(node: ast.AST) -> bool:
    """Whether what is put in is itself a choice between sentences."""
    return isinstance(node, ast.IfExp | ast.BoolOp | ast.BinOp) and any(
        isinstance(one, ast.Constant) and isinstance(one.value, str) for one in ast.walk(node)
    )


def _label(node: ast.AST) -> str:
    """A name for what is put in; the same in every version of Python, which ast.unparse is not."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_label(node.value)}.{node.attr}"
    if isinstance(node, ast.Call):
        inner = ", ".join(map(_label, node.args)) if len(node.args) == 1 else "…" if node.args else ""
        return f"{_label(node.func)}({inner})" if not isinstance(node.func, ast.Attribute) else f"{node.func.attr}(…)"
    if isinstance(node, ast.Subscript):
        return f"{_label(node.value)}[…]"
    return "…"
