"""The pods of the chart, as they are rendered, run by Docker instead of a cluster: they count, and they bill."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from consumer.sandbox.kafka import Kafka, free_ports
from consumer.sandbox.stripe import SECRET_KEY
from tests.helm.conftest import Helm, Objects
from tests.helm.engine import Image
from tests.kafka.harness import HOUR, METER, Bench, Topic, bench, iso, past_events, real_now, until

pytestmark = [pytest.mark.kafka, pytest.mark.slow]


@pytest.fixture
def on(kafka: Kafka, tmp_path: Path) -> Iterator[Bench]:
    with bench(kafka, tmp_path) as made:
        yield made


class Node:
    """What runs a pod: its volumes are folders, its probes are asked, and it ends as a cluster would end it."""

    def __init__(self, image: Image, folder: Path, objects: Objects, secrets: Mapping[tuple[str, str], str]) -> None:
        self.docker = image.engine
        self._image = image.name
        self._folder = folder
        self._objects = objects
        self._secrets = secrets
        self._claims: dict[str, Path] = {}

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """The pod of a workload, until it is ready; at the end it is stopped, and has to have ended in good order."""
        pod = self._objects.pods[name]
        (container,) = pod["containers"]
        identifier = self.docker("run", "--detach", *self._arguments(pod)).stdout.strip()

        def log() -> str:
            return self.docker("logs", identifier).stderr[-4000:]

        try:
            until(lambda: _answers(container, "livenessProbe"), f"{name} lives", within=60, context=log)
            until(lambda: _answers(container, "readinessProbe"), f"{name} is ready", within=60, context=log)
            yield
            self.docker("stop", f"--time={pod['terminationGracePeriodSeconds']}", identifier)
            ended = self.docker("inspect", "--format", "{{.State.ExitCode}}", identifier).stdout.strip()
            assert ended == "0", log()
        finally:
            self.docker("rm", "--force", identifier)

    def run(self, pod: Mapping[str, Any], *options: str) -> str:
        """A pod that ends by itself; returns what it printed. Raises ``RuntimeError`` where it fails."""
        return self.docker("run", "--rm", *options, *self._arguments(pod)).stdout

    def _arguments(self, pod: Mapping[str, Any]) -> list[str]:
        (container,) = pod["containers"]
        security = pod["securityContext"]
        volumes = {each["name"]: each for each in pod.get("volumes", ())}
        entrypoint, *command = container.get("command", ["tallyman"])
        found = ["--network=host", f"--entrypoint={entrypoint}"]
        found += [f"--user={security['runAsUser']}:{security['runAsGroup']}", f"--group-add={security['fsGroup']}"]
        found += ["--read-only"] * container["securityContext"]["readOnlyRootFilesystem"]
        found += [f"--cap-drop={each}" for each in container["securityContext"]["capabilities"]["drop"]]
        found += ["--security-opt=no-new-privileges"]
        found += [f"--env={each['name']}={each['value']}" for each in container.get("env", ())]
        for mount in container.get("volumeMounts", ()):
            volume = volumes.get(mount["name"], {})
            if "emptyDir" in volume:
                found.append(f"--tmpfs={mount['mountPath']}")
            else:
                folder = self._made(mount["name"], volume, int(security["fsGroup"]))
                found.append(f"--volume={folder}:{mount['mountPath']}:{'ro' if mount.get('readOnly') else 'rw'}")
        return [*found, self._image, *command, *container.get("args", ())]

    def _made(self, name: str, volume: Mapping[str, Any], group: int) -> Path:
        """The folder that is the volume."""
        if "configMap" in volume:
            data = self._objects.of("ConfigMap")[volume["configMap"]["name"]]["data"]
            files = {each["path"]: data[each["key"]] for each in volume["configMap"]["items"]}
            return self._folder_of(files, 0o644, group)
        if "projected" in volume:
            files = {
                item["path"]: self._secrets[source["secret"]["name"], item["key"]]
                for source in volume["projected"]["sources"]
                for item in source["secret"]["items"]
            }
            return self._folder_of(files, volume["projected"]["defaultMode"], group)
        # A claim: of the pod's own name in a StatefulSet, and by its name elsewhere.
        claim = volume.get("persistentVolumeClaim", {}).get("claimName", f"{name}-t-tallyman-0")
        if claim not in self._claims:
            self._claims[claim] = self._folder_of({}, 0, group)
        return self._claims[claim]

    def _folder_of(self, files: Mapping[str, str], mode: int, group: int) -> Path:
        folder = self._folder / f"volume-{len(list(self._folder.iterdir()))}"
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            os.chown(folder / name, 0, group)
            (folder / name).chmod(mode)
        os.chown(folder, 0, group)
        folder.chmod(0o2775)
        return folder


def _answers(container: Mapping[str, Any], probe: str) -> bool:
    (port,) = (each["containerPort"] for each in container["ports"] if each["name"] == "http")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{container[probe]['httpGet']['path']}", timeout=5):
            return True
    except OSError:
        return False


BILL_FROM: Final = iso(real_now() - 24 * HOUR)[:19] + "Z"


def _values(on: Bench, topic: Topic, storage: str, port: int) -> str:
    """Values for that topic and for the stand-in of Stripe's. JSON is YAML."""
    config = {
        "pipeline": topic.name,
        "bill_from": BILL_FROM,
        "kafka": {"bootstrap_servers": on.kafka.bootstrap_servers, "topic": topic.name, "arrival": "create_time"},
        "storage": {"kind": storage},
        "commit_every": "200ms",
        "customers": {"kind": "file", "path": "customers/customers.yaml"},
        "stripe": {"livemode": False, "api_base": on.stripe.url},
        "http": {"host": "127.0.0.1", "port": port},
        "meters": [METER],
    }
    customers = "acme: cus_a\ninitech: cus_b\n"
    return json.dumps({"config": config, "existingSecret": "ours", "customers": {"file": customers}})


def _rendered(helm: Helm, folder: Path, values: str) -> Objects:
    file = folder / "values.yaml"
    file.write_text(values, encoding="utf-8")
    return helm.objects(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="the volumes belong to others")
def test_the_pod_of_the_default_bills_and_is_checked_beside_its_work(
    helm: Helm, image: Image, on: Bench, tmp_path: Path
) -> None:
    """From values to Stripe: configuration, secret, customers and state are where the service looks for them.

    The check of an upgrade finds the state in use; what a second pod finds is what the first one left.
    """
    topic = Topic.create(on.kafka, 1, arrival="create_time")
    port, _ = free_ports()
    objects = _rendered(helm, tmp_path, _values(on, topic, "sqlite", port))
    (tmp_path / "node").mkdir()
    node = Node(image, tmp_path / "node", objects, {("ours", "STRIPE_SECRET_KEY"): SECRET_KEY})
    past_events(topic, {"acme": 5, "initech": 7}, at=real_now() - HOUR)
    with node.running("t-tallyman"):
        until(lambda: on.billed() == {"cus_a": "5", "cus_b": "7"}, "all is billed", within=60)
        said = node.run(objects.one("Job")["spec"]["template"]["spec"])
        assert "in use by" in said
        assert not any(line.startswith("error") for line in said.splitlines())
        compared = node.run(objects.one("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"])
        assert "calls to Stripe: of 2 customers" in compared
        ready = node.run(objects.one("Pod")["spec"], "--add-host=t-tallyman:127.0.0.1")
        assert ready.strip() == "t-tallyman 127.0.0.1 ok"
    past_events(topic, {"acme": 1}, at=real_now() - HOUR // 2)
    with node.running("t-tallyman"):
        until(lambda: on.billed() == {"cus_a": "6", "cus_b": "7"}, "and only what is new", within=60)


@pytest.mark.skipif(os.geteuid() != 0, reason="the volumes belong to others")
def test_the_pods_of_the_two_stages_bill_together(helm: Helm, image: Image, on: Bench, tmp_path: Path) -> None:
    """One counts, without a key of Stripe's; the other one sends."""
    topic = Topic.create(on.kafka, 2, arrival="create_time")
    past_events(topic, {"acme": 5, "initech": 7}, at=real_now() - HOUR)
    past_events(topic, {"acme": 1}, at=real_now() - HOUR, partition=1)
    nodes = []
    for port in free_ports():  # in a cluster each pod has an address of its own
        folder = tmp_path / str(port)
        (folder / "node").mkdir(parents=True)
        objects = _rendered(helm, folder, _values(on, topic, "kafka", port))
        nodes.append(Node(image, folder / "node", objects, {("ours", "STRIPE_SECRET_KEY"): SECRET_KEY}))
    counts, sends = nodes
    with counts.running("t-tallyman-aggregate"), sends.running("t-tallyman-deliver"):
        until(lambda: on.billed() == {"cus_a": "6", "cus_b": "7"}, "all is billed", within=60)
