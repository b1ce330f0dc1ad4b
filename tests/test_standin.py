"""The stand-in's renderer, from a ray and a capsule to the files of a clip."""
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.io import loadmat

import prepare_surreal as prepare

# SURREAL's parts of standing people: the first and last label of a part, its share of the paper's
# crops; its area against both lower legs, and the 5th and 95th percentile of its rows as a share of
# the height, nan where the pose decides.
PARTS = np.loadtxt("""
   1  1   0.02098   0.85   0.383 0.517
   2  3   0.02421   1.51   0.496 0.695
   4  4   0.00702   0.47   0.329 0.417
   5  6   0.01974   1.00   0.718 0.916
   7  7   0.00601   0.33   0.252 0.331
   8  9   0.00486   0.20   0.921 0.977
  10 10   0.00915   0.45   0.158 0.271
  11 12   0.00125   0.07   0.966 0.996
  13 13   0.00162   0.08   0.114 0.150
  14 15   0.00440   0.23   0.162 0.233
  16 16   0.00865   0.48   0.011 0.120
  17 18   0.00816   0.34   0.218 0.340
  19 20   0.00662   0.36   nan   nan
  21 22   0.00245   0.15   nan   nan
  23 24   0.00144   0.10   nan   nan
    """.splitlines())


def synthesize(out, *options):
    """The exit status of rendering to OUT-raw and preparing it in OUT."""
    command = ["--synthesize", "--size", 32, "--out", out, *options]
    words = [str(word) for word in command]
    return prepare.main(words)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Six clips of four frames for train, two each for val and test."""
    out = tmp_path_factory.mktemp("standin") / "out"
    options = ["--frames", 4, "--workers", 0, "--clips"]
    assert synthesize(out, *options, 6) == 0
    assert synthesize(out, *options, 5) == 2            # made with other settings
    return Path(f"{out}-raw")


@pytest.fixture(scope="module")
def masks():
    """The labels of 240 single frames."""
    drawn = []
    for seed in range(240):
        person = prepare.scene(np.random.default_rng(seed), 1)
        flesh = prepare.draw_body(
            person["body"],
            person["turn"][0],
            person["place"][0],
            person["camera"])
        assert (flesh["normal"][:, 0] > -.01).mean() > .9               # towards the camera
        drawn.append(prepare.label_image(flesh))
    return drawn


def frames(raw):
    """Labels (240, 320), joints2D (24, 2) and joints3D (24, 3) of every frame."""
    for path in raw.rglob("*_info.mat"):
        info = loadmat(path)
        stored = loadmat(str(path).replace("_info", "_segm"))
        for t in range(4):
            flat = info["joints2D"][:, :, t].T
            solid = info["joints3D"][:, :, t].T
            yield stored[f"segm_{t + 1}"], flat, solid


def first_ball(origin, lines, axis, radii):
    """Where lines (N, 3) first meet one of 500 balls along an axis from (0, 0, 0): t (N,), infinite
    without any, and the ball's place along the axis, 0 to 1."""
    ra, rb = radii
    square = (lines ** 2).sum(axis=1)
    balls = np.linspace(0, 1, 500)
    entries = []
    for s in balls:
        centre = s * axis
        radius = ra + s * (rb - ra)
        nearest = lines @ (centre - origin) / square    # t of the line's point nearest to it
        beside = origin + nearest[:, None] * lines - centre
        inside = radius ** 2 - (beside ** 2).sum(axis=1)
        half = np.sqrt(inside.clip(0) / square)
        entry = np.where(inside > 0, nearest - half, np.inf)
        entries.append(entry)
    first = np.argmin(entries, axis=0)
    return np.min(entries, axis=0), balls[first]


@pytest.mark.parametrize("radii", [(.5, .5), (.5, .2), (.1, .6)])
@pytest.mark.parametrize("origin", [(8, 0, 0), (1, 2, 6), (0, -2, -5)])
def test_a_capsule_is_all_balls_along_its_axis(radii, origin):
    rng = np.random.default_rng(0)
    origin = np.array(origin)
    start = np.zeros(3)
    axis = np.array([0, .4, 1.1])
    targets = rng.random((200, 1)) * axis
    targets += rng.normal(0, .4, (200, 3))
    lines = (targets - origin) / rng.uniform(4, 9)
    t, along = prepare.hit_capsule(origin, lines, start, axis, *radii)
    first, ball = first_ball(origin, lines, axis, radii)
    hit = first < np.inf
    assert 60 < hit.sum() < 190
    same = np.isfinite(t) == hit
    assert same.mean() > .98                            # some touch between two of the 500 balls
    assert np.allclose(t[hit], first[hit], atol=.001)
    assert np.allclose(along[hit], ball[hit], atol=.02)


def test_the_nearest_subpixel_labels_a_pixel_that_is_covered_half():
    flesh = dict(
        pixel=np.array([5, 5, 5, 9]),
        depth=np.array([8, 7, 8, 6]),
        joint=np.array([4, 2, 4, 1]),
        rest=np.zeros((4, 3)))
    labels = prepare.label_image(flesh)
    assert labels.flat[5] == 3
    assert labels.sum() == 3


def test_a_bent_elbow_moves_the_hand_and_a_roll_comes_before_the_raise():
    poses = np.zeros((3, 24, 3))
    poses[1:, 18, 1] = -90
    poses[2, 16] = 90, 0, -90                           # rolled, and hanging
    scale = np.full((24, 3), 1.1)
    _, _, place = prepare.forward_kinematics(poses, scale)
    rest, bent, hanging = place
    assert np.allclose(rest, prepare.T_POSE * 1.1)
    way = np.abs(bent - rest).max(axis=1)
    assert list(np.flatnonzero(way > 1e-9)) == [20, 22]
    shoulder, elbow, hand = 16, 18, 20
    forwards = bent[hand] - bent[elbow]
    down = hanging[shoulder] - hanging[elbow]
    inwards = hanging[elbow] - hanging[hand]
    assert forwards[2] > .27
    assert down[1] > .27
    assert inwards[0] > .27


def test_files_are_the_same_for_any_workers_and_people_in_one_split(raw, tmp_path):
    out = tmp_path / "again"
    assert synthesize(out, "--frames", 4, "--clips", 6, "--workers", 2) == 0
    paths = [path.relative_to(raw) for path in raw.rglob("*.m*")]
    assert len(paths) == 3 * (6 + 2 + 2)
    again = Path(f"{out}-raw")
    for path in paths:
        once = (raw / path).read_bytes()
        assert once == (again / path).read_bytes()
    people = {(path.parts[0], path.name[:3]) for path in paths}
    assert len(people) == 3


def test_no_number_of_a_sequence_is_in_two_splits():
    assert prepare.clip_name("train", 129) == ("203_03", "203_03_c0002")
    assert prepare.clip_name("train", 23_999) == ("799_10", "799_10_c0004")
    assert prepare.clip_name("val", 5) == ("800_02", "800_02_c0002")
    assert prepare.clip_name("test", 0) == ("900_01", "900_01_c0001")
    numbers = set()
    for split in prepare.SPLITS:
        for i in range(0, 60_000, 40):
            sequence, _ = prepare.clip_name(split, i)
            numbers.add(sequence.split("_")[0])
    assert len(numbers) == 3 * 60_000 / 40


def test_info_is_as_surreals(raw):
    for path in raw.rglob("*_info.mat"):
        info = loadmat(path)
        assert info["shape"].shape == (10, 4)
        assert info["pose"].dtype == info["joints3D"].dtype == np.float32
        assert (info["joints2D"] % 1 == 0).all()
        bend = info["pose"].reshape(24, 3, 4)
        assert (bend[4:6, 0] >= 0).all()                # knees bend backwards
        assert (bend[18, 1] <= 0).all()                 # elbows bend forwards
        assert (bend[19, 1] >= 0).all()


def test_joints_lie_on_their_parts_in_mirrored_images(raw):
    found = []
    for labels, flat, solid in frames(raw):
        right, down = np.linalg.lstsq(solid, flat - flat[0], rcond=None)[0].T
        away = -1, 0, 0                                 # where SURREAL's camera looks
        assert np.linalg.det([right, down, away]) < 0
        pelvis, left_hip, right_hip, spine = solid[:4]  # the body itself is no mirror image
        hips = left_hip + right_hip - 2 * pelvis
        assert np.linalg.det([left_hip - right_hip, spine - pelvis, hips]) < 0
        padded = np.pad(labels, 400)
        for label, (x, y) in enumerate(flat.astype(int) + 400, 1):
            around = padded[y - 4:y + 5, x - 4:x + 5]
            twin = prepare.MIRROR[label]
            if np.isin(around, (label, twin)).any():    # or else something hides it
                found.append(label in around)
    assert len(found) > 300
    assert np.mean(found) > .95


def test_heads_stray_and_can_be_repaired(masks):
    counts = []
    for mask in masks:
        for labels in (mask, prepare.repair_head(mask)):
            components, _ = ndimage.label(labels == 16, np.ones((3, 3)))
            sizes = np.bincount(components.ravel())[1:]
            counts.append((5 * sizes < sizes.max(initial=0)).sum())
    assert np.mean(counts[::2]) > .5
    assert not any(counts[1::2])


def measure(mask):
    """For each part of PARTS its area against the lower legs and where its rows begin and end."""
    rows, _ = np.nonzero(mask)
    top = rows.min()
    height = np.ptp(rows) + 1
    legs = max(1, np.isin(mask, (5, 6)).sum())
    for first, last in PARTS[:, :2]:
        part, _ = np.nonzero(np.isin(mask, (first, last)))
        begin, end = np.nan, np.nan
        if len(part):
            begin, end = np.percentile(part, (5, 95)) + .5 - top
        yield len(part) / legs, begin / height, end / height


def test_parts_of_standing_people_are_as_large_as_surreals_and_end_where_they_do(masks):
    standing = []
    for mask in map(prepare.repair_head, masks):
        height, width = map(np.ptp, np.nonzero(mask))
        if 1.9 * width < height < 239:
            standing.append(list(measure(mask)))
    area, begin, end = np.nanmedian(standing, axis=0).T
    difference = np.log(area / PARTS[:, 3])
    assert np.abs(difference).max() < np.log(1.25)
    begin -= PARTS[:, 4]
    end -= PARTS[:, 5]
    assert np.nanmax(np.abs(begin)) < .025
    assert np.nanmax(np.abs(end)) < .025


def test_classes_are_as_frequent_as_in_the_papers_crops(masks):
    shares = np.zeros(25)
    for mask in map(prepare.repair_head, masks):
        _, _, side = prepare.crop_box(mask, .1)
        pixels = np.bincount(mask.ravel(), minlength=25)
        shares += pixels / side ** 2 / len(masks)
    for first, last, share in PARTS[:, :3]:
        labels = {int(first), int(last)}
        found = sum(shares[label] for label in labels)
        assert 1 / 1.7 < found / share < 1.7


def test_light_falls_from_above():
    normals = np.array([
        (0, -2, 0),                                     # up
        (0, 5, 0),                                      # down
        (0, 0, 1)])                                     # sideways
    light = np.zeros(9)
    light[:2] = 1, -.5
    shaded = prepare.shade(normals, light)
    assert np.allclose(shaded, (1.5, .5, 1))


def test_half_of_the_clothes_show_the_photograph_behind_them():
    rng = np.random.default_rng(0)
    still = np.zeros((240, 320, 3))
    still[:, 160:] = .8
    prints = coats = 0
    for _ in range(200):
        look = prepare.dress(rng, still)
        prepare.print_photograph(rng, look, still)
        prints += sum("print" in look[name] for name in ("shirt", "trousers", "shoes"))
        coats += look["bottom"] < -.35
    assert 240 < prints < 360                           # of 600
    assert 15 < coats < 60                              # of 200; without it about 4

    # Columns 80 + 100 x: x = 0 lies on the left half, x = 1 on the right one, x = 3.2 goes round.
    cloth = dict(print=still, scale=np.array([100, 100]), origin=np.array([2000, 2000]))
    place = np.array([(0, 0, 0), (1, 0, 0), (3.2, 0, 9)])
    colour = prepare.fabric_colour(cloth, place, np.array([0, 1, 0]))
    assert np.allclose(colour[:, 0], (0, .88, 0))       # noise of 1 makes a tenth lighter


def test_only_photographs_are_printed_on_clothes(tmp_path, monkeypatch):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (320, 240)).save(photo)
    printed = []
    monkeypatch.setattr(prepare, "print_photograph", lambda *inputs: printed.append(inputs))
    for picture in (None, photo):
        rng = np.random.default_rng(0)
        prepare.render(rng, prepare.scene(rng, 1), picture)
        assert len(printed) == (picture is not None)


def test_photographs_are_shared_among_the_splits(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(10):
        photo = Image.new("RGB", (330, 250), (25 * i, 0, 90))
        photo.save(photos / f"{i}.png")
    options = ["--clips", 3, "--frames", 1, "--workers", 0, "--backgrounds", photos]
    out = tmp_path / "out"
    assert synthesize(out, *options) == 0
    used = set()
    for path in Path(f"{out}-raw").rglob("*.mp4"):
        with av.open(str(path)) as video:
            image = next(video.decode(video=0)).to_ndarray(format="rgb24")
        used.add((path.parts[-4], round(image[:9, :9, 0].mean() / 25)))
        info = loadmat(str(path).replace(".mp4", "_info.mat"))
        assert info["joints2D"].shape == (2, 24)        # squeezed, as SURREAL's
    assert len(used) == len({photo for _, photo in used})
    assert "not SURREAL" in (out / "classes.json").read_text()
    (photos / "0.png").unlink()
    assert synthesize(tmp_path / "few", *options) == 2
