"""The words on the nodes: every report is formatted here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..provenance.attestation import SAFETY_FIRST, Attestation, GateRecord, LoraRecord
from .build import GuardedPart, LoraLine
from .functional import Functional
from .interference import Interference

_PARTS = {"model": "U-Net", "text": "text encoder"}


def format_guard(base: str, base_sha256: str, parts: Iterable[GuardedPart], notes: Iterable[str]) -> str:
    """The report on Guard Model: base, every LoRA on every model, net strength, warnings and notes."""
    lines = [f"base {base}, sha256 {base_sha256[:16]}"]
    for part in parts:
        if any(line.matched or line.unmatched or line.left for line in part.lines):
            lines.append(f"{_PARTS[part.part]}: {part.layers} layers guarded")
            lines += [f"  {_lora(line)}" for line in part.lines]
            lines += [f"  {_interference(lora.name, result)}" for lora, result in part.interference]
            lines += [f"  WARNING: {w}" for _, result in part.interference for w in result.warnings]
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def format_memory(branches: int, guards: int, nbytes: int) -> str:
    """What this guard's fused weights take in bytes, how many guards are kept ready, and what theirs hold now."""
    kept = f"{guards} guard{'s' * (guards != 1)}, {nbytes / 1e6:.0f} MB"
    return f"branches: {branches / 1e6:.1f} MB beside the weights; warm cache: {kept}"


def format_functional(functional: Functional, a: Attestation) -> str:
    """Functional strength of every safety LoRA on Guard Model, with what measuring it took."""
    lines = []
    for lora in (lora for lora in a.loras if lora.role == "safety"):
        figure = functional.figures.get(lora.sha256)
        if figure is None:
            lines.append(_functional(lora, functional.unmeasured[lora.sha256]))
        else:
            where = f"on {figure.prompt[:60]!r}, where alone it changes {figure.share:.1%} of the prediction"
            lines.append(f"{_functional(lora, figure.strength)} {where}")
    if functional.rows:
        lines.append(f"functional strength took {functional.rows} small predictions, {functional.seconds:.1f} s")
    return "\n".join(lines)


def _functional(lora: LoraRecord, found: float | str) -> str:
    said = f"not measured: {found}" if isinstance(found, str) else f"{found:.3f}"
    return f"functional strength of {lora.name}: {said}"


def _lora(line: LoraLine) -> str:
    low, high = line.ranks
    ranks = f" rank {low}" if low == high else f" ranks {low}-{high}"
    form = ", ".join(line.formats or ("LoRA",)) + ranks * bool(high)
    text = f"{line.role} {line.name}: {line.matched} layers, {form}, strength {line.strength:g}, norm {line.norm:.3g}"
    return "; ".join((text, *_missing(line), f"sha256 {line.sha256[:16]}"))


def format_shortfall(line: LoraLine) -> str:
    """What of a LoRA does not act on a model; "" where all of it does."""
    missing = _missing(line)
    return f"{line.role} {line.name}: {'; '.join(missing)}" if missing else ""


def _missing(line: LoraLine) -> list[str]:
    found = []
    if line.unmatched:
        found.append(f"{len(line.unmatched)} keys match no layer (first {line.unmatched[0]})")
    if line.left:
        name, why = line.left[0]
        found.append(f"{len(line.left)} layers are left out (first {name} {why})")
    if line.zero_layers:
        found.append(f"{line.zero_layers} layers are all zero")
    return found


def _interference(name: str, result: Interference) -> str:
    layer, lowest = result.lowest_net
    return (
        f"interference with {name}: net strength {result.net_strength:.3f} (lowest {lowest:.3f} in {layer}), "
        f"mean cosine {result.mean_cosine:+.4f}, energy overlap {result.energy_overlap:.1%}, "
        f"row overlap {result.row_overlap:.1%}"
    )


def format_attestation(a: Attestation) -> str:
    """The report on the samplers and on the decode: one run."""
    what = f"{a.firings} branch calls in {a.layers} layers over {a.evaluations} evaluations"
    if not a.evaluations:
        what = "the model was not evaluated (denoise 0, or no step to do), the latent is what went into the sampler"
    lines = [
        f"{a.status}: {what}",
        f"base {a.base_family}, sha256 {a.base_sha256[:16]}" + ", LoRAs merged before" * a.base_had_merged_loras,
        *(
            f"{r.role} {r.name} at {r.strength_model:g} / {r.strength_clip:g}, sha256 {r.sha256[:16]}"
            + f", scale of its {r.scale}" * bool(r.scale)
            for r in a.loras
        ),
        *(f"net strength of {r.name}: {_strengths(a, r)}" for r in a.loras if r.role == "safety"),
        *_functional_lines(a),
    ]
    if a.combine == SAFETY_FIRST:
        found = f", g found in {a.muted_evaluations} more, without the task LoRAs" * bool(a.muted_evaluations)
        lines.append(f"safety first: y = (y0 + s) + g·t{found}; task LoRAs do not act in the text encoder")
    if a.varying_layers:
        lines.append(f"{a.varying_layers} layers depend on the inputs of the run, {a.idle_layers} of them did not run")
    if a.text_encoder:
        weighted = f", embeddings weighted or mixed by {', '.join(a.weighted)}" if a.weighted else ""
        lines.append(f"text encoder: {a.text_encoder}{weighted}")
    if a.vae_sha256:
        lines.append(f"VAE sha256 {a.vae_sha256[:16]}")
    if a.image_sha256:
        lines.append(f"image sha256 {a.image_sha256[:16]}")
    if a.gate:
        lines.append(_gate(a.gate))
    return "\n".join(lines)


def _strengths(a: Attestation, lora: LoraRecord) -> str:
    """Net strength of the files and as it acted; what was not measured is said."""
    files = a.net_strength.get(lora.sha256)
    said = "not on the model's layers" if files is None else f"{files:.3f} by the files"
    if files is None or not a.evaluations:
        return said
    if not a.measured_evaluations:
        return f"{said}; as it acted: not measured"
    acted, share = a.acted_strength.get(lora.sha256), a.acted_share.get(lora.sha256, 0.0)
    if acted is None:
        return f"{said}; the safety LoRA had nothing to do here (its share of what the layers give is {share:.1g})"
    return f"{said}, {acted:.3f} as it acted in {a.measured_evaluations} measured evaluations"


def _functional_lines(a: Attestation) -> Iterator[str]:
    for lora in (lora for lora in a.loras if lora.role == "safety"):
        found = a.functional_strength.get(lora.sha256, a.functional_not_measured.get(lora.sha256))
        if found is not None:
            yield _functional(lora, found)


def _gate(record: GateRecord) -> str:
    verdict = "flagged" if record.flagged else "not flagged"
    changed = f", changed by the gate ({record.action})" if record.changed else ""
    return f"gate {record.detector}: {verdict}{changed}; settings {record.settings_sha256[:16]}"


def format_interference(name: str, result: Interference) -> str:
    """The table on LoRA Interference: one safety LoRA against the others, layer by layer."""
    head = f"{'layer':<72} {'cosine':>8} {'energy':>7} {'rows':>6} {'net':>7}"
    rows = [
        f"{r.layer:<72} {r.cosine:+8.4f} {r.energy_overlap:7.1%} {r.row_overlap:6.1%} {r.net_strength:7.3f}"
        for r in result.layers
    ]
    return "\n".join([_interference(name, result), *(f"WARNING: {w}" for w in result.warnings), head, *rows])
