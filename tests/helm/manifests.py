"""What Kubernetes and the operators say of manifests: their schemas, in the form in which kubeconform reads them.

Kubernetes's own come with the package kubernetes-validate. Those of the operators' resources are made of the operators'
Go types, by the generator that the operators make them with; `operators/go.mod` has the versions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any, Final

import yaml

from tests.go import GoUnavailableError

_OPERATORS: Final = Path(__file__).with_name("operators")
_GENERATOR: Final = "sigs.k8s.io/controller-tools/cmd/controller-gen"
_DEFINITIONS: Final = "/api/_definitions.json#"


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


def operators() -> str:
    """The same for the resources of the operators, made once per user; raises ``GoUnavailableError``."""
    pinned = b"".join((_OPERATORS / name).read_bytes() for name in ("go.mod", "go.sum", "kinds.go"))
    cache = Path.home() / ".cache" / "tallyman"
    made = cache / f"operators-{hashlib.sha256(pinned + Path(__file__).read_bytes()).hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{made.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _generate(made)
    return f"{made}/{{{{.Group}}}}/{{{{.ResourceKind}}}}-{{{{.ResourceAPIVersion}}}}.json"


def _generate(made: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise GoUnavailableError("the schemas of the operators' resources need the command go, once, to be made")
    types = re.findall(r'_ "(.+/apis/.+)"', (_OPERATORS / "kinds.go").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix=f"{made.name}-making-", dir=made.parent) as scratch:
        crds, schemas = Path(scratch, "crds"), Path(scratch, "schemas")
        done = subprocess.run(
            [
                *(go, "run", _GENERATOR, "crd:allowDangerousTypes=true", f"output:crd:dir={crds}"),
                *(f"paths={each}" for each in types),
            ],
            cwd=_OPERATORS,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise GoUnavailableError(f"go run {_GENERATOR}: {done.stderr[-2000:]}")
        for file in crds.iterdir():
            crd = yaml.safe_load(file.read_text(encoding="utf-8"))["spec"]
            folder = schemas / crd["group"]
            folder.mkdir(parents=True, exist_ok=True)
            for version in crd["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                kind = f"{crd['names']['kind'].lower()}-{version['name']}.json"
                (folder / kind).write_text(json.dumps(schema), encoding="utf-8")
        schemas.rename(made)


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
