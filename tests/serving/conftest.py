"""A server in a thread of the test, at a free port of this machine."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from pargs_min.serving.app import Served, Server, app_of


@contextmanager
def running(served: Served, **settings) -> Iterator[str]:
    """The address of a server, while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served.engine.thread.start()
    config = uvicorn.Config(app_of(served, **settings), "127.0.0.1", port, log_level="warning")
    server = Server(config, served.engine)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        served.engine.close()
        server.should_exit = True
        thread.join(10)
        served.engine.thread.join(10)
        assert not thread.is_alive()
        assert not served.engine.thread.is_alive()
