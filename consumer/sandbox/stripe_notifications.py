"""The stand-in's event destination: thin notifications of its error reports, signed as Stripe's are, and repeated."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Callable
from typing import Any, NamedTuple

import aiohttp
import orjson

LOOK_EVERY_S = 0.05
FIRST_AGAIN_S, LAST_AGAIN_S = 0.1, 2.0
"""Stripe takes minutes and hours."""

_THIN = ("id", "object", "type", "created", "livemode", "related_object", "reason")


class Destination(NamedTuple):
    """Where notifications go."""

    url: str
    secret: str


def thin(event: dict[str, Any]) -> bytes:
    """What is sent of an event: not what it says."""
    return orjson.dumps({name: event[name] for name in _THIN if name in event})


def signature(payload: bytes, secret: str, at: int) -> str:
    """The header of a notification that is sent at this time, in seconds since the epoch."""
    made = hmac.new(secret.encode(), b"%d." % at + payload, hashlib.sha256).hexdigest()
    return f"t={at},v1={made}"


class Notifications:
    """Sends each report until it is answered with 2xx. `answers` are the statuses so far, 0 where there was none."""

    def __init__(self, reports: Callable[[], list[dict[str, Any]]], now: Callable[[], float]) -> None:
        self.answers: list[int] = []
        self._reports = reports
        self._now = now
        self._begun = 0
        self._sending: set[asyncio.Task[None]] = set()

    async def run(self, to: Destination) -> None:
        """Send what there is and what comes, until cancelled."""
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            try:
                while True:
                    for event in self._reports()[self._begun :]:
                        self._begun += 1
                        self._sending.add(asyncio.create_task(self._send(session, to, event)))
                    await asyncio.sleep(LOOK_EVERY_S)
            finally:
                for task in self._sending:
                    task.cancel()
                await asyncio.gather(*self._sending, return_exceptions=True)

    async def _send(self, session: aiohttp.ClientSession, to: Destination, event: dict[str, Any]) -> None:
        payload, again_s = thin(event), FIRST_AGAIN_S
        while True:
            status = await self._post(session, to, payload)
            self.answers.append(status)
            if 200 <= status < 300:
                return
            await asyncio.sleep(again_s)
            again_s = min(2 * again_s, LAST_AGAIN_S)

    async def _post(self, session: aiohttp.ClientSession, to: Destination, payload: bytes) -> int:
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "Stripe-Signature": signature(payload, to.secret, int(self._now())),
        }
        try:
            async with session.post(to.url, data=payload, headers=headers, allow_redirects=False) as answer:
                return answer.status
        except (aiohttp.ClientError, TimeoutError):
            return 0
