"""Where an audit's units are drawn: in this process, in processes of this machine, on a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import numpy as np

from ..modular_lora.errors import GuardError
from .plan import Arm, Item, Origin, Pipeline, Sampling, Unit

logger = logging.getLogger("modular_lora")
Check = Callable[[], None]  # raises to interrupt
IMPORTABLE = str(Path(__file__).resolve().parents[1] / "importable")  # brings WORKER into any process
WORKER = "modular_lora_guard.audit.worker"
DEATHS = 3  # of one worker slot; one more ends the audit
WAIT = 0.2  # seconds between two looks at the check


class Pool(Protocol):
    """Pipelines at work; units are drawn in any order, each given out once."""

    origin: Origin  # the same of every pipeline, else GuardError

    def replaced(self) -> int:
        """Workers that died since this was last asked, each replaced by another."""

    def draw(self, units: Sequence[Unit], check: Check) -> Iterator[tuple[Unit, np.ndarray]]:
        """Images b h w 3, uint8, unit by unit. Raises GuardError where a pipeline does, or what ``check`` raises."""


class Engine(Protocol):
    def open(self, check: Check) -> AbstractContextManager[Pool]:
        """A pool with one pipeline ready; what it started is ended with the context."""


@dataclass(frozen=True)
class PipelineSpec:
    """How a worker opens its pipeline: ``function`` of ``module`` gives a context manager of a Pipeline."""

    module: str  # relative to the pack: "comfy_host.standalone_pipeline"
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)  # plain values


@dataclass(frozen=True)
class Local:
    """One pipeline in this process."""

    pipeline: Pipeline

    @contextmanager
    def open(self, check: Check) -> Iterator[Pool]:
        check()
        yield _Alone(self.pipeline)


@dataclass(frozen=True)
class Here:
    """One pipeline in this process, opened when its pool is asked for: a checkpoint takes long to load."""

    spec: PipelineSpec

    @contextmanager
    def open(self, check: Check) -> Iterator[Pool]:
        check()
        module = importlib.import_module(f"..{self.spec.module}", __package__)  # here, since it brings ComfyUI
        with getattr(module, self.spec.function)(**self.spec.arguments) as pipeline:
            yield _Alone(pipeline)


def paint(pipeline: Pipeline, arm: Arm, items: Sequence[Item], sampling: Sampling) -> np.ndarray:
    """What ``pipeline.draw`` gives; on a CPU in one thread, since sums that threads share round as many threads do.

    Engines have threads of their own number (Ray gives an actor one). A CPU's cores are used by as many workers.
    """
    if not pipeline.device.startswith("cpu"):
        return pipeline.draw(arm, items, sampling)
    import torch  # of which this package needs nothing else

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return pipeline.draw(arm, items, sampling)
    finally:
        torch.set_num_threads(threads)


class _Alone:
    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.origin = pipeline, Origin.of(pipeline)

    def draw(self, units: Sequence[Unit], check: Check) -> Iterator[tuple[Unit, np.ndarray]]:
        for unit in units:
            check()
            yield unit, paint(self.pipeline, unit.arm, unit.items, unit.sampling)

    def replaced(self) -> int:
        return 0


@dataclass(frozen=True)
class Processes:
    """A process for each of ``devices``, the pipeline's ``device_index``; without any, ``workers`` of them."""

    spec: PipelineSpec
    devices: tuple[int, ...] = ()
    workers: int = 1

    @contextmanager
    def open(self, check: Check) -> Iterator[Pool]:
        spec = asdict(self.spec)
        indices = [{"device_index": device} for device in self.devices]
        extra = indices or [{}] * _positive(self.workers)
        backend = _ProcessBackend([spec | {"arguments": spec["arguments"] | more} for more in extra])
        with contextlib.closing(backend):
            yield _WorkerPool(backend, check)


@dataclass(frozen=True)
class RayCluster:
    """``workers`` actors on the Ray cluster at ``address``; None starts one on this machine and ends it after.

    The pack, ComfyUI, checkpoint and LoRA files lie under the same paths on every node. Images come back to the
    driver, which alone writes, so that no shared disk is needed.
    """

    spec: PipelineSpec
    workers: int
    address: str | None = None
    gpus: float = 0.0  # a worker, of which Ray lets it see these only

    @contextmanager
    def open(self, check: Check) -> Iterator[Pool]:
        with _ray(self.address, _positive(self.workers)) as ray:
            _check_resources(ray, self.workers, self.gpus)
            backend = _RayBackend(ray, asdict(self.spec), self.workers, self.gpus)
            with contextlib.closing(backend):
                yield _WorkerPool(backend, check)


class _Backend(Protocol):
    """Workers in numbered slots; a slot without a living worker gets a new one when it is asked."""

    slots: int

    def ask(self, slot: int, request: dict[str, Any] | None) -> None:
        """Hand over one request; the slot must not be busy."""

    def answers(self, timeout: float) -> list[tuple[int, dict[str, Any] | None]]:
        """Slots that are done with what they say, None for a worker that died; waits ``timeout`` seconds at most."""

    def close(self) -> None:
        """End all workers at once."""


_Work = TypeVar("_Work", Unit, None)  # None: a worker is to say what it is


class _WorkerPool:
    """Hands units to a backend; a unit is in the queue, with one worker, or drawn, and never in two of these."""

    def __init__(self, backend: _Backend, check: Check) -> None:
        self.backend, self.deaths, self.reported = backend, Counter[int](), 0
        (_, answer), *_ = self._work([None], check)
        self.origin = Origin(**answer["origin"])

    def replaced(self) -> int:
        """How many workers died since the last call."""
        before, self.reported = self.reported, self.deaths.total()
        return self.reported - before

    def draw(self, units: Sequence[Unit], check: Check) -> Iterator[tuple[Unit, np.ndarray]]:
        for unit, answer in self._work(units, check):
            if (origin := Origin(**answer["origin"])) != self.origin:
                raise GuardError(
                    f"Workers differ ({self.origin} and {origin}): their images would too; use workers of one kind.",
                    code="audit.workers-differ",
                )
            yield unit, answer["pictures"]

    def _work(self, units: Sequence[_Work], check: Check) -> Iterator[tuple[_Work, dict[str, Any]]]:
        waiting = deque(units)
        busy: dict[int, _Work] = {}
        while waiting or busy:
            check()
            for slot in range(self.backend.slots):
                if waiting and slot not in busy:
                    busy[slot] = unit = waiting.popleft()
                    self.backend.ask(slot, None if unit is None else asdict(unit))
            for slot, answer in self.backend.answers(WAIT):
                if answer is None:
                    self._count_death(slot, busy.get(slot))
                    waiting.extendleft([busy.pop(slot)] if slot in busy else [])  # a worker may die idle
                elif "error" in answer:
                    raise GuardError(answer["error"], code="audit.worker-failed")
                else:
                    yield busy.pop(slot), answer

    def _count_death(self, slot: int, unit: Unit | None) -> None:
        self.deaths[slot] += 1
        what = f"drawing arm {unit.arm.name}, unit {unit.key[:12]}" if unit else "starting"
        if self.deaths[slot] > DEATHS:
            raise GuardError(
                f"Worker {slot} died {self.deaths[slot]} times, last while {what}: see its output above; too little "
                "memory is likely, so use fewer workers or a smaller unit_size.",
                code="audit.worker-died",
            )
        logger.warning("audit: worker %d died while %s; another one takes its place", slot, what)


class _ProcessBackend:
    """Processes of this machine, each at the other end of a pipe of its own.

    Not a ProcessPoolExecutor: it ends every worker when one dies, so that what the others were drawing is drawn again,
    and waits without end where one dies in the middle of an answer (seen in Python 3.11).
    """

    def __init__(self, specs: Sequence[dict[str, Any]]) -> None:
        self.specs, self.slots = specs, len(specs)
        self.workers: dict[int, tuple[BaseProcess, Connection]] = {}

    def ask(self, slot: int, request: dict[str, Any] | None) -> None:
        if slot not in self.workers:
            self.workers[slot] = _start(self.specs[slot])
        with contextlib.suppress(OSError):  # of a worker that has just died: its pipe's end says so
            self.workers[slot][1].send(request)

    def answers(self, timeout: float) -> list[tuple[int, dict[str, Any] | None]]:
        slots: dict[object, int] = {connection: slot for slot, (_, connection) in self.workers.items()}
        ready = wait([connection for _, connection in self.workers.values()], timeout)
        return [(slots[connection], self._take(slots[connection])) for connection in ready]

    def _take(self, slot: int) -> dict[str, Any] | None:
        try:
            return self.workers[slot][1].recv()
        except (EOFError, OSError):  # nothing comes any more, or half an answer came
            _end(*self.workers.pop(slot))
            return None

    def close(self) -> None:
        for worker in self.workers.values():
            _end(*worker)


def _start(spec: dict[str, Any]) -> tuple[BaseProcess, Connection]:
    """A worker's process and our end of its pipe; a spawned process has this one's path, and so finds WORKER."""
    if IMPORTABLE not in sys.path:
        sys.path.append(IMPORTABLE)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with theirs:
        process = context.Process(target=importlib.import_module(WORKER).serve, args=(spec, theirs), daemon=True)
        process.start()
    return process, ours


def _end(process: BaseProcess, connection: Connection) -> None:
    process.kill()
    process.join()
    connection.close()


class _RayBackend:
    """Ray actors; which node they run on is Ray's business."""

    def __init__(self, ray: ModuleType, spec: dict[str, Any], workers: int, gpus: float) -> None:
        self.ray, self.spec, self.slots = ray, spec, workers
        self.actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_actor_class())
        self.actors: dict[int, Any] = {}
        self.asked: dict[Any, int] = {}  # object reference -> slot

    def ask(self, slot: int, request: dict[str, Any] | None) -> None:
        if slot not in self.actors:
            self.actors[slot] = self.actor.remote(self.spec)
        self.asked[self.actors[slot].answer.remote(request)] = slot

    def answers(self, timeout: float) -> list[tuple[int, dict[str, Any] | None]]:
        ready, _ = self.ray.wait(list(self.asked), num_returns=1, timeout=timeout)
        return [self._take(reference) for reference in ready]

    def _take(self, reference: Any) -> tuple[int, dict[str, Any] | None]:
        slot = self.asked.pop(reference)
        try:
            return slot, self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise GuardError(f"A Ray worker failed ({error.cause!r}): see that the pack lies there too.") from error
        except self.ray.exceptions.RayError:  # the actor, its node or its answer is gone
            self.ray.kill(self.actors.pop(slot))
            return slot, None

    def close(self) -> None:
        for actor in self.actors.values():
            self.ray.kill(actor)


def _actor_class() -> type:
    """Made inside a function, so that Ray sends it by value: its workers cannot import the pack before IMPORTABLE."""
    importable, name = IMPORTABLE, WORKER

    class Drawer:
        def __init__(self, spec):
            self.spec, self.worker = spec, None

        def answer(self, request):
            if self.worker is None:
                sys.path.append(importable)
                self.worker = importlib.import_module(name).Worker(self.spec)
            return self.worker.answer(request)

    return Drawer


@contextmanager
def _ray(address: str | None, workers: int) -> Iterator[ModuleType]:
    """Ray, connected; what was not connected before is not after. A local start listens on loopback alone."""
    if address is None:
        # Both are read by Ray (2.60): no usage statistics, and, when it is first imported, no address but loopback, as
        # it does on Windows and macOS by itself. A cluster cannot be joined by this process afterwards.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise GuardError(
            f"Ray cannot be imported ({error}): pip install ray, or choose another engine.", code="audit.no-ray"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    try:
        _connect(ray, address, workers)
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: ModuleType, address: str | None, workers: int) -> None:
    local = {"num_cpus": workers, "include_dashboard": False} if address is None else {}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="warning", **local)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        raise GuardError(
            f"Ray at {address or 'this machine'} does not answer ({error}): check the address, and set "
            "RAY_AUTH_MODE=token where it asks for a token."
        ) from error
    if local and any(not node["NodeManagerAddress"].startswith("127.") for node in ray.nodes()):
        logger.warning("audit: Ray was imported before, so that it listens on this machine's network, not on loopback")


def _check_resources(ray: ModuleType, workers: int, gpus: float) -> None:
    """A worker that fits nowhere would be waited for without end."""
    there = ray.cluster_resources()
    for name, wanted in (("CPU", workers), ("GPU", workers * gpus)):
        if wanted > there.get(name, 0):
            raise GuardError(
                f"Ray has {there.get(name, 0):g} {name}, {wanted:g} are needed: use fewer workers.",
                code="audit.ray-too-small",
            )


def _positive(workers: int) -> int:
    if workers < 1:
        raise GuardError(f"workers: {workers} must be above 0: correct it.", code="audit.workers")
    return workers
