"""What a draw makes of a caption, and the bucket rule."""

from __future__ import annotations

import ast
import importlib.util
import math
import os
import random
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modular_lora_guard.training.data.captions import CaptionRules, draw, read, tags, warmup_steps
from modular_lora_guard.training.data.images import Buckets, Fit, ImageError, bucket_sizes, fit, sizes
from support.errors import refuses

TAG = st.text("abcdxyz_ ", min_size=1, max_size=6).map(str.strip).filter(bool)
TAGS = st.lists(TAG, min_size=1, max_size=8)


def drawn(caption: str, seed: int = 0, epoch: int = 0, step: int = 0, steps: int = 0, **rules) -> str:
    return draw(caption, CaptionRules(**rules), random.Random(seed), epoch=epoch, step=step, max_train_steps=steps)


def every(caption: str, **rules) -> set[str]:
    return {drawn(caption, seed, **rules) for seed in range(60)}


@settings(deadline=None)
@given(st.text(max_size=40))
def test_without_rules_a_caption_is_its_first_line(caption):
    assert drawn(caption) == (caption.splitlines() or [""])[0]


@settings(deadline=None)
@given(TAGS, st.integers(0, 9), st.integers(0, 2**32))
def test_shuffling_keeps_the_first_tags_in_place_and_loses_none(found, keep, seed):
    out = tags(drawn(", ".join(found), seed, shuffle_caption=True, keep_tokens=keep))
    assert out[:keep] == found[:keep]
    assert sorted(out) == sorted(found)


def test_shuffling_reaches_every_order():
    assert len(every("a, b, c", shuffle_caption=True)) == 6


@settings(deadline=None)
@given(TAGS, TAGS, TAGS, st.integers(0, 2**32))
def test_what_stands_before_and_after_the_keep_separator_stays(head, free, tail, seed):
    caption = "|||".join(", ".join(part) for part in (head, free, tail))
    out = tags(drawn(caption, seed, shuffle_caption=True, keep_tokens_separator="|||", keep_tokens=5))
    assert out[: len(head)] == head
    assert out[len(out) - len(tail) :] == tail
    assert sorted(out[len(head) : len(out) - len(tail)]) == sorted(free)


def test_the_keep_separator_never_reaches_the_text_encoder():
    assert drawn("a ||| b, c", keep_tokens_separator="|||") == "a, b, c"


def test_a_secondary_separator_holds_tags_together():
    assert every("a;;;b, c", shuffle_caption=True, secondary_separator=";;;") == {"a,b, c", "c, a,b"}


def test_tags_are_split_at_the_caption_separator():
    assert every("a b. c, d", shuffle_caption=True, caption_separator=".") == {"a b, c, d", "c, d, a b"}


def test_wildcards_draw_among_their_choices_and_doubled_braces_are_braces():
    assert every("a {red|blue} cat", enable_wildcard=True) == {"a red cat", "a blue cat"}
    assert every("{{a|b}} {c}", enable_wildcard=True) == {"{a|b} c"}
    assert every("{x|{{y}}}", enable_wildcard=True) == {"x", "{y}"}
    assert every("a {red|blue} cat") == {"a {red|blue} cat"}


def test_wildcards_draw_among_lines_with_prefix_and_suffix_on_the_line_drawn():
    lines = every("one\ntwo", enable_wildcard=True, caption_prefix="p", caption_suffix="{s|t}")
    assert lines == {"p one s", "p one t", "p two s", "p two t"}


@settings(deadline=None)
@given(st.text("{}|ab", max_size=12), st.integers(0, 99))
def test_any_nesting_of_braces_gives_a_text(caption, seed):
    out = drawn(caption, seed, enable_wildcard=True)
    assert len(out) <= len(caption)


def test_dropout_rates_are_met():
    share = sum(drawn("a", seed, caption_dropout_rate=0.3) == "" for seed in range(2000)) / 2000
    assert share == pytest.approx(0.3, abs=0.04)
    left = [len(tags(drawn("k, a, b, c, d", s, caption_tag_dropout_rate=0.25, keep_tokens=1))) for s in range(1000)]
    assert sum(left) / 1000 == pytest.approx(1 + 4 * 0.75, abs=0.1)
    assert min(left) >= 1
    assert drawn("a", caption_dropout_rate=1.0, caption_prefix="p") == ""


def test_every_nth_epoch_counted_from_one_has_no_captions():
    texts = [drawn("a", epoch=epoch, caption_dropout_every_n_epochs=3) for epoch in range(7)]
    assert texts == ["a", "a", "", "a", "a", "", "a"]


@settings(deadline=None)
@given(TAGS, st.integers(0, 3), st.integers(0, 3), st.integers(1, 50))
def test_token_warmup_grows_from_the_least_to_all_tags(found, keep, least, warm):
    rules = {"keep_tokens": keep, "token_warmup_min": least, "token_warmup_step": float(warm)}
    counts = [len(tags(drawn(", ".join(found), step=step, **rules))) for step in range(warm + 1)]
    assert counts == sorted(counts)
    assert counts[0] == len(found[:keep]) + min(least, len(found[keep:]))
    assert counts[-1] == len(found)


def test_a_share_as_token_warmup_counts_all_steps():
    rules = CaptionRules(token_warmup_step=0.25)
    assert (warmup_steps(rules, 200), warmup_steps(CaptionRules(token_warmup_step=30), 200)) == (50, 30)
    assert drawn("a, b, c", step=49, steps=200, token_warmup_step=0.25, token_warmup_min=1) == "a, b"
    assert drawn("a, b, c", step=50, steps=200, token_warmup_step=0.25, token_warmup_min=1) == "a, b, c"


@settings(deadline=None)
@given(st.text("ab,{|}\n", max_size=30), st.integers(0, 2**32))
def test_a_draw_depends_on_its_seed_alone(caption, seed):
    rules = {"shuffle_caption": True, "enable_wildcard": True, "caption_tag_dropout_rate": 0.4}
    random.seed(seed)
    first = drawn(caption, seed, **rules)
    random.seed(seed + 1)
    assert drawn(caption, seed, **rules) == first


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_caption_files_are_read_in_what_editors_write(tmp_path, encoding):
    file = tmp_path / "a.txt"
    file.write_bytes("  ein Kätzchen, 猫 \r\n\r\n zwei\n".encode(encoding))
    assert read(file) == "ein Kätzchen, 猫\nzwei"


def test_another_encoding_is_an_error_and_an_empty_file_is_empty(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("Kätzchen".encode("latin-1"))
    with refuses("caption", "a.txt", "UTF-8"):
        read(file)
    file.write_bytes(b" \n")
    assert read(file) == ""


SIDE = st.integers(1, 3000)
STEP = st.sampled_from([8, 32, 64])


@st.composite
def bucket_options(draw_: st.DrawFn) -> Buckets:
    step = draw_(STEP)
    multiple = lambda low, high: draw_(st.integers(low, high)) * step  # noqa: E731
    least = multiple(1, 6)
    resolution = (least + multiple(0, 8), least + multiple(0, 8))
    most = max(resolution) + multiple(0, 8)
    return Buckets(resolution, draw_(st.booleans()), least, most, step, draw_(st.booleans()))


@settings(deadline=None)
@given(bucket_options())
def test_buckets_have_at_most_the_area_and_multiples_of_the_step(options):
    args = (options.resolution, options.min_bucket_reso, options.max_bucket_reso, options.bucket_reso_steps)
    found = bucket_sizes(*args)
    area = options.resolution[0] * options.resolution[1]
    assert found
    for width, height in found:
        assert width * height <= area
        assert width % options.bucket_reso_steps == height % options.bucket_reso_steps == 0
        assert options.min_bucket_reso <= width <= options.max_bucket_reso
        assert (height, width) in found
    for width in range(options.min_bucket_reso, options.max_bucket_reso + 1, options.bucket_reso_steps):
        tallest = max((bucket[1] for bucket in found if bucket[0] == width), default=0)
        taller = max(tallest + options.bucket_reso_steps, options.min_bucket_reso)
        assert taller > options.max_bucket_reso or width * taller > area


@settings(max_examples=300, deadline=None)
@given(SIDE, SIDE, bucket_options())
def test_an_image_covers_its_bucket_and_is_cut_at_the_centre(width, height, options):
    try:
        found = fit((width, height), options)
    except ImageError:
        assert options.bucket_no_upscale
        assume(False)
    for resized, bucket, crop in zip(found.resized, found.bucket, found.crop, strict=True):
        assert 0 < bucket <= resized
        assert crop == (resized - bucket) // 2
    scale = max(r / side for r, side in zip(found.resized, (width, height), strict=True))
    if options.enable_bucket and options.bucket_no_upscale:
        assert scale <= 1 or max(found.resized) <= max(width, height)
        most = (
            math.prod(options.resolution) * (1 + 1 / min(found.bucket)) ** 2
        )  # one side is rounded, the other follows
        assert math.prod(found.bucket) <= most
    else:
        assert min(r - b for r, b in zip(found.resized, found.bucket, strict=True)) <= 1


def test_known_buckets_of_512():
    found = bucket_sizes((512, 512), 256, 1024, 64)
    assert found[0] == (256, 832)
    assert {(512, 512), (448, 576), (576, 448), (384, 640), (320, 768)} <= set(found)
    options = Buckets((512, 512), True)
    assert fit((1920, 1080), options).bucket == (640, 384)
    assert fit((1080, 1920), options) == Fit((384, 640), (384, 683), (0, 21))
    assert fit((300, 300), Buckets((512, 512), True, bucket_no_upscale=True)).bucket == (256, 256)
    with refuses("image.too-small", "30×300"):
        fit((30, 300), Buckets((512, 512), True, bucket_no_upscale=True))


def test_sdxl_sizes_are_original_crop_and_target():
    found = fit((1080, 1920), Buckets((512, 512), True))
    assert sizes((1080, 1920), found, False).tolist() == [1920, 1080, 21, 0, 640, 384]
    wide = fit((1001, 512), Buckets((512, 512)))
    assert sizes((1001, 512), wide, False).tolist() == [512, 1001, 0, 244, 512, 512]
    assert sizes((1001, 512), wide, True).tolist() == [512, 1001, 0, 245, 512, 512]


def sd_scripts(folder: Path, file: str, name: str):
    """A function, class or method of a real checkout, without what its module imports."""
    checkout = os.environ.get("SD_SCRIPTS_PATH")
    if not checkout:
        pytest.skip("SD_SCRIPTS_PATH names no sd-scripts checkout to compare with")
    tree = ast.parse((Path(checkout) / "library" / file).read_text(encoding="utf-8"))
    node = next(node for node in ast.walk(tree) if getattr(node, "name", None) == name)
    path = folder / f"{name}.py"
    imports = (
        "from __future__ import annotations\nimport math, random, re\nimport numpy as np\nfrom typing import Tuple\n"
    )
    path.write_text(f"{imports}\n{ast.unparse(node)}", encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def test_buckets_are_those_of_sd_scripts(tmp_path):
    theirs = sd_scripts(tmp_path, "model_util.py", "make_bucket_resolutions")
    manager = sd_scripts(tmp_path, "train_util.py", "BucketManager")
    generator = random.Random(0)
    for resolution, step in (((512, 512), 64), ((768, 512), 64), ((1024, 1024), 32), ((640, 640), 8)):
        assert list(bucket_sizes(resolution, 256, 1280, step)) == theirs(resolution, 256, 1280, step)
        for no_upscale in (False, True):
            other = manager(no_upscale, resolution, 256, 1280, step)
            other.set_predefined_resos(theirs(resolution, 256, 1280, step))
            for _ in range(300):
                size = (generator.randint(64, 2500), generator.randint(64, 2500))
                found = fit(size, Buckets(resolution, True, 256, 1280, step, no_upscale))
                assert (found.bucket, found.resized) == other.select_bucket(*size)[:2]


@pytest.mark.parametrize(
    ("caption", "rules"),
    [
        ("a, b, c", {"shuffle_caption": True, "keep_tokens": 1, "caption_prefix": "p,", "caption_suffix": ", s"}),
        ("a, b ||| c, d ||| e", {"shuffle_caption": True, "keep_tokens_separator": "|||"}),
        ("a;;;b, c", {"shuffle_caption": True, "secondary_separator": ";;;"}),
        ("a, b, c", {"caption_tag_dropout_rate": 0.5, "keep_tokens": 1}),
        ("a, b, c", {"caption_dropout_rate": 0.3}),
        ("{x|y} {{z}}, {q}", {"enable_wildcard": True}),
        ("one\ntwo {a|b}", {"enable_wildcard": True}),
        ("one\ntwo", {}),
        ("a, b, c, d, e", {"token_warmup_step": 0.5, "token_warmup_min": 1}),
        ("a, b, c, d, e", {"token_warmup_step": 20.0, "token_warmup_min": 2, "keep_tokens": 1}),
        ("a. b. c", {"shuffle_caption": True, "caption_separator": "."}),
        ("a, b", {"caption_dropout_every_n_epochs": 2}),
    ],
)
def test_draws_are_those_of_sd_scripts(tmp_path, caption, rules):
    process = sd_scripts(tmp_path, "train_util.py", "process_caption")
    for epoch, step in ((0, 0), (1, 7), (2, 13), (3, 40)):
        ours = {drawn(caption, seed, epoch=epoch, step=step, steps=30, **rules) for seed in range(200)}
        theirs = set()
        for seed in range(200):
            random.seed(seed)
            state = SimpleNamespace(current_epoch=epoch + 1, current_step=step, max_train_steps=30, replacements={})
            theirs.add(process(state, SimpleNamespace(**asdict(CaptionRules(**rules))), caption))
        assert ours == theirs
