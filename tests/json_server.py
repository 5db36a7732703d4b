"""Servers of tests that answer in JSON."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JsonHandler(BaseHTTPRequestHandler):
    """Says nothing of requests. What is answered is the subclasses' to say."""

    def body(self) -> dict:
        """What was asked."""
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, data: dict, status: int = 200) -> None:
        text = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def served(handler: type[JsonHandler]) -> Iterator[str]:
    """The address of a server with this handler, as an OpenAI-compatible one has it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
