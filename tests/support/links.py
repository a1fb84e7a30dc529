"""A slow link: a TCP proxy on loopback that passes a limited number of bytes a second to the server."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

TICK = 0.02  # seconds


@contextlib.contextmanager
def throttled(port: int, bytes_per_second: int) -> Iterator[int]:
    """The port of a proxy to 127.0.0.1:``port``. Answers come back unthrottled."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # inherited by what it accepts
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        threading.Thread(target=_accept, args=(listener, port, bytes_per_second), daemon=True).start()
        yield listener.getsockname()[1]


def _accept(listener: socket.socket, port: int, bytes_per_second: int) -> None:
    with contextlib.suppress(OSError):
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", port))
            for source, target, rate in ((near, far, bytes_per_second), (far, near, 0)):
                threading.Thread(target=_pass, args=(source, target, rate), daemon=True).start()


def _pass(source: socket.socket, target: socket.socket, rate: int) -> None:
    block = int(rate * TICK) or 1 << 20
    started, passed = time.monotonic(), 0
    with contextlib.suppress(OSError):
        while data := source.recv(block):
            target.sendall(data)
            passed += len(data)
            if rate:
                time.sleep(max(0.0, started + passed / rate - time.monotonic()))
        target.shutdown(socket.SHUT_WR)
