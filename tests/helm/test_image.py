"""The image is built as its users build it, and runs where it may do nothing but run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Final

import pytest

from tests.helm.engine import ROOT, Image

MOST_BYTES: Final = 120_000_000
HEALTHY_S: Final = 30

LITTLE: Final = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none")
"""As the chart runs it, and without a network."""


@pytest.mark.slow
def test_the_image_is_small_may_do_nothing_and_does_the_job(image: Image, tmp_path: Path) -> None:
    """One story in one build: what is inside, the whole demo, then the service, until it is asked to stop."""
    docker, name = image.engine, image.name

    inside = docker(
        *("run", "--rm", *LITTLE, "--entrypoint=sh", name, "-c"),
        """
        id -u; id -g
        du --summarize --block-size=1 --total /opt/tallyman /tallyman | tail -1 | cut -f1
        touch /opt/tallyman/x 2>/dev/null && echo writable; touch var/x && echo state
        for each in cc gcc make git; do command -v $each; done; python -m pip --version 2>/dev/null
        python -c 'from importlib.metadata import distributions as d; print(*(f"{e.name}=={e.version}" for e in d()))'
        """,
    ).stdout.splitlines()
    user, group, size, state, installed = inside
    assert (user, group, state) == ("10001", "10001", "state")
    assert int(size) < MOST_BYTES
    pinned = {line.lower() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    assert {each for each in installed.lower().split() if not each.startswith("tallyman==")} <= pinned
    labels = json.loads(docker("inspect", "--format", "{{json .Config.Labels}}", name).stdout)
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"

    demo = docker("run", "--rm", *LITTLE, "--tmpfs=/tmp", name, "demo", "--events", "10000")
    assert "What Stripe bills is what was produced" in demo.stdout

    # Kafka is nowhere: the service waits, and is healthy.
    (tmp_path / "tallyman.yaml").write_text((ROOT / "config" / "tallyman.yaml").read_text("utf-8"), encoding="utf-8")
    tmp_path.chmod(0o755)
    config = f"--volume={tmp_path}:/tallyman/config:ro"
    key = "--env=STRIPE_SECRET_KEY=sk_test_none"
    service = docker("run", "--detach", *LITTLE, "--health-interval=1s", config, key, name).stdout.strip()
    deadline = time.monotonic() + HEALTHY_S
    while (health := docker("inspect", "--format", "{{.State.Health.Status}}", service).stdout.strip()) != "healthy":
        assert time.monotonic() < deadline, f"{health}: {docker('logs', service).stderr}"
        time.sleep(0.2)
    docker("stop", "--time=60", service)
    assert docker("inspect", "--format", "{{.State.ExitCode}}", service).stdout.strip() == "0"
