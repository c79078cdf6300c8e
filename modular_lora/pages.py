"""HTML pages from Jinja templates: whatever a template is given is escaped, unless it is Markup."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(path: Path, **values: Any) -> str:
    """The page that the template file makes of ``values``.

    Args:
        path: the template. Its filter ``base64`` turns bytes into the text of a ``data:`` address.
        values: what the template names; a name that is not among them raises jinja2.UndefinedError.
    """
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template(path.name).render(values)
