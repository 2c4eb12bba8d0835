"""The tools that judge the chart: the real helm, and kubeconform with the schemas of Kubernetes and the operators."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
import yaml

from tests.go import HELM, KUBECONFORM, GoUnavailableError
from tests.helm import engine, manifests
from tests.helm.schema import CHART

NEWEST: Final = "1.37.0"

Made = TypeVar("Made")


class RenderError(Exception):
    """helm did not render the chart; the text is what it said."""


@dataclass(frozen=True)
class Helm:
    """The real helm, on a chart."""

    program: Path
    chart: Path = CHART

    def lint(self, values: Path) -> None:
        """Raises ``RenderError``."""
        self._run("lint", str(self.chart), "--strict", "--values", str(values))

    def render(self, values: Path, *settings: str, kubernetes: str = NEWEST) -> str:
        """All manifests, those of an upgrade's hooks too; each setting is a `key=value`. Raises ``RenderError``."""
        given = [each for setting in settings for each in ("--set", setting)]
        values_file = ("--values", str(values))
        return self._run("template", "t", str(self.chart), "--is-upgrade", *values_file, *given, kubernetes=kubernetes)

    def objects(self, values: Path, *settings: str) -> Objects:
        """The same, read."""
        return Objects(list(filter(None, yaml.load_all(self.render(values, *settings), yaml.CSafeLoader))))

    def _run(self, *arguments: str, kubernetes: str = NEWEST) -> str:
        done = subprocess.run(
            [self.program, *arguments, "--kube-version", kubernetes], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RenderError(done.stdout + done.stderr)
        return done.stdout


@dataclass(frozen=True)
class Objects:
    """What was rendered."""

    all: list[dict[str, Any]]

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        """The objects of a kind, by name."""
        return {each["metadata"]["name"]: each for each in self.all if each["kind"] == kind}

    def one(self, kind: str) -> dict[str, Any]:
        """The only object of a kind."""
        (one,) = self.of(kind).values()
        return one

    @property
    def pods(self) -> dict[str, dict[str, Any]]:
        """The specs of all pods that run the service, by the name of what makes them."""
        return {
            each["metadata"]["name"]: each["spec"]["template"]["spec"]
            for each in self.all
            if each["kind"] in {"StatefulSet", "Deployment"}
        }


def _or_skip(make: Callable[[], Made]) -> Made:
    try:
        return make()
    except GoUnavailableError as error:
        if os.environ.get("CI") and shutil.which("go"):
            raise
        pytest.skip(f"no helm: {error}")


@pytest.fixture(scope="session")
def helm() -> Helm:
    """The real helm."""
    return _or_skip(lambda: Helm(HELM.built()))


@pytest.fixture(scope="session", params=["1.27.0", NEWEST])
def validated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Helm, Path], str]:
    """Renders for a version of Kubernetes; returns what kubeconform says of each manifest that is not valid there."""
    kubeconform = _or_skip(KUBECONFORM.built)
    operators = _or_skip(lambda: manifests.operators(tmp_path_factory.mktemp("operators")))
    kubernetes = manifests.kubernetes(request.param, tmp_path_factory.mktemp("kubernetes"))

    def validate(helm: Helm, values: Path) -> str:
        done = subprocess.run(
            [
                *(str(kubeconform), "-strict", "-kubernetes-version", request.param),
                *("-schema-location", kubernetes, "-schema-location", operators),
            ],
            input=helm.render(values, kubernetes=request.param),
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout + done.stderr

    return validate


@pytest.fixture(scope="session")
def image() -> Iterator[engine.Image]:
    """The image, built by the engine that runs it."""
    with ExitStack() as running:
        try:
            built = running.enter_context(engine.image())
        except engine.EngineUnavailableError as error:
            pytest.skip(f"no image: {error}")
        yield built
