"""The configuration: what is allowed, what is said about the rest, and where secrets come from."""

import json
import logging
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from consumer import config, credentials
from consumer.config import Config, ConfigError, load
from consumer.config_meters import Meter
from consumer.config_values import Duration
from consumer.totals import Destination

EXAMPLE = Path(__file__).parents[2] / "config" / "tallyman.yaml"

LEAST: dict[str, Any] = {
    "pipeline": "prod",
    "meters": [
        {"name": "calls", "event_types": ["api.call"], "aggregation": "count", "stripe": {"event_name": "calls"}}
    ],
    "stripe": {"livemode": False},
}
"""A configuration with nothing in it but what is required."""


def changed(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The least configuration with changes at dotted places: `meters.0.window`; `meters.1` copies the first one."""
    data: dict[str, Any] = json.loads(json.dumps(LEAST))
    for place, value in changes.items():
        node: Any = data
        *around, last = place.split("|") if "|" in place else place.split(".")
        for part in around:
            if isinstance(node, list):
                if int(part) == len(node):
                    node.append(json.loads(json.dumps(LEAST["meters"][0])))
                node = node[int(part)]
            else:
                node = node.setdefault(part, {})
        node[last] = value
    return data


def errors(tmp_path: Path, text: str, environ: Mapping[str, str] | None = None) -> str:
    """What is said about a file that is wrong."""
    file = tmp_path / "t.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(file, environ or {})
    return str(caught.value).replace(f"{tmp_path}/", "")


def accepted(tmp_path: Path, changes: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Config:
    """The configuration with changes, which are right."""
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(changed(changes)), encoding="utf-8")
    return load(file, environ or {})


def test_a_file_with_five_errors_shows_five_with_their_places_and_what_is_allowed(tmp_path: Path) -> None:
    text = """\
    pipeline: Prod EU
    bill_from: 2026-11-01T00:00:00
    kafka:
      topik: usage-events
      options:
        security.protocol: SASL_SSL
        sasl.password: hunter2
    meters:
      - name: ai-tokens
        event_types: [ai.completion]
        aggregation: sum
        value: $.tokens.total
        window: 1h
        stripe: {event_name: ai_tokens}
    stripe: {livemode: false}
    """

    assert errors(tmp_path, dedent(text)) == dedent("""\
        t.yaml: 5 errors

          line 1, pipeline
            must be lower-case letters, digits, '-', '_' and '.', beginning with a letter or digit, at most 64 \
characters, not "Prod EU"

          line 2, bill_from
            "2026-11-01T00:00:00" has no offset from UTC: write Z for UTC itself, or an offset like +02:00

          line 4, kafka.topik
            unknown key (did you mean topic?); allowed here: bootstrap_servers, topic, arrival, token, \
options

          line 7, kafka.options["sasl.password"]
            secrets do not belong in this file: set KAFKA_SASL_PASSWORD, or KAFKA_SASL_PASSWORD_FILE to the name of a \
file with it

          line 13, meters[0].window
            1h windows need at least 73 min (1h + lateness 2m + first correction 5m + settle 5s + sending 5m), and \
stripe.finalization_grace is 1h: raise the grace in Stripe and here (at most 72h), or use 1m""")


WRONG: list[tuple[Mapping[str, Any], str, str]] = [
    # keys
    ({"piepline": "x"}, "piepline", "did you mean pipeline?"),
    ({"stripe": {}}, "stripe.livemode", "is required: true bills real customers"),
    ({"meters": []}, "meters", "must not be empty"),
    ({"kafka": None}, "kafka", "must be keys with values, not empty"),
    ({"meters": [5]}, "meters[0]", "must be keys with values, not 5"),
    ({"meters": {"a": 1}}, "meters", "must be a list, not keys with values"),
    # names
    ({"pipeline": "-x"}, "pipeline", "beginning with a letter or digit"),
    ({"pipeline": "x" * 65}, "pipeline", "at most 64 characters"),
    ({"pipeline": 5}, "pipeline", "must be text, not 5: put it in quotes"),
    ({"meters.0.name": "a b"}, "meters[0].name", "lower-case letters"),
    ({"meters.1.name": "calls"}, "meters[1].name", "calls is the name of meters[0] already"),
    ({"kafka.topic": "a/b"}, "kafka.topic", "at most 249"),
    # times
    ({"bill_from": "yesterday"}, "bill_from", "write it like 2026-11-01T00:00:00Z"),
    ({"bill_from": "2026-11-01"}, "bill_from", "has no offset"),
    ({"bill_from": "2026-13-01T00:00:00Z"}, "bill_from", "month must be in 1..12"),
    ({"bill_from": 1_793_491_200}, "bill_from", "is not a time"),
    ({"commit_every": "5"}, "commit_every", "a whole number and its unit"),
    ({"commit_every": 5}, "commit_every", "5 is not a duration"),
    ({"commit_every": "1.5s"}, "commit_every", "a whole number and its unit"),
    ({"commit_every": "2m"}, "commit_every", "2m is out of range: 100ms to 1m is allowed"),
    ({"windows.deduplicate_for": "25ms"}, "windows.deduplicate_for", "does not divide into 24 intervals"),
    ({"windows.accept_late": "35d"}, "windows.accept_late", "35d is out of range: 0s to 34d"),
    (
        {"windows.accept_late": "1m"},
        "windows.accept_late",
        "events that are in time for their window would become dead",
    ),
    ({"windows.lateness": "25h"}, "windows.accept_late", "(which is deduplicate_for, as it is not set)"),
    ({"meters.0.accept_late": "2m"}, "meters[0].accept_late", "less than window 1m + lateness 2m"),
    ({"meters.0.lateness": "30m", "windows.accept_late": "30m"}, "meters[0].lateness", "than window 1m + lateness 30m"),
    # what Stripe allows
    ({"meters.0.window": "1h"}, "meters[0].window", "1h windows need at least 73 min"),
    ({"windows.lateness": "49m"}, "meters[0].window", "1m windows need at least 61 min"),
    ({"meters.0.lateness": "72h", "windows.deduplicate_for": "96h"}, "meters[0].window", "is 1h: shorten lateness"),
    ({"stripe.finalization_grace": "73h"}, "stripe.finalization_grace", "1m to 72h is allowed"),
    ({"stripe.livemode": "no"}, "stripe.livemode", 'must be true or false, not "no"'),
    ({"stripe.mode": "sent"}, "stripe.mode", 'must be send or hold or shadow, not "sent" (did you mean send?)'),
    ({"stripe.max_rate": 0}, "stripe.max_rate", "must be at least 1, not 0"),
    ({"stripe.api_base": "api.stripe.com"}, "stripe.api_base", "must be https://host"),
    (
        {"stripe.livemode": True, "stripe.api_base": "http://x"},
        "stripe.api_base",
        "must be https where livemode is true",
    ),
    # meters
    ({"meters.0.event_types": []}, "meters[0].event_types", "must not be empty"),
    ({"meters.0.event_types": "x"}, "meters[0].event_types", 'must be a list, not "x"'),
    ({"meters.0.event_types": [""]}, "meters[0].event_types[0]", "must not be empty"),
    ({"meters.0.aggregation": "max"}, "meters[0].aggregation", 'must be sum or count, not "max"'),
    ({"meters.0.aggregation": "sum"}, "meters[0].value", "is required where aggregation is sum"),
    ({"meters.0.value": "$.n"}, "meters[0].value", "has no meaning where aggregation is count"),
    ({"meters.0.aggregation": "sum", "meters.0.value": "tokens"}, "meters[0].value", "a path starts with '$'"),
    ({"meters.0.decimals": 13}, "meters[0].decimals", "must be at most 12, not 13"),
    ({"meters.0.window": "5m"}, "meters[0].window", "must be 1m or 1h"),
    ({"meters.0.window": 60}, "meters[0].window", "must be 1m or 1h, not 60"),
    ({"meters.0.where": {"model": ["x"]}}, "meters[0].where.model", "a path starts with '$'"),
    ({"meters.0.where": {"$.m": "x"}}, 'meters[0].where["$.m"]', 'must be a list, not "x"'),
    ({"meters.0.where": {"$.m": []}}, 'meters[0].where["$.m"]', "must not be empty"),
    ({"meters.0.where": {"$.m": ["x", [1]]}}, 'meters[0].where["$.m"][1]', "must be text, a number, true or false"),
    ({"meters.0.where": {"$.m": [10**15]}}, 'meters[0].where["$.m"][0]', "numbers are below 10^15"),
    ({"meters.0.where": {"$.m": ["x"], "$['m']": ["y"]}}, "meters[0].where", "are the same place"),
    ({"meters.0.customer": "Subject"}, "meters[0].customer", "write subject, a path"),
    ({"meters.0.customer": "$.a."}, "meters[0].customer", "not a path at character"),
    ({"meters.0.customer": "source"}, "meters[0].customer", "is an attribute of every event"),
    ({"meters.0.stripe": {}}, "meters[0].stripe.event_name", "is required"),
    ({"meters.0.stripe.event_name": "x" * 101}, "meters[0].stripe.event_name", "at most 100 characters"),
    ({"meters.0.stripe.value_key": "a[b]"}, "meters[0].stripe.value_key", "no spaces or brackets"),
    ({"meters.0.stripe.value_key": "stripe_customer_id"}, "meters[0].stripe.customer_key", "is the value_key too"),
    (
        {"meters.1.name": "b", "meters.1.stripe.value_key": "v"},
        "meters[1].stripe",
        "must have the value_key and customer_key of meters[0], which sends to calls too",
    ),
    # the other sections
    ({"storage": {"kind": "sqllite"}}, "storage.kind", 'must be sqlite or kafka, not "sqllite" (did you mean sqlite?)'),
    ({"storage": {"path": "x"}}, "storage.kind", "is required"),
    ({"storage": {"kind": "sqlite", "path": 5}}, "storage.path", "must be the name of a file"),
    ({"customers": {"kind": "file"}}, "customers.path", "is required"),
    ({"customers": {"kind": "passthrough", "path": "x"}}, "customers.path", "unknown key; allowed here: kind"),
    ({"limits.open_keys": 0}, "limits.open_keys", "must be at least 1"),
    ({"limits.open_keys": "1_000"}, "limits.open_keys", "must be a whole number"),
    ({"limits.open_keys": True}, "limits.open_keys", "must be a whole number, not true"),
    ({"http.port": 70_000}, "http.port", "must be at most 65535"),
    ({"webhook": {"port": 9464}}, "webhook.port", "is http.port too"),
    ({"webhook": {"secret": "x"}}, "webhook.secret", "unknown key"),
    ({"kafka.bootstrap_servers": "broker"}, "kafka.bootstrap_servers", "must be host:port"),
    ({"kafka|options|fetch.min.bytes": [1]}, 'kafka.options["fetch.min.bytes"]', "must be text, a number"),
]


@pytest.mark.parametrize(("changes", "place", "said"), WRONG, ids=[f"{place}-{said[:30]}" for _, place, said in WRONG])
def test_what_is_wrong_is_refused_at_its_place_and_nothing_else_is(
    tmp_path: Path, changes: Mapping[str, Any], place: str, said: str
) -> None:
    text = errors(tmp_path, yaml.safe_dump(changed(changes)))

    assert text.startswith("t.yaml: 1 error\n")
    assert f", {place}\n" in text
    assert said in text


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("pipeline: a\nstripe: {livemode: false}\npipeline: b\n", "line 3, pipeline", "is here twice: first in line 1"),
        ("pipeline: a\nmeters:\n  - name: [\n", "line 4", "not YAML"),
        ("a: 1\n\tb: 2\n", "line 2", "not YAML"),
        ("a: \x07\n", "line 1", "not YAML: special characters are not allowed"),
        ("kafka: !!python/name:os.system x\n", "line 1, kafka", "tags (words that begin with !) have no meaning here"),
        ("limits: {open_keys: !!int x}\n", "line 1, limits.open_keys", "tags"),
        ("a: &a [*a]\n", "line 1, a[0]", "contains itself"),
        ("a: &a {b: 1}\nc: {<<: *a}\n", "line 2, c", "merge keys (<<) are not supported"),
        ("1: x\n", "line 1", "a key must be text"),
        ("- a\n", "line 1", "must be keys with values, not a list"),
        ("", "line 1, pipeline", "is required: Names this pipeline"),
    ],
)
def test_what_is_no_usable_yaml_is_refused_with_its_line(tmp_path: Path, text: str, line: str, said: str) -> None:
    found = errors(tmp_path, text)

    assert f"  {line}\n" in found
    assert said in found


def test_a_file_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load(tmp_path / "absent.yaml", {})

    (tmp_path / "latin.yaml").write_bytes(b"pipeline: \xe9")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load(tmp_path / "latin.yaml", {})


def test_rules_between_sections_are_judged_although_other_sections_are_wrong(tmp_path: Path) -> None:
    changes = {"pipeline": "?", "meters.0.window": "1h", "meters.1.name": "?", "meters.2.name": "calls"}

    text = errors(tmp_path, yaml.safe_dump(changed(changes)))

    assert text.startswith("t.yaml: 4 errors")
    assert all(f", {place}\n" in text for place in ("pipeline", "meters[0].window", "meters[1].name", "meters[2].name"))


def test_the_least_configuration_has_the_documented_defaults(tmp_path: Path) -> None:
    least = accepted(tmp_path, {})
    minute = 60_000

    assert least.bill_from is None
    assert least.kafka.model_dump() == {
        "bootstrap_servers": "localhost:9092",
        "topic": "usage-events",
        "arrival": "log_append_time",
        "token": None,
        "options": {},
    }
    assert least.storage.model_dump() == {"kind": "sqlite", "path": Path("var/tallyman.db")}
    assert least.commit_every == 5_000
    assert least.windows.model_dump() == {
        "lateness": 2 * minute,
        "settle": 5_000,
        "deduplicate_for": 24 * 60 * minute,
        "accept_late": 24 * 60 * minute,
    }
    assert least.limits.model_dump() == {
        "open_keys": 2_000_000,
        "in_flight": 2_000,
        "parked": 100_000,
        "keep": 90 * 24 * 60 * minute,
    }
    assert least.customers.kind == "passthrough"
    assert least.stripe.model_dump() == {
        "livemode": False,
        "mode": "send",
        "finalization_grace": 60 * minute,
        "api_base": "https://api.stripe.com",
        "max_rate": None,
    }
    assert least.http.model_dump() == {"host": "0.0.0.0", "port": 9464}  # noqa: S104 - the documented default


def test_the_example_shows_every_key_with_its_default(tmp_path: Path) -> None:
    written = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    example = load(EXAMPLE, {})
    (meter,) = written["meters"]
    required = {key: meter[key] for key in ("name", "event_types", "where", "aggregation", "value")}
    required["stripe"] = {"event_name": meter["stripe"]["event_name"]}
    bare = {
        "pipeline": "prod",
        "bill_from": "2026-11-01T00:00:00Z",
        "meters": [required],
        "stripe": {"livemode": False},
    }
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(bare), encoding="utf-8")

    assert example == load(tmp_path / "bare.yaml", {})
    assert written.keys() == Config.model_fields.keys()
    assert meter.keys() == Meter.model_fields.keys()
    for section in ("kafka", "windows", "limits", "stripe", "http"):
        model = type(getattr(example, section))
        assert written[section].keys() == model.model_fields.keys()


@pytest.mark.parametrize(
    ("text", "milliseconds", "shown"),
    [("0s", 0, "0s"), ("500ms", 500, "500ms"), ("90s", 90_000, "90s"), ("120s", 120_000, "2m"),
     ("24h", 86_400_000, "24h"), ("1d", 86_400_000, "24h"), ("90d", 7_776_000_000, "90d"), ("97h", 349_200_000, "97h")],
)  # fmt: skip
def test_durations_are_milliseconds_and_are_shown_as_people_write_them(
    text: str, milliseconds: int, shown: str
) -> None:
    assert Duration.of(text) == milliseconds
    assert str(Duration.of(text)) == shown
    assert f"{Duration.of(text)}" == shown


@given(st.integers(min_value=0, max_value=999_999_999))
def test_a_duration_reads_what_it_shows(milliseconds: int) -> None:
    assert Duration.of(str(Duration(milliseconds))) == milliseconds


@pytest.mark.parametrize(
    "text",
    ["2026-11-01T00:00:00Z", "2026-11-01 01:00:00+01:00", "2026-10-31T19:00:00.000-05:00", '"2026-11-01T00:00:00Z"',
     "2026-11-01t00:00z"],
)  # fmt: skip
def test_bill_from_is_an_instant_however_it_is_written(tmp_path: Path, text: str) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(f"bill_from: {text}\n{yaml.safe_dump(LEAST)}", encoding="utf-8")

    assert load(file, {}).bill_from == 1_793_491_200_000


def test_the_values_of_filters_are_what_json_means_by_them(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    filters = '{$.b: [yes, NO, 007, 1_0, 1:30, "5", 2026-11-01], $.a: [5, 1.50, 1.5, 1e2, -0.1, true, 1, 5]}'
    text = yaml.safe_dump(LEAST).replace("  name: calls", f"  name: calls\n  where: {filters}")
    file.write_text(text, encoding="utf-8")

    (meter,) = load(file, {}).core_meters

    assert meter.where == (
        (("a",), (Decimal("-0.1"), Decimal("1.5"), True, 1, 5, 100)),
        (("b",), ("007", "1:30", "1_0", "2026-11-01", "5", "NO", "yes")),
    )
    assert [type(value) for value in meter.where[0][1]] == [Decimal, Decimal, bool, int, int, int]


def test_meters_are_given_to_stage_1_with_parsed_paths_and_the_settings_of_windows(tmp_path: Path) -> None:
    first, second = accepted(
        tmp_path,
        {
            "windows.lateness": "3m",
            "meters.0.event_types": ["b", "a", "b"],
            "meters.0.customer": "$.who.id",
            "meters.1.name": "tokens",
            "meters.1.aggregation": "sum",
            "meters.1.value": "$.items[0].n",
            "meters.1.lateness": "0s",
            "meters.1.accept_late": "34d",
            "meters.1.stripe.event_name": "tokens",
            "meters.1.stripe.value_key": "v",
        },
    ).core_meters

    assert (first.event_types, first.customer, first.value) == (("a", "b"), ("who", "id"), None)
    assert (first.lateness, first.accept_late) == (180_000, 86_400_000)
    assert (second.customer, second.value) == ("subject", ("items", 0, "n"))
    assert (second.lateness, second.accept_late) == (0, 34 * 86_400_000)
    assert second.stripe == Destination("tokens", "v", "stripe_customer_id")
    assert type(second.lateness) is int


def test_order_where_it_means_nothing_does_not_change_an_edition(tmp_path: Path) -> None:
    def edition(types: list[str], where: dict[str, list[object]]) -> bytes:
        (meter,) = accepted(tmp_path, {"meters.0.event_types": types, "meters.0.where": where}).core_meters
        return meter.edition(settle=0, deduplicate_for=0)

    one = edition(["a", "b"], {"$.x": [1, "1", True], "$.y": [False]})

    assert edition(["b", "a", "a"], {"$.y": [False], "$.x": [True, 1, "1", 1]}) == one
    assert edition(["a", "b"], {"$.x": [1, "1"], "$.y": [False]}) != one


def test_two_meters_may_add_up_in_one_meter_at_stripe(tmp_path: Path) -> None:
    both = accepted(tmp_path, {"meters.1.name": "other", "meters.1.event_types": ["batch.call"]})

    assert [meter.stripe.event_name for meter in both.meters] == ["calls", "calls"]


def test_accept_late_follows_deduplicate_for_up_to_what_stripe_takes(tmp_path: Path) -> None:
    assert accepted(tmp_path, {"windows.deduplicate_for": "48h"}).windows.accept_late == 48 * 3_600_000
    assert accepted(tmp_path, {"windows.deduplicate_for": "60d"}).windows.accept_late == 34 * 86_400_000


def test_hours_are_allowed_with_a_grace_that_is_long_enough(tmp_path: Path) -> None:
    changes = {"meters.0.window": "1h", "stripe.finalization_grace": "73m"}

    assert accepted(tmp_path, changes).core_meters[0].size == 3_600_000


# ---- secrets -------------------------------------------------------------------------------------------------------

VARIABLES = [
    "STRIPE_SECRET_KEY",
    "STRIPE_WEBHOOK_SECRET",
    "KAFKA_SASL_USERNAME",
    "KAFKA_SASL_PASSWORD",
    "KAFKA_SSL_KEY_PASSWORD",
    "KAFKA_SASL_OAUTHBEARER_CLIENT_SECRET",
]


def test_secrets_come_from_the_environment_or_from_the_files_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter2 \n", encoding="utf-8")
    environ = {
        "STRIPE_SECRET_KEY": "sk_test_1\n",
        "STRIPE_WEBHOOK_SECRET": "",
        "KAFKA_SASL_USERNAME": "app",
        "KAFKA_SASL_PASSWORD_FILE": str(tmp_path / "password"),
    }

    loaded = accepted(tmp_path, {"kafka": {"options": {"fetch.min.bytes": 1, "check.crcs": True}}}, environ)

    assert loaded.secrets.stripe_secret_key == SecretStr("sk_test_1")
    assert loaded.secrets.stripe_webhook_secret is None
    assert loaded.kafka_client() == {
        "bootstrap.servers": "localhost:9092",
        "fetch.min.bytes": "1",
        "check.crcs": "true",
        "sasl.username": "app",
        "sasl.password": "hunter2 ",
    }


def test_a_configuration_never_shows_its_secrets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = accepted(tmp_path, {}, dict.fromkeys(VARIABLES, "hunter2"))
    logging.getLogger().warning("%s %r", loaded, loaded.secrets)

    shown = f"{loaded} {loaded!r} {loaded.secrets} {loaded.model_dump()} {loaded.model_dump_json()} {caplog.text}"

    assert "hunter2" not in shown
    assert "**" in shown


@pytest.mark.parametrize("variable", VARIABLES)
def test_wrong_secrets_are_named_and_not_shown(tmp_path: Path, variable: str) -> None:
    (tmp_path / "empty").write_text("\n", encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"\xff")
    valid = yaml.safe_dump(LEAST)

    both = errors(tmp_path, valid, {variable: "hunter2", f"{variable}_FILE": "hunter3"})
    absent = errors(tmp_path, valid, {f"{variable}_FILE": "hunter2"})
    empty = errors(tmp_path, valid, {f"{variable}_FILE": str(tmp_path / "empty")})
    binary = errors(tmp_path, valid, {f"{variable}_FILE": str(tmp_path / "binary")})

    assert f"environment, {variable}\n    {variable} and {variable}_FILE are both set" in both
    assert f"environment, {variable}_FILE\n    the file that it names cannot be read: No such file" in absent
    assert "the file that it names is empty" in empty
    assert "it is not UTF-8" in binary
    assert "hunter" not in both + absent


@pytest.mark.parametrize(
    ("option", "cure"),
    [
        ("sasl.password", "set KAFKA_SASL_PASSWORD, or KAFKA_SASL_PASSWORD_FILE"),
        ("sasl_password", "set KAFKA_SASL_PASSWORD, or KAFKA_SASL_PASSWORD_FILE"),
        ("sasl.username", "set KAFKA_SASL_USERNAME, or KAFKA_SASL_USERNAME_FILE"),
        ("ssl.key.password", "set KAFKA_SSL_KEY_PASSWORD, or KAFKA_SSL_KEY_PASSWORD_FILE"),
        ("ssl.key.pem", "set KAFKA_SSL_KEY_PEM, or KAFKA_SSL_KEY_PEM_FILE"),
        ("ssl.keystore.password", "set KAFKA_SSL_KEYSTORE_PASSWORD"),
        ("sasl.oauthbearer.client.secret", "set KAFKA_SASL_OAUTHBEARER_CLIENT_SECRET"),
        ("sasl.oauthbearer.config", "they come from the environment as STRIPE_SECRET_KEY"),
        ("sasl.jaas.config", "they come from the environment"),
        ("anything.password", "they come from the environment"),
        ("enable.auto.commit", "Tallyman commits offsets itself"),
        ("enable.auto.offset.store", "Tallyman commits offsets itself"),
        ("auto.offset.reset", "would skip or repeat usage"),
        ("isolation.level", "Tallyman reads committed records"),
        ("group.id", "named after pipeline and stage"),
        ("partition.assignment.strategy", "named after pipeline and stage"),
        ("transactional.id", "commits are transactions"),
        ("enable.partition.eof", "to know that one is quiet"),
        ("statistics.interval.ms", "made of these statistics"),
        ("bootstrap.servers", "write it as kafka.bootstrap_servers"),
        ("error_cb", "is a function in a program"),
    ],
)
def test_settings_of_librdkafka_that_are_secret_or_tallymans_own_are_refused(
    tmp_path: Path, option: str, cure: str
) -> None:
    text = errors(tmp_path, yaml.safe_dump(changed({f"kafka|options|{option}": "hunter2"})))

    assert text.startswith("t.yaml: 1 error\n")
    assert option in text
    assert cure in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    "option",
    ["ssl.key.location", "ssl.ca.location", "ssl.certificate.pem", "sasl.oauthbearer.token.endpoint.url", "client.id",
     "sasl.oauthbearer.assertion.private.key.file", "security.protocol", "a.name.from.the.future"],
)  # fmt: skip
def test_other_settings_of_librdkafka_are_passed_on(tmp_path: Path, option: str) -> None:
    assert accepted(tmp_path, {f"kafka|options|{option}": "x"}).kafka_client()[option] == "x"


@pytest.mark.parametrize(
    "text",
    [
        "pipeline: {secret}\n",
        "# the key is {secret}\npipeline: a\n",
        "stripe: {{secret_key: {secret}}}\n",
        "{secret}: 1\n",
        "kafka: {{options: {{a: {secret}, b: [{secret}]}}}}\n",
        "meters: [{{where: {{$.x: [{secret}], {secret}: 1}}, customer: {secret}, window: {secret}}}]\n",
        "storage: {{kind: {secret}}}\n",
        "bill_from: {secret}\ncommit_every: {secret}\n",
        "a: *{secret}\n",
        "a: [!{secret} x\n",
    ],
)
@pytest.mark.parametrize("secret", ["sk_live_4eC39Hq", "sk_test_4eC39Hq", "rk_live_4eC39Hq", "whsec_4eC39Hq"])
def test_a_secret_of_stripes_is_refused_wherever_it_stands_and_never_shown(
    tmp_path: Path, text: str, secret: str
) -> None:
    found = errors(tmp_path, text.format(secret=secret))

    assert "a secret stands here: replace it" in found
    assert "STRIPE_SECRET_KEY" in found
    assert "4eC39Hq" not in found


@given(
    password=st.text("abcXYZ059!&*@%#{}[]:,'\" $", min_size=1, max_size=12).map(lambda text: f"{text}hunter2"),
    place=st.sampled_from(
        ["kafka.options.sasl.password", "kafka.options.foo", "kafka.options.ssl.key.pem", "kafka.password",
         "stripe.secret", "kafka.bootstrap_servers", "stripe.api_base", "password"]
    ),
    form=st.sampled_from(["{}", "'{}'", "[{}]", "{{a: {}}}", "user:{}@host:9092", "https://user:{}@host"]),
)  # fmt: skip
def test_no_message_shows_what_stands_where_a_secret_may_stand(
    tmp_path_factory: pytest.TempPathFactory, password: str, place: str, form: str
) -> None:
    keys = place.split(".", 2) if place.startswith("kafka.options") else place.split(".")
    text = "".join(f"{'  ' * depth}{key}:\n" for depth, key in enumerate(keys))[:-1] + f" {form.format(password)}\n"

    assert "hunter2" not in errors(tmp_path_factory.getbasetemp(), text)


@pytest.mark.parametrize(
    ("key", "live", "sandbox"),
    [("sk_live_1", True, False), ("rk_live_1", True, False), ("sk_test_1", False, True), ("rk_test_1", False, True),
     ("pk_live_1", False, False), ("pk_test_1", False, False), ("whsec_1", False, False), ("", False, False)],
)  # fmt: skip
def test_a_key_belongs_to_one_mode_or_to_none(key: str, live: bool, sandbox: bool) -> None:
    assert credentials.key_matches(True, SecretStr(key)) is live
    assert credentials.key_matches(False, SecretStr(key)) is sandbox


# ---- the schema ----------------------------------------------------------------------------------------------------


def test_the_schema_describes_every_key_and_writes_defaults_as_the_file_does() -> None:
    schema = config.schema()
    objects = {"": schema} | schema["$defs"]

    undescribed = [
        f"{name}.{key}"
        for name, each in objects.items()
        for key, value in each["properties"].items()
        if not value.get("description") and "$ref" not in value
    ]

    assert undescribed == []
    assert all(each["additionalProperties"] is False for each in objects.values())
    assert schema["required"] == ["pipeline", "stripe", "meters"]
    assert schema["$defs"]["Windows"]["properties"]["lateness"]["default"] == "2m"
    assert schema["$defs"]["Limits"]["properties"]["keep"]["default"] == "90d"
    assert schema["$defs"]["SqliteStorage"]["properties"]["path"]["default"] == "var/tallyman.db"
    assert schema["properties"]["bill_from"]["anyOf"][0] == {"type": "string", "format": "date-time"}
    json.dumps(schema)
