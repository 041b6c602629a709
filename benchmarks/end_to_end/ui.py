"""`python -m benchmarks.end_to_end.ui --out FILE`: how long the page and its first overlay take in Chromium.

Wall times, medians of the runs: from the command until the page shows its button, and from the button until the first
overlay of a 720p clip with the bundled model, which is loaded by then. Needs Chromium and playwright.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.segment import write_clip
from benchmarks.programs import make_parser, report_medians

RUNS = 3
_BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
_ARGUMENTS = ["--no-sandbox", "--disable-gpu"]
_PATIENCE = 120_000  # milliseconds


def run_once(clip: Path, expression: str, chromium: Any) -> dict[str, float]:
    """Seconds to the first page, to the model, and from the button to the first overlay."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "refsam", "ui"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().split()[2]
        served = time.perf_counter() - started
        page = chromium.new_page()
        page.set_default_timeout(_PATIENCE)
        page.goto(address)
        page.locator("#run").wait_for()
        shown = time.perf_counter() - started
        page.get_by_text("Model: nano").wait_for()
        loaded = time.perf_counter() - started
        overlay = _first_overlay(page, clip, expression)
        page.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    return {
        "server_answers_seconds": served,
        "first_page_seconds": shown,
        "model_seconds": loaded,
        "first_overlay_seconds": overlay,
    }


def _first_overlay(page: Any, clip: Path, expression: str) -> float:
    """Seconds from the button until the view shows another picture than the clip's first frame."""
    page.locator("#upload input[type=file]").set_input_files(clip)
    page.locator("#view img").wait_for()
    page.locator("#expressions textarea").fill(expression)
    page.locator("#legend span").wait_for()
    before = page.locator("#view img").get_attribute("src")
    started = time.perf_counter()
    page.locator("#run").click()
    page.wait_for_function("old => document.querySelector('#view img').src != old", arg=before)
    seconds = time.perf_counter() - started
    page.locator("#cancel").click()
    page.get_by_text("Stopped by: cancelled").wait_for()
    return seconds


def main() -> None:
    """Measure, print and write."""
    from playwright.sync_api import sync_playwright

    arguments = make_parser(__file__, __doc__).parse_args()
    path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path is None:
        raise SystemExit(f"needs one of {', '.join(_BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        clip = Path(folder) / "clip.mp4"
        expression = write_clip(clip)
        chromium = driver.chromium.launch(executable_path=path, args=_ARGUMENTS)
        runs = [run_once(clip, expression, chromium) for _ in range(RUNS)]
        chromium.close()
    report_medians(arguments, runs)


if __name__ == "__main__":
    main()
