"""Attempts of the catalogue (escapes.py) with requests, with what is cached, and while the policy changes."""

from __future__ import annotations

import json
import urllib.parse

from modular_lora_guard.modular_lora.files.reader import sha256_file

from support.escape_ground import KEY, Ground
from support.escapes import CKPT, Graph, attempt, guarded, unguarded
from support.graphs import decode, node

FOLDER = "__modular_lora"
_seeds = iter(range(1000, 10**9))
FORM = {"subfolder": f"../user/{FOLDER}", "type": "input", "overwrite": "true"}


def stock() -> Graph:
    """The guarded graph beside an unguarded one."""
    made = guarded()
    unguarded(made, CKPT)
    return made


def only_stock() -> Graph:
    """Nothing but the unguarded graph."""
    made = stock()
    return {name: made[name] for name in ("ckpt", "pos", "neg", "latent", "stock", "stock_decode", "stock_save")}


# What a prompt says of itself


@attempt("only the guarded output is asked for, and an unguarded one stands beside it")
def _(ground):
    ground.send(stock(), partial_execution_targets=["save"])


@attempt("only the unguarded output is asked for")
def _(ground):
    ground.send(stock(), partial_execution_targets=["stock_save"])


@attempt("the outputs that are asked for are a text in which the names stand")
def _(ground):
    ground.send(stock(), partial_execution_targets="stock_save save")


@attempt("no output at all is asked for")
def _(ground):
    ground.send(stock(), partial_execution_targets=[])


@attempt("the body of the request says prompt twice, the guarded one first")
def _(ground):
    first, second = json.dumps(guarded()), json.dumps(stock())
    raw = f'{{"prompt": {first}, "prompt": {second}}}'
    ground.note(*ground.request("POST", "/prompt", data=raw))
    ground.work()


@attempt("the prompt is sent to the address for the front end's development")
def _(ground):
    ground.queue(stock(), place="/api/prompt")
    ground.work()


@attempt("the prompt's id is a table and not a text")
def _(ground):
    ground.send(stock(), prompt_id={"a": 1})


@attempt("the prompt is to go to the front of the queue, with a number of its own")
def _(ground):
    ground.send(stock(), front=True, number=-1e9)


@attempt("another pack's handler changes the prompt after the policy has looked at it")
def _(ground):
    handlers = ground.site.on_prompt_handlers
    handlers.append(lambda said: said | {"prompt": only_stock()})
    try:
        ground.send(guarded())
    finally:
        handlers.pop()


@attempt("the body of the request is no table", "invalid")
def _(ground):
    for body in ("[]", "null", '"prompt"', "1"):
        ground.note(*ground.request("POST", "/prompt", data=body))
    ground.work()


@attempt("the file of the safety LoRA is another one when the prompt's turn comes")
def _(ground):
    path, other = ground.loras / "changing.safetensors", ground.loras / "other.safetensors"
    path.write_bytes((ground.loras / "safety.safetensors").read_bytes())
    assert ground.queue(guarded(safety=path.name)) == 200
    path.write_bytes(other.read_bytes())
    ground.work()


@attempt("the prompt is a list of nodes")
def _(ground):
    ground.send(list(stock().values()))


@attempt("a node type is spelled in other letters")
def _(ground):
    made = stock()
    made["stock"]["class_type"] = "ksampler"
    ground.send(made)


@attempt("a node type has a space behind it")
def _(ground):
    made = stock()
    made["stock"]["class_type"] = "KSampler "
    ground.send(made)


@attempt("a node type is known to nobody")
def _(ground):
    made = guarded()
    made["save2"] = node("SaveImageUnseen", images=["decode", 0])
    ground.send(made)


@attempt(
    "the graph holds the node that stands for refusals itself",
    "permitted",
    "that node refuses itself, and the rest of the graph is guarded",
)
def _(ground):
    ground.send(guarded() | {"mine": node("ModularLoraRefused", policy="")})


@attempt("nodes have names that mean something elsewhere")
def _(ground):
    made = stock()
    made["__proto__"], made[""] = made.pop("stock"), made.pop("stock_save")
    made["stock_decode"]["inputs"]["samples"] = ["__proto__", 0]
    ground.send(made)


@attempt("the sampler stands behind a prompt of a million characters")
def _(ground):
    made = stock()
    made["pos"]["inputs"]["text"] = "cat, " * 200_000
    ground.send(made)


@attempt("the sampler stands behind three hundred nodes")
def _(ground):
    made = stock()
    made |= {f"any{i}": node("AnyPass", value=[f"any{i - 1}", 0] if i else CKPT) for i in range(300)}
    made["stock"]["inputs"]["model"] = ["any299", 0]
    ground.send(made)


@attempt(
    "the front end's notes carry an attestation of their own",
    "permitted",
    "the picture is guarded; the text in the file is the guard's, not the one that was sent along",
)
def _(ground):
    forged = {"status": "guarded", "loras": [], "note": "forged"}
    texts = {KEY: forged, f"{KEY}\0": forged, f"{KEY}\0{json.dumps(forged)}": ""}
    ground.send(guarded(), extra_data={"extra_pnginfo": texts})
    (image,) = ground.images()
    assert b"forged" not in image.read_bytes()


# What the record says: each refusal a bounded line, each run with the texts that it used

TEXTS = "[record]\nprompts = true\n"
MEBIBYTE = 2**20


def bounded(ground: Ground) -> None:
    """Every refusal is there, and no line is longer than a few of its texts."""
    lines = ground.refusals()
    assert lines
    assert all(len(json.dumps(line)) < 65_536 for line in lines)


@attempt("a node type of 1 MiB stands beside an unguarded sampler")
def _(ground):
    ground.send(stock() | {"long": node("x" * MEBIBYTE)})
    bounded(ground)


@attempt("a node has an id of 1 MiB, and an unguarded sampler takes its output")
def _(ground):
    made, long = stock(), "y" * MEBIBYTE
    made[long] = made.pop("stock")
    made["stock_decode"]["inputs"]["samples"] = [long, 0]
    ground.send(made)
    bounded(ground)


@attempt("the prompt's id has 1 MiB")
def _(ground):
    ground.send(stock(), prompt_id="z" * MEBIBYTE)
    bounded(ground)


@attempt("the unguarded sampler stands behind the fiftieth refusal")
def _(ground):
    ground.send({f"u{i}": node(f"Unknown{i}") for i in range(80)} | stock())
    assert sum(sum(line.get("more", {"": 1}).values()) for line in ground.refusals()) == 82
    bounded(ground)


@attempt("the unguarded sampler stands behind two hundred thousand nodes")
def _(ground):
    ground.send({f"u{i}": node("Unknown") for i in range(200_000)} | stock())
    bounded(ground)


@attempt("a node that is refused as it runs has a long name")
def _(ground):
    made, long = guarded(), "w" * 1000
    made[long] = node("EscHidden")
    made["sample"]["inputs"]["model"] = [long, 0]
    ground.send(made)
    bounded(ground)


def texts(ground: Ground) -> list[list[str]]:
    return [line.get("prompts", []) for line in ground.record() if line["kind"] == "run"]


_words = iter(range(10**9))


def prompted(text, **nodes) -> Graph:
    """A guarded graph whose prompt comes from no cache."""
    made = guarded() | nodes
    made["pos"]["inputs"]["text"], made["sample"]["inputs"]["seed"] = text, next(_seeds)
    return made


MINE = "5b0e9d3c-2f54-4a8e-9c1d-6f2a7b8c9d0e"  # newer ComfyUI takes canonical UUIDs alone
SAME = "the picture is guarded; the record has the text that it was made from"


@attempt("two prompts of one id have different texts", "permitted", SAME, policy=TEXTS)
def _(ground):
    first, second = f"gloss, cactus {next(_words)}", f"gloss, cat {next(_words)}"
    assert ground.queue(prompted(first), prompt_id=MINE) == 200
    assert ground.queue(prompted(second), prompt_id=MINE) == 200
    ground.work()
    assert [said[0] for said in texts(ground)] == [first, second]
    assert len({line["execution"] for line in ground.record() if line["kind"] == "run"}) == 2


@attempt("an innocent prompt of the same id is sent while the other one waits", "permitted", SAME, policy=TEXTS)
def _(ground):
    used = f"gloss, cat {next(_words)}"
    assert ground.queue(prompted(used), prompt_id=MINE) == 200
    ground.queue(only_stock() | {"pos": node("CLIPTextEncode", clip=["ckpt", 1], text="flowers")}, prompt_id=MINE)
    ground.seen.refused.clear()
    ground.work()
    assert [said[0] for said in texts(ground)] == [used]


@attempt("the text comes over links, an any-type node among them", "permitted", SAME, policy=TEXTS)
def _(ground):
    used = f"gloss, cat {next(_words)}"
    ground.send(prompted(["esc", 0], esc=node("EscText", text=used)))
    assert [said[0] for said in texts(ground)] == [used]


@attempt("the encoder's result is kept from an earlier prompt", "permitted", SAME, policy=TEXTS)
def _(ground):
    used = f"gloss, cat {next(_words)}"
    for _ in range(2):
        ground.send(prompted(used))
    assert [said[0] for said in texts(ground)] == [used, used]


@attempt("the second text of a concatenated prompt is another one", "permitted", SAME, policy=TEXTS)
def _(ground):
    used, other = f"gloss, cactus {next(_words)}", f"gloss, cat {next(_words)}"
    made = prompted(used, other=node("CLIPTextEncode", clip=["ckpt", 1], text=other))
    made["both"] = node("ConditioningConcat", conditioning_to=["pos", 0], conditioning_from=["other", 0])
    made["sample"]["inputs"]["positive"] = ["both", 0]
    ground.send(made)
    assert [said[:2] for said in texts(ground)] == [[used, other]]


@attempt(
    "two texts are averaged into embeddings that nobody encoded",
    "permitted",
    "the picture is guarded; the record says how many rows have no known text",
    policy=TEXTS,
)
def _(ground):
    used, other = f"gloss, cactus {next(_words)}", f"gloss, cat {next(_words)}"
    made = prompted(used, other=node("CLIPTextEncode", clip=["ckpt", 1], text=other))
    links = {"conditioning_to": ["pos", 0], "conditioning_from": ["other", 0]}
    made["both"] = node("ConditioningAverage", **links, conditioning_to_strength=0.5)
    made["sample"]["inputs"]["positive"] = ["both", 0]
    ground.send(made)
    (line,) = [line for line in ground.record() if line["kind"] == "run"]
    assert line["rows_without_known_text"] > 70
    assert used not in line["prompts"]


# The policy's file and others over HTTP


def ways(ground: Ground, *asked: tuple[str, str, dict]) -> None:
    """None of these gives away, writes, moves or deletes the policy."""
    before = ground.policy.read_bytes()
    for method, place, options in asked:
        status, content = ground.request(method, place, **options)
        assert b"min_net_strength" not in content, place
        if method != "GET":
            assert status >= 400, place
    assert ground.policy.read_bytes() == before
    assert ground.in_force()


def _quoted(times: int, path: str = f"../{FOLDER}/policy.toml") -> str:
    for _ in range(times):
        path = urllib.parse.quote(path, safe="")
    return path


@attempt("the policy is read through /userdata, encoded once, twice and in the way of Windows", "invalid")
def _(ground):
    paths = [_quoted(1), _quoted(2), _quoted(3), _quoted(1, f"..\\{FOLDER}\\policy.toml"), _quoted(1, FOLDER)]
    headers = {"Comfy-User": FOLDER}
    more = ({}, {"headers": headers})
    ways(
        ground,
        *(("GET", f"{where}/{path}", o) for path in paths for o in more for where in ("/userdata", "/api/userdata")),
    )


@attempt("the policy is read through /view", "invalid")
def _(ground):
    asked = [
        {"filename": "policy.toml", "subfolder": folder, "type": kind}
        for folder in (f"../user/{FOLDER}", f"..\\user\\{FOLDER}", str(ground.policy.parent))
        for kind in ("output", "input", "temp")
    ]
    asked += [{"filename": f"../user/{FOLDER}/policy.toml", "type": "output"}, {"filename": str(ground.policy)}]
    ways(ground, *(("GET", f"/view?{urllib.parse.urlencode(one)}", {}) for one in asked))


@attempt("the policy is listed or read as a model's metadata or preview", "invalid")
def _(ground):
    name = _quoted(1, f"../../user/{FOLDER}/policy.toml")
    places = (
        f"/view_metadata/loras?filename={name}",
        f"/experiment/models/preview/loras/0/{name}",
        f"/models/{name}",
        f"/userdata?dir={_quoted(1, f'../{FOLDER}')}&recurse=true",
        f"/internal/files/{_quoted(1)}",
        f"/user/{name}",
    )
    ways(ground, *(("GET", place, {}) for place in places))


@attempt("the policy is overwritten, moved or deleted through /userdata", "invalid")
def _(ground):
    ground.request("POST", "/userdata/mine.toml", data=b"[guard]\nrequired = []")
    name = _quoted(1)
    ways(
        ground,
        ("POST", f"/userdata/{name}?overwrite=true", {"data": b"[guard]\nrequired = []"}),
        ("POST", f"/userdata/mine.toml/move/{name}?overwrite=true", {}),
        ("POST", f"/userdata/{name}/move/taken.toml", {}),
        ("DELETE", f"/userdata/{name}", {}),
    )


@attempt("a picture is uploaded over the policy", "invalid")
def _(ground):
    from aiohttp import FormData

    def form(**changes: str) -> FormData:
        made = FormData()
        for key, value in (FORM | changes).items():
            made.add_field(key, value)
        made.add_field("image", b"[guard]\nrequired = []", filename="policy.toml")
        return made

    folders = (f"../user/{FOLDER}", str(ground.policy.parent))
    ways(ground, *(("POST", "/upload/image", {"data": form(subfolder=folder)}) for folder in folders))


# What is cached, and a policy that changes


@attempt("an unguarded prompt was queued before the policy came")
def _(ground):
    ground.write(None)
    assert ground.queue(only_stock()) == 200
    ground.write(ground.text())
    ground.work()


@attempt("a latent of an unguarded run is cached from before the policy")
def _(ground):
    made = guarded()
    made["sample"] = node("EscSample")
    made["save"]["inputs"]["unattested"] = "save and say so"
    ground.write(None)
    ground.send(made)
    ground.begin()
    ground.write(ground.text())
    made["save"]["inputs"]["filename_prefix"] += "again"
    ground.queue(made)
    ground.work(heed_flags=False)


@attempt("a picture of a run with a weak safety LoRA is cached from before the policy")
def _(ground):
    made = guarded()
    made["number"] = node("PrimitiveFloat", value=0.6)
    made["safety"]["inputs"]["strength"] = ["number", 0]
    ground.write(None)
    ground.send(made)
    ground.begin()
    ground.write(ground.text())
    made["save"]["inputs"]["filename_prefix"] += "again"
    ground.queue(made)
    ground.work(heed_flags=False)


@attempt("a guarded run from before is decoded again after the least strength was raised")
def _(ground):
    made = guarded()
    ground.send(made)
    ground.begin()
    ground.write(ground.text(least=0.99))
    made["number"] = node("PrimitiveFloat", value=0.95)
    made["safety"]["inputs"]["strength"] = ["number", 0]
    made["save"]["inputs"]["filename_prefix"] += "again"
    ground.queue(made)
    ground.work(heed_flags=False)


def changing(ground: Ground, change, after: bool = False) -> None:
    """Run a guarded prompt; ``change`` is called before it samples, or after."""
    made = guarded()
    made["sample"]["inputs"]["seed"] = next(_seeds)
    made["call"] = node("EscCall", value=["sample" if after else "latent", 0], number=next(_seeds))
    link = (made["decode"]["inputs"], "samples") if after else (made["sample"]["inputs"], "latent_image")
    link[0][link[1]] = ["call", 0]
    assert ground.queue(made) == 200
    ground.between = change
    try:
        ground.work()
    finally:
        ground.between = lambda: None


@attempt("the policy asks for more before the prompt samples")
def _(ground):
    changing(ground, lambda: ground.put(ground.text(least=2.0)))


@attempt("the policy asks for more after the prompt has sampled")
def _(ground):
    changing(ground, lambda: ground.put(ground.text(least=2.0)), after=True)


@attempt("the policy is emptied after the prompt has sampled")
def _(ground):
    changing(ground, lambda: ground.put(""), after=True)


@attempt("the policy is emptied while the prompt runs")
def _(ground):
    changing(ground, lambda: ground.put(""))


@attempt("the policy is broken while the prompt runs")
def _(ground):
    changing(ground, lambda: ground.put("[guard\nrequired = []"))


@attempt("a folder takes the policy's place while the prompt runs")
def _(ground):
    def change() -> None:
        ground.put(None)
        ground.policy.mkdir()

    try:
        changing(ground, change)
    finally:
        ground.policy.rmdir()


@attempt("the task LoRA is denied while the prompt runs")
def _(ground):
    sha256 = sha256_file(ground.loras / "task.safetensors")
    changing(ground, lambda: ground.put(ground.text(f'[tasks]\ndeny = ["{sha256}"]\n')))


@attempt("the policy is away while a node samples by itself, and back when the picture leaves")
def _(ground):
    states = iter((None, ground.text()))
    made = guarded()
    made["away"] = node("EscCall", value=["ckpt", 2], number=next(_seeds))
    made["decoded"] = decode(["sample", 0])
    made["sample"] = node("EscSample")
    made["decoded"]["inputs"]["vae"] = ["away", 0]
    made["back"] = node("EscCall", value=["decoded", 0], number=next(_seeds))
    made["save"]["inputs"] |= {"images": ["back", 0], "unattested": "save and say so"}
    assert ground.queue(made) == 200
    ground.between = lambda: ground.put(next(states, ground.text()))
    try:
        ground.work()
    finally:
        ground.between = lambda: None


@attempt("guarded and unguarded prompts of several clients wait in the queue together")
def _(ground):
    hidden = guarded()
    hidden["hidden"] = node("EscHidden")
    hidden["sample"]["inputs"]["model"] = ["hidden", 0]
    for i, made in enumerate((guarded(), only_stock(), hidden, guarded(), only_stock())):
        ground.queue(made, client_id=f"client{i % 2}")
    ground.work()
    assert len(ground.images()) == 2
