"""lab.play over HTTP: what is drawn and in which order, what is refused; a look in a browser."""

import base64
import http.client
import io
import json
import re
import shlex
import shutil
import subprocess
import threading
import warnings
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

import sample
from data.toy import toy_world
from lab import play

RUN = "pretrained/tiny"
WANTED = {"prompt": "a red cube", "run": RUN, "seed": 3, "candidates": 3}


@contextmanager
def running(handler):
    """A server of the page, on the port given, until the end of the block."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="module")
def port():
    with running(play.Handler) as port:
        yield port


def ask(port, method="GET", path="/", body=None, **headers):
    """(status, headers, body) of a request; a body that is no text is sent as JSON."""
    if body is not None:
        headers = {"Content_Type": "application/json"} | headers
        body = body if isinstance(body, (str, bytes)) else json.dumps(body)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def drawn(port, **wanted):
    """The lines of an answer, and the pictures of the last as arrays."""
    status, _, text = ask(port, "POST", "/draw", WANTED | wanted)
    lines = [json.loads(line) for line in text.splitlines()]
    assert status == 200 and "pictures" in lines[-1], lines
    return lines, [pixels(picture["image"]) for picture in lines[-1]["pictures"]]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png)), formats=["PNG"]))


def test_the_page_and_nothing_else(port):
    status, headers, text = ask(port)
    assert status == 200 and text == play.PAGE.read_bytes()
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    status, _, text = ask(port, path="/runs")
    assert status == 200 and RUN in json.loads(text)
    for path in ("/play.py", "/../README.md", "/%2e%2e/README.md", "//etc/passwd", "/runs/", "*"):
        assert ask(port, path=path)[0] == 404, path
    assert ask(port, "PUT")[0] == 501


def test_candidates_appear_row_by_row_and_then_in_the_rerankers_order(port):
    """The same as `draw` draws, and as the command line below each picture says."""
    lines, pictures = drawn(port)
    assert len(lines) == 8 + 1 and lines[-1]["rows"] == 8 and lines[-1]["notes"] == []
    rows = [pixels(line["images"][0]) for line in lines[:-1]]
    assert (rows[0][4:] == sample.GREY).all() and (rows[0][:4] != sample.GREY).any()
    expected = sample.draw("a red cube", 3, sample.SHIPPED, top=3, seed=3)
    found = lines[-1]["pictures"]
    for place, (x, picture, about) in enumerate(zip(expected, pictures, found), 1):
        assert (np.asarray(x) == picture).all()
        assert (about["candidate"], about["score"]) == (x.info["candidate"], x.info["score"])
        python, script, *words = shlex.split(about["command"])
        assert (python, script) == ("python", "sample.py")
        options = sample.parse(words)
        assert options["prompt"] == ["a red cube"] and options["top"] == place
        assert (options["candidates"], options["seed"]) == (3, 3)
        assert options["run_dir"].as_posix() == RUN
    assert (rows[-1] == pictures[[about["candidate"] for about in found].index(0)]).all()


def test_a_command_takes_names_that_begin_as_options_do():
    odd = {"prompt": "-dark", "run": RUN, "name": "-a b.png", "keep_rows": 2}
    options = sample.parse(shlex.split(play.command(odd, None))[2:])
    assert options["image"].name == "-a b.png" and options["prompt"][0].strip() == "-dark"


def test_a_picture_is_continued_below_a_row(port):
    original = Image.fromarray(toy_world(5, 32, "val")[0])
    file = io.BytesIO()
    original.save(file, "PNG")
    wanted = {
        "image": base64.b64encode(file.getvalue()).decode(),
        "keep_rows": 5,
        "name": "it's.png",
    }
    lines, pictures = drawn(port, prompt="a blue zebra", candidates=1, **wanted)
    options = {"seed": 3, "image": original, "keep_rows": 5}
    with warnings.catch_warnings(record=True) as notes:  # of a word that no caption held
        warnings.simplefilter("always")
        (expected,) = sample.draw("a blue zebra", 1, sample.SHIPPED, **options)
    assert (np.asarray(expected) == pictures[0]).all()
    assert len(lines) == 3 + 1 and lines[-1]["rows"] == 8
    assert lines[-1]["notes"] == [str(note.message) for note in notes]
    words = shlex.split(lines[-1]["pictures"][0]["command"])
    options = sample.parse(words[2:])
    assert options["image"].name == "it's.png" and options["keep_rows"] == 5
    assert options["top"] is None  # of one there is no order


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "example.com"},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1:1"},
        {"Origin": "https://example.com"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://127.0.0.1:{port}.example.com"},
    ],
)
def test_other_pages_are_refused(port, headers):
    """By where they come from, or by the name that they have given this machine."""
    headers = {name: value.replace("{port}", str(port)) for name, value in headers.items()}
    for method, path, body in (
        ("GET", "/", None),
        ("GET", "/runs", None),
        ("POST", "/draw", WANTED),
    ):
        status, _, text = ask(port, method, path, body, **headers)
        assert status == 403 and json.loads(text).keys() == {"error"}


def test_its_own_page_is_not(port):
    for name in ("127.0.0.1", "localhost"):
        own = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}"}
        assert ask(port, path="/runs", **own)[0] == 200


@pytest.mark.parametrize(
    "body, meant",
    [
        ("", "Expecting value"),
        ("{", "Expecting property"),
        ("[" * 100_000, "recursion"),
        (b"\xff", "utf-8"),
        ([], "no such run"),
        (WANTED | {"run": "../runs"}, "no such run"),
        (WANTED | {"run": "/etc"}, "no such run"),
        (WANTED | {"run": ["x"]}, "texts"),
        (WANTED | {"prompt": 5}, "texts"),
        (WANTED | {"prompt": "a" * 1001}, "texts"),
        (WANTED | {"candidates": 33}, "'candidates' is unknown, or not a number from 1 to 32"),
        (WANTED | {"candidates": True}, "candidates"),
        (WANTED | {"candidates": 2.0}, "candidates"),
        (WANTED | {"candidates": None}, "candidates"),
        (WANTED | {"temperature": float("nan")}, "temperature"),
        (WANTED | {"temperature": 10**400}, "temperature"),
        (WANTED | {"seed": -1}, "seed"),
        (WANTED | {"top_k": 0}, "top_k"),
        (WANTED | {"device": "cuda"}, "'device' is unknown"),
        (WANTED | {"watch": 1}, "'watch' is unknown"),
        (WANTED | {"image": "?", "keep_rows": 1}, "not one of JPEG"),
        (WANTED | {"image": "/etc/passwd", "keep_rows": 1}, ""),
    ],
)
def test_what_the_page_would_not_send_is_refused(port, body, meant):
    status, _, text = ask(port, "POST", "/draw", body)
    error = json.loads(text)["error"]
    assert status == 400 and meant in error and "\n" not in error


@pytest.mark.parametrize(
    "wanted, meant",
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "\ud800"}, "no UTF-8"),
        ({"prompt": "a cube " * 100}, "tokens"),
        ({"keep_rows": 3}, "belong together"),
    ],
)
def test_what_cannot_be_drawn_is_said(port, wanted, meant):
    _, _, text = ask(port, "POST", "/draw", WANTED | wanted)
    assert meant in json.loads(text)["error"]


def test_a_request_is_bounded_and_is_json(port):
    for size in (str(play.MOST_BYTES + 1), "-1", "1e3", "9" * 50, ""):
        assert ask(port, "POST", "/draw", "", Content_Length=size)[0] == 413
    assert ask(port, "POST", "/draw", WANTED, Content_Type="text/plain")[0] == 404
    assert ask(port, "POST", "/runs", WANTED)[0] == 404


@contextmanager
def waiting(count):
    for _ in range(count):
        assert play.Handler.places.acquire(timeout=60)
    yield
    for _ in range(count):
        play.Handler.places.release()


def test_requests_are_queued_and_the_queue_is_bounded(port):
    with waiting(play.PLACES):
        status, _, text = ask(port, "POST", "/draw", WANTED)
        assert status == 503 and "try again" in json.loads(text)["error"]
    found = []
    with waiting(play.PLACES - 1), play.Handler.turn:
        thread = threading.Thread(target=lambda: found.append(drawn(port, candidates=1)))
        thread.start()
        thread.join(1)
        assert thread.is_alive() and not found  # it waits for its turn
    thread.join(300)
    assert len(found) == 1


VISITOR = """<script>
  const drawn = async count => {
    const button = form.querySelector('button')
    while (document.querySelectorAll('figure a').length !== count || button.disabled)
      await new Promise(done => setTimeout(done, 50))
  }
  window.onload = async () => {
    while (!form.run.value) await new Promise(done => setTimeout(done, 50))
    form.run.value = 'pretrained/tiny'
    form.candidates.value = 8
    form.requestSubmit()
    await drawn(8)
    const img = document.querySelector('figure img'), box = img.getBoundingClientRect()
    const at = {clientX: box.x + 5, clientY: box.y + box.height / 2}
    img.dispatchEvent(new MouseEvent('click', {bubbles: true, ...at}))
    form.prompt.value = 'a green cone'
    form.candidates.value = 2
    form.requestSubmit()
    await drawn(2)
    fetch('/', {method: 'PUT', body: document.documentElement.outerHTML})
  }
</script>"""


def test_a_browser_draws(monkeypatch, tmp_path):
    """The page itself, with a script that asks for pictures, and then continues the best."""
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    if not (browser := next(filter(None, found), None)):
        pytest.skip("there is no Chromium")
    told, seen = threading.Event(), []

    class Handler(play.Handler):
        def do_PUT(self):  # what the browser shows in the end
            seen.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            told.set()

    (tmp_path / "page.html").write_text(play.PAGE.read_text("utf-8") + VISITOR, "utf-8")
    monkeypatch.setattr(play, "PAGE", tmp_path / "page.html")
    with running(Handler) as port:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/user",
        ]
        command = [browser, *options, "--remote-debugging-port=0", f"http://127.0.0.1:{port}/"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **quiet) as process:
            told.wait(120)
            process.terminate()
    assert seen and "Drawn." in seen[0]
    commands = re.findall(r"<br>(python sample.py .*?)</figure>", seen[0])
    options = [sample.parse(shlex.split(command)[2:]) for command in commands]
    assert [about["prompt"] for about in options] == [["a green cone"]] * 2
    assert [about["top"] for about in options] == [1, 2] and options[0]["keep_rows"] == 4
    assert options[0]["image"].name.startswith("a-red-cube-0-")
