"""prepare_surreal.py on clips in SURREAL's layout, and on own pictures, that are written here."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import prepare_surreal as prepare

ODD = "O'Neil & søn \"x\"_01_c0001"
SPLITS = prepare.SPLITS


def colour(clip, t):
    """A flat colour that tells frame t of a clip from the others, even after H.264 and JPEG."""
    seed = sum(map(ord, clip))
    red = 40 + t * 37 % 160
    green = 40 + seed * 11 % 160
    blue = 40 + (t * 13 + seed * 5) % 160
    return np.array([red, green, blue])


def corner(t):
    """Top left corner of the person in frame t. It moves, so that joints tell the frame too."""
    return 30 + 7 * (t % 10), 40 + 3 * (t % 10)


def draw_mask(t):
    """(240, 320): a figure, 60 x 100, of label 1 + t % 15, with a head and strips of 17 to 24."""
    labels = np.zeros((240, 320), np.uint8)
    x, y = corner(t)
    figure = labels[y:y + 100, x:x + 60]                    # a view
    figure[:] = 1 + t % 15
    figure[:20, 20:40] = 16
    figure[30:40, :56] = np.repeat(range(17, 25), 7)
    return labels


def write_clip(run, name, T, edit=lambda video, masks, info: None):
    """One clip on disk, in the folder of its sequence; `edit` may change what is written."""
    sequence = name.rsplit("_c", 1)[0]
    path = Path(run, sequence, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    step = np.outer((1, 2), range(24))
    flat, solid, video, masks = [], [], [], {}
    for t in range(T):
        rng = np.random.default_rng(t)
        flat.append(np.reshape(corner(t), (2, 1)) + step)
        solid.append(rng.normal(size=(3, 24)))
        video.append(np.full((240, 320, 3), colour(name, t), np.uint8))
        masks[f"segm_{t + 1}"] = draw_mask(t)
    info = dict(
        joints2D=np.stack(flat, 2).squeeze(),
        joints3D=np.stack(solid, 2).squeeze())
    edit(video, masks, info)
    with av.open(f"{path}.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "12"})
        stream.width = 320
        stream.height = 240
        for image in video:
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    savemat(f"{path}_segm.mat", masks, do_compression=True)
    savemat(f"{path}_info.mat", info, do_compression=True)
    return path


def files(folder):
    """All but what a killed process was about to write."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".tmp":
            name = path.relative_to(folder).as_posix()
            found[name] = path.read_bytes()
    return found


def frames(out, split):
    return sorted(path.stem for path in Path(f"{out}/{split}/images").iterdir())


def reasons(out):
    found = {}
    with open(f"{out}/skipped.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found[row["clip"], row["frame"]] = row["reason"]
    return found


def load(out, split, frame):
    """Image and labels of one prepared frame as arrays."""
    image = Image.open(f"{out}/{split}/images/{frame}.jpg")
    labels = Image.open(f"{out}/{split}/labels/{frame}.png")
    return np.asarray(image).astype(int), np.asarray(labels)


def read_json(path):
    return json.loads(path.read_text())


def run(*options):
    """The exit status, whichever way the program ends."""
    try:
        return prepare.main([str(option) for option in options])
    except SystemExit as stop:
        return stop.code


def spoil_frames(video, masks, info):
    masks["segm_1"] = masks["segm_1"].astype(float)         # whole numbers are good
    masks["segm_2"][100, 100] = 25
    masks["segm_3"] = masks["segm_3"][:, :-1]
    masks["segm_4"] = masks["segm_4"] + 0.5
    info["joints2D"][:, :, 4] = 0
    info["joints2D"] = info["joints2D"].astype(float)
    info["joints2D"][1, 3, 5] = np.nan
    masks["segm_7"][:] = 0


DEFECTS = [     # what is done to a clip of five frames, and its reason in skipped.csv
    (lambda video, masks, info: video.pop(), "length"),
    (lambda video, masks, info: masks.pop("segm_5"), "length"),
    (lambda video, masks, info: masks.update(segm_6=draw_mask(0)), "length"),
    (lambda video, masks, info: info.update(joints2D=info["joints2D"][:, :, :4]), "dimension"),
    (lambda video, masks, info: info.pop("joints2D"), "joints2D")]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Good clips in all splits, and one of each defect in train."""
    raw = tmp_path_factory.mktemp("surreal") / "cmu"
    train, test = raw / "train/run0", raw / "test/run0"
    for name, T in (("01_01_c0001", 12), ("ung_90_10_c0001", 1), (ODD, 3)):
        write_clip(train, name, T)
    (train / "01_01/._01_01_c0003.mp4").touch()             # macOS writes such files
    write_clip(train / "one folder too deep", "01_01_c0002", 7)
    for path in (train / "ung_90_10").iterdir():
        path.rename(train / path.name)                      # lies flat in run0
    write_clip(raw, "04_01_c0001", 2)
    (train / "04_01").symlink_to(raw / "04_01")
    write_clip(raw / "val/run0", "02_01_c0003", 10)
    for number in range(1, 6):                              # 3 is in val, 2 and 4 are beside it
        write_clip(test, f"02_01_c000{number}", 2)
        write_clip(test, f"ung_02_01_c000{number}", 2)
    write_clip(test, "03_01_c0003", 10)
    for number, part in enumerate((".mp4", "_segm.mat", "_info.mat"), 1):
        Path(f"{write_clip(train, f'50_01_c000{number}', 5)}{part}").unlink()
        os.truncate(f"{write_clip(train, f'50_02_c000{number}', 5)}{part}", 900)
    for number, (edit, _) in enumerate(DEFECTS, 1):
        write_clip(train, f"50_03_c000{number}", 5, edit)
    video = Path(f"{write_clip(train, '50_04_c0001', 5)}.mp4")
    with av.open(str(video)) as container:
        third = list(container.demux(video=0))[2]
    data = bytearray(video.read_bytes())
    for i in range(third.pos + 5, third.pos + 17):          # a decoder would conceal this
        data[i] ^= 255
    video.write_bytes(data)
    write_clip(train, "60_01_c0001", 9, spoil_frames)
    return raw


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    """Everything from `raw`, with workers that start by spawn, and without torch or av."""
    out, script = tmp_path_factory.mktemp("out") / "surreal", raw / "spawn.py"
    script.write_text(
        "import multiprocessing, sys\nimport prepare_surreal\nif __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n    status = prepare_surreal.main()\n"
        "    sys.exit(status or 'torch' in sys.modules or 'av' in sys.modules)")
    command = [sys.executable, script, "--raw", raw, "--out", out, "--size", "64", "--workers", "2"]
    environment = os.environ | dict(PYTHONPATH=os.path.dirname(prepare.__file__))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ready, again = done.stdout.splitlines()[-2:]
    assert " 24 clips, frames or files" in ready
    assert " 8 broken clips" in again
    return out


def test_a_broken_clip_or_frame_costs_that_alone_and_has_its_reason(prepared):
    good = {"01_01_c0001": 12, "01_01_c0002": 7, "04_01_c0001": 2, "ung_90_10_c0001": 1, ODD: 3}
    expected = ["60_01_c0001_001", "60_01_c0001_008", "60_01_c0001_009"]
    for clip, T in good.items():
        expected += [f"{clip}_{t:03d}" for t in range(1, T + 1)]
    assert frames(prepared, "train") == sorted(expected)
    texts = {("50_04_c0001", ""): "mp4"}
    for number, part in enumerate(("mp4", "segm", "info"), 1):
        texts[f"50_01_c000{number}", ""] = part
        texts[f"50_02_c000{number}", ""] = part
    for number, (_, text) in enumerate(DEFECTS, 1):
        texts[f"50_03_c000{number}", ""] = text
    for t, text in enumerate(["mask", "mask", "mask", "joints", "joints", "no person"], 2):
        texts["60_01_c0001", str(t)] = text
    for number in (2, 3, 4):
        for motion in ("02_01", "ung_02_01"):
            texts[f"{motion}_c000{number}", ""] = "val"
    found = reasons(prepared)
    assert found.keys() == texts.keys()
    for key, reason in found.items():
        assert texts[key] in reason
    assert len(frames(prepared, "val")) == 10
    clips = {frame[:-4] for frame in frames(prepared, "test")}
    assert clips == {
        "02_01_c0001",
        "02_01_c0005",
        "03_01_c0003",
        "ung_02_01_c0001",
        "ung_02_01_c0005"}


def test_clips_of_run1_share_poses_over_three_numbers(tmp_path):
    numbers = dict(train=[1], val=[5], test=range(1, 11))
    for split in SPLITS:
        for number in numbers[split]:
            clip = tmp_path / split / f"run1/07_01/07_01_c{number:04d}.mp4"
            prepare.write_whole(clip, b"")
    found = {split: prepare.find_clips(tmp_path / split) for split in SPLITS}
    prepare.select_clips(found, 1, [])                      # of 100 frames, 30 apart
    assert [*found["test"]] == ["07_01_c0001", "07_01_c0009", "07_01_c0010"]


def test_image_labels_and_joints_of_a_frame_belong_together(raw, prepared):
    poses, _ = prepare.read_poses(raw / "train/run0/01_01/01_01_c0001_info.mat")
    assert poses.shape == (12, 72)
    assert not poses[:, :3].any()
    cases = [("train", "01_01_c0001", t) for t in range(12)]
    cases += [("train", "ung_90_10_c0001", 0), ("val", "02_01_c0003", 3)]
    for split, clip, t in cases:
        frame = f"{clip}_{t + 1:03d}"
        image, labels = load(prepared, split, frame)
        mean = image.mean(axis=(0, 1))
        difference = np.abs(mean - colour(clip, t))
        assert image.shape == (64, 64, 3)
        assert difference.max() < 6
        x, y = corner(t)                                    # 60 x 100: side 120, centred
        left = max(0, x + 30 - 60)
        top = max(0, y + 50 - 60)
        shown = draw_mask(t)[top:top + 120, left:left + 120]
        centres = (np.arange(64) + 0.5) * 120 / 64
        centres = centres.astype(int)
        expected = shown[centres][:, centres]
        assert np.array_equal(labels, expected)
        with np.load(f"{prepared}/{split}/joints.npz") as stored:
            number = list(stored["frames"]).index(frame)
            joints = stored["joints"][number]
        in_frame = np.outer(range(24), (1, 2)) + (x, y)
        in_crop = in_frame - (left, top)
        assert np.allclose(joints, in_crop * 64 / 120 - 0.5, atol=1e-4)


def test_sides_and_groups_of_surreals_classes():
    pairs = [
        (2, 3), (5, 6), (8, 9), (11, 12), (14, 15),         # legs, feet, toes, shoulders
        (17, 18), (19, 20), (21, 22), (23, 24)]             # arms, hands, fingers
    mirror = list(range(25))
    for left, right in pairs:
        mirror[left] = right
        mirror[right] = left
    assert prepare.SURREAL["mirror"] == mirror
    assert prepare.SURREAL["joint_mirror"] == [i - 1 for i in mirror[1:]]
    merge = prepare.SURREAL["merge"]
    for coarse in prepare.SURREAL["groups"], merge:
        members = sum(coarse.values(), [])
        assert sorted(members) == list(range(25))
    assert merge["left foot"] == [8, 11]
    assert len(merge) == 15


def test_classes_json_describes_the_folder(prepared):
    classes = read_json(prepared / "classes.json")
    stored = json.loads(json.dumps(prepare.SURREAL))        # its tuples as lists
    assert stored.items() <= classes.items()
    assert classes["size"] == 64
    assert classes["source"].startswith("SURREAL")
    crops = [load(prepared, "train", frame) for frame in frames(prepared, "train")]
    images, labels = zip(*crops)
    pixels = np.bincount(np.ravel(labels), minlength=25)
    assert classes["pixels"] == pixels.tolist()
    colours = np.reshape(images, (-1, 3)) / 255
    assert np.allclose(classes["mean"], colours.mean(axis=0), atol=0.005)
    assert np.allclose(classes["std"], colours.std(axis=0), atol=0.005)
    preview = np.asarray(Image.open(prepared / "preview.png"))
    above = preview[:160]
    below = preview[160:]
    assert len(below) == 160
    assert (above != below).any()


def test_a_folder_is_never_overwritten(raw, prepared, tmp_path, capsys):
    before = files(prepared)
    assert run("--raw", raw, "--out", prepared, "--size", 96) == 2
    assert "'size': 64" in capsys.readouterr().err
    assert files(prepared) == before
    thesis = tmp_path / "classes.json"
    thesis.write_text("precious")
    assert run("--raw", raw, "--out", tmp_path) == 2
    assert "not made by this program" in capsys.readouterr().err
    assert run("--raw", raw, "--out", thesis) == 2
    assert files(tmp_path) == {"classes.json": b"precious"}


def test_killed_or_interrupted_it_goes_on_and_ends_with_the_same_files(raw, prepared, tmp_path):
    out = tmp_path / "surreal"
    command = [sys.executable, prepare.__file__, "--raw", raw, "--out", out, "--size", "64"]
    two = [*command, "--workers", "2"]
    pipe = dict(start_new_session=True, text=True, stderr=subprocess.PIPE)
    ends = [
        (os.kill, signal.SIGTERM, -15, 2),
        (os.killpg, signal.SIGKILL, -9, 3),
        (os.killpg, signal.SIGINT, 130, 4)]
    for end, number, status, records in ends:
        process = subprocess.Popen(two, **pipe)
        while process.poll() is None and len(list(out.glob(".parts/*/*.json"))) < records:
            time.sleep(0.002)
        end(process.pid, number)                            # killpg: its workers too, as Ctrl-C
        errors = process.communicate()[1]                   # ends when no worker is left
        assert process.returncode in (status, 0)
        assert "Traceback" not in errors
    assert run(*command[2:], "--workers", 0) == 0
    assert files(out) == files(prepared)


@pytest.fixture
def three(tmp_path):
    """The options to prepare a small folder of clips, one a split."""
    for number, split in enumerate(SPLITS, 1):
        write_clip(tmp_path / split / "run0", f"0{number}_01_c0001", 4)
    return ["--out", tmp_path / "out", "--raw", tmp_path, "--size", 32, "--workers", 0]


def test_a_mended_clip_is_tried_again_and_late_clips_do_not_enter(three, tmp_path, capsys):
    video = f"{write_clip(tmp_path / 'train/run0', '05_01_c0001', 4)}.mp4"
    whole = Path(video).read_bytes()
    os.truncate(video, 900)
    assert run(*three) == 0
    assert "1 broken clips again" in capsys.readouterr().out.splitlines()[-1]
    Path(video).write_bytes(whole)
    write_clip(tmp_path / "train/run0", "06_01_c0001", 4)
    for _ in range(2):
        assert run(*three) == 0
        assert len(frames(three[1], "train")) == 8
        assert not reasons(three[1])
        assert sum(read_json(three[1] / "classes.json")["pixels"]) == 8 * 32 * 32
        text = capsys.readouterr().out
        assert "ready" in text
        assert "clips that came later are not among them" in text
        assert "again" not in text.splitlines()[-1]
        assert not (three[1] / ".parts").exists()


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_systems_end_of_a_worker_is_one_sentence(three, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "extract", die)
    assert run(*three[:-1], 1) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "fewer --workers" in errors[-1]


@pytest.mark.parametrize("options, says", [
    (["--raw", "nowhere"], "nowhere/train"),
    (["--run", "1"], "run1"),
    (["--val", "many"], "many"),
    (["--clips", "3"], "--clips"),
    (["--names", "a"], "--names"),
    (["--synthesize"], "not allowed"),
    (["--trian", "3"], "--trian"),
    (["--size", "0"], "--size"),
    (["--margin", "nan"], "--margin"),
    (["--margin", "1e400"], "--margin"),
    (["--seed", str(2 ** 63)], "--seed"),
    (["--exclude", "5*"], "5*"),
    (["--exclude", "01_*"], "no clip is left"),
    (["--pick", "cluster", "--train", "4"], "--train 4")])
def test_a_mistake_is_one_sentence_before_anything_is_written(options, says, three, capsys):
    assert run(*three, *options) == 2
    errors = capsys.readouterr().err
    lines = errors.strip().splitlines()
    assert says in lines[-1]
    assert "usage" not in errors
    assert not three[1].exists()


@pytest.mark.parametrize("options, count", [
    (["--val", 5], 5),
    (["--val", 5, "--seed", 1], 5),
    (["--exclude", "01_*", "60*", "50_*"], 10)])
def test_val_is_spread_evenly_and_exclude_leaves_out(options, count, raw, tmp_path):
    out = tmp_path / "out"
    assert run("--raw", raw, "--out", out, "--size", 32, "--workers", 0, *options) == 0
    numbers = [int(name[-3:]) for name in frames(out, "val")]
    steps = np.diff(numbers)
    assert len(numbers) == count
    assert len(set(steps)) == 1
    beginnings = {name[:3] for name in frames(out, "train")}
    excluded = beginnings == {"ung", "O'N", "04_"}
    assert excluded == ("--exclude" in options)


def test_spread_takes_as_many_of_every_cluster_and_cluster_the_nearest_size():
    rng = np.random.default_rng(0)
    kinds = np.repeat(range(3), (600, 300, 20))
    kind = rng.permutation(kinds)
    centre = 5 * kind[:, None]
    poses = rng.normal(centre, 0.1, (920, 72))
    poses = poses.astype(np.float32)
    rows = prepare.pick(poses, 221, "spread", 3, rng)
    counts = np.bincount(kind[rows])
    assert sorted(counts) == [20, 100, 101]
    assert (np.diff(rows) > 0).all()
    largest = np.flatnonzero(kind == 0)
    taken = np.isin(largest, rows)
    steps = np.diff(np.flatnonzero(taken))                  # 600 / 101 apart
    assert set(steps) == {5, 6}
    nearest = prepare.pick(poses, 250, "cluster", 3, rng)
    assert set(kind[nearest]) == {1}
    everything = prepare.pick(poses, 2000, "spread", 3, rng)
    assert len(everything) == 920


SYMBOLS = {".": 0, "H": 16, "c": 10, "p": 1, "s": 4}


def picture(text):
    rows = []
    for row in text.split():
        rows.append([SYMBOLS[symbol] for symbol in row])
    return np.array(rows, np.uint8)


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
    repaired = prepare.repair_head(picture(before))
    assert np.array_equal(repaired, picture(after))


@pytest.mark.parametrize("box, margin, expected", [
    ((100, 150, 60, 160), 0.1, (65, 50, 120)),          # side 1.2 * 100, centred at (125, 110)
    ((0, 40, 100, 200), 0.1, (0, 90, 120)),             # moved right into the frame
    ((290, 320, 140, 240), 0.1, (200, 120, 120)),       # moved left and up
    ((100, 200, 0, 220), 0.1, (18, -22, 264)),          # higher than the frame, which lies inside
    ((0, 320, 100, 120), 0.1, (-32, -82, 384)),         # wider than the frame
    ((10, 26, 20, 36), 0.0, (10, 20, 16)),
    ((10, 25, 20, 120), 0.0, None),                     # 15 pixels wide
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
    image = np.zeros((240, 320, 3), np.uint8)
    image[:, 160:] = (200, 100, 50)
    labels = np.zeros((240, 320), np.uint8)
    labels[:220, 100:200] = 1
    joints = np.full((24, 2), (18, -22))                # the corner of the crop, whose side is 264
    cropped, label, moved = prepare.crop_frame(image, labels, joints, 264, 0.1)
    assert (moved == -0.5).all()
    frame = slice(22, 262)                              # its rows in the crop
    columns = slice(18, 282)
    expected_image = np.full((264, 264, 3), (100, 50, 25))
    expected_image[frame] = image[:, columns]
    assert np.array_equal(cropped, expected_image)
    expected_label = np.full((264, 264), 255)
    expected_label[frame] = labels[:, columns]
    assert np.array_equal(label, expected_label)


LEFT = np.zeros((40, 60), np.uint8)
LEFT[:, :20] = 255


def write_pictures(folder, names, mask=LEFT):
    """Red pictures of 60 x 40 and their masks, and the options to prepare them."""
    pictures = folder / "pictures"
    masks = folder / "masks"
    pictures.mkdir(exist_ok=True)
    masks.mkdir(exist_ok=True)
    red = Image.new("RGB", (60, 40), (250, 30, 30))
    for name in names:
        red.save(f"{pictures}/{name}.png")
        Image.fromarray(mask).save(f"{masks}/{name}.png")
    return [
        "--images", pictures, "--masks", masks, "--out", folder / "out",
        "--size", 30, "--workers", 0, "--names", "background", "cat"]


NOT_UTF8 = {os.fsdecode(b"\xff.txt")} if sys.platform == "linux" else set()


def interrupt(*_):
    raise KeyboardInterrupt


def placed(out):
    return {frame: split for split in SPLITS for frame in frames(out, split)}


def test_more_pictures_move_none(tmp_path, capsys, monkeypatch):
    walks = [f"walk{i:04d}" for i in range(5)] + [f"run-{i}" for i in range(5)]
    options = [*write_pictures(tmp_path, walks + ["a", "b"]), "--values", 0, 255]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "convert", interrupt)
        assert run(*options) == 130
    assert run("--raw", tmp_path, "--out", out) == 2        # does not mix with what was begun
    before = {frame: split for split, _, frame, _ in read_json(out / "settings.json")["chosen"]}
    assert len({before.pop(frame) for frame in walks[:5]}) == 1
    precious = out / "backup/images/precious.jpg"
    prepare.write_whole(precious, b"")
    write_pictures(tmp_path, [f"{i}x" for i in range(40)])
    others = {"Thumbs.db", "._p_1.png", "folder"} | NOT_UTF8
    for name in others:
        (tmp_path / "pictures" / name).touch()
    for path in tmp_path.glob("*/walk*.png"):
        path.unlink()
    assert run(*options) == 0
    assert before.items() <= placed(out).items()
    assert len(placed(out)) == 47
    assert precious.exists()
    assert len(reasons(out)) == len(others)
    count = len(frames(out, "train"))
    classes = read_json(out / "classes.json")
    assert classes["pixels"] == [400 * count, 200 * count]
    assert classes["size"] == 30
    assert np.allclose(classes["mean"], np.array([250, 30, 30]) / 255, atol=0.01)
    text = capsys.readouterr().out
    assert f"'cat': {200 * count}}}; ignored, with the margin: {300 * count}" in text
    assert f" {len(others)} clips, frames" in text.splitlines()[-1]


def test_one_video_is_split_and_no_second_is_added(tmp_path, capsys):
    options = [*write_pictures(tmp_path, [f"p_{i}" for i in range(6)]), "--values", 0, 255]
    assert run(*options) == 0
    before = placed(tmp_path / "out")
    assert {*before.values()} == {*SPLITS}
    write_pictures(tmp_path, ["x"])
    assert run(*options) == 2
    assert "remove --out" in capsys.readouterr().err
    assert placed(tmp_path / "out") == before


def test_a_new_groups_split_is_its_hash():
    names = [f"{i}name" for i in range(1000)]
    splits = prepare.split_frames(names, {})
    fewer = prepare.split_frames(names[500:], {})
    moved = fewer.items() - splits.items()
    assert len(moved) <= 6
    found = list(splits.values())
    counts = [found.count(split) for split in SPLITS]
    assert np.allclose(counts, (800, 100, 100), atol=30)


def test_pictures_are_upright_and_palettes_are_ids(tmp_path):
    options = write_pictures(tmp_path, ["x"])
    (tmp_path / "pictures/x.png").unlink()
    (tmp_path / "masks/x.png").unlink()
    mask = np.zeros((60, 40), np.uint8)
    mask[:10] = 1
    mask[50:] = 255
    stored = Image.fromarray(mask)
    stored.putpalette([0, 0, 0, 200, 0, 0] + [9] * 762)     # as grey, 1 would be 60
    lying = np.zeros((40, 60, 3), np.uint8)
    lying[:, :10] = 255                                     # the top, once it stands upright
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("é1", "é2", "é3"):
        Image.fromarray(lying).save(f"{tmp_path}/pictures/{name}.jpg", exif=exif)
        stored.save(f"{tmp_path}/masks/{unicodedata.normalize('NFD', name)}.png")
    assert run(*options) == 0
    frame, = frames(tmp_path / "out", "train")
    image, labels = load(tmp_path / "out", "train", frame)
    expected = np.full((30, 30), 255)                       # 60 x 60 at half the size
    expected[:25, 5:25] = 0
    expected[:5, 5:25] = 1
    assert np.array_equal(labels, expected)
    assert (image[:4, 15] > 200).all()
    assert (image[7:, 15] < 60).all()


@pytest.mark.parametrize("mask, more, says", [
    (np.zeros((40, 60, 3), np.uint8), "", "mode RGB"),
    (LEFT.astype(np.uint16), "", "mode I;16"),
    (LEFT // 2, "", "value 127"),
    (LEFT // 255, "--values 0 255", "value 1"),
    (LEFT > 0, "--values 0 1", "--values 0 255"),           # white of 1 bit is 255 as well
    (LEFT[1:], "", "(60, 39)"),
    (LEFT, "", "--values 0 255"),
    (LEFT, "--values 0 0 255", "different --values"),
    (LEFT, "--values 0 0", "different --values"),
    (LEFT, "--values 0 256", "different --values"),
    (LEFT, "--names cat cat", "different ones"),
    (LEFT, "--masks pictures", "another folder")])
def test_masks_and_options_of_own_pictures(mask, more, says, tmp_path, capsys, monkeypatch):
    options = write_pictures(tmp_path, ["a", "b", "c"], mask)
    monkeypatch.chdir(tmp_path)
    assert run(*options, *more.split()) == 2
    errors = capsys.readouterr().err.splitlines()
    assert says in errors[-1]
    assert not (tmp_path / "out/classes.json").exists()


@pytest.mark.parametrize("edit, says", [
    (lambda folder: (folder / "masks/b.png").unlink(), "1 pictures have no mask"),
    (lambda folder: (folder / "pictures/c.png").unlink(), "is c: "),
    (lambda folder: (folder / "pictures/b.jpg").touch(), "one name"),
    (lambda folder: os.truncate(folder / "pictures/b.png", 90), "1 pictures or masks"),
    (lambda folder: os.truncate(folder / "masks/b.png", 60), "masks/b.png"),
    (lambda folder: [path.unlink() for path in folder.glob("*/[bd].png")], "0001_IMG"),
    (lambda folder: [path.unlink() for path in folder.glob("pictures/*.png")], "not entered")])
def test_a_mistake_about_pictures_leaves_a_finished_folder_alone(edit, says, tmp_path, capsys):
    options = [*write_pictures(tmp_path, ["a", "b", "c"]), "--values", 0, 255]
    out = tmp_path / "out"
    assert run(*options) == 0
    before = files(out)
    edit(tmp_path)
    assert run(*options) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert files(out) == before


def test_a_second_process_is_refused(tmp_path, capsys):
    options = [*write_pictures(tmp_path, ["a", "b", "c"]), "--values", 0, 255]
    with prepare.lock(tmp_path / "out"):
        assert run(*options) == 2
    assert "another process" in capsys.readouterr().err
    assert run(*options) == 0


def test_names_that_the_terminal_cannot_show(tmp_path):
    options = [*write_pictures(tmp_path, ["a", "b", "c"]), "--values", 0, 255]
    command = [sys.executable, prepare.__file__, *options, "--names", "背景", "猫"]
    words = [str(word) for word in command]
    environment = os.environ | dict(PYTHONIOENCODING="cp1252")
    done = subprocess.run(words, env=environment)
    assert done.returncode == 0


def test_backgrounds_lie_in_linked_folders_and_a_broken_one_is_named(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        Image.new("L", (9, 9)).save(f"{photos}/{number}.JPG")
    (tmp_path / "all").mkdir()
    (tmp_path / "all/linked").symlink_to(photos)
    pictures = []
    monkeypatch.setattr(prepare, "make_clip", lambda *job: pictures.append(job[-1]))
    render = (20, 1, 0, 0, f"{tmp_path}/all")
    prepare.synthesize(tmp_path / "raw", *render)
    assert len(pictures) == 24
    assert len(set(pictures)) == 12
    (photos / "0.JPG").write_bytes(b"")
    with pytest.raises(prepare.Problem, match="linked/0.JPG"):
        prepare.synthesize(tmp_path / "none", *render)


def test_groups_are_names_without_their_number_or_surreals_sequences():
    groups = {
        "walk_0001": "walk",
        "walk-7": "walk",
        "walk07": "walk",
        "x": "x",
        "01_01_c0001_037": "01_01",
        "ung_01_01_c0002_001": "01_01",
        "1200_03_c0002_001": "1200_03"}                     # of a large stand-in
    for name, group in groups.items():
        assert prepare.group_of(name) == group
