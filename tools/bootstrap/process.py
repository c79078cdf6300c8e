"""Child processes: their environment, their output in a log file, their last lines on failure."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ...modular_lora.util.endings import ending
from ...modular_lora.util.endings import remedy as remedy_of
from .console import RunError, say, status

TAIL_LINES = 15
CRASHED = "A compiled package has a fault, or does not fit this processor: the lines above may say which."
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once where the system tells."""
    if sys.platform == "darwin":
        answer = subprocess.run(["sysctl", "-n", "hw.physicalcpu"], capture_output=True, text=True, check=False)
        return int(answer.stdout) if answer.stdout.strip().isdigit() else os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 2) // 2)
    usable = os.sched_getaffinity(0)
    siblings = {_siblings(cpu) for cpu in usable}
    return max(1, len(siblings))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of every child: one core left free, no waiting in a spin, no network, no foreign packages."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, physical_cores() - 1)))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.update(OFFLINE, PYTHONNOUSERSITE="1", PYTHONUNBUFFERED="1", PYTHONUTF8="1")
    environment.update(extra or {})
    return environment


def tail(log: Path, start: int = 0) -> str:
    """The last lines of a log, indented, from byte `start` on."""
    if not log.is_file():
        return "  (no output)"
    text = log.read_bytes()[start:].decode("utf-8", "replace")
    found = [line for line in text.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in found[-TAIL_LINES:]) or "  (no output)"


def run_logged(
    command: Sequence[str | Path],
    *,
    title: str,
    log: Path,
    remedy: str,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run one step with its output in `log` and one line on the screen; on failure say why and what to do."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("a", encoding="utf-8") as sink:
        sink.write(f"$ {' '.join(map(str, command))}\n")
        sink.flush()
        start = log.stat().st_size
        try:
            child = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=dict(environment or child_environment()),
            )
        except OSError as error:
            raise RunError(
                f"{title}: {command[0]} does not start ({error}). {remedy}", code="command.not-started"
            ) from error
        code = _watch(child, title, began)
    took = time.monotonic() - began
    if code:
        status(f"  {title}: failed after {took:.0f} s", final=True)
        raise RunError(
            f"{title} {ending(code)}. Last lines of {log}:\n{tail(log, start)}\n{remedy_of(code, remedy)}",
            code="command.exit-code",
        )
    status(f"  {title}: {took:.0f} s", final=True)


def _watch(child: subprocess.Popen[bytes], title: str, began: float) -> int:
    try:
        while True:
            try:
                return child.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                status(f"  {title} … {time.monotonic() - began:.0f} s")
    finally:
        stop(child)


def run_attached(command: Sequence[str | Path], *, environment: Mapping[str, str], cwd: Path | None = None) -> int:
    """Run a child on this terminal and give its exit code; an interrupt waits for the child to clean up.

    A child that a signal ended said nothing itself: that is said here, and the code is 128 and the signal's number, as
    shells have it.
    """
    child = subprocess.Popen(list(map(str, command)), env=dict(environment), cwd=cwd)
    try:
        code = child.wait()
        if code >= 0:
            return code
        say(f"run.py: what it started {ending(code)}. {remedy_of(code, CRASHED)}")
        return 128 - code
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=30)
        return 130
    finally:
        stop(child)


def exit_when_terminated() -> None:
    """SIGTERM ends this process as an exception does, so that its children are ended first."""

    def end(signum: int, frame: object) -> NoReturn:
        del frame
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, end)


def stop(child: subprocess.Popen[bytes], patience: float = 10) -> None:
    """End a child that still runs: asked first, then killed."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def output_of(command: Iterable[str | Path], *, subject: str, remedy: str) -> str:
    """Standard output of a short command, or an error that quotes its last line."""
    try:
        answer = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            env=child_environment(),
            timeout=120,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError(f"{subject}: {error}. {remedy}") from error
    if answer.returncode:
        code = answer.returncode
        lines = (answer.stderr or answer.stdout).strip().splitlines() if code > 0 else []
        said = lines[-1].strip() if lines else f"the command {ending(code)}"
        raise RunError(f"{subject}: {said}. {remedy_of(code, remedy)}")
    return answer.stdout.strip()
