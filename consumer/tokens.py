"""Tokens that Kafka is shown instead of a password: made from outside, renewed in time, the same for all clients.

Kafka's client asks for the next one by itself, in a thread of its own, when four fifths of a token's life are over; see
docs/decisions/0018.
"""

import gc
import os
from collections.abc import Callable
from importlib.util import find_spec
from threading import Lock
from time import time
from typing import Final, NamedTuple

import structlog

log = structlog.get_logger()

AGAIN_S: Final = 5.0
"""After so long what failed is tried again, by whoever asks then."""
SHARED: Final = 0.1
"""Of a token's life: for so long whoever asks is given the same one."""
AWS_S: Final = 5
"""So long AWS is given to take a connection, and as long to answer; each twice."""


class Token(NamedTuple):
    """What Kafka's client is given; it takes it as it is."""

    text: str
    expires: float
    """Seconds since the epoch."""


class NoToken(Exception):
    """None can be made at the moment. The message says why, with the cure, and holds no secret."""


class Failure(NamedTuple):
    """Since when tokens cannot be made, in milliseconds since the epoch, and why."""

    since: int
    reason: str


class Tokens:
    """The tokens of a process. May be used from any thread."""

    def __init__(self, make: Callable[[], Token], *, now: Callable[[], float] = time) -> None:
        """``make`` raises ``NoToken``. ``now`` gives seconds since the epoch."""
        self.failure: Failure | None = None
        self._make = make
        self._now = now
        self._token: Token | None = None
        self._renew_at = 0.0
        self._lock = Lock()

    def __call__(self, config: str = "") -> Token:
        """For the setting ``oauth_cb`` of a client, which hands over what ``sasl.oauthbearer.config`` says: nothing.

        A token that cannot be renewed is given until it expires; then this raises ``NoToken``.
        """
        del config
        with self._lock:
            # The thread is a client's. It may end no client: not this one, and none that waits for this lock.
            collects = gc.isenabled()
            gc.disable()
            try:
                if self._now() >= self._renew_at:
                    self._renew()
                if self._token is None or self._token.expires <= self._now():
                    why = self.failure.reason if self.failure else "the token has expired as soon as it was made"
                    raise NoToken(why)
                return self._token
            finally:
                if collects:
                    gc.enable()

    def _renew(self) -> None:
        try:
            self._token = self._make()
        except NoToken as failed:
            now = self._now()
            self._renew_at = now + AGAIN_S
            if self.failure is None:
                log.warning("kafka_token_failed", reason=str(failed))
            self.failure = Failure(self.failure.since if self.failure else int(now * 1000), str(failed))
        else:
            now = self._now()
            self._renew_at = now + (self._token.expires - now) * SHARED
            if self.failure is not None:
                log.info("kafka_token_made")
            self.failure = None


Provider = Callable[[str | None], Callable[[], Token]]
"""Makes what makes tokens, for a region."""


def can_sign() -> bool:
    """Whether AWS's library is installed."""
    return find_spec("aws_msk_iam_sasl_signer") is not None


def aws_msk_iam(region: str | None) -> Callable[[], Token]:
    """Tokens for Amazon MSK with IAM, each for 15 minutes: signed here, as whoever the AWS environment says we are.

    AWS's library finds that out, and renews it: a web identity, a pod identity, a profile, keys in the environment.
    Without a region it is the environment's.
    """
    # Not everybody has it, and it takes a third of a second.
    from aws_msk_iam_sasl_signer import MSKAuthTokenProvider as signer  # noqa: PLC0415, N813
    from botocore.config import Config  # noqa: PLC0415
    from botocore.credentials import CredentialProvider, ReadOnlyCredentials  # noqa: PLC0415
    from botocore.session import Session  # noqa: PLC0415

    class Found(CredentialProvider):  # type: ignore[misc] # AWS's libraries have no types
        """Hands on what has been found, so that not each token asks anew who we are."""

        def __init__(self, found: ReadOnlyCredentials) -> None:
            self._found = found

        def load(self) -> ReadOnlyCredentials:
            return self._found

    session = Session()
    session.set_default_client_config(
        Config(connect_timeout=AWS_S, read_timeout=AWS_S, retries={"total_max_attempts": 2})
    )

    def make() -> Token:
        signed = None
        try:
            where = region or os.environ.get("AWS_REGION") or session.get_config_variable("region")
            if where is not None and session.get_config_variable("region") is None:
                session.set_config_variable("region", where)
            credentials = session.get_credentials()
            if where is not None and credentials is not None:
                found = Found(credentials.get_frozen_credentials())
                signed = signer.generate_auth_token_from_credentials_provider(where, found)
        except Exception as failed:  # noqa: BLE001 - whatever AWS's library raises may be over the next time
            raise NoToken(
                f"AWS gives no credentials ({type(failed).__name__}: {failed}): is the role right, does it trust this "
                "service account, can AWS's sts be reached on port 443?"
            ) from None
        if where is None:
            raise NoToken("the region of the cluster is not known: set kafka.token.region, or AWS_REGION")
        if signed is None:
            raise NoToken(
                "AWS's library finds no credentials: give the pod a service account with a role or a pod identity, or "
                "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        return Token(signed[0], signed[1] / 1000)

    return make
