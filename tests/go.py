"""Programs that tests need and that are written in Go: built from their module once per user, as Go does it.

``python -m tests.go`` builds them all, which takes minutes of a processor's time: a test that needs one waits for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final


class GoUnavailableError(Exception):
    """A program cannot be built here; the message says why."""


@dataclass(frozen=True)
class Program:
    """A command, by its package and the version of the module."""

    package: str
    version: str

    def built(self) -> Path:
        """Where it is, once it is built; raises ``GoUnavailableError``."""
        name = self.package.rpartition("/")[2]
        cache = Path.home() / ".cache" / "tallyman"
        built = cache / f"{name}-{self.version}" / name
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{name}-{self.version}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not built.exists():
                _build(f"{self.package}@{self.version}", built.parent)
        return built


STRIPE_MOCK: Final = Program("github.com/stripe/stripe-mock", "v0.197.0")
KUBECONFORM: Final = Program("github.com/yannh/kubeconform/cmd/kubeconform", "v0.8.0")
HELM: Final = Program("helm.sh/helm/v3/cmd/helm", "v3.19.0")

_CHEAP: Final = ("-ldflags=-s -w", "-gcflags=all=-dwarf=false", "-gcflags=k8s.io/...=-N -l -dwarf=false")
"""Nothing for debuggers; and what is half of helm, and hardly runs where no cluster is asked, is not optimized."""


def sources(module: str, version: str) -> Path:
    """The folder that has the files of this version of the module; raises ``GoUnavailableError``."""
    go = _go(module)
    done = subprocess.run(
        [go, "mod", "download", "-json", f"{module}@{version}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise GoUnavailableError(f"go mod download {module}@{version}: {(done.stdout + done.stderr)[-2000:]}")
    return Path(json.loads(done.stdout)["Dir"])


def _build(package: str, folder: Path) -> None:
    go = _go(package)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-building-", dir=folder.parent) as scratch:
        built = Path(scratch, "bin")
        done = subprocess.run(
            [go, "install", *_CHEAP, package],
            env={**os.environ, "GOBIN": str(built), "CGO_ENABLED": "0"},
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


if __name__ == "__main__":
    for each in (STRIPE_MOCK, KUBECONFORM, HELM):
        print(each.built())
