"""One audit from options to page: draw, judge, count, write. The command and the node both call ``run``."""

from __future__ import annotations

from typing import Protocol

from .figures import AuditReport
from .options import AuditOptions
from .plan import Painter


class Watch(Protocol):
    """What a host shows of an audit; training.loop.Watch is one."""

    def check(self) -> None:
        """Raise to interrupt."""

    def stage(self, text: str, done: int, total: int) -> None:
        """``done`` of ``total`` of what ``text`` says."""


def run(options: AuditOptions, engine: Painter, watch: Watch, command: str = "") -> AuditReport:
    """Draws what is missing, judges, counts, and writes report.json, index.html and the contact sheets.

    ``engine`` is one of audit.engines or a Painter. Everything is under ``options.output_dir``; pictures are in its
    private/. An audit that was stopped goes on where it stopped. Raises GuardError.
    """
    raise NotImplementedError
