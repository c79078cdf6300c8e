"""A Chromium and playwright-core for the test of the front end, where they can be had."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from ...modular_lora.util import atomic
from . import paths
from .console import RunError, say
from .environment import is_current
from .process import child_environment, run_logged

PLAYWRIGHT = "playwright-core@1.64.1"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
CHROMIUM_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe",
)
REMEDY = "The browser test is skipped; everything else runs."


def find_chromium() -> str | None:
    named = (shutil.which(name) for name in CHROMIUM_NAMES)
    placed = (place for place in CHROMIUM_PLACES if Path(place).is_file())
    return next((found for found in (*named, *placed) if found), None)


def ensure() -> dict[str, str]:
    """What the browser test reads; when something is missing, the reason instead."""
    try:
        missing = [] if find_chromium() else ["chromium"]
        missing += [] if shutil.which("node") and shutil.which("npm") else ["nodejs", "npm"]
        if missing:
            _apt_install(missing)
        modules = _ensure_playwright()
    except RunError as error:
        say(f"  browser: {error}")
        return {"MODULAR_LORA_NO_BROWSER": str(error).splitlines()[0]}
    return {
        "MODULAR_LORA_CHROMIUM": str(find_chromium()),
        "MODULAR_LORA_NODE": str(shutil.which("node")),
        "MODULAR_LORA_PLAYWRIGHT": str(modules),
    }


def _apt_install(packages: list[str]) -> None:
    """Debian's packages, where this process may install them."""
    wanted = " ".join(packages)
    root = sys.platform.startswith("linux") and os.geteuid() == 0
    if not root or not shutil.which("apt-get"):
        raise RunError(f"{wanted} not found; install it with the system's package manager. {REMEDY}")
    environment = child_environment({"DEBIAN_FRONTEND": "noninteractive"})
    steps = (["update"], ["install", "-y", "--no-install-recommends", *packages])
    for arguments in steps:
        run_logged(
            ["apt-get", "-q", *arguments],
            title=f"apt-get {arguments[0]} ({wanted})",
            log=paths.LOGS / "apt.log",
            remedy=REMEDY,
            environment=environment,
        )


def _ensure_playwright() -> Path:
    modules = paths.BROWSER / "node_modules"
    stamp = paths.BROWSER / "playwright.stamp"
    if not is_current(stamp, PLAYWRIGHT):
        paths.BROWSER.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm") or "npm"
        run_logged(
            [npm, "install", "--prefix", paths.BROWSER, "--no-audit", "--no-fund", "--ignore-scripts", PLAYWRIGHT],
            title="playwright-core",
            log=paths.LOGS / "npm.log",
            remedy=REMEDY,
        )
        atomic.write(stamp, PLAYWRIGHT, parents=True)
    return modules
