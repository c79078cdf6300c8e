"""Seeds of the trainings, apart by role."""

from __future__ import annotations

import hashlib


def role_seed(seed: int, role: str) -> int:
    """63-bit seed from SHA-256 of ``role:seed``.

    LoRAs that start from one seed share their random A, and with it most of their row space; with a seed of its own
    a task LoRA starts from another A than a safety LoRA of the same ``seed``.
    """
    return int.from_bytes(hashlib.sha256(f"{role}:{seed}".encode()).digest()[:8], "big") >> 1
