"""A bucket of Google Cloud Storage on loopback: the calls of its JSON API that gcsfs and tensorstore make, in memory.
The bucket is ``bucket``; there is none called ``missing``, and ``forbidden`` is somebody else's.

https://cloud.google.com/storage/docs/json_api: metadata, download with ranges, simple and resumable uploads, listing
with prefixes and delimiters, moving, deletion, conditions on generations. No paging. A call that it does not know
is answered with 501 and noted in ``unknown``.
"""

import contextlib
import hashlib
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse

import pytest

NAME = "bucket"
# What the clients need to come here and not to look for credentials. The last turns off a look-up of the kind of
# bucket, which gcsfs makes by gRPC.
SETTINGS = {"NO_GCE_CHECK": "true", "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


@contextlib.contextmanager
def serve():
    """Yields the server: ``.objects`` {name: (content, generation)}, ``.unknown``, ``.environment`` for its clients."""
    server = Server(("127.0.0.1", 0), Handler)
    server.objects, server.uploads, server.unknown = {}, {}, []
    server.generations = itertools.count(1)
    server.lock = threading.Lock()
    url = f"http://127.0.0.1:{server.server_port}"
    server.environment = SETTINGS | {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def here():
    """``serve``, and this process and its children are its clients; fails if one asks what the server does not know."""
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
        assert not server.unknown


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):
        if not isinstance(sys.exception(), ConnectionError):  # a client asks twice at once and leaves the slower answer
            super().handle_error(request, address)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer's second packet waits 40 ms for the client's acknowledgement

    def log_message(self, *_):
        pass

    def respond(self, code, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        if code := {"missing": 404, "forbidden": 403}.get(re.search("/b/([^/]*)", path)[1]):
            self.respond(code, {"error": {"code": code, "message": "no"}})
            return
        query = dict(urllib.parse.parse_qsl(query))
        found = re.fullmatch(rf"(/upload|/download|)/storage/v1/b/{NAME}(?:/o(?:/(.*))?)?", path)
        kind, name = (found[1], urllib.parse.unquote(found[2] or "")) if found else (None, "")
        with self.server.lock:
            match (self.command, kind):
                case ("GET", "" | "/download") if name:
                    self.get(name, query)
                case ("GET", "") if re.search("/o/?$", path):
                    self.list(query)
                case ("GET", ""):
                    self.respond(200, {"kind": "storage#bucket", "name": NAME, "id": NAME})
                case ("POST", "/upload") if query.get("uploadType") == "media":
                    self.put(query["name"], body, query)
                case ("POST", "/upload") if "upload_id" in query:
                    self.put_chunk(query["upload_id"], body)
                case ("POST", "/upload") if query.get("uploadType") == "resumable":
                    upload = str(next(self.server.generations))
                    self.server.uploads[upload] = (query, b"")
                    url = f"http://{self.headers['Host']}/upload/storage/v1/b/{NAME}/o?upload_id={upload}"
                    self.respond(200, Location=url)
                case ("POST", "") if "/moveTo/o/" in name:
                    self.move(*name.split("/moveTo/o/"))
                case ("DELETE", "") if name:
                    self.delete(name, query)
                case _:
                    self.server.unknown.append(f"{self.command} {self.path}")
                    self.respond(501)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def fails(self, name, query):
        """Whether a condition on the object's generation does not hold; it is answered then."""
        now = str(self.server.objects.get(name, (b"", 0))[1])
        if query.get("ifGenerationMatch", now) != now:
            self.respond(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            return True
        if query.get("ifGenerationNotMatch") == now:
            self.respond(304)
            return True
        return False

    def get(self, name, query):
        if name not in self.server.objects:
            self.respond(404, {"error": {"code": 404, "message": f"No such object: {NAME}/{name}"}})
        elif not self.fails(name, query):
            content, generation = self.server.objects[name]
            headers = {"x-goog-generation": generation, "Content-Type": "application/octet-stream"}
            if query.get("alt") != "media":
                self.respond(200, self.describe(name))
            elif found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
                if first > last:
                    self.respond(416)
                    return
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                self.respond(206, content[first : last + 1], **headers)
            else:
                self.respond(200, content, **headers)

    def put(self, name, content, query):
        if not self.fails(name, query):
            self.server.objects[name] = (content, next(self.server.generations))
            self.respond(200, self.describe(name))

    def put_chunk(self, upload, chunk):
        """A part of a resumable upload; ``Content-Range`` ends in the size once that is known."""
        query, content = self.server.uploads[upload]
        content += chunk
        if self.headers["Content-Range"].endswith("/*"):
            self.server.uploads[upload] = (query, content)
            self.respond(308, Range=f"bytes=0-{len(content) - 1}")
        else:
            del self.server.uploads[upload]
            self.put(query["name"], content, query)

    def delete(self, name, query):
        if name not in self.server.objects:
            self.respond(404, {"error": {"code": 404, "message": f"No such object: {NAME}/{name}"}})
        elif not self.fails(name, query):
            del self.server.objects[name]
            self.respond(204)

    def move(self, name, new):
        if name not in self.server.objects:
            self.respond(404, {"error": {"code": 404, "message": f"No such object: {NAME}/{name}"}})
        else:
            content, _ = self.server.objects.pop(name)
            self.put(new, content, {})

    def list(self, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        names, prefixes = [], set()
        for name in sorted(self.server.objects):
            if not name.startswith(prefix) or not query.get("startOffset", "") <= name:
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            if delimiter and delimiter in name[len(prefix) :]:
                prefixes.add(prefix + name[len(prefix) :].split(delimiter)[0] + delimiter)
            else:
                names.append(name)
        answer = {"kind": "storage#objects", "items": [self.describe(name) for name in names]}
        self.respond(200, answer | ({"prefixes": sorted(prefixes)} if prefixes else {}))

    def describe(self, name):
        content, generation = self.server.objects[name]
        return {
            "kind": "storage#object", "id": f"{NAME}/{name}/{generation}", "name": name, "bucket": NAME,
            "size": str(len(content)), "generation": str(generation), "metageneration": "1", "etag": str(generation),
            "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z",
            "contentType": "application/octet-stream", "storageClass": "STANDARD",
            "md5Hash": hashlib.md5(content).hexdigest(),
        }  # fmt: skip
