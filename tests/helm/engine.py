"""A Docker engine, and under the name of the image's base something to build on.

``python -m tests.helm.engine`` makes that something, where an engine of our own will need it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
START_S: Final = 30
BASE_SUITE: Final = "trixie"
"""The release of Debian that the base is made of, with the same Python."""
CERTIFICATES: Final = "etc/ssl/certs/ca-certificates.crt"
BASE_PACKAGES: Final = ("ca-certificates", "python3", "python3-pip", "python3-venv")


class EngineUnavailableError(Exception):
    """There is no engine, and none can be started; the message says why."""


@dataclass(frozen=True)
class Engine:
    """An engine, by the command docker."""

    environ: dict[str, str]
    network: tuple[str, ...] = ()
    proxies: tuple[str, ...] = field(
        default_factory=lambda: tuple(
            each for name in os.environ if name.lower().endswith("_proxy") for each in ("--build-arg", name)
        )
    )

    def __call__(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run docker; raises ``RuntimeError`` with what it said, unless that is to be looked at."""
        done = subprocess.run(["docker", *arguments], env=self.environ, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"docker {' '.join(arguments)}:\n{(done.stdout + done.stderr)[-4000:]}")
        return done

    def build(self, folder: Path, tag: str) -> None:
        """Build an image. With an engine of our own the build shares this host's network: it has none itself."""
        self("build", *self.network, *self.proxies, "--tag", tag, str(folder))


@dataclass(frozen=True)
class Image:
    """The image, and the engine that has it."""

    engine: Engine
    name: str


@contextmanager
def image() -> Iterator[Image]:
    """The image of this source, built; raises ``EngineUnavailableError``."""
    base = re.search(r"^ARG BASE=(\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    if base is None:
        raise RuntimeError("the Dockerfile names no base")
    with engine(base[1]) as found:
        found.build(ROOT, "tallyman:test")
        yield Image(found, "tallyman:test")


@contextmanager
def engine(base: str) -> Iterator[Engine]:
    """The engine that runs here, or one of our own that has the base; raises ``EngineUnavailableError``."""
    if running := _running():
        if running("image", "inspect", base, check=False).returncode:
            pulled = running("pull", "--quiet", base, check=False)
            if pulled.returncode:
                raise EngineUnavailableError(f"an engine runs, and cannot fetch {base}: {pulled.stderr.strip()}")
        yield running
        return
    _possible()
    with _own() as own:
        with _tree() as tree, tree.open("rb") as packed:
            subprocess.run(
                ["docker", "import", "-", base], env=own.environ, stdin=packed, check=True, capture_output=True
            )
        yield own


def _running() -> Engine | None:
    """The engine that runs here."""
    if shutil.which("docker") is None:
        raise EngineUnavailableError("there is no command docker")
    found = Engine(dict(os.environ))
    return found if found("info", "--format", "{{.ServerVersion}}", check=False).returncode == 0 else None


def _possible() -> None:
    """Raise where none of our own can be started."""
    missing = [each for each in ("dockerd", "debootstrap") if shutil.which(each) is None]
    if missing or os.geteuid() != 0:
        raise EngineUnavailableError(f"no engine runs, and to start one needs root, {' and '.join(missing) or 'too'}")


@contextmanager
def _own() -> Iterator[Engine]:
    """An engine that is ours alone and leaves the host's network as it is."""
    with tempfile.TemporaryDirectory(prefix="tallyman-engine-", ignore_cleanup_errors=True) as scratch:
        socket = f"unix://{scratch}/docker.sock"
        command = [
            *("dockerd", "--host", socket, "--data-root", f"{scratch}/data", "--exec-root", f"{scratch}/run"),
            *("--pidfile", f"{scratch}/pid", "--bridge=none", "--iptables=false", "--ip6tables=false"),
        ]
        with Path(scratch, "log").open("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                own = Engine({**os.environ, "DOCKER_HOST": socket, "DOCKER_BUILDKIT": "0"}, ("--network", "host"))
                deadline = time.monotonic() + START_S
                while own("info", "--format", "{{.ServerVersion}}", check=False).returncode:
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise EngineUnavailableError(f"dockerd does not start here: {log.read()[-1000:]}")
                    time.sleep(0.2)
                yield own
            finally:
                process.terminate()
                process.wait()
                # This it leaves behind.
                subprocess.run(["umount", f"{scratch}/run/netns/default"], check=False, capture_output=True)


@contextmanager
def _tree() -> Iterator[Path]:
    """A packed Debian with Python, made once per user: what stands in for the base where no registry is reached."""
    cache = Path.home() / ".cache" / "tallyman"
    packed = cache / f"base-{BASE_SUITE}.tar"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{packed.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not packed.exists():
            with tempfile.TemporaryDirectory(prefix=f"{packed.name}-making-", dir=cache) as scratch:
                tree = Path(scratch, "tree")
                packages = ",".join(BASE_PACKAGES)
                done = subprocess.run(
                    ["debootstrap", "--variant=minbase", f"--include={packages}", BASE_SUITE, str(tree)],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise EngineUnavailableError(f"debootstrap: {(done.stdout + done.stderr)[-1000:]}")
                (tree / "usr/bin/python").symlink_to("python3")
                # Whom this host trusts, the build has to trust too: what it installs comes the same way.
                trusted = Path(os.environ.get("SSL_CERT_FILE") or f"/{CERTIFICATES}")
                if trusted.exists():
                    shutil.copyfile(trusted, tree / CERTIFICATES)
                made = Path(scratch, "tar")
                left_out = ("--exclude=./var/cache/*", "--exclude=./var/lib/apt/lists/*")
                subprocess.run(["tar", "-C", str(tree), *left_out, "-cf", str(made), "."], check=True)
                made.rename(packed)
    yield packed


if __name__ == "__main__":
    if _running() is None:
        _possible()
        with _tree():
            pass
