"""Runs the router's application: listens, drains, ends. `penstock router` calls `serve`.

A router of a group (group.py) opens its admin port at once and the shared port when it can answer: one that is started
again takes no connection away from the others before it knows its workers.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette

from penstock.common.chat_template import ChatTemplate
from penstock.common.config import RouterConfig
from penstock.common.errors import ConfigError
from penstock.common.generation_defaults import GenerationDefaults
from penstock.common.logs import WarningLimiter
from penstock.common.open_files import most_clients
from penstock.common.text_probe import TextProbe
from penstock.common.tokenizer import Tokenizer
from penstock.router.app import create_app
from penstock.router.group import ADMIN_HOST
from penstock.router.http_protocol import HttpProtocol
from penstock.router.off_loop import SWITCH_INTERVAL_S
from penstock.router.stalled import Stalled, cut, unread_bytes, waiting_bytes

if TYPE_CHECKING:
    from penstock.router.service import RouterService

log = logging.getLogger(__name__)

FLUSH_S = 5  # for clients that read their last events slowly
KEEP_ALIVE_S = 75  # above the idle time of common clients and proxies, so that they close first
REQUEST_S = 30  # without a byte of a request that has begun; however long all of it takes
READY_POLL_S = 0.05
FLUSH_POLL_S = 0.02
TOLD = 5  # addresses of a line in the log
# Objects of requests are freed by their counts, so the collector finds little; Python's own limits would have it look
# through all open streams again and again. These bound what it looks through at once: it holds up the event loop.
GC_LIMITS = (10_000, 2, 1000)


class RouterServer(uvicorn.Server):
    """Uvicorn, drained the other way round: requests that outlast `drain_s` are answered with an error, not cut."""

    def __init__(self, app: Starlette, service: RouterService, config: RouterConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                loop="uvloop",
                http=HttpProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=FLUSH_S,  # of tasks without a connection; those have had as long before
            )
        )
        self._app, self._service, self._drain_s = app, service, config.drain_s
        self._admin_port, self._shares_port = config.admin_port, len(config.group_ports) > 1
        self._write_timeout_s = config.write_timeout_s
        self._unread: Stalled[Any] = Stalled(config.write_timeout_s)
        self._unfinished: Stalled[HttpProtocol] = Stalled(REQUEST_S)
        self._full = WarningLimiter()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """With an admin port, that one first. `sockets`: listen there instead."""
        if sockets is not None:
            await super().startup(sockets)
            return
        try:
            admin = (ADMIN_HOST, self._admin_port)
            first = [socket.create_server(admin, backlog=self.config.backlog)] if self._admin_port else []
        except OSError as error:
            raise ConfigError(f"cannot listen on {ADMIN_HOST} port {self._admin_port}: {error}") from error
        await super().startup(first)
        while self._shares_port and not self._service.ready() and not self.should_exit:
            await asyncio.sleep(READY_POLL_S)
        if self.should_exit:
            return
        protocol_class: Any = self.config.http_protocol_class
        protocol = functools.partial(
            protocol_class, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        host, port, backlog = self.config.host, self.config.port, self.config.backlog
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(protocol, host, port, backlog=backlog, reuse_port=self._shares_port)
        except OSError as error:
            for server in self.servers:
                server.close()
            await self.lifespan.shutdown()
            raise ConfigError(f"cannot listen on {host} port {port}: {error}") from error
        self.servers.append(server)
        self._app.state.takes_connections = True
        log.info("listening on %s port %d", host, server.sockets[0].getsockname()[1])

    async def on_tick(self, counter: int) -> bool:
        """Uvicorn's own, ten times a second; now and then for connections at which nothing moves, too."""
        now = time.monotonic()
        if len(self.server_state.connections) >= (most := most_clients()):
            self._full.warn(log, "full", f"{most} connections are open: no more are taken (ulimit -n)", now)
        if self._unread.due(now):
            self._cut_unread(now)
        if self._unfinished.due(now):
            self._end_unfinished(now)
        return await super().on_tick(counter)

    def _cut_unread(self, now: float) -> None:
        """An open request of such a connection ends as if its client had hung up: its worker frees it at once."""
        waiting = {each: size for each in self.server_state.connections if (size := waiting_bytes(each.transport))}
        unread = self._unread.look(waiting, now)
        if unread:
            self._app.state.metrics.connections_cut["unread"] += len(unread)
            _cut_and_tell(unread, f"took nothing of their answers for {self._write_timeout_s:g} s")

    def _end_unfinished(self, now: float) -> None:
        """A request that comes slowly is waited for; one of which nothing more comes is answered with an error."""
        connections: set[Any] = self.server_state.connections  # ours are HttpProtocols
        come = {each: each.received + unread_bytes(each.transport) for each in connections if each.awaits_rest}
        late = self._unfinished.look(come, now)
        for each in late:
            each.time_out()
        if late:
            self._app.state.metrics.connections_cut["unfinished"] += len(late)
            log.info("%d requests (of %s) did not come to their end", len(late), _hosts(late))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """After SIGTERM or SIGINT; a second SIGINT cuts the drain short."""
        for server in self.servers:
            server.close()
        self._app.state.service_stopped = True
        drain = asyncio.ensure_future(self._service.stop(self._drain_s))
        while not drain.done() and not self.force_exit:
            await asyncio.wait({drain}, timeout=0.1)
        drain.cancel()
        await asyncio.gather(drain, return_exceptions=self.force_exit)
        if drain.cancelled():
            await self._service.stop(0.0)
        self._app.state.responses.leave()
        await self._flush()
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn then leaves the application where it is, to be cancelled with a traceback
            await self.lifespan.shutdown()

    async def _flush(self) -> None:
        """Let clients take what waits for them, then cut the others: uvicorn would cancel the tasks that write it."""
        for connection in self.server_state.connections.copy():
            connection.shutdown()  # once its answer is out
        await asyncio.sleep(FLUSH_POLL_S)  # those that have nothing to write close now
        deadline = time.monotonic() + FLUSH_S
        while self.server_state.connections and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(FLUSH_POLL_S)
        if left := list(self.server_state.connections):
            _cut_and_tell(left, "had not all of their answers when this router ended")


def _cut_and_tell(connections: Sequence[Any], why: str) -> None:
    """`why`: what is said of their clients."""
    size, hosts = sum(waiting_bytes(each.transport) for each in connections), _hosts(connections)
    for each in connections:
        cut(each.transport)
    log.warning("%d connections cut whose clients (%s) %s: %d bytes were waiting", len(connections), hosts, why, size)


def _hosts(connections: Sequence[Any]) -> str:
    return ", ".join(sorted({f"{each.client[0]}" for each in connections if each.client})[:TOLD])


def serve(config: RouterConfig) -> None:
    """Run a router until SIGTERM or SIGINT: then no new connections, `drain_s` for running requests, and exit.

    Raises:
        ConfigError: tokenizer, chat template or generation_config cannot be read, or a port is in use.
    """
    from penstock.router.service import RouterService

    tokenizer = Tokenizer.load(config.tokenizer or config.model)
    template = ChatTemplate.load(tokenizer, config.chat_template)
    defaults = GenerationDefaults.load(config.model, config.generation_config)
    service = RouterService(config, TextProbe.of(tokenizer, with_template=not config.chat_template))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    server = RouterServer(create_app(service, config, tokenizer, template, defaults), service, config)
    gc.freeze()  # what the start made stays: no collection looks at it again
    gc.set_threshold(*GC_LIMITS)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Uvicorn raises the signal again when it is done; after a drain that is a normal end, not a death.
        signal.signal(number, server.handle_exit)
    server.run()
