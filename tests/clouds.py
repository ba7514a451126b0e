"""An object store on this machine, which refuses what it is told to refuse."""

from __future__ import annotations

import logging
import threading
import time
import urllib.request
from contextlib import contextmanager

import zarr
from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import make_server

BUCKET = "bucket"
KEY = "AKIAIOSFODNN7EXAMPLE"
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"
_ANSWER = (
    "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>not now</Message>"
    "<AWSAccessKeyId>{key}</AWSAccessKeyId><StringToSign>{key}</StringToSign></Error>"
)


class ObjectStore:
    """S3 as moto answers it, seen by every request: ``refused`` takes method and path, and gives
    the status and code by which they are refused, if they are."""

    def __init__(self):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answered, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.refused = lambda method, path: None
        self.requests = []
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.files = S3FileSystem(
            key=KEY,
            secret=SECRET,
            endpoint_url=self.url,
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def _answered(self, environment, start):
        method, path = environment["REQUEST_METHOD"], environment["PATH_INFO"]
        refusal = self.refused(method, path)
        if refusal is None:
            found = self._app(environment, start)
            self.requests.append((method, path))
            return found
        status, code = refusal
        environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        start(f"{status} Refused", [("Content-Type", "application/xml")])
        return [_ANSWER.format(code=code, key=SECRET).encode()]

    def empty(self):
        """Begin with an empty bucket; its file system, which remembers nothing, is its own."""
        request = urllib.request.Request(f"{self.url}/moto-api/reset", method="POST")
        urllib.request.urlopen(request).close()
        self.refused = lambda method, path: None
        self.files.mkdir(BUCKET)
        self.requests.clear()

    def text(self, below=""):
        """All that lies there, names and values."""
        return "".join(
            f"{name} {self.files.cat_file(name)!r}\n"
            for name in self.files.find(f"{BUCKET}/{below}")
        )

    def put(self, name, values, **form):
        """An array at a place in the bucket; its URL."""
        zarr.create_array(f"s3://{BUCKET}/{name}", data=values, **form)
        return f"s3://{BUCKET}/{name}"

    @contextmanager
    def refusing(self, refused):
        """Requests are refused meanwhile."""
        self.refused = refused
        try:
            yield
        finally:
            self.refused = lambda method, path: None

    def close(self):
        """End it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def waited(until, seconds=60):
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.01)
