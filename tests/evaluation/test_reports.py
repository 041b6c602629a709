"""Reports: one HTML page without network, the same as Markdown, and what they show of scored masks."""

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import ExifTags, Image

from refsam.cli import main
from refsam.errors import UserError
from refsam.evaluation.reports.masks import Scored, folder_frames, mask_sections, overall_table
from refsam.evaluation.reports.pictures import comparison
from refsam.evaluation.reports.plots import Curve, chart
from refsam.evaluation.reports.report import (
    Code,
    Picture,
    Section,
    Table,
    Text,
    as_html,
    as_markdown,
    write_report,
)
from refsam.evaluation.scoring.clips import find_clips
from refsam.evaluation.scoring.masks import score_layout
from refsam.evaluation.scoring.protocols import find_protocol
from tests.browser import CHROMIUM

VOID_TAGS = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags are closed in order; collects tags, links and text."""

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def folders(tmp_path):
    """Predictions and truth of three objects: the first is right, the second half right, the third missed."""
    for folder, shift in (("gt", 0), ("pred", 6)):
        for video, objects in (("bear", (1, 2)), ("cat", (1,))):
            (tmp_path / folder / video).mkdir(parents=True)
            for frame in range(7):
                values = np.zeros((40, 60), np.uint8)
                for number in objects:
                    left = 4 + 24 * (number - 1) + (shift if number == 2 else 0)
                    values[4:16, left : left + 12] = number
                if (folder, video) == ("pred", "cat"):
                    values[:] = 0
                Image.fromarray(values).save(tmp_path / folder / video / f"{frame:05d}.png")
    return tmp_path


def scored(folders, protocol="davis-unsupervised"):
    rules = find_protocol(protocol)
    layout = find_clips(folders / "pred", folders / "gt", rules)
    return Scored("", score_layout(layout, rules), layout.clips, {("bear", "1"): "the <b>bear"})


def test_the_page_is_well_formed_self_contained_and_escaped():
    picture = Picture("a b/c", "image/svg+xml", chart([Curve("x<y", np.ones(3), "#000")], "abc"), "c & d")  # fmt: skip
    sections = [
        Section("<script>alert(1)</script>", (Text(("a < b", "c")), Code("refsam 'x y' <z>"))),
        Section("Tables", (Table(("", "J|F"), (("a & b", "1"),), "why", folded=True), picture)),
    ]
    page = Page(as_html("A & B", sections))
    assert "script" not in page.tags
    assert {"details", "table", "pre", "figure"} <= set(page.tags)
    assert all(link.startswith("data:") for link in page.links)
    assert "refsam 'x y' <z>" in page.words
    markdown = as_markdown("A & B", sections)
    assert "| a & b |    1 |" in markdown
    assert "J\\|F" in markdown
    assert "](report/a_b_c.svg)" in markdown


def test_charts_are_valid_svg_with_every_value_in_its_place():
    curves = [Curve("J", np.array([0, 0.5, 1.0]), "#123456"), Curve("F", np.ones(3), "#654321", True)]  # fmt: skip
    root = ElementTree.fromstring(chart(curves, ["00000", "00001", "00002"]))
    first, second = (line_of(root, colour) for colour in ("#123456", "#654321"))
    points = [
        tuple(map(float, p.split()[1:]))
        for p in re.findall(r"[ML] [-.\d]+ [-.\d]+", first.get("d"))
    ]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1])
    assert points[0][1] > points[2][1]  # 1 is on top
    assert "stroke-dasharray" in second.get("style")
    assert "00002" in "".join(root.itertext())
    single = chart([Curve("J", np.array([0.5]), "#123456")], ["00000"])
    assert any(
        e.tag.endswith("}use") and "#123456" in e.get("style", "")
        for e in ElementTree.fromstring(single).iter()
    )


def line_of(root, colour):
    return next(e for e in root.iter() if colour in e.get("style", "") and e.tag.endswith("}path"))


def test_reports_without_matplotlib_say_what_draws_curves(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sections = {section.title: section for section in mask_sections([scored(folders)])}
    assert all(
        "pip install 'refsam[eval]'" in block.lines[0] for block in sections["Over time"].blocks
    )


def test_comparisons_tell_right_missed_and_wrong_apart():
    prediction, truth = np.zeros((2, 300), bool), np.zeros((2, 300), bool)
    prediction[:, :200] = True
    truth[:, 100:] = True
    drawn = np.asarray(comparison(None, prediction, truth)).astype(int)
    wrong, right, missed = drawn[0, 50], drawn[0, 150], drawn[0, 250]
    assert right[2] > right[0]  # blue
    assert missed[0] > missed[1] > missed[2]  # orange
    assert wrong[0] > wrong[1] < wrong[2]  # magenta
    with pytest.raises(UserError, match="got a picture of 3x2, want 300x2"):
        comparison(np.zeros((2, 3, 3), np.uint8), prediction, truth)


def test_reports_show_best_and_worst_clips_curves_and_every_object(folders):
    sections = {section.title: section for section in mask_sections([scored(folders)])}
    pictures = [b for b in sections["Best and worst clips"].blocks if isinstance(b, Picture)]
    assert re.match('best: bear 1 "the <b>bear", J&F 100.0', pictures[0].caption)
    assert pictures[-1].caption == "worst: cat 1, J&F 0.0"
    assert len(pictures) == 3
    assert [picture.name for picture in sections["Over time"].blocks] == [
        "curves bear",
        "curves cat",
    ]
    videos, objects = sections["Every video"].blocks
    assert [row[0] for row in videos.rows] == ["bear", "cat"]
    assert [row[0] for row in objects.rows] == ['bear 1 "the <b>bear"', "bear 2", "cat 1"]
    assert objects.folded
    assert "Remarks" in sections  # an object that is never predicted


def test_several_evaluations_have_their_mean(folders):
    first = scored(folders)
    other = Scored("b", replace(first.result, scores=first.result.scores[:1]), first.clips)
    table = overall_table([replace(first, name="a"), other])
    assert [row[0] for row in table.rows] == ["a", "b", "mean"]
    a, b, mean = (float(row[1]) for row in table.rows)
    assert b == 100
    assert mean == pytest.approx((a + b) / 2, abs=0.01)


def test_written_reports_hold_every_picture_twice(folders):
    sections = mask_sections([scored(folders)])
    pages = write_report(folders / "out", "Title", sections)
    names = re.findall(r"\]\(report/([^)]+)\)", pages[1].read_text())
    assert sorted(names) == sorted(path.name for path in (folders / "out/report").iterdir())
    assert len(Page(pages[0].read_text()).links) == len(names) == 5
    twice = [Section("a", (sections[-1].blocks[0],)), Section("b", (sections[-1].blocks[0],))]
    with pytest.raises(UserError, match="same file name"):
        write_report(folders / "out", "Title", twice)


def run(*words):
    with pytest.raises(SystemExit) as finished:
        main(["evaluate", "masks", "--processes", "1", *map(str, words)])
    return finished.value.code


def test_evaluate_masks_writes_the_report_onto_frames(folders, capsys):
    for video in ("bear", "cat"):
        (folders / "frames" / video).mkdir(parents=True)
        for frame in range(7):
            image = Image.new("RGB", (60, 40), (250, 250, 250))
            image.save(folders / "frames" / video / f"{frame:05d}.png")
    words = ["--pred", folders / "pred", "--gt", folders / "gt", "--report", folders / "out"]
    assert run(*words, "--frames", folders / "frames") == 0
    assert f"report: {folders / 'out' / 'report.html'}" in capsys.readouterr().out
    with Image.open(folders / "out/report/00_best.jpg") as strip:
        assert strip.width == 5 * 300 + 4 * 4
        assert strip.getpixel((250, 150))[0] > 240
    page = (folders / "out/report.html").read_text()
    assert "davis-unsupervised" in page
    assert "numpy" in page


def test_reports_that_cannot_be_written_are_refused_before_the_work(folders, capsys):
    words = ["--pred", folders / "pred", "--gt", folders / "gt"]
    for more, message in (
        (["--frames", folders], "without --report"),
        (["--report", folders / "out", "--frames", folders / "nowhere"], "frames: no folder"),
        (["--report", folders / "gt/bear/00000.png"], "there is no folder"),
    ):
        assert run(*words, *more) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert not printed.out


def test_frames_of_a_folder_are_found_by_name_and_read_as_shown(folders):
    image = Image.new("RGB", (4, 3), (1, 2, 3))
    image.save(folders / "gt/bear/x.png")
    read = folder_frames(folders / "gt")
    assert read("bear", "x").tolist() == [[[1, 2, 3]] * 4] * 3
    assert read("bear", "y") is None
    turned = image.getexif()
    turned[ExifTags.Base.Orientation] = 6
    image.save(folders / "gt/bear/turned.png", exif=turned)
    assert read("bear", "turned").shape == (4, 3, 3)
    (folders / "gt/bear/damaged.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"damaged\.png cannot be read as an image"):
        read("bear", "damaged")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_chromium_shows_the_page_with_its_pictures(folders):
    page, _ = write_report(folders / "out", "Title", mask_sections([scored(folders)]))
    picture = folders / "page.png"
    subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={picture}",
         "--window-size=900,3000", "--host-resolver-rules=MAP * ~NOTFOUND", page.as_uri()],
        check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    with Image.open(picture) as shown:
        colours = {colour for _, colour in shown.convert("RGB").getcolors(1 << 24)}
    # The first curve's colour is drawn by the SVG, the dark grey by the overlays, which have no frames here.
    assert (0x00, 0x72, 0xB2) in colours
    assert any(max(abs(value - 60) for value in colour) <= 2 for colour in colours)
