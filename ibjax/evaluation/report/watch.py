"""A live page of runs that train, served on this machine alone.

The page is made anew for each request, so nothing runs while nobody looks, and no file changes. It reloads itself by
an HTML header; it has no scripts.
"""

import http.server
import os
import threading
from collections.abc import Iterable

from ibjax.errors import InputError
from ibjax.evaluation import picture_files
from ibjax.evaluation.report.runs import read

HOST, PORT = "127.0.0.1", 8770
REFRESH = 10  # seconds


class _Server(http.server.ThreadingHTTPServer):
    """Browsers open connections in advance, which would block a server of one thread."""

    daemon_threads = True

    def __init__(self, address, workdirs):
        super().__init__(address, _Handler)
        self.workdirs, self.drawing = workdirs, threading.Lock()  # matplotlib draws for one thread at a time

    @property
    def url(self) -> str:
        return f"http://localhost:{self.server_address[1]}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    timeout = 30

    def do_GET(self):
        """Answers with the page; with 503 and the reason, which also reloads itself, where it cannot be made now."""
        if self.path != "/":
            self.send_error(404)
            return
        code, text = 200, ""
        try:
            with self.server.drawing:
                text = page(self.server.workdirs)
        except (InputError, OSError) as error:
            code, text = 503, f"{error}\n"
        body = text.encode("utf-8", errors="replace")
        self.send_response(code)
        self.send_header("Content-Type", f"text/{'html' if code == 200 else 'plain'}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if code != 200:
            self.send_header("Refresh", str(REFRESH))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Requests are not logged."""


def page(workdirs: Iterable[str | os.PathLike]) -> str:
    """The page, as it is now."""
    picture_files.quiet_fonts()
    from ibjax.evaluation.report import page as pages  # imports matplotlib

    return pages.live(read(workdirs, unfinished=True), REFRESH)


def server(workdirs: Iterable[str | os.PathLike], port: int | None = None) -> _Server:
    """The server, with its `url`; call `serve_forever`. None takes `PORT`, or any other where that is in use.

    Raises InputError where a folder holds no run, or the given port is in use.
    """
    workdirs = list(workdirs)
    read(workdirs, unfinished=True)
    try:
        return _Server((HOST, PORT if port is None else port), workdirs)
    except OSError as error:
        if port is not None:
            raise InputError(f"--port={port} cannot be used ({error.strerror}); give another, or none") from None
        return _Server((HOST, 0), workdirs)
