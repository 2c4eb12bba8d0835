"""Stage 2 on a store and without its loop, and Stripe's stand-in without a server: all at a time that stands still."""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import urlencode

from consumer import totals
from consumer.deliver.answers import Answer, Heard
from consumer.deliver.customers import Customers
from consumer.deliver.delivery import Attempt, Delivery
from consumer.deliver.pacing import Outlet
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_server import StripeStandIn
from consumer.sandbox.stripe_wire import read_call
from consumer.storage import Archive, Log, Stage, Store


class StageTwo:
    """One life of stage 2 on a partition of the totals log."""

    def __init__(
        self, store: Store, log: Archive, customers: Customers, now: int, *, partition: int = 0, shadow: bool = False
    ) -> None:
        """It begins where the last commit in this store ended; ``now`` is in milliseconds."""
        self._store, self._log, self._partition, self._now = store, log, partition, now
        self.delivery = Delivery(
            customers=customers, in_flight=1000, parked_limit=1000, outlet=Outlet(1000), shadow=shadow
        )
        restored = store.restore(Stage.DELIVER, partition)
        self._offset = restored.offset if restored else 1
        self.delivery.restore(self._offset, restored.entries if restored else (), now)

    def work(self, answer: Callable[[Attempt], Heard]) -> None:
        """Read what is new in the log, and go on until nothing is left to do."""
        self.read()
        self.send(answer)

    def read(self) -> None:
        """Read what is new in the log."""
        ends = {self._partition: self._log.ends(Log.TOTALS)[self._partition]}
        for each in self._log.logged(Log.TOTALS, {self._partition: self._offset}, ends):
            self.delivery.read(each.offset, totals.decode(each.value), self._now)
            self._offset = each.offset + 1

    def send(self, answer: Callable[[Attempt], Heard]) -> None:
        """Commit and send, until nothing is left to do."""
        delivery, now = self.delivery, self._now
        while True:
            self._commit()
            while (attempt := delivery.next(now)) is not None:
                if delivery.may_send(attempt, now):
                    delivery.answered(attempt, answer(attempt), now)
            wake = delivery.wake(now)
            if not delivery.due and (wake is None or wake > now):
                break
        self._commit()

    def _commit(self) -> None:
        if (changes := self.delivery.commit(self._now)) is not None:
            self._store.commit(Stage.DELIVER, {self._partition: changes})
            self.delivery.committed()


def post(stripe: StripeStandIn, attempt: Attempt, secret: str = SECRET_KEY) -> Answer:
    """One Meter Event, and what the stand-in says to it."""
    form = {"event_name": attempt.event_name, "identifier": attempt.identifier, "timestamp": attempt.timestamp}
    form |= {f"payload[{name}]": value for name, value in attempt.payload.items()}
    call = read_call("POST", "/v1/billing/meter_events", urlencode(form), f"Bearer {secret}", attempt.key)
    answer = stripe.model.handle(call)
    error = json.loads(answer.body).get("error", {})
    return Answer(answer.status, error.get("type"), error.get("code"), error.get("message"))
