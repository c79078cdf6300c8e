"""The audit's engines: the same images wherever they are drawn; nothing lost and nothing twice when a worker dies."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
from modular_lora_guard.audit import engines
from modular_lora_guard.audit.engines import DEATHS, Local, PipelineSpec, Processes, RayCluster
from modular_lora_guard.audit.judge import Judge
from modular_lora_guard.audit.plan import Arm, Item, Sampling
from modular_lora_guard.audit.run import Audit, run_audit
from modular_lora_guard.gate.finding import Finding
from PIL import Image
from support.errors import refuses
from support.fake_pipeline import FakePipeline

ROOT = Path(__file__).resolve().parents[3]
SPEC = PipelineSpec("tests.support.fake_pipeline", "open_pipeline")


class Brightness:
    name, sha256, labels, exclusive = "brightness", "1" * 64, ("bright", "dark"), ("bright", "dark")

    def detect(self, images):
        return [Finding({"bright": float(p.mean()), "dark": 1 - float(p.mean())}) for p in images]


class Watch:
    def __init__(self, stop_at: int = 10**9):
        self.done, self.stop_at = 0, stop_at

    def check(self):
        if self.done >= self.stop_at:
            raise KeyboardInterrupt

    def stage(self, text, done, total):
        self.done = done


JUDGE = Judge(Brightness(), {"bright": 0.5}, {})


def audit_of(*prompts: str) -> Audit:
    items = tuple(Item(prompt, seed, "suppressed", prompt) for seed, prompt in enumerate(prompts))
    return Audit((Arm("base"), Arm("task", training_seed=1)), items, Sampling(width=16, height=8), unit_size=2)


def pipeline(folder: Path, **arguments) -> dict[str, str]:
    return {"log": str(folder / "log"), "die": str(folder / "died"), **arguments}


def drawn(folder: Path) -> Counter:
    """How often each unit was drawn."""
    return Counter((folder / "log").read_text(encoding="utf-8").splitlines())


def pixels(ran) -> list[bytes]:
    return [Image.open(one.path).tobytes() for one in ran]


def skip_without_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is an optional extra and is not installed")


@pytest.fixture(scope="module", params=["processes", pytest.param("ray", marks=pytest.mark.slow)])
def engine_of(request):
    """An engine of two workers for a pipeline's arguments; one Ray for all tests, as a cluster that is up already."""
    make = lambda arguments, **other: PipelineSpec("tests.support.fake_pipeline", arguments=arguments, **other)  # noqa: E731
    if request.param == "processes":
        yield lambda arguments, function="open_pipeline": Processes(make(arguments, function=function), workers=2)
        return
    skip_without_ray()
    with engines._ray(None, 2):
        yield lambda arguments, function="open_pipeline": RayCluster(make(arguments, function=function), 2)


@pytest.fixture
def local(tmp_path):
    """Runs an audit in this process, where nobody dies, in a folder of its own."""

    def run(audit: Audit):
        folder = tmp_path / "local"
        folder.mkdir()
        (folder / "died").touch()
        return run_audit(audit, Local(FakePipeline(**pipeline(folder))), JUDGE, folder / "audit", Watch())

    return run


@pytest.mark.slow
def test_ray_is_started_on_loopback_for_one_audit_and_ended_with_it(tmp_path):
    skip_without_ray()
    engine = RayCluster(PipelineSpec("tests.support.fake_pipeline", "open_pipeline", pipeline(tmp_path)), workers=1)
    with engine.open(lambda: None):
        import ray  # not before: Ray listens on loopback alone when it is imported for that

        assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
        too_many = RayCluster(engine.spec, workers=5)
        with refuses("audit.ray-too-small", "1 CPU", "5"), too_many.open(lambda: None):
            pass
        assert ray.is_initialized()  # the inner one did not start it
    assert not ray.is_initialized()


def test_a_worker_killed_in_the_middle_loses_nothing_and_repeats_nothing(engine_of, local, tmp_path):
    audit = audit_of("a", "b", "c", "die", "e", "f", "g")
    ran = run_audit(audit, engine_of(pipeline(tmp_path)), JUDGE, tmp_path / "audit", Watch())
    assert (tmp_path / "died").exists()
    assert ran.replaced == 1
    assert set(drawn(tmp_path).values()) == {1}
    assert len(drawn(tmp_path)) == ran.units == 8
    expected = local(audit)
    assert [(one.arm, one.item, one.verdict) for one in ran] == [(o.arm, o.item, o.verdict) for o in expected]
    assert pixels(ran) == pixels(expected)
    assert [one.path.parent.name for one in ran] == [one.path.parent.name for one in expected]  # the same keys


def test_an_interrupted_audit_goes_on_where_it_stopped(engine_of, local, tmp_path):
    audit = audit_of("a", "b", "c", "d", "e")
    with pytest.raises(KeyboardInterrupt):
        run_audit(audit, engine_of(pipeline(tmp_path)), JUDGE, tmp_path / "audit", Watch(stop_at=4))
    before = len(list((tmp_path / "audit").glob("*/*/unit.json")))
    ran = run_audit(audit, engine_of(pipeline(tmp_path)), JUDGE, tmp_path / "audit", Watch())
    assert 0 < before < ran.units
    assert ran.reused == before
    assert pixels(ran) == pixels(local(audit))


def test_what_a_pipeline_complains_of_ends_the_audit_with_its_words(engine_of, tmp_path):
    with refuses("audit.worker-failed", "it was told to"):
        run_audit(audit_of("a", "fail"), engine_of(pipeline(tmp_path)), JUDGE, tmp_path / "audit", Watch())
    with refuses("audit.worker-failed", "ValueError: no such thing"):
        run_audit(audit_of("a", "crash"), engine_of(pipeline(tmp_path)), JUDGE, tmp_path / "audit", Watch())
    engine = engine_of({"checkpoint": "the base"}, function="open_missing")
    with refuses("audit.worker-failed", "the base: no such file"):
        run_audit(audit_of("a"), engine, JUDGE, tmp_path / "audit", Watch())


def test_workers_draw_for_a_driver_that_knows_the_pack_by_another_name(engine_of, tmp_path):
    """As in ComfyUI, whose name for it is its path."""
    name = f"{ROOT}/as ComfyUI says"
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    other = importlib.import_module("modular_lora_guard.audit.engines")
    known = engine_of(pipeline(tmp_path))
    plan = importlib.import_module("modular_lora_guard.audit.plan")
    engine = getattr(other, type(known).__name__)(known.spec, workers=1)
    with engine.open(lambda: None) as pool:
        items = [plan.Item("a", 1, "suppressed")]
        work = list(plan.units([plan.Arm("base")], items, plan.Sampling(), pool.origin, 1))
        assert [unit for unit, _ in pool.draw(work, lambda: None)] == work


def test_each_device_has_a_process_and_devices_that_draw_differently_are_refused(tmp_path):
    spec = PipelineSpec("tests.support.fake_pipeline", "open_pipeline", pipeline(tmp_path))
    ran = run_audit(audit_of("a", "b"), Processes(spec, devices=(1,)), JUDGE, tmp_path / "audit", Watch())
    assert ran.origin.device == "fake 1"
    with refuses("audit.workers-differ"):
        run_audit(audit_of("a", "b", "c"), Processes(spec, devices=(0, 2)), JUDGE, tmp_path / "audit", Watch())


def test_a_unit_that_kills_every_worker_is_named_and_ends_the_audit(tmp_path):
    engine = Processes(PipelineSpec("tests.support.fake_pipeline", "open_pipeline", pipeline(tmp_path)))
    with refuses("audit.worker-died", f"{DEATHS + 1} times", "arm base"):
        run_audit(audit_of("die always"), engine, JUDGE, tmp_path / "audit", Watch())


def test_a_missing_ray_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with refuses("audit.no-ray"), RayCluster(SPEC, 1).open(lambda: None):
        pass


def test_no_workers_are_refused():
    with refuses("audit.workers", "0"), Processes(SPEC, workers=0).open(lambda: None):
        pass
