"""A double of the hub on this machine: the endpoints that creating a repository and uploading a folder call."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import transformers

LARGE = (".safetensors",)  # uploaded through LFS; the content of the other files is in the commit


class FakeHub(ThreadingHTTPServer):
    """`requests`: (method and path, body) of every request. `fails`: path parts whose requests end with status 403."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, bytes]] = []
        self.fails: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def read_commits(self) -> list[dict[str, bytes]]:
        """Return the files of each commit, by name; of large ones the content that was uploaded before."""
        objects = {path.rpartition("/")[2]: body for path, body in self.requests if path.startswith("PUT /objects/")}
        commits = []
        for path, body in self.requests:
            if "/commit/" not in path:
                continue
            entries = [json.loads(line) for line in body.splitlines()]
            files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"}
            large = {e["value"]["path"]: objects[e["value"]["oid"]] for e in entries if e["key"] == "lfsFile"}
            commits.append(files | large)
        return commits


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((f"{self.command} {self.path}", body))
        refused = any(part in self.path for part in self.server.fails)
        content = b"{}" if refused else json.dumps(self.build_answer(body)).encode()
        self.send_response(403 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    do_GET = do_POST = do_PUT = answer

    def build_answer(self, body: bytes) -> object:
        address = self.server.address
        if self.path.startswith("/objects/"):
            return {}
        entries = json.loads(body) if body and "/commit/" not in self.path else {}
        if "/repos/create" in self.path:
            owner = entries.get("organization") or "me"
            return {"url": f"{address}/{owner}/{entries['name']}"}
        if "/preupload/" in self.path:
            names = [file["path"] for file in entries["files"]]
            modes = ["lfs" if name.endswith(LARGE) else "regular" for name in names]
            return {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in zip(names, modes)]}
        if self.path.endswith("/objects/batch"):
            actions = [
                {**item, "actions": {"upload": {"href": f"{address}/objects/{item['oid']}"}}}
                for item in entries["objects"]
            ]
            return {"transfer": "basic", "objects": actions}
        if "/commit/" in self.path:
            return {"commitUrl": f"{address}/me/model/commit/0", "commitOid": "0", "success": True}
        return {"name": "me", "type": "user", "orgs": []}


@contextmanager
def serve_hub() -> Iterator[FakeHub]:
    """Start a double; huggingface_hub, in this process, calls nothing else meanwhile."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        patch.setattr(transformers.utils.hub, "_hf_api", huggingface_hub.HfApi(hub.address))  # it is kept for good
        patch.setenv("HF_TOKEN", "hf_secret")
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
            hub.server_close()
