"""Consumer groups as their coordinator sees them, and what a client does of it in the background.

Cooperative: a rebalance takes away only what moves, and the next one gives it to somebody else. What stays goes on.
This client is a worse one than the real: struck off, it joins again by itself before its owner has heard of the loss.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from random import Random
from typing import Final, NamedTuple

BOUNDS_MS: Final = ((6_000, 10_000), (20_000, 60_000), (45_000, 300_000))
"""Who sends no heartbeats for longer is struck off, and so is whose loop stands still for longer: hasty settings, ours,
and patient ones."""
HEARTBEAT_MS: Final = 3_000
"""Within so long every member has noticed that there is a rebalance, and joined again."""


class Metadata(NamedTuple):
    """As which member, of which generation, somebody commits."""

    id: str
    generation: int


class Event(NamedTuple):
    """What a client has to tell its owner."""

    what: str
    """``assigned``, ``revoked`` or ``lost``."""
    partitions: tuple[int, ...]
    life: int
    """Of the client, when it happened."""


class Client:
    """One process in one group."""

    def __init__(self, group: Group, name: str) -> None:
        self.group = group
        self.name = name
        self.life = 0
        """How often it had to join as somebody new."""
        self.generation = 0
        self.owned: set[int] = set()
        """What the group takes to be its own, until it has given it back."""
        self.leaving: set[int] = set()
        """What it is to give back."""
        self.events: deque[Event] = deque()
        self.asleep_since: int | None = None
        """The process stands still."""
        self.unpolled_since: int | None = None
        """Its loop stands still; its heartbeats go on."""
        self.deaf_until = 0
        """Until then it hears nothing of the group."""
        self.dead = False

    @property
    def id(self) -> str:
        """As the group knows it; another one after each loss."""
        return f"{self.name}/{self.life}"

    @property
    def metadata(self) -> Metadata:
        """At this moment, whether the owner has been told of it or not."""
        return Metadata(self.id, self.generation)

    def tell(self, what: str, partitions: Iterable[int]) -> None:
        """Something for the owner, who hears it when it polls."""
        if found := tuple(sorted(partitions)):
            self.events.append(Event(what, found, self.life))

    def die(self, now: int) -> None:
        """Nothing more is heard of it."""
        self.dead, self.asleep_since = True, now

    def done(self, event: Event, now: int) -> None:
        """The owner has done what it was told to."""
        if event.what == "revoked" and event.life == self.life:
            self.owned.difference_update(event.partitions)
            self.leaving.difference_update(event.partitions)
            self.group.rebalance(now)

    def lose(self, now: int) -> None:
        """It notices that it was struck off, and asks to be taken on again."""
        lost = self.owned | {number for event in self.events for number in event.partitions}
        self.events.clear()
        self.tell("lost", lost)
        self.owned, self.leaving = set(), set()
        self.life += 1
        self.generation = 0
        self.group.join(self, now)


class Group:
    """The members, whose generation counts, and who is to have which partition."""

    def __init__(self, partitions: int, random: Random) -> None:
        self.generation = 0
        self._partitions = list(range(partitions))
        self._random = random
        self._session_ms, self._poll_ms = random.choice(BOUNDS_MS)
        self._clients: list[Client] = []
        self._members: dict[str, Client] = {}
        self._until: int | None = None
        """A rebalance goes on until then, at least."""
        self._mixing = False

    def join(self, client: Client, now: int) -> None:
        """Take it on, from the next generation on."""
        if client not in self._clients:
            self._clients.append(client)
        self._members[client.id] = client
        self.rebalance(now)

    def leave(self, client: Client, now: int) -> None:
        """It goes away in good order."""
        client.events.clear()
        if client in self._clients:
            self._clients.remove(client)
        self._strike(client, now)

    def cut_off(self, client: Client, now: int, until: int) -> None:
        """Its heartbeats do not arrive any more, and it does not know."""
        client.deaf_until = until
        self._strike(client, now)

    def rebalance(self, now: int, *, mixing: bool = False) -> None:
        """Share out the partitions anew; ``mixing``: also those that could stay where they are."""
        self._mixing = self._mixing or mixing
        if self._until is None:
            self._until = now + self._random.randrange(HEARTBEAT_MS)

    def belongs(self, member: Metadata) -> bool:
        """Whether a commit in this name is taken."""
        return member.id in self._members and member.generation == self.generation > 0

    @property
    def settled(self) -> bool:
        """Whether everybody knows what is theirs."""
        return self._until is None and all(
            self._is_member(each) and not each.events and not each.leaving for each in self._clients
        )

    def settle(self, now: int, *, calm: bool) -> None:
        """What time brings: whoever was silent for too long is struck off, notices it, and a rebalance ends."""
        for client in list(self._clients):
            asleep, unpolled = client.asleep_since, client.unpolled_since
            if _longer(now, asleep, self._session_ms) or _longer(now, unpolled, self._poll_ms):
                self._strike(client, now)
                if client.dead:
                    self._clients.remove(client)
            elif not self._is_member(client) and (
                calm or (asleep is None and now > client.deaf_until and self._random.random() < 0.3)
            ):
                client.lose(now)
        waited_for = any(client.asleep_since is not None for client in self._members.values())
        if self._until is not None and now >= self._until and self._members and not waited_for:
            self._share_out()

    def _is_member(self, client: Client) -> bool:
        return self._members.get(client.id) is client

    def _strike(self, client: Client, now: int) -> None:
        if self._is_member(client):
            del self._members[client.id]
            self.rebalance(now)

    def _share_out(self) -> None:
        self._until = None
        self.generation += 1
        members = list(self._members.values())
        held = {number: client for client in members for number in client.owned}
        shares = self._shares(members, held)
        for client in members:
            client.generation = self.generation
            gone = {number for number in client.owned if shares[number] is not client} - client.leaving
            new = {number for number, other in shares.items() if other is client and number not in held}
            client.leaving |= gone
            client.owned |= new
            client.tell("revoked", gone)
            client.tell("assigned", new)
        self._mixing = False

    def _shares(self, members: list[Client], held: dict[int, Client]) -> dict[int, Client]:
        """Equal ones, in which as much stays as can, unless all is mixed."""
        order = self._random.sample(members, len(members))
        if not self._mixing:
            order.sort(key=lambda client: -len(client.owned))
        least, more = divmod(len(self._partitions), len(members))
        room = {client.id: least + (place < more) for place, client in enumerate(order)}
        shares: dict[int, Client] = {}
        for number in self._random.sample(self._partitions, len(self._partitions)):
            holder = held.get(number)
            if holder is not None and not self._mixing and number not in holder.leaving and room[holder.id]:
                room[holder.id] -= 1
                shares[number] = holder
        for number in self._partitions:
            if number not in shares:
                shares[number] = next(client for client in order if room[client.id])
                room[shares[number].id] -= 1
        return shares


def _longer(now: int, since: int | None, bound: int) -> bool:
    return since is not None and now - since > bound
