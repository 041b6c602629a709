"""Running a model on each benchmark, from start to end, on fixtures, with a model whose output is known."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from refsam.cli import main
from refsam.data import open_dataset
from refsam.errors import UserError
from refsam.evaluation.runners.benchmark import Runner, evaluate
from refsam.evaluation.runners.inference import RULES, GroupLogits, VideoPredictor, find_rules
from refsam.evaluation.runners.per_expression import PerExpression
from refsam.evaluation.runners.ref_davis17 import RefDavis17
from refsam.evaluation.runners.refcoco import RefCoco
from refsam.evaluation.runners.run_folder import RunFolder
from refsam.evaluation.scoring.problems import MaskProblemsError
from refsam.runtime.files import write_zip
from refsam.session import Shard, VideoSession
from refsam.video.mask_formats import davis_palette
from tests.data import fixtures
from tests.evaluation.known_model import ColourModel, write_lossless
from tests.tiny_model import tiny_model

pytest.importorskip("pycocotools", reason="needs refsam[eval]")
UNSUPERVISED, STRICT = "davis-unsupervised", "davis-semi-supervised"


@pytest.fixture(autouse=True)
def lossless(monkeypatch):
    monkeypatch.setattr(fixtures, "write_image", write_lossless)


@pytest.fixture
def davis(tmp_path):
    return fixtures.write_ref_davis17(tmp_path / "ref-davis")


@pytest.fixture
def rvos(tmp_path):
    return fixtures.write_ref_youtube_vos(tmp_path / "rvos")


@pytest.fixture
def mevis(tmp_path):
    return fixtures.write_mevis(tmp_path / "mevis")


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "coco").mkdir()
    return fixtures.write_refcoco(tmp_path / "coco")


def davis_benchmark(root, scoring=(UNSUPERVISED,), merge="probabilities"):
    return RefDavis17(open_dataset("ref-davis17", root, "valid"), merge, tuple(scoring))


def mevis_benchmark(root, split="valid_u"):
    dataset = open_dataset("mevis", root, split)
    return PerExpression("MeViS", dataset, "", dataset.truth, dataset.listing)


def runner(model=None, protocol="default", missing="error"):
    return Runner(model or ColourModel(), "known", find_rules(protocol), missing=missing)


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_ref_davis17_scores_four_annotators_and_their_mean(davis, tmp_path):
    # Annotator 2 means the other object: forgiven by the matching, not by the strict protocol.
    model = ColourModel(misled="café 2")
    benchmark = davis_benchmark(davis, [UNSUPERVISED, STRICT, "per-expression"])
    outcome = evaluate(benchmark, runner(model), tmp_path / "out", shard=Shard())
    scores = outcome.summary["scores"]
    assert scores[STRICT]["mean"]["J-Mean"] == 0.75
    strict = [row["overall"]["J-Mean"] for row in scores[STRICT]["evaluations"].values()]
    assert strict == [1, 1, 0, 1]
    matched = scores[UNSUPERVISED]["evaluations"]
    assert list(matched) == ["first frame 1", "full video 1", "first frame 2", "full video 2"]
    assert matched["full video 2"]["overall"]["J&F-Mean"] == 1
    # "goldfish" has a single object, which annotator 2 is led away from.
    assert matched["first frame 2"]["videos"]["blackswan"]["J-Mean"] == 1
    assert matched["first frame 2"]["videos"]["goldfish"]["J-Mean"] == 0
    assert scores["per-expression"]["mean"]["J-Mean"] == 0.75
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["scores"] == scores


def test_ref_davis17_writes_maps_with_the_usual_palette(davis, tmp_path):
    evaluate(davis_benchmark(davis), runner(), tmp_path / "out", shard=Shard())
    with Image.open(tmp_path / "out/predictions/anno_3/blackswan/00002.png") as picture:
        assert picture.mode == "P"
        assert picture.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
        np.testing.assert_array_equal(np.array(picture), fixtures.numbers_at(2, 2))
    assert tuple(davis_palette()[3 * 255 :]) == (224, 224, 192)
    assert not (tmp_path / "out/predictions/expressions").exists()


def test_ref_davis17_needs_an_expression_of_each_annotator_and_the_truth(davis, tmp_path):
    (davis / "valid/Annotations").rename(davis / "valid/elsewhere")
    with pytest.raises(UserError, match="no truth for valid"):
        davis_benchmark(davis)


def test_merged_maps_differ_by_rule_where_both_are_known():
    # At full size already: one pixel row of logits, two objects.
    rows = torch.tensor([[0.05, 25.0, -1.0, 3.0], [-2.0, 30.0, -1.0, 4.0]])
    logits = GroupLogits(rows[:, None].expand(-1, 4, -1), 4, (4, 4), (4, 4), (4, 4))
    # 0.05 is a probability above 0.5 but a logit below the background's 0.1; sigmoid(25) is 1 in float32 as sigmoid(30) is.
    assert logits.merged_map([1, 2], "probabilities")[0].tolist() == [1, 1, 0, 2]
    assert logits.merged_map([1, 2], "logits")[0].tolist() == [0, 2, 0, 2]
    assert logits.merged_map([7, 9], "logits")[0].tolist() == [0, 9, 0, 9]


def test_predictions_are_those_of_a_session():
    model = tiny_model()
    frames = torch.randint(0, 256, (3, 40, 52, 3), dtype=torch.uint8)
    texts = ["the red cup", "the dog"]
    session = VideoSession(model, texts)
    predictor = VideoPredictor(model, RULES["default"], [texts[:1], texts[1:]])
    for frame in frames:
        wanted = session.step(frame)
        groups = predictor.step(frame.numpy())
        for index, logits in enumerate(groups):
            torch.testing.assert_close(logits.logits[0], wanted.logits[index], rtol=0, atol=1e-4)
            full = logits.at_full_size()[0]
            sure = full.abs() > 1e-3
            assert torch.equal(full[sure] > 0, wanted.masks[index][sure])
            masks = torch.from_numpy(logits.masks(0.0)[0])
            assert torch.equal(masks[sure], wanted.masks[index][sure])


def test_paper_protocol_shrinks_frames_and_lowers_expressions():
    model = ColourModel()
    predictor = VideoPredictor(model, RULES["paper"], [["The RED box"]])
    (logits,) = predictor.step(np.full((72, 128, 3), 128, np.uint8))
    assert model.seen == [(360, 640)]
    assert [session.expressions for session in predictor._sessions] == [("the red box",)]
    assert logits.masks(0.01).shape == (1, 72, 128)
    assert RULES["paper"].threshold == 0.01
    assert RULES["paper"].merge == "logits"
    predictor.step(np.full((128, 71, 3), 128, np.uint8))
    assert model.seen[1] == (int(360 * 128 / 71), 360)


def test_ref_youtube_vos_without_truth_gives_the_submission_only(rvos, tmp_path):
    dataset = open_dataset("ref-youtube-vos", rvos, "valid")
    benchmark = PerExpression("Ref-YouTube-VOS", dataset, "Annotations", None, None)
    outcome = evaluate(benchmark, runner(), tmp_path / "out", shard=Shard())
    assert "not scored: no truth for ref-youtube-vos valid" in outcome.text
    with zipfile.ZipFile(tmp_path / "out/submission.zip") as archive:
        names = [f"{5 * index:05d}" for index in range(4)]
        # Only the listed video that the test list lacks.
        wanted = [f"Annotations/0062f68aaa/{e}/{n}.png" for e in "01" for n in names]
        assert archive.namelist() == wanted
        with archive.open(wanted[5]) as file, Image.open(file) as picture:
            assert (picture.mode, picture.size) == ("L", (64, 48))
            mask = np.array(picture)
    assert not mask.any()  # the blue box is hidden in the second frame
    assert not [p for p in (tmp_path / "out/predictions").rglob("*") if p.suffix not in ("", ".png")]  # fmt: skip


@pytest.mark.parametrize("layout", ["maps", "folders"])
def test_ref_youtube_vos_is_scored_with_either_layout_of_the_truth(layout, rvos, tmp_path, capsys, monkeypatch):  # fmt: skip
    if layout == "maps":
        fixtures.write_ref_youtube_vos_truth(rvos)
    else:
        for number in (1, 2):
            for time in range(4):
                mask = (fixtures.numbers_at(time, 2) == number) * np.uint8(255)
                folder = rvos / "valid/Annotations/0062f68aaa" / str(number - 1)
                write_lossless(folder / f"{5 * time:05d}.png", mask)
    code = command(monkeypatch, "ref-youtube-vos", "--root", rvos, "--out", tmp_path / "out")
    assert code == 0
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["overall"]["J&F-Mean"] == 1
    assert len(scores["objects"]) == 2
    assert (tmp_path / "out/submission.zip").exists()
    assert "the official set has 202" in capsys.readouterr().out


def test_mevis_unites_objects_scores_absence_and_zips_without_a_folder(mevis, tmp_path):
    outcome = evaluate(mevis_benchmark(mevis), runner(), tmp_path / "out", shard=Shard())
    scores = {row["object"]: row["J-Mean"] for row in outcome.summary["objects"]}
    assert scores == {"0": 1, "1": 1, "2": 1}
    with zipfile.ZipFile(tmp_path / "out/submission.zip") as archive:
        assert archive.namelist()[0] == "9f21474aca92/0/00000.png"
        assert len(archive.namelist()) == 12


def test_refcoco_scores_are_those_of_known_masks(coco, tmp_path):
    datasets = tuple(open_dataset("refcoco", coco, split) for split in ("val", "testA"))
    outcome = evaluate(RefCoco(datasets, ("lavt",)), runner(), tmp_path / "out", shard=Shard())
    for split, time in (("val", 2), ("testA", 0)):
        # Two expressions for each object; object 2 lies on object 1, whose true mask is whole.
        visible = (fixtures.numbers_at(time, 2) == 1).sum() / (12 * 16)
        scores = outcome.summary["splits"][split]
        assert scores["samples"] == 4
        for convention in ("referformer", "sa2va", "lavt"):
            assert scores[convention]["mIoU"] == pytest.approx((2 * visible + 2) / 4, abs=1e-6)
            assert scores[convention]["oIoU"] == pytest.approx((2 * visible + 2) / 4)
            assert scores[convention]["P@0.8"] == 1 > scores[convention]["P@0.9"] == 0.5
    assert "LAVT" in outcome.text
    assert "SAMWISE" not in outcome.text
    assert (tmp_path / "out/predictions/testA/COCO_train2014_000000000004").is_dir()


def test_refcoco_refuses_unknown_conventions_and_empty_splits(coco):
    val = open_dataset("refcoco", coco, "val")
    with pytest.raises(UserError, match="convention: got 'coco', want one of referformer"):
        RefCoco((val,), ("coco",))
    with pytest.raises(UserError, match="no expressions in testB"):
        RefCoco((open_dataset("refcoco", coco, "testB"),))


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_gives_the_same_files(world_size, davis, tmp_path):
    benchmark = davis_benchmark(davis)
    alone = evaluate(benchmark, runner(), tmp_path / "alone", shard=Shard())
    shared = [
        evaluate(benchmark, runner(), tmp_path / "shared", shard=Shard(rank, world_size))
        for rank in range(world_size)
    ]
    # Whoever does the last unit scores; a process without units finds it done.
    assert [outcome is None for outcome in shared] == [True, *[False] * (world_size - 1)]
    one, other = (files_of(tmp_path / name / "predictions") for name in ("alone", "shared"))
    assert one == other
    assert one
    assert shared[-1].summary["scores"] == alone.summary["scores"]


@given(
    costs=st.lists(st.integers(0, 5), max_size=20), world_size=st.integers(min_value=1, max_value=7)
)
def test_shares_are_a_partition(costs, world_size):
    items = list(enumerate(costs))
    shares = [Shard(rank, world_size).of(items, lambda item: item[1]) for rank in range(world_size)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_come_from_torchruns_environment(monkeypatch):
    assert Shard.from_environment() == Shard(0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Shard.from_environment() == Shard(1, 3)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="want 0 <= RANK < WORLD_SIZE"):
        Shard.from_environment()


def test_an_interrupted_run_continues_without_redoing_or_losing_videos(davis, tmp_path):
    benchmark = davis_benchmark(davis)
    whole = evaluate(benchmark, runner(), tmp_path / "whole", shard=Shard())
    with pytest.raises(KeyboardInterrupt):
        evaluate(benchmark, runner(ColourModel(fails_after=6)), tmp_path / "out", shard=Shard())
    done = files_of(tmp_path / "out/results")
    assert list(done) == ["blackswan.json"]
    assert not (tmp_path / "out/predictions/anno_0/goldfish").exists()
    again = ColourModel()
    outcome = evaluate(benchmark, runner(again), tmp_path / "out", shard=Shard())
    assert len(again.seen) == 4
    assert files_of(tmp_path / "out/results")["blackswan.json"] == done["blackswan.json"]
    assert outcome.summary["scores"] == whole.summary["scores"]
    assert files_of(tmp_path / "out/predictions") == files_of(tmp_path / "whole/predictions")
    assert not (tmp_path / "out/.unfinished").exists()


KILLED = """
import os, signal
from pathlib import Path
from refsam.data import open_dataset
from refsam.evaluation.runners.benchmark import Runner, evaluate
from refsam.evaluation.runners.inference import find_rules
from refsam.evaluation.runners.ref_davis17 import RefDavis17
from tests.evaluation.known_model import ColourModel
class Failure(BaseException):
    def __init__(self):
        os.kill(os.getpid(), signal.SIGKILL)
benchmark = RefDavis17(open_dataset("ref-davis17", {root!r}, "valid"), "probabilities")
model = ColourModel(fails_after=6, failure=Failure)
evaluate(benchmark, Runner(model, "known", find_rules("default")), Path({out!r}))
"""


def test_a_killed_run_continues(davis, tmp_path, root):
    program = KILLED.format(root=str(davis), out=str(tmp_path / "out"))
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert list(files_of(tmp_path / "out/results")) == ["blackswan.json"]
    assert any((tmp_path / "out/.unfinished").iterdir())
    again = ColourModel()
    outcome = evaluate(davis_benchmark(davis), runner(again), tmp_path / "out", shard=Shard())
    assert len(again.seen) == 4
    assert outcome.summary["scores"][UNSUPERVISED]["mean"]["J&F-Mean"] == 1
    assert not (tmp_path / "out/.unfinished").exists()


def test_pictures_without_a_record_are_done_again(tmp_path):
    run = RunFolder(tmp_path / "out", {"a": 1})
    stale = run.predictions / "v"
    stale.mkdir()
    (stale / "stale.png").write_bytes(b"")
    assert not run.is_done("v")
    with run.unit("v", ["v"]) as (folder, facts):
        (folder / "v" / "fresh.png").write_bytes(b"")
        facts["frames"] = 1
    assert list(files_of(stale)) == ["fresh.png"]
    assert run.record("v") == {"unit": "v", "frames": 1}


def test_a_unit_that_fails_leaves_nothing(tmp_path):
    run = RunFolder(tmp_path / "out", {})
    with pytest.raises(RuntimeError), run.unit("a/b", ["a/b"]) as (folder, _):
        (folder / "a/b/x.png").write_bytes(b"")
        raise RuntimeError
    assert not list((tmp_path / "out/.unfinished").iterdir())
    assert not run.is_done("a/b")
    assert not (run.predictions / "a").exists()


def test_folders_of_other_runs_and_other_files_are_refused(davis, tmp_path):
    evaluate(davis_benchmark(davis), runner(), tmp_path / "out", shard=Shard())
    other = runner(protocol="paper")
    message = "other settings: joint was 'probabilities', now 'logits'; protocol was 'default', now 'paper'; give another"
    with pytest.raises(UserError, match=message):
        evaluate(davis_benchmark(davis, merge="logits"), other, tmp_path / "out", shard=Shard())
    changed = ColourModel()
    changed.weights += 1
    with pytest.raises(UserError, match="weights_sha256 was"):
        evaluate(davis_benchmark(davis), runner(changed), tmp_path / "out", shard=Shard())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        evaluate(davis_benchmark(davis), runner(), tmp_path / "mine", shard=Shard())
    with pytest.raises(UserError, match="is no folder"):
        evaluate(davis_benchmark(davis), runner(), tmp_path / "mine/thesis.txt", shard=Shard())


def test_refused_expressions_stop_the_run_with_a_full_list(mevis, tmp_path):
    model = ColourModel(refuses="that")
    with pytest.raises(MaskProblemsError) as refusal:
        evaluate(mevis_benchmark(mevis), runner(model), tmp_path / "out", shard=Shard())
    assert [problem.kind for problem in refusal.value.problems] == ["expression refused"] * 2
    assert "'all that is not red' (expression: knows no word of" in str(refusal.value)
    assert not files_of(tmp_path / "out/results")
    # The same folder serves once it is said what shall become of them.
    assert evaluate(mevis_benchmark(mevis), runner(model, missing="zero"), tmp_path / "out")


def test_refused_expressions_score_as_empty_if_asked(mevis, tmp_path):
    model = ColourModel(refuses="not red")
    outcome = evaluate(
        mevis_benchmark(mevis), runner(model, missing="zero"), tmp_path / "out", shard=Shard()
    )
    scores = {row["object"]: row["J-Mean"] for row in outcome.summary["objects"]}
    assert scores == {"0": 1, "1": 0, "2": 1}
    line = "9f21474aca92: 1 expression that the model cannot take: all that is not red"
    assert line in outcome.text
    assert line in (tmp_path / "out/report.md").read_text()


def test_missing_frames_are_all_named_before_anything_runs(davis, tmp_path):
    for name in ("blackswan/00001", "goldfish/00003"):
        folder = davis / "valid/JPEGImages" / name.split("/")[0]
        frames = folder.resolve()
        (frames / f"{name.split('/')[1]}.jpg").unlink()
    model = ColourModel()
    with pytest.raises(MaskProblemsError, match="blackswan: 1 frame missing: 00001; goldfish"):
        evaluate(davis_benchmark(davis), runner(model), tmp_path / "out", shard=Shard())
    assert not model.seen
    assert not (tmp_path / "out").exists()


def test_an_unreadable_frame_stops_the_run_and_keeps_what_is_done(davis, tmp_path):
    path = (davis / "valid/JPEGImages/goldfish").resolve() / "00002.jpg"
    content = path.read_bytes()
    path.write_bytes(content[:40])
    with pytest.raises(UserError, match=r"00002\.jpg: cannot be read as an image"):
        evaluate(davis_benchmark(davis), runner(), tmp_path / "out", shard=Shard())
    assert list(files_of(tmp_path / "out/results")) == ["blackswan.json"]
    path.write_bytes(content)
    again = ColourModel()
    assert evaluate(davis_benchmark(davis), runner(again), tmp_path / "out", shard=Shard())
    assert len(again.seen) == 4


def test_submissions_are_reproducible_and_complete(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(b"x")
    for name in ("one.zip", "two.zip"):
        assert write_zip(tmp_path / name, tmp_path, ["a/1.png"], "Annotations") == 1
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with pytest.raises(FileNotFoundError):
        write_zip(tmp_path / "three.zip", tmp_path, ["a/1.png", "a/2.png"])
    assert not list(tmp_path.glob("*three*"))


def command(monkeypatch, *words):
    """Exit code of `refsam evaluate` with the known model."""
    monkeypatch.setattr("refsam.model.load_model", lambda name, **_: ColourModel())
    with pytest.raises(SystemExit) as finished:
        main(["evaluate", *map(str, words), *(() if "refcoco" in words else ("--processes", "1"))])
    return finished.value.code


def test_the_command_prints_rules_scores_speed_and_report(davis, tmp_path, capsys, monkeypatch):
    words = ["ref-davis17", "--root", davis, "--out", tmp_path / "out", "--inference", "paper"]
    assert command(monkeypatch, *words) == 0
    printed = capsys.readouterr().out
    assert "Frames: short side to 360 pixels first" in printed
    assert "Joint map: logits under 0 become 0" in printed
    assert "| mean " in printed
    for stage in ("decode", "encode", "prompt", "decode masks", "write", "all"):
        assert f"| {stage} " in printed
    content = json.loads((tmp_path / "out/scores.json").read_text())
    assert content["speed"]["frames"] == 8
    assert content["speed"]["expression_frames"] == 4 * 8 + 4 * 4
    assert content["made"]["checkpoint"] == "nano"
    page = (tmp_path / "out/report.html").read_text()
    assert "frames/s" in page
    assert "weights_sha256" in page
    assert "encoder_dtype" in page and "bfloat16" in page  # the model was optimized
    # Once more: nothing is left to do, the scores are the same.
    before = files_of(tmp_path / "out/predictions")
    assert command(monkeypatch, *words) == 0
    assert files_of(tmp_path / "out/predictions") == before


def test_the_command_says_what_is_wrong(davis, mevis, coco, tmp_path, capsys, monkeypatch):
    out = ["--out", tmp_path / "out"]
    listed = tmp_path / "videos.txt"
    listed.write_text("blackswan\nbear\n")
    for words, message in (
        (["ref-davis17", "--root", tmp_path / "no"], "no folder"),
        (["ref-davis17", "--root", davis, "--split", "val"], "got split 'val', want"),
        (["ref-davis17", "--root", davis, "--merge", "max"], "want probabilities or logits"),
        (["ref-davis17", "--root", davis, "--protocol", "coco"], "protocol: got 'coco'"),
        (["ref-davis17", "--root", davis, "--inference", "mine"], "want one of default, paper"),
        (["ref-davis17", "--root", davis, "--missing", "x"], "want error or zero"),
        (["ref-davis17", "--root", davis, "--videos", listed], "not in ref-davis17 valid: bear"),
        (["mevis", "--root", mevis, "--truth", tmp_path / "no"], "there is no"),
        (["mevis", "--root", mevis, "--truth-expressions", listed], "without --truth"),
        (["refcoco", "--root", coco, "--dataset", "coco"], "want one of refcoco, refcoco+"),
        (["refcoco", "--root", coco, "--split-by", "umd"], "got split_by 'umd'"),
    ):
        assert command(monkeypatch, *words, *out) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_the_command_runs_a_list_of_videos_and_some_splits(davis, coco, tmp_path, capsys, monkeypatch):  # fmt: skip
    (tmp_path / "videos.txt").write_text("goldfish\n")
    words = ["--root", davis, "--out", tmp_path / "one", "--videos", tmp_path / "videos.txt"]
    assert command(monkeypatch, "ref-davis17", *words) == 0
    assert list(files_of(tmp_path / "one/results")) == ["goldfish.json"]
    words = ["--root", coco, "--out", tmp_path / "two", "--split", "testA"]
    assert command(monkeypatch, "refcoco", *words) == 0
    assert "Convention referformer" in capsys.readouterr().out


def test_another_process_still_at_work_is_said(davis, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(monkeypatch, "ref-davis17", "--root", davis, "--out", tmp_path / "out") == 0
    assert "process 0 of 2: done; others are still at work" in capsys.readouterr().out
    assert not Path(tmp_path / "out/scores.json").exists()
