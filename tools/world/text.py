"""Text side of the demo world: a table of trained token rows behind an otherwise empty CLIP-L.

With all attention and MLP outputs zero, CLIP-L is LayerNorm(token + position) and with zero positions the prompt is a
bag of tokens. The 77-token padding repeats the end token, so attention over it equals attention over the distinct
tokens with log(count) added to the logits. Rows are rounded to float8_e4m3 in training so that the file holds them
exactly.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from modular_lora_guard.modular_lora.util import atomic
from torch import Tensor, nn

from ..world import data
from ..world.unet import CONTEXT

START, END, LENGTH = 49406, 49407, 77


def fp8(x: Tensor) -> Tensor:
    """Nearest float8_e4m3 value, in x's dtype."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def split(text: str) -> list[str]:
    """Words and commas of a prompt."""
    return re.findall(r"[^\s,]+|,", text.lower())


def collect(dataset: data.Dataset) -> list[str]:
    """Every word that captions of the demo world can hold, sorted."""
    texts = [*data.STYLES, *dataset.words, *(tag for tags in dataset.keywords for tag in tags)]
    words = {word for text in texts for word in split(text)}
    return sorted(words | {",", "a", data.CLASS_WORD})


def tokenize(dataset: data.Dataset, tokenizer: Path, work: Path) -> Path:
    """Write ``WORK/tokens.json`` (word -> BPE ids) with the CLIP tokenizer files of folder ``tokenizer``."""
    from transformers import CLIPTokenizer

    bpe = CLIPTokenizer.from_pretrained(str(tokenizer))
    words = {word: bpe(word)["input_ids"][1:-1] for word in collect(dataset)}
    path = work / "tokens.json"
    atomic.write(path, json.dumps(words, indent=1))
    return path


class TextTable(nn.Module):
    """Prompts -> (context [n, l, 768], logit bias [n, l]); rows [v, 768] belong to the BPE ids in ``ids``."""

    def __init__(self, words: dict[str, list[int]]) -> None:
        super().__init__()
        self.words = words
        self.ids = sorted({i for pieces in words.values() for i in pieces} | {START, END})
        self.place = {token: row for row, token in enumerate(self.ids)}
        self.rows = nn.Parameter(torch.randn(len(self.ids), CONTEXT))

    def encode(self, text: str) -> list[int]:
        """BPE ids of a prompt between start and (one) end token; unknown words are an error, not a silent gap."""
        pieces = split(text)
        unknown = [word for word in pieces if word not in self.words]
        if unknown:
            raise ValueError(f"word {unknown[0]!r} of prompt {text!r} has no trained row; use words of the demo world")
        return [START, *(i for word in pieces for i in self.words[word]), END]

    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = [self.encode(text) for text in prompts]
        longest = max(map(len, encoded))
        index = torch.full((len(prompts), longest), self.place[END])
        bias = torch.full((len(prompts), longest), -math.inf)
        for i, tokens in enumerate(encoded):
            index[i, : len(tokens)] = torch.tensor([self.place[token] for token in tokens])
            bias[i, : len(tokens)] = 0.0
            bias[i, len(tokens) - 1] = math.log(LENGTH - len(tokens) + 1)  # the end token fills up to 77
        rows = self.rows + (fp8(self.rows) - self.rows).detach()  # straight-through rounding
        return F.layer_norm(rows, (CONTEXT,))[index], bias


def load_words(work: Path) -> dict[str, list[int]]:
    return json.loads((work / "tokens.json").read_text("utf-8"))
