"""Figures that the docs' tables are drawn from: rows of docs/figures/*.json, each with the command that printed it."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path

from modular_lora_guard.modular_lora.util import plain_json

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "figures"


def machine() -> str:
    """Processor, cores and whether it has the instructions that half precision is fast with."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    name = next(
        (line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line), platform.machine()
    )
    fast = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in text]
    return f"CPU, {os.cpu_count()} cores, {name}, {', '.join(fast) or 'no AVX-512, no bf16 instructions'}"


def record(file: str, rows: dict[str, object], command: str, field: str = "value") -> None:
    """Put ``rows`` (name -> value as ``field``, or fields) into docs/figures/``file``, in the place of such rows."""
    path = FOLDER / file
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    kept = [row for row in kept if row["name"] not in rows]
    fields = {name: value if isinstance(value, dict) else {field: value} for name, value in rows.items()}
    new = kept + [{"name": name, **_source(command), **found} for name, found in fields.items()]
    plain_json.write({"rows": new}, path)


def write(file: str, rows: list[dict], command: str) -> None:
    """docs/figures/``file`` anew from ``rows``, each with its source."""
    plain_json.write({"rows": [row | _source(command) for row in rows]}, FOLDER / file)


def _source(command: str) -> dict[str, str]:
    return {"command": command, "date": datetime.date.today().isoformat(), "machine": machine()}
