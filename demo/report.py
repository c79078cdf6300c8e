"""The one-page report: pictures inside the file, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1e2126; --paper: #fff; --line: #d5d9e0; --mark: #b0382b; --good: #1c7a43; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --paper: #16181c; --line: #3a3f48; --mark: #ff8a7a; --good: #6fd498; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; max-width: 11rem; } thead small { display: block; font-weight: 400; opacity: .75; }
tbody th { font-weight: 500; min-width: 8rem; } img { width: 160px; height: 160px; display: block; border-radius: 4px; }
.group th { padding-top: 1.2rem; font-weight: 600; } .suppressed { color: var(--mark); } .kept { color: var(--good); }
pre { padding: .8rem; border: 1px solid var(--line); border-radius: 4px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dd { margin: 0; }
"""


@dataclass(frozen=True)
class Arm:
    """One column: what drew it, its pictures by prompt, and how long they took."""

    title: str
    note: str
    pictures: list[bytes]
    seconds: float


@dataclass(frozen=True)
class Demo:
    """All that the report shows."""

    arms: list[Arm]
    prompts: Sequence[str]
    suppressed: int  # the first so many prompts name something that the safety LoRA suppresses
    lookout: str
    facts: Mapping[str, str]
    texts: Mapping[str, str] = field(default_factory=dict)
    attestation: Mapping[str, Any] = field(default_factory=dict)


def page(demo: Demo) -> str:
    """The whole document."""
    body = [
        "<h1>Modular LoRA Guard: the demo</h1>",
        f"<p>{escape(demo.lookout)}</p>",
        '<div class="scroll"><table>',
        _head(demo.arms),
        "<tbody>",
        *_rows(demo),
        "</tbody></table></div>",
        *(f"<h2>{escape(title)}</h2><pre>{escape(text)}</pre>" for title, text in demo.texts.items() if text),
        *_attestation(demo.attestation),
        "<h2>How it was made</h2><dl>",
        *(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in demo.facts.items()),
        "</dl>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Modular LoRA Guard: the demo</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _head(arms: Sequence[Arm]) -> str:
    cells = "".join(f'<th scope="col">{escape(arm.title)}<small>{escape(arm.note)}</small></th>' for arm in arms)
    return f'<thead><tr><th scope="col">Prompt</th>{cells}</tr></thead>'


def _rows(demo: Demo) -> list[str]:
    groups = (
        ("suppressed", "Prompts that name what the safety LoRA suppresses", range(demo.suppressed)),
        ("kept", "Prompts that should work as before", range(demo.suppressed, len(demo.prompts))),
    )
    rows = []
    for kind, heading, indices in groups:
        rows.append(f'<tr class="group"><th colspan="{len(demo.arms) + 1}" class="{kind}">{escape(heading)}</th></tr>')
        rows += [_row(demo, index) for index in indices]
    return rows


def _row(demo: Demo, index: int) -> str:
    prompt = demo.prompts[index]
    cells = "".join(f"<td>{_picture(arm.pictures[index], f'{arm.title}: {prompt}')}</td>" for arm in demo.arms)
    return f'<tr><th scope="row">{escape(prompt)}</th>{cells}</tr>'


def _picture(png: bytes, description: str) -> str:
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _attestation(attestation: Mapping[str, Any]) -> list[str]:
    if not attestation:
        return []
    text = json.dumps(attestation, indent=2, ensure_ascii=False)
    return [
        "<h2>Attestation of the first guarded picture</h2>",
        "<p>Written into the PNG by the save node and bound to its pixels by a hash. "
        "Whoever holds the file can change its text entries.</p>",
        f"<pre>{escape(text)}</pre>",
    ]


def escape(text: str) -> str:
    return html.escape(str(text), quote=True)
