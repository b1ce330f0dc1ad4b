"""From raw SURREAL clips, or from your own pictures, to the folder that train.py reads.

For SURREAL (arXiv 1701.01370) this is the procedure of the paper (Borrego Carazo, 2018, Section
2.2): choose frames by k-means on their 3D joints, give stray head labels back to the torso, cut out
a square around the person. Differs from the paper: it takes the frames of one cluster of poses
(`--pick cluster`), here every cluster gives the same number; and no test clip shares poses with a
clip of val. For your own pictures, masks of class ids become labels (`--images`).

What could not be used is listed in skipped.csv with its reason, and classes.json is written last.
A command that was stopped goes on when it is repeated. The last part of this file renders a
stand-in in SURREAL's layout, for those who do not have SURREAL.
"""
import argparse
import collections
import csv
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
import sys
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
# Clips of 100 frames begin 50, 30 or 70 frames after one another in run0, run1 and run2, so clips
# whose numbers differ by at most this much share poses.
SHARING = (1, 3, 1)

# SURREAL's labels: 0, then the SMPL joint's number + 1. Its images are mirrored: what it calls
# "left" is on the visible person's right; labels and joints agree, so the names stay as they are.
# This file imports nothing of ours, so NAMES and Problem stand in evaluate.py as well.
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
        votes[:, 1:] *= 10                      # one body part outvotes 8 x background
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
        room = length - side                    # negative: the frame lies inside the square
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
        return np.nan_to_num(joints - joints[:, :1]).clip(-9, 9).reshape(-1, 72), None
    except Exception as error:              # a broken file makes its reader stumble in any way
        return np.zeros((0, 72), np.float32), f"info.mat: {error!r}; it had no part in the choice"


def pick(poses, wanted, how, clusters, rng):
    """Rows (ascending) to take of the frames with these poses (N, 72), which lie clip by clip.

    how: "spread" takes the same number from each cluster, as far as it has them, evenly over its
    frames: 90 of clusters of 10, 50 and 60 are 10, 40 and 40. "cluster" takes the one cluster whose
    size is nearest to `wanted`.
    """
    if not 0 < wanted < len(poses):
        return np.arange(min(wanted, len(poses)))
    # Neighbouring frames are so alike that more than 200,000 poses would hardly move the centres.
    few = poses[rng.choice(len(poses), min(len(poses), 200_000), replace=False)]
    centres, _ = kmeans2(few, min(clusters, len(few)), iter=30, minit="++", rng=rng)
    nearest, _ = vq(poses, centres)
    members = [np.flatnonzero(nearest == number) for number in np.unique(nearest)]
    if how == "cluster":
        return min(sorted(members, key=len), key=lambda rows: abs(len(rows) - wanted))
    taken, missing = [], wanted
    # Small clusters come first, so that the larger ones can give what these lack.
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


def select_clips(raw, run, exclude):
    """The clips {split: {clip: folder}} that frames may come from, and rows of skipped.csv.

    Training keeps the network with the best score on val, so no clip of test may share poses with
    one of val. In SURREAL's run0, of 3,814 test clips 173 are in val as well, 268 are next to a val
    clip of their sequence, and 85 are it or next to it in the sequence's twin, `ung_` or not.
    """
    found = {split: find_clips(f"{raw}/{split}/run{run}") for split in SPLITS}
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
            reason = "also in val" if clip in found["val"] else "shares poses with a val clip"
            skipped.append((clip, "", reason))
    if not all(found.values()):
        raise Problem("no clip is left in one of the splits: --exclude less")
    return found, skipped


def choose(args):
    """The frames [(split, folder, clip, [t, ...])] to take, and rows of skipped.csv."""
    clips, skipped = select_clips(args.raw, args.run, args.exclude)
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
        if how == "cluster" and wanted > len(frames):
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
    return chosen, skipped


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
        yield from tqdm(results, what, len(jobs), mininterval=pause)


def write_whole(path, data):
    """Writes bytes to a file that is there whole or not at all, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_json(path, content, indent=None):
    write_whole(Path(path), (json.dumps(content, indent=indent) + "\n").encode())


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def check_settings(folder, note, settings):
    """Raises Problem if `folder` was made with other settings, as its JSON file `note` tells, or if
    it holds other files. A folder with .parts is ours, even if an early kill left no note."""
    if note.exists():
        found = read_json(note).get("settings", {})
        differing = {key: found.get(key) for key in settings if found.get(key) != settings[key]}
        if differing:
            raise Problem(f"{folder} was made with {differing}: name another --out or remove it")
    elif folder.exists() and ".parts" not in os.listdir(folder) != []:
        raise Problem(f"{folder} holds other files: name another --out, a new or an empty folder")


def prepare(args, settings):
    """Prepares the clips, or pictures, of `args` into args.out, or goes on with it. Raises Problem.

    The choice of frames is stored, so that clips that arrive later do not mix two choices. While
    there are clips that failed, .parts stays: the same command tries them again.
    """
    out, parts = args.out, f"{args.out}/.parts"
    if args.images:                             # anew each time, so that pictures can be added
        chosen, skipped = choose_pictures(args)
        shutil.rmtree(parts, ignore_errors=True)
        os.makedirs(parts)
    else:
        if not os.path.exists(f"{parts}/choice.json"):
            chosen, skipped = choose(args)
            choice = dict(settings=settings, chosen=chosen, skipped=skipped)
            write_json(f"{parts}/choice.json", choice)
        choice = read_json(f"{parts}/choice.json")
        chosen, skipped = choice["chosen"], choice["skipped"]
    (out / "classes.json").unlink(missing_ok=True)          # from now on the folder is unfinished
    for split, kind in itertools.product(SPLITS, ("images", "labels")):
        os.makedirs(f"{out}/{split}/{kind}", exist_ok=True)
    jobs = [(out, args.size, args.margin, *job) for job in chosen
            if not os.path.exists(f"{parts}/{job[0]}/{job[2]}.json")]
    write = convert if args.images else extract
    failed = [row for row in in_parallel(write, jobs, args.workers, "writing frames") if row]
    describe(args, settings, skipped + failed)
    if not failed:
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
    groups = groups_of([path.stem for path in out.glob("*/images/*")])
    for split in reversed(SPLITS):              # train comes last: its numbers are used below
        frames, joints, more, (*colours, pixels) = collect(out, split)
        skipped += more
        count = len({groups[frame] for frame in frames})
        print(f"{split}: {len(frames)} frames of {count} groups")
        if args.images:
            print("    pixels of each class:", dict(zip(names, pixels.tolist())))
        else:
            joints = np.array(joints, np.float32).reshape(-1, 24, 2)
            np.savez(f"{out}/{split}/joints.npz", frames=np.array(frames, str), joints=joints)
    with open(out / "skipped.csv", "w", newline="", encoding="utf-8") as file:
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
    elif args.synthesize:
        classes |= dict(SURREAL, source="rendered stand-in, not SURREAL")
    else:
        source = f"SURREAL, run{args.run}; its left is the visible person's right"
        classes |= dict(SURREAL, source=source)
    write_json(out / "classes.json", classes, indent=1)
    left_out = [clip for clip, frame, _ in skipped if not frame]
    print(f"{out} is ready, preview.png shows some of it. {len(left_out)} clips or files were left "
          "out, skipped.csv says why; the same command tries broken clips again")


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
    return found


def groups_of(frames):
    """{frame: group}, the group being the frame's name without its number, or SURREAL's sequence:
    "walk" for walk_0001, "01_01" for 01_01_c0001_037 and its twin ung_01_01_c0001_037. Where all
    are one group, each is its own."""
    groups = {frame: re.sub(r"^ung_|(_c\d{4})?_\d+$", "", frame) for frame in frames}
    if len(set(groups.values())) == 1:
        return {frame: frame for frame in frames}
    return groups


def split_frames(frames, out):
    """{frame: split}. The pictures of one group, such as a video, never lie in two splits.

    What is in `out` stays where it is, and a new group goes to the split of its hash, 8 : 1 : 1, so
    adding pictures moves none. Hashing alone could leave a split empty. So the first new groups, in
    the order of their hashes, go to the empty splits; in another, empty `out`, where more pictures
    are prepared at once, these may be other groups.
    """
    groups = groups_of(frames)
    placed = {path.stem: path.parts[-3] for path in out.glob("*/labels/*.png")}
    splits = {groups[frame]: split for frame, split in placed.items() if frame in groups}
    empty = [split for split in SPLITS if split not in splits.values()]
    hashes = {}
    for group in set(groups.values()) - set(splits):
        hashes[group] = int(hashlib.sha256(os.fsencode(group)).hexdigest(), 16)
    if len(hashes) < len(empty):
        raise Problem(f"{len(hashes)} new groups of pictures (names without their number) are too "
                      f"few for {empty}, which need one each: add pictures, or rename some")
    for group in sorted(hashes, key=hashes.get):
        tenth = hashes[group] % 10
        splits[group] = empty.pop(0) if empty else SPLITS[max(0, tenth - 7)]
    return {frame: placed.get(frame, splits[groups[frame]]) for frame in frames}


def choose_pictures(args):
    """The pictures [(split, picture, frame, (mask, values))] and rows of skipped.csv for the files
    that are none. Removes frames from args.out whose picture is no longer there."""
    pictures = list_files(args.images, PICTURES)
    masks = list_files(args.masks, (".png",))
    lonely = sorted(set(pictures) ^ set(masks))
    if lonely:
        raise Problem(f"{len(lonely)} pictures have no mask or masks no picture, the first is "
                      f"{lonely[0]}: a mask has its picture's name, and ends in .png")
    splits = split_frames(pictures, args.out)
    for path in [*args.out.glob("*/images/*"), *args.out.glob("*/labels/*")]:
        if path.stem not in pictures:
            path.unlink()
    chosen = []
    for frame, path in pictures.items():
        chosen.append((splits[frame], str(path), frame, (str(masks[frame]), args.values)))
    others = set(os.listdir(args.images)) - {path.name for path in pictures.values()}
    return chosen, [(name, "", "no picture; folders are not entered") for name in others]


def convert(out, size, margin, split, picture, frame, mask):
    """Writes a picture and its mask, padded to a square and resized. mask: its path and its value
    of each class. Raises Problem for what is no mask of class ids."""
    path, values = mask
    try:
        opened = Image.open(picture)
        if opened.mode[0] in "IF":
            raise ValueError("more than 8 bits a channel")
        image = ImageOps.exif_transpose(opened).convert("RGB")
        stored = Image.open(path)
        indices = np.array(stored, np.uint8)    # of a palette mask, not its colours
    except Exception as error:                  # a broken file makes Pillow stumble in any way
        raise Problem(f"{picture} or {path} cannot be read: {error!r}") from error
    if stored.mode not in ("1", "L", "P"):
        raise Problem(f"{path} has the mode {stored.mode}: masks are grey or palette PNGs of 8 bit "
                      "whose values are class ids, so give each colour the id of its class")
    if stored.size != image.size:
        raise Problem(f"{path} has {stored.size} pixels, its picture {image.size}, upright")
    unknown = set(np.unique(indices).tolist()) - {*values, IGNORE}
    if unknown:
        raise Problem(f"{path} has the value {min(unknown)}, which is not in {values}: --values "
                      "says which value is which name, in the order of --names")
    ids = np.full(256, IGNORE, np.uint8)
    ids[values] = np.arange(len(values))
    width, height = image.size
    side = max(width, height)
    box = (width - side) // 2, (height - side) // 2, side
    pair = crop(np.array(image), ids[indices], box, size)
    write_record(out, split, frame, [(frame, *pair, None)], [])


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
CLIPS, STANDIN, OWN = "--raw, --synthesize", "--synthesize", "--images"
ALL = "--raw, --synthesize, --images"
OPTIONS = [     # name, the modes it goes with, default, lowest value, help
    ("size", ALL, 320, 1, "side of the square images, in pixels"),
    ("workers", ALL, os.cpu_count(), 0, "processes, 150 MB each; 0 starts none"),
    ("run", CLIPS, 0, 0, "SURREAL's run; clips of 0, 1, 2 overlap by 50, 70, 30 %%"),
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
    ("backgrounds", STANDIN, None, None, "folder of photographs for backgrounds"),
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
    check_settings(raw, raw / "settings.json", settings)
    pictures = [None] * 10                      # for these make_clip makes backgrounds up
    if backgrounds:
        paths = glob.glob("**/*", root_dir=backgrounds, recursive=True)     # linked folders too
        paths = sorted(Path(backgrounds, path) for path in paths)
        pictures = [path for path in paths if path.suffix.lower() in PICTURES]
    if len(pictures) < 10:
        raise Problem(f"--backgrounds {backgrounds} has {len(pictures)} pictures; 10 are required")
    write_json(raw / "settings.json", dict(settings=settings))
    for_train = [picture for i, picture in enumerate(pictures) if i % 10 < 8]
    behind = dict(train=for_train, val=pictures[8::10], test=pictures[9::10])
    jobs = []
    for split, own in behind.items():
        count = clips if split == "train" else max(2, clips // 10)
        jobs += [(raw, split, i, seed, frames, own[i % len(own)]) for i in range(count)]
    list(in_parallel(make_clip, jobs, workers, "rendering the stand-in"))


def parse(argv):
    """The options. Exits with status 2 where they are wrong, or do not go together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    modes = parser.add_mutually_exclusive_group(required=True)
    modes.add_argument("--raw", type=os.path.abspath,
                       help="SURREAL's folder of train, val and test, usually SURREAL/data/cmu")
    modes.add_argument("--synthesize", action="store_true", help="render a stand-in into OUT-raw")
    modes.add_argument("--images", type=os.path.abspath,
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
        if lowest is not None and not value >= lowest:      # nan is not either
            parser.error(f"--{name} has to be {lowest} or more")
    args.values = args.values or list(range(len(args.names)))
    if args.images and not (args.masks and 2 <= len(args.names) == len(args.values) < 256):
        parser.error("--images needs --masks, --names (2 to 255), and as many --values, if any")
    if len(set(args.values) & set(range(256))) < len(args.values):
        parser.error("--values are different numbers from 0 to 255")
    return args


def main(argv=None):
    """Returns the exit status: 0, 2 after a sentence about what can be mended, 130 on Ctrl-C."""
    args = parse(argv)
    if args.synthesize:
        args.raw = f"{args.out}-raw"
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "workers")}
    done, choice = args.out / "classes.json", args.out / ".parts" / "choice.json"
    try:
        check_settings(args.out, done if done.exists() else choice, settings)
        if args.synthesize and not done.exists():
            synthesize(Path(args.raw), args.clips, args.frames, args.seed, args.workers,
                       args.backgrounds)
        if args.images or choice.exists() or not done.exists():
            prepare(args, settings)
        else:
            print(f"{args.out} is ready, with these settings")
        return 0
    except BrokenExecutor:
        error = "the system ended a worker, most often for want of memory: give fewer --workers"
    except (Problem, OSError) as problem:
        error = problem
    except KeyboardInterrupt:
        print("prepare_surreal.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    print(f"prepare_surreal.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
