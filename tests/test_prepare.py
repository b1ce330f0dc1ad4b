"""prepare_surreal.py on clips in SURREAL's layout, and on own pictures, that are written here."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import prepare_surreal as prepare

ODD = "O'Neil & søn \"x\"_01_c0001"


def colour(clip, t):
    """A flat colour that tells frame t of a clip from the others, even after H.264 and JPEG."""
    seed = sum(map(ord, clip))
    return np.array([40 + (t * 37) % 160, 40 + (seed * 11) % 160, 40 + (t * 13 + seed * 5) % 160])


def corner(t):
    """Top left corner of the person in frame t. It moves, so that joints tell the frame too."""
    return 30 + 7 * (t % 10), 40 + 3 * (t % 10)


def draw_mask(t):
    """(240, 320): a figure, 60 x 100, of label 1 + t % 15, with a head and strips of 17 to 24."""
    labels = np.zeros((240, 320), np.uint8)
    x, y = corner(t)
    labels[y:y + 100, x:x + 60] = 1 + t % 15
    labels[y:y + 20, x + 20:x + 40] = 16
    labels[y + 30:y + 40, x:x + 56] = np.repeat(np.arange(17, 25), 7)
    return labels


def write_clip(run, name, T, edit=lambda video, masks, info: None):
    """One clip on disk, in the folder of its sequence; `edit` may change what is written."""
    folder = run / name.rsplit("_c", 1)[0]
    folder.mkdir(parents=True, exist_ok=True)
    joints = np.arange(24)
    flat = [np.add.outer(corner(t), joints) + [0 * joints, joints] for t in range(T)]
    solid = [np.random.default_rng(t).normal(size=(3, 24)) for t in range(T)]
    video = [np.full((240, 320, 3), colour(name, t), np.uint8) for t in range(T)]
    masks = {f"segm_{t + 1}": draw_mask(t) for t in range(T)}
    info = dict(
        joints2D=np.squeeze(np.float32(flat).transpose(1, 2, 0)),       # T = 1: as SURREAL has it
        joints3D=np.squeeze(np.float32(solid).transpose(1, 2, 0)))
    edit(video, masks, info)
    with av.open(str(folder / f"{name}.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for image in video:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    savemat(folder / f"{name}_segm.mat", masks, do_compression=True)
    savemat(folder / f"{name}_info.mat", info, do_compression=True)
    return folder / name


def files(folder):
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def frames(out, split):
    return sorted(path.stem for path in (out / split / "images").iterdir())


def reasons(out):
    with open(out / "skipped.csv", newline="", encoding="utf-8") as file:
        return {(row["clip"], row["frame"]): row["reason"] for row in csv.DictReader(file)}


def load(out, split, frame):
    """One prepared frame: image, labels and joints as arrays."""
    with np.load(out / split / "joints.npz") as stored:
        joints = dict(zip(stored["frames"].tolist(), stored["joints"]))
    image = Image.open(out / split / "images" / f"{frame}.jpg")
    labels = Image.open(out / split / "labels" / f"{frame}.png")
    return np.asarray(image).astype(int), np.asarray(labels), joints[frame]


def run(*options):
    return prepare.main([str(option) for option in options])


def spoil_frames(video, masks, info):
    masks["segm_1"] = masks["segm_1"].astype(float)         # whole numbers are good
    masks["segm_2"][100, 100] = 25
    masks["segm_3"] = masks["segm_3"][:, :-1]
    masks["segm_4"] = masks["segm_4"] + 0.5
    info["joints2D"][:, :, 4] = 0
    info["joints2D"][1, 3, 5] = np.nan
    masks["segm_7"][:] = 0


DEFECTS = [     # what is done to a clip of five frames, and its reason in skipped.csv
    (lambda video, masks, info: video.pop(), "length"),
    (lambda video, masks, info: masks.pop("segm_5"), "length"),
    (lambda video, masks, info: masks.update(segm_6=draw_mask(0)), "length"),
    (lambda video, masks, info: info.update(joints2D=info["joints2D"][:, :, :4]), "dimension"),
    (lambda video, masks, info: info.update(joints3D="text"), "info.mat"),
    (lambda video, masks, info: info.pop("joints2D"), "joints2D")]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Good clips in all splits, and one of each defect in train."""
    raw = tmp_path_factory.mktemp("surreal") / "cmu"
    train = raw / "train" / "run0"
    for name, T in (("01_01_c0001", 12), ("ung_90_10_c0001", 1), (ODD, 3)):
        write_clip(train, name, T)
    (train / "01_01" / "._01_01_c0003.mp4").write_bytes(b"")        # macOS writes such files
    write_clip(train / "one folder too deep", "01_01_c0002", 7)
    for path in (train / "ung_90_10").iterdir():
        path.rename(train / path.name)                      # lies flat in run0
    linked = raw / "linked"
    write_clip(linked, "04_01_c0001", 2)
    (train / "04_01").symlink_to(linked / "04_01")
    write_clip(raw / "val" / "run0", "02_01_c0003", 10)
    for number in range(1, 6):                              # 3 is in val, 2 and 4 are beside it
        write_clip(raw / "test" / "run0", f"02_01_c000{number}", 2)
        write_clip(raw / "test" / "run0", f"ung_02_01_c000{number}", 2)
    write_clip(raw / "test" / "run0", "03_01_c0003", 10)
    for number, part in enumerate((".mp4", "_segm.mat", "_info.mat"), 1):
        Path(f"{write_clip(train, f'50_01_c000{number}', 5)}{part}").unlink()
        os.truncate(f"{write_clip(train, f'50_02_c000{number}', 5)}{part}", 900)
    for number, (edit, _) in enumerate(DEFECTS, 1):
        write_clip(train, f"50_03_c000{number}", 5, edit)
    write_clip(train, "60_01_c0001", 9, spoil_frames)
    return raw


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    """Everything from `raw`, with workers that start by spawn, and without torch."""
    out, script = tmp_path_factory.mktemp("out") / "surreal", raw.parent / "spawn.py"
    script.write_text(
        "import multiprocessing, sys\nimport prepare_surreal\nif __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n    status = prepare_surreal.main()\n"
        "    sys.exit(status or 'torch' in sys.modules or 'av' in sys.modules)")
    command = [sys.executable, script, "--raw", raw, "--out", out, "--size", "64", "--workers", "2"]
    environment = os.environ | dict(PYTHONPATH=str(Path(prepare.__file__).parent))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "18 clips" in done.stdout.splitlines()[-1]
    return out


def test_a_broken_clip_or_frame_costs_that_alone_and_has_its_reason(prepared):
    good = (("01_01_c0001", 12), ("01_01_c0002", 7), ("04_01_c0001", 2), ("ung_90_10_c0001", 1),
            (ODD, 3))
    expected = [f"{clip}_{t:03d}" for clip, T in good for t in range(1, T + 1)]
    expected += [f"60_01_c0001_00{t}" for t in (1, 8, 9)]
    assert frames(prepared, "train") == sorted(expected)
    assert frames(prepared, "val") == [f"02_01_c0003_{t:03d}" for t in range(1, 11)]
    texts = {(f"50_0{k}_c000{n}", ""): text for k in (1, 2)
             for n, text in enumerate(("mp4", "segm", "info"), 1)}
    texts |= {(f"50_03_c000{n}", ""): text for n, (_, text) in enumerate(DEFECTS, 1)}
    bad = ["mask", "mask", "mask", "joints", "joints", "no person"]
    texts |= {("60_01_c0001", str(t)): text for t, text in enumerate(bad, 2)}
    for motion in ("02_01", "ung_02_01"):
        for number in (2, 3, 4):
            texts[f"{motion}_c000{number}", ""] = "shares poses with a val clip"
    texts["02_01_c0003", ""] = "also in val"
    found = reasons(prepared)
    assert found.keys() == texts.keys()
    assert all(texts[key] in reason for key, reason in found.items()), found


def test_clips_of_test_that_share_poses_with_val_are_left_out(prepared):
    left = [f"{clip}_00{t}" for clip in ("02_01_c0001", "02_01_c0005", "ung_02_01_c0001",
                                         "ung_02_01_c0005") for t in (1, 2)]
    left += [f"03_01_c0003_{t:03d}" for t in range(1, 11)]
    assert frames(prepared, "test") == sorted(left)


def test_clips_of_run1_overlap_further(tmp_path):
    for split, numbers in (("train", [1]), ("val", [5]), ("test", range(1, 11))):
        for number in numbers:
            folder = tmp_path / split / "run1" / "07_01"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"07_01_c{number:04d}.mp4").touch()
    found, _ = prepare.select_clips(tmp_path, 1, [])        # 30 frames apart: 5 - 3 still shares
    assert [*found["test"]] == ["07_01_c0001", "07_01_c0009", "07_01_c0010"]


def test_image_labels_and_joints_of_a_frame_belong_together(raw, prepared):
    poses, _ = prepare.read_poses(raw / "train/run0/01_01/01_01_c0001_info.mat")
    assert poses.shape == (12, 72) and not poses[:, :3].any()
    cases = [("train", "01_01_c0001", t) for t in range(12)]
    cases += [("train", "ung_90_10_c0001", 0), ("val", "02_01_c0003", 3)]
    for split, clip, t in cases:
        image, labels, joints = load(prepared, split, f"{clip}_{t + 1:03d}")
        mean = image.mean(axis=(0, 1))
        own, other = (np.abs(mean - colour(clip, s)).max() for s in (t, (t + 1) % 10))
        assert image.shape == (64, 64, 3) and own < 6 < other
        x, y = corner(t)                                    # 60 x 100: side 120, centred
        left, top = max(0, x + 30 - 60), max(0, y + 50 - 60)
        centres = ((np.arange(64) + 0.5) * 120 / 64).astype(int)
        crop = draw_mask(t)[top:top + 120, left:left + 120]
        assert np.array_equal(labels, crop[centres][:, centres])
        place = np.array([x, y]) + np.arange(24)[:, None] * (1, 2)
        assert np.allclose(joints, (place - (left, top)) * 64 / 120 - 0.5, atol=1e-4)


def test_classes_json_describes_the_folder(prepared):
    classes = json.loads((prepared / "classes.json").read_text())
    names, mirror = classes["names"], classes["mirror"]
    for name, twin in zip(names, mirror):
        swapped = name.replace("left", "?").replace("right", "left").replace("?", "right")
        assert names[twin] == swapped
    assert classes["joint_mirror"] == [i - 1 for i in mirror[1:]]
    assert len(names) == 25 and names[16] == "head" and classes["groups"]["Torso"] == [1, 4, 7, 10]
    assert sorted(sum(classes["groups"].values(), [])) == list(range(25))
    train = [load(prepared, "train", name) for name in frames(prepared, "train")]
    images, labels, _ = zip(*train)
    assert classes["pixels"] == np.bincount(np.ravel(labels), minlength=25).tolist()
    pixels = np.reshape(images, (-1, 3)) / 255
    assert np.allclose(classes["mean"], pixels.mean(axis=0), atol=0.005)
    assert np.allclose(classes["std"], pixels.std(axis=0), atol=0.005)
    assert classes["size"] == 64 and classes["source"].startswith("SURREAL")
    label = Image.open(prepared / "train" / "labels" / "01_01_c0001_001.png")
    assert label.mode == "P" and label.getpalette()[:75] == sum(classes["palette"], [])
    above, below = np.split(np.asarray(Image.open(prepared / "preview.png")), (160,))
    assert len(below) == 160 and above.std() > 0 and (above != below).any()


def test_a_folder_is_never_overwritten(raw, prepared, tmp_path, capsys):
    before = files(prepared)
    assert run("--raw", raw, "--out", prepared, "--size", 96) == 2
    assert "'size': 64" in capsys.readouterr().err and files(prepared) == before
    (tmp_path / "thesis.txt").write_text("precious")
    assert run("--raw", raw, "--out", tmp_path) == 2
    assert run("--raw", raw, "--out", tmp_path / "thesis.txt") == 2
    assert files(tmp_path) == {"thesis.txt": b"precious"}


def test_killed_or_interrupted_it_goes_on_and_ends_with_the_same_files(raw, prepared, tmp_path):
    out = tmp_path / "surreal"
    command = [sys.executable, prepare.__file__, "--raw", raw, "--out", out, "--size", "64"]
    for number, status, records in ((signal.SIGKILL, -9, 2), (signal.SIGINT, 130, 4)):
        process = subprocess.Popen([*command, "--workers", "2"], start_new_session=True, text=True,
                                   stderr=subprocess.PIPE)
        while process.poll() is None and len(list(out.glob(".parts/*/*.json"))) < records:
            time.sleep(0.002)
        os.killpg(process.pid, number)                      # to its workers too, as Ctrl-C
        errors = process.communicate()[1]                   # ends when no worker is left
        assert process.returncode in (status, 0) and "Traceback" not in errors
    assert run(*command[2:], "--workers", 0) == 0
    assert files(out) == files(prepared)


@pytest.fixture
def three(tmp_path):
    """A small folder of clips, one a split, and the options to prepare all of it."""
    raw = tmp_path / "cmu"
    for number, split in enumerate(prepare.SPLITS, 1):
        write_clip(raw / split / "run0", f"0{number}_01_c0001", 4)
    return raw, ["--raw", raw, "--out", tmp_path / "out", "--size", 32, "--workers", 0]


def test_a_mended_clip_is_tried_again_and_late_clips_do_not_enter(three, capsys):
    raw, options = three
    out = options[3]
    broken = write_clip(raw / "train" / "run0", "05_01_c0001", 4)
    whole = Path(f"{broken}.mp4").read_bytes()
    os.truncate(f"{broken}.mp4", 900)
    assert run(*options) == 0
    assert "1 clips" in capsys.readouterr().out.splitlines()[-1]
    assert len(frames(out, "train")) == 4 and len(reasons(out)) == 1
    Path(f"{broken}.mp4").write_bytes(whole)
    write_clip(raw / "train" / "run0", "06_01_c0001", 4)
    assert run(*options) == 0
    assert len(frames(out, "train")) == 8 and not reasons(out)      # no frame of 06_01
    classes = json.loads((out / "classes.json").read_text())
    assert sum(classes["pixels"]) == 8 * 32 * 32
    assert not (out / ".parts").exists()
    assert run(*options) == 0
    assert "ready" in capsys.readouterr().out


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_systems_end_of_a_worker_is_one_sentence(three, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "extract", die)
    assert run(*three[1][:-1], 1) == 2
    error, = [line for line in capsys.readouterr().err.splitlines() if "surreal.py:" in line]
    assert "memory" in error and "--workers" in error


@pytest.mark.parametrize("options, says", [
    (["--exclude", "05_*"], "05_*"), (["--pick", "cluster", "--train", 5], "--train 5")])
def test_a_choice_that_cannot_be_made_is_one_sentence(options, says, three, capsys):
    assert run(*three[1], *options) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not three[1][3].exists()


def test_the_choice_is_seeded_evenly_spaced_and_excludes(raw, tmp_path):
    found = []
    excluded = ["--exclude", "01_*", "60_01_c0001", "--exclude", "50_*"]
    for name, *options in (["a"], ["b", "--seed", 1], ["c", *excluded]):
        assert run("--raw", raw, "--out", tmp_path / name, "--size", 32, "--clusters", 3, "--train",
                   9, "--val", 5, "--test", 3, "--workers", 0, *options) == 0
        found.append([frames(tmp_path / name, split) for split in prepare.SPLITS])
    assert found[0] != found[1] and [len(names) for names in found[0][1:]] == [5, 3]
    numbers = [int(name[-3:]) for name in found[0][1]]
    assert set(np.diff(numbers)) == {2}                     # 5 of 10
    assert {name[:3] for name in found[2][0]} == {"ung", "O'N", "04_"}


def test_spread_takes_as_many_of_every_cluster_and_cluster_the_nearest_size():
    rng, sizes = np.random.default_rng(0), (600, 300, 20)
    kind = rng.permutation(np.repeat(range(3), sizes))
    poses = (5 * kind[:, None] + rng.normal(size=(920, 72)) * 0.1).astype(np.float32)
    rows = prepare.pick(poses, 221, "spread", 3, np.random.default_rng(1))
    assert sorted(np.bincount(kind[rows])) == [20, 100, 101] and (np.diff(rows) > 0).all()
    of_first = np.searchsorted(np.flatnonzero(kind == 0), rows[kind[rows] == 0])
    assert set(np.diff(of_first)) == {5, 6}
    assert set(kind[prepare.pick(poses, 250, "cluster", 3, rng)]) == {1}
    counts = [len(prepare.pick(poses, wanted, "spread", 3, rng)) for wanted in (0, 920, 2000)]
    assert counts == [0, 920, 920]


def picture(text):
    return np.array([[{".": 0, "H": 16, "c": 10, "p": 1, "s": 4}[symbol] for symbol in row]
                     for row in text.split()], np.uint8)


@pytest.mark.parametrize("before, after", [
    # (5, 4), (5, 5) see most c, (6, 4) p, (6, 5) s, (4, 10) background alone, (7, 0) three p.
    ("""HHHHHHHHH.. HHHHHHHHH.. HHHHHHHHH.. .ccccc..... .cHccc....H .cccHH..... .pppHH.....
        HpppHs..... .ppppp.....""",
     """HHHHHHHHH.. HHHHHHHHH.. HHHHHHHHH.. .ccccc..... .ccccc..... .ccccc..... .pppps.....
        ppppps..... .ppppp....."""),
    ("HHHHHHHHHH ppppppppp. HHcccccccc", "HHHHHHHHHH ppppppppp. HHcccccccc"),      # a fifth: true
    ("HHHHHHHHHHH ppppppppp.. HHccccccccc", "HHHHHHHHHHH ppppppppp.. ppccccccccc"),     # smaller
    (3 * "HHHHHHHHHHHHHHHH " + "." * 16 + 2 * " cccccppppppppppp" + 3 * " ccccHHHppppppppp"
     + " cccccppppppppppp",                                             # from the border inward
     3 * "HHHHHHHHHHHHHHHH " + "." * 16 + 6 * " cccccppppppppppp"),
    ("HHHHHH. ppppppp pcppppp cHppppp pcppppp", "HHHHHH. ppppppp pcppppp cpppppp pcppppp"),
    ("HHHHHH. ccccccH", "HHHHHH. ccccccH")])                            # 8-connected
def test_stray_head_pixels_are_refilled_by_hand(before, after):
    assert np.array_equal(prepare.repair_head(picture(before)), picture(after))


@pytest.mark.parametrize("box, margin, expected", [
    ((100, 150, 60, 160), 0.1, (65, 50, 120)),          # side 1.2 * 100, centred at (125, 110)
    ((0, 40, 100, 200), 0.1, (0, 90, 120)),             # moved right into the frame
    ((290, 320, 140, 240), 0.1, (200, 120, 120)),       # moved left and up
    ((100, 200, 0, 220), 0.1, (18, -22, 264)),          # higher than the frame, which lies inside
    ((0, 320, 100, 120), 0.1, (-32, -82, 384)),         # wider than the frame
    ((10, 26, 20, 36), 0.0, (10, 20, 16)), ((10, 25, 20, 120), 0.0, None),
    ((10, 110, 20, 35), 0.0, None)])                    # 15 pixels high
def test_crop_geometry_by_hand(box, margin, expected):
    labels = np.zeros((240, 320), np.uint8)
    labels[box[2]:box[3], box[0]:box[1]] = 3
    if expected:
        assert prepare.crop_box(labels, margin) == expected
        labels = 3 * np.eye(199, dtype=np.uint8)        # 199 pixels of a wide box
    with pytest.raises(ValueError, match="200"):
        prepare.crop_box(labels, margin)


def test_padding_is_the_mean_colour_and_the_ignored_label():
    image, labels = np.zeros((240, 320, 3), np.uint8), np.zeros((240, 320), np.uint8)
    image[:, 160:] = (200, 100, 50)
    labels[0:220, 100:200] = 1
    joints = np.full((24, 2), (18, -22), np.float32)    # the corner of the crop, whose side is 264
    cropped, label, moved = map(np.asarray, prepare.crop_frame(image, labels, joints, 264, 0.1))
    noise = np.random.default_rng(0).integers(0, 256, image.shape).astype(np.uint8)
    assert np.std(prepare.crop_frame(noise, labels, joints, 66, 0.1)[0]) < 40      # averaged
    outside = np.r_[0:22, 262:264]
    assert (cropped[outside] == (100, 50, 25)).all() and (label[outside] == 255).all()
    assert np.array_equal(cropped[22:262], image[:, 18:282])
    assert np.array_equal(label[22:262], labels[:, 18:282]) and (moved == -0.5).all()


@pytest.mark.parametrize("options, says", [
    (["--raw", "no/such/folder"], "no/such/folder"), (["--run", "1"], "run1"),
    (["--val", "many"], "many"), (["--clips", "3"], "--synthesize"),
    (["--backgrounds", "."], "--synthesize"), (["--synthesize"], "not allowed"),
    (["--trian", "3"], "--trian"), (["--raw", "half"], "half/train"),
    (["--size", "0"], "--size"), (["--margin", "nan"], "--margin"), (["--names", "a"], "--images")])
def test_a_mistake_is_one_sentence_before_anything_is_written(
        options, says, raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        Path("half", split, "run0").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        sys.exit(run("--raw", raw, "--out", tmp_path / "out", *options))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and says in lines[-1] and not (tmp_path / "out").exists()
    assert len(lines) == 1 or lines[0].startswith("usage")


def write_pictures(folder, names, mask=None, size=(60, 40)):
    """Pictures and their masks, 255 in the left third and 0 elsewhere unless `mask` is given."""
    for kind in ("pictures", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    width, height = size
    if mask is None:
        mask = np.zeros((height, width), np.uint8)
        mask[:, :width // 3] = 255
    for name in names:
        picture = np.full((height, width, 3), (250, 30, 30), np.uint8)
        Image.fromarray(picture).save(folder / "pictures" / f"{name}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    return ["--images", folder / "pictures", "--masks", folder / "masks", "--names", "background",
            "cat", "--out", folder / "out", "--size", 30, "--workers", 0]


def splits_of(out):
    return {frame: split for split in prepare.SPLITS for frame in frames(out, split)}


def test_six_pictures_become_a_folder_and_more_move_none(tmp_path, capsys):
    options = [*write_pictures(tmp_path, [f"p_{i}" for i in range(6)]), "--values", 0, 255]
    (tmp_path / "pictures" / "Thumbs.db").touch()
    (tmp_path / "pictures" / "._p_1.png").touch()
    (tmp_path / "pictures" / "folder.png").mkdir()
    assert run(*options) == 2                               # has no mask
    (tmp_path / "pictures" / "folder.png").rename(tmp_path / "pictures" / "folder")
    assert run(*options) == 0
    out = tmp_path / "out"
    lines = capsys.readouterr().out.splitlines()
    assert "train: 4 frames of 4 groups" in lines and "3 clips or files" in lines[-1]
    assert "    pixels of each class: {'background': 1600, 'cat': 800}" in lines
    assert {name for name, _ in reasons(out)} == {"Thumbs.db", "._p_1.png", "folder"}
    before = splits_of(out)
    assert len(before) == 6 and set(before.values()) == set(prepare.SPLITS)
    write_pictures(tmp_path, [f"walk_{i:04d}" for i in range(9)] + [f"x{i}" for i in range(60)])
    (tmp_path / "pictures" / "p_0.png").unlink()
    (tmp_path / "masks" / "p_0.png").unlink()
    assert run(*options) == 0
    after = splits_of(out)
    assert before.pop("p_0") and "p_0" not in after
    assert before.items() <= after.items()
    assert len({split for frame, split in after.items() if frame.startswith("walk")}) == 1
    counts = [len(frames(out, split)) for split in prepare.SPLITS]
    assert sum(counts) == 74 and counts[0] > 40
    classes = json.loads((out / "classes.json").read_text())
    assert classes["names"] == ["background", "cat"] and classes["size"] == 30
    assert classes["pixels"] == [400 * counts[0], 200 * counts[0]]
    assert np.allclose(classes["mean"], np.array([250, 30, 30]) / 255, atol=0.01)


def test_a_new_groups_split_is_its_hash(tmp_path):
    names = [f"name{i}" for i in range(1000)]
    splits = prepare.split_frames(names, tmp_path)
    more = prepare.split_frames(names[500:], tmp_path)
    assert sum(splits[name] != more[name] for name in names[500:]) <= 3
    counts = [list(splits.values()).count(split) for split in prepare.SPLITS]
    assert np.allclose(counts, (800, 100, 100), atol=30)


def test_pictures_are_upright_padded_and_named_alike(tmp_path):
    palette = np.zeros((60, 40), np.uint8)
    palette[:10] = 1
    palette[50:] = 255
    stored = Image.fromarray(palette)
    stored.putpalette([0, 0, 0, 200, 0, 0] + [9] * 762)     # as grey, 1 would be 60
    lying = np.zeros((40, 60, 3), np.uint8)
    lying[:, :10] = 255                                     # the top, once it stands upright
    exif = Image.Exif()
    exif[0x0112] = 6
    options = write_pictures(tmp_path, [])
    for name in ("é1", "é2", "é3"):
        Image.fromarray(lying).save(tmp_path / "pictures" / f"{name}.jpg", exif=exif, quality=95)
        stored.save(tmp_path / "masks" / f"{unicodedata.normalize('NFD', name)}.png")
    assert run(*options) == 0
    frame, = frames(tmp_path / "out", "train")
    image = Image.open(tmp_path / "out" / "train" / "images" / f"{frame}.jpg")
    labels = np.asarray(Image.open(tmp_path / "out" / "train" / "labels" / f"{frame}.png"))
    expected = np.full((30, 30), 255)                       # 60 x 60 at half the size
    expected[:25, 5:25] = 0
    expected[:5, 5:25] = 1
    assert np.array_equal(labels, expected)
    row = np.asarray(image.convert("L"))[:, 15]
    assert (row[:4] > 200).all() and (row[7:] < 60).all()


GREY = np.zeros((40, 60), np.uint8)


@pytest.mark.parametrize("mask, values, says", [
    (np.zeros((40, 60, 3), np.uint8), [], "mode RGB"), (GREY.astype(np.uint16), [], "mode I;16"),
    (GREY + 7, [], "value 7"), (GREY + 1, [0, 255], "value 1"), (GREY[1:], [], "(60, 39)"),
    (None, [], "--values 0 255"), (None, [0], "--values"), (None, [0, 256], "--values")])
def test_a_mask_of_anything_but_ids_is_one_sentence(mask, values, says, tmp_path, capsys):
    options = write_pictures(tmp_path, ["a", "b", "c"])
    if mask is not None:
        Image.fromarray(mask).save(tmp_path / "masks" / "b.png")
    with pytest.raises(SystemExit) as stop:
        sys.exit(run(*options, *(["--values", *values] if values else [])))
    assert stop.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "classes.json").exists()
    if values != [0, 255]:                                  # mended, the same folder is taken
        write_pictures(tmp_path, ["a", "b", "c"])
        assert run(*options, "--values", 0, 255) == 0


@pytest.mark.parametrize("edit, says", [
    (lambda folder: (folder / "masks" / "b.png").unlink(), "1 pictures"),
    (lambda folder: (folder / "pictures" / "c.png").unlink(), "c: "),
    (lambda folder: (folder / "pictures" / "b.jpg").touch(), "one name"),
    (lambda folder: (folder / "pictures" / "b.png").write_bytes(b""), "b.png"),
    (lambda folder: write_pictures(folder, ["walk_1", "walk_2"]), None),
    (lambda folder: [path.unlink() for path in folder.glob("*/b.png")], "2 new groups")])
def test_pictures_without_a_partner_or_too_few_are_one_sentence(edit, says, tmp_path, capsys):
    options = [*write_pictures(tmp_path, ["a", "b", "c"]), "--values", 0, 255]
    edit(tmp_path)
    assert run(*options) == (2 if says else 0)
    assert not says or says in capsys.readouterr().err.splitlines()[-1]


def test_the_stand_in_is_rendered_and_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "av", av, raising=False)
    out = tmp_path / "standin"
    options = ["--synthesize", "--out", out, "--frames", 1, "--size", 64, "--workers", 0]
    assert [run(*options, "--clips", number) for number in (2, 2, 1)] == [0, 0, 2]
    assert "not SURREAL" in json.loads((out / "classes.json").read_text())["source"]
    assert [len(frames(out, split)) for split in prepare.SPLITS] == [2, 2, 2]


def test_backgrounds_are_shared_among_the_splits(tmp_path, monkeypatch):
    photos, jobs = tmp_path / "photos", []
    photos.mkdir()
    for i in range(12):
        (photos / f"{i:02d}.JPG").touch()
    (tmp_path / "linked").symlink_to(photos)
    monkeypatch.setattr(prepare, "make_clip", lambda *job: jobs.append(job))
    prepare.synthesize(tmp_path / "raw", 20, 1, 0, 0, str(tmp_path / "linked"))
    used = {(split, picture) for _, split, *_, picture in jobs}
    assert [split for _, split, *_ in jobs] == ["train"] * 20 + ["val"] * 2 + ["test"] * 2
    assert len(used) == len({picture for _, picture in used}) == 12
    with pytest.raises(prepare.Problem, match="10"):
        prepare.synthesize(tmp_path / "none", 3, 1, 0, 0, str(tmp_path / "raw"))
