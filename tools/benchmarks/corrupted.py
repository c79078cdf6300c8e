"""A seeded corpus of corrupted LoRA files: KINDS and HEAVY are broken for any reader, DAMAGE a valid file may survive.

Every function takes a random generator and a sound file and gives the bytes of a corrupted one. What KINDS and HEAVY
make is never a LoRA, whatever the numbers drawn. What DAMAGE makes may be one, with other weights (a flipped bit of a
mantissa): no reader can tell, other than by the hash or the signature of the file that was released.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

import torch
from safetensors.torch import save

HEADER_LIMIT = 16 * 2**20  # bytes, as modular_lora.files has it
ASSETS = ("safety_vehicles", "task_gloss", "sequential_gloss")
STYLES = (
    ("{}.lora_down.weight", "{}.lora_up.weight"),
    ("{}.lora_A.weight", "{}.lora_B.weight"),
    ("{}.lora.down.weight", "{}.lora.up.weight"),
)
FORMS: dict[str, dict[str, tuple[int, ...]]] = {  # parts that belong together, none of them optional
    "LoHa": {"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 3), "hada_w2_b": (3, 5)},
    "LoHa Tucker": {
        "hada_w1_a": (2, 6), "hada_w1_b": (2, 5), "hada_t1": (2, 2, 3, 3),
        "hada_w2_a": (4, 6), "hada_w2_b": (4, 5), "hada_t2": (4, 4, 3, 3),
    },
    "LoKr": {"lokr_w1": (2, 3), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 5)},
    "LoKr whole": {"lokr_w1_a": (2, 4), "lokr_w1_b": (4, 3), "lokr_w2": (6, 5, 3, 3)},
    "OFT": {"oft_blocks": (3, 4, 4)},
    "difference": {"diff": (6, 5, 3, 3)},
    "norm": {"w_norm": (6,)},
    "replaced weight": {"set_weight": (6, 5)},
}  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
INF = {"F32": b"\0\0\x80\x7f", "F16": b"\0\x7c", "BF16": b"\x80\x7f", "F8_E4M3": b"\x7f"}  # the last one: NaN
NAN = {"F32": b"\0\0\xc0\x7f", "F16": b"\0\x7e", "BF16": b"\xc0\x7f", "F8_E4M3": b"\xff"}


@dataclass(frozen=True)
class Sound:
    """A valid file, taken apart."""

    raw: bytes
    header: dict[str, Any]
    body: bytes

    @property
    def weights(self) -> list[str]:
        return [name for name in self.header if name.endswith(".weight")]


def apart(raw: bytes) -> Sound:
    length = struct.unpack("<Q", raw[:8])[0]
    return Sound(raw, json.loads(raw[8 : 8 + length]), raw[8 + length :])


def sound_file(rng: Random, folder: Path) -> Sound:
    """One of the demo world's LoRAs, or a small random one in any of the names and dtypes that are read."""
    if rng.random() < 0.05:
        return apart((folder / f"demo_{rng.choice(ASSETS)}.safetensors").read_bytes())
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    tensors, dtype = {}, rng.choice(DTYPES)
    for i in range(rng.randint(1, 6)):
        rank, size, out = rng.randint(1, 4), rng.randint(5, 16), rng.randint(5, 16)  # size is never the rank
        tail, style = rng.choice([(), (), (3, 3)]), rng.choice(STYLES)
        for name, shape in zip(style, ((rank, size, *tail), (out, rank, *(1 for _ in tail))), strict=True):
            tensors[name.format(f"lora_unet_block_{i}")] = (torch.rand(shape, generator=generator) + 0.5).to(dtype)
        if style == STYLES[0] or rng.random() < 0.3:
            tensors[f"lora_unet_block_{i}.alpha"] = torch.tensor(float(rank)).to(dtype)
    for i in range(rng.choice([0, 0, 1, 3])):
        for role, shape in FORMS[rng.choice(list(FORMS))].items():
            tensors[f"lora_unet_other_{i}.{role}"] = (torch.rand(shape, generator=generator) + 0.5).to(dtype)
    metadata = {"ss_base_model_version": "sd_v1"} if rng.random() < 0.5 else None
    return apart(save(tensors, metadata))


def build(header: Any, body: bytes) -> bytes:
    """A file from any header: bytes as they are, else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _entry(rng: Random, sound: Sound, **fields: Any) -> bytes:
    """One weight's entry with other fields."""
    name = rng.choice(sound.weights)
    return build(sound.header | {name: sound.header[name] | fields}, sound.body)


def truncated(rng: Random, sound: Sound) -> bytes:
    return sound.raw[: rng.randrange(len(sound.raw))]


def appended(rng: Random, sound: Sound) -> bytes:
    return sound.raw + rng.randbytes(rng.randint(1, 64))


def header_length(rng: Random, sound: Sound) -> bytes:
    real = struct.unpack("<Q", sound.raw[:8])[0]
    near = real + rng.choice([-1, 1]) * rng.randint(1, max(1, real - 1))
    length = rng.choice([near, 0, 1, len(sound.raw), len(sound.raw) - 7, rng.getrandbits(64), 2**64 - 1, 2**63])
    return struct.pack("<Q", length if length != real else real + 1) + sound.raw[8:]


def cut_json(rng: Random, sound: Sound) -> bytes:
    text = json.dumps(sound.header).encode()
    return build(text[: rng.randrange(2, len(text))], sound.body)


def bad_text(rng: Random, sound: Sound) -> bytes:
    text = json.dumps(sound.header).encode()
    place = rng.randrange(1, len(text))
    return build(text[:place] + rng.choice([b"\xff", b"\0", b"\xc0\xaf", b"\xed\xa0\x80"]) + text[place:], sound.body)


def other_json(rng: Random, sound: Sound) -> bytes:
    depth = rng.choice([1, 50, 500, 990, 5000, 100_000])
    texts = (f"[{rng.random()}]", "null", "true", '"x"', str(rng.random()), "[" * depth, "[" * depth + "]" * depth)
    return build(rng.choice([text.encode() for text in texts]), sound.body)


def key_twice(rng: Random, sound: Sound) -> bytes:
    text, name = json.dumps(sound.header), json.dumps(rng.choice(sound.weights))
    entry = json.dumps(sound.header[json.loads(name)])
    if rng.random() < 0.5:
        return build(("{" + f"{name}: {entry}, " + text[1:]).encode(), sound.body)
    return build(text.replace('"dtype":', '"dtype": "F32", "dtype":', rng.randint(1, 2)).encode(), sound.body)


def dtype(rng: Random, sound: Sound) -> bytes:
    other = [
        "F64",
        "I8",
        "BOOL",
        "f32",
        "",
        None,
        5,
        ["F32"],
        {},
        "F32 ",
        "U64",
        "F4",
        "E8M0",
        "F" * rng.randint(3, 999),
    ]
    return _entry(rng, sound, dtype=rng.choice(other))


def shape(rng: Random, sound: Sound) -> bytes:
    n = rng.randint(1, 9999)
    bad = [
        [],
        [0, n],
        [-n, 4],
        [2.0, n],
        [True, n],
        ["2", n],
        [2**31, n],
        [10**400, n],
        [1] * 5,
        None,
        n,
        "x",
        {"a": n},
    ]
    return _entry(rng, sound, shape=rng.choice([*bad, [2**32, 2**32 + n], [n, [n]], [float("nan"), n], [1e308, n]]))


def turned_shape(rng: Random, sound: Sound) -> bytes:
    name = rng.choice([n for n in sound.weights if sound.header[n]["shape"][0] != sound.header[n]["shape"][1]])
    first, second, *rest = sound.header[name]["shape"]
    entry = sound.header[name] | {"shape": [second, first, *rest]}
    return build(sound.header | {name: entry}, sound.body)


def offsets(rng: Random, sound: Sound) -> bytes:
    start, end = sound.header[name := rng.choice(sound.weights)]["data_offsets"]
    n = rng.randint(1, 10**6)
    bad = [[-n, end], [start, end + n], [start + n, end + n], [end, start], [start, start], [float(start), end], [end]]
    bad += [[True, end], [start, 2**63 + n], [str(start), end], [start, end, n], None, n, [start, end - 1]]
    bad += [[start, 10**400], [start, -1], [None, end], [[start], end], {}, [2**64 - n, 2**64]]
    entry = sound.header[name] | {"data_offsets": rng.choice(bad)}
    return build(sound.header | {name: entry}, sound.body)


def overlapping(rng: Random, sound: Sound) -> bytes:
    """Two tensors on the same bytes, wholly or in part; or a hole between two."""
    names = sorted(sound.weights, key=lambda n: sound.header[n]["data_offsets"])
    shift = rng.randint(1, 64) * rng.choice([-1, 1])
    start, end = sound.header[name := rng.choice(names)]["data_offsets"]
    onto = sound.header[rng.choice([n for n in names if n != name])]["data_offsets"]
    moved = [start + shift, end + shift] if rng.random() < 0.5 else onto
    return build(sound.header | {name: sound.header[name] | {"data_offsets": moved}}, sound.body)


def entry_kind(rng: Random, sound: Sound) -> bytes:
    name = rng.choice(sound.weights)
    whole = sound.header[name]
    gone = rng.choice(list(whole))
    lacking = {key: value for key, value in whole.items() if key != gone}
    bad = [None, rng.random(), "x", [], [whole], {}, lacking, whole | {f"more{rng.random()}": 1}]
    return build(sound.header | {name: rng.choice(bad)}, sound.body)


def metadata(rng: Random, sound: Sound) -> bytes:
    n = rng.getrandbits(30)
    bad = [None, [n], n, "x", {"a": n}, {"a": None}, {"a": {"b": "c"}}, {str(n): ["x"]}, True]
    return build(sound.header | {"__metadata__": rng.choice(bad)}, sound.body)


def lost_half(rng: Random, sound: Sound) -> bytes:
    """A layer's down or up is not there; the others lie as they should."""
    gone = rng.choice(sound.weights)
    header, body = {}, b""
    for name in sorted((n for n in sound.header if n != "__metadata__"), key=lambda n: sound.header[n]["data_offsets"]):
        if name != gone:
            start, end = sound.header[name]["data_offsets"]
            header[name] = sound.header[name] | {"data_offsets": [len(body), len(body) + end - start]}
            body += sound.body[start:end]
    return build(header, body)


def tensor_name(rng: Random, sound: Sound) -> bytes:
    n = rng.randint(0, 10**6)
    bad = ["", f"a{n}\n.alpha", "x" * rng.randint(513, 9999) + ".alpha", f"block_{n}", f"\0{n}.alpha", f"{n}.weight"]
    bad += [f"model.diffusion_model.out.{n}.weight", f"..{n}/../etc/passwd", f"a{n}.hada_w1_a", f"a{n}.lokr_w1"]
    bad += [f"a{n}.dora_scale", f"a{n}.diff", f"a{n}.oft_blocks", f"a{n}.lora_mid.weight", f"a{n}.lora_up.bias"]
    bad += [f"a{n}.boft_R", f"a{n}.oft_r", f"a{n}.b1.weight", f"a{n}.on_input", f"a{n}.vera_lambda_b", f"a{n}.w_norm"]
    name = rng.choice(sound.weights)
    header = {rng.choice(bad) if key == name else key: value for key, value in sound.header.items()}
    return build(header, sound.body)


def ranks(rng: Random, sound: Sound) -> bytes:
    """Down and up of different ranks, a rank beyond all sense, or shapes of no pair."""
    r, n = rng.randint(1, 40), rng.randint(1, 40)
    bad = [((r, n), (n, r + rng.randint(1, 9))), ((4096 + r, n), (n, 4096 + r)), ((r,), (n, r)), ((r, n, 3), (n, r))]
    bad += [((r, n, 3, 3), (n, r, 3, 3)), ((r, n), (n, r, 2, 2)), ((r, n, 1, 1), (n, r, 1))]
    down, up = rng.choice(bad)
    layer = f"layer_{rng.getrandbits(30)}"
    a, b = (name.format(layer) for name in rng.choice(STYLES))
    return save({a: torch.ones(down), b: torch.ones(up)})


def alpha(rng: Random, sound: Sound) -> bytes:
    layer, value = f"layer_{rng.getrandbits(30)}", rng.uniform(0.01, 99)
    bad = [float("nan"), float("inf"), -float("inf"), -value, [value, value], []]
    tensors = {name.format(layer): torch.ones(2, 2) for name in rng.choice(STYLES)}
    drawn = rng.choice(bad)
    shaped = torch.tensor(drawn) if drawn != [] else torch.full((2, 2), value)
    return save(tensors | {f"{layer}.alpha": shaped})


def two_of_a_role(rng: Random, sound: Sound) -> bytes:
    layer = f"layer_{rng.getrandbits(40)}"
    names = [name.format(layer) for style in rng.sample(STYLES, 2) for name in style]
    return save({name: torch.ones(2, 2) for name in names[: rng.randint(3, 4)]})


def other_form(rng: Random, sound: Sound) -> bytes:
    """A layer of LoHa, LoKr, OFT or a difference that lacks a part, has one too many or one of another shape."""
    layer, form = f"layer_{rng.getrandbits(40)}", rng.choice(list(FORMS))
    shapes = dict(FORMS[form])
    how = rng.choice(["lacks", "more", "shape"])
    if how == "lacks" and len(shapes) > 1:
        del shapes[rng.choice(list(shapes))]
    elif how == "more":
        extra = {"lora_down.weight": (2, 5), "a1.weight": (2, 2), "rescale": (6, 1), "b_norm": (7, 1), "scalar": ()}
        role = rng.choice(list(extra))
        shapes[role] = extra[role]
    else:
        shapes[rng.choice(list(shapes))] = (rng.randint(1, 9),) * 6 if rng.random() < 0.5 else ()
    return save({f"{layer}.{role}": torch.ones(shape) for role, shape in shapes.items()})


def not_finite(rng: Random, sound: Sound) -> bytes:
    """NaN or infinity in any number of places."""
    body = bytearray(sound.body)
    names = [name for name in sound.header if name != "__metadata__"]
    for _ in range(rng.choice([1, 1, 1, 2, 50])):
        entry = sound.header[rng.choice(names)]
        value = rng.choice([INF, NAN])[entry["dtype"]]
        start, end = entry["data_offsets"]
        place = start + len(value) * rng.randrange((end - start) // len(value))
        body[place : place + len(value)] = value
    return build(sound.header, bytes(body))


def all_zero(rng: Random, sound: Sound) -> bytes:
    header = sound.header | {"__metadata__": {"drawn": str(rng.random())}}
    return build(header, bytes(len(sound.body)))


def another_format(rng: Random, sound: Sound) -> bytes:
    """What lies under the name after a failed download or a renaming: a web page, an archive, a pickle, an image."""
    starts = (
        b"<!DOCTYPE html><html>404 ",
        b"PK\x03\x04",
        b"\x80\x02}q\x00",
        b"\x89PNG\r\n\x1a\n",
        b"GGUF",
        b"version https:",
    )
    return rng.choice([b"", *starts]) + rng.randbytes(rng.randint(0, 4096))


def not_the_file(rng: Random, sound: Sound) -> bytes:
    """What a server or a tool leaves under the name: a login page, an error as JSON or text, a Git LFS pointer."""
    told = f"{rng.getrandbits(64):x}"
    texts = (
        f"<!DOCTYPE html><html><head><title>Sign in {told}</title></head><body>" + "<p>" * rng.randint(0, 999),
        f"\n<html lang='en'><!-- {told} -->",
        json.dumps({"error": "Unauthorized", "message": "you must be logged in to download this", "id": told}),
        json.dumps([{"code": 404, "id": told}] * rng.randint(1, 99)),
        f"Too many requests, try again later ({told})",
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{told * 4}\nsize {rng.getrandbits(30)}\n",
    )
    return rng.choice(texts).encode()


def another_program(rng: Random, sound: Sound) -> bytes:
    """The beginning of a GGUF file, of pickles, archives and images, then zeros or noise; or a download of zeros."""
    starts = (
        b"GGUF" + struct.pack("<IQQ", 3, rng.getrandbits(9), rng.getrandbits(6)),
        b"PK\x03\x04\x00\x00\x08\x08\x00\x00archive/data.pkl",
        *(bytes((0x80, protocol)) + b"}q\x00(X" for protocol in (2, 3, 4, 5)),
        b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x1f\x8b\x08\x00", b"\x89HDF\r\n\x1a\n", b"%PDF-1.7\n",
        b"RIFF\xff\xff\xff\x7fWEBP",
        b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\x00\x10JFIF", b"",
    )  # fmt: skip
    start, size = rng.choice(starts), rng.randint(64, 9999)
    return start + (rng.randbytes(size) if start and rng.random() < 0.5 else bytes(size))


def other_model(rng: Random, sound: Sound) -> bytes:
    """A sound safetensors file of something else: a checkpoint, text encoder, VAE, diffusion model, embedding, ..."""
    n = rng.randint(0, 10**6)
    names = (
        f"model.diffusion_model.input_blocks.{n}.0.weight", f"first_stage_model.encoder.down.{n}.weight",
        f"text_model.encoder.layers.{n}.mlp.fc1.weight", f"encoder.block.{n}.layer.0.SelfAttention.q.weight",
        f"model.layers.{n}.self_attn.q_proj.weight", f"vision_model.encoder.layers.{n}.mlp.fc1.weight",
        f"encoder.down_blocks.{n}.resnets.0.conv1.weight", f"decoder.mid.block_{n}.conv1.weight",
        f"double_blocks.{n}.img_attn.qkv.weight", f"joint_blocks.{n}.x_block.attn.qkv.weight",
        f"down_blocks.{n}.attentions.0.transformer_blocks.0.attn2.to_k.weight", f"blocks.{n}.self_attn.q.weight",
        f"model.1.sub.{n}.RDB1.conv1.0.weight", f"body.{n}.rdb1.conv1.weight", f"control_model.out.{n}.weight",
        f"image_proj.{n}.weight", f"lllite_unet_{n}.down.0.weight", f"string_to_token.{n}", f"loss.{n}",
    )  # fmt: skip
    kinds = (torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float64)
    tensors = {rng.choice(names): torch.ones(rng.randint(0, 9), dtype=rng.choice(kinds))}
    return save(tensors | {f"step_{n}": torch.tensor(n)} if rng.random() < 0.5 else tensors)


def layer_dtype(rng: Random, sound: Sound) -> bytes:
    """A pair of numbers in which no LoRA is stored, one of no numbers, or one too large for float32."""
    layer, style = f"layer_{rng.getrandbits(40)}", rng.choice(STYLES)
    size = (rng.randint(1, 9), rng.randint(1, 9))
    bad = [torch.ones(size, dtype=t) for t in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.int32)]
    bad += [torch.ones(0, size[1]), torch.ones(size[0], 0), torch.full(size, 1e300, dtype=torch.float64)]
    down = rng.choice(bad)
    return save({style[0].format(layer): down, style[1].format(layer): torch.ones(size[1], down.shape[0])})


def huge_header(rng: Random, sound: Sound) -> bytes:
    text = json.dumps(sound.header).encode()
    return build(text + b" " * (HEADER_LIMIT + rng.randint(1, 9) - len(text)), sound.body)


def full_header(rng: Random, sound: Sound) -> bytes:
    """A header just below the limit, of what costs a parser most, and still no LoRA."""
    filler = rng.choice(["[]", "{}", "0", '"a"', "[0]", "1e9"])
    text = ('{"a": [' + ",".join([filler] * (HEADER_LIMIT // (len(filler) + 1) - 9)) + "]}").encode()
    return build(text, rng.randbytes(8))


def many_keys(rng: Random, sound: Sound) -> bytes:
    """Tens of thousands of keys, the last one twice: among the tensors, in one entry, or in the metadata."""
    count = rng.choice([5_000, 20_000, 20_001, 100_000, 1_000_000])
    keys = ",".join(f'"{i:x}":0' for i in range(count)) + f',"{rng.randrange(count):x}":0'
    text = rng.choice([f"{{{keys}}}", f'{{"a":{{{keys}}}}}', f'{{"__metadata__":{{{keys}}}}}'])
    return build(text.encode(), rng.randbytes(8))


def many_values(rng: Random, sound: Sound) -> bytes:
    """A header of small values: more of them than a parser goes through in a second."""
    filler = rng.choice(["{}", '{"":0}', "0", "[]", '""', '"\\\\"', "[[]]"])
    text = '{"a": [' + ",".join([filler] * (rng.randint(2**19, HEADER_LIMIT) // (len(filler) + 1) - 9)) + "]}"
    return build(text.encode(), rng.randbytes(8))


def many_tensors(rng: Random, sound: Sound) -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return build({f"l{i}.alpha": entry for i in range(20_001 + rng.randint(0, 60_000))}, rng.randbytes(4))


Maker = Callable[[Random, Sound], bytes]
KINDS: tuple[Maker, ...] = (
    truncated, appended, header_length, cut_json, bad_text, other_json, key_twice, dtype, shape, turned_shape, offsets,
    overlapping, entry_kind, metadata, lost_half, tensor_name, ranks, alpha, two_of_a_role, other_form, not_finite,
    all_zero, another_format, not_the_file, another_program, other_model, layer_dtype,
)  # fmt: skip
# of up to 16 MiB, so there are fewer of them
HEAVY: tuple[Maker, ...] = (huge_header, full_header, many_tensors, many_keys, many_values)


def flipped_bits(rng: Random, sound: Sound) -> bytes:
    raw = bytearray(sound.raw)
    for place in rng.sample(range(len(raw)), rng.choice([1, 1, 1, 2, 8])):
        raw[place] ^= 1 << rng.randrange(8)
    return bytes(raw)


def overwritten(rng: Random, sound: Sound) -> bytes:
    """A run of bytes is zero, random, or another part of the file, as bad discs and transfers leave them."""
    raw, size = bytearray(sound.raw), rng.randint(1, min(512, len(sound.raw) // 2))
    to, start = (rng.randrange(len(raw) - size) for _ in range(2))
    raw[to : to + size] = rng.choice([bytes(size), rng.randbytes(size), raw[start : start + size]])
    return bytes(raw)


DAMAGE: tuple[Maker, ...] = (flipped_bits, overwritten)


def other_values(rng: Random, sound: Sound) -> bytes:
    """A sound file of the same names, shapes and size with other numbers: what is written over one that is read."""
    body = bytearray(sound.body)
    for entry in (sound.header[name] for name in sound.weights):
        start, end = entry["data_offsets"]
        size = len(INF[entry["dtype"]])
        numbers = [body[i : i + size] for i in range(start, end, size)]
        rng.shuffle(numbers)
        body[start:end] = b"".join(numbers)
    return build(sound.header, bytes(body))


class WrittenOver:
    """An open file: whenever its tensors are about to be read, the next of ``contents`` is written over it."""

    def __init__(self, file: BinaryIO, contents: Iterator[bytes]):
        self._file, self._contents = file, contents

    def __enter__(self) -> WrittenOver:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def readinto(self, piece: memoryview) -> int:
        place = os.open(self._file.name, os.O_WRONLY)
        os.write(place, next(self._contents))
        os.close(place)
        return self._file.readinto(piece)


def corpus(rng: Random, makers: tuple[Maker, ...], count: int, folder: Path) -> Iterator[tuple[str, Sound, bytes]]:
    """``count`` different files: kind, the sound file that it was made of, its bytes."""
    seen: set[int] = set()
    made = 0
    while made < count:
        maker = makers[made % len(makers)]
        sound = sound_file(rng, folder)
        raw = maker(rng, sound)
        if raw != sound.raw and (digest := hash(raw)) not in seen:
            seen.add(digest)
            made += 1
            yield maker.__name__, sound, raw
