"""What the service demands before it runs: of its topic, and of the secrets for Stripe. Commands demand the same."""

from consumer.config import Config
from consumer.credentials import STRIPE_SECRET_KEY, STRIPE_WEBHOOK_SECRET, key_matches
from consumer.runtime.source import Topic


class ServiceError(Exception):
    """The service cannot run; the message says why and what to do."""


def check_arrival(config: Config, topic: Topic) -> None:
    """Refuse a topic whose timestamps are not what the configuration relies on."""
    if config.kafka.arrival == "log_append_time" and not topic.log_append_time:
        raise ServiceError(
            f"the topic {topic.name} has message.timestamp.type=CreateTime: its producers date the records, and then a "
            "replay of the log need not give the same totals. Set message.timestamp.type=LogAppendTime on the topic, "
            "or kafka.arrival: create_time in the configuration to accept that."
        )
    if config.kafka.arrival == "create_time" and topic.log_append_time:
        raise ServiceError(
            f"kafka.arrival is create_time, but the topic {topic.name} has message.timestamp.type=LogAppendTime, which "
            "is better: set kafka.arrival: log_append_time."
        )


def check_cleanup(topic: Topic) -> None:
    """Refuse a topic from which Kafka removes events that have not been read."""
    if topic.compacted:
        raise ServiceError(
            f"the topic {topic.name} has a cleanup.policy with compact: of the events with one key Kafka keeps the "
            "newest alone, and the others are billed to nobody. Set cleanup.policy=delete on the topic."
        )


def stripe_key(config: Config) -> str:
    """The secret key, if it is there and of the stated mode."""
    key = config.secrets.stripe_secret_key
    mode = "live" if config.stripe.livemode else "test"
    if key is None:
        raise ServiceError(
            f"there is no Stripe key: set {STRIPE_SECRET_KEY}, or {STRIPE_SECRET_KEY}_FILE to a file that holds it"
        )
    if not key_matches(config.stripe.livemode, key):
        raise ServiceError(
            f"stripe.livemode is {str(config.stripe.livemode).lower()}, but {STRIPE_SECRET_KEY} is no {mode} key: give "
            f"one that begins with sk_{mode}_ or rk_{mode}_, or correct stripe.livemode"
        )
    return key.get_secret_value()


def webhook_secrets(config: Config) -> list[str]:
    """What Stripe's notifications are signed with, if they are to be taken: several while they are changed."""
    if config.webhook is None:
        return []
    given = config.secrets.stripe_webhook_secret
    secrets = [each for part in (given.get_secret_value() if given else "").split(",") if (each := part.strip())]
    if not secrets:
        raise ServiceError(
            f"webhook is configured, and there is no secret to know Stripe by: set {STRIPE_WEBHOOK_SECRET}, or "
            f"{STRIPE_WEBHOOK_SECRET}_FILE to a file that holds it"
        )
    if not all(each.startswith("whsec_") for each in secrets):
        raise ServiceError(
            f"{STRIPE_WEBHOOK_SECRET} is no signing secret: give that of the event destination, which begins with "
            "whsec_; several are separated by commas"
        )
    return secrets
