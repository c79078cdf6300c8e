"""Writes down what run.py's commands take, so that their help needs no package (tools/bootstrap/usage.json).

python -m tools.usage
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from modular_lora_guard.audit import cli as audit
from modular_lora_guard.modular_lora.util import atomic
from modular_lora_guard.operators import cli as operators
from modular_lora_guard.tools.bootstrap import usage
from modular_lora_guard.tools.world import evidence
from modular_lora_guard.tools.world.equal import command as evidence_equal
from modular_lora_guard.training import cli as training

PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "lora": training.parser,
    "audit": audit.parser,
    "operator": operators.parser,
    "evidence": evidence.parser,
    "evidence-equal": evidence_equal.parser,
}


def text() -> str:
    """What the file must say."""
    said = {command: usage.described(parser()) for command, parser in PARSERS.items()}
    return json.dumps(said, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    atomic.write(usage.FILE, text())
