"""The stand-in's renderer, from a ray and a capsule to the files of a clip."""
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.io import loadmat

import prepare_surreal as prepare

# FACTS of SURREAL: areas of standing people against both lower legs, and the 5th and 95th
# percentile of a part's rows as a share of the height, nan where the pose decides.
BORDERS = np.loadtxt("""
# labels  area   rows
  16 16   0.48   0.011 0.120
  13 13   0.08   0.114 0.150
  14 15   0.23   0.162 0.233
  10 10   0.45   0.158 0.271
   7  7   0.33   0.252 0.331
   4  4   0.47   0.329 0.417
   1  1   0.85   0.383 0.517
   2  3   1.51   0.496 0.695
   5  6   1.00   0.718 0.916
   8  9   0.20   0.921 0.977
  11 12   0.07   0.966 0.996
  17 18   0.34   0.218 0.340
  19 20   0.36   nan   nan
  21 22   0.15   nan   nan
  23 24   0.10   nan   nan
    """.splitlines())
PAPER = [float(share) for share in """
    0.87346 0.02098 0.01220 0.01201 0.00702 0.00996 0.00978 0.00601 0.00239 0.00247 0.00915 0.00043
    0.00082 0.00162 0.00230 0.00210 0.00865 0.00408 0.00408 0.00321 0.00341 0.00116 0.00129 0.00067
    0.00077""".split()]


def draw(rng):
    """The labels of one frame alone."""
    person = prepare.scene(rng, 1)
    turn, place = person["turn"][0], person["place"][0]
    flesh = prepare.draw_body(person["body"], turn, place, person["camera"])
    return prepare.label_image(flesh)


@pytest.fixture(scope="module")
def masks():
    return [draw(np.random.default_rng((1, i))) for i in range(240)]


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """Six clips of four frames for train, two each for val and test: OUT and OUT-raw."""
    out = tmp_path_factory.mktemp("standin") / "standin"
    command = ["--synthesize", "--frames", "4", "--size", "64", "--workers", "0", "--out", str(out)]
    assert prepare.main([*command, "--clips", "6"]) == 0
    assert prepare.main([*command, "--clips", "6"]) == 0                # nothing is left to do
    assert prepare.main([*command, "--clips", "5"]) == 2                # other settings
    return out, Path(f"{out}-raw")


def clips(raw):
    """Info and masks (T, 240, 320) of all clips below a raw folder."""
    for path in sorted(raw.glob("*/run0/*/*_info.mat")):
        stored = loadmat(str(path).replace("_info", "_segm"))
        labels = [stored[f"segm_{t + 1}"] for t in range(4)]
        yield loadmat(path), np.stack(labels)


def test_a_capsule_is_hit_where_many_balls_along_its_axis_are_hit_first():
    rng = np.random.default_rng(0)
    a, b = np.array([[-.2, .1, 0], [.3, 0, .2]])
    origin = np.array([3., .2, -.1])
    direction = rng.normal(0, .1, (4000, 3)) - (1, 0, 0)
    for ra, rb in ((.1, .25), (.3, .3), (.2, .05)):
        t, along = prepare.hit_capsule(origin, direction, a, b, ra, rb)
        nearest = np.full(4000, np.inf)
        for s in np.linspace(0, 1, 801):
            q = origin - a - s * (b - a)
            half = direction @ q / (direction ** 2).sum(1)
            radius = ra + s * (rb - ra)
            root = half ** 2 - (q @ q - radius ** 2) / (direction ** 2).sum(1)
            hit = np.where(root < 0, np.inf, -half - np.sqrt(np.maximum(root, 0)))
            nearest = np.minimum(nearest, hit)
        sure = np.isfinite(nearest)
        assert 300 < sure.sum() < 3700
        assert np.allclose(t[sure], nearest[sure], atol=2e-3)
        assert np.mean(np.isnan(t) == ~sure) > .998                     # but for grazing lines
        point = origin + t[sure, None] * direction[sure]
        centre = a + along[sure, None] * (b - a)
        radius = ra + along[sure] * (rb - ra)
        assert np.allclose(np.linalg.norm(point - centre, axis=1), radius, atol=1e-6)


def test_forward_kinematics_turns_the_joints_below_and_keeps_bones():
    scale = np.full((24, 3), 1.1)
    poses = np.zeros((3, 24, 3))
    poses[1, 18, 1] = -90                               # the left elbow bends forwards
    poses[2, 16] = 90, 0, -90                           # the left arm hangs, rolled
    poses[2, 18, 1] = -90
    local, turn, place = prepare.forward_kinematics(poses, scale)
    assert np.allclose(place[0], prepare.T_POSE * 1.1)
    moved = np.linalg.norm(place[1] - place[0], axis=1) > 1e-9
    assert set(np.flatnonzero(moved)) == {20, 22}
    assert (place[1, 20] - place[1, 18])[2] > .27       # forwards
    assert place[2, 18, 1] < place[2, 16, 1] - .27      # down
    assert place[2, 20, 0] < place[2, 18, 0] - .27      # inwards, since the roll came first
    bones = [np.linalg.norm(pose - pose[prepare.PARENT], axis=1) for pose in place]
    assert np.allclose(bones, bones[0])
    assert np.allclose(local[:, 18], turn[:, 16].swapaxes(1, 2) @ turn[:, 18])


def test_key_poses_keep_within_limits_and_movements_between_their_ends():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        pose = prepare.key_pose(rng, seed % len(prepare.POSES))
        left, right = pose[[18, 19], 1]
        assert -140 <= left <= 0 <= right <= 140        # elbows bend forwards alone
        assert (pose[prepare.KNEES, 0] >= 0).all()
        assert (pose[prepare.ELBOWS + prepare.KNEES, 2] == 0).all()
        poses = prepare.movement(rng, 5)
        steps = np.diff(poses, axis=0).reshape(4, -1)
        assert (steps.max(0) * steps.min(0) >= -1e-9).all()             # one way


def test_files_are_surreals_and_the_same_for_any_workers(standin, tmp_path):
    out, raw = standin
    again = tmp_path / "again"
    command = ["--synthesize", "--frames", "4", "--size", "64", "--clips", "6", "--workers", "2"]
    assert prepare.main([*command, "--out", str(again)]) == 0
    paths = [path.relative_to(raw) for path in raw.rglob("*") if path.is_file()]
    assert len(paths) == 3 * (6 + 2 + 2) + 1            # and the settings
    for path in paths:
        assert (raw / path).read_bytes() == (Path(f"{again}-raw") / path).read_bytes()
    people = {(path.parts[-3], path.name[:3]) for path in raw.glob("*/run0/*")}
    assert len(people) == 3                             # nobody is in two splits
    classes = json.loads((out / "classes.json").read_text())
    assert "not SURREAL" in classes["source"]


def test_info_has_surreals_fields(standin):
    shapes = dict(joints2D=(2, 24, 4), joints3D=(3, 24, 4), pose=(72, 4), shape=(10, 4))
    for info, _ in clips(standin[1]):
        for name, shape in shapes.items():
            assert info[name].shape == shape
            assert info[name].dtype == np.float32
        assert (info["joints2D"] % 1 == 0).all()
        assert info["source"].item() == "stand-in, not SURREAL"
        assert len(info["sequence"].item()) == 6
        pelvis = info["joints3D"][:, :1]
        height = np.ptp(info["joints3D"] - pelvis, axis=(0, 1))
        assert (height > .5).all()                      # metres
        bend = info["pose"].reshape(24, 3, 4)
        assert (bend[18, 1] <= 0).all()                 # left elbow
        assert (bend[19, 1] >= 0).all()
        assert (bend[4:6, 0] >= 0).all()                # knees


def test_joints_lie_on_their_parts(standin):
    found = []
    for info, labels in clips(standin[1]):
        assert labels.shape == (4, 240, 320)
        assert labels.dtype == np.uint8
        for t, mask in enumerate(labels):
            assert mask.max() <= 24
            for joint, (x, y) in enumerate(info["joints2D"][:, :, t].T.astype(int)):
                top, left = max(y - 4, 0), max(x - 4, 0)
                around = mask[top:max(y + 5, 0), left:max(x + 5, 0)]
                twin = prepare.MIRROR[joint + 1]
                if np.isin(around, (joint + 1, twin)).any():            # or else it is hidden
                    found.append((around == joint + 1).any())
    assert len(found) > 300
    assert np.mean(found) > .95


def test_images_are_mirrored_as_surreals(standin):
    for info, _ in clips(standin[1]):
        for t in range(4):
            flat, solid = info["joints2D"][:, :, t].T, info["joints3D"][:, :, t].T
            right, down = np.linalg.lstsq(solid - solid[0], flat - flat[0], rcond=None)[0].T
            away = -1, 0, 0                             # SURREAL's camera looks along -x
            assert np.linalg.det([right, down, away]) < 0


def test_heads_stray_as_surreals_and_are_repaired(masks):
    def has_strays(mask):
        components, _ = ndimage.label(mask == 16, np.ones((3, 3)))
        sizes = np.bincount(components.ravel())[1:]
        return (5 * sizes < sizes.max(initial=0)).any()

    assert np.mean([has_strays(mask) for mask in masks]) > .3
    assert not any(has_strays(prepare.repair_head(mask)) for mask in masks)


def test_parts_of_standing_people_end_where_surreals_do(masks):
    measured = []
    for mask in map(prepare.repair_head, masks):
        rows, columns = np.nonzero(mask)
        height = np.ptp(rows) + 1
        cut = rows.min() == 0 or rows.max() == 239
        if cut or height <= 1.9 * (np.ptp(columns) + 1):
            continue
        legs = np.isin(mask, (5, 6)).sum()
        frame = []
        for first, last, *_ in BORDERS:
            part = rows[np.isin(mask[rows, columns], (first, last))]
            ends = (part + .5 - rows.min()) / height
            ends = np.percentile(ends, (5, 95)) if len(part) else (np.nan, np.nan)
            frame.append((len(part) / legs, *ends))
        measured.append(frame)
    assert len(measured) > 60
    area, *ends = np.nanmedian(measured, axis=0).T
    ratio = area / BORDERS[:, 2]
    assert (np.abs(np.log(ratio)) < np.log(1.25)).all(), ratio.round(2)
    apart = np.abs(np.transpose(ends) - BORDERS[:, 3:])
    assert np.nanmax(apart) < .025, apart.round(3)


def test_class_frequencies_are_the_papers(masks):
    total = np.zeros(256)
    for mask in masks:
        joints = np.ones((24, 2))
        image = np.zeros((*mask.shape, 3), np.uint8)
        _, labels, _ = prepare.crop_frame(image, mask, joints, 128, .1)
        total += np.bincount(np.ravel(labels), minlength=256)
    ratio = total[:25] / total[:25].sum() / PAPER
    limit = np.where(np.less(PAPER, .002), 2.2, 1.7)
    assert (ratio < limit).all(), ratio.round(2)
    assert (ratio > 1 / limit).all(), ratio.round(2)


def test_light_comes_from_above_and_colours_stay_on_the_cloth():
    normals = np.array([[0, -2, 0], [0, 5, 0], [0, 0, 1]])              # up, down, sideways
    from_above = prepare.shade(normals, np.array([1, -.5, *np.zeros(7)]))
    assert np.allclose(from_above, (1.5, .5, 1))
    rng = np.random.default_rng(0)
    look = prepare.dress(rng, np.full((240, 320, 3), .5))
    look.update(shirt=dict(look["shirt"], first=np.ones(3), limit=9))
    chest, hand, face = [.05, .3, .1], [.8, .43, 0], [0, .64, .1]
    rest = np.array([chest, hand, face, chest])
    colour = prepare.texture(look, rest)
    assert np.array_equal(colour[0], colour[3])         # nothing but the place matters
    assert colour[0].min() > .5
    skin = look["skin"]
    assert np.abs(colour[1:3] / skin - 1).max() < .3


def test_photographs_for_backgrounds_are_shared_among_the_splits(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(12):
        flat = Image.new("RGB", (330, 250), (20 * i, 250 - 20 * i, 90))
        flat.save(photos / f"{i:02d}.png")
    out = tmp_path / "out"
    command = ["--synthesize", "--clips", "3", "--frames", "1", "--size", "32", "--workers", "0"]
    command += ["--out", str(out), "--backgrounds"]
    assert prepare.main([*command, str(photos)]) == 0
    used = set()
    for path in Path(f"{out}-raw").rglob("*.mp4"):
        with av.open(str(path)) as video:
            image = next(video.decode(video=0)).to_ndarray(format="rgb24")
        red = image[:9, :9, 0].mean()
        photo = round(red / 20)
        assert abs(red - 20 * photo) < 9
        used.add((path.parts[-4], photo))
        info = loadmat(str(path).replace(".mp4", "_info.mat"))
        assert info["joints2D"].shape == (2, 24)        # as in SURREAL, squeezed
    assert len(used) == len({photo for _, photo in used}) >= 3
    (photos / "00.png").unlink()
    for i in range(1, 4):
        (photos / f"{i:02d}.png").unlink()
    assert prepare.main([*command[:-3], "--out", str(tmp_path / "few"), "--backgrounds",
                         str(photos)]) == 2
