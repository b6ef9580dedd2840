"""Where the launcher asks a router whether it is ready."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvloop

from penstock.private_redis import free_port
from penstock.router_specs import reachable_address, reachable_host


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_server_answers_at_the_host_that_it_is_asked_at(host: str) -> None:
    """One of uvloop's, as the router's is: on "::" it takes no IPv4."""
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    port = free_port(host)

    async def scenario() -> None:
        async with await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port):
            _, writer = await asyncio.open_connection(reachable_host(host), port)
            writer.close()
            await writer.wait_closed()

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(scenario())
    finally:
        loop.close()


def test_an_address_of_ipv6_has_brackets() -> None:
    assert [reachable_address(host, 80) for host in ("::", "0.0.0.0", "a.b")] == ["[::1]:80", "127.0.0.1:80", "a.b:80"]
