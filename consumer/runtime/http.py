"""/metrics, /healthz and /readyz."""

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

Reasons = Callable[[], list[str]]
"""What is wrong, each in a line; empty where nothing is."""


class Http:
    """The service's own pages. ``stuck`` makes it not alive, ``not_ready`` makes it alive and not ready."""

    def __init__(self, registry: CollectorRegistry, *, stuck: Reasons, not_ready: Reasons) -> None:
        async def metrics(_: web.Request) -> web.Response:
            return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

        async def healthz(_: web.Request) -> web.Response:
            return _verdict(stuck())

        async def readyz(_: web.Request) -> web.Response:
            return _verdict(stuck() + not_ready())

        app = web.Application()
        app.add_routes(
            [web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)],
        )
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which is a free one where 0 was asked for. Raises ``OSError``."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Listen no more."""
        await self._runner.cleanup()


def _verdict(reasons: list[str]) -> web.Response:
    return web.Response(status=503, text="\n".join(reasons) + "\n") if reasons else web.Response(text="ok\n")
