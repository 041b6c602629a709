"""`refsam ui` as a visitor has it: Chromium from the first page to the downloaded masks, and requests that must fail."""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
from PIL import Image

from refsam.cli import main
from refsam.errors import UserError
from refsam.ui import serve
from refsam.ui.jobs import Engine
from tests.browser import ARGUMENTS, CHROMIUM
from tests.video.clips import write_video

pytest.importorskip("gradio", reason="needs refsam[ui]")
EXPRESSIONS = "the red thing\nthe blue thing"
PATIENCE = 300_000  # milliseconds, on a busy machine


class Server(NamedTuple):
    """A running `refsam ui`: its address, and the folder that it may use."""

    url: str
    folder: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page with limits that tests can reach; when it is ended, nothing may be left in its folder."""
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "refsam", "ui", "--folder", str(folder), "--max-frames", "600"]
    process = subprocess.Popen(
        [*command, "--max-megabytes", "5"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    url = process.stdout.readline().split()[2]
    assert (
        "the model is ready" in process.stdout.readline()
    )  # browser and torch would share the cores
    yield Server(url, folder)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 0
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Chromium without a network."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server: Server):
    """The page, opened anew."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(server.url)
    yield page
    page.close()


def upload(page, path: Path) -> None:
    page.locator("#upload input[type=file]").set_input_files(path)


def download(page, name: str, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.locator(f"#download-{name}").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def test_from_upload_to_downloaded_masks(page, tmp_path: Path) -> None:
    hosts = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
    page.reload()
    upload(page, write_video(tmp_path / "clip.mp4", frames=10))
    page.get_by_text("clip.mp4: 64 x 48, 10 frames").wait_for()
    page.locator("#expressions textarea").fill(EXPRESSIONS)
    chips = page.locator("#legend span")
    chips.nth(1).wait_for()
    assert chips.all_inner_texts() == EXPRESSIONS.split("\n")
    assert chips.first.evaluate("e => e.style.color") != chips.nth(1).evaluate("e => e.style.color")
    page.locator("#run").click()
    page.locator("#download-masks").wait_for()
    assert "10 frames, " in page.locator("#status").inner_text()

    with zipfile.ZipFile(download(page, "masks", tmp_path)) as archive:
        pictures = [name for name in archive.namelist() if name.endswith(".png")]
        assert pictures == [f"masks/{e:02d}/{t:05d}.png" for e in range(2) for t in range(10)]
        mask = np.asarray(Image.open(archive.open(pictures[0])))
    assert mask.shape == (48, 64) and set(np.unique(mask)) <= {0, 255}
    result = json.loads(download(page, "json", tmp_path).read_text())
    assert [len(expression["segmentations"]) for expression in result["expressions"]] == [10, 10]
    with av.open(str(download(page, "overlay", tmp_path))) as video:
        assert sum(1 for _ in video.decode(video=0)) == 10
    assert hosts <= {"127.0.0.1", "localhost"} | {""}, "the page asks other machines"

    last = page.locator("#view img").get_attribute("src")
    page.locator("#frame input[type=range]").fill("3")
    page.wait_for_function("last => document.querySelector('#view img').src != last", arg=last)


def test_cancel_keeps_what_is_done(page, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "long.mp4", frames=600, size=(240, 320))
    upload(page, clip)
    page.get_by_text("long.mp4: 320 x 240").wait_for()
    page.locator("#expressions textarea").fill("the red thing")
    page.locator("#run").click()
    page.get_by_text("of 600 frames").wait_for()
    page.locator("#cancel").click()
    page.get_by_text("Stopped by: cancelled").wait_for()
    result = json.loads(download(page, "json", tmp_path).read_text())
    assert 1 <= result["frames"] < 600 and not result["complete"]


def test_the_sample_brings_its_expressions(page) -> None:
    page.get_by_role("tab", name="Sample").click()
    page.locator("#sample").click()
    page.get_by_text("sample.mp4: 640 x 360").wait_for()
    assert page.locator("#expressions textarea").input_value().count("\n") >= 1


@pytest.mark.slow
def test_a_recording_of_the_webcam_is_segmented(page) -> None:
    page.get_by_role("tab", name="Webcam").click()
    page.get_by_text("Click to Access Webcam").click()
    button = page.locator("#webcam button").first
    button.get_by_text("Record").click()
    button.get_by_text("Stop").wait_for()
    page.wait_for_timeout(1500)  # milliseconds of video
    button.click()
    page.get_by_text(".webm: ").wait_for()
    page.locator("#expressions textarea").fill("the green circle")
    page.locator("#run").click()
    page.locator("#download-masks").wait_for()


def test_bad_uploads_are_answered_in_words(page, tmp_path: Path) -> None:
    """Which ones are refused is tested without a browser; here, that a file's name is shown as text, not as a picture."""
    path = tmp_path / "<img src=x onerror=alert(1)>.mp4"
    path.write_bytes(b"words " * 99)
    upload(page, path)
    page.locator("#status .error").get_by_text(
        ".mp4 is not a video that can be read here"
    ).wait_for()
    assert page.locator("#status img").count() == 0
    page.locator("#expressions textarea").fill("the dog")
    page.locator("#run").click()
    page.get_by_text("Choose a clip first").wait_for()


@pytest.mark.slow
def test_uploads_that_are_too_large_are_answered_in_words(page, tmp_path: Path) -> None:
    (tmp_path / "large.mp4").write_bytes(bytes(6_000_000))
    upload(page, tmp_path / "large.mp4")
    page.get_by_text("exceed the maximum allowed size").first.wait_for()


@pytest.mark.parametrize("path", ["/etc/passwd", str(Path(__file__)), "README.md", "../README.md"])
def test_no_other_file_is_served(server: Server, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{server.url}gradio_api/file={path}", timeout=300)
    assert caught.value.code in (403, 404)


def test_no_other_file_is_read(server: Server, tmp_path: Path) -> None:
    """A visitor who writes requests by hand and names a file of the machine as an upload."""
    clip = write_video(tmp_path / "private.mp4", frames=2)
    config = json.load(urllib.request.urlopen(f"{server.url}config", timeout=300))
    events = [d for d in config["dependencies"] if "change" in str(d["targets"]) and d["inputs"]]
    file = {"path": str(clip), "meta": {"_type": "gradio.FileData"}}
    join = {"data": [file], "fn_index": events[0]["id"], "session_hash": "byhand"}
    request = urllib.request.Request(
        f"{server.url}gradio_api/queue/join",
        json.dumps(join).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=300).read()
    answers = urllib.request.urlopen(
        f"{server.url}gradio_api/queue/data?session_hash=byhand", timeout=300
    )
    text = answers.read().decode()
    assert '"success":false' in text and "64 x 48" not in text


def test_an_address_that_is_taken_is_refused(server: Server, capsys) -> None:
    port = server.url.rstrip("/").rpartition(":")[2]
    with pytest.raises(SystemExit) as caught:
        main(["ui", "--port", port])
    assert caught.value.code == 2
    assert "choose another --host or --port" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_ends_the_page(tmp_path: Path) -> None:
    """After the server has answered; nothing is left."""

    def load() -> Engine:
        raise UserError("no such checkpoint")

    lines: list[str] = []
    with pytest.raises(UserError, match="no such checkpoint"):
        serve(load, folder=tmp_path, announce=lines.append)
    assert len(lines) == 1 and "http://127.0.0.1:" in lines[0]
    assert not list(tmp_path.iterdir())
