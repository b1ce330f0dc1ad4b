"""From raw SURREAL clips to the images, labels and joints that train.py reads.

The procedure of the paper (Borrego Carazo, 2018, Section 2.2) on SURREAL (arXiv 1701.01370): frames
chosen by k-means on their 3D joints, stray head labels refilled, a square crop around the person.
The paper takes one cluster of poses, as `--pick cluster` does; here every cluster gives the same
number of frames, and no clip of val enters test. skipped.csv lists broken clips and frames, which
are left out. The same command continues a stopped run; classes.json comes last. The second half
of this file renders a stand-in, in SURREAL's layout, for those who do not have SURREAL.
"""
import argparse
import csv
import functools
import glob
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from scipy.cluster.vq import kmeans2, vq
from scipy.io import loadmat, savemat
from scipy.spatial.transform import Rotation
from tqdm import tqdm

SPLITS = ("train", "val", "test")
HEAD, IGNORE = 16, 255                          # IGNORE labels what lies outside the frame
HEIGHT, WIDTH, FOCAL = 240, 320, 600.0          # SURREAL's frames; their principal point: 160, 120

# SURREAL's labels: 0, then the SMPL joint's number + 1. Its images are mirrored: what it calls
# "left" is on the visible person's right; labels and joints agree, so the names stay as they are.
NAMES = """background hips leftUpLeg rightUpLeg spine leftLeg rightLeg spine1 leftFoot rightFoot
    spine2 leftToeBase rightToeBase neck leftShoulder rightShoulder head leftArm rightArm
    leftForeArm rightForeArm leftHand rightHand leftHandIndex1 rightHandIndex1""".split()
PALETTE = [tuple(bytes.fromhex(colour)) for colour in """1a1c24 146634 1c42be 68269e 3a9642
    327eec 9e54de 78bc4e 70baff ce88fa bcde6e bee4ff ecc8ff 80e4d4 8a0e22 9e4e06 009e96 d42232
    e87c0a fa6068 fcac30 ff9aa4 ffd268 ffced8 ffeeb0""".split()]
MIRROR = [NAMES.index(name.replace("left", "?").replace("right", "left").replace("?", "right"))
          for name in NAMES]
GROUPS = {"Background": [0], "Head": [16], "Torso": [1, 4, 7, 10], "U.Legs": [2, 3],
          "L.Legs": [5, 6], "Neck": [13], "Shoulder": [14, 15], "U.Arms": [17, 18],
          "L.Arms": [19, 20], "Feet": [8, 9], "Hands": [21, 22], "Fingers": [23, 24],
          "Toes": [11, 12]}     # columns of the paper's Tables 2 and 5


class Problem(Exception):
    """What the user can mend, in one sentence."""


# ------ One frame, one clip. What cannot be used raises ValueError.
def repair_head(labels):
    """A copy of labels (H, W) uint8 without SURREAL's stray head labels (paper, Section 2.2).
    Stray are the 8-connected components of the head smaller than a fifth of the largest (SURREAL's
    reach 4.5 %). The paper refills all but the largest, but a hand across the face splits a true
    head in two. A pixel gets the most common label of its 8 neighbours, from the border of the
    component inward; body parts come before background, the lower id where two are as common."""
    components, _ = ndimage.label(labels == HEAD, np.ones((3, 3)))
    sizes = np.bincount(components[components > 0], minlength=1)
    stray = (0 < sizes) & (5 * sizes < sizes.max())
    rows, columns = np.nonzero(np.pad(stray[components], 1))
    padded = np.pad(labels, 1, constant_values=IGNORE)
    padded[rows, columns] = IGNORE
    while len(rows):
        neighbours = np.stack([padded[rows + dy, columns + dx]
                               for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
        votes = (neighbours[..., None] == np.arange(len(NAMES))).sum(axis=0)    # (pixels, 25)
        votes[:, 1:] *= 10                              # one body part outvotes 8 x background
        border = votes.any(axis=1)
        padded[rows[border], columns[border]] = votes[border].argmax(axis=1)
        rows, columns = rows[~border], columns[~border]
    return padded[1:-1, 1:-1]


def crop_box(labels, margin):
    """The square (x0, y0, side) in whole pixels: the tight box of the labels (H, W), `margin` added
    on each side, squared to the longer side, shifted, not shrunk, into the frame where it fits."""
    lines = [np.flatnonzero(labels.any(axis=axis)) for axis in (0, 1)]          # columns, rows
    if np.count_nonzero(labels) < 200 or min(map(np.ptp, lines)) + 1 < 16:
        raise ValueError("no person, or one of fewer than 200 pixels, or narrower than 16")
    side = round((max(map(np.ptp, lines)) + 1) * (1 + 2 * margin))
    corner = []
    for line, length in zip(lines, labels.shape[::-1]):
        centred = (line[0] + line[-1] + 1 - side) // 2
        corner.append(int(np.clip(centred, min(0, length - side), max(0, length - side))))
    return *corner, side


def crop_frame(image, labels, joints, size, margin):
    """Repairs and crops one frame: image (H, W, 3) uint8, labels (H, W), joints (24, 2), x then y.
    Returns an RGB and a palette image of Pillow, size x size, and the joints (24, 2) in them."""
    whole = labels.astype(np.uint8)
    if labels.shape != image.shape[:2] or (whole != labels).any() or whole.max() >= len(NAMES):
        raise ValueError("the mask has another size than the video, or values other than 0 to 24")
    if not np.isfinite(joints).all() or not joints.any():
        raise ValueError("joints all zero or not finite")
    labels = repair_head(whole)
    x0, y0, side = crop_box(labels, margin)
    mean_colour = tuple(image.mean(axis=0).mean(axis=0).round().astype(int).tolist())
    crops = []
    for array, outside, method in ((image, mean_colour, Image.Resampling.BICUBIC),
                                   (labels, IGNORE, Image.Resampling.NEAREST)):
        array = Image.fromarray(array)
        square = Image.new(array.mode, (side, side), outside)
        square.paste(array, (-x0, -y0))
        crops.append(square.resize((size, size), method))
    # All 256 colours, because a palette PNG of 16 or fewer would store 255 as 15.
    crops[1].putpalette(sum(PALETTE, ()) + (128,) * 3 * (256 - len(PALETTE)))
    # SURREAL measures from the frame's corner: its first pixel's centre is at 0.5 there, at 0 here.
    return *crops, (joints - (x0, y0)) * (size / side) - 0.5


def read_joints(path):
    """joints2D and joints3D of an info.mat side by side, (T, 24, 2 + 3) float32, pixels and metres.
    A clip of one frame has them squeezed, (2, 24) and (3, 24)."""
    mat = loadmat(str(path), variable_names=["joints2D", "joints3D"])
    return np.concatenate([np.atleast_3d(mat[name]).transpose(2, 1, 0).astype(np.float32)
                           for name in ("joints2D", "joints3D")], axis=2)


def decode(path, times, length):
    """Yields images (H, W, 3) uint8 of a video of `length` frames. times: their numbers, from 0 and
    ascending. Label t belongs to image t, so a frame that the decoder drops must be noticed: the
    t-th frame decoded has to carry the t-th time stamp of the file."""
    with av.open(str(path)) as container:
        decoder = container.streams.video[0].codec_context
        decoder.thread_count = 1                        # clips are decoded side by side already
        decoder.options = {"err_detect": "explode"}
        packets = [packet for packet in container.demux(video=0) if packet.size]
        stamps = sorted(packet.pts for packet in packets)
        if len(stamps) != length:
            raise ValueError(f"different length: {len(stamps)} video frames, {length} of joints")
        frames = (frame for packet in [*packets, None] for frame in decoder.decode(packet))
        for t in range(times[-1] + 1):
            frame = next(frames, None)
            if frame is None or frame.pts != stamps[t] or frame.is_corrupt:
                raise ValueError("a video frame is damaged")
            if t in times:
                yield frame.to_ndarray(format="rgb24", threads=1)


def extract(out, size, margin, split, folder, clip, times):
    """Writes the frames of one clip at the ascending times and then, as the mark that it is done, a
    record. Its histograms, of red, green, blue and label, add up to the statistics of the split."""
    crops, record = [], dict(frames=[], joints=[], skipped=[], histogram=[0] * 4 * 256)
    try:
        joints = read_joints(folder / f"{clip}_info.mat")[:, :, :2]
        masks = loadmat(f"{folder}/{clip}_segm.mat")
        if f"segm_{len(joints)}" not in masks or f"segm_{len(joints) + 1}" in masks:
            raise ValueError(f"different length: not as many masks as joints, {len(joints)}")
        for t, image in zip(times, decode(folder / f"{clip}.mp4", times, len(joints))):
            try:
                mask = masks[f"segm_{t + 1}"]
                crops.append((t, *crop_frame(image, mask, joints[t], size, margin)))
            except ValueError as error:
                record["skipped"].append((clip, t + 1, str(error)))
    except Exception as error:              # a broken file makes its reader stumble in any way
        crops, record["skipped"] = [], [(clip, "", f"segm.mat or mp4: {error!r}")]
    for t, image, labels, moved in crops:
        frame = f"{clip}_{t + 1:03d}"
        image.save(out / split / "images" / f"{frame}.jpg", quality=95)
        labels.save(out / split / "labels" / f"{frame}.png")
        record["frames"].append(frame)
        record["joints"].append(moved.tolist())
        counts = image.histogram() + labels.histogram()
        record["histogram"] = np.add(record["histogram"], counts).tolist()
    write_whole(out / ".parts" / split / f"{clip}.json", json.dumps(record).encode())


# ------ Which frames
def read_poses(path):
    """A clip's poses (T, 72) float32, the pelvis at 0, and None or why there are none."""
    try:
        joints = read_joints(path)[:, :, 2:]
        return np.nan_to_num(joints - joints[:, :1]).clip(-9, 9).reshape(-1, 72), None
    except Exception as error:              # a broken file makes its reader stumble in any way
        return np.zeros((0, 72), np.float32), f"info.mat: {error!r}"


def pick(poses, wanted, how, clusters, rng):
    """Rows (ascending) to take of the frames with these poses (N, 72), which lie clip by clip.
    "spread": the same number from each cluster, as far as it has them, evenly over its frames;
    "cluster": the one cluster whose size is nearest to `wanted`."""
    if not 0 < wanted < len(poses):
        return np.arange(min(wanted, len(poses)))
    # Neighbouring frames are so alike that more than 200,000 poses would hardly move the centres.
    few = poses[rng.choice(len(poses), min(len(poses), 200_000), replace=False)]
    centres, _ = kmeans2(few, min(clusters, len(few)), iter=30, minit="++", rng=rng)
    cluster, _ = vq(poses, centres)
    members = sorted((np.flatnonzero(cluster == k) for k in np.unique(cluster)), key=len)
    if how == "cluster":
        return min(members, key=lambda rows: abs(len(rows) - wanted))
    taken = []
    for i, rows in enumerate(members):              # what small clusters lack, the larger ones give
        count = min(len(rows), (wanted - sum(map(len, taken))) // (len(members) - i))
        taken.append(rows[((np.arange(count) + rng.random()) * len(rows) / count).astype(int)])
    return np.sort(np.concatenate(taken))


def choose(args):
    """The frames [(split, folder, clip, [t, ...])] to take from below RAW; rows of skipped.csv."""
    clips, skipped, found = [], [], {}
    for split in ("val", "train", "test"):          # val before test, which leaves its clips out
        run = Path(args.raw, split, f"run{args.run}")
        if not run.is_dir():
            raise Problem(f"there is no folder {run}: --raw is usually SURREAL/data/cmu")
        paths = [run / path for ending in (".mp4", "_segm.mat", "_info.mat")    # but no "._*"
                 for path in sorted(glob.glob(f"**/*{ending}", root_dir=run, recursive=True))]
        found[split] = {path.stem.removesuffix("_segm").removesuffix("_info"): path.parent
                        for path in paths}
        for clip, folder in sorted(found[split].items()):
            if any(folder.match(name) or (folder / clip).match(name) for name in args.exclude):
                skipped.append((clip, "", "excluded"))
            elif split == "test" and clip in found["val"]:
                skipped.append((clip, "", "also in val"))
            else:
                clips.append((split, folder, clip))
    jobs = [(folder / f"{clip}_info.mat",) for _, folder, clip in clips]
    read = list(in_parallel(read_poses, jobs, args.workers, "reading poses"))
    skipped += [(clip, "", why) for (_, why), (_, _, clip) in zip(read, clips) if why]
    times = [[] for _ in clips]
    for number, split in enumerate(SPLITS):
        of_split = [i for i, clip in enumerate(clips) if clip[0] == split]
        frames = [(i, t) for i in of_split for t in range(len(read[i][0]))]
        poses = np.concatenate([read[i][0] for i in of_split] or [np.zeros((0, 72))])
        how, clusters = ("spread", 1) if split == "val" else (args.pick, args.clusters)
        rng = np.random.default_rng([args.seed, number])
        for row in pick(poses, getattr(args, split), how, clusters, rng):
            i, t = frames[row]
            times[i].append(t)
    return [(*clip, chosen) for clip, chosen in zip(clips, times) if chosen], skipped


# ------ The prepared folder
def start_worker():
    """Workers ignore Ctrl-C and exit with their parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()


def in_parallel(function, jobs, workers, what):
    """Yields function(*job) for all jobs, in order, from `workers` processes (0: from this one; at
    most 61, for Windows), and shows a bar; without a terminal, a line every half minute."""
    with ProcessPoolExecutor(min(workers, 61) or 1, initializer=start_worker) as pool:
        results = pool.map(function, *zip(*jobs)) if workers else (function(*j) for j in jobs)
        yield from tqdm(results, what, len(jobs), unit=" clips",
                        mininterval=0.2 if sys.stderr.isatty() else 30)


def write_whole(path, data):
    """Writes bytes to a file that is there whole or not at all, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def check_settings(folder, note, settings):
    """Raises Problem if `folder` was made with other settings, as its JSON file `note` tells, or if
    it holds other files. The folder .parts may be there without a note, after an early kill."""
    if note.exists():
        found = json.loads(note.read_text(encoding="utf-8")).get("settings", {})
        differing = {key: found.get(key) for key in settings if found.get(key) != settings[key]}
        if differing:
            raise Problem(f"{folder} was made with {differing}: name another --out or remove it")
    elif folder.exists() and any(path.name != ".parts" for path in folder.iterdir()):
        raise Problem(f"{folder} holds other files: name another --out, a new or an empty folder")


def prepare(args, settings):
    """Prepares args.raw into args.out, or goes on with it. Raises Problem."""
    out, parts = args.out, args.out / ".parts"
    chosen, skipped = choose(args)
    write_whole(parts / "settings.json", json.dumps(dict(settings=settings)).encode())
    for split in SPLITS:
        for folder in ("images", "labels"):
            (out / split / folder).mkdir(parents=True, exist_ok=True)
    jobs = [(out, args.size, args.margin, *job) for job in chosen
            if not (parts / job[0] / f"{job[2]}.json").exists()]
    list(in_parallel(extract, jobs, args.workers, "writing frames"))
    for split in reversed(SPLITS):                  # train comes last: its frames are used below
        frames, joints, histogram = [], [], np.zeros(4 * 256, int)
        for path in sorted((parts / split).glob("*.json")):
            record = json.loads(path.read_text())
            frames += record["frames"]
            joints += record["joints"]
            skipped += record["skipped"]
            histogram += record["histogram"]
        np.savez(out / split / "joints.npz", frames=np.array(frames, str),
                 joints=np.array(joints, np.float32).reshape(-1, 24, 2))
        print(f"{split}: {len(frames)} frames ({getattr(args, split)} wanted)")
    skipped.sort(key=lambda row: (row[0], row[1] or 0))
    with open(out / "skipped.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("clip", "frame", "reason"), *skipped])
    if not all(any((out / split / "images").iterdir()) for split in SPLITS):
        raise Problem(f"a split has no frame: mend what {out}/skipped.csv lists, remove {out}")
    shown = [frames[i] for i in np.linspace(0, len(frames) - 1, 8).astype(int)]
    rows = [[Image.open(out / "train" / name.format(frame)).convert("RGB").resize((160, 160))
             for frame in shown] for name in ("images/{}.jpg", "labels/{}.png")]
    Image.fromarray(np.vstack([np.hstack(row) for row in rows])).save(out / "preview.png")
    *colours, pixels = histogram.reshape(4, 256)
    levels, count = np.arange(256) / 255, len(frames) * args.size ** 2
    mean = colours @ levels / count
    std = np.sqrt(np.maximum(colours @ levels ** 2 / count - mean ** 2, 255 ** -2))
    classes = dict(
        names=NAMES, palette=PALETTE, mirror=MIRROR, groups=GROUPS,
        joint_mirror=[MIRROR[joint + 1] - 1 for joint in range(24)],
        pixels=pixels[:len(NAMES)].tolist(), size=args.size, mean=mean.tolist(), std=std.tolist(),
        settings=settings, source="rendered stand-in, not SURREAL" if args.synthesize else
        f"SURREAL, run{args.run}; its left is the visible person's right")
    write_whole(out / "classes.json", (json.dumps(classes, indent=1) + "\n").encode())


# ------ The stand-in: clips in SURREAL's raw layout, after the paper's Section 2.1, step by step.
# What SURREAL takes from measured data is drawn here from the clip's own random generator `rng`.

# Body model. SURREAL: SMPL, a mesh of 6,890 vertices learned from scans of people. Here: the SMPL
# skeleton with flesh of tapered capsules. Millimetres; x to the body's left, y up, z forward.
PARENT = (0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
# The joints of the T-pose; a part's label is its joint's number + 1.
T_POSE = np.array("""
    0 0 0   80 -85 0   -80 -85 0   0 105 -15   100 -475 0   -100 -475 0   0 235 -20   95 -885 -30
    -95 -885 -30   0 300 -10   115 -945 85   -115 -945 85   0 500 -35   75 410 -25   -75 410 -25
    0 585 0   180 435 -30   -180 435 -30   435 430 -40   -435 430 -40   685 435 -35   -685 435 -35
    765 430 -30   -765 430 -30""".split(), float).reshape(24, 3) / 1000
# Capsules of the middle and the left side: joint, ends a and b (x, y, z), their radii.
FLESH = """
0 60 68 -10 74 -72 -10 102 112, 0 78 -60 -50 80 -95 -45 88 88, 0 0 50 0 0 -85 5 100 85,
3 50 118 -10 46 195 -10 101 99, 6 46 220 -10 54 285 -10 99 103, 9 55 315 -12 64 365 -20 105 92,
9 0 310 -10 0 410 -28 108 84, 12 0 500 -42 0 600 -12 58 55, 15 0 708 -34 0 714 0 88 81,
15 0 664 22 0 610 52 69 37, 15 0 684 93 0 657 110 8 14, 15 76 655 -8 80 688 -14 12 17,
13 60 415 -22 150 437 -30 86 64, 13 25 485 -42 130 455 -35 46 46, 16 185 432 -30 220 430 -30 60 55,
16 220 431 -30 432 430 -40 52 41, 18 440 430 -40 520 431 -38 41 41,
18 520 431 -38 680 435 -35 41 27, 20 690 435 -46 755 430 -58 21 16,
20 690 434 -26 757 430 -14 21 16, 20 705 425 -10 745 415 25 17 14, 20 745 415 25 785 412 42 13 10,
22 768 430 -66 818 424 -78 12 9, 22 772 431 -44 840 425 -50 13 10, 22 772 431 -22 846 425 -21 13 10,
22 768 430 -1 832 424 10 13 10, 1 85 -110 0 98 -300 6 96 80, 1 98 -300 6 100 -470 0 80 58,
4 100 -480 0 98 -600 -16 56 57, 4 98 -600 -16 95 -885 -30 57 36, 7 95 -900 -35 95 -928 -58 36 34,
7 97 -905 -20 106 -938 60 35 27, 7 108 -938 -30 124 -944 68 26 22, 7 92 -938 0 92 -944 85 25 22,
10 91 -946 95 93 -950 145 20 15, 10 108 -947 95 111 -952 142 15 12,
10 123 -948 88 127 -953 130 14 11, 10 137 -949 78 141 -954 112 13 10"""
BY_SEX = ("9 72 340 52 78 332 62 56 50, 0 90 -20 -10 100 -85 -10 96 96",
          "9 75 370 30 90 375 22 66 60, 9 85 330 -40 110 400 -45 72 60")


def body_model(sex, shape):
    """Joint (C,) and geometry (C, 8) in metres of the capsules, the scales (24, 3) of each joint's
    flesh along x, y, z, and the joints (24, 3) so scaled. Body shape: ten coefficients with a
    meaning each. SURREAL: principal components of the people scanned for CAESAR."""
    left = np.array([row.split() for row in f"{FLESH}, {BY_SEX[sex]}".split(",")], np.float32)
    right = left[left[:, 1] > 0] * np.float32((1, -1, 1, 1, -1, 1, 1, 1, 1))
    right[:, 0] += ~np.isin(right[:, 0], (0, 3, 6, 9, 12, 15))          # right comes after left
    flesh = np.concatenate([left, right])
    tall, fat, legs, arms, broad, muscle, head, hands, hips, deep = 1 + .03 * shape
    scale = np.full((24, 3), tall * (.965, 1.01)[sex])
    scale[[0, 3, 6, 9]] *= broad * fat ** 1.6, 1, deep * fat ** 2
    scale[[0, 1, 2, 4, 5]] *= muscle * hips, legs, muscle * hips
    scale[16:20] *= arms, fat * muscle, fat * muscle
    scale[[12, 15]] *= head / tall ** .5
    scale[20:] *= hands
    joints = T_POSE.copy()
    for j, parent in enumerate(PARENT):
        joints[j] = joints[parent] + (T_POSE[j] - T_POSE[parent]) * scale[parent]
    return flesh[:, 0].astype(int), flesh[:, 1:] / 1000, scale, joints


# Body pose. SURREAL: motion capture (CMU), fitted to SMPL by MoSh. Here: a movement between two key
# poses, in degrees about the joints' axes, within limits, so that no joint bends the wrong way.
BODIES = np.array((     # weight; swing, raise of both arms (0: any); the first twelve angles
    (16, 0, 0, 0, 0, 3, 0, 0, 0, -2, 5, 5, -2, 5, 5),                   # standing
    (26, 0, 0, 3, 0, 4, 8, 0, 0, -28, 3, 12, 14, 3, 30),                # walking
    (8, 0, 0, 10, 0, 10, 12, 0, -8, -60, 3, 75, 12, 4, 50),             # running
    (5, 0, 0, 0, 0, 0, 0, 0, 0, -3, 22, 3, -3, 22, 3),                  # legs apart
    (3, 0, 0, -8, 0, 10, -8, 0, 5, -6, 4, 10, -82, 6, 20),              # kicking
    (9, -55, -60, -4, 0, 10, 0, 0, 5, -88, 10, 85, -84, 10, 80),        # sitting
    (2, -55, -60, -8, 0, 18, 0, 0, 8, -80, 48, 125, -80, 48, 125),      # sitting cross-legged
    (6, -75, -30, 28, 0, 24, 0, 0, -12, -110, 16, 115, -106, 16, 110),  # crouching
    (4, -80, -5, 40, 0, 38, 0, 0, 0, -48, 6, 20, -48, 8, 20),           # bent
    (2, -75, 45, 65, 0, 60, 0, 0, 10, -85, 5, 25, -85, 7, 25),          # bent double
    (2, -75, -5, 85, 0, 0, 0, 0, -25, -88, 6, 88, -70, 6, 78),          # on all fours
    (2, -15, 45, 88, 0, -5, 0, 0, -20, 0, 12, 6, -5, 14, 40),           # lying on the front
    (2, -55, -40, 0, 85, 14, 0, 0, 8, -45, 4, 65, -15, 8, 30),          # on a side
    (2, 0, 0, -88, 0, 4, 0, 0, 8, -5, 8, 8, -45, 6, 75),                # on the back
    (2, -20, 72, 178, 0, -4, 0, 0, -20, -8, 8, 10, -4, 8, 12)))         # standing on the hands
# Angles of: root, spine, neck; hip and knee; shoulder (roll, swing, raise) and elbow.
JOINT = (0, 0, 3, 3, 3, 12, 1, 1, 4, 2, 2, 5, 16, 16, 16, 18, 17, 17, 17, 19)
AXIS = (0, 2, 0, 1, 2, 0, 0, 2, 0, 0, 2, 0, 0, 1, 2, 1, 0, 1, 2, 1)
LOW = (-400, -400, -25, -40, -30, -40, *(-120, -12, 0) * 2, *(-90, -110, -85, -140) * 2)
HIGH = (400, 400, 80, 40, 30, 40, *(25, 60, 140) * 2, *(70, 35, 82, 0) * 2)


def motion(rng, frames, joints):
    """Local and global rotations (T, 24, 3, 3) and places (T, 24, 3) of the joints in a movement:
    the first of eight draws whose arms keep off the body, or the last. joints: (24, 3), T-pose."""
    time = np.linspace(rng.uniform(0, .5), rng.uniform(.5, 1), frames)[:, None]
    for _ in range(8):
        row, keys = rng.choice(len(BODIES), p=BODIES[:, 0] / BODIES[:, 0].sum()), []
        for _ in range(2):                              # of two rows that are alike: neighbours
            _, swing, lift, *angles = BODIES[row]
            arms = rng.uniform((-80, -90, -60, -120), (20, 20, 78, 0), (2, 4))
            arms[rng.random(2) < .6] = 0, -25, -72, -25                 # most hang
            if lift:
                arms[:] = 0, swing, lift, -20
            keys.append(np.concatenate([angles, *arms]) + rng.normal(0, np.repeat((4, 8), (6, 14))))
            row = np.clip(row + rng.integers(-1, 2), 0, len(BODIES) - 1)
        angles = keys[0] + time * time * (3 - 2 * time) * (keys[1] - keys[0])
        if rng.random() < .5:                           # the other leg first
            angles = angles[:, np.r_[:6, 9:12, 6:9, 12:20]]
            angles[:, [1, 3, 4]] *= -1
        euler = np.zeros((frames, 24, 3))
        euler[:, JOINT, AXIS] = np.clip(angles, LOW, HIGH)
        euler[:, [3, 6, 9]] = euler[:, [3]] / 3         # the spine shares its bend
        euler[:, [12, 15]] = euler[:, [12]] / 2
        euler[:, 1:3, 1] = .6 * euler[:, 1:3, 2]        # legs that spread turn outwards
        euler[:, 7:9, 0] = np.clip(-euler[:, :1, 0] - euler[:, 1:3, 0] - euler[:, 4:6, 0], -25, 40)
        euler[:, [2, 17, 19], 1:] *= -1                 # right limbs mirror the left
        jitter = rng.normal(0, 4, (24, 3)) * (.3, 2, 1)
        jitter[[4, 5, 18, 19]] = 0                      # knees and elbows are hinges
        jitter[22:, 2] = rng.uniform(0, 60, 2) * (-1, 1)                # fingers curl
        euler += jitter
        local, turn = np.zeros((2, frames, 24, 3, 3)) + np.eye(3)
        place = np.tile(joints, (frames, 1, 1))
        for j, parent in enumerate(PARENT):             # forward kinematics
            order, axes = ("YZX", [1, 2, 0]) if j in (16, 17) else ("XZY", [0, 2, 1])
            local[:, j] = Rotation.from_euler(order, euler[:, j, axes], degrees=True).as_matrix()
            turn[:, j] = turn[:, parent] @ local[:, j]
            place[:, j] = place[:, parent] + turn[:, parent] @ (joints[j] - joints[parent])
        core = (place[:, (0, 3, 6, 9, 12, 15, 4, 5)] + place[:, (0, 3, 6, 9, 12, 15, 1, 2)]) / 2
        if np.linalg.norm(place[:, 18:, None] - core[:, None], axis=3).min() > .15:
            break                                       # arms keep off spine, head and thighs
    return local, turn, place


# Texture. SURREAL: texture maps of scanned people, a fifth in tight grey clothes (CAESAR), the rest
# in their own. Here: a function of the place in the T-pose, so that patterns stick to the cloth.
SKIN = np.array(((.94, .78, .68), (.78, .58, .45), (.62, .43, .32), (.33, .22, .16)))


@functools.lru_cache(maxsize=1)
def noise():
    """Periodic pictures (8, 256, 256) float32 of 1/f noise, from rough to smooth."""
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256))
    frequency[0, 0] = np.inf
    white = np.fft.fft2(np.random.default_rng(0).standard_normal((8, 256, 256)))
    fields = np.fft.ifft2(white * frequency ** -np.linspace(.6, 2, 8)[:, None, None]).real
    return (fields / fields.std((1, 2), keepdims=True)).astype(np.float32)


def any_colour(rng, still=None):
    """A colour (3,), mostly muted; a fifth from `still`, so that colour tells nothing."""
    if still is not None and rng.random() < .2:
        return still[rng.integers(HEIGHT), rng.integers(WIDTH)] * rng.uniform(.7, 1.3)
    warm, tint = rng.normal(0, rng.choice((.08, .3), p=(.65, .35)), (2, 3))
    return np.clip(rng.beta(1.5, 1.6) * (1 + warm[0] * np.array((1, 0, -1)) + tint / 2), .03, .95)


def dress(rng, sex, still):
    """Draws skin, hair and clothes of a person in front of `still`. Returns the function
    texture(x, joint) -> colours (N, 3), wrinkles (N,), of places x (N, 3) of the T-pose."""
    def fabric():                                       # colours; axis, pitch, limit of a pattern
        wave, limit = rng.permutation(np.eye(3))[0], rng.choice((9, rng.uniform(-.4, .9)))
        return any_colour(rng, still), any_colour(rng, still), wave, rng.uniform(70, 300), limit

    shirt, trousers, shoes, shift = fabric(), fabric(), fabric(), rng.integers(256, size=(2, 1))
    grey, long, tone = rng.uniform(.3, .7), rng.random() < (.5, .05)[sex], 3 * rng.random() ** 1.5
    skin = np.array([np.interp(tone, range(4), channel) for channel in SKIN.T])
    hair = rng.uniform(.1, 1.3) * rng.choice(((.5, .36, .24), (.45, .42, .4), skin), p=(.8, .1, .1))
    sleeve, hem, shoe_top = (rng.choice(lengths) for lengths in (
        (.19, .27, .27, .34, .67), (-.24, -.44, -.90, -.90), (-9, -.895, -.87, -.76)))
    neckline, bottom, waist, hairline, rough = rng.uniform(
        (.46, -.14, .02, .72, .08), (.54, .03, .09, .745, .3))
    if rng.random() < .2:                               # as scanned for CAESAR
        shirt = trousers = (np.full(3, grey), *shirt[1:4], 9)
        sleeve, hem, shoe_top, neckline, bottom = (.17, -1)[sex], -.25, -9, .44, .26

    def texture(x, joint):
        across, up, front = np.abs(x[:, 0]), x[:, 1], x[:, 2]
        row, column = ((np.stack([up, x[:, 0] + front]) / .006).astype(int) + shift) & 255
        uneven, cut = noise()[5, row, column], .006 * noise()[2, row, column]
        legs = np.isin(joint, (0, 1, 2, 3, 4, 5, 7, 8)) & (up < waist) & (up > hem + cut)
        torso = np.isin(joint, (0, 3, 6, 9, 13, 14)) & (up > bottom + cut)
        top = (torso | (joint > 15) & (joint < 20)) & (across < sleeve + cut)
        top &= (up + across < neckline) | (front < -.02) | (across > .09)
        feet = np.isin(joint, (4, 5, 7, 8, 10, 11)) & (up < shoe_top) & ~legs
        head = joint == 15
        scalp = (up > hairline + cut - np.clip(.045 - front, 0, .2)) & (up > .645 + cut)
        scalp |= long & (up > .52) & (front < .02) & ((front < -.05) | (across > .05))
        scalp &= (head | long & (joint == 12)) & ((up > .70) | (across < .078) | (front < -.035))
        colour = skin * (1 + .05 * uneven[:, None])
        for cx, cy, width, height, paint in (           # eyes, brows, mouth
                (.032, .681, .009, .008, .2 * skin), (.034, .701, .019, .005, .7 * hair),
                (0, .628, .025, .008, skin * (.8, .5, .5))):
            spot = ((across - cx) / width) ** 2 + ((up - cy) / height) ** 2 < 1
            colour[head & (front > .03) & spot] = paint
        for where, (first, second, wave, pitch, limit) in (
                (legs, trousers), (top, shirt), (feet, shoes)):         # plain, stripes or blotches
            pattern = np.sin(pitch * x[where, :2]) @ wave[:2] + wave[2] * uneven[where] > limit
            colour[where] = np.where(pattern[:, None], second, first)
            colour[where] *= 1 + .12 * uneven[where, None]
        colour[top & ((torso & (up < bottom + .015 + cut)) | (across > sleeve - .015 + cut))] *= .75
        colour[scalp] = hair * (1 + 40 * cut[scalp, None])
        return np.clip(colour, .01, 1), np.where(legs | top | feet, rough, .04)
    return texture


# Camera. As in SURREAL, it looks at the pelvis from a random distance and yaw, and its matrix has
# determinant -1, so pictures are mirrored. y points down; the camera, at +x, looks along -x.
def project(points, camera):
    """World points (..., 3) to x, y in pixels and depth in metres (..., 3)."""
    x, y, z = np.moveaxis(points - camera, -1, 0)
    return np.stack([WIDTH / 2 + FOCAL * z / x, HEIGHT / 2 - FOCAL * y / x, -x], -1)


@np.errstate(invalid="ignore", divide="ignore")         # of the lines that miss
def draw_body(joint, capsules, scale, turn, place, camera):
    """Draws capsules (C, 8) on joint (C,) into a z-buffer of twice the resolution, each in its
    joint's T-pose, where it stands still: the lines of sight are moved instead. turn (24, 3, 3) and
    place (24, 3) are the joints' in the world. Returns the body's sub-pixels: index in (480, 640),
    depth and joint (N,), normal in the world and place in the T-pose (N, 3)."""
    grid = np.arange(480 * 640).reshape(480, 640)
    depth, owner = np.full(grid.size, np.inf, np.float32), np.zeros(grid.size, int)
    normal, rest = np.zeros((2, grid.size, 3), np.float32)
    inverse = (turn.swapaxes(1, 2) / scale[:, :, None]).astype(np.float32)      # world to T-pose
    eyes = ((inverse @ (camera - place)[..., None])[..., 0] + T_POSE).astype(np.float32)
    ends = (capsules[:, :6].reshape(-1, 2, 3) - T_POSE[joint, None]) * scale[joint, None]
    ends = project(ends @ turn[joint].swapaxes(1, 2) + place[joint, None], camera)      # (C, 2, 3)
    reach = 1.05 * FOCAL * capsules[:, 6:].max(1) * scale[joint].max(1) / ends[..., 2].min(1)
    corners = ends[..., :2].min(1) - reach[:, None], ends[..., :2].max(1) + reach[:, None] + .5
    boxes = np.clip(2 * np.concatenate(corners, 1), 0, (640, 480, 640, 480)).astype(int)
    for j, (x0, y0, x1, y1), (*ends, ra, rb) in zip(joint, boxes, capsules):
        a, b, eye = np.float32(ends[:3]), np.float32(ends[3:]), eyes[j]
        x = (np.arange(x0, x1, dtype=np.float32)[:, None] + .5 - 320) / (2 * FOCAL)
        y = (np.arange(y0, y1, dtype=np.float32)[:, None, None] + .5 - 240) / (2 * FOCAL)
        sight = (y * inverse[j][:, 1] - x * inverse[j][:, 2] - inverse[j][:, 0]).reshape(-1, 3)
        # Where lines eye + t sight (N, 3) first meet two balls and the cone around both: t (N,) or
        # nan, and `along` the axis, 0 to 1. After Inigo Quilez' rounded cone.
        axis, taper, oa, ob = b - a, ra - rb, eye - a, eye - b
        length, slope = axis @ axis, axis @ oa
        flank, m2, m3, dd = length - taper ** 2, sight @ axis, sight @ oa, (sight * sight).sum(1)
        k2 = flank * dd - m2 * m2
        k1 = flank * m3 - m2 * (slope - taper * ra)
        k0 = flank * (oa @ oa) - slope * slope + (2 * slope * taper - length * ra) * ra
        t = (-k1 - np.sqrt(k1 * k1 - k0 * k2)) / k2
        along = (slope - ra * taper + t * m2) / flank
        t[~((k2 > 0) & (along > 0) & (along < 1))] = np.nan             # only between the balls
        for towards, end, radius in ((m3, oa, ra), (m3 - m2, ob, rb)):
            t = np.fmin(t, (-towards - np.sqrt(towards ** 2 - dd * (end @ end - radius ** 2))) / dd)
        along = np.clip((slope - ra * taper + t * m2) / flank, 0, 1)
        pixel = grid[y0:y1, x0:x1].ravel()
        near = np.flatnonzero(t < depth[pixel] + .02)
        pixel, t, hit = pixel[near], t[near], eye + t[near, None] * sight[near]
        outward = (hit - a - along[near, None] * axis) @ inverse[j]
        outward /= np.linalg.norm(outward, axis=1, keepdims=True)
        # Where two surfaces are within 2 cm, their normals melt into each other.
        share = np.clip(.5 + (depth[pixel] - t) / .04, 0, 1)[:, None]
        normal[pixel] += share * (outward - normal[pixel])
        nearer = t < depth[pixel]
        pixel = pixel[nearer]
        depth[pixel], owner[pixel], rest[pixel] = t[nearer], j, hit[nearer]
    index = np.flatnonzero(depth < np.inf)
    return index, depth[index], owner[index], normal[index], rest[index]


# Background. SURREAL: photographs of rooms (LSUN). Here: a picture of a folder, or shapes one over
# another, whose sizes have a photograph's statistics: "dead leaves" (Lee, Mumford & Huang 2001).
def background(rng, path):
    """A still picture (240, 320, 3) float32 in 0..1, of the file `path` or, if None, made up."""
    if path:
        picture = ImageOps.fit(Image.open(path).convert("RGB"), (WIDTH, HEIGHT))
        return np.asarray(picture, np.float32) / 255
    # 1. count (S) shapes, large first. Some recede to a vanishing point; others lie, stand or lean.
    width, count = int(WIDTH * rng.uniform(.8, 1.25)), int(np.exp(rng.uniform(2.5, 5)))
    frame = np.array((width, width * 3 // 4))           # enlarged it gets soft, reduced sharp
    size = np.sort(np.exp(-rng.uniform(0, 3.6, count)))[::-1] * width / 2
    size[:4] *= 5                                       # walls and floor
    centre, vanish = rng.uniform(-.05, 1.05, (count, 2)) * frame, rng.uniform(.1, .9, 2) * frame
    recede, kind = np.arctan2(*(vanish - centre).T[::-1]), rng.integers(4, size=count)
    angle = np.choose(kind, (recede, 0, np.pi / 2, rng.uniform(0, 7, count)))
    long, wide, circle = (np.stack([np.cos(v), np.sin(v)], 1) for v in (
        angle, angle * (kind > 0) + np.pi / 2, np.arange(16) * np.pi / 8 + .1))
    half = size * rng.uniform(.1, 1, count)
    # 2. Draw their numbers one over another: index (H, W) is the shape that a pixel shows.
    index = Image.new("I", tuple(frame.tolist()))
    for k in range(count):                              # a rectangle, an ellipse, or in between
        outline = np.sign(circle) * np.abs(circle) ** rng.choice((.01, .5, 1), p=(.6, .1, .3))
        corners = centre[k] + outline @ np.stack([size[k] * long[k], half[k] * wide[k]])
        ImageDraw.Draw(index).polygon(corners.ravel().tolist(), fill=k)
    index = np.asarray(index)
    # 3. A shape's looks: two colours in stripes or tiles, 1/f noise, light with a gradient.
    palette = np.float32([any_colour(rng) for _ in range(count // 4 + 4)] + list(SKIN))
    first, second = palette[rng.integers(np.where(rng.random((2, count)) < .5, 5, len(palette)))]
    period = rng.choice((4, 12, 40, 9e9), (2, count)) * rng.uniform(.6, 1.6, (2, count))
    tile, contrast = rng.random(256), rng.choice((0, .1, .4, 1), count)
    stretch = rng.uniform(.3, 2, count) * rng.choice((.1, 1, 1, 3), (2, count))
    bright = np.where(rng.random(count) < .04, 2.5, rng.uniform(.5, 1.3, count))    # a few lamps
    slope, rough = rng.normal(0, .6 / width, (count, 2)), rng.uniform(.02, .3, count)
    rim = rng.choice((0, .7), count)                    # darker there, as if round
    # 4. From shapes (S,) to pixels (H, W): u along and v across the shape, from its centre.
    y, x = np.mgrid[:frame[1], :width].astype(np.float32)
    axes = np.stack([long, long[:, ::-1] * (-1, 1), slope])                 # (3, S, 2)
    u, v, ramp = (axis[index, 0] * x + axis[index, 1] * y - start[index] for axis, start in zip(
        np.float32(axes), np.float32((axes * centre).sum(2))))
    period_u, period_v, stretch_u, stretch_v, contrast, bright, rough, rim, half = np.float32(
        [*period, *stretch, contrast, bright, rough, rim, half])[:, index]
    cell = ((u // period_u * 7 + v // period_v * 13).astype(int) + index) & 255
    share = (tile[cell] * contrast)[..., None]          # of the second colour
    row, column = np.stack([u * stretch_u, v * stretch_v]).astype(int) & 255
    light = bright * np.exp(ramp) * (1 + rough * noise()[index & 7, row, column])
    light *= 1 - rim * np.minimum((v / half) ** 2, 1)
    image = (first[index] * (1 - share) + second[index] * share) * light[..., None]
    image *= rng.uniform(.12, .75) * rng.normal((1.1, 1, .9), .1) / image.mean()
    image = 255 * (1 - np.exp(-1.6 * image.clip(0))) ** .8              # film: highlights roll off
    picture = Image.fromarray(image.astype(np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
    return np.asarray(picture, np.float32) / 255


# Light and ground truth. SURREAL: Blender, and its further passes. Here: the z-buffer.
def paint(still, texture, light, index, depth, joint, normal, x):
    """The image (240, 320, 3) float32 of a drawn body before `still`, and its labels (240, 320)
    uint8: joint + 1 of the nearest of a pixel's four sub-pixels, where two of them are body. As in
    SURREAL, there are stray spots of head on chest and pelvis."""
    row, column = ((x[:, [1, 0]] + x[:, [2, 2]]) / .005).astype(int).T & 255
    colour, wrinkles = texture(x, joint)
    normal = normal + wrinkles[:, None] * noise()[4:7, row, column].T
    # As in SURREAL, light is nine coefficients of spherical harmonics (1; y, z, x; xy, yz, zz, xz,
    # xx - yy), and what arrives is equation 13 of Ramamoorthi & Hanrahan (2001).
    nx, ny, nz = (normal / np.linalg.norm(normal, axis=1, keepdims=True)).T
    shade = np.maximum(light @ np.stack((
        .886 * np.ones_like(nx), 1.023 * ny, 1.023 * nz, 1.023 * nx, .858 * nx * ny, .858 * ny * nz,
        .743 * nz * nz - .248, .858 * nx * nz, .429 * (nx * nx - ny * ny))), .02)
    colour = np.sqrt(np.minimum(colour ** 2 * shade[:, None], 1))       # about a display's gamma
    stray = np.isin(joint, (0, 9)) & (np.sin(45 * x[:, 0] + 1) * np.sin(38 * x[:, 1]) > .95)
    pixel = index // 640 // 2 * WIDTH + index % 640 // 2
    cover = np.bincount(pixel, minlength=HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) / 4
    image = (still * (1 - cover[..., None])).astype(np.float32)
    for channel in range(3):
        image[..., channel].flat += np.bincount(pixel, colour[:, channel] / 4, HEIGHT * WIDTH)
    labels, order = np.zeros((HEIGHT, WIDTH), np.uint8), np.argsort(-depth)
    labels.flat[pixel[order]] = np.where(stray, HEAD, joint + 1)[order]         # the nearest last
    labels[cover < .5] = 0
    return image, labels


def make_clip(raw, split, i, seed, frames, picture):
    """Renders clip i of a split: its mp4, _segm.mat and, as the mark that it is done, _info.mat."""
    person, number = dict(train=200, val=800, test=900)[split] + i // 40, i % 4 + 1
    sequence = f"{person:03d}_{i % 40 // 4 + 1:02d}"    # has four clips; a person has ten sequences
    path = raw / split / "run0" / sequence / f"{sequence}_c{number:04d}"
    if Path(f"{path}_info.mat").exists():
        return
    rng = np.random.default_rng((seed * 1_000_003 + i, SPLITS.index(split)))
    still, sex, light = background(rng, picture), int(rng.integers(2)), rng.uniform(-.7, .7, 9)
    light[:2] = rng.uniform((.5, -.7), (1.4, 0))        # never dark, more from above
    texture, shape = dress(rng, sex, still), np.clip(rng.normal(0, 1.2, 10), -2.5, 2.5)
    *flesh, joints = body_model(sex, shape)
    local, turn, place = motion(rng, frames, joints)
    place[..., 1] -= place[..., 1].min(1, keepdims=True)                # on a floor
    yaw, distance = rng.uniform(0, 2 * np.pi), np.clip(rng.normal(8, 1), 5, 11)
    world = np.diag((1., -1, -1)) @ Rotation.from_euler("y", yaw + np.pi / 2).as_matrix()
    turn, place = world @ turn, place @ world.T
    camera = place[0, 0] + (distance, *rng.normal(0, rng.choice((.1, .5), p=(.92, .08)), 2))
    blur, grain, masks, video = rng.uniform(0, .8), rng.uniform(.002, .02), {}, io.BytesIO()
    with av.open(video, "w", format="mp4") as container:
        # One thread and no B-frames, or else the file differs from run to run.
        options = dict(crf=str(rng.integers(18, 27)), preset="veryfast", bf="0", threads="1")
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for t in range(frames):
            body = draw_body(*flesh, turn[t], place[t], camera)
            image, masks[f"segm_{t + 1}"] = paint(still, texture, light, *body)
            image = ndimage.gaussian_filter(image, (blur, blur, 0), truncate=2)
            image += grain * rng.standard_normal(image.shape, np.float32)
            image = (255 * image.clip(0, 1)).round().astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    info = dict(
        joints2D=project(place, camera)[..., :2].round().transpose(2, 1, 0).squeeze(),
        joints3D=place.transpose(2, 1, 0).squeeze(),    # as in SURREAL, squeezed if T = 1
        pose=Rotation.from_matrix(local.reshape(-1, 3, 3)).as_rotvec().reshape(frames, 72).T,
        light=np.tile(light[:, None], frames), shape=np.tile(shape[:, None], frames),
        zrot=np.full((frames, 1), yaw), camDist=distance, camLoc=camera[:, None])
    info = {key: np.float32(value) for key, value in info.items()}
    names = np.array([[str(picture or path.name)] * frames], object)    # a MATLAB cell array
    info |= dict(sequence=sequence, source="stand-in, not SURREAL", bg=names, cloth=names,
                 clipNo=np.uint16(number), stride=np.uint8(50), gender=np.uint8([[sex]] * frames))
    write_whole(Path(f"{path}.mp4"), video.getvalue())
    for ending, fields in (("segm", dict(sorted(masks.items()))), ("info", info)):
        file = io.BytesIO()
        savemat(file, fields, do_compression=True)
        header = b"MATLAB 5.0 MAT-file".ljust(116)      # SciPy's would carry the date
        write_whole(Path(f"{path}_{ending}.mat"), header + file.getvalue()[116:])


# ------ Command line
def synthesize(raw, clips, frames, seed, workers, backgrounds):
    """Fills raw/{train,val,test}/run0 with `clips` clips for train, a tenth for val and for test,
    except those already there. Of the pictures in `backgrounds`, train gets eight in ten."""
    settings = dict(clips=clips, frames=frames, seed=seed, backgrounds=backgrounds)
    check_settings(raw, raw / "settings.json", settings)
    pictures = [None] * 10 if not backgrounds else sorted(
        path for path in Path(backgrounds).rglob("[!.]*")
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(pictures) < 10:
        raise Problem(f"--backgrounds {backgrounds} has {len(pictures)} pictures; 10 are required")
    write_whole(raw / "settings.json", json.dumps(dict(settings=settings)).encode())
    tenth, for_train = max(2, clips // 10), [p for i, p in enumerate(pictures) if i % 10 < 8]
    jobs = []
    for split, count, own in (("train", clips, for_train), ("val", tenth, pictures[8::10]),
                              ("test", tenth, pictures[9::10])):
        jobs += [(raw, split, i, seed, frames, own[i % len(own)]) for i in range(count)]
    list(in_parallel(make_clip, jobs, workers, "rendering the stand-in"))


def main(argv=None):
    """Returns the exit status: 0, 2 after a sentence about what can be mended, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--raw", type=os.path.abspath, metavar="DIR",
        help="SURREAL's folder with train, val and test, usually SURREAL/data/cmu")
    add("--synthesize", action="store_true", help="render a stand-in into OUT-raw, prepare that")
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
    add("--workers", type=int, default=os.cpu_count(), help="processes, 150 MB each; 0 starts none")
    add("--seed", type=int, default=0, help="of the choice of frames and of the stand-in's people")
    add = parser.add_argument_group("which frames").add_argument
    add("--run", type=int, choices=(0, 1, 2), default=0, help="clips overlap by 50, 70, 30 %%")
    for split, number in (("train", 90000), ("val", 15000), ("test", 15000)):
        add(f"--{split}", type=int, default=number, help=f"frames for {split}, or all that exist")
    add("--pick", choices=("spread", "cluster"), default="spread",
        help="as many frames of every cluster of poses, or the one cluster nearest to the wanted "
             "size, as in the paper; val is spread over its clips")
    add("--clusters", type=int, default=25, help="number of clusters of poses")
    add("--exclude", nargs="+", action="extend", metavar="GLOB", default=[],
        help="clips or sequences to leave out; misshapen are '18_*' '19_*' '*143_21*'")
    add = parser.add_argument_group("the images").add_argument
    add("--size", type=int, default=320, help="side of the square images, in pixels")
    add("--margin", type=float, default=0.1, help="space around the person, as a share of its box")
    add = parser.add_argument_group("the stand-in, with --synthesize").add_argument
    add("--clips", type=int, default=1000, help="clips for train; a tenth each for val and test")
    add("--frames", type=int, default=2, help="frames of a clip")
    add("--backgrounds", type=os.path.abspath, metavar="DIR", help="photographs for backgrounds")
    args = parser.parse_args(argv)
    for name in ("clips", "frames", "backgrounds"):
        if not args.synthesize and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} needs --synthesize")
    counts = args.train, args.val, args.test, args.clusters, args.size, args.clips, args.frames
    if min(*counts, args.workers + 1, args.seed + 1, args.margin >= 0) < 1:
        parser.error("counts are at least 1, --workers, --seed and --margin at least 0")
    args.raw = args.raw or f"{args.out}-raw"
    done, parts = args.out / "classes.json", args.out / ".parts"
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "workers")}
    try:
        check_settings(args.out, done if done.exists() else parts / "settings.json", settings)
        if not done.exists():
            if args.synthesize:
                synthesize(Path(args.raw), args.clips, args.frames, args.seed, args.workers,
                           args.backgrounds)
            prepare(args, settings)
        shutil.rmtree(parts, ignore_errors=True)
        print(f"{args.out} is ready, with these settings; preview.png shows some of it")
        return 0
    except (Problem, OSError, BrokenExecutor) as error:
        print(f"prepare_surreal.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_surreal.py: stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
