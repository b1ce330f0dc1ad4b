"""prepare_surreal.py on raw clips in SURREAL's layout, written by code that shares nothing with
it, and the stand-in."""
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

import prepare_surreal as prepare

SCRIPT = Path(prepare.__file__)
ODD = "O'Neil & søn \"x\"_01_c0001"
SMALL = ["--size", "64", "--clusters", "3", "--workers", "0"]


def colour(clip, t):
    """A flat colour by which frame t of a clip is known again, even after H.264 and JPEG."""
    seed = sum(map(ord, clip))
    return np.array([40 + (t * 37) % 160, 40 + (seed * 11) % 160, 40 + (t * 13 + seed * 5) % 160])


def place(t):
    """Top left corner of the person in frame t: moves, so that its joints tell the frame too."""
    return 30 + 7 * (t % 10), 40 + 3 * (t % 10)


def mask(t):
    """(240, 320): a figure, 60 x 100, of label 1 + t % 15, with a head and strips of 17 to 24."""
    labels = np.zeros((240, 320), np.uint8)
    x, y = place(t)
    labels[y:y + 100, x:x + 60] = 1 + t % 15
    labels[y:y + 20, x + 20:x + 40] = 16
    for k in range(8):
        labels[y + 30:y + 40, x + 7 * k:x + 7 * k + 7] = 17 + k
    return labels


def clip_content(name, T):
    """video (T, 240, 320, 3), masks, joints2D (2, 24, T), joints3D (3, 24, T)."""
    rng = np.random.default_rng(sum(map(ord, name)))
    video = np.empty((T, 240, 320, 3), np.uint8)
    flat = np.empty((2, 24, T), np.float32)
    solid = np.empty((3, 24, T), np.float32)
    for t in range(T):
        video[t] = colour(name, t)
        flat[:, :, t] = np.array(place(t))[:, None] + np.arange(24)
        solid[:, :, t] = rng.normal(size=(3, 24)) * 0.1 + 1 + (t % 3)
        solid[:, 5:, t] += 2 * (t % 3)                      # three kinds of poses
    return video, [mask(t) for t in range(T)], flat, solid


def write_video(path, video):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = video.shape[2], video.shape[1], "yuv420p"
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_clip(raw, split, name, T, edit=None):
    """One clip on disk; `edit` may change its content; a part set to None is left out."""
    sequence = name.rsplit("_c", 1)[0]
    folder = raw / split / "run0" / sequence
    folder.mkdir(parents=True, exist_ok=True)
    video, masks, flat, solid = clip_content(name, T)
    if T == 1:
        flat, solid = flat[:, :, 0], solid[:, :, 0]         # as SURREAL has it
    content = dict(video=video, segm={f"segm_{t + 1}": m for t, m in enumerate(masks)},
                   info=dict(joints2D=flat, joints3D=solid, sequence=sequence,
                             stride=np.uint8([[50]])))
    if edit:
        edit(content)
    if content["video"] is not None:
        write_video(folder / f"{name}.mp4", content["video"])
    if content["segm"] is not None:
        savemat(folder / f"{name}_segm.mat", content["segm"], do_compression=True)
    if content["info"] is not None:
        savemat(folder / f"{name}_info.mat", content["info"], do_compression=True)
    return folder


def truncate(path, share):
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def frames(out, split):
    return sorted(path.stem for path in (out / split / "images").iterdir())


def skipped(out):
    with open(out / "skipped.csv", newline="", encoding="utf-8") as file:
        return {(row["clip"], row["frame"]): row["reason"] for row in csv.DictReader(file)}


def run(*options):
    """Exit status, stdout and stderr of the command line."""
    printed, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(errors):
        status = prepare.main([str(option) for option in options])
    return status, printed.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Good clips in all splits, and one of each defect in train."""
    raw = tmp_path_factory.mktemp("surreal") / "cmu"
    for name, T in (("01_01_c0001", 12), ("01_01_c0002", 7), ("ung_90_10_c0001", 1), (ODD, 3)):
        write_clip(raw, "train", name, T)
    write_clip(raw, "val", "02_01_c0001", 10)
    write_clip(raw, "val", "02_01_c0002", 4)
    for name in ("02_01_c0001", "02_01_c0002", "03_01_c0001"):
        write_clip(raw, "test", name, 6)
    (raw / "train" / "run0" / "04_01").mkdir()              # empty sequences are ordinary

    def bad(name, edit=None, T=5):
        return write_clip(raw, "train", name, T, edit) / name

    bad("50_01_c0001", lambda c: c.update(video=None))
    bad("50_01_c0002", lambda c: c.update(segm=None))
    bad("50_01_c0003", lambda c: c.update(info=None))
    truncate(Path(f"{bad('50_01_c0004')}.mp4"), 0.6)
    truncate(Path(f"{bad('50_01_c0005')}_segm.mat"), 0.6)
    truncate(Path(f"{bad('50_01_c0006')}_info.mat"), 0.4)
    bad("50_01_c0007", lambda c: c.update(video=c["video"][:4]))
    bad("50_01_c0008", lambda c: c["segm"].pop("segm_5"))
    bad("50_01_c0009", lambda c: c["segm"].update(segm_6=mask(0)))
    Path(f"{bad('50_01_c0010')}.mp4").write_bytes(b"")
    bad("50_01_c0011", lambda c: c["info"].pop("joints3D"))
    bad("50_01_c0012", lambda c: c["info"].update(joints2D="text"))
    bad("50_01_c0013", lambda c: c["info"].update(joints2D=c["info"]["joints2D"][:, :, :3]))

    def frames_of_60(c):
        c["segm"]["segm_2"][100, 100] = 25                  # an unknown label
        c["segm"]["segm_3"] = c["segm"]["segm_3"][:, :-1]   # another size than the frame
        c["segm"]["segm_4"][:] = 0                          # nobody there
        c["segm"]["segm_5"] = c["segm"]["segm_5"] + 0.5     # no whole numbers
        c["info"]["joints2D"][:, :, 5] = 0
        c["info"]["joints3D"][:, :, 6] = 0
        c["info"]["joints3D"][1, 3, 7] = np.nan
    bad("60_01_c0001", frames_of_60, T=9)
    return raw


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    """Everything from `raw`, and what the program printed."""
    out = tmp_path_factory.mktemp("out") / "surreal"
    status, printed, errors = run("--raw", raw, "--out", out, "--size", 64, "--workers", 2)
    assert status == 0, errors
    return out, printed


def test_exactly_the_good_frames_come_out(prepared):
    out, _ = prepared
    def names(clip, T):
        return [f"{clip}_{t:03d}" for t in range(1, T + 1)]

    assert frames(out, "train") == sorted(
        names("01_01_c0001", 12) + names("01_01_c0002", 7)
        + names("ung_90_10_c0001", 1) + names(ODD, 3)
        + ["60_01_c0001_001", "60_01_c0001_009"])
    assert frames(out, "val") == names("02_01_c0001", 10) + names("02_01_c0002", 4)
    assert frames(out, "test") == names("03_01_c0001", 6)                   # the others are val's
    for split in prepare.SPLITS:
        labels = sorted(path.stem for path in (out / split / "labels").iterdir())
        assert labels == frames(out, split)
        with np.load(out / split / "joints.npz") as stored:
            assert stored["frames"].tolist() == labels and stored["joints"].dtype == np.float32
    assert sorted(path.name for path in out.iterdir()) == [
        "classes.json", "preview.png", "skipped.csv", "test", "train", "val"]


def test_every_skipped_clip_and_frame_has_its_reason(prepared):
    out, printed = prepared
    reasons = skipped(out)
    expected = {
        1: "no mp4", 2: "no segm.mat", 3: "no info.mat", 4: "unreadable video",
        5: "unreadable segm.mat", 6: "unreadable info.mat", 7: "different length",
        8: "different length", 9: "different length", 10: "unreadable video", 11: "wrong joints",
        12: "wrong joints", 13: "wrong joints"}
    for number, reason in expected.items():
        assert reasons.pop((f"50_01_c{number:04d}", "")).split(":")[0] == reason, number
    expected = {
        2: "label out of range: 25", 3: "wrong mask", 4: "no person", 5: "wrong mask",
        6: "joints all zero", 7: "joints all zero", 8: "joints not finite"}
    for number, reason in expected.items():
        assert reasons.pop(("60_01_c0001", str(number))).startswith(reason), number
    assert reasons == {("02_01_c0001", ""): "also in val", ("02_01_c0002", ""): "also in val"}
    assert "different length" in printed and "02_01" not in printed


@pytest.mark.parametrize("split, clip, T", [
    ("train", "01_01_c0001", 12), ("val", "02_01_c0001", 10), ("train", "ung_90_10_c0001", 1)])
def test_image_label_and_joints_of_the_same_frame_stay_together(prepared, split, clip, T):
    out, _ = prepared
    with np.load(out / split / "joints.npz") as stored:
        joints = dict(zip(stored["frames"].tolist(), stored["joints"]))
    for t in range(T):
        frame = f"{clip}_{t + 1:03d}"
        image = np.asarray(Image.open(out / split / "images" / f"{frame}.jpg")).astype(int)
        label = Image.open(out / split / "labels" / f"{frame}.png")
        assert label.mode == "P" and image.shape == (64, 64, 3)
        own, other = (np.abs(image.mean(axis=(0, 1)) - colour(clip, s)).max()
                      for s in (t, (t + 1) % 10))
        assert own < 6 < other
        # the person is 60 x 100: side 120, placed at its middle, no repair needed
        x, y = place(t)
        left, top = max(0, x + 30 - 60), max(0, y + 50 - 60)
        centres = ((np.arange(64) + 0.5) * 120 / 64).astype(int)
        expected = mask(t)[top:top + 120, left:left + 120][centres][:, centres]
        assert np.array_equal(np.asarray(label), expected)
        expected = (np.array([x, y]) + np.arange(24)[:, None] - (left, top) + 0.5) * 64 / 120 - 0.5
        assert np.allclose(joints[frame], expected, atol=1e-4)


def test_classes_json_describes_the_folder(prepared):
    out, _ = prepared
    classes = json.loads((out / "classes.json").read_text())
    names, mirror = classes["names"], classes["mirror"]
    assert names[16] == "head" and [names[i] for i in mirror] == [
        n.replace("left", "?").replace("right", "left").replace("?", "right") for n in names]
    assert len(classes["groups"]) == 13
    assert sorted(i for group in classes["groups"].values() for i in group) == list(range(25))
    assert classes["joint_mirror"][:3] == [0, 2, 1] and classes["joint_mirror"][22:] == [23, 22]
    labels = [np.asarray(Image.open(path)) for path in (out / "train" / "labels").iterdir()]
    pixels = np.bincount(np.concatenate(labels).ravel(), minlength=256)
    assert classes["pixels"] == pixels[:25].tolist()
    images = np.stack([np.asarray(Image.open(path))
                       for path in (out / "train" / "images").iterdir()])
    images = images.reshape(-1, 3) / 255
    assert np.allclose(classes["mean"], images.mean(axis=0), atol=0.01)
    assert np.allclose(classes["std"], images.std(axis=0), atol=0.01)
    assert len({tuple(c) for c in classes["palette"]}) == 25 and "SURREAL" in classes["source"]
    first = next((out / "train" / "labels").iterdir())
    assert Image.open(first).getpalette()[:75] == sum(classes["palette"], [])
    assert Image.open(out / "preview.png").size == (8 * 160, 2 * 2 * 160)


def test_a_finished_folder_is_left_alone(raw, prepared):
    out, _ = prepared
    before = files(out)
    status, printed, _ = run("--raw", raw, "--out", out, "--size", 64, "--workers", 1)
    assert status == 0 and "already prepared" in printed
    status, _, errors = run("--raw", raw, "--out", out, "--size", 96, "--workers", 1)
    assert status == 2 and "size 64 there, 96 here" in errors and errors.count("\n") == 1
    assert files(out) == before
    (out.parent / "mine").mkdir()
    (out.parent / "mine" / "thesis.txt").write_text("precious")
    (out.parent / "file").write_text("")
    assert prepare.main(["--raw", str(raw), "--out", str(out.parent / "file")]) == 2
    status, _, _ = run("--raw", raw, "--out", out.parent / "mine")
    assert status == 2 and files(out.parent / "mine") == {"thesis.txt": b"precious"}


def test_killed_again_and_again_it_ends_with_the_same_files(raw, prepared, tmp_path):
    out, kills = tmp_path / "surreal", 0
    command = ["--raw", str(raw), "--out", str(out), "--size", "64", "--workers"]
    for images, workers in ((1, "0"), (9, "2"), (20, "0")):  # kill -9 as soon as so many are there
        process = subprocess.Popen([sys.executable, str(SCRIPT), *command, workers],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("*/images/*.jpg"))) < images:
            time.sleep(0.002)
        kills += process.poll() is None
        process.kill()
        process.wait()
        for path in out.glob("*/images/*.jpg"):
            Image.open(path).load()                         # whole or not there
    assert kills >= 2 and prepare.main([*command, "0"]) == 0
    assert files(out) == files(prepared[0])


@pytest.mark.parametrize("stop", range(1, 60, 7))
def test_interrupted_between_any_two_files_it_ends_with_the_same_files(
        raw, prepared, tmp_path, stop, monkeypatch):
    """The n-th file is never written; the temporary one stays behind half full."""
    write, written = prepare.write_whole, []

    class Power(BaseException):
        pass

    def failing(out, path, data):
        written.append(path)
        if len(written) == stop:
            (out / ".parts" / "1.tmp").write_bytes(data[:len(data) // 2])
            raise Power
        write(out, path, data)

    command = ["--raw", str(raw), "--out", str(tmp_path / "out"), "--size", "64", "--workers", "0"]
    monkeypatch.setattr(prepare, "write_whole", failing)
    with pytest.raises(Power):
        prepare.main(command)
    assert not (tmp_path / "out" / "classes.json").exists()
    monkeypatch.setattr(prepare, "write_whole", write)
    assert prepare.main(command) == 0
    assert files(tmp_path / "out") == files(prepared[0])


def test_the_choice_is_seeded_and_independent_of_workers(raw, tmp_path):
    def chosen(name, *options):
        command = ["--raw", str(raw), "--out", str(tmp_path / name), "--size", "32", "--clusters",
                   "3", "--train", "9", "--val", "6", "--test", "3", *options]
        assert prepare.main(command) == 0
        return {split: frames(tmp_path / name, split) for split in prepare.SPLITS}

    first = chosen("a", "--workers", "0")
    assert chosen("b", "--workers", "2") == first != chosen("c", "--workers", "0", "--seed", "1")
    assert Counter(name[:-4] for name in first["val"]) == {"02_01_c0001": 3, "02_01_c0002": 3}
    assert len(first["test"]) == 3 and all(name.startswith("03_01") for name in first["test"])
    excluded = chosen("d", "--workers", "0", "--exclude", "01_0?", "60_01_c*")
    assert not any(name.startswith(("01_01", "60_01")) for name in excluded["train"])


def test_spread_takes_the_same_number_from_every_cluster_and_clip():
    rng = np.random.default_rng(0)
    sizes, clips = (600, 300, 20), 10
    poses = np.concatenate([rng.normal(size=(n, 72)) * 0.1 + 5 * k for k, n in enumerate(sizes)])
    poses = poses.astype(np.float32)
    kind = np.repeat(range(3), sizes)
    clip_of = np.concatenate([np.arange(n) * clips // n for n in sizes])
    order = np.argsort(clip_of, kind="stable")
    poses, kind, clip_of = poses[order], kind[order], clip_of[order]
    rows = prepare.pick(clip_of, poses, 220, "spread", 3, np.random.default_rng(1))
    assert np.bincount(kind[rows]).tolist() == [100, 100, 20]  # the small one gives all it has
    assert np.bincount(clip_of[rows][kind[rows] == 0]).tolist() == [10] * 10
    assert len(set(rows.tolist())) == 220 and (np.diff(rows) > 0).all()
    gaps = np.diff(rows[(kind[rows] == 0) & (clip_of[rows] == 0)])
    assert gaps.min() >= 5 and gaps.max() <= 7  # 10 of the clip's 60
    one = prepare.pick(clip_of, poses, 250, "cluster", 3, np.random.default_rng(1))
    assert len(one) == 300 and set(kind[one]) == {1}
    assert len(prepare.pick(clip_of, poses, 920, "cluster", 3, rng)) == 920    # no more are there


@pytest.mark.parametrize("sizes, wanted, expected", [
    ([5, 5, 5], 6, [2, 2, 2]), ([1, 10, 10], 9, [1, 4, 4]), ([3, 0, 2], 9, [3, 0, 2]),
    ([4, 4], 0, [0, 0])])
def test_share_by_hand(sizes, wanted, expected):
    assert prepare.share(sizes, wanted, np.random.default_rng(0)).tolist() == expected


def test_kmeans_finds_separate_clusters_as_scipy_does():
    from scipy.cluster.vq import kmeans2
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(6, 72)) * 4
    truth = rng.integers(0, 6, 3000)
    poses = (centres[truth] + rng.normal(size=(3000, 72)) * 0.3).astype(np.float32)
    found = prepare.kmeans(poses, 6, np.random.default_rng(0))
    _, expected = kmeans2(poses, centres.astype(np.float32), minit="matrix")
    for cluster in range(6):
        assert len(set(found[expected == cluster])) == 1
    assert len(set(found)) == 6
    assert np.array_equal(found, prepare.kmeans(poses, 6, np.random.default_rng(0)))


def picture(text, symbols):
    return np.array([[symbols[c] for c in row] for row in text.split()], np.uint8)


def test_stray_head_pixels_are_refilled_by_hand():
    symbols = {".": 0, "H": 16, "c": 10, "p": 1, "s": 4}
    before = picture("""..HHH.......
                        ..HHH.......
                        ...H........
                        .ccccc......
                        .cHccc....H.
                        .cccHH......
                        .pppHH......
                        HpppHs......
                        .ppppp......""", symbols)
    # (row, column): (4, 2) sees 8 chest. The block is one ring: (5, 4) sees 5 c and 1 p, (5, 5) c
    # and background: c; (6, 4) c, p p and s; (6, 5) s and background: s; (7, 4) p. (4, 10) sees
    # background alone; (7, 0) p, although it sees more background.
    after = picture("""..HHH.......
                       ..HHH.......
                       ...H........
                       .ccccc......
                       .ccccc......
                       .ccccc......
                       .pppps......
                       ppppps......
                       .ppppp......""", symbols)
    labels = before.copy()
    assert prepare.repair_head(labels) == 8
    assert np.array_equal(labels, after)
    assert prepare.repair_head(labels) == 0  # and nothing more to do


def test_a_large_stray_patch_fills_from_its_border_inwards():
    labels = np.zeros((60, 60), np.uint8)
    labels[2:22, 2:22] = 16
    labels[30:50, 10:50] = 10
    labels[30:50, 30:50] = 1
    labels[35:45, 25:35] = 16
    labels[33, 22] = 16  # diagonal neighbours are one component
    labels[34, 23] = 16
    prepare.repair_head(labels)
    assert (labels == 16).sum() == 400
    assert (labels[35:45, 25:30] == 10).all() and (labels[35:45, 30:35] == 1).all()
    assert labels[33, 22] == labels[34, 23] == 10


@pytest.mark.parametrize("box, margin, expected", [
    ((100, 150, 60, 160), 0.1, (65, 50, 120)),          # side 1.2 * 100, centred at (125, 110)
    ((0, 40, 100, 200), 0.1, (0, 90, 120)),             # moved right into the frame
    ((290, 320, 140, 240), 0.1, (200, 120, 120)),       # moved left and up
    ((100, 200, 0, 220), 0.1, (18, -22, 264)),          # higher than the frame, which lies inside
    ((0, 320, 100, 120), 0.1, (-32, -82, 384)),         # wider than the frame
    ((10, 11, 20, 21), 0.0, (10, 20, 1)),
])
def test_crop_geometry_by_hand(box, margin, expected):
    labels = np.zeros((240, 320), np.uint8)
    labels[box[2]:box[3], box[0]:box[1]] = 3
    assert prepare.crop_box(labels, margin) == expected


def test_padding_is_the_mean_colour_and_the_ignored_label():
    image = np.zeros((240, 320, 3), np.uint8)
    image[:, 160:] = (200, 100, 50)
    labels = np.zeros((240, 320), np.uint8)
    labels[0:220, 100:200] = 1
    joints = np.full((24, 2), (18, -22), np.float32)    # the corner of the crop, whose side is 264
    cropped, label, moved = prepare.crop_frame(image, labels, joints, 264, 0.1)
    cropped, label = np.asarray(cropped), np.asarray(label)
    outside = np.r_[0:22, 262:264]
    assert (cropped[outside] == (100, 50, 25)).all() and (label[outside] == 255).all()
    assert np.array_equal(cropped[22:262], image[:, 18:282])
    assert np.array_equal(label[22:262], labels[:, 18:282])
    assert (moved == 0).all()
    _, _, moved = prepare.crop_frame(image, labels, joints, 132, 0.1)
    assert (moved == -0.25).all()                       # (0 + 0.5) / 2 - 0.5


@pytest.mark.parametrize("options, says", [
    (["--raw", "no/such/folder", "--out", "x"], "no/such/folder"),
    (["--raw", ".", "--out", "x"], "train/run0"),
    (["--raw", ".", "--out", "x", "--train", "-3"], "-3"),
    (["--raw", ".", "--out", "x", "--val", "many"], "many"),
    (["--raw", ".", "--out", "x", "--margin", "nan"], "nan"),
    (["--raw", ".", "--out", "x", "--size", "0"], "'0'"),
    (["--raw", ".", "--out", "x", "--clusters", "0"], "'0'"),
    (["--raw", ".", "--out", "x", "--workers", "-1"], "-1"),
    (["--raw", ".", "--out", "x", "--clips", "3"], "--synthesize"),
    (["--raw", ".", "--synthesize", "--out", "x"], "not allowed"),
    (["--out", "x"], "--raw"),
    (["--raw", ".", "--out", "x", "--trian", "3"], "--trian"),
])
def test_bad_options_get_one_sentence(options, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = prepare.main(options)
    except SystemExit as stop:
        status = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and says in lines[-1] and len(lines) == 1 and not any(tmp_path.iterdir())


def test_nothing_usable_is_one_sentence(tmp_path, capsys):
    raw = tmp_path / "cmu"
    write_clip(raw, "train", "01_01_c0001", 2,
               lambda c: c["segm"].update({key: 0 * m for key, m in c["segm"].items()}))
    command = ["--raw", str(raw), "--out", str(tmp_path / "out"), *SMALL]
    assert prepare.main(command) == 2 and "skipped.csv says why" in capsys.readouterr().err
    write_clip(raw, "train", "01_01_c0001", 2)  # mended: the same command now works
    assert prepare.main(command) == 0 and len(frames(tmp_path / "out", "train")) == 2


def test_garbled_files_cost_only_their_clip(tmp_path):
    """Bits flipped, bytes cut out and put in: no traceback, and the good clip comes out."""
    raw, rng = tmp_path / "cmu", np.random.default_rng(0)
    write_clip(raw, "train", "01_01_c0001", 4)
    for number in range(1, 61):
        name = f"70_01_c{number:04d}"
        folder = write_clip(raw, "train", "70_01_c0000", 4)
        for ending in (".mp4", "_segm.mat", "_info.mat"):
            os.replace(folder / f"70_01_c0000{ending}", folder / (name + ending))
        path = folder / (name + (".mp4", "_segm.mat", "_info.mat")[number % 3])
        data = bytearray(path.read_bytes())
        for _ in range(rng.integers(1, 20)):
            at = rng.integers(len(data))
            if number % 2:
                data[at] ^= 1 << rng.integers(8)
            else:
                data[at:at + rng.integers(3)] = rng.bytes(rng.integers(3))
        path.write_bytes(data)
    status, _, errors = run("--raw", raw, "--out", tmp_path / "out", "--size", 32, "--workers", 2)
    assert status == 0, errors
    found = frames(tmp_path / "out", "train")
    good = [f"01_01_c0001_{t:03d}" for t in range(1, 5)]
    assert [name for name in found if name[:2] == "01"] == good
    for frame in found:
        image = np.asarray(Image.open(tmp_path / "out" / "train" / "images" / f"{frame}.jpg"))
        truth = colour("01_01_c0001" if frame[:2] == "01" else "70_01_c0000", int(frame[-3:]) - 1)
        assert image.shape == (32, 32, 3) and np.abs(image.mean(axis=(0, 1)) - truth).max() < 40


def die_or_double(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def test_a_process_that_dies_costs_one_job():
    results = dict(prepare.in_parallel(die_or_double, [(n,) for n in range(8)], 2))
    assert results == {(n,): None if n == 3 else 2 * n for n in range(8)}


def spin(number):
    while number:
        pass
    return "done"


def test_a_job_that_hangs_is_ended():
    found = dict(prepare.in_parallel(spin, [(0,), (1,)], 1, seconds=0.5))
    assert found == {(0,): "done", (1,): None}


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(
        raw, prepared, tmp_path, monkeypatch, capsys):
    command = ["--raw", str(raw), "--out", str(tmp_path / "out"), "--size", "64", "--workers", "0"]
    write = prepare.write_whole

    def full(out, path, data):
        if path.endswith("_005.png"):
            raise OSError(28, "No space left on device", str(out / path))
        write(out, path, data)
    monkeypatch.setattr(prepare, "write_whole", full)
    assert prepare.main(command) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "the same command goes on" in error
    monkeypatch.setattr(prepare, "write_whole", write)
    assert prepare.main(command) == 0
    assert files(tmp_path / "out") == files(prepared[0])


# -------------------------------------------- the stand-in

def test_rendered_clips_hold_together_and_depend_on_the_seed_alone(tmp_path):
    """Joints lie on their parts, sides are not swapped, every part occurs, workers are alike."""
    first, second = tmp_path / "first", tmp_path / "second"
    prepare.synthesize(first, 6, 2, seed=3, workers=0)
    prepare.synthesize(second, 6, 2, seed=3, workers=2)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 1 + 3 * (6 + 2 + 2)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    seen, own, other = set(), [], []
    for path in first.rglob("*_info.mat"):
        joints = loadmat(path)["joints2D"]                              # (2, 24, T)
        masks = loadmat(str(path).replace("_info", "_segm"))
        for t in range(2):
            mask = masks[f"segm_{t + 1}"]
            seen |= set(np.unique(mask).tolist())
            for side in ("left", "right"):
                part = prepare.NAMES.index(f"{side}ForeArm")
                twin = prepare.MIRROR[part]
                rows, columns = np.nonzero(mask == part)
                if len(rows) > 20:
                    centre = np.array([columns.mean(), rows.mean()])
                    own.append(np.linalg.norm(centre - joints[:, part - 1, t]))
                    other.append(np.linalg.norm(centre - joints[:, twin - 1, t]))
    assert seen == set(range(25))
    assert len(own) > 8 and np.median(own) < 12 and np.median(own) < np.median(other) / 1.5
    with pytest.raises(prepare.Problem, match="other settings"):
        prepare.synthesize(first, 3, 2, seed=3)
    prepare.synthesize(tmp_path / "single", 1, 1)
    info = loadmat(next((tmp_path / "single" / "train").rglob("*_info.mat")))
    assert info["joints2D"].shape == (2, 24) and info["joints3D"].shape == (3, 24)
