"""The schema of the chart's values: what the chart takes, and under `config` what the service takes.

``python -m tests.helm.schema`` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from consumer import config, credentials

CHART: Final = Path(__file__).parents[2] / "helm"
VARIABLES: Final = (
    credentials.STRIPE_SECRET_KEY,
    credentials.STRIPE_WEBHOOK_SECRET,
    *("KAFKA_" + option.upper().replace(".", "_") for option in credentials.KAFKA_OPTIONS),
)


def text() -> str:
    """What `values.schema.json` has to be."""
    chart = json.loads((CHART / "chart.schema.json").read_text(encoding="utf-8"))
    service = _without_titles(config.schema())
    definitions = service.pop("$defs")
    # Secrets that the service would refuse must not get as far as a ConfigMap.
    options = definitions["Kafka"]["properties"]["options"]
    options["propertyNames"] = {"not": {"enum": sorted(credentials.KAFKA_OPTIONS)}}
    for named in (chart["properties"]["secrets"], chart["properties"]["externalSecret"]["properties"]["data"]):
        named["propertyNames"] = {"enum": sorted(VARIABLES)}
    chart["$defs"] |= definitions
    chart["properties"]["config"] = service
    del chart["$comment"]
    return json.dumps(chart, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _without_titles(given: Any) -> Any:
    """Without the names that pydantic makes up; a key that is called so is none of them."""
    match given:
        case dict():
            return {
                key: _without_titles(each)
                for key, each in given.items()
                if not (key == "title" and isinstance(each, str))
            }
        case list():
            return [_without_titles(each) for each in given]
    return given


if __name__ == "__main__":
    (CHART / "values.schema.json").write_text(text(), encoding="utf-8")
