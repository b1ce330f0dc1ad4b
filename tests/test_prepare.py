"""prepare_surreal.py on clips in SURREAL's layout that are written here, and on its stand-in."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.io import loadmat, savemat

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
    labels, (x, y) = np.zeros((240, 320), np.uint8), corner(t)
    labels[y:y + 100, x:x + 60] = 1 + t % 15
    labels[y:y + 20, x + 20:x + 40] = 16
    labels[y + 30:y + 40, x:x + 56] = np.repeat(np.arange(17, 25), 7)
    return labels


def write_clip(run, name, T, edit=lambda clip: None):
    """One clip on disk, in the folder of its sequence; `edit` may change what is written."""
    folder = run / name.rsplit("_c", 1)[0]
    folder.mkdir(parents=True, exist_ok=True)
    flat, solid = np.empty((2, 24, T), np.float32), np.empty((3, 24, T), np.float32)
    for t in range(T):
        flat[:, :, t] = np.array(corner(t))[:, None] + np.array([[1], [2]]) * np.arange(24)
        solid[:, :, t] = np.random.default_rng(t).normal(size=(3, 24))
    if T == 1:
        flat, solid = flat[:, :, 0], solid[:, :, 0]         # as SURREAL has it
    clip = dict(video=[np.full((240, 320, 3), colour(name, t), np.uint8) for t in range(T)],
                segm={f"segm_{t + 1}": draw_mask(t) for t in range(T)},
                info=dict(joints2D=flat, joints3D=solid, stride=np.uint8([[50]])))
    edit(clip)
    with av.open(str(folder / f"{name}.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for image in clip["video"]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    savemat(folder / f"{name}_segm.mat", clip["segm"], do_compression=True)
    savemat(folder / f"{name}_info.mat", clip["info"], do_compression=True)
    return folder / name


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def frames(out, split):
    return sorted(path.stem for path in (out / split / "images").iterdir())


def load(out, split, frame):
    """One prepared frame: image, labels and joints as arrays."""
    with np.load(out / split / "joints.npz") as stored:
        joints = dict(zip(stored["frames"].tolist(), stored["joints"]))
    return (np.asarray(Image.open(out / split / "images" / f"{frame}.jpg")).astype(int),
            np.asarray(Image.open(out / split / "labels" / f"{frame}.png")), joints[frame])


def run(*options):
    return prepare.main([str(option) for option in options])


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
    for split, name in (("val", "02_01_c0001"), ("test", "02_01_c0001"), ("test", "03_01_c0001")):
        write_clip(raw / split / "run0", name, 10)
    for number, part in enumerate((".mp4", "_segm.mat", "_info.mat"), 1):
        Path(f"{write_clip(train, f'50_01_c000{number}', 5)}{part}").unlink()
        os.truncate(f"{write_clip(train, f'50_02_c000{number}', 5)}{part}", 900)
    for number, edit in enumerate((
            lambda c: c["video"].pop(), lambda c: c["segm"].pop("segm_5"),
            lambda c: c["segm"].update(segm_6=draw_mask(0)),
            lambda c: c["info"].update(joints2D=c["info"]["joints2D"][:, :, :4]),
            lambda c: c["info"].update(joints3D="text"), lambda c: c["info"].pop("joints2D")), 1):
        write_clip(train, f"50_03_c000{number}", 5, edit)
    def bad_frames(clip):
        masks, info = clip["segm"], clip["info"]
        masks["segm_1"] = masks["segm_1"].astype(float)     # whole numbers are good
        masks["segm_2"][100, 100] = 25
        masks["segm_3"] = masks["segm_3"][:, :-1]
        masks["segm_4"] = masks["segm_4"] + 0.5
        info["joints2D"][:, :, 4] = 0
        info["joints2D"][1, 3, 5] = np.nan
        masks["segm_7"][:] = 0
    write_clip(train, "60_01_c0001", 9, bad_frames)
    return raw


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    """Everything from `raw`, with workers that start by spawn, and without torch."""
    out, script = tmp_path_factory.mktemp("out") / "surreal", raw.parent / "spawn.py"
    script.write_text(
        "import multiprocessing, sys\nimport prepare_surreal\nif __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n    status = prepare_surreal.main()\n"
        "    sys.exit(status or 'torch' in sys.modules or 'fcntl' in vars(prepare_surreal))")
    command = [sys.executable, script, "--raw", raw, "--out", out, "--size", "64", "--workers", "2"]
    environment = os.environ | dict(PYTHONPATH=str(Path(prepare.__file__).parent))
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    return out


def test_a_broken_clip_or_frame_costs_that_alone_and_has_its_reason(prepared):
    clips = (("01_01_c0001", 12), ("01_01_c0002", 7), ("ung_90_10_c0001", 1), (ODD, 3))
    assert frames(prepared, "train") == sorted(
        [f"{clip}_{t:03d}" for clip, T in clips for t in range(1, T + 1)]
        + [f"60_01_c0001_00{t}" for t in (1, 8, 9)])
    for split, clip in (("val", "02_01_c0001"), ("test", "03_01_c0001")):
        assert frames(prepared, split) == [f"{clip}_{t:03d}" for t in range(1, 11)]
    with open(prepared / "skipped.csv", newline="", encoding="utf-8") as file:
        reasons = {(row["clip"], row["frame"]): row["reason"] for row in csv.DictReader(file)}
    clips = [f"50_0{k}_c000{n}" for k, N in ((1, 3), (2, 3), (3, 6)) for n in range(1, N + 1)]
    expected = {("02_01_c0001", ""): "also in val"} | dict(zip(
        [(clip, "") for clip in clips] + [("60_01_c0001", str(t)) for t in range(2, 8)],
        2 * ["mp4", "segm", "info"] + 3 * ["length"] + ["dimension", "float", "joints2D"]
        + 3 * ["mask"] + 2 * ["joints"] + ["no person"]))
    assert reasons.keys() == expected.keys()
    assert all(expected[key] in reason for key, reason in reasons.items()), reasons
    assert sorted(path.name for path in prepared.iterdir()) == [
        "classes.json", "preview.png", "skipped.csv", "test", "train", "val"]


def test_image_labels_and_joints_of_a_frame_belong_together(raw, prepared):
    poses, _ = prepare.read_poses(raw / "train/run0/01_01/01_01_c0001_info.mat")
    assert poses.shape == (12, 72) and not poses[:, :3].any()
    for split, clip, t in [("train", "01_01_c0001", t) for t in range(12)] + [
            ("train", "ung_90_10_c0001", 0), ("val", "02_01_c0001", 3)]:
        image, labels, joints = load(prepared, split, f"{clip}_{t + 1:03d}")
        own, other = (np.abs(image.mean(axis=(0, 1)) - colour(clip, s)).max()
                      for s in (t, (t + 1) % 10))
        assert image.shape == (64, 64, 3) and own < 6 < other
        x, y = corner(t)                                    # 60 x 100: side 120, centred
        left, top = max(0, x + 30 - 60), max(0, y + 50 - 60)
        centres = ((np.arange(64) + 0.5) * 120 / 64).astype(int)
        crop = draw_mask(t)[top:top + 120, left:left + 120]
        assert np.array_equal(labels, crop[centres][:, centres])
        place = np.array([x, y]) + np.arange(24)[:, None] * (1, 2) - 0.5    # of pixel centres
        assert np.allclose(joints, (place - (left, top) + 0.5) * 64 / 120 - 0.5, atol=1e-4)


def test_classes_json_describes_the_folder(prepared):
    classes = json.loads((prepared / "classes.json").read_text())
    names = classes["names"]
    assert [names[i] for i in classes["mirror"]] == [
        name.replace("left", "?").replace("right", "left").replace("?", "right") for name in names]
    assert classes["joint_mirror"] == [i - 1 for i in classes["mirror"][1:]]
    assert len(names) == 25 and names[16] == "head" and classes["groups"]["Torso"] == [1, 4, 7, 10]
    assert sorted(sum(classes["groups"].values(), [])) == list(range(25))
    images, labels, _ = zip(*(load(prepared, "train", name) for name in frames(prepared, "train")))
    assert classes["pixels"] == np.bincount(np.ravel(labels), minlength=25).tolist()
    pixels = np.reshape(images, (-1, 3)) / 255
    for key, value in (("mean", pixels.mean(axis=0)), ("std", pixels.std(axis=0))):
        assert np.allclose(classes[key], value, atol=0.005)
    assert classes["size"] == 64 and classes["source"].startswith("SURREAL")
    label = Image.open(prepared / "train" / "labels" / "01_01_c0001_001.png")
    assert label.mode == "P" and label.getpalette()[:75] == sum(classes["palette"], [])
    above, below = np.split(np.asarray(Image.open(prepared / "preview.png")), (160,))
    assert len(below) == 160 and above.std() > 0 and (above != below).any()


def test_a_folder_is_never_overwritten(raw, prepared, tmp_path, capsys):
    before = files(prepared)
    assert run("--raw", raw, "--out", prepared, "--size", 64, "--workers", 0) == 0
    assert run("--raw", raw, "--out", prepared, "--size", 96) == 2
    assert "'size': 64" in capsys.readouterr().err and files(prepared) == before
    (tmp_path / "thesis.txt").write_text("precious")
    assert {run("--raw", raw, "--out", out) for out in (tmp_path, tmp_path / "thesis.txt")} == {2}
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
    assert run(*command[2:], "--workers", 0) == 0 and files(out) == files(prepared)


def test_the_choice_is_seeded_evenly_spaced_and_excludes(raw, tmp_path):
    found = []
    for name, *options in (["a"], ["b", "--seed", 1],
                           ["c", "--exclude", "01_*", "60_01_c0001", "--exclude", "50_*"]):
        assert run("--raw", raw, "--out", tmp_path / name, "--size", 32, "--clusters", 3, "--train",
                   9, "--val", 5, "--test", 3, "--workers", 0, *options) == 0
        found.append([frames(tmp_path / name, split) for split in prepare.SPLITS])
    assert found[0] != found[1] and [len(names) for names in found[0][1:]] == [5, 3]
    assert set(np.diff([int(name[-3:]) for name in found[0][1]])) == {2}        # 5 of 10
    assert {name[:3] for name in found[2][0]} == {"ung", "O'N"}


def test_spread_takes_as_many_of_every_cluster_and_cluster_the_nearest_size():
    rng, sizes = np.random.default_rng(0), (600, 300, 20)
    kind = rng.permutation(np.repeat(range(3), sizes))
    poses = (5 * kind[:, None] + rng.normal(size=(920, 72)) * 0.1).astype(np.float32)
    rows = prepare.pick(poses, 221, "spread", 3, np.random.default_rng(1))
    assert sorted(np.bincount(kind[rows])) == [20, 100, 101] and (np.diff(rows) > 0).all()
    assert set(np.diff(np.searchsorted(np.flatnonzero(kind == 0), rows[kind[rows] == 0]))) == {5, 6}
    assert set(kind[prepare.pick(poses, 250, "cluster", 3, rng)]) == {1}
    assert [len(prepare.pick(poses, n, "cluster", 3, rng)) for n in (0, 920, 2000)] == [0, 920, 920]


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
    (["--trian", "3"], "--trian"), (["--raw", "half"], "test")])
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


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """Clips of four frames, six for train, by whatever renderer: OUT, and OUT-raw."""
    out = tmp_path_factory.mktemp("standin") / "standin"
    options = ["--synthesize", "--out", out, "--frames", 4, "--size", 128, "--workers", 0]
    assert [run(*options, "--clips", n) for n in (6, 6, 5)] == [0, 0, 2]
    assert "not SURREAL" in json.loads((out / "classes.json").read_text())["source"]
    return out, Path(f"{out}-raw")


def test_rendered_files_are_surreals_and_the_same_for_any_workers(standin, tmp_path):
    prepare.synthesize(tmp_path / "raw", 6, 4, 0, 2, None)
    assert files(tmp_path / "raw") == files(standin[1])
    assert len({path.name for path in standin[1].glob("*/run0/*/*.mp4")}) == 6 + 2 + 2
    people = {(path.parts[-3], path.name[:3]) for path in standin[1].glob("*/run0/*")}
    assert len(people) == len({person for _, person in people})     # nobody is in two splits
    shapes = dict(
        joints2D=(2, 24, 4), joints3D=(3, 24, 4), pose=(72, 4), zrot=(4, 1), camLoc=(3, 1),
        shape=(10, 4), light=(9, 4), camDist=(1, 1), gender=(4, 1), stride=(1, 1), bg=(1, 4),
        cloth=(1, 4), clipNo=(1, 1), sequence=(1,), source=(1,))
    info = loadmat(next(standin[1].glob("val/run0/*/*_info.mat")))
    assert {name: info[name].shape for name in shapes} == shapes
    assert info["pose"].dtype == np.float32 and (info["joints2D"] % 1 == 0).all()
    left, right = info["pose"].reshape(24, 3, 4)[18:20, 1]              # elbows bend forwards
    assert (left <= 0).all() and (right >= 0).all() and (left < right).any()


def test_rendered_joints_lie_on_their_parts_images_are_mirrored_and_heads_stray(standin):
    near, strays = [], []
    for path in standin[1].glob("*/run0/*/*_info.mat"):
        info, masks = loadmat(path), loadmat(str(path).replace("_info", "_segm"))
        for t in range(4):
            mask, joints, solid = (masks[f"segm_{t + 1}"], info["joints2D"][:, :, t].T,
                                   info["joints3D"][:, :, t].T)
            assert mask.shape == (240, 320) and mask.dtype == np.uint8 and mask.max() <= 24
            for joint, (x, y) in enumerate(joints.astype(int)):
                around = mask[max(y - 4, 0):max(y + 5, 0), max(x - 4, 0):max(x + 5, 0)]
                if np.isin(around, (joint + 1, prepare.MIRROR[joint + 1])).any():   # or its twin
                    near.append((around == joint + 1).any())
            # The camera's axes right, down, away: a matrix of determinant -1, as in SURREAL.
            axes = np.linalg.lstsq(solid - solid[0], joints - joints[0])[0].T
            assert np.linalg.det([*axes, solid[0] - info["camLoc"].ravel()]) < 0
            for labels in (mask, prepare.repair_head(mask)):
                components, _ = ndimage.label(labels == 16, np.ones((3, 3)))
                sizes = np.bincount(components.ravel())[1:]
                strays.append((5 * sizes < sizes.max(initial=0)).any())
    assert np.mean(near) > 0.95 and len(near) > 300
    assert any(strays[::2]) and not any(strays[1::2])


def test_class_frequencies_are_roughly_the_papers(standin):
    labels = [load(standin[0], split, name)[1]
              for split in prepare.SPLITS for name in frames(standin[0], split)]
    share = np.bincount(np.ravel(labels), minlength=256)[:25] / np.size(labels)
    assert (share > 0).all()
    for paper, *group in ((.87346, 0), (.01027, 13, 16), (.04316, 1, 4, 7, 10), (.00440, 14, 15),
                          (.04395, 2, 3, 5, 6), (.01478, 17, 18, 19, 20), (.00611, 8, 9, 11, 12),
                          (.00389, 21, 22, 23, 24)):
        assert 0.4 < share[group].sum() / paper < 2.5, group


def test_backgrounds_are_shared_among_the_splits(tmp_path):
    for i in range(12):
        path = tmp_path / "photos" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (330, 250), (20 * i, 250 - 20 * i, 90)).save(path)
    prepare.synthesize(tmp_path / "raw", 3, 1, 0, 0, str(tmp_path / "photos"))
    used = set()
    for path in (tmp_path / "raw").rglob("*_info.mat"):
        info = loadmat(path)
        with av.open(str(path).replace("_info.mat", ".mp4")) as video:
            red = next(video.decode(video=0)).to_ndarray(format="rgb24")[:9, :9, 0].mean()
        photo = Path(info["bg"].item().item()).stem
        assert abs(red - 20 * int(photo)) < 9 and info["joints2D"].shape == (2, 24)    # squeezed
        used.add((path.parts[-4], photo))
    assert len(used) == len({photo for _, photo in used})
    with pytest.raises(prepare.Problem, match="10"):
        prepare.synthesize(tmp_path / "none", 3, 1, 0, 0, str(tmp_path / "raw"))
