"""gRPC health of a port, asked by Envoys and probes without a token.

On the wire a single request is a stream of one message. Taken as a stream it counts as what its connection
holds, like any other; gRPC itself would take a message of any size from anybody.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

Requests = AsyncIterator[health_pb2.HealthCheckRequest]
Context = grpc.aio.ServicerContext[Any, Any]
First = Callable[[Requests, Context], Awaitable[health_pb2.HealthCheckRequest | None]]
"""Reads the first message of a stream within the port's bounds; None where there is none."""


class PortHealth:
    """Health of some services, and the handlers that tell it."""

    def __init__(self, first: First) -> None:
        self._first = first
        self._servicer = health_aio.HealthServicer()

    def handler(self) -> grpc.GenericRpcHandler:
        """What the server is given."""
        read = health_pb2.HealthCheckRequest.FromString
        write = health_pb2.HealthCheckResponse.SerializeToString
        return grpc.method_handlers_generic_handler(
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            {
                "Check": grpc.stream_unary_rpc_method_handler(self._check, read, write),
                "Watch": grpc.stream_stream_rpc_method_handler(self._watch, read, write),
            },
        )

    async def serving(self, *services: str) -> None:
        """These are served from now on."""
        for service in services:
            await self._servicer.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """None is served any more."""
        await self._servicer.enter_graceful_shutdown()

    async def _check(self, requests: Requests, context: Context) -> health_pb2.HealthCheckResponse:
        return await self._servicer.Check(await self._asked(requests, context), context)

    async def _watch(
        self, requests: Requests, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        async for answer in self._servicer.Watch(await self._asked(requests, context), context):
            yield answer

    async def _asked(self, requests: Requests, context: Context) -> health_pb2.HealthCheckRequest:
        request = await self._first(requests, context)
        if request is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "nothing was asked")
        return request
