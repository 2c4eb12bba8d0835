"""The configuration: one YAML file, validated as a whole, and secrets from the environment or from files.

`load` returns a configuration that is right in itself, or raises one error that names everything that is wrong: each
with its line and its keys, what is wrong, and what is allowed. What the world has to say about it (whether the topic
exists, whether Stripe knows the meter) is not asked here.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import (
    Discriminator,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from consumer import credentials, events, tokens
from consumer.aggregate.duplicates import INTERVALS
from consumer.aggregate.meters import WINDOW_MS
from consumer.aggregate.meters import Meter as CoreMeter
from consumer.aggregate.windows import EARLY_MARKS, MINUTE
from consumer.config_file import Document, Place, Problem, report, written
from consumer.config_values import (
    AwsRegion,
    BaseAddress,
    Customer,
    Duration,
    File,
    Instant,
    Name,
    Option,
    PathText,
    PayloadKey,
    Scalar,
    Schema,
    Section,
    Servers,
    Text,
    Topic,
    between,
    in_order,
    in_words,
    invalid,
)
from consumer.totals import SCALE_DIGITS, Destination


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


class Windows(Section):
    """When windows close, and what becomes of late and repeated events."""

    lateness: Annotated[Duration, between("0s", "72h")] = Field(
        default=Duration.of("2m"),
        description="How long after its end a window stays open. What arrives later is billed as a correction.",
    )
    settle: Annotated[Duration, between("0s", "5m")] = Field(
        default=Duration.of("5s"),
        description="How far the brokers' clocks may be apart; windows close that much later.",
    )
    deduplicate_for: Annotated[Duration, between("24ms", "90d")] = Field(
        default=Duration.of("24h"),
        description="How long an event's (source, id) is remembered: a repetition within this time does not count.",
    )
    accept_late: Annotated[Duration, between("0s", "34d")] = Field(
        default_factory=lambda data: min(data["deduplicate_for"], Duration.of("34d")),
        validate_default=False,
        description="Events that arrive later than this after their time become dead letters. Not set, it is"
        " deduplicate_for. At most 34d, because Stripe takes 35.",
    )

    @field_validator("deduplicate_for")
    @classmethod
    def _divisible(cls, value: Duration) -> Duration:
        if value % INTERVALS:
            raise ValueError(f"{value} does not divide into {INTERVALS} intervals of whole milliseconds")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.accept_late < self.lateness:
            derived = "" if "accept_late" in self.model_fields_set else " (which is deduplicate_for, as it is not set)"
            reason = f"accept_late {self.accept_late}{derived} is less than lateness {self.lateness}: {_IN_TIME}"
            raise invalid([(("accept_late",), reason)])
        return self


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


class StripeMeter(Section):
    """The Stripe meter that the totals go to. It has to sum raw events."""

    event_name: Annotated[str, StringConstraints(min_length=1, max_length=100)] = Field(
        description="The event_name of the meter at Stripe."
    )
    value_key: PayloadKey = Field(default="value", description="The payload key in which that meter expects the value.")
    customer_key: PayloadKey = Field(
        default="stripe_customer_id",
        validate_default=True,
        description="The payload key in which that meter expects the customer.",
    )

    @field_validator("customer_key")
    @classmethod
    def _distinct(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("value_key"):
            raise ValueError("is the value_key too: one payload cannot hold both under one key")
        return value


class Meter(Section):
    """What is counted, and where the totals go."""

    name: Name = Field(description="Names the meter in identifiers, metrics and logs; a new name is a new meter.")
    event_types: tuple[Text, ...] = Field(
        strict=False, min_length=1, description="The CloudEvents types that are counted."
    )
    where: dict[PathText, Annotated[tuple[Scalar, ...], Field(strict=False, min_length=1)]] = Field(
        default_factory=dict,
        description="Only events whose data has one of these values at each of these paths are counted.",
    )
    aggregation: Literal["sum", "count"] = Field(description="sum: of a value in the data. count: of the events.")
    value: PathText | None = Field(
        default=None,
        validate_default=True,
        description="The path of the value that is summed: a JSON number, or a string that is one. Not for count.",
    )
    decimals: int = Field(
        default=SCALE_DIGITS,
        ge=0,
        le=SCALE_DIGITS,
        description="Decimals kept of each value; more are rounded half to even.",
    )
    allow_negative: bool = Field(
        default=False, description="Whether a value may be negative; if not, it is a dead letter."
    )
    customer: Customer = Field(
        default="subject",
        description="What names the customer: subject, a path into the data, or the name of an extension attribute.",
    )
    window: Literal["1m", "1h"] = Field(
        default="1m", description="The size of the windows. 1h sends fewer totals and needs a longer grace at Stripe."
    )
    lateness: Annotated[Duration, between("0s", "72h")] | None = Field(
        default=None, description="For this meter, instead of windows.lateness."
    )
    accept_late: Annotated[Duration, between("0s", "34d")] | None = Field(
        default=None, description="For this meter, instead of windows.accept_late."
    )
    stripe: StripeMeter = Field(description="The Stripe meter that the totals go to.")

    @field_validator("event_types")
    @classmethod
    def _no_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return in_order(value)

    @field_validator("where")
    @classmethod
    def _distinct(cls, value: dict[str, tuple[Scalar, ...]]) -> dict[str, tuple[Scalar, ...]]:
        first: dict[events.Path, str] = {}
        for text in value:
            other = first.setdefault(events.parse_path(text), text)
            if other != text:
                raise ValueError(f"{other} and {text} are the same place: write it once, with all values")
        return {text: in_order(value[text]) for text in sorted(value)}

    @field_validator("value")
    @classmethod
    def _as_aggregated(cls, value: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("aggregation") == "sum" and value is None:
            raise ValueError("is required where aggregation is sum: the path of what is summed, such as $.tokens.total")
        if info.data.get("aggregation") == "count" and value is not None:
            raise ValueError("has no meaning where aggregation is count: remove it, or write aggregation: sum")
        return value


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
        wrong += _collisions(right)
        if (windows := info.data.get("windows")) is not None:
            wrong += _delays(right, windows, info.data.get("stripe"))
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
        return tuple(
            CoreMeter(
                name=each.name,
                event_types=each.event_types,
                where=tuple((events.parse_path(path), values) for path, values in each.where.items()),
                aggregation=each.aggregation,
                value=None if each.value is None else events.parse_path(each.value),
                decimals=each.decimals,
                allow_negative=each.allow_negative,
                customer=events.parse_path(each.customer) if each.customer.startswith("$") else each.customer,
                window=each.window,
                lateness=int(self.windows.lateness if each.lateness is None else each.lateness),
                accept_late=int(self.windows.accept_late if each.accept_late is None else each.accept_late),
                stripe=Destination(**each.stripe.model_dump()),
            )
            for each in self.meters
        )

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


_IN_TIME: Final = "events that are in time for their window would become dead letters"


def _collisions(each: Mapping[int, Meter]) -> Iterator[tuple[Place, str]]:
    names: dict[str, int] = {}
    destinations: dict[str, int] = {}
    for position, meter in each.items():
        first = names.setdefault(meter.name, position)
        if first != position:
            yield (position, "name"), f"{meter.name} is the name of meters[{first}] already: names are unique"
        # Two meters may add up in one meter at Stripe, which has one key for the value and one for the customer.
        first = destinations.setdefault(meter.stripe.event_name, position)
        if meter.stripe != each[first].stripe:
            same = f"the value_key and customer_key of meters[{first}], which sends to {meter.stripe.event_name} too"
            yield (position, "stripe"), f"must have {same}: a meter at Stripe has one of each"


def _delays(each: Mapping[int, Meter], common: Windows, stripe: Stripe | None) -> Iterator[tuple[Place, str]]:
    correction, sending, most = Duration(EARLY_MARKS[1]), Duration.of("5m"), Duration.of("72h")
    for position, meter in each.items():
        size = Duration(WINDOW_MS[meter.window])
        lateness = common.lateness if meter.lateness is None else meter.lateness
        accept_late = common.accept_late if meter.accept_late is None else meter.accept_late
        if accept_late < size + lateness:
            key = next((key for key in ("accept_late", "lateness") if getattr(meter, key) is not None), "window")
            sizes = f"accept_late {accept_late} is less than window {size} + lateness {lateness}"
            yield (position, key), f"{sizes}: {_IN_TIME}"
        needed = size + lateness + correction + common.settle + sending
        if stripe is not None and needed > stripe.finalization_grace:
            parts = f"{size} + lateness {lateness} + first correction {correction} + settle {common.settle}"
            cures = ["raise the grace in Stripe and here (at most 72h)"] if needed <= most else []
            cures += ["use 1m" if meter.window == "1h" else "shorten lateness"]
            need = (
                f"{meter.window} windows need at least {-(-needed // MINUTE)} min ({parts} + sending {sending}), and"
                f" stripe.finalization_grace is {stripe.finalization_grace}: {', or '.join(cures)}"
            )
            yield (position, "window"), need


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
