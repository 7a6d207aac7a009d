"""The server of one process: uvicorn, which on SIGTERM or SIGINT first lets the worker finish what it has."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from typing import Any

import uvicorn

from drllm_fast.serving.app import create_app
from drllm_fast.serving.settings import ServerSettings
from drllm_fast.serving.worker import Worker

log = logging.getLogger("drllm_fast.serving")


class Server(uvicorn.Server):
    """grace   seconds that running requests may take at the end; new ones get 503 in that time

    A second SIGINT ends the wait.
    """

    def __init__(self, worker: Worker, settings: ServerSettings, grace: float = 30.0, **options: Any):
        self.worker, self.grace = worker, grace
        app = create_app(worker, settings)
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=5, lifespan="off", **options))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.refuse_new()
        log.info("finishing %d requests", self.worker.held)
        until = time.monotonic() + self.grace
        while self.worker.held and self.worker.alive and time.monotonic() < until and not self.force_exit:
            await asyncio.sleep(0.05)
        await asyncio.get_running_loop().run_in_executor(None, self.worker.close)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; OSError, with the address, where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
    except (OSError, OverflowError) as error:
        server.close()
        raise OSError(f"--host {host} --port {port}: cannot listen there ({error})") from error
    return server
