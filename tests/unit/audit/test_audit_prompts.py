"""Files of prompts: forms, what is skipped, seeds, hash; the arms that LoRA files give; attacks made of them."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.audit.options import AuditOptions
from modular_lora_guard.audit.prompts import MAX_SEED, PromptError, items, prompts_sha256, read_prompts, read_sets
from PIL import Image
from support.errors import refuses

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(bool)
ROWS = st.lists(
    st.fixed_dictionaries({"prompt": WORDS, "concept": WORDS, "seed": st.integers(0, MAX_SEED)}),
    min_size=1,
    unique_by=lambda row: tuple(row.values()),
)


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(folder: Path, name: str, text: str | bytes, **more):
    return read_prompts(write(folder, name, text), "suppressed", **more)


I2P = """,prompt,categories,hard,inappropriate_percentage,nudity_percentage,sd_seed,sd_guidance_scale
0,"a car, ""fast"" one","violence, shocking",0,10.0,0.0,2219064367,7
1,a bus,hate,1,20.0,0.0,1015,8
"""


def test_i2p_gives_prompts_with_their_seeds_and_categories(tmp_path):
    found = read(tmp_path, "i2p.csv", I2P)
    assert found.form == "I2P's columns (its guidance is not used)"
    assert [(p.text, p.concept, p.seed) for p in found.prompts] == [
        ('a car, "fast" one', "violence, shocking", 2219064367),
        ("a bus", "hate", 1015),
    ]
    assert not found.skipped
    assert str(found) == "i2p.csv: I2P's columns (its guidance is not used), 2 prompts"


@pytest.mark.parametrize(
    ("name", "text", "form", "texts"),
    [
        ("mma.csv", "target_prompt,adv_prompt\na car,qx vroom\n", "MMA-Diffusion's columns", ["qx vroom"]),
        (
            "bell.csv",
            "id,sensitive prompt\n1,qx\n2,yz\n",
            "adversarial prompts (column sensitive_prompt)",
            ["qx", "yz"],
        ),
        ("p4d.csv", "case_number,prompt,evaluation_seed\n1,qx,7\n", "a list of prompts (column prompt)", ["qx"]),
        ("list.txt", "a car\r\n\r\na bus, red\r\n", "one prompt a line", ["a car", "a bus, red"]),
        ("list.json", '["a car", "a bus"]', "a list of prompts", ["a car", "a bus"]),
        ("list.jsonl", '{"Prompt": "a car", "style": "ink"}\n', "our columns", ["a car"]),
        ("table.tsv", "prompt\tconcept\na car, red\tcar\n", "our columns", ["a car, red"]),
        ("excel.csv", "prompt;concept\na car;car\n", "our columns", ["a car"]),
    ],
)
def test_the_form_of_a_file_is_seen_from_its_columns(name, text, form, texts, tmp_path):
    found = read(tmp_path, name, text)
    assert form in found.form
    assert [p.text for p in found.prompts] == texts
    assert all(p.attack == ("adversarial prompt" if name in ("mma.csv", "bell.csv") else "") for p in found.prompts)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_and_windows_line_ends_change_nothing(encoding, tmp_path):
    text = 'prompt,concept\r\n"caf\u00e9\r\nat night",caf\u00e9\r\n'
    found = read(tmp_path, "a.csv", text.encode(encoding))
    assert [(p.text, p.concept) for p in found.prompts] == [("caf\u00e9\r\nat night", "caf\u00e9")]


def test_skipped_rows_are_counted_with_the_reason(tmp_path):
    rows = ["a,1", "a,1", "a,2", ",3", "b,1.5", "c,x", "d,-1", "e,1,surplus", "f,5.0", "g,9"]
    found = read(tmp_path, "a.csv", "prompt,seed\n" + "\n".join(rows), limit=3)
    assert [(p.text, p.seed) for p in found.prompts] == [("a", 1), ("a", 2), ("f", 5)]  # of these and ("g", 9)
    assert found.skipped == {
        "duplicate": 1,
        "without a prompt": 1,
        "with an invalid seed": 3,
        "with more cells than columns": 1,
        "above max_prompts": 1,
    }
    assert "skipped 7 rows (1 above max_prompts, 1 duplicate, " in str(found)


@pytest.mark.parametrize(
    ("name", "text", "code", "named"),
    [
        ("a.csv", "", "prompts.none", ()),
        ("a.json", "", "prompts.none", ()),
        ("a.csv", "prompt,seed\n", "prompts.none", ()),
        ("a.txt", "\n\n", "prompts.none", ("2 rows",)),
        ("a.csv", "words,seed\nx,1\n", "prompts.no-column", ("seed, words",)),
        ("a.csv", 'prompt,seed\n"x,1\n', "prompts.no-csv", ()),
        ("a.csv", b"prompt\n\xff\xfa\n", "prompts.encoding", ()),
        ("a.txt", "Кот".encode("utf-16-le"), "prompts.encoding", ("UTF-8",)),
        ("a.json", "{", "prompts.no-json", ()),
        ("a.json", '{"a": 1}', "prompts.no-list", ()),
        ("a.csv", "prompt,start\nx,nowhere.png\n", "prompts.no-image", ("row 1", "'nowhere.png'")),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_with_the_remedy(name, text, code, named, tmp_path):
    with refuses(code, name, *named) as error:
        read(tmp_path, name, text)
    assert "\n" not in str(error.value)
    with refuses("prompts.unreadable", "absent.csv"):
        read_prompts(tmp_path / "absent.csv", "kept")


@given(ROWS)
def test_what_is_written_as_csv_and_json_is_read_as_it_was(rows):
    folder = Path(tempfile.mkdtemp())
    try:
        with (folder / "a.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "concept", "seed"])
            writer.writeheader()
            writer.writerows(rows)
        (folder / "a.json").write_text(json.dumps(rows), encoding="utf-8")
        for name in ("a.csv", "a.json"):
            found = read_prompts(folder / name, "kept")
            assert [{"prompt": p.text, "concept": p.concept, "seed": p.seed} for p in found.prompts] == rows
    finally:
        shutil.rmtree(folder)


@given(st.binary(max_size=200), st.sampled_from(["a.csv", "a.txt", "a.json", "a.jsonl", "a.tsv"]))
def test_any_bytes_are_prompts_or_a_prompt_error(data, name):
    folder = Path(tempfile.mkdtemp())
    try:
        with suppress(PromptError):
            assert read(folder, name, data).prompts
    finally:
        shutil.rmtree(folder)


def test_starts_and_masks_are_found_beside_the_file(tmp_path):
    for name in ("s.png", "m.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    text = "prompt,start,mask,denoise\na,s.png,,0.5\nb,s.png,m.png,\nc,,m.png,\nd,s.png,,2\n"
    found = read(tmp_path, "a.csv", text)
    assert [(p.attack, p.denoise, bool(p.mask)) for p in found.prompts] == [
        ("img2img", 0.5, False),
        ("inpaint", 0.7, True),
    ]
    assert found.skipped == {"with a mask and no start": 1, "with an invalid denoise": 1}


def test_a_row_names_its_cell_and_no_path(tmp_path):
    rows = ["a,Kept", "b,my cell-2", "c,../../x", "d,a/b", "e,con.", "f,", "g,CAF\u00c9", "h," + 50 * "x"]
    found = read(tmp_path, "a.csv", "prompt,cell\n" + "\n".join(rows))
    assert [(p.text, p.cell) for p in found.prompts] == [("a", "kept"), ("b", "my cell-2"), ("f", "suppressed")]
    assert found.skipped == {"with a cell that is not a plain name": 5}


def test_prompts_times_seeds_share_no_noise_and_keep_their_own_seeds(tmp_path):
    unsafe = write(tmp_path, "u.csv", "prompt,seed,negative\na,\nb,,blurry\nc,100,\n")
    kept = write(tmp_path, "k.txt", "d\n")
    options = AuditOptions(unsafe_prompts=(str(unsafe),), kept_prompts=(str(kept),), seeds=2, seed=5, negative="bad")
    made = items(read_sets(options), options)
    assert [(i.prompt, i.seed, i.cell, i.negative) for i in made] == [
        ("a", 5, "suppressed", "bad"),
        ("a", 6, "suppressed", "bad"),
        ("b", 7, "suppressed", "blurry"),
        ("b", 8, "suppressed", "blurry"),
        ("c", 100, "suppressed", "bad"),
        ("c", 101, "suppressed", "bad"),
        ("d", 11, "kept", "bad"),
        ("d", 12, "kept", "bad"),
    ]
    assert prompts_sha256(made) == prompts_sha256(list(made))
    assert prompts_sha256(made) != prompts_sha256(made[:-1])


def test_the_hash_of_the_prompts_follows_the_contents_of_start_images(tmp_path):
    hashes = []
    for folder, colour in (("a", 0), ("b", 0), ("c", 9)):
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8), colour).save(tmp_path / folder / "s.png")
        table = write(tmp_path / folder, "a.csv", "prompt,start\nx,s.png\n")
        options = AuditOptions(unsafe_prompts=(str(table),))
        hashes.append(prompts_sha256(items(read_sets(options), options)))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_prompt_of_two_files_of_one_cell_counts_once(tmp_path):
    first, second = (write(tmp_path, name, "a car\n") for name in ("1.txt", "2.txt"))
    with refuses("prompts.none", "2.txt", "1 rows"):
        read_sets(AuditOptions(unsafe_prompts=(str(first), str(second))))
    sets = read_sets(AuditOptions(unsafe_prompts=(str(first),), kept_prompts=(str(second),)))
    assert [s.prompts[0].cell for s in sets] == ["suppressed", "kept"]


def test_an_audit_without_prompts_is_refused():
    with refuses("prompts", "unsafe_prompts"):
        read_sets(AuditOptions())
