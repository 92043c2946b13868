"""The Hub, as far as downloads need it: its cache, and a server that answers as it does.

Endpoints: https://huggingface.co/docs/hub/api; the cache:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a folder by their paths in it."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in found}


def fill_cache(folder: Path, home: Path, repo: str) -> Path:
    """Put a folder into the cache below ``home`` as a download of ``repo``: its snapshot."""
    base = home / "hub" / f"models--{repo.replace('/', '--')}"
    for name in ("refs", "blobs"):
        (base / name).mkdir(parents=True)
    (base / "refs" / "main").write_text(COMMIT)
    for name, path in files_of(folder).items():
        data = path.read_bytes()
        blob = base / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = base / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return base / "snapshots" / COMMIT


@contextlib.contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """A server of folders as repositories: its address, and the paths of what was downloaded."""
    fetched: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            parts = parts[2:] if api else parts
            folder = repositories.get("/".join(parts[:2]))
            if folder is None:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif api and parts[2] == "revision" and parts[3] in ("main", COMMIT):
                siblings = [{"rfilename": name} for name in files_of(folder)]
                told = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": siblings, "tags": []}
                self.answer(200, json.dumps(told).encode())
            elif api and parts[2] == "tree":
                entries = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                    for name, path in files_of(folder).items()
                ]
                self.answer(200, json.dumps(entries).encode())
            elif not api and parts[2] == "resolve" and "/".join(parts[4:]) in files_of(folder):
                name = "/".join(parts[4:])
                data = (folder / name).read_bytes()
                if self.command == "GET":
                    fetched.append(name)
                tag = f'"{hashlib.sha256(data).hexdigest()}"'
                self.answer(200, data, {"ETag": tag, "X-Repo-Commit": COMMIT})
            else:
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})

        def answer(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            """Nothing on stderr."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
