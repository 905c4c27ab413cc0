"""A server in a thread of the test, at a free port of this machine."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from pargs_min.cli.serve import bound
from pargs_min.serving.app import Served, Server, app_of


@contextmanager
def running(served: Served, **settings) -> Iterator[str]:
    """The address of a server, while it runs."""
    with started(served, **settings) as (address, _):
        yield address


@contextmanager
def started(served: Served, **settings) -> Iterator[tuple[str, Server]]:
    """The address of a server and the server, while it runs."""
    served.engine.thread.start()
    server = Server(uvicorn.Config(app_of(served, **settings), log_level="warning"), served.engine)
    try:
        with listening(server) as address:
            yield address, server
            served.engine.close()
    finally:
        served.engine.close()
        served.engine.thread.join(10)
        assert not served.engine.thread.is_alive()


@contextmanager
def listening(server: uvicorn.Server) -> Iterator[str]:
    """The address of a server of uvicorn, while it runs."""
    place = bound("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([place],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
