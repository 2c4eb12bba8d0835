"""The configuration: one YAML file, validated as a whole, and secrets from the environment or from files.

`load` returns a configuration that is right in itself, or raises one error that names everything that is wrong: each
with its line and its keys, what is wrong, and what is allowed. What the world has to say about it (whether the topic
exists, whether Stripe knows the meter) is not asked here.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    Discriminator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from consumer import credentials, tokens
from consumer.aggregate.meters import Meter as CoreMeter
from consumer.config_file import Document, Place, Problem, report, written
from consumer.config_meters import Meter, Windows, collisions, delays
from consumer.config_values import (
    AwsRegion,
    BaseAddress,
    Duration,
    File,
    Instant,
    Name,
    Option,
    Schema,
    Section,
    Servers,
    Text,
    Topic,
    between,
    in_words,
    invalid,
)


class ConfigError(Exception):
    """The configuration is wrong. The text is complete, made for the user, and holds no secret."""


class AwsMskIam(Section):
    """Amazon MSK with IAM. Who we are is what AWS's library finds in its environment: a role, a pod identity, keys."""

    kind: Literal["aws_msk_iam"] = Field(description="aws_msk_iam: Amazon MSK with IAM.")
    region: AwsRegion | None = Field(default=None, description="The cluster's region. Unset, it is AWS_REGION.")

    @field_validator("kind")
    @classmethod
    def _installed(cls, value: str) -> str:
        if not tokens.can_sign():
            raise ValueError(
                "needs AWS's library, which is not installed: pip install 'tallyman[msk]', or build the image with"
                " --build-arg EXTRAS=msk"
            )
        return value


class Kafka(Section):
    """Where usage events are read."""

    bootstrap_servers: Servers = Field(
        default="localhost:9092",
        description="Addresses of brokers to begin with: host:port, several separated by commas.",
    )
    topic: Topic = Field(default="usage-events", description="The topic that the usage events are on.")
    arrival: Literal["log_append_time", "create_time"] = Field(
        default="log_append_time",
        description="What a record's timestamp must be. log_append_time: the broker's clock, so that reading the topic"
        " again gives the same totals. create_time accepts producers' clocks and gives that up.",
    )
    token: AwsMskIam | None = Field(
        default=None,
        description="What Kafka is shown where it takes neither a password nor a certificate; sets security.protocol"
        " SASL_SSL and sasl.mechanism OAUTHBEARER.",
    )
    options: dict[str, Option] = Field(
        default_factory=dict,
        description="Any setting of librdkafka, by its own name, but for those that Tallyman sets itself. Secrets come"
        " from the environment: KAFKA_SASL_PASSWORD and so on.",
    )

    @field_validator("options", mode="wrap")
    @classmethod
    def _allowed(cls, value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> object:
        if not isinstance(value, dict):
            return handler(value)
        refused = {name: reason for name in value if (reason := credentials.why_not(name)) is not None}
        if info.data.get("token") is not None:
            refused |= {name: "kafka.token says who we are: remove one of them" for name in value if _is_sasl(name)}
            if not str(value.get("security.protocol", "sasl_ssl")).lower().startswith("sasl_"):
                refused["security.protocol"] = "kafka.token is shown by SASL: remove it, for SASL_SSL is the default"
        try:
            options = handler({name: given for name, given in value.items() if name not in refused})
        except ValidationError as error:
            wrong = list(in_words(error))
        else:
            wrong = []
        if refused or wrong:
            raise invalid([*(((name,), reason) for name, reason in refused.items()), *wrong])
        return options


def _is_sasl(option: str) -> bool:
    return option.strip().lower().replace("_", ".").startswith("sasl.")


class SqliteStorage(Section):
    """State in one file; one process runs both stages."""

    kind: Literal["sqlite"] = Field(description="sqlite: one file, one process.")
    path: File = Field(default=Path("var/tallyman.db"), description="The file, relative to the working directory.")


class KafkaStorage(Section):
    """State in Kafka itself: no volume, any number of replicas."""

    kind: Literal["kafka"] = Field(description="kafka: topics beside the source, any number of processes.")


class Limits(Section):
    """Bounds: what happens at each of them is visible, and never a loss."""

    open_keys: int = Field(
        default=2_000_000,
        ge=1,
        description="Customers in open buckets, over all meters of a process; there stage 1 stops and says why.",
    )
    in_flight: int = Field(default=2_000, ge=1, description="Totals that are being sent or wait for another try.")
    parked: int = Field(
        default=100_000,
        ge=1,
        description="Totals that wait for a person or a mapping. There delivery pauses and pages.",
    )
    keep: Annotated[Duration, between("24h", "3650d")] = Field(
        default=Duration.of("90d"), description="How long the totals, outcomes and dead-letters logs are kept."
    )


class Passthrough(Section):
    """Events name Stripe customers."""

    kind: Literal["passthrough"] = Field(description="passthrough: events name Stripe customers (cus_…).")


class CustomerFile(Section):
    """A file says which Stripe customer is meant."""

    kind: Literal["file"] = Field(description="file: a file says which Stripe customer is meant.")
    path: File = Field(
        description="The file, relative to the working directory: lines of `subject: cus_…`, or null for a customer"
        " that is not billed. It is read again when it changes."
    )


class Stripe(Section):
    """The Stripe account, and how totals are sent."""

    livemode: bool = Field(
        description="true bills real customers, false is a sandbox. It must fit the key and every answer."
    )
    mode: Literal["send", "hold", "shadow"] = Field(
        default="send",
        description="send: bill. hold: count, and keep the totals until the mode is send. shadow: everything but the"
        " requests, to compare with what bills today.",
    )
    finalization_grace: Annotated[Duration, between("1m", "72h")] = Field(
        default=Duration.of("1h"),
        description="How long Stripe waits after a period's end before it finalises an invoice, as set at Stripe.",
    )
    api_base: BaseAddress = Field(
        default="https://api.stripe.com", description="Where Stripe's API is; something else for a stand-in."
    )
    max_rate: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        default=None, description="Meter Events per second at most; unset it is 1000 in live mode and 25 in a sandbox."
    )

    @field_validator("api_base")
    @classmethod
    def _secure(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("livemode") and not value.startswith("https:"):
            raise ValueError("must be https where livemode is true: the key is in every request")
        return value.rstrip("/")


class Http(Section):
    """Where /metrics, /healthz and /readyz are served."""

    host: Text = Field(default="0.0.0.0", description="The address to listen on.")  # noqa: S104 - Prometheus comes from outside
    port: int = Field(default=9464, ge=0, le=65_535, description="The port to listen on; 0 takes a free one.")


class Webhook(Section):
    """Where Stripe's notifications of rejected events are taken, under /stripe."""

    host: Text = Field(default="0.0.0.0", description="The address to listen on.")  # noqa: S104 - Stripe comes from outside
    port: int = Field(default=9465, ge=0, le=65_535, description="The port to listen on; 0 takes a free one.")


class Config(Section):
    """The whole file."""

    pipeline: Name = Field(
        description="Names this pipeline, its topics and its groups. Part of every identifier: changing it bills again."
    )
    bill_from: Instant | None = Field(
        default=None,
        description="Events before this time, which has an offset from UTC, are ignored. Required at the first start,"
        " at most 34 days back, and fixed from then on.",
    )
    kafka: Kafka = Field(default_factory=Kafka, description="Where usage events are read.")
    storage: Annotated[SqliteStorage | KafkaStorage, Discriminator("kind")] = Field(
        default_factory=lambda: SqliteStorage(kind="sqlite"), description="Where state is kept."
    )
    commit_every: Annotated[Duration, between("100ms", "1m")] = Field(
        default=Duration.of("5s"), description="How often stage 1 commits: what a crash makes it read again."
    )
    windows: Windows = Field(default_factory=Windows, description="When windows close, and how late is too late.")
    limits: Limits = Field(default_factory=Limits, description="Bounds of memory and logs.")
    customers: Annotated[Passthrough | CustomerFile, Discriminator("kind")] = Field(
        default_factory=lambda: Passthrough(kind="passthrough"), description="Who the customers are at Stripe."
    )
    stripe: Stripe = Field(description="The Stripe account, and how totals are sent.")
    http: Http = Field(default_factory=Http, description="Where metrics and health are served.")
    webhook: Webhook | None = Field(
        default=None,
        description="Where Stripe reports events that it took and rejected later; unset, nobody listens. Needs"
        " STRIPE_WEBHOOK_SECRET.",
    )
    meters: tuple[Meter, ...] = Field(strict=False, min_length=1, description="What is counted.")

    _secrets: credentials.Secrets = PrivateAttr(default_factory=credentials.Secrets)
    _provider: tokens.Provider = PrivateAttr(default_factory=lambda: tokens.aws_msk_iam)

    @field_validator("webhook")
    @classmethod
    def _apart(cls, value: Webhook | None, info: ValidationInfo) -> Webhook | None:
        http = info.data.get("http")
        if value is not None and http is not None and value.port == http.port != 0:
            raise invalid([(("port",), f"is http.port too ({value.port}): they are not for the same visitors")])
        return value

    @field_validator("meters", mode="wrap")
    @classmethod
    def _together(cls, value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> object:
        """Judge the meters beside each other, the windows and Stripe: those that are right by themselves."""
        wrong: list[tuple[Place, str]] = []
        try:
            listed = handler(value)
        except ValidationError as error:
            wrong += in_words(error)
        right: dict[int, Meter] = {}
        for position, each in enumerate(value if isinstance(value, list | tuple) else ()):
            try:
                right[position] = Meter.model_validate(each)
            except ValidationError:
                continue  # it is in the errors above
        wrong += collisions(right)
        if (windows := info.data.get("windows")) is not None:
            stripe: Stripe | None = info.data.get("stripe")
            wrong += delays(right, windows, None if stripe is None else stripe.finalization_grace)
        if wrong:
            raise invalid(wrong)
        return listed

    def model_post_init(self, context: object) -> None:
        """Take what is given beside the file."""
        if isinstance(context, _Beside):
            self._secrets, self._provider = context

    @property
    def secrets(self) -> credentials.Secrets:
        """What the environment gave."""
        return self._secrets

    @property
    def core_meters(self) -> tuple[CoreMeter, ...]:
        """The meters as stage 1 takes them, with windows' settings applied."""
        return tuple(each.core(self.windows) for each in self.meters)

    @cached_property
    def kafka_tokens(self) -> tokens.Tokens | None:
        """Where all of this process's clients have their tokens from, if Kafka is to be shown any."""
        token = self.kafka.token
        return None if token is None else tokens.Tokens(self._provider(token.region))

    def kafka_client(self) -> dict[str, Any]:
        """The user's settings for a librdkafka client, secrets included: never to be logged."""
        by_token: dict[str, Any] = {}
        if self.kafka_tokens is not None:
            by_token = {"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER", "oauth_cb": self.kafka_tokens}
        secrets = {name: value.get_secret_value() for name, value in self.secrets.kafka.items()}
        return {"bootstrap.servers": self.kafka.bootstrap_servers} | by_token | self.kafka.options | secrets


def schema() -> dict[str, Any]:
    """JSON Schema of the file, for editors, for the Helm chart and for the reference."""
    return Config.model_json_schema(schema_generator=Schema)


class _Beside(NamedTuple):
    """What a configuration is given beside its file."""

    secrets: credentials.Secrets
    provider: tokens.Provider


def load(path: Path | str, environ: Mapping[str, str], *, provider: tokens.Provider = tokens.aws_msk_iam) -> Config:
    """Read the file and the secrets; raises `ConfigError` with all that is wrong in either.

    ``provider`` makes the tokens, where `kafka.token` asks for any.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: the configuration cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the configuration is not UTF-8 (at byte {error.start})") from None
    document = Document(text)
    secrets, wrong = credentials.from_environment(environ)
    config = _validated(document, _Beside(secrets, provider)) if document.data is not None else None
    problems = [
        *document.problems,
        *(
            Problem(
                line,
                written(document.at(line)),
                f"a secret stands here: replace it, for it has been seen; {credentials.CURE}",
            )
            for line in credentials.lines_with_secrets(text)
        ),
        *(Problem(0, variable, reason) for variable, reason in wrong),
    ]
    if config is None or problems:
        raise ConfigError(credentials.hidden(report(str(path), problems)))
    return config


def _validated(document: Document, beside: _Beside) -> Config | None:
    config = None
    try:
        config = Config.model_validate(document.data, context=beside)
    except ValidationError as error:
        for each in error.errors():
            document.problem(document.narrowed(each["loc"]), each["msg"])
    return config
