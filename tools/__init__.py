"""What a clone has beside the pack: installation, the demo, benchmarks, the demo world.

``python -m tools.benchmarks.NAME`` and ``python -m tools.world.NAME``, from the clone's folder.
"""

import sys
from pathlib import Path

if __name__ == "tools":  # from the clone's folder, not as a part of `modular_lora_guard`, which is to be found here:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "importable"))
