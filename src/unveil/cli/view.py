"""`unveil view`: a run in the browser."""

from __future__ import annotations

import argparse
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from unveil.cli.output import console
from unveil.registry import UserError

SUMMARY = "show a run, finished or not, in the browser: curves, samples, each denoising step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--no-open", action="store_true", help="only write the page and print its path")
    parser.add_argument(
        "--serve",
        type=int,
        metavar="PORT",
        help="serve the page on this machine alone, built anew at every visit",
    )


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    import webbrowser

    from unveil.report.page import write_page

    folder = Path(args.run)
    page = write_page(folder)
    address = page.resolve().as_uri()
    console(args).print(str(page))
    server = None if args.serve is None else _server(folder, args.serve)
    if server is not None:
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"serving {address} (Ctrl-C ends)", file=sys.stderr, flush=True)
    if not args.no_open and not webbrowser.open(address):
        print("unveil: no browser found; open the page yourself", file=sys.stderr)
    if server is not None:
        with server:
            server.serve_forever()
    return 0, {"report": str(page), "address": address}


def _server(folder: Path, port: int) -> HTTPServer:
    """An HTTP server of this one page, bound to the loopback address."""
    from unveil.report.page import build_page

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            try:
                status, body = 200, build_page(folder).encode()
                kind = "text/html; charset=utf-8"
            except UserError as error:
                status, body, kind = 500, str(error).encode(), "text/plain; charset=utf-8"
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of every request."""

    try:
        return HTTPServer(("127.0.0.1", port), Page)
    except (OSError, OverflowError) as error:
        raise UserError(f"--serve: port {port} cannot be used: {error}") from error
