"""Where the escape attempts run: ComfyUI's own server, queue and executor in this process, and who judges them."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image, ImageSequence

from support import audio_nodes, escape_nodes
from support.operator_graphs import enforcement, required

KEY, ENTRIES = "modular_lora_attestation", "modular_lora_images"
LEAST = 0.9
IMAGE_ENDINGS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".webm", ".mp4", ".avif", ".bmp"))
WEIGHTS = frozenset((".safetensors", ".ckpt", ".pt", ".pth", ".bin"))
SOUNDS = frozenset((".flac", ".mp3", ".opus", ".wav", ".m4a"))
SOLIDS = frozenset((".glb", ".obj", ".svg"))
EXTRAS = (
    "images",
    "video",
    "mask",
    "train",
    "dataset",
    "string",
    "advanced_samplers",
    "post_processing",
    "load_3d",
    "hunyuan3d",
)
REFUSED = "ModularLoraRefused"


@dataclass
class Seen:
    """What one attempt led to."""

    refused: list[str] = field(default_factory=list)  # sentences of the policy or the guard, queued or running
    invalid: list[str] = field(default_factory=list)  # ComfyUI's own errors
    prompts: list[str] = field(default_factory=list)  # ids of prompts that were refused
    answers: list[tuple[int, bytes]] = field(default_factory=list)  # of other requests
    shown: list[Any] = field(default_factory=list)  # images that were shown on the way
    told: list[str] = field(default_factory=list)  # what the server sent beside images
    unguarded: int = 0  # evaluations of a network without branches while a policy was in force


class Ground:
    """One ComfyUI under a policy. ``queue`` sends a prompt over HTTP, ``work`` is the server's worker."""

    def __init__(self, comfy):
        self.comfy, self.base = comfy, comfy.base
        modules = enforcement(comfy)
        self.enforce, self.policies, self.host = modules.enforce, modules.policy, comfy.host
        self.policy = modules.policy.folder() / "policy.toml"
        self.loras, self.inputs = comfy.loras, Path(comfy.folder_paths.get_input_directory())
        self.between: Callable[[], None] = lambda: None
        self.seen, self.attested, self.passed, self._mark = Seen(), set(), set(), {}
        self.required = ""  # SHA-256 of the safety LoRA that the policy asks for
        self.frames: set[str] = set()  # of attested images, SHA-256 of the pixels alone, as films name their frames
        self.status = "guarded"  # what an attempt's images say of themselves, where they name it
        self._undo: list[Callable[[], None]] = []

    def open(self) -> None:
        execution, mapping = self.comfy.execution, self.comfy.nodes.NODE_CLASS_MAPPINGS
        folder = Path(self.comfy.nodes.__file__).parent / "comfy_extras"
        for name in EXTRAS:
            place = str(folder / f"nodes_{name}.py")
            asyncio.run(self.comfy.nodes.load_custom_node(place, module_parent="comfy_extras"))
        audio_nodes.load(self.comfy)
        api = str(folder.parent / "comfy_api_nodes" / "nodes_bfl.py")
        asyncio.run(self.comfy.nodes.load_custom_node(api, module_parent="comfy_api_nodes"))
        sent = folder.parent / "custom_nodes" / "websocket_image_save.py"
        asyncio.run(self.comfy.nodes.load_custom_node(str(sent), "custom_nodes"))
        before = dict(mapping)
        escape_nodes.install(mapping, lambda: self.between())
        self._undo.append(lambda: (mapping.clear(), mapping.update(before)))
        self.loop = asyncio.new_event_loop()
        self._undo.append(self.loop.close)
        self.site = self._server()
        self.client = TestClient(TestServer(self.site.app, loop=self.loop), loop=self.loop)
        self.loop.run_until_complete(self.client.start_server())
        self._undo.append(lambda: self.loop.run_until_complete(self.client.close()))
        sizes = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        self.executor = execution.PromptExecutor(self.site, execution.CacheType.CLASSIC, cache_args=sizes)
        self._spy_evaluations()
        self._spy_images()
        self._spy_gates()
        self._spy_messages()
        self.safety = hashlib.sha256((self.loras / "safety.safetensors").read_bytes()).hexdigest()
        self._prepare_files()

    def close(self) -> None:
        self.write(None)
        for undo in reversed(self._undo):
            undo()

    def _server(self):
        module = importlib.import_module("server")
        args, web = importlib.import_module("comfy.cli_args").args, self.base / "web"
        web.mkdir(exist_ok=True)
        args.front_end_root = str(web)
        before = module.PromptServer.instance
        self._undo.append(lambda: setattr(module.PromptServer, "instance", before))
        self._undo.append(lambda: setattr(args, "front_end_root", None))
        site = module.PromptServer(self.loop)
        site.add_routes()
        self.enforce.register()  # as the pack does when the server loads it
        return site

    def _spy_evaluations(self) -> None:
        """Every evaluation of the network while a policy is in force carries branches, whatever its caller says."""
        unet = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel
        before = unet._forward

        def forward(network, *args, **kwargs):
            branches = any(type(m.__dict__.get("forward")).__name__ == "_Branch" for m in network.modules())
            if not branches and self.in_force():
                self.seen.unguarded += 1
            return before(network, *args, **kwargs)

        unet._forward = forward
        self._undo.append(lambda: setattr(unet, "_forward", before))

    def _spy_images(self) -> None:
        """Pixels of the images that Guarded VAE Decode attests with the required LoRA; files are compared to them."""
        ledger = self.comfy.ledger
        before = ledger.attest_images

        def attest_images(images, *rest):
            found = before(images, *rest)
            for image, run in zip(images, found, strict=True):
                if not isinstance(run, str) and self.is_guarded(json.loads(run.to_json())):
                    self.attested.add(_digest(image))
                    self.frames.add(hashlib.sha256(_pixels(image).tobytes()).hexdigest())
            return found

        ledger.attest_images = attest_images
        self._undo.append(lambda: setattr(ledger, "attest_images", before))

    def _spy_gates(self) -> None:
        """Pixels of the images that a gate let pass as they were, or changed."""
        gated = importlib.import_module("modular_lora_guard.comfy_host.gating")
        before = gated.judge

        def judge(images, gate):
            judged = before(images, gate)
            goes = [one for one in judged.verdicts if not one["withheld"]]
            for image, said in zip(judged.images if goes else (), goes, strict=True):
                if not said["gate"]["flagged"] or said["gate"]["changed"]:
                    self.passed.add(_digest(image))
            return judged

        gated.judge = judge
        self._undo.append(lambda: setattr(gated, "judge", before))

    def _spy_messages(self) -> None:
        """What goes to the user's browser: every message, and images beside the progress (main.py hooks them)."""
        utils, before = importlib.import_module("comfy.utils"), self.site.send_sync

        def send_sync(event, data, sid=None):
            self.seen.told.append(repr(data))
            return before(event, data, sid)

        def hook(value, total, preview, **_):
            self.seen.shown.extend([preview[1]] if preview else [])

        self.site.send_sync = send_sync
        known = utils.PROGRESS_BAR_HOOK
        utils.set_progress_bar_global_hook(hook)
        self._undo.append(lambda: utils.set_progress_bar_global_hook(known))

    def _prepare_files(self) -> None:
        """An outside image, latent and sound, an embedding, another VAE, the checkpoint under a second name."""
        from safetensors.torch import save_file

        self.inputs.mkdir(parents=True, exist_ok=True)
        audio_nodes.write_sound(self.inputs / "outside.flac")
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(self.inputs / "outside.png")
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        marks = {"latent_tensor": latent, "latent_format_version_0": torch.tensor([])}
        save_file(marks, self.inputs / "outside.latent")
        models = self.base / "models"
        for name in ("embeddings", "vae"):
            (models / name).mkdir(exist_ok=True)
        save_file({"emb_params": torch.randn(2, 768)}, models / "embeddings" / "word.safetensors")
        checkpoint = models / "checkpoints" / "world.safetensors"
        if not (second := checkpoint.with_name("second.safetensors")).exists():
            os.link(checkpoint, second)
        from safetensors import safe_open

        with safe_open(checkpoint, "pt") as file:
            names = [name for name in file.keys() if name.startswith("first_stage_model.")]  # noqa: SIM118
            weights = {name.removeprefix("first_stage_model."): file.get_tensor(name) for name in names}
        save_file({name: tensor * 1.01 for name, tensor in weights.items()}, models / "vae" / "other.safetensors")

    # The operator's side

    def write(self, text: str | None) -> None:
        """Put this policy in force, or none, as the server's own look at the file does."""
        self.put(text)
        self.enforce.watch()

    def put(self, text: str | None) -> None:
        """Write the policy's file, or take it away, and nothing more."""
        self.policy.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            self.policy.unlink(missing_ok=True)
        elif not self.policy.exists() or self.policy.read_text(encoding="utf-8") != text:
            self.policy.write_text(text, encoding="utf-8")

    def require(self, sha256: str, more: str = "") -> None:
        """Put a policy in force that asks for another safety LoRA, which is then the judge's as well."""
        self.required = sha256
        self.write(required(sha256, least=LEAST) + more)

    def text(self, more: str = "", least: float = LEAST) -> str:
        return required(self.safety, least=least) + more

    def in_force(self) -> bool:
        try:
            return self.policies.current() is not None
        except Exception:
            return True

    def record(self) -> list[dict]:
        """Lines since this attempt began, of every folder that a policy names."""
        new = (line for file, lines in self._record().items() for line in lines[self._known.get(file, 0) :])
        return [json.loads(line) for line in new]

    def _record(self) -> dict[Path, list[str]]:
        with suppress(Exception):  # a policy that cannot be read has a record of its own
            self.policies.write_waiting()
        files = sorted(self.policy.parent.glob("record*/record-*.jsonl"))
        return {file: file.read_text(encoding="utf-8").splitlines() for file in files}

    # The user's side

    def request(self, method: str, place: str, **options: Any) -> tuple[int, bytes]:
        async def ask():
            async with self.client.request(method, place, **options) as answer:
                return answer.status, await answer.read()

        self.seen.answers.append(self.loop.run_until_complete(ask()))
        return self.seen.answers[-1]

    def queue(self, graph: dict, place: str = "/prompt", **body: Any) -> int:
        """Send a prompt as the front end does; what was refused is noted. The status of the answer."""
        return self.note(*self.request("POST", place, data=json.dumps({"prompt": graph, **body})))

    def note(self, status: int, content: bytes) -> int:
        """Of an answer to a prompt."""
        try:
            said = json.loads(content)
        except ValueError:
            said = {}
        for node in (said.get("node_errors") or {}).values() if status == 400 else ():
            told = [error["details"] for error in node["errors"]]
            (self.seen.refused if node["class_type"] == REFUSED else self.seen.invalid).extend(told)
        if status >= 400 and not said.get("node_errors"):
            self.seen.invalid.append(str(said.get("error", content[:200])))
        return status

    def work(self, heed_flags: bool = True) -> None:
        """Run what is queued, as the server's worker does (main.py)."""
        queue = self.site.prompt_queue
        while True:
            if queue.get_flags().get("free_memory") and heed_flags:
                self.executor.reset()
            if (item := queue.get(timeout=0)) is None:
                return
            (_, prompt_id, prompt, extra, outputs, sensitive), number = item
            self.executor.execute(prompt, prompt_id, extra | sensitive, outputs)
            queue.task_done(number, self.executor.history_result, None)
            for event, data in self.executor.status_messages:
                if event == "execution_error":
                    ours = data["exception_type"].rpartition(".")[2] in ("GuardError", "RefusedError", "PolicyError")
                    ours |= data["exception_type"].endswith(("HandleError", "LoraFileError"))
                    (self.seen.refused if ours else self.seen.invalid).append(data["exception_message"])
                    self.seen.prompts.extend([prompt_id] if ours else [])

    def send(self, graph: dict, **body: Any) -> None:
        if self.queue(graph, **body) == 200:
            self.work()

    # The judge

    def begin(self) -> None:
        self.seen, self._mark, self.status, self.required = Seen(), self._files(), "guarded", self.safety
        self._known = {file: len(lines) for file, lines in self._record().items()}

    def _files(self) -> dict[Path, int]:
        places = (self.base / name for name in ("output", "temp", "user"))
        self.policies.write_waiting()  # else the record's writer may take a file away meanwhile
        return {file: file.stat().st_mtime_ns for place in places for file in place.rglob("*") if file.is_file()}

    def new_files(self) -> list[Path]:
        return [file for file, stamp in self._files().items() if self._mark.get(file) != stamp]

    def refusals(self) -> list[dict]:
        """Of this attempt, in the record."""
        return [line for line in self.record() if line["kind"] == "refused"]

    def images(self) -> list[Path]:
        """New files of images and latents; AssertionError for one that is not attested, and for weights."""
        found = [file for file in self.new_files() if file.suffix.lower() in IMAGE_ENDINGS]
        for file in found:
            if file.suffix.lower() == ".webm":
                self._check_film(file)
                continue
            assert file.suffix.lower() in (".png", ".webp"), f"{file.name}: what is in it cannot be compared"
            self._check_image(file)
        for file in self.new_files():
            assert file.suffix.lower() not in WEIGHTS, f"{file.name}: weights came out"
            if file.suffix == ".latent":
                self._check_latent(file)
            assert file.suffix.lower() not in SOLIDS, f"{file.name}: a solid came out"
            if file.suffix.lower() in SOUNDS:
                outside = audio_nodes.samples(self.inputs / "outside.flac")
                assert np.array_equal(audio_nodes.samples(file), outside), (
                    f"{file.name}: it is not the user's own sound"
                )
        for image in self.seen.shown:
            self._check_pixels(np.array(image.convert("RGB")), "shown on the way")
        for text in self.seen.told:
            assert "tensor(" not in text, f"numbers of a tensor were told: {text[:300]}"
            assert escape_nodes.MARK not in text, f"a picture was told as text: {text[:300]}"
        return found

    def _check_image(self, file: Path) -> None:
        with Image.open(file) as image:
            text = getattr(image, "text", {}).get(KEY)
            if text is not None and not self.status.startswith("guarded"):  # it does not claim to be
                assert json.loads(text)["status"] == self.status
                return
            for frame in ImageSequence.Iterator(image):
                self._check_pixels(np.array(frame.convert("RGB")), file.name)
        if text is not None:
            assert self.is_guarded(json.loads(text)), f"{file.name} says {text[:300]}"

    def _check_film(self, file: Path) -> None:
        """Its frames are compressed: those that it names, as they were before, are of guarded runs."""
        import av

        with av.open(str(file)) as film:
            said = {key.lower(): value for key, value in film.metadata.items()}.get(ENTRIES, "{}")
        named = json.loads(said).keys()
        assert named, f"{file.name}: what is in it cannot be compared"
        assert named <= self.frames, f"{file.name}: no guarded run made it"

    def _check_pixels(self, pixels: np.ndarray, where: str) -> None:
        """A guarded run made them, if they must be attested, and a gate let them pass, if there must be one."""
        digest, policy = _digest(torch.from_numpy(pixels)), self.policies.current() if self.in_force() else None
        gated = policy is not None and policy.gate.required
        if not (gated and policy.open.unattested):
            assert digest in self.attested | (self.passed if gated else set()), f"{where}: no guarded run made it"
        assert not gated or digest in self.passed, f"{where}: no gate let it pass"

    def _check_latent(self, file: Path) -> None:
        from safetensors.torch import load_file

        hashes = self.comfy.ledger.tensor_sha256
        for latent in load_file(file)["latent_tensor"]:
            run = self.comfy.ledger.latents.get(hashes(latent))
            assert run is not None, f"{file.name}: no guarded run made it"
            assert self.is_guarded(json.loads(run.to_json()))

    def is_guarded(self, record: dict) -> bool:
        """Whether an attestation names the required safety LoRA at the least net strength, or more."""
        strong = (
            record.get("net_strength", {}).get(lora["sha256"], 0) >= LEAST
            for lora in record.get("loras", ())
            if lora["role"] == "safety" and lora["sha256"] == self.required
        )
        return record["status"].startswith("guarded") and any(strong)


def _digest(image: torch.Tensor) -> str:
    """Of an image's 8-bit pixels (h w 3), rounded as Save Image rounds."""
    pixels = _pixels(image)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _pixels(image: torch.Tensor) -> np.ndarray:
    pixels = image if image.dtype == torch.uint8 else (image.cpu() * 255.0).clamp(0, 255).to(torch.uint8)
    return pixels.contiguous().numpy()
