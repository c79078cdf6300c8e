"""What is remembered of a node's outputs, by the hashes of its inputs alone."""

from __future__ import annotations

import pytest
import torch
from modular_lora_guard.modular_lora.provenance import edits, ledger
from modular_lora_guard.modular_lora.provenance.attestation import Activity, Attestation, LoraRecord


def run(status: str = "guarded", safety: str = "s", seed: int = 0) -> Attestation:
    loras = (LoraRecord("safety", f"{safety}.safetensors", safety * 64, 1.0, 1.0),)
    return Attestation(status, "pack", "SD15", "b" * 64, False, loras, {}, evaluations=seed + 1)


@pytest.fixture(autouse=True)
def fresh():
    for table in (ledger.images, ledger.latents, ledger.masks, ledger.passed):
        table.clear()


def image(seed: int, record: Attestation | None = None, n: int = 1) -> torch.Tensor:
    made = torch.rand(n, 4, 4, 3, generator=torch.Generator().manual_seed(seed))
    for one in made if record else ():
        ledger.images.put(ledger.tensor_sha256(one), record)
    return made


def follow(made: torch.Tensor, *given: torch.Tensor, node: str = "Edit", vouched: bool = True) -> list[str]:
    """What is known of each image that a node made of others."""
    edits.follow(node, vouched, [edits.rows(one, "image") for one in given], [edits.rows(made, "image")])
    return [ledger.known(one).status for one in made]


OUTSIDE, MERGED = "guarded, outside start", "guarded, merged base"
STARTED = "guarded throughout, started from an outside picture"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("guarded", "guarded", "guarded; edited: Edit"),
        ("guarded", OUTSIDE, f"{STARTED}; edited: Edit"),
        (MERGED, OUTSIDE, f"{MERGED}; edited: Edit"),
        (MERGED, f"{MERGED}, outside start", f"{MERGED}, started from an outside picture; edited: Edit"),
        ("guarded", "replaced by the gate", "not guarded"),
        ("guarded", None, "not guarded"),
    ],
)
def test_of_two_images_the_worst_counts_in_either_order(one, other, expected):
    given = [image(1, run(one)), image(2, run(other) if other else None)]
    assert follow(image(3), *given) == [expected]
    assert follow(image(4), *reversed(given)) == [expected]


def test_images_of_one_batch_are_told_apart_and_a_mixed_one_is_not():
    batch = torch.cat([image(1, run()), image(2)])
    assert follow(image(3, n=2), batch) == ["guarded; edited: Edit", "not guarded"]
    assert follow(image(4, n=1), batch) == ["not guarded"]
    assert follow(image(5, n=2), batch, image(6, run())) == ["not guarded"] * 2


def test_what_nobody_vouches_for_stays_so_and_names_every_such_node():
    first = image(2)
    assert follow(first, image(1, run()), node="Load", vouched=False) == ["passed through Load: not vouched for"]
    second, third = image(3), image(4)
    assert follow(second, first, node="Scale") == ["passed through Load: not vouched for"]
    assert follow(third, second, node="More", vouched=False) == ["passed through Load, More: not vouched for"]
    assert follow(image(5), third, image(6)) == ["not guarded"]  # with one from outside
    assert ledger.known(third[0]).record() == {
        "status": "unattested",
        "gate": None,
        "passed_through": ["Load", "More"],
    }


def test_an_image_that_comes_out_as_it_went_in_is_what_it_was():
    guarded, outside = image(1, run()), image(2)
    assert follow(guarded, guarded, node="Load", vouched=False) == ["guarded"]
    assert follow(guarded, guarded, outside) == ["guarded"]
    assert follow(outside, guarded, outside, node="Load", vouched=False) == ["passed through Load: not vouched for"]
    assert follow(outside, outside) == ["passed through Load: not vouched for"]


def test_an_edit_is_named_once_and_edits_stand_in_their_order():
    made = [image(1, run()), image(2), image(3), image(4)]
    for before, after, node in zip(made, made[1:], ("Scale", "Crop", "Scale"), strict=False):
        said = follow(after, before, node=node)
    assert said == ["guarded; edited: Scale, Crop"]
    assert ledger.known(made[-1][0]).edits == ("Scale", "Crop")


def test_more_runs_than_are_kept_make_an_image_of_which_nothing_is_known():
    given = [image(seed, run(seed=seed)) for seed in range(edits.MOST_RUNS + 1)]
    assert follow(image(100), *given[:-1]) == ["guarded; edited: Edit"]
    assert len(ledger.known(image(100)[0]).run.runs) == edits.MOST_RUNS
    assert follow(image(101), *given) == ["not guarded"]


def test_a_run_starts_outside_unless_all_of_it_is_of_guarded_runs_with_the_same_safety_loras():
    latent = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(1))
    zeros, record = torch.zeros(4, 8, 8), run()
    assert edits.start([zeros], None, record) == (False, ())
    assert edits.start([latent], None, record).outside
    ledger.latents.put(ledger.tensor_sha256(latent), run().edited(("LatentUpscale", "VAEEncode")))
    assert edits.start([latent, zeros], None, record) == (False, ("VAEEncode",))
    assert edits.start([latent], None, run(safety="t")).outside
    two = run().of(others=(run(safety="t"),))
    ledger.latents.put(ledger.tensor_sha256(latent), two)
    assert edits.start([latent], None, record).outside


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 8, 8), (8, 8)])
def test_a_mask_of_one_value_holds_no_image_and_another_does(shape):
    latent, record = torch.ones(4, 8, 8), run()
    ledger.latents.put(ledger.tensor_sha256(latent), record)
    assert not edits.start([latent], torch.full(shape, 0.5), record).outside
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    assert edits.start([latent], drawn, record).outside
    assert edits.start([torch.zeros(4, 8, 8)], drawn, record).outside  # a stencil, of nothing and of what is sampled
    assert not edits.start([latent], torch.full(shape, 0.5) + 1e-6 * drawn, record).outside  # resized: rounded


def test_a_picture_beside_the_latents_is_told_unless_a_guarded_run_made_it():
    record, latent = run(), torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2))
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))]
    assert not edits.pictured(noise, [], record)
    assert edits.pictured([torch.ones(4, 8, 8).cumsum(-1)], [], record)
    rows = edits.rows(latent[None], "latent")
    assert edits.pictured(noise, [rows], record)
    assert not edits.pictured(noise, [edits.rows(torch.zeros(1, 4, 8, 8), "latent")], record)
    ledger.latents.put(ledger.tensor_sha256(latent), record)
    assert not edits.pictured(noise, [rows], record)


def test_a_gate_in_front_of_an_edited_image_keeps_its_edits():
    from modular_lora_guard.modular_lora.provenance.attestation import GateRecord

    scaled = image(2)
    follow(scaled, image(1, run()), node="Scale")
    source, blurred = ledger.tensor_sha256(scaled[0]), image(3)
    ledger.record_gate(GateRecord("d", "d" * 64, "s" * 64, "blur", True, True, source), blurred[0])
    assert ledger.known(blurred[0]).status == "guarded; edited: Scale"
    assert ledger.known(blurred[0]).gate.changed


# A node that samples by itself


def inside(*given: torch.Tensor) -> edits.Inside:
    return edits.Inside("Detail", [edits.source(row) for one in given for row in edits.rows(one, "image")])


@pytest.mark.parametrize(
    ("before", "safety", "outside"),
    [("guarded", "s", False), (OUTSIDE, "s", True), (MERGED, "s", True), ("guarded", "other", True)],
)
def test_a_run_inside_a_node_starts_from_what_the_node_was_given(before, safety, outside):
    assert inside(image(1, run(before, safety))).start(run()).outside is outside
    assert inside(image(1, run()), image(2)).start(run()).outside  # and one from outside


def test_a_run_inside_a_node_starts_from_an_edit_of_what_the_node_was_given_if_there_was_any():
    scaled = image(5)
    follow(scaled, image(4, run()), node="Scale")
    assert inside(scaled).start(run()).edits == ("Scale", "Detail")
    assert inside().start(run()).edits == ()


def test_the_runs_that_a_node_made_are_behind_its_image_as_one_with_all_that_they_counted():
    given, made, safety = image(1, run(seed=40)), image(2), "s" * 64
    tiles = [
        run().of(evaluations=4, firings=8, acted_strength={safety: least}, activity={safety: Activity(value, "")})
        for least, value in ((None, 0.1), (0.8, 0.3), (0.9, 0.2))
    ] * 20  # more than may stand behind one image
    edits.follow("Tiles", True, [edits.rows(given, "image")], [edits.rows(made, "image")], tiles)
    first, inner = ledger.known(made[0]).run.runs
    assert ledger.known(made[0]).status == "guarded; edited: Tiles"
    assert (first.evaluations, inner.evaluations, inner.firings) == (41, 240, 480)
    assert (inner.acted_strength, inner.activity[safety].value) == ({safety: 0.8}, 0.3)


def test_runs_of_other_guards_stay_apart_and_the_worst_of_all_counts():
    ran = [run(), run(safety="other"), run(OUTSIDE), run()]
    assert [one.status for one in edits.together(ran)] == ["guarded", "guarded", OUTSIDE]
    made = image(2)
    edits.follow("Tiles", True, [edits.rows(image(1, run()), "image")], [edits.rows(made, "image")], ran)
    assert ledger.known(made[0]).status == f"{STARTED}; edited: Tiles"
    assert {one.name for each in ledger.known(made[0]).run.runs for one in each.safety} == {
        "s.safetensors",
        "other.safetensors",
    }
