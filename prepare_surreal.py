"""From raw SURREAL clips, or from your own pictures, to the folder that train.py reads.

For SURREAL (arXiv 1701.01370) this is the procedure of the paper (Borrego Carazo, 2018, Section
2.2): choose frames by k-means on their 3D joints, give stray head labels back to the torso, cut out
a square around the person. Differs from the paper: it takes the frames of one cluster of poses
(`--pick cluster`), here every cluster gives the same number; and no test clip shares poses with a
clip of val. For your own pictures, masks of class ids become labels (`--images`).

What was chosen is in settings.json, what could not be used in skipped.csv with its reason, and
classes.json is written last. A command that was stopped is repeated: clips go on, own pictures
start again. The last part of this file renders a stand-in in SURREAL's layout, for those who do not
have SURREAL.
"""
import argparse
import collections
import contextlib
import csv
import dataclasses
import fnmatch
import functools
import glob
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import unicodedata
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from scipy.cluster.vq import kmeans2, vq
from scipy.io import loadmat, savemat
from scipy.spatial.transform import Rotation
from tqdm import tqdm

SPLITS = ("train", "val", "test")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
HEAD, IGNORE = 16, 255                          # IGNORE labels what lies outside the frame
HEIGHT, WIDTH, FOCAL = 240, 320, 600.0          # SURREAL's frames; their principal point: 160, 120
# Clips whose numbers differ by at most this much share poses, in run0, run1 and run2, where clips
# begin 50, 30 and 70 frames after one another. Clips of 100 frames, 30 apart: the first shares 70,
# 40 and 10 frames with the next three, so 3. At 50 or 70 apart only the next one overlaps: 1.
SHARING = (1, 3, 1)

# SURREAL's labels: 0, then the SMPL joint's number + 1. Its images are mirrored: what it calls
# "left" is on the visible person's right; labels and joints agree, so the names stay as they are.
# This file imports nothing of ours, so NAMES stands in hourglass.py as well, and Problem, group_of,
# the endings of pictures and an error of one line in evaluate.py.
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
# The 14 parts of SURREAL's own training code: hands with fingers, feet with toes, one torso.
MERGE = {"background": [0], "head": [16], "torso": [1, 4, 7, 10, 13, 14, 15],
         "right upper arm": [18], "right lower arm": [20], "right hand": [22, 24],
         "left upper arm": [17], "left lower arm": [19], "left hand": [21, 23],
         "right upper leg": [3], "right lower leg": [6], "right foot": [9, 12],
         "left upper leg": [2], "left lower leg": [5], "left foot": [8, 11]}
SURREAL = dict(names=NAMES, palette=PALETTE, mirror=MIRROR, groups=GROUPS, merge=MERGE,
               joint_mirror=[part - 1 for part in MIRROR[1:]])


class Problem(Exception):
    """What the user can mend, in one sentence."""


# ------ One frame. What cannot be used raises ValueError.
def repair_head(labels):
    """Refills SURREAL's stray head labels (paper, Section 2.2); labels (H, W) uint8, as returned.

    SURREAL shows spots of head on chest and pelvis. Stray are the 8-connected components of the
    head that are smaller than a fifth of the largest (SURREAL's strays reach 4.5 % of it). The
    paper refills all but the largest, but a hand across the face splits a true head in two.
    A pixel gets the most common label of its 8 neighbours, from the border of the component inward.
    Body parts come before background, and the lower id where two are as common: neighbours
    0 0 0 0 0 10 10 7 make it 10.
    """
    components, _ = ndimage.label(labels == HEAD, np.ones((3, 3)))
    sizes = np.bincount(components[components > 0], minlength=1)
    # stray[n]: component n has less than a fifth of the largest's pixels.
    stray = 5 * sizes < sizes.max()
    stray[0] = False                            # component 0 is everything but the head
    padded = np.pad(labels, 1, constant_values=IGNORE)
    inside = padded[1:-1, 1:-1]                 # a view: what is written there is in padded too
    inside[stray[components]] = IGNORE          # IGNORE has no vote, and is refilled below
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))          # (H, W, 3, 3)
    while (inside == IGNORE).any():
        unknown = inside == IGNORE
        neighbours = windows[unknown].reshape(-1, 9, 1)
        votes = (neighbours == np.arange(len(NAMES))).sum(axis=1)               # (pixels, 25)
        # 8 neighbours at most, so one vote for a part, times 10, beats 8 for the background.
        votes[:, 1:] *= 10
        inside[unknown] = np.where(votes.any(axis=1), votes.argmax(axis=1), IGNORE)
    return inside


def crop_box(labels, margin):
    """The square (x0, y0, side), in whole pixels, around the person in labels (H, W).

    It is the tight box of the labels that are not 0, with `margin` (a share of the box) added on
    each side, squared to the longer side. It is shifted, not shrunk, into the frame where it fits:
    a box of 50 x 100 with a margin of 0.1 gives a side of 120.
    """
    if np.count_nonzero(labels) < 200:
        raise ValueError("no person, or one of fewer than 200 pixels")
    columns = np.flatnonzero(labels.any(axis=0))
    rows = np.flatnonzero(labels.any(axis=1))
    extents = np.ptp(columns) + 1, np.ptp(rows) + 1
    if min(extents) < 16:
        raise ValueError("a person narrower than 16 pixels, though of 200 or more")
    side = round(max(extents) * (1 + 2 * margin))
    corner = []
    for line, length in zip((columns, rows), labels.shape[::-1]):
        centred = (line[0] + line[-1] + 1 - side) // 2
        # room: how far the square can move in the frame. Negative: the square is larger, and may
        # only move as far as it still covers the frame.
        room = length - side
        corner.append(int(np.clip(centred, min(0, room), max(0, room))))
    return *corner, side


def crop(image, labels, box, size):
    """Cuts the square `box` (x0, y0, side) out of image (H, W, 3) and labels (H, W), both uint8.

    Around the image lie its mean colour and 255, which counts nowhere. Returns an RGB and a palette
    image of Pillow, size x size.
    """
    x0, y0, side = box
    mean_colour = image.mean(axis=0).mean(axis=0).round().astype(int)
    square = Image.new("RGB", (side, side), tuple(mean_colour.tolist()))
    square.paste(Image.fromarray(image), (-x0, -y0))
    label = Image.new("L", (side, side), IGNORE)
    label.paste(Image.fromarray(labels), (-x0, -y0))
    label = label.resize((size, size), Image.NEAREST)       # a mean of two ids would be a third
    # All 256 colours, because a palette PNG of 16 or fewer would store 255 as 15.
    label.putpalette(sum(PALETTE, ()) + (128,) * 3 * (256 - len(PALETTE)))
    return square.resize((size, size), Image.BICUBIC), label


def crop_frame(image, labels, joints, size, margin):
    """Checks, repairs and crops one frame: image (H, W, 3) uint8, labels (H, W), joints (24, 2).

    Returns an RGB and a palette image of Pillow, size x size, and the joints (24, 2) in them.
    """
    whole = labels.astype(np.uint8)
    if labels.shape != image.shape[:2] or (whole != labels).any() or whole.max() >= len(NAMES):
        raise ValueError("the mask has another size than the video, or values other than 0 to 24")
    if not np.isfinite(joints).all() or not joints.any():
        raise ValueError("joints all zero or not finite")
    repaired = repair_head(whole)
    *corner, side = crop_box(repaired, margin)
    # SURREAL measures from the frame's corner: its first pixel's centre is at 0.5 there, at 0 here.
    # In a square of 64 cut from x0 = 10 to 42, its joint 11.0 lies at (11 - 10) * 64 / 32 - 0.5.
    moved = (joints - corner) * (size / side) - 0.5
    return *crop(image, repaired, (*corner, side), size), moved


# ------ One clip
def read_joints(path):
    """joints2D and joints3D of an info.mat side by side, (T, 24, 2 + 3) float32, pixels and metres.
    A clip of one frame has them squeezed, (2, 24) and (3, 24)."""
    mat = loadmat(str(path), variable_names=["joints2D", "joints3D"])
    # atleast_3d gives a clip of one frame its third axis again: (2, 24) -> (2, 24, 1).
    both = [np.atleast_3d(mat[name]) for name in ("joints2D", "joints3D")]      # (2 or 3, 24, T)
    return np.concatenate(both).transpose(2, 1, 0).astype(np.float32)


def decode(path, times, length):
    """Yields images (H, W, 3) uint8 of a video of `length` frames. times: their numbers, from 0 and
    ascending. Label t belongs to image t, so a frame that the decoder drops must be noticed: the
    t-th frame decoded has to carry the t-th time stamp of the file."""
    import av                                   # here, since those without videos do not need it
    with av.open(str(path)) as container:
        decoder = container.streams.video[0].codec_context
        decoder.thread_count = 1                # clips are decoded side by side already
        decoder.options = {"err_detect": "explode"}
        packets = [packet for packet in container.demux(video=0) if packet.size]
        # Packets come in decoding order, hence sorted. The packet None, below, asks the decoder for
        # the frames that it still holds.
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


def write_record(out, split, name, crops, skipped):
    """Writes the crops [(frame, image, label, joints)] of a clip and then, as the mark that it is
    done, a record. Its histograms of red, green, blue and label add up to a split's statistics."""
    record = dict(frames=[], joints=[], skipped=skipped)
    histogram = np.zeros(4 * 256, int)
    for frame, image, label, joints in crops:
        image.save(f"{out}/{split}/images/{frame}.jpg", quality=95)
        label.save(f"{out}/{split}/labels/{frame}.png")
        histogram += image.histogram() + label.histogram()
        record["frames"].append(frame)
        record["joints"].append(joints)
    record["histogram"] = histogram.tolist()
    write_json(f"{out}/.parts/{split}/{name}.json", record)


def extract(out, size, margin, split, folder, clip, times):
    """Writes the frames of one clip at the ascending times. Returns why the clip is left out, or
    None. A clip that is left out has no record, so the same command tries it again."""
    crops, skipped = [], []
    try:
        joints = read_joints(f"{folder}/{clip}_info.mat")[:, :, :2]
        masks = loadmat(f"{folder}/{clip}_segm.mat")
        if f"segm_{len(joints)}" not in masks or f"segm_{len(joints) + 1}" in masks:
            raise ValueError(f"different length: not as many masks as joints, {len(joints)}")
        for t, image in zip(times, decode(f"{folder}/{clip}.mp4", times, len(joints))):
            mask = masks[f"segm_{t + 1}"]
            try:
                *pair, moved = crop_frame(image, mask, joints[t], size, margin)
                crops.append((f"{clip}_{t + 1:03d}", *pair, moved.tolist()))
            except ValueError as error:
                skipped.append((clip, t + 1, str(error)))
    except Exception as error:              # a broken file makes its reader stumble in any way
        return clip, "", f"segm.mat or mp4: {error!r}"
    write_record(out, split, clip, crops, skipped)


# ------ Which frames
def read_poses(path):
    """A clip's poses (T, 72) float32 in metres, the pelvis at 0, and None or why it has none."""
    try:
        joints = read_joints(path)[:, :, 2:]
        # clip: a broken file's huge numbers must not move the centres of pick. No joint is 9 m from
        # the pelvis.
        return np.nan_to_num(joints - joints[:, :1]).clip(-9, 9).reshape(-1, 72), None
    except Exception as error:              # a broken file makes its reader stumble in any way
        return np.zeros((0, 72), np.float32), (
            f"info.mat: {error!r}; once it is mended, remove the prepared folder to choose again")


def pick(poses, wanted, how, clusters, rng):
    """Rows (ascending) to take of the frames with these poses (N, 72), which lie clip by clip.

    how: "spread" takes the same number from each cluster, as far as it has them, evenly over its
    frames: 90 of clusters of 10, 50 and 60 are 10, 40 and 40. "cluster" takes the one cluster whose
    size is nearest to `wanted`.
    """
    if wanted >= len(poses):
        return np.arange(len(poses))
    # Neighbouring frames are so alike that more than 200,000 poses would hardly move the centres.
    few = poses[rng.choice(len(poses), min(len(poses), 200_000), replace=False)]
    centres, _ = kmeans2(few, min(clusters, len(few)), iter=30, minit="++", rng=rng)
    nearest, _ = vq(poses, centres)
    members = [np.flatnonzero(nearest == number) for number in np.unique(nearest)]
    if how == "cluster":
        return min(sorted(members, key=len), key=lambda rows: abs(len(rows) - wanted))
    taken, missing = [], wanted
    # Small clusters come first, so that the larger ones can give what these lack. share: what each
    # cluster that is left has to give, so that all give the same. positions: places in the cluster,
    # evenly apart; the first is drawn from the first of `count` equal stretches.
    for i, rows in enumerate(sorted(members, key=len)):
        share = missing // (len(members) - i)
        count = min(len(rows), share)
        positions = (np.arange(count) + rng.random()) * len(rows) / count
        taken.append(rows[positions.astype(int)])
        missing -= count
    return np.sort(np.concatenate(taken))


def motion_of(clip):
    """Motion and number of a clip: ("01_01", 3) for 01_01_c0003 and for ung_01_01_c0003, since
    SURREAL has the same captured motion with and without `ung_`."""
    match = re.fullmatch(r"(?:ung_)?(.+?)(?:_c(\d+))?", clip)
    return match[1], int(match[2] or 0)


def find_clips(top):
    """{clip: folder} of all clips below `top` of which there is an mp4, a segm.mat or an info.mat.
    glob enters linked folders, which rglob does not, and passes over the "._*" files of macOS."""
    clips = {}
    for path in glob.glob("**/*.m*", root_dir=top, recursive=True):
        match = re.fullmatch(r"(.*?)([^/\\]+)(\.mp4|_segm\.mat|_info\.mat)", path)
        if match:
            clips[match[2]] = f"{top}/{match[1]}"
    if not clips:
        raise Problem(f"there are no clips in {top}: --raw is usually SURREAL/data/cmu")
    return dict(sorted(clips.items()))


def select_clips(found, run, exclude):
    """Takes the clips that no frame may come from out of `found`, {split: {clip: folder}}, which is
    changed in place: test loses its clips here. Returns rows of skipped.csv for them.

    Training keeps the network with the best score on val, so no clip of test may share poses with
    one of val. In SURREAL's run0, of 3,814 test clips 173 are in val as well, 268 are next to a val
    clip of their sequence, and 85 are it or next to it in the sequence's twin, `ung_` or not.
    """
    everything = set().union(*found.values())
    excluded = set()
    for pattern in exclude:
        matching = fnmatch.filter(everything, pattern)
        if not matching:
            raise Problem(f"--exclude {pattern} matches no clip")
        excluded.update(matching)
    for clips, clip in itertools.product(found.values(), excluded):
        clips.pop(clip, None)
    skipped = [(clip, "", "excluded") for clip in excluded]
    near_val = set()
    for motion, number in map(motion_of, found["val"]):
        for step in range(-SHARING[run], SHARING[run] + 1):
            near_val.add((motion, number + step))
    for clip in list(found["test"]):
        if motion_of(clip) in near_val:
            del found["test"][clip]
            skipped.append((clip, "", "shares poses with a val clip, or is in val"))
    if not all(found.values()):
        raise Problem("no clip is left in one of the splits: --exclude less")
    return skipped


def choose_clips(args, choice):
    """What is stored of the choice of frames: chosen, [(split, folder, clip, [t, ...])], and
    skipped, rows of skipped.csv. An earlier `choice` that is not empty is returned as it is, or
    else clips that arrived since would mix two choices."""
    if choice:
        print("the frames were chosen before: clips that came later are not among them; remove "
              f"{args.out} to choose again")
        return choice
    clips = {split: find_clips(f"{args.raw}/{split}/run{args.run}") for split in SPLITS}
    skipped = select_clips(clips, args.run, args.exclude)
    chosen = []
    for number, split in enumerate(SPLITS):
        folders, wanted = clips[split], getattr(args, split)
        jobs = [(f"{folder}/{clip}_info.mat",) for clip, folder in folders.items()]
        read = in_parallel(read_poses, jobs, args.workers, f"reading poses of {split}")
        poses, frames = [], []
        for (of_clip, problem), clip in zip(read, folders):
            poses.append(of_clip)
            frames += [(clip, t) for t in range(len(of_clip))]
            if problem:
                skipped.append((clip, "", problem))
        how, clusters = args.pick, args.clusters
        if split == "val":                      # spread over its clips, as if all were one cluster
            how, clusters = "spread", 1
        if how == "cluster" and wanted >= len(frames):
            raise Problem(f"--{split} {wanted}: there are {len(frames)} frames, and --pick cluster "
                          "takes a part of them: ask for fewer, or take --pick spread")
        rng = np.random.default_rng([args.seed, number])
        rows = pick(np.concatenate(poses), wanted, how, clusters, rng)
        print(f"{split}: {len(rows)} of {len(frames)} frames chosen, {wanted} wanted")
        times = collections.defaultdict(list)
        for row in rows:
            clip, t = frames[row]
            times[clip].append(t)
        chosen += [(split, folders[clip], clip, times[clip]) for clip in times]
    return dict(chosen=chosen, skipped=skipped)


# ------ The prepared folder
def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker():
    """Workers ignore Ctrl-C, which reaches them too, because the main process ends them. They watch
    the main process, because one that is killed would leave them waiting for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def in_parallel(function, jobs, workers, what):
    """Yields function(*job) for all jobs, in order, from `workers` processes (0: from this one),
    and shows a bar; without a terminal, a line every half minute."""
    with ProcessPoolExecutor(workers or 1, initializer=start_worker) as pool:
        results = pool.map(function, *zip(*jobs)) if workers else itertools.starmap(function, jobs)
        pause = 0.2 if sys.stderr.isatty() else 30
        yield from tqdm(results, what, len(jobs), mininterval=pause, disable=not jobs)


def write_whole(path, data):
    """Writes bytes to a file that is there whole or not at all, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_json(path, content, indent=None):
    write_whole(Path(path), (json.dumps(content, indent=indent) + "\n").encode())


def read_json(path):
    return json.loads(Path(path).read_bytes())


def sha256(name):
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def lock(out):
    """A context in which no other process of this machine works on the folder `out`. SQLite's locks
    are on every system, and end with their process, even one that is killed. Not covered are two
    machines that share a folder, since many network file systems have no locks."""
    path = f"{tempfile.gettempdir()}/prepare_surreal-{sha256(os.path.realpath(out))}"
    connection = sqlite3.connect(path, timeout=0)
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        raise Problem(f"another process is working on {out} ({error}): wait for its end") from error
    return contextlib.closing(connection)


def check_settings(folder, settings):
    """Raises Problem if `folder` was made with other settings, as its settings.json tells, or was
    not made by this program. Hidden files, such as .DS_Store, may be in a new folder."""
    note = folder / "settings.json"
    if note.exists():
        found = read_json(note)["settings"]
        differing = {key: found.get(key) for key in settings if found.get(key) != settings[key]}
        if differing:
            raise Problem(f"{folder} was made with {differing}: name another --out or remove it")
    elif folder.exists() and any(name[0] != "." for name in os.listdir(folder)):
        raise Problem(f"{folder} was not made by this program: name a new or an empty folder")


def prepare(args, settings):
    """Prepares the clips, or pictures, of `args` into args.out, or goes on with it. Raises Problem.

    What the folder holds tells how far it is:
        settings.json alone             frames are chosen
        settings.json, .parts           frames are being written
        classes.json, .parts            ready, but some clips failed: the command tries them again
        classes.json without .parts     finished
    Own pictures are all written again, so that some can be added; each group stays in its split.
    Before that args.out/*/images and args.out/*/labels are emptied, so what a person put there by
    hand is deleted as well.
    """
    out, parts = args.out, args.out / ".parts"
    note, done = out / "settings.json", out / "classes.json"
    choice = read_json(note) if note.exists() else {}
    if args.images:
        choice = choose_pictures(args, choice.get("chosen", []))
    else:
        choice = choose_clips(args, choice)
        if done.exists() and not parts.exists():
            print(f"{out} is ready, with these settings")
            return
    done.unlink(missing_ok=True)                # from now on the folder is unfinished
    write_json(note, choice | dict(settings=settings))
    if args.images:
        shutil.rmtree(parts, ignore_errors=True)
    for split, kind in itertools.product(SPLITS, ("images", "labels")):
        folder = out / split / kind
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir() if args.images else ():
            path.unlink()
    jobs = [(out, args.size, args.margin, *job) for job in choice["chosen"]
            if not os.path.exists(f"{parts}/{job[0]}/{job[2]}.json")]
    write = convert if args.images else extract
    failed = [row for row in in_parallel(write, jobs, args.workers, "writing frames") if row]
    describe(args, settings, choice["skipped"] + failed)
    if failed:
        print(f"the same command tries {len(failed)} broken clips again")
    else:
        shutil.rmtree(parts)


def collect(out, split):
    """What the records of a split hold together: lists of frames, of joints and of rows of
    skipped.csv, and the histograms (4, 256) of red, green, blue and label."""
    frames, joints, skipped = [], [], []
    histogram = np.zeros(4 * 256, int)
    for path in sorted(Path(f"{out}/.parts/{split}").glob("*.json")):
        record = read_json(path)
        frames += record["frames"]
        joints += record["joints"]
        skipped += record["skipped"]
        histogram += record["histogram"]
    return frames, joints, skipped, histogram.reshape(4, 256)


def draw_preview(out, frames):
    """Writes preview.png: eight crops of train above their coloured labels."""
    preview = Image.new("RGB", (8 * 160, 2 * 160))
    for column, i in enumerate(np.linspace(0, len(frames) - 1, 8).astype(int)):
        for row, name in enumerate((f"images/{frames[i]}.jpg", f"labels/{frames[i]}.png")):
            tile = Image.open(out / "train" / name).convert("RGB")
            preview.paste(tile.resize((160, 160)), (column * 160, row * 160))
    preview.save(out / "preview.png")


def statistics(colours):
    """Mean and standard deviation, 0 to 1, of histograms (3, 256) of red, green and blue. A colour
    that never changes gets 1 / 255, since images are divided by it."""
    levels = np.arange(256) / 255
    count = np.sum(colours[0])
    mean = colours @ levels / count
    variance = colours @ levels ** 2 / count - mean ** 2
    return mean, np.sqrt(np.maximum(variance, 255 ** -2))


def describe(args, settings, skipped):
    """Writes what describes the folder: joints.npz, skipped.csv, preview.png, classes.json."""
    out, names = args.out, args.names or NAMES
    for split in reversed(SPLITS):              # train comes last: its numbers are used below
        frames, joints, more, (*colours, pixels) = collect(out, split)
        skipped += more
        print(f"{split}: {len(frames)} frames of {len(set(map(group_of, frames)))} groups")
        if args.images:
            counts = dict(zip(names, pixels.tolist()))
            print(f"    pixels of each class: {counts}; ignored, with the margin: {pixels[IGNORE]}")
        else:
            joints = np.array(joints, np.float32).reshape(-1, 24, 2)
            np.savez(f"{out}/{split}/joints.npz", frames=np.array(frames, str), joints=joints)
    with open(out / "skipped.csv", "w", newline="", encoding="utf-8",
              errors="backslashreplace") as file:               # names that are not UTF-8
        rows = sorted(skipped, key=lambda row: (row[0], row[1] or 0))
        csv.writer(file).writerows([("clip", "frame", "reason"), *rows])
    if not all(os.listdir(f"{out}/{split}/images") for split in SPLITS):
        raise Problem(f"a split has no frame: mend what {out}/skipped.csv lists, then repeat this")
    if np.count_nonzero(pixels[:len(names)]) < 2:
        raise Problem("the labels of train show one class; 255 means ignore, so masks of 0 and 255 "
                      "need --values 0 255")
    draw_preview(out, frames)
    mean, std = statistics(colours)
    classes = dict(size=args.size, pixels=pixels[:len(names)].tolist(), mean=mean.tolist(),
                   std=std.tolist(), settings=settings)
    if args.images:
        classes |= dict(names=names, source=f"own pictures, {args.images}")
    else:
        source = f"SURREAL, run{args.run}; its left is the visible person's right"
        classes |= dict(SURREAL, source=source)
    if args.synthesize:
        classes["source"] = "rendered stand-in, not SURREAL"
    write_json(out / "classes.json", classes, indent=1)
    print(f"{out} is ready, preview.png shows some of it; {len(skipped)} clips, frames or files "
          "were left out, skipped.csv says why")


# ------ Your own pictures
def list_files(folder, endings):
    """{name without ending: path} of the files with one of these endings in a folder, not below it.
    macOS stores accents apart from their letters (NFD); names are compared and written in NFC."""
    found = {}
    for path in sorted(Path(folder).iterdir()):
        stem = unicodedata.normalize("NFC", path.stem)
        if path.suffix.lower() not in endings or path.name.startswith("."):
            continue
        if stem in found:
            raise Problem(f"{found[stem]} and {path} have one name: rename one of them")
        found[stem] = path
    if not found:
        raise Problem(f"{folder} itself has no {' '.join(endings)}; folders in it are not entered")
    return found


def group_of(frame):
    """SURREAL's sequence, 01_01 for 01_01_c0001_037 and ung_01_01_c0001_037: its neighbouring clips
    share half their poses. For other names, the name without the number of the frame: walk for
    walk_0001, walk-1 and walk0001. evaluate.py has the same rule."""
    sequence = re.fullmatch(r"(?:ung_)?(\d{2,4}_\d{2})_c\d+_\d+", frame)
    return sequence[1] if sequence else re.sub(r"[-_. ]?\d+$", "", frame)


def split_frames(frames, stored):
    """{frame: split}. The pictures of one group, such as a video, never lie in two splits; where
    all are one group, each is a group of its own.

    A group of which frames are in `stored`, an earlier {frame: split}, stays where it is, and a new
    one goes to the split of its hash, 8 : 1 : 1, so adding pictures moves none. Hashing alone could
    leave a split empty. So the first new groups, in the order of their hashes, go to the empty
    splits; where more pictures are prepared at once, these may be other groups.
    """
    groups = {frame: group_of(frame) for frame in frames}
    if len(set(groups.values())) == 1:
        groups = {frame: frame for frame in frames}
    splits = {}
    for frame in groups.keys() & stored.keys():
        group = groups[frame]
        if splits.setdefault(group, stored[frame]) != stored[frame]:
            raise Problem(f"the frames of {group!r} were the only ones at first, so they lie in "
                          "several splits: remove --out to split all anew, each group as a whole")
    empty = [split for split in SPLITS if split not in splits.values()]
    new = sorted(set(groups.values()) - set(splits), key=sha256)
    if len(new) < len(empty):
        raise Problem(f"{len(new)} new groups of pictures (names without their last number) are "
                      f"too few for {empty}, which need one each: add pictures, or, if those of a "
                      "group do not belong together, put the number first, 0001_IMG for IMG_0001")
    for group in new:
        tenth = int(sha256(group), 16) % 10
        splits[group] = empty.pop(0) if empty else SPLITS[max(0, tenth - 7)]
    return {frame: splits[group] for frame, group in groups.items()}


def choose_pictures(args, before):
    """What is stored of own pictures: chosen, [(split, picture, frame, (mask, values))], and
    skipped, rows of skipped.csv for the files that are none. before: an earlier chosen, or [].
    Raises Problem where a picture or a mask cannot be used."""
    pictures = list_files(args.images, PICTURES)
    masks = list_files(args.masks, (".png",))
    lonely = sorted(set(pictures) ^ set(masks))
    if lonely:
        raise Problem(f"{len(lonely)} pictures have no mask or masks no picture, the first is "
                      f"{lonely[0]}: a mask has its picture's name, and ends in .png")
    splits = split_frames(pictures, {frame: split for split, _, frame, _ in before})
    chosen = []
    for frame, path in pictures.items():
        chosen.append((splits[frame], str(path), frame, (str(masks[frame]), args.values)))
    check(read_pair, [(picture, *mask) for _, picture, _, mask in chosen], args.workers)
    others = set(os.listdir(args.images)) - {path.name for path in pictures.values()}
    skipped = [(name, "", "no picture; folders are not entered") for name in others]
    return dict(chosen=chosen, skipped=skipped)


def problem_of(read, path, *more):
    """Why read(path, *more) fails, or None."""
    try:
        read(path, *more)
    except Exception as error:                  # a broken file makes Pillow stumble in any way
        return " or ".join((path, *more[:1])) + f": {error}"


def check(read, jobs, workers):
    """Raises Problem with the number and the first of the files that read(*job) cannot read."""
    jobs = [(read, *job) for job in jobs]
    broken = [text for text in in_parallel(problem_of, jobs, workers, "checking pictures") if text]
    if broken:
        raise Problem(f"{len(broken)} pictures or masks cannot be used, the first is {broken[0]}")


def read_picture(path):
    """The picture of a file as an RGB image of Pillow, upright."""
    opened = Image.open(path)
    if opened.mode[0] in "IF":
        raise ValueError("more than 8 bits a channel")
    return ImageOps.exif_transpose(opened).convert("RGB")


def read_pair(picture, mask, values):
    """Image (H, W, 3) and class ids (H, W), both uint8, of a picture and its mask, in which class i
    has the value values[i]. Raises ValueError for what is no mask of class ids."""
    image = read_picture(picture)
    stored = Image.open(mask)
    if stored.mode == "1":                      # 0 and 255, as in other black and white masks
        stored = stored.convert("L")
    if stored.mode not in ("L", "P"):
        raise ValueError(f"the mask has the mode {stored.mode}: masks are grey or palette PNGs of "
                         "8 bit with class ids as values, so give each colour the id of its class")
    if stored.size != image.size:
        raise ValueError(f"the mask has {stored.size} pixels, its picture {image.size}, upright")
    indices = np.array(stored)                  # of a palette mask, not its colours
    unknown = set(np.unique(indices).tolist()) - {*values, IGNORE}
    if unknown:
        raise ValueError(f"the mask has the value {min(unknown)}, which is not in {values}: "
                         "--values says which value is which name, in the order of --names")
    ids = np.full(256, IGNORE, np.uint8)
    ids[values] = np.arange(len(values))
    return np.array(image), ids[indices]


def convert(out, size, margin, split, picture, frame, mask):
    """Writes a picture and its mask, padded to a square and resized. mask: its path and its value
    of each class."""
    image, ids = read_pair(picture, *mask)
    height, width = ids.shape
    side = max(width, height)
    box = (width - side) // 2, (height - side) // 2, side
    write_record(out, split, frame, [(frame, *crop(image, ids, box, size), None)], [])


# ------ The stand-in: clips in SURREAL's raw layout, made step by step as in the paper's Section
# 2.1. What SURREAL takes from measured data is drawn here from the clip's own random generator.
#
# The way from a T-pose to a label image: a body is a set of capsules, each fixed to one of the 24
# joints of a person in T-pose (body_model). A pose turns each joint against its parent and carries
# along what hangs on it (forward_kinematics). A pixel looks along a line. Instead of the capsules,
# the line is moved: back into the T-pose, once for each joint (to_rest), where it is intersected
# with the joint's capsules (hit_capsule). The nearest capsule wins the pixel (z_buffer). Its
# joint's number + 1 is the label (label_image), the place that was hit in the T-pose gives the
# colour (texture), and the direction of the surface gives the light (shade).
#
# SPLITS, HEAD, HEIGHT, WIDTH, FOCAL, NAMES and MIRROR stand at the top of this file.

# 1. Body model. SURREAL: SMPL, a mesh of 6,890 vertices learned from scans of people. Here: SMPL's
# 24 joints, and flesh of capsules. Millimetres from the pelvis; x to the body's left, y up, z
# forward. From the front, so that the body's left is on your right:
#
#                        15                   15 head, 12 neck
#                        12                   13 14 collar bones, 16 17 shoulders
#    23-21---19---17-14   |   13-16---18---20-22      18 19 elbows, 20 21 wrists, 22 23 fingers
#                      \_ 9 _/
#                         6                   9 6 3 spine
#                         3
#                       _ 0 _                 0 pelvis
#                      2     1                1 2 hips
#                      5     4                4 5 knees
#                      8     7                7 8 ankles
#                     11     10               10 11 toes
#
# A joint's part is named after the flesh beyond it, which it moves: the pelvis (joint 0) moves
# "hips", the left hip (1) "leftUpLeg", the left collar bone (13) "leftShoulder" and the left
# shoulder (16) "leftArm". The tables name parts as NAMES does; the drawing and the lists from HIPS
# to HANDS name joints.
JOINTS = np.loadtxt("""
# parent    x    y    z    which coefficient of the shape stretches its flesh along x, y, z
     0      0    0    0    1 3 2        # 0 hips
     0     80  -85    0    5 4 5        # 1 leftUpLeg
     0    -80  -85    0    5 4 5        # 2 rightUpLeg
     0      0  105  -15    1 3 2        # 3 spine
     1    100 -475    0    5 4 5        # 4 leftLeg
     2   -100 -475    0    5 4 5        # 5 rightLeg
     3      0  235  -20    1 3 2        # 6 spine1
     4     95 -885  -30    9 9 9        # 7 leftFoot
     5    -95 -885  -30    9 9 9        # 8 rightFoot
     6      0  300  -10    1 3 2        # 9 spine2
     7    115 -945   85    9 9 9        # 10 leftToeBase
     8   -115 -945   85    9 9 9        # 11 rightToeBase
     9      0  500  -35    8 8 8        # 12 neck
     9     75  410  -25    1 3 2        # 13 leftShoulder
     9    -75  410  -25    1 3 2        # 14 rightShoulder
    12      0  585    0    8 8 8        # 15 head
    13    180  435  -30    6 7 7        # 16 leftArm
    14   -180  435  -30    6 7 7        # 17 rightArm
    16    435  430  -40    6 7 7        # 18 leftForeArm
    17   -435  430  -40    6 7 7        # 19 rightForeArm
    18    685  435  -35    9 9 9        # 20 leftHand
    19   -685  435  -35    9 9 9        # 21 rightHand
    20    765  430  -30    9 9 9        # 22 leftHandIndex1
    21   -765  430  -30    9 9 9        # 23 rightHandIndex1
    """.splitlines())
PARENT = JOINTS[:, 0].astype(int)
T_POSE = JOINTS[:, 1:4] / 1000
STRETCH = JOINTS[:, 4:].astype(int)     # 1 to 9; shape[0] is the person's size
TWIN = np.array(MIRROR[1:]) - 1         # the joint on the other side; a middle joint's is itself
RIGHT = np.arange(24) > TWIN
HIPS = [1, 2]
SPINE = [3, 6, 9]
KNEES = [4, 5]
ANKLES = [7, 8]
NECK = [12, 15]
SHOULDERS = [16, 17]
ELBOWS = [18, 19]
HANDS = [20, 21, 22, 23]
X, Y, Z = range(3)
BOTH = 2                                # sexes in FLESH; SURREAL's 0 is female, 1 is male

# Capsules of the middle and the left side; those at the left (x > 0) are mirrored to the right.
# A capsule is all balls on the way from a to b, with radii on the way from a's to b's. Where a part
# ends, SMPL decides, not anatomy: ends and radii were moved until the parts of standing people had
# SURREAL's areas (within a factor of 1.2) and borders (within 0.02 of the height).
FLESH = np.loadtxt("""
# sex joint   end a: x y z     end b: x y z   radii a, b
    2     0    46   92  -10     60  -72  -10   108  118     # hips
    2     0    64  -60  -50     66  -70  -45   101  101
    2     0     0    0   50      0  -75    5   100   85
    0     0    80  -20  -10     90  -75  -10    96   96
    2     3    64  116  -10     60  213  -10   101   99     # spine
    2     3     0  116   -8      0  213   -8    96   95
    2     6    56  233  -10     64  301  -10    99  103     # spine1
    2     6     0  233   -8      0  301   -8    94   97
    2     9    51  328  -12     60  398  -20    84  102     # spine2
    2     9     0  316  -10      0  465  -28   103   81
    0     9    72  340   52     78  332   62    56   50
    1     9    75  370   30     90  375   22    66   60
    1     9    85  330  -40    110  400  -45    72   60
    2    12     0  540  -42      0  577  -12    46   44     # neck
    2    15     0  708  -29      0  714    5    83   77     # head: skull, jaw, nose, ear
    2    15     0  664   22      0  590   67    73   47
    2    15     0  684   93      0  657  110     8   14
    2    15    76  655   -8     80  688  -14    12   17
    2    13    89  425  -22    175  437  -30    81   48     # leftShoulder
    2    13    60  490  -42    155  452  -35    34   30
    2    16   235  432  -30    240  430  -30    36   35     # leftArm
    2    16   240  431  -30    432  430  -40    45   38
    2    18   440  430  -40    520  431  -38    41   41     # leftForeArm
    2    18   520  431  -38    652  435  -35    41   27
    2    20   690  435  -46    755  430  -58    23   18     # leftHand: palm, thumb
    2    20   690  434  -26    757  430  -14    23   18
    2    20   705  425  -10    745  415   25    19   16
    2    20   745  415   25    785  412   42    15   12
    2    22   768  430  -66    818  424  -78    12    9     # leftHandIndex1: fingers
    2    22   772  431  -44    840  425  -50    13   10
    2    22   772  431  -22    846  425  -21    13   10
    2    22   768  430   -1    832  424   10    13   10
    2     1    85  -87    0     98 -300    6   106   93     # leftUpLeg
    2     1    98 -300    6    100 -445    0    93   62
    2     4   100 -490    0     98 -600  -16    51   50     # leftLeg
    2     4    98 -600  -16     95 -885  -30    50   35
    2     7    95 -918  -35     95 -928  -58    28   26     # leftFoot
    2     7    97 -923  -20    106 -938   75    27   24
    2     7   108 -956  -30    124 -944   83    18   19
    2     7    92 -956    0     92 -944  100    17   19
    2    10    91 -951  105     93 -955  145    20   15     # leftToeBase
    2    10   108 -952  105    111 -957  142    15   12
    2    10   123 -953   98    127 -958  130    14   11
    2    10   137 -954   88    141 -959  112    13   10
    """.splitlines())


@dataclasses.dataclass
class Body:
    """A person in T-pose, in metres. Flesh is that of the average person, to be scaled."""
    joint: np.ndarray       # (C,) int: the joint that a capsule is fixed to
    ends: np.ndarray        # (C, 2, 3): centres of the balls at its ends
    radii: np.ndarray       # (C, 2): radii of these balls
    scale: np.ndarray       # (24, 3): how much larger the flesh of each joint is along x, y, z


def body_model(sex, shape):
    """The Body of a sex with ten coefficients of shape (10,), 0 for the average. SURREAL: principal
    components of the people who were scanned for CAESAR. Here: size and nine proportions."""
    left = FLESH[np.isin(FLESH[:, 0], (sex, BOTH))]
    right = left[left[:, 2] > 0]                        # a copy, since a mask picks its rows
    right[:, 1] = TWIN[right[:, 1].astype(int)]
    right[:, [2, 5]] *= -1                              # x of both ends
    flesh = np.concatenate([left, right])
    metres = flesh[:, 2:].astype(np.float32) / 1000
    proportions = 1 + .05 * shape[STRETCH]
    scale = proportions * (1 + .03 * shape[0])
    return Body(
        joint=flesh[:, 1].astype(int),
        ends=metres[:, :6].reshape(-1, 2, 3),
        radii=metres[:, 6:],
        scale=scale)


# 2. Body pose. SURREAL: motion capture (CMU), fitted to SMPL by MoSh. Here: a movement between two
# key poses, in degrees about the axes of the joints, within limits so that no joint breaks.
FREEDOMS = np.loadtxt("""
# joint axis  lowest highest spread
      0    0    -400     400      4     # pelvis: forwards, sideways
      0    2    -400     400      4
      3    0     -25      80      4     # spine: forwards, twisted, sideways
      3    1     -40      40      4
      3    2     -30      30      4
     12    0     -40      40      4     # neck: forwards
      1    0    -120      25      8     # left hip: forwards is negative; spread
      1    2     -12      60      8
      4    0       0     140      8     # left knee
      2    0    -120      25      8     # the right leg, as if it were a left one
      2    2     -12      60      8
      5    0       0     140      8
     16    0     -90      70      8     # left shoulder: rolled; forwards is negative; raised
     16    1    -110      35      8
     16    2     -85      82      8
     18    1    -140       0      8     # left elbow
     17    0     -90      70      8     # the right arm, as if it were a left one
     17    1    -110      35      8
     17    2     -85      82      8
     19    1    -140       0      8
    """.splitlines())
POSES = np.loadtxt("""
# percent; arms usually forwards, raised; then the first twelve FREEDOMS
  20   -25 -72      0  0    3  0  0    0     -2  5   5     -2  5   5     # standing
  26   -25 -72      3  0    4  8  0    0    -28  3  12     14  3  23     # walking
   8   -25 -72     10  0   10 12  0   -8    -60  3  75     12  4  50     # running
  10   -25 -72      0  0    0  0  0    0     -3 22   3     -3 22   3     # legs apart
   3   -25 -72     -8  0   10 -8  0    5     -6  4  10    -82  6  20     # kicking
   9   -55 -60     -4  0   10  0  0    5    -88 10  85    -84 10  80     # sitting
   2   -55 -60     -8  0   18  0  0    8    -80 48 125    -80 48 125     # sitting cross-legged
   6   -75 -30     28  0   24  0  0  -12   -110 16 115   -106 16 110     # crouching
   4   -80  -5     40  0   38  0  0    0    -48  6  20    -48  8  20     # bent
   2   -75  45     65  0   60  0  0   10    -85  5  25    -85  7  25     # bent double
   2   -75  -5     85  0    0  0  0  -25    -88  6  88    -70  6  78     # on all fours
   2   -15  45     88  0   -5  0  0  -20      0 12   6     -5 14  40     # lying on the front
   2   -55 -40      0 85   14  0  0    8    -45  4  65    -15  8  30     # on a side
   2   -25 -72    -88  0    4  0  0    8     -5  8   8    -45  6  75     # on the back
   2   -20  72    178  0   -4  0  0  -20     -8  8  10     -4  8  12     # standing on the hands
    """.splitlines())
# How far an arm in any pose is rolled, forwards and raised, and its elbow bent: it may be before
# the body, at the face or in the air.
LOWEST_ARM = -80, -100, -70, -140
HIGHEST_ARM = 50, 20, 75, 0


def key_pose(rng, row):
    """A pose (24, 3) near a row of POSES: the degrees that each joint is turned about x, y and z of
    its parent. Right limbs are drawn like left ones, with the same limits, and mirrored at the end:
    in a mirror, a turn about x stays, and turns about y and z change their sign."""
    _, forwards, raised, *others = POSES[row]
    arms = np.tile((0, forwards, raised, -25), (2, 1))
    for arm in arms:
        if rng.random() < .45:
            arm[:] = rng.uniform(LOWEST_ARM, HIGHEST_ARM)
    joint, axis, lowest, highest, spread = FREEDOMS.T
    angles = rng.normal([*others, *arms.ravel()], spread)
    pose = np.zeros((24, 3))
    pose[joint.astype(int), axis.astype(int)] = np.clip(angles, lowest, highest)
    # In this order: feet follow hips and knees, and right limbs are mirrored when all are done.
    pose[SPINE] = pose[3] / 3                           # the joints of the spine share its bend
    pose[NECK] = pose[12] / 2
    pose[HIPS, Y] = .6 * pose[HIPS, Z]                  # legs that spread turn outwards
    slope = pose[0, X] + pose[HIPS, X] + pose[KNEES, X]
    pose[ANKLES, X] = np.clip(-slope, -25, 40)          # feet lie flat as far as they can
    pose[HANDS, Z] = rng.uniform(-40, 0)                # fingers curl
    pose[RIGHT] *= 1, -1, -1
    return pose


def movement(rng, frames):
    """Poses (T, 24, 3) in degrees: part of the way from a key pose to one of the row before it in
    POSES, where neighbours mostly are alike; the first row has none before it and keeps to itself.
    To these a habit is added, in which this person differs from the key poses in every frame."""
    row = rng.choice(len(POSES), p=POSES[:, 0] / 100)
    first = key_pose(rng, row)
    last = key_pose(rng, max(row - 1, 0))
    start, end = rng.uniform((0, .5), (.5, 1))
    time = np.linspace(start, end, frames)
    smoothstep = time * time * (3 - 2 * time)           # starts and ends at rest
    poses = first + smoothstep[:, None, None] * (last - first)
    if rng.random() < .5:                               # the other leg first
        poses = poses[:, TWIN] * (1, -1, -1)
    habit = rng.normal(0, (1.2, 8, 4), (24, 3))
    habit[KNEES + ELBOWS] = 0                           # a habit might bend them backwards
    return poses + habit


def rotations(degrees, order):
    """Matrices (..., 3, 3) of turns (..., 3) about x, y, z. The last axis of `order` acts first."""
    axes = ["XYZ".index(axis) for axis in order]
    flat = degrees[..., axes].reshape(-1, 3)
    matrices = Rotation.from_euler(order, flat, degrees=True).as_matrix()
    return matrices.reshape(*degrees.shape, 3)


def forward_kinematics(poses, scale):
    """Carries the joints of the T-pose, with bones stretched by scale (24, 3), along with poses (T,
    24, 3) in degrees. Returns the rotations of each joint against its parent and against the
    T-pose, (T, 24, 3, 3) each, and the joints' places (T, 24, 3) in metres from the pelvis."""
    # The twist about a bone has to act first: after a bend it would swing the bone around. In the
    # T-pose upper arms lie along x; torso, neck and legs about along y. Collar bones, forearms and
    # hands lie along x as well, but they turn about one axis alone, apart from the habit.
    local = rotations(poses, "XZY")
    local[:, SHOULDERS] = rotations(poses[:, SHOULDERS], "YZX")
    turn = local.copy()
    place = np.zeros(poses.shape)
    for joint in range(1, 24):                          # parents come before their children
        parent = PARENT[joint]
        bone = (T_POSE[joint] - T_POSE[parent]) * scale[parent]
        turn[:, joint] = turn[:, parent] @ local[:, joint]
        place[:, joint] = place[:, parent] + turn[:, parent] @ bone
    return local, turn, place


def motion(rng, frames, scale):
    """forward_kinematics of a movement: the first of eight draws whose arms keep off the body, or
    the last, because some poses leave no other choice."""
    for _ in range(8):
        local, turn, place = forward_kinematics(movement(rng, frames), scale)
        arms = place[:, ELBOWS + HANDS, None]
        core = place[:, None, [0, *SPINE, *NECK, *HIPS, *KNEES]]
        distance = np.linalg.norm(arms - core, axis=-1)
        if distance.min() > .15:                        # metres
            break
    return local, turn, place


# 3. Texture. SURREAL: texture maps of scanned people, a fifth in tight grey clothes (CAESAR), the
# rest in their own. Here: a function of the place in the T-pose, so that patterns stick to cloth.
WAIST = .05                             # its height in the T-pose, in metres
SKIN = np.array([
    (.94, .78, .68),
    (.78, .58, .45),
    (.62, .43, .32),
    (.33, .22, .16)])


@functools.lru_cache(maxsize=1)
def clouds():
    """A picture (256, 256) float32 of noise with mean 0 and deviation 1. It is a sum of blobs from
    one pixel to 30, because photographs have detail of all sizes."""
    rng = np.random.default_rng(0)
    total = 0
    for size in (.5, 1, 2, 4, 8, 16):
        white = rng.standard_normal((256, 256))
        blobs = ndimage.gaussian_filter(white, size, mode="wrap")
        total += blobs / blobs.std()
    return np.float32(total / total.std())


def noise(x, y):
    """The noise at places x and y (...); after 256 it is the same again."""
    return clouds()[y.astype(int) & 255, x.astype(int) & 255]


def any_colour(rng, samples):
    """A colour (3,), mostly muted. A fifth are of `samples` (M, 3): skin for things, and the
    background for clothes, so that colour alone does not tell people from what is behind them."""
    if rng.random() < .2:
        return rng.choice(samples)
    tint = rng.normal(1, rng.uniform(0, .3), 3)
    return np.clip(rng.beta(1.5, 1.6) * tint, .03, .95)


def fabric(rng, samples):
    """Two colours, the second in stripes, in a grid or, with a limit of 9, nowhere."""
    return dict(
        first=any_colour(rng, samples),
        second=any_colour(rng, samples),
        pitch=rng.normal(0, 70, 3) * rng.integers(2, size=3),           # radians a metre
        limit=rng.choice((9, rng.uniform(.1, .9))))


def fabric_colour(cloth, place, uneven):
    """Colours (N, 3) of a fabric(), or of a print as print_photograph() sets it, at places (N, 3)
    in metres, with noise `uneven` (N,)."""
    lightness = 1 + .1 * uneven[:, None]
    if "print" in cloth:                                # a picture, repeated in x and y
        pixel = place[:, :2] * cloth["scale"] + cloth["origin"]
        column, row = pixel.astype(int).T
        return cloth["print"][row % HEIGHT, column % WIDTH] * lightness
    stripes = np.sin(place * cloth["pitch"])            # across x, y and z
    pattern = stripes.max(axis=1) + .2 * uneven
    second = pattern > cloth["limit"]
    colour = np.where(second[:, None], cloth["second"], cloth["first"])
    return colour * lightness


def dress(rng, still):
    """Draws skin, hair and clothes of a person before `still`. Heights and lengths are metres in
    the T-pose: a sleeve ends `sleeve` from the middle, trousers begin at the height `hem`."""
    skin = rng.choice(SKIN) * rng.uniform(.8, 1.05)
    pigment = rng.choice([
        (.5, .36, .24),
        (.45, .42, .4),
        skin])
    around = still.reshape(-1, 3)
    look = dict(
        skin=skin,
        hair=rng.uniform(.1, 1.3) * pigment,
        hair_front=rng.choice((-9, -.03)),              # -9: short hair
        shirt=fabric(rng, around),
        trousers=fabric(rng, around),
        shoes=fabric(rng, around),
        neckline=rng.uniform(.40, .50),
        sleeve=rng.choice((.19, .27, .27, .34, .67)),
        bottom=.03 - rng.exponential(.1),               # most end at the hips, some are coats
        hem=rng.choice((-.24, -.44, -.90, -.90)),
        shoe_top=rng.choice((-9, -.895, -.87, -.76)),   # -9: barefoot
        shift=rng.uniform(0, 9, 3))                     # or else the noise would tell the part
    if rng.random() < .2:                               # as they were scanned for CAESAR
        grey = dict(look["shirt"], first=np.full(3, rng.uniform(.3, .7)), limit=9)
        look.update(
            shirt=grey,
            trousers=grey,
            sleeve=.17,
            bottom=.26,
            hem=-.25,
            shoe_top=-9)
    return look


def print_photograph(rng, look, photograph):
    """Changes a look of dress(): half of the clothes get the photograph (240, 320, 3) float32 in
    0..1 behind the person as a print, since where clothes look like what is behind them, a network
    has to learn outlines. A quarter of the shirts become longer, up to coats, which are rare."""
    for name in ("shirt", "trousers", "shoes"):
        if rng.random() < .5:
            look[name] = dict(
                print=photograph,
                scale=rng.choice((-1, 1), 2) * rng.uniform(60, 400),    # pixels a metre
                origin=rng.uniform(2000, 4000, 2))
    if rng.random() < .25:
        look["bottom"] = rng.uniform(-.7, -.1)


def texture(look, rest):
    """Colours (N, 3) of a dressed person at places `rest` (N, 3) of the T-pose."""
    side, up, front = rest.T
    across = np.abs(side)
    x, y, z = ((rest + look["shift"]) / .006).T
    uneven = noise(x + z, y)
    edge = .006 * noise(5 * y, 5 * x)                   # no cloth ends in a straight line

    shirt = (up > look["bottom"] + edge) & (across < look["sleeve"] + edge)
    shirt &= up - across < look["neckline"]
    trousers = (up > look["hem"] + edge) & (up < WAIST)
    shoes = up < look["shoe_top"] + edge
    hairline = .72 - np.clip(.045 - front, 0, .1)       # lower at the back
    hair = up > hairline + edge
    hair |= (up > .52) & (front < look["hair_front"])

    colour = look["skin"] * (1 + .05 * uneven[:, None])
    eyes = (np.hypot(across - .033, up - .69) < .015) & (front > .03)
    colour[eyes] *= .3
    for name, worn in (("shoes", shoes), ("trousers", trousers), ("shirt", shirt)):
        colour[worn] = fabric_colour(look[name], rest[worn], uneven[worn])
    colour[hair] = look["hair"]
    return colour


# 4. Camera. As in SURREAL, it looks about at the pelvis, from a random distance and side, and its
# matrix has determinant -1, so pictures are mirrored. In the camera's world y points down; the
# camera, at +x, looks along -x.
def project(points, camera):
    """World points (..., 3) to x and y in pixels and depth in metres (..., 3)."""
    x, y, z = (points - camera).T
    depth = -x
    column = WIDTH / 2 - FOCAL * z / depth
    row = HEIGHT / 2 + FOCAL * y / depth
    return np.stack([column, row, depth]).T


@functools.lru_cache(maxsize=1)
def lines_of_sight():
    """Directions (2 HEIGHT, 2 WIDTH, 3) float32 in the world through the centres of sub-pixels, two
    to a pixel's side: (-1, y, z), the points one metre deep that project() maps there. So the point
    camera + t direction has the depth t."""
    row, column = (np.mgrid[:2 * HEIGHT, :2 * WIDTH] + .5) / 2
    y = (row - HEIGHT / 2) / FOCAL
    z = (WIDTH / 2 - column) / FOCAL
    return np.stack([-np.ones_like(y), y, z], axis=-1).astype(np.float32)


# 5. Ground truth. SURREAL: further passes of Blender. Here: a z-buffer.
def first_root(k2, k1, k0):
    """The root of k2 t^2 + 2 k1 t + k0 = 0 where a line enters: the smaller one for k2 > 0; for
    k2 < 0, a line that runs more along a cone's axis than its side does, the larger. nan without a
    root: nan means no hit, and nan < depth is False, so it never wins."""
    return (-k1 - np.sqrt(k1 * k1 - k2 * k0)) / k2


@np.errstate(invalid="ignore", divide="ignore")          # of lines that miss
def hit_capsule(origin, direction, a, b, ra, rb):
    """Where lines first meet two balls and the cone that touches both.

    Lines are origin (3,) + t direction (..., 3), balls are at a and b (3,) with radii ra and rb.
    Returns t (...), nan for lines that miss, and the place along the axis, 0 at a to 1 at b, of the
    ball whose surface is met.

    A capsule is every ball at a + s (b - a) with radius ra - s (ra - rb). With q = point - a,
    axis = b - a, taper = ra - rb, the ball at s has its surface where
        |q - s axis|^2 = (ra - s taper)^2.
    The cone is the envelope of these surfaces. Neighbouring balls touch it at the same point, so
    there the equation still holds when s changes a little: its derivative by s is 0 as well, and
        s = (q . axis - ra taper) / flank    with    flank = |axis|^2 - taper^2.
    Put into the first equation this leaves flank (q . q - ra^2) = (q . axis - ra taper)^2. Along a
    line q = q0 + t direction, which gives k2 t^2 + 2 k1 t + k0 = 0 with
        k2 = flank |direction|^2 - rise^2               rise = direction . axis
        k1 = flank (direction . q0) - rise start        start = q0 . axis - ra taper
        k0 = flank (q0 . q0 - ra^2) - start^2
    A ball is the same without an axis: k2 = |direction|^2, k1 = direction . q0, k0 = q0 . q0 - r^2.
    For example, a line of direction length 1 from the distance d through the centre of a ball of
    radius 1 has k2 = 1, k1 = -d and k0 = d^2 - 1, so t = d - sqrt(d^2 - (d^2 - 1)) = d - 1.
    """
    axis = b - a
    taper = ra - rb
    flank = axis @ axis - taper ** 2
    from_a = origin - a                                 # q0 above
    from_b = origin - b
    square = np.einsum("...i,...i", direction, direction)
    towards_a = direction @ from_a
    rise = direction @ axis
    start = from_a @ axis - ra * taper
    outside_a = from_a @ from_a - ra ** 2
    outside_b = from_b @ from_b - rb ** 2

    k2 = flank * square - rise ** 2
    k1 = flank * towards_a - rise * start
    k0 = flank * outside_a - start ** 2
    cone = first_root(k2, k1, k0)
    along = (start + cone * rise) / flank
    # The cone exists only for balls with s in 0..1; beyond, the end balls close it.
    cone[(along < 0) | (along > 1)] = np.nan
    ball_a = first_root(square, towards_a, outside_a)
    ball_b = first_root(square, direction @ from_b, outside_b)
    t = np.fmin(cone, np.fmin(ball_a, ball_b))          # fmin passes over nan
    along = (start + t * rise) / flank
    return t, along.clip(0, 1)


def capsule_box(ends, radius, camera):
    """Slices of rows and columns of sub-pixels that hold a capsule, whose ends (2, 3) and larger
    radius are given in the world. Only the lines through them are tried, since most miss it."""
    *centres, depth = project(ends, camera).T           # centres: x and y of both ends
    reach = 1.05 * FOCAL * radius / depth.min()         # a ball far from the middle looks larger
    low = 2 * (np.min(centres, axis=1) - reach)
    high = 2 * (np.max(centres, axis=1) + reach) + 1
    (left, top), (right, bottom) = np.maximum([low, high], 0).astype(int)
    return slice(top, bottom), slice(left, right)


def to_rest(body, turn, place, camera):
    """What leads from the world to the T-pose, where the flesh of each joint stands still: matrices
    (24, 3, 3) that undo the joint's turn and the person's proportions, and the place of the camera
    there (24, 3), the eye.

    The map is affine, so camera + t direction becomes eye + t (undo direction) with the same t. A
    hit's t in the T-pose is therefore its depth in metres in the world, and hits of different
    joints can be compared. So `direction` must never be normalised.
    """
    undo = turn.swapaxes(1, 2) / body.scale[:, :, None]
    eye = T_POSE + (undo @ (camera - place)[..., None])[..., 0]
    return undo.astype(np.float32), eye.astype(np.float32)


def z_buffer(body, turn, place, camera):
    """For each sub-pixel (2 HEIGHT, 2 WIDTH) the depth in metres of the nearest capsule, infinite
    where none is, its number, and the place along its axis, 0 to 1."""
    undo, eye = to_rest(body, turn, place, camera)
    sight = lines_of_sight()
    depth = np.full(sight.shape[:2], np.inf, np.float32)
    along = np.zeros_like(depth)
    owner = np.zeros(depth.shape, int)
    for number, joint in enumerate(body.joint):
        ends = body.ends[number]
        radii = body.radii[number]
        scale = body.scale[joint]
        offset = (ends - T_POSE[joint]) * scale
        ends_in_world = place[joint] + offset @ turn[joint].T
        radius = radii.max() * scale.max()
        box = capsule_box(ends_in_world, radius, camera)
        direction = sight[box] @ undo[joint].T
        t, s = hit_capsule(eye[joint], direction, *ends, *radii)
        nearer = t < depth[box]                         # False for nan
        depth[box][nearer] = t[nearer]
        along[box][nearer] = s[nearer]
        owner[box][nearer] = number
    return depth, owner, along


def draw_body(body, turn, place, camera):
    """Draws a body whose joints are turned by turn (24, 3, 3) and at place (24, 3) in the world.
    Returns a dict of what the N sub-pixels with flesh show: pixel (N,), its number in 240 x 320;
    depth (N,) in metres; joint (N,); normal (N, 3), of any length, in the world; and rest (N, 3),
    the place in the T-pose of the average person."""
    depth, owner, along = z_buffer(body, turn, place, camera)
    undo, eye = to_rest(body, turn, place, camera)
    # Only what won a sub-pixel is worked out: the rest of a capsule's surface is never seen.
    flesh = depth < np.inf
    number = owner[flesh]
    joint = body.joint[number]
    # Each sub-pixel n has the matrix of its own joint, its transpose for normals: "nij,ni->nj".
    direction = np.einsum("nij,nj->ni", undo[joint], lines_of_sight()[flesh])
    rest = eye[joint] + depth[flesh, None] * direction
    a, b = body.ends[number].swapaxes(0, 1)
    outward = rest - a - along[flesh, None] * (b - a)
    row, column = np.nonzero(flesh)
    return dict(
        pixel=row // 2 * WIDTH + column // 2,
        depth=depth[flesh],
        joint=joint,
        normal=np.einsum("nij,ni->nj", undo[joint], outward),
        rest=rest)


def coverage(flesh):
    """How much of each pixel (240, 320) a drawn body covers, 0 to 1: a quarter a sub-pixel."""
    count = np.bincount(flesh["pixel"], minlength=HEIGHT * WIDTH)
    return count.reshape(HEIGHT, WIDTH) / 4


def label_image(flesh):
    """The labels (240, 320) uint8 of a drawn body: joint + 1 of the nearest of a pixel's four
    sub-pixels, where at least two of them are flesh.

    SURREAL's own masks have this error: small blobs on chest (joint 9) and pelvis (0) labelled as
    head. It is imitated, with a pattern of made-up frequencies.
    """
    side, up, _ = flesh["rest"].T
    spots = np.sin(45 * side + 1) * np.sin(38 * up) > .95
    stray = np.isin(flesh["joint"], (0, 9)) & spots
    label = np.where(stray, HEAD, flesh["joint"] + 1)
    nearest_last = np.argsort(-flesh["depth"])
    pixel = flesh["pixel"][nearest_last]
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels.flat[pixel] = label[nearest_last]
    labels[coverage(flesh) < .5] = 0
    return labels


# 6. Light. As in SURREAL, nine coefficients of spherical harmonics.
def shade(normal, light):
    """How much light (9,) arrives (N,) at surfaces with normals (N, 3) of any length. The terms are
    those of Ramamoorthi & Hanrahan, "An efficient representation for irradiance environment maps"
    (2001), equation 13; their constants are left to the coefficients, which are drawn at random."""
    length = np.linalg.norm(normal, axis=1)
    x, y, z = normal.T / length
    terms = [
        np.ones_like(x),
        y,
        z,
        x,
        x * y,
        y * z,
        z * z - 1 / 3,
        x * z,
        x * x - y * y]
    return np.maximum(light @ terms, .02)


def sum_pixels(flesh, values):
    """An image (240, 320, 3): values (N, 3), summed over the sub-pixels of each pixel."""
    sums = [np.bincount(flesh["pixel"], value, HEIGHT * WIDTH) for value in values.T]
    return np.float32(sums).T.reshape(HEIGHT, WIDTH, 3)


def paint(still, look, light, flesh):
    """The image (240, 320, 3) of a drawn body in the clothes `look` before the picture `still`."""
    # Normals are smoothed, or else creases between the capsules would show where a part ends, and
    # the network would learn the creases, which no photograph has.
    normals = sum_pixels(flesh, flesh["normal"])
    normals = ndimage.gaussian_filter(normals, (1.5, 1.5, 0), truncate=2)
    normals = normals.reshape(-1, 3)[flesh["pixel"]]
    shaded = shade(normals, light)[:, None]
    # A display shows about the square of a pixel's value, hence the root.
    colour = texture(look, flesh["rest"]) * np.sqrt(shaded)
    behind = np.float32(1 - coverage(flesh)[..., None])
    return still * behind + sum_pixels(flesh, colour) / 4


# 7. Background. SURREAL: photographs of rooms (LSUN). Here: a picture of a folder, or shapes one
# over another, large ones first: "dead leaves", which have the statistics of photographs (Lee,
# Mumford & Huang 2001). Places in the plane are complex numbers, x + i y: multiplied by a number of
# size 1 they are turned by its angle.
def draw_shape(rng, canvas, number, length):
    """Draws an ellipse of 16 corners, about 2 `length` pixels long, or a rectangle whose 4 corners
    lie on such an ellipse, on a canvas: `number` in each of its pixels. Returns the ellipse's
    centre, its direction (a number of size 1), and half its width."""
    centre = rng.uniform(0, WIDTH) + 1j * rng.uniform(0, HEIGHT)
    angle = rng.choice((0, np.pi / 2, rng.uniform(0, np.pi)))
    turn = np.exp(1j * angle)
    half = length * rng.uniform(.1, 1)
    count = rng.choice((4, 4, 16))                      # of corners
    outline = np.exp(2j * np.pi * (np.arange(count) + .5) / count)
    stretched = length * outline.real + 1j * half * outline.imag
    corners = centre + turn * stretched
    numbers = corners.view(float)       # a complex number is stored as two: x, y, x, y, ...
    canvas.polygon(numbers.tolist(), fill=number)
    return centre, turn, half


def shape_colour(rng, place, half):
    """Colours (N, 3) of a shape at places (N,), complex, in pixels from its centre: the real part
    along its direction, the imaginary part across. half: of its ellipse's width, in pixels.
    Shapes have the fabrics of clothes and some have dark sides like limbs, so that neither tells
    people from things."""
    metres = np.stack([place.real, place.imag, 0 * place.real], axis=1) / 100
    uneven = noise(place.real, place.imag)
    colour = fabric_colour(fabric(rng, SKIN), metres, uneven)
    dark = rng.choice((0, .6)) * (place.imag / half) ** 2
    light = rng.uniform(.3, 1.6) * (1 - dark)
    return colour * light[:, None]


def background(rng, path):
    """A still picture (240, 320, 3) float32 in 0..1: of the file `path` or, if None, made up."""
    if path:
        picture = Image.open(path).convert("RGB")
        picture = ImageOps.fit(picture, (WIDTH, HEIGHT))
        return np.asarray(picture, np.float32) / 255
    count = rng.integers(12, 120)
    lengths = np.sort(np.exp(rng.uniform(1.5, 5, count)))[::-1]         # large ones first
    lengths[:4] *= 5                                    # walls and floor
    picture = Image.new("I", (WIDTH, HEIGHT))
    canvas = ImageDraw.Draw(picture)
    shapes = [draw_shape(rng, canvas, *shape) for shape in enumerate(lengths)]
    # A new picture is 0 everywhere, so what no shape covers belongs to shape 0.
    shown = np.ravel(picture)
    image = np.zeros((HEIGHT * WIDTH, 3), np.float32)
    for number, (centre, turn, half) in enumerate(shapes):
        pixel = np.flatnonzero(shown == number)
        y, x = np.divmod(pixel, WIDTH)
        place = (x + 1j * y - centre) / turn
        image[pixel] = shape_colour(rng, place, half)
    image *= rng.normal((1.1, 1, .9), .1)
    exposure = rng.uniform(.15, 1.3) / image.mean()
    image = 1 - np.exp(-exposure * image.clip(0))       # as on film, bright light saturates late
    return image.reshape(HEIGHT, WIDTH, 3)


# 8. A clip.
def scene(rng, frames):
    """A person who moves before a camera: a dict of shape (10,) and Body, local and turn (T, 24, 3,
    3) and place (T, 24, 3) as of forward_kinematics, but turn and place in the camera's world, and
    the camera's place (3,) there, in metres from the pelvis."""
    sex = rng.integers(2)
    shape = rng.uniform(-2, 2, 10)
    body = body_model(sex, shape)
    local, turn, place = motion(rng, frames, body.scale)
    # Any side, and then upside down, because the world's y points down.
    angles = rng.uniform(0, 360), 180
    world = Rotation.from_euler("yx", angles, degrees=True).as_matrix()
    aside = rng.choice((.1, .6), p=(.85, .15))          # the frame cuts some people off
    return dict(
        shape=shape,
        body=body,
        local=local,
        turn=world @ turn,
        place=place @ world.T,
        camera=rng.normal((8, 0, 0), (1, aside, aside)))


def render(rng, person, picture):
    """Images (240, 320, 3) uint8 and labels (240, 320) uint8 of each frame of a scene(), before a
    background from the file `picture` or, if None, made up."""
    still = background(rng, picture)
    look = dress(rng, still)
    if picture:
        print_photograph(rng, look, still)
    light = rng.uniform(-.6, .6, 9)
    light[:2] = rng.uniform((.5, -.7), (1.2, 0))        # seldom dark, more from above
    blur = rng.uniform(.3, .9)                          # pixels
    images, labels = [], []
    for turn, place in zip(person["turn"], person["place"]):
        flesh = draw_body(person["body"], turn, place, person["camera"])
        image = paint(still, look, light, flesh)
        image = ndimage.gaussian_filter(image, (blur, blur, 0), truncate=2)
        images.append((255 * image.clip(0, 1)).astype(np.uint8))
        labels.append(label_image(flesh))
    return images, labels


def encode_video(images, quality):
    """An H.264 file (bytes) of images (240, 320, 3) uint8; quality: 18, good, to 51, bad."""
    import av                                   # here, since those without videos do not need it
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # One thread, because the bytes depend on the number of threads, and so on the machine.
        # Without the macroblock tree, which reads memory that x264 has not written, so that the
        # same frames give another file now and then (findings/x264-stale-memory.sh).
        options = {
            "crf": str(quality),
            "preset": "veryfast",
            "threads": "1",
            "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width = WIDTH
        stream.height = HEIGHT
        stream.pix_fmt = "yuv420p"
        for image in images:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def encode_mat(fields):
    """A MATLAB 5 file (bytes) of a dict of arrays and strings."""
    file = io.BytesIO()
    savemat(file, fields, do_compression=True)
    header = b"MATLAB 5.0 MAT-file".ljust(116)          # SciPy's would carry the date
    return header + file.getvalue()[len(header):]


def clip_name(split, i):
    """Names of the sequence and of clip i of a split: ("203_03", "203_03_c0002") for train, 129.
    Ten sequences of four clips have the same number in front, as a subject's have in SURREAL, but
    each clip draws a person of its own. A number is in one split alone: those of a split's range
    and, after them, the same ones 1000 higher, 2000 higher and so on."""
    ranges = dict(
        train=range(200, 800),
        val=range(800, 900),
        test=range(900, 1000))
    numbers = ranges[split]
    thousands, place = divmod(i // 40, len(numbers))
    number = 1000 * thousands + numbers[place]
    sequence = f"{number:03d}_{i % 40 // 4 + 1:02d}"
    return sequence, f"{sequence}_c{i % 4 + 1:04d}"


def make_clip(raw, split, i, seed, frames, picture):
    """Renders clip i of a split: its mp4, _segm.mat and, as the mark that it is done, _info.mat."""
    sequence, name = clip_name(split, i)
    clip = raw / split / "run0" / sequence / name
    if Path(f"{clip}_info.mat").exists():
        return
    rng = np.random.default_rng((seed * 1_000_003 + i, SPLITS.index(split)))
    person = scene(rng, frames)
    images, labels = render(rng, person, picture)
    video = encode_video(images, quality=rng.integers(18, 27))
    masks = {f"segm_{t}": mask for t, mask in enumerate(labels, 1)}
    # As in SURREAL, the projection is rounded to whole numbers, and the principal point (160, 120)
    # is a corner between pixels: the centre of the pixel in column 7 is at x = 7.5.
    joints = project(person["place"], person["camera"])[..., :2].round()
    pose = Rotation.from_matrix(person["local"].reshape(-1, 3, 3)).as_rotvec()
    info = dict(                                        # SURREAL squeezes the joints if T = 1
        joints2D=joints.T.squeeze(),
        joints3D=person["place"].T.squeeze(),
        pose=pose.reshape(frames, 72).T,
        shape=np.tile(person["shape"][:, None], frames))
    info = {name: np.float32(value) for name, value in info.items()}
    info.update(sequence=sequence, source="stand-in, not SURREAL")
    files = {
        ".mp4": video,
        "_segm.mat": encode_mat(masks),
        "_info.mat": encode_mat(info)}
    for ending, content in files.items():
        write_whole(Path(f"{clip}{ending}"), content)


# ------ Command line
CLIPS, RAW, STANDIN, OWN = "--raw, --synthesize", "--raw", "--synthesize", "--images"
ALL = "--raw, --synthesize, --images"
OPTIONS = [     # name, the modes it goes with, default, lowest value, help
    ("size", ALL, 320, 1, "side of the square images, in pixels"),
    ("workers", ALL, os.cpu_count(), 0, "processes, 150 MB each; 0 starts none"),
    ("run", RAW, 0, 0, "SURREAL's run; clips of 0, 1, 2 overlap by 50, 70, 30 %%"),
    ("train", CLIPS, 90_000, 1, "frames for train, or all that exist"),
    ("val", CLIPS, 15_000, 1, "frames for val, or all that exist, spread over its clips"),
    ("test", CLIPS, 15_000, 1, "frames for test, or all that exist"),
    ("pick", CLIPS, "spread", None, "spread: as many frames of every cluster of poses; cluster: "
     "the one cluster nearest to the wanted size, as in the paper"),
    ("clusters", CLIPS, 25, 1, "number of clusters of poses"),
    ("exclude", CLIPS, [], None, "clips to leave out; misshapen are '18_*' '19_*' '*143_21*'"),
    ("margin", CLIPS, 0.1, 0, "space around the person, as a share of its box"),
    ("seed", CLIPS, 0, 0, "of the choice of frames and of the stand-in's people"),
    ("clips", STANDIN, 1000, 1, "clips for train; a tenth each for val and test"),
    ("frames", STANDIN, 2, 1, "frames of a clip"),
    ("backgrounds", STANDIN, None, None, "folder of photographs for backgrounds and prints"),
    ("masks", OWN, None, None, "grey or palette PNGs of class ids, named like their pictures"),
    ("names", OWN, [], None, "the classes, in the order of their ids"),
    ("values", OWN, [], None, "of each class in the masks; default: 0 1 2 ..."),
]
SPECIAL = dict(
    pick=dict(choices=("spread", "cluster")),
    exclude=dict(nargs="+", type=str, action="extend"),
    names=dict(nargs="+", type=str),
    values=dict(nargs="+", type=int))


def synthesize(raw, clips, frames, seed, workers, backgrounds):
    """Fills raw/{train,val,test}/run0 with `clips` clips for train, a tenth for val and for test,
    except those already there. Of the pictures in `backgrounds`, train gets eight in ten."""
    settings = dict(clips=clips, frames=frames, seed=seed, backgrounds=backgrounds)
    check_settings(raw, settings)
    pictures = [None] * 10                      # for these make_clip makes backgrounds up
    if backgrounds:
        paths = glob.glob("**/*", root_dir=backgrounds, recursive=True)     # linked folders too
        paths = sorted(Path(backgrounds, path) for path in paths)
        pictures = [path for path in paths if path.suffix.lower() in PICTURES]
    if len(pictures) < 10:
        raise Problem(f"--backgrounds {backgrounds} has {len(pictures)} pictures; 10 are required")
    for_train = [picture for i, picture in enumerate(pictures) if i % 10 < 8]
    behind = dict(train=for_train, val=pictures[8::10], test=pictures[9::10])
    jobs = []
    for split, own in behind.items():
        count = clips if split == "train" else max(2, clips // 10)
        jobs += [(raw, split, i, seed, frames, own[i % len(own)]) for i in range(count)]
    used = {str(picture) for *_, picture in jobs if picture}
    check(read_picture, [(path,) for path in sorted(used)], workers)
    write_json(raw / "settings.json", dict(settings=settings))
    list(in_parallel(make_clip, jobs, workers, "rendering the stand-in"))


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, without the usage before them."""

    def error(self, message):
        self.exit(2, f"prepare_surreal.py: {message} (--help lists the options)\n")


def parse(argv):
    """The options. Exits with status 2 where they are wrong, or do not go together."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--raw", type=os.path.abspath,
                       help="SURREAL's folder of train, val and test, usually SURREAL/data/cmu")
    group.add_argument("--synthesize", action="store_true", help="render a stand-in into OUT-raw")
    group.add_argument("--images", type=os.path.abspath,
                       help="your own pictures; folders in it are not entered")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    for name, modes, default, _, text in OPTIONS:
        kind = os.path.abspath if default is None else type(default)
        options = dict(type=kind, default=default, help=f"{text} (with {modes})")
        parser.add_argument(f"--{name}", **options | SPECIAL.get(name, {}))
    args = parser.parse_args(argv)
    mode = "--raw" if args.raw else "--images" if args.images else "--synthesize"
    for name, modes, default, lowest, _ in OPTIONS:
        value = getattr(args, name)
        if value != default and mode not in modes:
            parser.error(f"--{name} goes with {modes} alone")
        if lowest is not None and not lowest <= value < 2 ** 63:        # nan is not either
            parser.error(f"--{name} has to be from {lowest} to less than 2 ** 63")
    args.values = args.values or list(range(len(args.names)))
    names = set(map(str.strip, args.names)) - {""}
    values = set(args.values) & set(range(256))
    fitting = 2 <= len(names) == len(args.names) == len(values) == len(args.values) < 256
    if args.images and not (fitting and args.masks not in (None, args.images)):
        parser.error("--images needs --masks, another folder; --names, 2 to 255 different ones; "
                     "and as many different --values from 0 to 255, if any")
    return args


def main(argv=None):
    """Returns the exit status: 0, 2 after a sentence about what can be mended, 130 on Ctrl-C."""
    args = parse(argv)
    sys.stdout.reconfigure(errors="backslashreplace")           # names that it cannot show
    if args.synthesize:
        args.raw = os.path.abspath(f"{args.out}-raw")
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "workers")}
    try:
        with lock(args.out):
            check_settings(args.out, settings)
            if args.synthesize and not (args.out / "classes.json").exists():
                synthesize(Path(args.raw), args.clips, args.frames, args.seed, args.workers,
                           args.backgrounds)
            prepare(args, settings)
        return 0
    except BrokenExecutor:
        error = "the system ended a worker, most often for want of memory: give fewer --workers"
    except (Problem, OSError) as problem:
        error = problem
    except KeyboardInterrupt:
        print("prepare_surreal.py: stopped; repeat the same command", file=sys.stderr)
        return 130
    print(f"prepare_surreal.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
