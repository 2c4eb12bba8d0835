"""Secrets: where they come from, how they are recognised where they must not be, and that they are never shown."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import SecretStr

STRIPE_SECRET_KEY: Final = "STRIPE_SECRET_KEY"  # noqa: S105 - the name of a variable
STRIPE_WEBHOOK_SECRET: Final = "STRIPE_WEBHOOK_SECRET"  # noqa: S105 - the name of a variable

KAFKA_OPTIONS: Final = (
    "sasl.username",
    "sasl.password",
    "ssl.key.password",
    "ssl.key.pem",
    "ssl.keystore.password",
    "sasl.oauthbearer.client.secret",
)
"""Settings of librdkafka that come from the environment: `sasl.password` from KAFKA_SASL_PASSWORD, and so on."""

_SECRET: Final = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:sk|rk)_(?:live|test|org)|whsec)_\w+|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_SECRET_NAME: Final = re.compile(
    r"(password|passphrase|secret|jaas|oauthbearer\.config|key\.pem|api\.?key|token)(?!.*\.(file|location|url)$)"
)


@dataclass(frozen=True, slots=True)
class Secrets:
    """What the environment gave. Its text shows which secrets there are, never what they are."""

    stripe_secret_key: SecretStr | None = None
    stripe_webhook_secret: SecretStr | None = None
    kafka: Mapping[str, SecretStr] = field(default_factory=dict)
    """By the name of librdkafka's setting."""


def from_environment(environ: Mapping[str, str]) -> tuple[Secrets, list[tuple[str, str]]]:
    """The secrets, and what is wrong: names of variables with a message for each.

    Each variable may be replaced by one that ends in `_FILE` and names a file. Line ends after a secret are cut off.
    """
    found: dict[str, SecretStr] = {}
    wrong: list[tuple[str, str]] = []
    for variable in (STRIPE_SECRET_KEY, STRIPE_WEBHOOK_SECRET, *map(_variable, KAFKA_OPTIONS)):
        value, file = environ.get(variable), environ.get(f"{variable}_FILE")
        if value and file:
            wrong.append((variable, f"{variable} and {variable}_FILE are both set: remove one of them"))
        elif file:
            try:
                value = Path(file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
                # The name is not shown: somebody may have set the secret itself.
                wrong.append((f"{variable}_FILE", f"the file that it names cannot be read: {reason}"))
                continue
            if not value.strip():
                wrong.append((f"{variable}_FILE", "the file that it names is empty"))
        if value and value.strip():
            found[variable] = SecretStr(value.rstrip("\r\n"))
    kafka = {option: found[_variable(option)] for option in KAFKA_OPTIONS if _variable(option) in found}
    return Secrets(found.get(STRIPE_SECRET_KEY), found.get(STRIPE_WEBHOOK_SECRET), kafka), wrong


def key_matches(livemode: bool, key: SecretStr) -> bool:
    """Whether a Stripe key belongs to the mode that the configuration states; no other kind of key does."""
    return key.get_secret_value().startswith(("sk_live_", "rk_live_") if livemode else ("sk_test_", "rk_test_"))


def lines_with_secrets(text: str) -> Iterator[int]:
    """Numbers of the lines in which a secret of Stripe's or a private key stands, comments included."""
    return (number for number, line in enumerate(text.split("\n"), 1) if _SECRET.search(line))


def hidden(text: str) -> str:
    """The text without anything that looks like a secret."""
    return _SECRET.sub("[hidden]", text)


def is_secret(name: str) -> bool:
    """Whether a key of the configuration is the name of a secret."""
    return _SECRET_NAME.search(name.lower().replace("_", ".")) is not None


def why_not(option: str) -> str | None:
    """Why a setting of librdkafka must not stand in the configuration, with the cure; None where it may."""
    plain = option.strip().lower().replace("_", ".")
    if plain in KAFKA_OPTIONS:
        variable = _variable(plain)
        return f"secrets do not belong in this file: set {variable}, or {variable}_FILE to the name of a file with it"
    if is_secret(plain):
        return CURE
    if plain.endswith(".cb"):
        return "is a function in a program, not a setting"
    return _OWNED.get(plain)


def _variable(option: str) -> str:
    return "KAFKA_" + option.upper().replace(".", "_")


_OFFSETS: Final = (
    "Tallyman commits offsets itself, together with what it made of the events: otherwise they count twice or never"
)
_GROUP: Final = "groups are named after pipeline and stage, and their members hand over state: Tallyman sets it"
_WRITES: Final = "commits are transactions, which need it as Tallyman sets it"

_OWNED: Final = {
    "bootstrap.servers": "write it as kafka.bootstrap_servers",
    "metadata.broker.list": "write it as kafka.bootstrap_servers",
    "enable.auto.commit": _OFFSETS,
    "auto.commit.enable": _OFFSETS,
    "auto.commit.interval.ms": _OFFSETS,
    "enable.auto.offset.store": _OFFSETS,
    "offset.store.method": _OFFSETS,
    "auto.offset.reset": "an offset outside of the log stops Tallyman: going on elsewhere would skip or repeat usage",
    "isolation.level": "what a producer has aborted is no usage: Tallyman reads committed records",
    "enable.partition.eof": "Tallyman needs the ends of partitions to know that one is quiet",
    "group.id": _GROUP,
    "group.instance.id": _GROUP,
    "group.protocol": _GROUP,
    "group.protocol.type": _GROUP,
    "group.remote.assignor": _GROUP,
    "partition.assignment.strategy": _GROUP,
    "transactional.id": _WRITES,
    "transaction.timeout.ms": _WRITES,
    "enable.idempotence": _WRITES,
    "acks": _WRITES,
    "request.required.acks": _WRITES,
    "allow.auto.create.topics": "Tallyman creates its topics with the settings they need, and never the source",
    "statistics.interval.ms": "Tallyman's metrics are made of these statistics",
}

CURE: Final = (
    "secrets do not belong in this file: they come from the environment as "
    + ", ".join((STRIPE_SECRET_KEY, STRIPE_WEBHOOK_SECRET, *map(_variable, KAFKA_OPTIONS)))
    + ", or from files that it names: each of them with _FILE"
)
"""What to say of a secret in the configuration."""
