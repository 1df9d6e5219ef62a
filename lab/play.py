"""
A page to play with, on this machine alone: candidates as they appear, then in the reranker's order
(2.6); a click continues a picture below the row that was clicked, with another caption (3.3, G).

    python -m lab.play              # then open http://127.0.0.1:8000

The page, play.html, gets /runs and posts JSON to /draw, which answers with a line of JSON after
each row of the grid, and one at the end.
"""

import base64
import io
import json
import os
import re
import shlex
import subprocess
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from data.files import read_image
from engine.cli import Parser, start
from sample import SHIPPED, best, draw

PAGE = Path(__file__).with_name("play.html")
MOST_BYTES = 2**22  # of a request
PLACES = 4  # requests at once, one of which is drawn
NUMBERS = {"candidates": (int, 1, 32), "seed": (int, 0, 2**63 - 1), "temperature": (float, 0, 10),
           "top_k": (int, 1, 10**6), "keep_rows": (int, 1, 1000)}  # fmt: skip  # kind, least, most


def runs() -> dict[str, Path]:
    """The runs that can draw, by name: the newest first, then the shipped ones."""
    newest = sorted(Path("runs").glob("*/prior.pt"), key=lambda path: -path.stat().st_mtime)
    names = {f"runs/{path.parent.name}": path.parent for path in newest}
    names |= {f"pretrained/{run.name}": run for run in sorted(SHIPPED.parent.iterdir())}
    needed = ("bpe.json", "dvae.pt", "prior.pt")
    return {name: run for name, run in names.items() if all((run / x).is_file() for x in needed)}


def check(wanted: dict) -> dict:
    """What the page wants, as `sample.draw` takes it. ValueError for anything else."""
    options, there = dict(wanted), runs()
    texts = {key: options.pop(key, "") for key in ("prompt", "run", "image", "name")}
    if not all(isinstance(text, str) for text in texts.values()) or len(texts["prompt"]) > 1000:
        raise ValueError(f"{', '.join(texts)} must be texts, the prompt of at most 1,000 letters")
    if texts["run"] not in there:
        raise ValueError(f"there is no such run; expected one of {', '.join(there)}")
    for name, value in options.items():
        kind, least, most = NUMBERS.get(name, (None, 1, 0))
        if type(value) not in (int, kind) or not least <= value <= most:
            raise ValueError(f"{name[:20]!r} is unknown, or not a number from {least} to {most}")
    if texts["image"]:
        options["image"] = read_image(base64.b64decode(texts["image"]))
    return {"candidates": 1, **options, "prompt": texts["prompt"], "run_dir": there[texts["run"]]}


def command(wanted: dict, place: int | None) -> str:
    """The command line that draws a picture: the last of the `place` best, or of all."""
    prompt = wanted["prompt"]
    if prompt.startswith("-"):  # lest it be taken for an option
        prompt = f" {prompt}"
    words = ["python", "sample.py", prompt, f"--run-dir={wanted['run']}"]
    options = {k: wanted.get(k) for k in NUMBERS} | {"image": wanted.get("name"), "top": place}
    for name, value in options.items():
        words += [] if value is None else [f"--{name.replace('_', '-')}={value}"]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def encoded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


class Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds that the other side may be silent, or not listen
    turn, places = threading.Lock(), threading.BoundedSemaphore(PLACES)

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            pass  # the page was closed, and what was drawn for it ends here

    def parse_request(self) -> bool:
        """False unless our own page asks: other origins, and other names, may be anyone's."""
        if not super().parse_request():
            return False
        port = self.server.server_address[1]
        ours = [f"http://127.0.0.1:{port}", f"http://localhost:{port}"]
        host, origin = f"http://{self.headers.get('Host')}", self.headers.get("Origin", ours[0])
        if host in ours and origin in ours:
            return True
        self.answer({"error": f"this is for {ours[0]} alone"}, 403)
        return False

    def answer(self, content, status: int = 200, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        policy = "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'"
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.send(content)

    def send(self, content) -> None:
        text = content if isinstance(content, str) else json.dumps(content) + "\n"
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        if self.path == "/":
            return self.answer(PAGE.read_text("utf-8"), kind="text/html; charset=utf-8")
        if self.path == "/runs":
            return self.answer(list(runs()))
        self.answer({"error": "there is nothing here but / and /runs"}, 404)

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        if self.path != "/draw" or self.headers.get("Content-Type") != "application/json":
            return self.answer({"error": "expected JSON for /draw"}, 404)
        if not re.fullmatch("[0-9]{1,7}", size) or int(size) > MOST_BYTES:
            return self.answer({"error": f"expected at most {MOST_BYTES:,} bytes"}, 413)
        try:
            wanted = json.loads(self.rfile.read(int(size)))
            options = check(wanted)
        except (ValueError, TypeError, RecursionError) as error:
            return self.answer({"error": str(error)}, 400)
        if not self.places.acquire(blocking=False):
            return self.answer({"error": f"{PLACES} requests are waiting: try again later"}, 503)
        try:
            with self.turn:
                self.answer("")
                self.draw(wanted, options)
        finally:
            self.places.release()

    def draw(self, wanted: dict, options: dict) -> None:
        rows, pictures = options.get("keep_rows", 0), []

        def watch(images: list[Image.Image]) -> None:
            nonlocal rows
            rows += 1
            self.send({"images": [encoded(x) for x in images]})

        try:
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always")
                images = draw(**options, batch_size=options["candidates"], watch=watch)
        except ValueError as error:
            return self.send({"error": str(error)})
        for place, x in enumerate(best(images, len(images)), 1):
            about = {"image": encoded(x)} | {k: x.info[k] for k in ("candidate", "score")}
            pictures.append(about | {"command": command(wanted, place if about["score"] else None)})
        self.send({"rows": rows, "notes": [str(n.message) for n in notes], "pictures": pictures})


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000")
    port = parser.parse_args().port
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port {port} cannot be used: {error}") from error
    print(f"open http://127.0.0.1:{server.server_address[1]}; Ctrl-C ends it", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    start(main)
