"""How many of the layouts in which concept erasers publish their results become a safety LoRA, or load as they are.

    python -m tools.benchmarks.converted [--record]

The files are those of tests/support/erased_files.py, of the same names, types and containers, on toys of the models.
What the guard does with them afterwards, the tests show (tests/unit/training/test_convert_published.py).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from modular_lora_guard.modular_lora.errors import GuardError
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.training.convert.convert import convert
from modular_lora_guard.training.convert.difference import ConvertOptions

from .bench import finish, parser
from .figures import ROOT

sys.path.append(str(ROOT / "tests"))
from support.erased_files import LAYOUTS, Published, checkpoint

FILE = "safety_lora.json"


def outcome(layout: Published, folder: Path, base: Path) -> str:
    """ "loaded", "converted", or what it was refused with."""
    path = layout.write(folder)
    try:
        if path.suffix == ".safetensors" and layout.fate == "loaded":
            return "loaded" if read_lora(path).layers else "empty"
        made = convert(path, base if layout.base else None, folder / "out.safetensors", ConvertOptions())
    except GuardError as error:
        return f"refused: {error}"
    return f"converted, residual {made.residual:.2g}"


def main() -> None:
    chosen = parser(__doc__ or "", FILE).parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        base = checkpoint(Path(folder) / "base.safetensors")
        for number, layout in enumerate(LAYOUTS):
            place = Path(folder) / str(number)
            place.mkdir()
            found[layout.name] = outcome(layout, place, base)
    for name, said in found.items():
        sys.stdout.write(f"{name}: {said}\n")
    refused = [name for name, said in found.items() if said.startswith("refused")]
    rows: dict[str, object] = {
        "published layouts converted or loaded": len(found) - len(refused),
        "published layouts refused by name": f"{len(refused)} of {len(found)}: {', '.join(refused)}",
    }
    finish(rows, FILE, "python -m tools.benchmarks.converted", chosen.record)


if __name__ == "__main__":
    main()
