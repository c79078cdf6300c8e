"""What a conversion is refused with."""

from __future__ import annotations

from ...modular_lora.errors import GuardError


class ConvertError(GuardError):
    """Published weights that cannot be turned into a safety LoRA, or not with what was given."""

    code = "convert"
