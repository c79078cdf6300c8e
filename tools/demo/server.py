"""A ComfyUI server of our own: on the loopback interface, on a free port, ended with us."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ...modular_lora.util.endings import ending, remedy
from ..bootstrap.console import RunError
from ..bootstrap.paths import RUN
from ..bootstrap.process import child_environment, stop, tail

HOST = "127.0.0.1"
MOST_PORTS = 3  # that are tried where none was asked for
NOT_BOUND = "error while attempting to bind on address"  # asyncio's words for a port that another program has
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def ensure_free(port: int) -> None:
    """RunError where the port cannot be ours."""
    with socket.socket() as probe:
        if os.name != "nt":  # there the option would let us have a port that is in use
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError as error:
            raise RunError(
                f"port {port} needs an administrator's rights: choose one above 1023.", code="command.port"
            ) from error
        except (OSError, OverflowError) as error:
            raise RunError(
                f"port {port} is in use or cannot be opened ({error}): choose another with --port.", code="command.port"
            ) from error


def _connections(process: Any) -> list[Any]:
    """Of a psutil.Process, whose method had another name before psutil 6."""
    return (getattr(process, "net_connections", None) or process.connections)(kind="tcp")


class Server:
    """Starts on entry, is gone on exit, whatever happens in between."""

    def __init__(
        self,
        comfyui: Path,
        python: str | Path,
        base: Path,
        *,
        log: Path,
        cpu: bool,
        port: int | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        self.comfyui, self.python, self.base, self.log = comfyui, python, base, log
        self._cpu, self._extra, self._any_port = cpu, tuple(extra), not port
        self._take(port or free_port())
        self._child: subprocess.Popen[bytes] | None = None

    def _take(self, port: int) -> None:
        self.port, self.url = port, f"http://{HOST}:{port}"
        self.arguments = self._arguments(self._cpu, self._extra)

    def _arguments(self, cpu: bool, extra: Sequence[str]) -> list[str]:
        known = (self.comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        database = f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}"
        wanted = {
            "--listen": [HOST],
            "--port": [str(self.port)],
            "--base-directory": [str(self.base)],
            "--database-url": [database],  # its default lies in ComfyUI's own folder
            "--disable-auto-launch": [],
            "--disable-api-nodes": [],
            **({"--cpu": []} if cpu else {}),
        }
        return [part for flag, value in wanted.items() if f'"{flag}"' in known for part in (flag, *value)] + list(extra)

    def start(self, timeout: float = 600) -> Server:
        """Start and wait until the server answers.

        A free port may be lost while ComfyUI starts, as it takes seconds until it listens: then it starts on another.
        """
        for _ in range(MOST_PORTS - 1):
            try:
                return self._start(timeout)
            except RunError as error:
                lost = error.code == "command.port" or NOT_BOUND in tail(self.log)
                if not (lost and self._any_port):
                    raise
                self._take(free_port())
        return self._start(timeout)

    def _start(self, timeout: float) -> Server:
        ensure_free(self.port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as sink:
            self._child = subprocess.Popen(
                [str(self.python), str(self.comfyui / "main.py"), *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=self.base,
                env=self._environment(),
            )
        try:
            self._wait(time.monotonic() + timeout, timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def _environment(self) -> dict[str, str]:
        return child_environment({} if self._ours() else {"PYTHONDONTWRITEBYTECODE": "1"})

    def _ours(self) -> bool:
        """Whether ComfyUI and its environment were made by run.py."""
        return RUN in self.comfyui.parents

    def _wait(self, deadline: float, timeout: float) -> None:
        while not (self.listens() and self.answers()):
            self.check()
            if time.monotonic() > deadline:
                raise RunError(
                    f"ComfyUI in {self.comfyui} gave no answer within {timeout:.0f} s. Last lines of {self.log}:\n"
                    f"{tail(self.log)}\nEnd other programs that use the processor, then try again.",
                    code="command.no-answer",
                )
            time.sleep(0.2)

    def listens(self) -> bool:
        """Whether the port is our child's: another server's answer is not ours."""
        import psutil

        try:
            child = psutil.Process(self._child.pid if self._child else -1)
            family = [child, *child.children(recursive=True)]  # on Windows a venv's python starts the real one
            found = [one for each in family for one in _connections(each)]
        except (psutil.NoSuchProcess, ValueError):
            return False
        return any(one.status == psutil.CONN_LISTEN and one.laddr.port == self.port for one in found)

    def answers(self) -> bool:
        try:
            with DIRECT.open(f"{self.url}/system_stats", timeout=5) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def check(self) -> None:
        """Raise with the log's last lines if the server has ended."""
        code = None if self._child is None else self._child.poll()
        if code is None:
            return
        raise RunError(
            f"ComfyUI in {self.comfyui} {ending(code)}. Last lines of {self.log}:\n{tail(self.log)}\n"
            f"{remedy(code, self._remedy(code))}",
            code="command.server-ended",
        )

    def _remedy(self, code: int) -> str:
        """For a server that no signal ended."""
        if not code:
            return "It was asked to end, by a signal or an option: without that, run the same command again."
        where = f"delete {RUN}" if self._ours() else f"install it for {self.python}"
        return f"If a package is missing, {where} and run the same command again."

    def wait(self) -> int:
        """Wait until the server ends: 0 where it was asked to; RunError where it failed or a signal ended it."""
        code = self._child.wait() if self._child else 0
        if code:
            self.check()
        return code

    def stop(self) -> None:
        if self._child is not None:
            stop(self._child, patience=5)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
