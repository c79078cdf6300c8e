"""What a clone has beside the pack: installation, the demo, benchmarks, the demo world.

``python -m tools.benchmarks.NAME`` and ``python -m tools.world.NAME``, from the clone's folder.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "importable"))  # where `modular_lora_guard` is found
