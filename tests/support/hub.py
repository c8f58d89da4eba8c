"""A stand-in for the Hugging Face hub: the part of its API that uploads and downloads models."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "1a2b" * 10


class Hub(BaseHTTPRequestHandler):
    """Serves ``server.repositories``: owner/name -> path -> content."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *details):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path, known = self.path.partition("?")[0], self.server.repositories
        self.server.asked.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/.*", path):
            name, what = match.groups()
            if name not in known:
                self.answer({}, 404, **{"X-Error-Code": "RepoNotFound"})
            elif what == "revision":
                self.answer({"id": name, "sha": COMMIT, "siblings": []})
            else:
                files = known[name].items()
                self.answer(
                    [{"type": "file", "path": p, "size": len(c), "oid": p} for p, c in files]
                )
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = known[match[1]][match[2]]
            self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self.answer({}, 404)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}"
            self.server.repositories.setdefault(name, {})
            self.answer({"url": f"{self.server.url}/{name}"})
            return
        if self.path == "/api/validate-yaml":  # of README.md
            self.answer({"errors": [], "warnings": []})
            return
        name, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/main.*", self.path).groups()
        if what == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": path, **modes} for path in files]})
            return
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[name][line["value"]["path"]] = content
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})


@contextlib.contextmanager
def hub(repositories):
    """A running stand-in with ``repositories``, to which uploads are added; it has its ``url``, and
    the requests ``asked``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.repositories = f"http://127.0.0.1:{server.server_port}", repositories
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
