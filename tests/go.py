"""Programs that tests need and that are written in Go: built from their module once per user, as Go does it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


class GoUnavailableError(Exception):
    """A program cannot be built here; the message says why."""


def sources(module: str, version: str) -> Path:
    """The folder that has the files of this version of the module; raises ``GoUnavailableError``."""
    go = _go(module)
    done = subprocess.run(
        [go, "mod", "download", "-json", f"{module}@{version}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise GoUnavailableError(f"go mod download {module}@{version}: {(done.stdout + done.stderr)[-2000:]}")
    return Path(json.loads(done.stdout)["Dir"])


def program(package: str, version: str) -> Path:
    """The program that this version of the package is; raises ``GoUnavailableError``."""
    name = package.rpartition("/")[2]
    cache = Path.home() / ".cache" / "tallyman"
    built = cache / f"{name}-{version}" / name
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}-{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _build(f"{package}@{version}", built.parent)
    return built


def _build(package: str, folder: Path) -> None:
    go = _go(package)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-building-", dir=folder.parent) as scratch:
        built = Path(scratch, "bin")
        done = subprocess.run(
            [go, "install", package],
            env={**os.environ, "GOBIN": str(built)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise GoUnavailableError(f"go install {package}: {done.stderr[-2000:]}")
        # The rename is what makes it all or nothing: an interrupted build leaves no folder of this name.
        built.rename(folder)


def _go(what: str) -> str:
    go = shutil.which("go")
    if go is None:
        raise GoUnavailableError(f"{what} needs the command go, once")
    return go
