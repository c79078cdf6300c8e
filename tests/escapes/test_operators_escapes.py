"""Trying to get out: every attempt of the catalogue against the real ComfyUI under a policy, in one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from support import (
    escape_actions,  # noqa: F401 - these add their attempts
    escape_bases,  # noqa: F401 - these add their attempts
    escape_cancelling,  # noqa: F401 - these add their attempts
    escape_detours,  # noqa: F401 - these add their attempts
    escape_leaves,  # noqa: F401 - these add their attempts
    escape_requests,  # noqa: F401 - these add their attempts
)
from support.escape_ground import Ground
from support.escapes import ATTEMPTS, Attempt


@pytest.fixture(scope="module")
def ground(comfy, loras) -> Iterator[Ground]:
    made = Ground(comfy)
    try:
        made.open()
        yield made
    finally:
        made.close()


@pytest.mark.sampled(80)
@pytest.mark.parametrize("one", ATTEMPTS, ids=lambda one: one.name)
def test_no_unguarded_picture_comes_out(ground: Ground, one: Attempt, record_property) -> None:
    ground.write(ground.text(one.policy))
    ground.begin()
    one.act(ground)
    pictures = ground.pictures()  # every one of them is attested
    assert not ground.seen.unguarded
    record_property("outcome", one.outcome)
    if one.outcome == "permitted":
        assert not ground.seen.refused
        assert not ground.seen.invalid
        assert pictures
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


def test_there_are_enough_attempts_and_each_has_a_name_of_its_own() -> None:
    names = [one.name for one in ATTEMPTS]
    assert len(names) == len(set(names)) >= 60
    assert sum(one.outcome == "permitted" for one in ATTEMPTS) < len(names) / 4
    assert "support.escapes" in sys.modules
