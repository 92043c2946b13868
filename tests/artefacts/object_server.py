"""An S3-compatible server, moto's, on this machine."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

BUCKET = "cats"
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "NO_PROXY": "127.0.0.1",
}
# It says its port before it answers; port 0 is any that is free.
PROGRAM = """
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.port, flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def object_server(folder: Path) -> Iterator[dict[str, str]]:
    """Serve an empty bucket; the variables by which S3's clients find it."""
    with (folder / "moto.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=log, text=True
        )
    with server:
        try:
            assert server.stdout is not None
            address = f"http://127.0.0.1:{int(server.stdout.readline())}"
            put = urllib.request.Request(f"{address}/{BUCKET}", method="PUT")
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            direct.open(put, timeout=60).close()
            yield {**KEYS, "AWS_ENDPOINT_URL": address}
        finally:
            server.kill()
