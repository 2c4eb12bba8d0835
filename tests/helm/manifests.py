"""What Kubernetes and the operators say of manifests: their schemas, in the form in which kubeconform reads them.

Kubernetes's own come with the package kubernetes-validate. Those of the operators' resources are the CRDs that a
cluster gets: they are among the files of the operators' Go modules, of which nothing has to be built.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import yaml

from tests.go import sources

_DEFINITIONS: Final = "/api/_definitions.json#"


@dataclass(frozen=True)
class _Operator:
    module: str
    version: str
    crds: str
    """Where in the module a resource's CRD is, by the resource's name in the plural."""
    resources: tuple[str, ...]
    """Those that the chart makes."""


_OPERATORS: Final = (
    _Operator(
        "github.com/prometheus-operator/prometheus-operator",
        "v0.85.0",
        "example/prometheus-operator-crd/monitoring.coreos.com_{}.yaml",
        ("podmonitors", "prometheusrules"),
    ),
    _Operator(
        "github.com/kedacore/keda/v2",
        "v2.18.0",
        "config/crd/bases/keda.sh_{}.yaml",
        ("scaledobjects", "triggerauthentications"),
    ),
    _Operator(
        "github.com/external-secrets/external-secrets",
        "v0.18.2",
        "config/crds/bases/external-secrets.io_{}.yaml",
        ("externalsecrets",),
    ),
)


def kubernetes(version: str, folder: Path) -> str:
    """Write this version's schemas of all kinds into the folder; returns where kubeconform finds each."""
    given = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    definitions = json.loads((given / "_definitions.json").read_text(encoding="utf-8"))["$defs"]
    for each in given.iterdir():
        if each.name.startswith("_") or "_definitions.json" not in (text := each.read_text(encoding="utf-8")):
            continue
        schema = _within(json.loads(text))
        schema["$defs"] = _needed(schema, definitions)
        (folder / each.name).write_text(json.dumps(schema), encoding="utf-8")
    return f"{folder}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"


def _needed(schema: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The definitions that a schema refers to, and those that they refer to."""
    needed: dict[str, Any] = {}
    new = _named(schema)
    while new:
        needed |= {name: _within(definitions[name]) for name in new}
        new = {name for each in new for name in _named(needed[each])} - set(needed)
    return needed


def _named(schema: Any) -> set[str]:
    return set(re.findall(r'"\$ref": "#/\$defs/([^"]+)"', json.dumps(schema)))


def _within(schema: Any) -> Any:
    return json.loads(json.dumps(schema).replace(_DEFINITIONS, "#"))


def operators(folder: Path) -> str:
    """The same for the resources of the operators; raises ``GoUnavailableError``."""
    for operator in _OPERATORS:
        files = sources(operator.module, operator.version)
        for name in operator.resources:
            file = files / operator.crds.format(name)
            crd = yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)["spec"]
            (folder / crd["group"]).mkdir(exist_ok=True)
            for each in crd["versions"]:
                schema = _strict(each["schema"]["openAPIV3Schema"])
                kind = f"{crd['names']['kind'].lower()}-{each['name']}.json"
                (folder / crd["group"] / kind).write_text(json.dumps(schema), encoding="utf-8")
    return f"{folder}/{{{{.Group}}}}/{{{{.ResourceKind}}}}-{{{{.ResourceAPIVersion}}}}.json"


def _strict(schema: Any) -> Any:
    """No keys but those that are named: what an API server would drop without a word is an error here."""
    match schema:
        case {"properties": dict()} if not {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & set(
            schema
        ):
            return {key: _strict(each) for key, each in schema.items()} | {"additionalProperties": False}
        case dict():
            return {key: _strict(each) for key, each in schema.items()}
        case list():
            return [_strict(each) for each in schema]
    return schema
