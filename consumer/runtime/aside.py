"""Calls that may take long, in threads that nobody has to wait for: neither at a stop nor at the process's end."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def aside(name: str, call: Callable[..., T], *given: object) -> asyncio.Future[T]:
    """What the call returns or raises, to be awaited in the loop that asks; the thread has this name."""
    answer: Future[T] = Future()
    answer.set_running_or_notify_cancel()  # whoever waits for it may give up; the call goes on

    def work() -> None:
        try:
            answer.set_result(call(*given))
        except Exception as failed:  # noqa: BLE001 - raised again by whoever waits
            answer.set_exception(failed)

    Thread(target=work, name=name, daemon=True).start()
    return asyncio.wrap_future(answer)
