"""Metadata of a safety LoRA that no gradient made: one function for all that write such a file."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence

from ...modular_lora.guard.build import BASE_KEY, ROLE_KEY
from ...modular_lora.guard.concept import PROMPTS_KEY, trained
from ..metadata_keys import CONCEPT_KEY, ENGINE_KEY, METHOD_KEY, PRESERVED_KEY
from ..model import Prediction
from ..output import SPEC_PREDICTIONS, base_names


def safety_metadata(
    *,
    method: str,
    family: str = "",
    prediction: Prediction | None = None,
    base_sha256: str = "",
    engine: str = "",
    concept: Sequence[str] = (),
    prompts: Sequence[str] = (),
    preserved: Sequence[str] = (),
    base_name: str = "",
    title: str = "",
    rank: int = 0,
    **further: str,
) -> dict[str, str]:
    """Metadata under the keys that the trainers write, text only; what is empty is left out.

    Args:
        method: The method, e.g. "null-space".
        family: ComfyUI's name of the base: SD15, SDXL, ...; "" where it is not known.
        prediction: What the base predicts; None where it is not known: the architecture, which names it, is left out.
        base_sha256: modular_lora.util.tensor_hashing.weights_sha256 of W0.
        engine: Name and version of what made the file.
        concept: What is erased, in a few words.
        prompts: Prompts of it; the first that fit become the concept prompts.
        preserved: Prompts that are kept.
        base_name: File name of the checkpoint.
        title: Name of the file.
        rank: Largest rank of a layer.
        further: Other keys and their values.
    """
    version, architecture, naming = base_names(family, prediction or "epsilon") if family else ("", "", "")
    found = {
        ROLE_KEY: "safety",
        BASE_KEY: base_sha256,
        ENGINE_KEY: engine,
        METHOD_KEY: method,
        CONCEPT_KEY: ", ".join(concept),
        PROMPTS_KEY: trained(prompts),
        PRESERVED_KEY: json.dumps(list(preserved)) if preserved else "",
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")) if version else "",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank or ""),
        "ss_network_alpha": str(rank or ""),
        "ss_sd_model_name": base_name,
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora" if family and prediction else "",
        "modelspec.implementation": naming,
        "modelspec.title": title or "LoRA",
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None).isoformat("T", "seconds"),
        "modelspec.prediction_type": SPEC_PREDICTIONS.get(prediction or "", ""),
    }
    return {key: value for key, value in (found | further).items() if value}
