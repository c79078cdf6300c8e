"""Trying to get out: every attempt of the catalogue against the real ComfyUI under a policy, in one process."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from modular_lora_guard.modular_lora.util.hashing import hash_file
from support import (
    escape_actions,  # noqa: F401 - these add their attempts
    escape_bases,  # noqa: F401 - these add their attempts
    escape_cancelling,  # noqa: F401 - these add their attempts
    escape_detours,  # noqa: F401 - these add their attempts
    escape_leaves,  # noqa: F401 - these add their attempts
    escape_requests,  # noqa: F401 - these add their attempts
)
from support.drop_in import translated, without_node
from support.escape_ground import Ground
from support.escapes import ATTEMPTS, Attempt

ATTACH_SAMPLE = 5
REQUIRED = re.compile(r'{sha256 = "(\w+)"')  # a safety LoRA in a policy


@pytest.fixture(scope="module")
def ground(comfy, loras) -> Iterator[Ground]:
    made = Ground(comfy)
    try:
        made.open()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def outcomes() -> Counter:
    """Of attempts with the drop-in node: (it is in the graph, what came of it) -> how many."""
    return Counter()


@pytest.fixture(scope="module")
def attached() -> Counter:
    """Of attempts without a node: (the policy attaches, what came of it) -> how many."""
    return Counter()


def _without_a_node() -> list[Attempt]:
    """The attempts that are some without a node.

    Left out are a prompt of a million characters, which ComfyUI itself encodes in 20 GB and more, with a guard or
    without, and files that come as a second safety LoRA, which only a node of the guard takes.
    """
    left = ("the sampler stands behind a prompt of a million characters",)
    return [one for one in ATTEMPTS if one.name not in left and "as a second safety LoRA" not in one.name]


def file_of(ground: Ground, sha256: str) -> str:
    """The name of a LoRA's file; "" where none has this SHA-256."""
    files = (path for path in sorted(ground.loras.glob("*.safetensors")) if hash_file(path) == sha256)
    return next((path.name for path in files), "")


def what_came(ground: Ground, images: list[Path]) -> str:
    """What came of an attempt whose images all passed the judge."""
    if ground.seen.refused:
        return "refused and attested" if images else "refused"
    if images:
        return "attested"
    return "invalid" if ground.seen.invalid or any(status >= 400 for status, _ in ground.seen.answers) else "nothing"


def judged(ground: Ground, one: Attempt) -> dict[str, int]:
    """What came of an attempt that another guard stands against than the one it was written for: the judge decides.

    What an attempt asks of its refusals holds for this pack's own nodes. Where that is not so, it ends there, which is
    counted.
    """
    ground.write(ground.text(one.policy))
    ground.begin()
    ended = {}
    try:
        one.act(ground)
    except AssertionError:
        ended = {"ended": 1}
    images = ground.images()  # every one of them is attested
    assert not ground.seen.unguarded
    said = {line["reason"] for line in ground.refusals()}
    for sentence in ground.seen.refused:
        assert any(line in sentence.strip() for line in said), f"not in the record: {sentence}"
    return {what_came(ground, images): 1, **ended}


@pytest.mark.sampled(80)
@pytest.mark.parametrize("one", ATTEMPTS, ids=lambda one: one.name)
def test_no_unguarded_image_comes_out(ground: Ground, one: Attempt, record_property) -> None:
    ground.write(ground.text(one.policy))
    ground.begin()
    one.act(ground)
    images = ground.images()  # every one of them is attested
    assert not ground.seen.unguarded
    record_property("outcomes", {one.outcome: 1})
    if one.outcome == "permitted":
        assert not ground.seen.refused
        assert not ground.seen.invalid
        assert images
        return
    if one.outcome == "invalid":
        assert ground.seen.invalid or any(status >= 400 for status, _ in ground.seen.answers)
        return
    if ground.seen.invalid and all("invalid_prompt_id" in said for said in ground.seen.invalid):
        return  # ComfyUI 0.33 refuses such an id itself, before a policy is asked
    assert ground.seen.refused, ground.seen.invalid
    said = {line["reason"] for line in ground.refusals()}
    for sentence in ground.seen.refused:
        assert any(line in sentence.strip() for line in said), f"not in the record: {sentence}"


@pytest.mark.sampled(60)
@pytest.mark.parametrize("one", ATTEMPTS, ids=lambda one: one.name)
def test_nor_does_one_where_the_drop_in_node_is_the_guard(
    ground: Ground, one: Attempt, monkeypatch, record_property, outcomes
) -> None:
    """Every graph of the catalogue with Guard, stock loaders, samplers and decode in the place of our own nodes."""
    queue = ground.queue
    changed = []

    def queued(graph, *args, **kwargs):
        made = translated(graph)
        changed.append(made is not None and made != graph)
        return queue(graph if made is None else made, *args, **kwargs)

    monkeypatch.setattr(ground, "queue", queued)
    came = judged(ground, one)
    outcomes[any(changed), next(iter(came))] += 1
    record_property("outcomes", came)


@pytest.mark.sampled(ATTACH_SAMPLE)
@pytest.mark.parametrize("one", _without_a_node(), ids=lambda one: one.name)
def test_nor_does_one_where_every_model_is_guarded_without_a_node(
    ground: Ground, one: Attempt, monkeypatch, record_property, attached
) -> None:
    """The same graphs without any node of the guard, and those that cannot be had so as they are."""
    queue, put = ground.queue, ground.put
    changed = []

    def attaching(text):
        named = REQUIRED.search(text or "")
        if named and (file := file_of(ground, named[1])):
            changed.append(True)
            text = text.replace("[guard]\n", '[guard]\nattach = "always"\n', 1)
            text = text.replace(named[0], f'{{file = "{file}", {named[0][1:]}')
        put(text)

    def queued(graph, *args, **kwargs):
        made = translated(graph)
        return queue(graph if made is None else without_node(made), *args, **kwargs)

    monkeypatch.setattr(ground, "queue", queued)
    monkeypatch.setattr(ground, "put", attaching)
    came = judged(ground, one)
    attached[bool(changed), next(iter(came))] += 1
    record_property("outcomes", came)


def test_without_a_node_graphs_were_guarded_sampled_and_refused(attached, extent) -> None:
    count = extent(ATTACH_SAMPLE, len(_without_a_node()))
    if sum(attached.values()) < count:
        pytest.skip("needs the attempts above in the same process")
    came = Counter({what: n for (by_policy, what), n in attached.items() if by_policy})
    assert came.total() >= 0.3 * count
    assert came["attested"] + came["refused and attested"] >= 0.1 * count
    assert came["refused"] + came["refused and attested"] >= 0.1 * count


def test_with_the_drop_in_node_graphs_were_sent_sampled_and_refused(outcomes) -> None:
    if sum(outcomes.values()) < 60:
        pytest.skip("needs the attempts above in the same process")
    with_guard = Counter({what: n for (in_graph, what), n in outcomes.items() if in_graph})
    assert with_guard.total() >= 20
    assert with_guard["attested"] >= 1
    assert with_guard["refused"] >= 10


def test_there_are_enough_attempts_and_each_has_a_name_of_its_own() -> None:
    names = [one.name for one in ATTEMPTS]
    assert len(names) == len(set(names)) >= 60
    assert sum(one.outcome == "permitted" for one in ATTEMPTS) < len(names) / 4
    assert "support.escapes" in sys.modules
