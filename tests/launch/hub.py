"""A hub on this machine: folders served as the Hugging Face hub serves repositories."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """repositories: org/name of a model, or datasets/org/name -> folder. asked: the paths of all requests."""

    def __init__(self, repositories: Mapping[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.repositories = repositories
        self.asked: list[str] = []


class Request(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        path = unquote(urlsplit(self.path).path).strip("/")
        words = path.removeprefix("api/").removeprefix("models/").split("/")
        count = 3 if words[0] == "datasets" else 2
        name, rest = "/".join(words[:count]), words[count:]
        folder = self.server.repositories.get(name)
        if folder is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("api/"):
            self._answer(200, json.dumps(described(name, folder, rest)).encode(), {})
        elif (file := folder.joinpath(*rest[2:])).is_file():
            self._answer(200, file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{oid(file)}"'})
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, code: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(repositories: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it is asked."""
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{hub.server_port}", hub.asked
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def described(name: str, folder: Path, rest: list[str]) -> object:
    """What the hub says of a repository, or of its files."""
    found = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    names = [str(file.relative_to(folder)) for file in found]
    if not rest or rest[0] == "revision":
        siblings = [{"rfilename": name} for name in names]
        return {"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings, "tags": []}
    return [
        {"type": "file", "path": name, "size": file.stat().st_size, "oid": oid(file)}
        for name, file in zip(names, found, strict=True)
    ]


def oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
