"""Gate Settings: which detector judges, at which thresholds, and what is done about what it finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io

from ..comfy_host.answers import answer
from ..comfy_host.gating import Gate, default_detector, second_of
from ..comfy_host.model_folders import DETECTOR_FOLDER, PRESET_FOLDER, file_names, file_path, model_folder
from ..comfy_host.node_report import CATEGORY
from ..comfy_host.training_files import check_name
from ..gate import detectors, measured, settings
from ..gate.class_lines import with_classes, with_threshold
from ..gate.errors import GateError
from ..gate.finding import Detector
from ..gate.report import format_limits, format_settings
from ..gate.settings import ACTIONS, ACTIVITIES
from ..modular_lora.errors import GuardError
from ..modular_lora.util.file_state import file_state
from .search_words import found_by
from .sockets import GateSocket, rarely

NONE = "none"
AS_PRESET = "as the preset says"
PROVIDERS = {"CPU": (), "CUDA": ("CUDAExecutionProvider",)}
FILES = {"classifier": DETECTOR_FOLDER, "labels": DETECTOR_FOLDER, "preset": PRESET_FOLDER}  # input -> model folder


class GateSettings(io.ComfyNode):
    """Settings of Safety Gate and Guarded Sample and Gate; nothing is judged here."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraGateSettings",
            **found_by("nsfw", "nudenet", "open-nsfw", "detector", "classifier", "threshold", "censor"),
            display_name="Gate Settings",
            category=f"{CATEGORY}/gate",
            description="Which detector a gate uses, the score from which each label counts, and the action that "
            "follows.",
            inputs=rarely([*_detector_inputs(), *_action_inputs()], "provider", "save_as", "activity"),
            outputs=[
                GateSocket.Output("gate", display_name="gate", tooltip="For Safety Gate or Guarded Sample and Gate."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What the detector covers and what it does not; thresholds.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, detector=None, classifier=None, labels=None, preset=None) -> bool | str:
        try:
            if detector is not None and detector not in detectors.available():
                detectors.make(detector)  # its error says what to install
            for name, value in (("classifier", classifier), ("labels", labels), ("preset", preset)):
                _file(name, value)
        except GuardError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, classifier=None, labels=None, preset=None, **_):
        paths = [_file(*pair) for pair in (("classifier", classifier), ("labels", labels), ("preset", preset))]
        return [(str(p), file_state(p)) for p in paths if p]

    @classmethod
    def execute(
        cls,
        detector,
        classifier,
        labels,
        preset,
        threshold,
        classes,
        action,
        provider,
        save_as="",
        replacement=None,
        confirm=None,
        activity=AS_PRESET,
    ) -> io.NodeOutput:
        made = _detector(detector, classifier, labels, PROVIDERS[provider])
        path = _file("preset", preset)
        chosen = settings.load(path, made) if path else settings.defaults(made)
        chosen = with_classes(with_threshold(chosen, threshold), made, classes)
        if action != AS_PRESET:
            chosen = replace(chosen, action=action)
        if activity != AS_PRESET:
            chosen = replace(chosen, activity=activity)
        chosen.check(made)
        if chosen.action == "replace" and replacement is None:
            raise GateError(
                'replacement: the action is "replace" and there is no image to put in: connect one.',
                code="gate.no-replacement",
            )
        if save_as.strip():
            settings.save(chosen, _preset_file(save_as.strip()))
        image = None if replacement is None else replacement[0].float().cpu().numpy()
        second = None if confirm is None else second_of(confirm)
        n = len(chosen.block)
        prompts = ", and by its prompt" * (chosen.activity != "ignore")
        line = f"An image is flagged by {n} label{'s' * (n != 1)}{prompts}; action: {chosen.action}."
        error = measured.format_measured(made, chosen, path, second is not None)
        shown = answer(line, "\n".join([error, *format_limits(made)]))
        report = f"{format_settings(made, chosen, second)}\n{error}"
        return io.NodeOutput(Gate(made, chosen, image, second), report, ui=shown)


def _detector_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "detector",
            list(detectors.available()),
            default=default_detector(),
            tooltip="nudenet 320n: body parts with boxes, as the nudenet package (AGPL-3.0) sees a file; rgb: in the "
            "other channel order. open-nsfw: one score for pornographic photographs. classifier: your own ONNX file.",
        ),
        io.Combo.Input(
            "classifier",
            [NONE, *file_names(DETECTOR_FOLDER, ending=".onnx")],
            default=NONE,
            tooltip="ONNX file from the modular_lora_detectors folder. Used only with the detector classifier.",
        ),
        io.Combo.Input(
            "labels",
            [NONE, *file_names(DETECTOR_FOLDER, ending=".json")],
            default=NONE,
            tooltip="JSON file from the same folder that says what the classifier's outputs mean. Used only with "
            "classifier.",
        ),
        io.Combo.Input(
            "preset",
            [NONE, *(name for name in file_names(PRESET_FOLDER, ending=".json") if not measured.is_error(name))],
            default=NONE,
            tooltip="Thresholds, growth and action from the modular_lora_gates folder; none: the detector's defaults.",
        ),
    ]


def _action_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "threshold",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Score from which every label counts. 0: each label keeps its own threshold.",
        ),
        io.String.Input(
            "classes",
            default="",
            multiline=True,
            tooltip="One label per line, with its threshold and, if wanted, how much its boxes grow: "
            "FACE_FEMALE 0.6 1.3. A label with off is only reported; with review 0.2 it is for a person to decide "
            "from that score.",
        ),
        io.Combo.Input(
            "action",
            [AS_PRESET, *ACTIONS],
            default=AS_PRESET,
            tooltip="What is done to a flagged image; without a preset, blur. report changes nothing, block stops "
            "the run, withhold takes the image out and ends the run well, empty makes it black. Without boxes the "
            "action covers the whole image.",
        ),
        io.Combo.Input(
            "provider",
            list(PROVIDERS),
            default="CPU",
            tooltip="Where the detector runs. CUDA needs onnxruntime-gpu.",
        ),
        io.String.Input(
            "save_as",
            default="",
            optional=True,
            tooltip="Name of a preset in the modular_lora_gates folder to write these settings to; empty: none.",
        ),
        io.Combo.Input(
            "activity",
            [AS_PRESET, *ACTIVITIES],
            default=AS_PRESET,
            optional=True,
            tooltip="What is done at least about an image whose prompt is about the safety LoRA's concept, as the "
            "calibration in its file says: ignore (also without a preset), review (a person decides) or block. The "
            "action covers the whole image. Where there is no verdict on a prompt, the detector alone judges.",
        ),
        io.Image.Input(
            "replacement",
            optional=True,
            tooltip="For the action replace: the first image of this batch takes the flagged image's place.",
        ),
        GateSocket.Input(
            "confirm",
            optional=True,
            tooltip="From another Gate Settings: an image stays flagged only where this second detector flags it too.",
        ),
    ]


def _detector(name: str, classifier: str, labels: str, providers: tuple[str, ...]) -> Detector:
    if name != detectors.CLASSIFIER:
        return detectors.make(name, providers)
    wanted = {"weights": _file("classifier", classifier), "labels": _file("labels", labels)}
    files = {what: path for what, path in wanted.items() if path is not None}
    if missing := [what for what in wanted if what not in files]:
        raise GateError(
            f"detector classifier: no {missing[0]} file is chosen: put one into {DETECTOR_FOLDER} and choose it.",
            code="gate.no-file-chosen",
        )
    return detectors.make(name, providers, weights=files["weights"], labels=files["labels"])


def _file(name: str, value: str | None) -> Path | None:
    """Path of what a drop-down names; None for none and for what comes over a link. GuardError for a missing file."""
    return None if value in (None, NONE) else file_path(FILES[name], value)


def _preset_file(name: str) -> Path:
    stem = name.removesuffix(".json")
    check_name("save_as", stem, "the file")
    return model_folder(PRESET_FOLDER) / f"{stem}.json"
