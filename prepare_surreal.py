"""From raw SURREAL clips to the images a network trains on: chosen by pose, repaired, cropped.

The procedure is that of the paper (Borrego Carazo, 2018, Section 2.2), on the dataset of Varol et
al. (2017, arXiv 1701.01370):

    joints3D of all frames -> k-means -> chosen frames -> mp4 and masks
      -> stray head labels refilled -> square crop -> OUT/<split>/{images,labels,joints.npz}

It differs from the paper in what is chosen (the same number of frames from every cluster of poses;
`--pick cluster` takes one cluster, as the authors did), and no clip is in both val and test. A
broken clip or frame costs itself alone; OUT/skipped.csv says why. A run that was stopped goes on
with the same command. OUT/classes.json comes last: a folder without it is unfinished.

    python prepare_surreal.py --raw SURREAL/data/cmu --out data/surreal      the dataset
    python prepare_surreal.py --synthesize --out data/standin                made-up people
"""
import argparse
import collections
import csv
import fcntl
import fnmatch
import functools
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import warnings
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps
from scipy import ndimage
from scipy.io import loadmat, savemat
from scipy.sparse import csr_matrix
from tqdm import tqdm

SPLITS = ("train", "val", "test")
PARTS = (".mp4", "_segm.mat", "_info.mat")      # the files of a clip that are read
HEAD = 16
IGNORE = 255                                    # label of what lies outside the frame

# SURREAL's labels: 0, then the SMPL joint's number + 1. Its pictures are mirrored: what it calls
# "left" is on the visible person's right; labels and joints agree, so the names stay as they are.
# Colours: green torso, teal head; limbs grow paler outwards, arms red (left) and orange (right),
# legs blue (left) and violet (right). Last, the share of pixels in the paper's cropped train set.
CLASSES = (
    ("background", (26, 28, 36), 0.87346), ("hips", (20, 102, 52), 0.02098),
    ("leftUpLeg", (28, 66, 190), 0.01220), ("rightUpLeg", (104, 38, 158), 0.01201),
    ("spine", (58, 150, 66), 0.00702), ("leftLeg", (50, 126, 236), 0.00996),
    ("rightLeg", (158, 84, 222), 0.00978), ("spine1", (120, 188, 78), 0.00601),
    ("leftFoot", (112, 186, 255), 0.00239), ("rightFoot", (206, 136, 250), 0.00247),
    ("spine2", (188, 222, 110), 0.00915), ("leftToeBase", (190, 228, 255), 0.00043),
    ("rightToeBase", (236, 200, 255), 0.00082), ("neck", (128, 228, 212), 0.00162),
    ("leftShoulder", (138, 14, 34), 0.00230), ("rightShoulder", (158, 78, 6), 0.00210),
    ("head", (0, 158, 150), 0.00865), ("leftArm", (212, 34, 50), 0.00408),
    ("rightArm", (232, 124, 10), 0.00408), ("leftForeArm", (250, 96, 104), 0.00321),
    ("rightForeArm", (252, 172, 48), 0.00341), ("leftHand", (255, 154, 164), 0.00116),
    ("rightHand", (255, 210, 104), 0.00129), ("leftHandIndex1", (255, 206, 216), 0.00067),
    ("rightHandIndex1", (255, 238, 176), 0.00077),
)
NAMES, PALETTE, PAPER = (list(column) for column in zip(*CLASSES))
SIDES = {"left": "right", "right": "left"}
MIRROR = [next((NAMES.index(SIDES[side] + name.removeprefix(side)) for side in SIDES
                if name.startswith(side)), own) for own, name in enumerate(NAMES)]
GROUPS = {                                      # the columns of the paper's Tables 2 and 5
    "Background": [0], "Head": [16], "Torso": [1, 4, 7, 10], "U.Legs": [2, 3], "L.Legs": [5, 6],
    "Neck": [13], "Shoulder": [14, 15], "U.Arms": [17, 18], "L.Arms": [19, 20], "Feet": [8, 9],
    "Hands": [21, 22], "Fingers": [23, 24], "Toes": [11, 12],
}


class Problem(Exception):
    """Something the user can mend, as one sentence that names the value and the way out."""


class Unusable(Exception):
    """Why a clip or a frame is left out."""


# --------------------------------------------------------------------------------------------------
# Working in parallel, and files that are whole or not there
# --------------------------------------------------------------------------------------------------

def start_worker():
    """Ctrl-C is the main process's affair; when that is killed, its workers must not wait on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


def limited(seconds, function, *job):
    """function(*job); a process that needs more processor time for it, in a decoder that hangs, is
    ended by the system."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    result = function(*job)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, 0)
    return result


def in_parallel(function, jobs, workers, seconds=300):
    """Yields (job, function(*job)) as they finish, on `workers` processes (0: in this one).

    A job that ends its process twice (crash, endless loop, memory) yields (job, None). Only a few
    jobs wait at a time, so memory does not grow with their number. Raises what function raises.
    """
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    context.set_forkserver_preload(["__main__", __name__])      # imported once, not in each worker

    def processes(count):
        return ProcessPoolExecutor(count, context, start_worker)

    def alone(function, *job):
        try:
            with processes(1) as pool:
                return pool.submit(function, *job).result()
        except BrokenProcessPool:
            return None

    if workers == 0:
        yield from ((job, function(*job)) for job in jobs)
        return
    todo = collections.deque(jobs)
    while todo:
        running = {}
        with processes(min(workers, len(todo))) as pool:
            try:
                while todo or running:
                    while todo and len(running) < 2 * workers:
                        running[pool.submit(limited, seconds, function, *todo[0])] = todo[0]
                        todo.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield running.pop(future), result
            except BrokenProcessPool:
                pass
        for job in running.values():            # one of these ended its process: which?
            result = alone(limited, seconds, function, *job)
            if result is None and alone(os.getpid) is None:
                raise Problem("no worker process can be started; --workers 0 does without")
            yield job, result


def write_whole(out, path, data):
    """Writes bytes to OUT/path, whole or not at all. What a kill leaves lies in OUT/.parts."""
    temporary = out / ".parts" / f"{os.getpid()}.tmp"
    temporary.write_bytes(data)
    os.replace(temporary, out / path)


def as_json(content):
    return (json.dumps(content, indent=1) + "\n").encode()


def progress(total, what, unit):
    """A bar with the time left; without a terminal a line now and then."""
    pause = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=what, unit=f" {unit}", mininterval=pause, dynamic_ncols=True)


# --------------------------------------------------------------------------------------------------
# Choosing the frames
# --------------------------------------------------------------------------------------------------

def list_clips(folder, exclude, known):
    """The clips folder/<sequence>/<clip>{.mp4,_segm.mat,_info.mat}, in alphabetical order.

    exclude: patterns for the clip's or the sequence's name. known: clips, and sequences that could
    not be read, of another split.
    Returns ([(sequence, clip)], [(clip, "", reason)] of those left out).
    """
    usable, skipped, seen = [], [], {}
    for sequence in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        try:
            files = {entry.name for entry in os.scandir(folder / sequence)
                     if entry.is_file() and not entry.name.startswith("._")}    # of macOS
        except OSError as error:
            skipped.append((sequence, "", f"unreadable folder: {error.strerror}"))
            continue
        clips = {name.removesuffix(part) for name in files for part in PARTS if name.endswith(part)}
        for clip in sorted(clips - {""}):
            missing = [part.lstrip("._") for part in PARTS if clip + part not in files]
            if any(fnmatch.fnmatchcase(name, x) for name in (clip, sequence) for x in exclude):
                reason = "excluded"
            elif clip in known or sequence in known:
                reason = "also in val"
            elif clip in seen:
                reason = f"name already taken: by the clip in {seen[clip]}"
            elif missing:
                reason = f"no {missing[0]}"
            elif len(os.fsencode(clip)) > 200:
                reason = "name too long"
            else:
                usable.append((sequence, clip))
                seen[clip] = sequence
                continue
            skipped.append((clip, "", reason))
    return usable, skipped


def wording(error):
    """The first line of an error's message without the path, or its type."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:100]


def read_mat(path, names):
    """{name: array} of those variables that the MATLAB file has. Raises Unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = loadmat(path, variable_names=names)
        return {name: found[name] for name in names if isinstance(found.get(name), np.ndarray)}
    except Exception as error:          # a garbled file makes the reader stumble in any way
        part = path.stem.rsplit("_", 1)[-1]
        raise Unusable(f"unreadable {part}.mat: {wording(error)}") from error


def read_joints(path):
    """joints2D (T, 24, 2), x and y in pixels, and joints3D (T, 24, 3), metres, both float32.

    With one frame the file has them squeezed: (2, 24) and (3, 24). Raises Unusable.
    """
    mat, joints = read_mat(path, ["joints2D", "joints3D"]), []
    for name, axes in (("joints2D", 2), ("joints3D", 3)):
        array = mat.get(name)
        if array is None:
            raise Unusable(f"wrong joints: {name} is missing")
        if (array.dtype.kind not in "fiu" or array.shape[:2] != (axes, 24)
                or array.ndim not in (2, 3)):
            raise Unusable(f"wrong joints: {name} is {array.dtype} of shape {array.shape}, "
                           f"expected numbers of shape ({axes}, 24, T)")
        with np.errstate(over="ignore", invalid="ignore"):
            joints.append(array.reshape(axes, 24, -1).transpose(2, 1, 0).astype(np.float32))
    flat, solid = (len(array) for array in joints)
    if flat != solid or flat == 0:
        raise Unusable(f"wrong joints: {flat} frames of joints2D, {solid} of joints3D")
    return joints


def read_poses(path):
    """(poses (T, 72) float32, pelvis at 0, {t: reason} of bad frames), or the reason why not."""
    try:
        flat, solid = read_joints(path)
    except Unusable as reason:
        return str(reason)
    bad = {}
    with np.errstate(invalid="ignore", over="ignore"):
        for joints in (flat, solid):
            finite, present = (np.abs(joints) < 1e6).all(axis=(1, 2)), joints.any(axis=(1, 2))
            bad |= {int(t): "joints not finite" for t in np.flatnonzero(~finite)}
            bad |= {int(t): "joints all zero" for t in np.flatnonzero(~present)}
        return (solid - solid[:, :1]).reshape(len(solid), 72), bad


def nearest(poses, centres, chunk=8192):
    """Each pose's nearest centre (N,) int32. poses (N, D), centres (K, D) float32."""
    found = np.empty(len(poses), np.int32)
    for start in range(0, len(poses), chunk):                           # a chunk stays in the cache
        part = poses[start:start + chunk]
        distance = (centres ** 2).sum(axis=1) - 2 * part @ centres.T    # (n, K), less |part|^2
        found[start:start + chunk] = distance.argmin(axis=1)
    return found


def kmeans(poses, clusters, rng, rounds=100, enough=200_000):
    """Each pose's cluster (N,) int32. poses (N, D) float32.

    Lloyd's algorithm from k-means++ seeds (Arthur & Vassilvitskii, 2007), until fewer than one pose
    in 2,000 moves. The centres are those of at most `enough` poses, drawn at random: neighbouring
    frames are so alike that more of them only take longer.
    """
    sample = poses[np.sort(rng.choice(len(poses), min(len(poses), enough), replace=False))]
    few = rng.choice(sample, min(len(sample), 20_000), replace=False)
    centres = [few[rng.integers(len(few))]]
    distance = ((few - centres[0]) ** 2).sum(axis=1)
    for _ in range(clusters - 1):               # the best of three draws
        odds = distance / distance.sum() if distance.any() else None
        draws = few[rng.choice(len(few), 3, p=odds)]
        closer = [np.minimum(distance, ((few - draw) ** 2).sum(axis=1)) for draw in draws]
        best = np.argmin([left.sum() for left in closer])
        distance = closer[best]
        centres.append(draws[best])
    centres, before = np.stack(centres), None
    with progress(rounds, "k-means, at most", "rounds") as bar:
        for _ in range(rounds):
            found = nearest(sample, centres)
            bar.update()
            if before is not None and np.count_nonzero(found != before) <= len(found) // 2000:
                break
            members = csr_matrix((np.ones(len(found), np.float32), (found, np.arange(len(found)))),
                                 shape=(clusters, len(found)))
            counts = np.bincount(found, minlength=clusters)[:, None]
            centres = np.where(counts > 0, members @ sample / np.maximum(counts, 1), centres)
            centres, before = centres.astype(np.float32), found
    return nearest(poses, centres)


def share(sizes, wanted, rng):
    """How many to take from groups of these sizes, `wanted` in all: the same number from each, as
    far as it has them; lots decide where that does not come out even."""
    sizes = np.asarray(sizes)
    if wanted >= sizes.sum():
        return sizes.copy()
    low, high = 0, wanted               # the highest level to which all groups can be filled
    while low < high:
        level = (low + high + 1) // 2
        fits = np.minimum(sizes, level).sum() <= wanted
        low, high = (level, high) if fits else (low, level - 1)
    counts = np.minimum(sizes, low)
    more = np.flatnonzero(sizes > low)
    counts[rng.choice(more, wanted - counts.sum(), replace=False)] += 1
    return counts


def evenly(clip_of, wanted, rng):
    """Rows to take from frames whose clips are clip_of (N,), ascending: the same number from every
    clip as far as it has them, at even steps in time from a random start."""
    _, first, sizes = np.unique(clip_of, return_index=True, return_counts=True)
    counts = share(sizes, wanted, rng)
    first, size, step, start = (np.repeat(values, counts) for values in (
        first, sizes, sizes / np.maximum(counts, 1), rng.random(len(counts))))
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return first + np.minimum(((place + start) * step).astype(int), size - 1)


def pick(clip_of, poses, wanted, how, clusters, rng):
    """Rows of the frames to take, ascending. clip_of (N,) ascending; poses (N, 72), or None to go
    by clips alone (val)."""
    if len(clip_of) <= wanted or wanted == 0:
        return np.arange(min(len(clip_of), wanted))
    if poses is None:
        return evenly(clip_of, wanted, rng)
    assigned = kmeans(poses, min(clusters, len(poses)), rng)
    members = [np.flatnonzero(assigned == cluster) for cluster in range(assigned.max() + 1)]
    sizes = np.array([len(rows) for rows in members])
    if how == "cluster":
        return members[np.abs(sizes - wanted).argmin()]
    counts = share(sizes, wanted, rng)
    return np.sort(np.concatenate([rows[evenly(clip_of[rows], count, rng)]
                                   for rows, count in zip(members, counts)]))


def scan(clips, folder, workers, with_poses):
    """Reads the joints of all clips [(sequence, clip)].

    Returns frames (N, 2) int, each usable one's clip (its place in `clips`) and t; poses (N, 72)
    float32, or None; and [(clip, frame, reason)] of the unusable.
    """
    jobs = {(folder / sequence / f"{clip}_info.mat",): i
            for i, (sequence, clip) in enumerate(clips)}
    found, frames, skipped = [None] * len(clips), [np.zeros((0, 2), int)], []
    with progress(len(clips), f"poses of {folder.parent.name}", "clips") as bar:
        for job, result in in_parallel(read_poses, jobs, workers):
            found[jobs[job]] = result or "unreadable info.mat: reading it ended the process"
            bar.update()
    for i, (_, clip) in enumerate(clips):
        if isinstance(found[i], str):
            skipped.append((clip, "", found[i]))
            found[i] = np.zeros((0, 72), np.float32)
            continue
        poses, bad = found[i]
        skipped += [(clip, t + 1, reason) for t, reason in bad.items()]
        good = np.setdiff1d(np.arange(len(poses)), list(bad))
        frames.append(np.stack([np.full(len(good), i), good], axis=1))
        found[i] = poses[good] if with_poses else None
    frames = np.concatenate(frames)
    if not with_poses:
        return frames, None, skipped
    table, end = np.empty((len(frames), 72), np.float32), len(frames)
    while found:                        # from the back, freeing parts: memory holds one table
        part = found.pop()
        table[end - len(part):end] = part
        end -= len(part)
    return frames, table, skipped


def choose(args):
    """All decisions of the run: {"clips": [[split, sequence, clip, [t, ...]], ...],
    "skipped": [[clip, frame, reason], ...]}. Raises Problem where no train frame is usable."""
    plan, of_val = dict(clips=[], skipped=[]), set()
    for number, split in enumerate(("val", "train", "test")):
        folder, wanted = args.raw / split / f"run{args.run}", getattr(args, split)
        if not folder.is_dir():
            continue
        clips, skipped = list_clips(folder, args.exclude, of_val if split == "test" else ())
        if split == "val":
            of_val = {clip for _, clip in clips} | {clip for clip, _, _ in skipped}
        if wanted == 0:
            continue
        frames, poses, unusable = scan(clips, folder, args.workers, with_poses=split != "val")
        plan["skipped"] += skipped + unusable
        rows = pick(frames[:, 0], poses, wanted, args.pick, args.clusters,
                    np.random.default_rng([args.seed, number]))
        del poses                       # the next table takes its place
        indices, first = np.unique(frames[rows, 0], return_index=True)
        for i, times in zip(indices, np.split(frames[rows, 1], first[1:])):
            plan["clips"].append([split, *clips[i], times.tolist()])
    if not any(split == "train" for split, *_ in plan["clips"]):
        reasons = collections.Counter(reason for *_, reason in plan["skipped"]).most_common(1)
        raise Problem(f"no usable clip in {args.raw / 'train' / f'run{args.run}'}"
                      + "".join(f"; most often: {reason}" for reason, _ in reasons))
    return plan


# --------------------------------------------------------------------------------------------------
# One frame: repair and crop
# --------------------------------------------------------------------------------------------------

def repair_head(labels):
    """Refills stray head labels (paper, Section 2.2), in place. labels (H, W) uint8.

    All 8-connected components of label 16 but the largest are refilled, ring by ring from their
    border inward, with the most common label among a pixel's 8 neighbours: body parts before
    background, the lower id where they tie. Returns the number of pixels changed.
    """
    rows, columns = np.nonzero(labels == HEAD)
    if len(rows) == 0:
        return 0
    top, left = rows.min(), columns.min()
    heads = labels[top:rows.max() + 1, left:columns.max() + 1] == HEAD
    components, count = ndimage.label(heads, np.ones((3, 3)))
    if count == 1:
        return 0
    largest = np.bincount(components[heads]).argmax()
    rows, columns = np.nonzero(heads & (components != largest))
    rows, columns, changed = rows + top, columns + left, len(rows)
    top, left = max(0, rows.min() - 1), max(0, columns.min() - 1)
    window = labels[top:rows.max() + 2, left:columns.max() + 2]
    padded = np.pad(window, 1, constant_values=IGNORE)
    rows, columns = rows - top + 1, columns - left + 1
    padded[rows, columns] = IGNORE                                              # not known yet
    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    while len(rows):
        neighbours = np.stack([padded[rows + dy, columns + dx] for dy, dx in around], axis=1)
        votes = (neighbours[:, :, None] == np.arange(len(NAMES))).sum(axis=1)   # (pixels, 25)
        votes[:, 1:] *= 10                              # one body part outvotes 8 x background
        ring = votes.any(axis=1)
        padded[rows[ring], columns[ring]] = votes[ring].argmax(axis=1)
        rows, columns = rows[~ring], columns[~ring]
    window[...] = padded[1:-1, 1:-1]
    return changed


def crop_box(labels, margin):
    """The square (x0, y0, side), whole pixels, around the person. labels (H, W).

    The tight box of the body, `margin` of its width and height added on each side, squared to the
    longer side; moved, not shrunk, into the frame. Where it is larger than the frame, the whole
    frame lies inside it. Raises Unusable where there is nobody.
    """
    body = labels != 0
    lines = [np.flatnonzero(body.any(axis=axis)) for axis in (0, 1)]            # columns, rows
    if len(lines[0]) == 0:
        raise Unusable("no person in the frame")
    longer = max(int(line[-1]) + 1 - int(line[0]) for line in lines)
    side = max(1, round(longer * (1 + 2 * margin)))
    corner = []
    for line, length in zip(lines, labels.shape[::-1]):
        centred = (int(line[0]) + int(line[-1]) + 1 - side) // 2
        corner.append(min(max(centred, min(0, length - side)), max(0, length - side)))
    return *corner, side


def cut(array, box, fill):
    """The square (side, side, ...) that box = (x0, y0, side) cuts out of array (H, W, ...), and
    `fill` outside it."""
    (x0, y0, side), (height, width) = box, array.shape[:2]
    top, bottom = max(0, y0), min(height, y0 + side)
    left, right = max(0, x0), min(width, x0 + side)
    square = np.empty((side, side) + array.shape[2:], array.dtype)
    if (bottom - top, right - left) != (side, side):
        square[...] = fill
    square[top - y0:bottom - y0, left - x0:right - x0] = array[top:bottom, left:right]
    return square


def crop_frame(image, labels, joints, size, margin):
    """Repairs and crops one frame.

    image (H, W, 3) uint8, labels as read from the masks file, joints (24, 2) float32. Returns an
    RGB and a palette PIL image, both size x size, and the joints (24, 2) float32 in their pixels.
    Raises Unusable.
    """
    if labels is None:
        raise Unusable("no mask")
    if labels.dtype.kind not in "iub" or labels.shape != image.shape[:2]:
        raise Unusable(f"wrong mask: {labels.dtype} of shape {labels.shape}, "
                       f"the frame is {image.shape[:2]}")
    for extreme in (labels.min(), labels.max()):
        if not 0 <= extreme < len(NAMES):
            raise Unusable(f"label out of range: {extreme}, 0 to {len(NAMES) - 1} are known")
    labels = labels.astype(np.uint8)
    repair_head(labels)
    x0, y0, side = box = crop_box(labels, margin)
    padded = min(x0, y0) < 0 or x0 + side > image.shape[1] or y0 + side > image.shape[0]
    mean_colour = image.mean(axis=(0, 1)).round() if padded else 0
    image = Image.fromarray(cut(image, box, mean_colour)).resize((size, size), Image.BICUBIC)
    labels = Image.fromarray(cut(labels, box, IGNORE)).resize((size, size), Image.NEAREST)
    labels.putpalette(sum(PALETTE, ()) + (128,) * 3 * (256 - len(PALETTE)))
    joints = (joints - np.float32([x0, y0]) + 0.5) * (size / side) - 0.5
    return image, labels, joints.astype(np.float32)


# --------------------------------------------------------------------------------------------------
# One clip
# --------------------------------------------------------------------------------------------------

def decode(path, wanted, length):
    """Yields (t, image (H, W, 3) uint8) of the wanted frames of a video, in order. Raises Unusable.

    `length` frames are expected; behind the last wanted one, packets are counted, not decoded. The
    t-th picture must carry the t-th time stamp: a decoder that drops one would shift the labels.
    """
    try:
        with av.open(str(path)) as container:
            decoder = container.streams.video[0].codec_context
            decoder.thread_count = 1                            # clips run in parallel already
            decoder.options = {"err_detect": "explode", "max_pixels": str(2 ** 24)}
            packets = [packet for packet in container.demux(video=0) if packet.size]
            stamps = sorted(packet.pts for packet in packets)
            if len(stamps) != length:
                raise Unusable(
                    f"different length: {len(stamps)} frames of video, {length} of joints")
            frames = (frame for packet in [*packets, None] for frame in decoder.decode(packet))
            wanted, converter = collections.deque(wanted), VideoReformatter()
            for t, frame in enumerate(frames):
                if frame.pts != stamps[t] or frame.is_corrupt:
                    raise Unusable("unreadable video: a frame is damaged")
                if t == wanted[0]:
                    image = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                    yield wanted.popleft(), image
                    if not wanted:
                        return
            raise Unusable("unreadable video: it ends early")
    except Unusable:
        raise
    except Exception as error:          # a garbled file makes the decoder stumble in any way
        raise Unusable(f"unreadable video: {wording(error)}") from error


def empty_record(skipped):
    return dict(frames=[], joints=[], skipped=skipped,
                pixels=[0] * len(NAMES), sums=[0] * 3, squares=[0] * 3)


def encoded(picture, **settings):
    buffer = io.BytesIO()
    picture.save(buffer, **settings)
    return buffer.getvalue()


def extract(raw, out, split, sequence, clip, times, size, margin):
    """Writes the chosen frames of the clip in RAW/sequence, and then its record into OUT/.parts.

    times: ascending, from 0. The record has the frames' names and joints, what was skipped, and
    sums over pixels, whole numbers, so that totals do not depend on who adds them up when.
    """
    record, files, levels = empty_record([]), {}, np.arange(256)
    try:
        joints, _ = read_joints(raw / sequence / f"{clip}_info.mat")
        length = len(joints)
        names = [f"segm_{t + 1}" for t in {*times, length - 1, length}]
        masks = read_mat(raw / sequence / f"{clip}_segm.mat", names)
        if f"segm_{length}" not in masks or f"segm_{length + 1}" in masks:
            amount = "more" if f"segm_{length}" in masks else "fewer"
            raise Unusable(f"different length: {length} frames of joints, {amount} masks")
        for t, image in decode(raw / sequence / f"{clip}.mp4", times, length):
            try:
                image, labels, moved = crop_frame(
                    image, masks.get(f"segm_{t + 1}"), joints[t], size, margin)
            except Unusable as reason:
                record["skipped"].append([clip, t + 1, str(reason)])
                continue
            frame = f"{clip}_{t + 1:03d}"
            files[f"{split}/images/{frame}.jpg"] = encoded(image, format="JPEG", quality=95)
            files[f"{split}/labels/{frame}.png"] = encoded(labels, format="PNG")
            record["frames"].append(frame)
            record["joints"].append(moved.tolist())
            colours = np.array(image.histogram()).reshape(3, 256)
            for key, counts in (("pixels", labels.histogram()[:len(NAMES)]),
                                ("sums", colours @ levels), ("squares", colours @ levels ** 2)):
                record[key] = (np.array(record[key]) + counts).tolist()
    except Unusable as reason:
        record, files = empty_record([[clip, "", str(reason)]]), {}
    for path, data in files.items():
        write_whole(out, path, data)
    write_whole(out, f".parts/records/{split}/{clip}.json", json.dumps(record).encode())
    return record


# --------------------------------------------------------------------------------------------------
# The whole folder
# --------------------------------------------------------------------------------------------------

def begin(out, settings):
    """Makes OUT ready for a new or a continued run; False where it is finished already.

    Raises Problem where OUT holds anything but a run with these settings; nothing is touched then.
    """
    if out.exists() and not out.is_dir():
        raise Problem(f"--out {out} is a file; name a folder")
    done, begun = out / "classes.json", out / ".parts" / "settings.json"
    path = done if done.is_file() else begun
    if not path.is_file():
        if out.is_dir() and {entry.name for entry in os.scandir(out)} - {".parts"}:
            raise Problem(f"--out {out} holds other files; name a new or empty folder")
        begun.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, ".parts/settings.json", as_json(settings))
        return True
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found = dict(found["settings"] if path == done else found)
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(f"{path} is damaged; name another --out or remove {out}") from error
    differing = [f"{key} {json.dumps(found.get(key))} there, {json.dumps(settings.get(key))} here"
                 for key in settings | found if settings.get(key) != found.get(key)]
    if differing:
        raise Problem(f"{out} was {'prepared' if path == done else 'begun'} with other settings "
                      f"({', '.join(differing)}); name another --out or remove {out}")
    if path == done:
        shutil.rmtree(out / ".parts", ignore_errors=True)   # a kill may have left them
    return path != done


def prepare(args, settings, source):
    """Carries out or continues the preparation of args.raw into args.out. Raises Problem."""
    out, parts = args.out, args.out / ".parts"
    if not (parts / "plan.json").is_file():
        try:
            plan = choose(args)
        except Problem:
            shutil.rmtree(parts)                            # nothing was done: leave no trace
            if not any(os.scandir(out)):
                out.rmdir()
            raise
        write_whole(out, ".parts/plan.json", json.dumps(plan).encode())
    plan = json.loads((parts / "plan.json").read_text())
    for split in SPLITS:
        for folder in (out / split / "images", out / split / "labels", parts / "records" / split):
            folder.mkdir(parents=True, exist_ok=True)
    done = {split: set(os.listdir(parts / "records" / split)) for split in SPLITS}
    jobs = [(args.raw / split / f"run{args.run}", out, split, sequence, clip, tuple(times),
             args.size, args.margin) for split, sequence, clip, times in plan["clips"]
            if f"{clip}.json" not in done[split]]
    total, missing = (sum(map(len, times)) for times in (
        [row[3] for row in plan["clips"]], [job[5] for job in jobs]))
    with progress(total, "frames", "frames") as bar:
        bar.update(total - missing)
        bar.unpause()                                       # the time left goes by today's speed
        for (_, _, split, _, clip, times, _, _), record in in_parallel(extract, jobs, args.workers):
            if record is None:
                record = empty_record([[clip, "", "unreadable: reading it ended the process"]])
                write_whole(out, f".parts/records/{split}/{clip}.json", json.dumps(record).encode())
            bar.update(len(times))
    finish(args, settings, source, plan)


def finish(args, settings, source, plan):
    """Adds up the clips' records, writes what describes the folder as a whole, and reports."""
    out, parts = args.out, args.out / ".parts"
    skipped, totals = plan["skipped"], {split: empty_record([]) for split in SPLITS}
    for split, _, clip, _ in plan["clips"]:
        record = json.loads((parts / "records" / split / f"{clip}.json").read_text())
        for key in ("frames", "joints", "skipped"):
            totals[split][key] += record[key]
        for key in ("pixels", "sums", "squares"):
            totals[split][key] = [a + b for a, b in zip(totals[split][key], record[key])]
    skipped += [row for split in SPLITS for row in totals[split]["skipped"]]
    skipped.sort(key=lambda row: (row[0], int(row[1] or 0), row[2]))
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("clip", "frame", "reason"), *skipped])
    write_whole(out, "skipped.csv", table.getvalue().encode(errors="surrogateescape"))
    train = totals["train"]
    if not train["frames"]:
        for split in SPLITS:                                # mended clips get another chance
            shutil.rmtree(out / split)
        shutil.rmtree(parts / "records")
        (parts / "plan.json").unlink()                      # last, so that a kill leaves it to do
        raise Problem(f"none of the train frames is usable; {out / 'skipped.csv'} says why")
    for split in SPLITS:
        order, buffer = np.argsort(totals[split]["frames"]), io.BytesIO()
        joints = np.array(totals[split]["joints"], np.float32).reshape(-1, 24, 2)
        np.savez(buffer, frames=np.array(totals[split]["frames"], str)[order], joints=joints[order])
        write_whole(out, f"{split}/joints.npz", buffer.getvalue())
    write_whole(out, "preview.png", preview(out, sorted(train["frames"])))
    count = 255 * len(train["frames"]) * args.size ** 2
    mean = [total / count for total in train["sums"]]
    variance = [total / (255 * count) - m * m for total, m in zip(train["squares"], mean)]
    classes = dict(
        names=NAMES, palette=PALETTE, mirror=MIRROR, groups=GROUPS,
        joint_mirror=[MIRROR[joint + 1] - 1 for joint in range(24)], pixels=train["pixels"],
        size=args.size, mean=mean, std=[math.sqrt(max(v, 255 ** -2)) for v in variance],
        source=source, settings=settings)
    write_whole(out, "classes.json", as_json(classes))
    shutil.rmtree(parts)
    report(args, totals, skipped, plan, source)


def preview(out, frames, columns=8, tile=160):
    """PNG bytes: crops of 16 train frames, of different people as far as there are, above their
    coloured labels, like the paper's Fig. 1."""
    people = collections.defaultdict(list)
    for frame in frames:                                    # <subject>_<motion>_c<clip>_<frame>
        people[frame.rsplit("_", 3)[0]].append(frame)
    counts = share([len(group) for group in people.values()], 2 * columns, np.random.default_rng(0))
    chosen = [group[(2 * i + 1) * len(group) // (2 * count)]
              for group, count in zip(people.values(), counts) for i in range(count)]
    rows = math.ceil(len(chosen) / columns)
    picture = Image.new("RGB", (columns * tile, rows * 2 * tile), "white")
    for i, frame in enumerate(chosen):
        for below, path in enumerate((f"images/{frame}.jpg", f"labels/{frame}.png")):
            with Image.open(out / "train" / path) as image:
                small = image.convert("RGB").resize((tile, tile), Image.LANCZOS)
            picture.paste(small, (i % columns * tile, (i // columns * 2 + below) * tile))
    return encoded(picture, format="PNG")


def report(args, totals, skipped, plan, source):
    """Prints frames per split, class frequencies beside the paper's, and what was skipped."""
    print(f"\n{'split':<8}{'wanted':>9}{'chosen':>9}{'written':>9}")
    for split in SPLITS:
        chosen = sum(len(times) for name, _, _, times in plan["clips"] if name == split)
        print(f"{split:<8}{getattr(args, split):>9}{chosen:>9}{len(totals[split]['frames']):>9}")
    pixels = totals["train"]["pixels"]
    print(f"\ntrain: {source}")
    print(f"{'class':<18}{'train %':>9}{'paper %':>9}")
    for name, count, paper in zip(NAMES, pixels, PAPER):
        print(f"{name:<18}{100 * count / sum(pixels):>9.3f}{100 * paper:>9.3f}")
    if skipped:
        print(f"\n{'skipped':<34}{'clips':>9}{'frames':>9}")
        kinds = collections.Counter(
            (reason.split(":")[0], frame == "") for _, frame, reason in skipped)
        for kind in sorted({kind for kind, _ in kinds}):
            print(f"{kind:<34}{kinds[kind, True]:>9}{kinds[kind, False]:>9}")
        print(f"{args.out / 'skipped.csv'} has each of them")
    print(f"\n{args.out} is ready; {args.out / 'preview.png'} shows some of it")


# --------------------------------------------------------------------------------------------------
# The stand-in: clips in SURREAL's raw layout, for those without a licence
#
# People made of capsules, in made-up rooms. The chapters follow the paper's Section 2.1, step by
# step. SURREAL takes each from measured data (SMPL, CAESAR, MoCap, LSUN); here each is drawn at
# random, in an order that matters: one draw more or less changes every picture.
# --------------------------------------------------------------------------------------------------

# 2,000, 200 and 200 frames. Many short clips: people and rooms teach more than further poses.
STANDIN = dict(clips=1000, frames=2, backgrounds=None, device="cpu")

HEIGHT, WIDTH, FOCAL = 240, 320, 600.0      # SURREAL's pictures; the principal point is (160, 120)
POINTS = 150_000                            # of a skin; their number is what rendering costs
TILE = 128                                  # side of the surfaces in a room, pixels
EMPTY = 1 << 62                             # of the z-buffer, which packs depth above ...
INDEX = (1 << 20) - 1                       # ... the index of a point, 20 bits


# ------ body model
# The SMPL skeleton: 24 joints, label = index + 1. Metres, T-pose, pelvis at 0; x to the body's
# left, y up, z forward. Only the left side is written down.

PARENT = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
OPPOSITE = (0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20, 23, 22)
JOINTS = {0: (0, 0, 0), 1: (.080, -.085, 0), 3: (0, .105, -.015), 4: (.100, -.475, 0),
          6: (0, .235, -.02), 7: (.095, -.885, -.03), 9: (0, .300, -.01), 10: (.115, -.945, .085),
          12: (0, .500, -.035), 13: (.075, .410, -.025), 15: (0, .585, 0), 16: (.180, .435, -.03),
          18: (.435, .430, -.04), 20: (.685, .435, -.035), 22: (.765, .430, -.03)}
T_POSE = np.array([JOINTS.get(j) or JOINTS[OPPOSITE[j]] for j in range(24)])
T_POSE[[j for j in range(24) if j not in JOINTS], 0] *= -1
# The flesh: tapered capsules (joint, end a, end b, radius at a, at b, softness); the softness (mm)
# is how widely a capsule melts into its neighbours.
CAPSULES = (
    (0, (.060, .040, .000), (.075, -.060, .000), .100, .100, 14),     # pelvis
    (0, (.065, -.030, -.030), (.070, -.080, -.030), .085, .085, 14),  # buttock
    (0, (.000, -.060, .010), (.000, -.100, .000), .070, .060, 14),    # crotch
    (3, (.045, .120, -.005), (.045, .190, -.010), .096, .094, 14),    # waist
    (6, (.048, .235, -.010), (.055, .280, -.010), .096, .100, 14),    # lower ribs
    (9, (.055, .330, -.015), (.062, .400, -.025), .102, .088, 14),    # chest
    (9, (.000, .330, -.015), (.000, .440, -.035), .100, .070, 14),    # breastbone
    (12, (0, .480, -.040), (0, .590, -.015), .058, .054, 10),         # neck
    (15, (0, .700, -.035), (0, .700, .010), .080, .075, 8),           # cranium
    (15, (0, .650, .025), (0, .603, .055), .062, .036, 8),            # jaw
    (15, (0, .682, .092), (0, .655, .112), .007, .013, 3),            # nose
    (15, (.078, .660, -.010), (.082, .690, -.015), .013, .017, 3),    # ear
    (13, (.050, .440, -.035), (.172, .438, -.030), .057, .056, 12),   # collar
    (13, (.030, .495, -.040), (.130, .455, -.035), .046, .040, 12),   # trapezius
    (16, (.200, .432, -.030), (.215, .430, -.030), .056, .053, 10),   # deltoid
    (16, (.215, .433, -.030), (.430, .430, -.040), .047, .036, 8),    # upper arm
    (16, (.270, .430, -.022), (.330, .430, -.026), .042, .040, 8),    # biceps
    (18, (.440, .430, -.040), (.685, .435, -.035), .037, .024, 6),    # forearm
    (18, (.470, .430, -.036), (.530, .432, -.036), .040, .036, 6),    # its muscle
    (20, (.690, .435, -.045), (.755, .430, -.062), .019, .014, 4),    # palm
    (20, (.690, .435, -.038), (.758, .432, -.042), .019, .015, 4),
    (20, (.690, .435, -.030), (.758, .432, -.022), .019, .015, 4),
    (20, (.690, .433, -.022), (.755, .430, -.003), .019, .014, 4),
    (20, (.705, .425, -.010), (.745, .415, .025), .017, .013, 3),     # thumb
    (20, (.745, .415, .025), (.785, .412, .040), .012, .009, 2),
    (22, (.770, .430, -.066), (.818, .424, -.076), .011, .008, 2),    # four fingers
    (22, (.775, .432, -.043), (.840, .425, -.048), .012, .009, 2),
    (22, (.775, .432, -.021), (.845, .425, -.019), .012, .009, 2),
    (22, (.770, .430, -.001), (.828, .424, .009), .012, .009, 2),
    (1, (.085, -.110, .000), (.100, -.470, .000), .088, .055, 12),    # thigh
    (1, (.092, -.180, .012), (.096, -.300, .012), .080, .070, 12),
    (4, (.100, -.480, .000), (.095, -.895, -.030), .053, .034, 8),    # shin
    (4, (.100, -.550, -.022), (.098, -.680, -.030), .052, .044, 10),  # calf
    (7, (.095, -.905, -.035), (.095, -.928, -.055), .034, .031, 6),   # ankle, heel
    (7, (.097, -.908, -.020), (.105, -.937, .060), .033, .024, 6),    # instep
    (7, (.090, -.937, .000), (.090, -.944, .085), .024, .020, 6),     # inner sole
    (7, (.110, -.940, -.020), (.128, -.946, .065), .022, .017, 6),    # outer sole
    (10, (.090, -.946, .108), (.093, -.950, .147), .016, .013, 3),    # toes, from the big one
    (10, (.109, -.948, .108), (.112, -.953, .143), .012, .010, 3),
    (10, (.124, -.949, .098), (.127, -.954, .132), .011, .009, 3),
    (10, (.138, -.950, .088), (.140, -.955, .114), .011, .009, 3),
)
SEXED = (
    ((9, (.075, .345, .050), (.078, .340, .065), .055, .048, 12),     # female: breasts, wider hips
     (0, (.085, -.020, -.005), (.100, -.080, -.005), .092, .092, 14)),
    ((9, (.075, .375, .030), (.085, .365, .030), .060, .055, 12),     # male: chest, wider back
     (9, (.085, .340, -.035), (.105, .400, -.045), .070, .060, 12)),
)
# Spots (x, y, front or back) on chest and pelvis that are labelled head, as in SURREAL's masks.
STRAY = (
    (.060, .370, 1), (-.085, .330, 1), (.020, .290, 1), (-.050, .020, 1), (.070, -.030, 1),
    (.070, .390, -1), (-.060, .320, -1), (.010, .350, -1), (.050, .030, -1), (-.080, -.020, -1),
)


def mirrored(table):
    """Both sides of a table of capsules: those off the middle come again on the right."""
    return [*table, *((OPPOSITE[joint], (-a[0], *a[1:]), (-b[0], *b[1:]), *rest)
                      for joint, a, b, *rest in table if a[0])]


def tensor(values):
    """Numbers as a float32 tensor."""
    return torch.as_tensor(np.asarray(values, np.float32))


def rotation(axis_angle):
    """Rodrigues: axis-angle vectors (..., 3) to rotation matrices (..., 3, 3)."""
    axis_angle = np.asarray(axis_angle, float)
    angle = np.linalg.norm(axis_angle, axis=-1, keepdims=True)[..., None]
    x, y, z = np.moveaxis(axis_angle / np.maximum(angle[..., 0], 1e-9), -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def chain(local, joints):
    """Forward kinematics: rotations (24, 3, 3) and T-pose joints (24, 3), made global."""
    turn, place = local.copy(), joints.copy()
    for j in range(1, 24):
        turn[j] = turn[PARENT[j]] @ local[j]
        place[j] = place[PARENT[j]] + turn[PARENT[j]] @ (joints[j] - joints[PARENT[j]])
    return turn, place


def rest_pose():
    """Local rotations (24, 3, 3) of the pose in which the skin is made: limbs half-way spread."""
    angles = np.zeros((24, 3))
    angles[[16, 17], 2] = -.75, .75
    angles[[1, 2], 2] = .22, -.22
    return rotation(angles)


def blended(weights, matrix, shift, x):
    """Linear blend skinning (N, 3): the sum over joints of weight * (matrix @ x + shift), for
    weights (N, 24), matrix (24, 3, 3), shift (24, 3), x (N, 3)."""
    matrix = (weights @ matrix.flatten(1)).view(-1, 3, 3)
    return torch.einsum("nab,nb->na", matrix, x) + weights @ shift


def surface(x, a, axis, radius, growth, soft):
    """-log sum exp(-distance / softness) over n capsules: zero on a skin that melts them together.
    x (N, 3), a and axis (n, 3), others (n,). Returns it (N,), gradient (N, 3), distances (N, n)."""
    t = (((x[:, None] - a) * axis).sum(-1) / (axis ** 2).sum(-1)).clamp(0, 1)
    away = x[:, None] - a - t[..., None] * axis             # (N, n, 3)
    length = away.norm(dim=-1).clamp(min=1e-6)
    distance = length - radius - t * growth
    level = -distance / soft
    pull = level.softmax(-1) / length / soft
    return -level.logsumexp(-1), (pull[..., None] * away).sum(1), distance


def skin_points(capsules, rng):
    """Points on the skin of posed capsules (owner, a, b, radius at a, at b, softness), denser where
    these overlap. Returns (M, 31): place, normal, openness, distance to the flesh of each joint."""
    owner, a, b, ra, rb, soft = capsules
    axis, found = b - a, []
    area = (ra + rb) * (axis.norm(dim=-1) + ra + rb)
    ladder = torch.stack([a + axis * step / 4 for step in range(5)]).flatten(0, 1)
    for c in range(len(owner)):
        # Drop points on every capsule ...
        n = int(1.8 * POINTS * area[c] / area.sum())
        t = tensor(rng.random((n, 1)) * 1.8 - .4).clamp(0, 1)
        ball = torch.nn.functional.normalize(tensor(rng.standard_normal((n, 3))), dim=-1)
        x = a[c] + t * axis[c] + (ra[c] + t * (rb[c] - ra[c])) * ball
        # ... consider its neighbours alone, which saves most of the time ...
        gap = torch.cdist(x[:200], ladder).min(0).values.view(5, -1).min(0).values
        near = (gap - torch.maximum(ra, rb) < .12).nonzero()[:, 0]
        flesh = a[near], axis[near], ra[near], (rb - ra)[near], soft[near]
        # ... and let Newton pull the points onto the skin, but for those deep inside a neighbour.
        x = x[surface(x, *flesh)[0] > -3]
        for _ in range(4):
            value, slope, _ = surface(x, *flesh)
            step = (value / (slope ** 2).sum(-1).clamp(min=1e2))[:, None] * slope
            x = x - step.clamp(-.02, .02)
        value, slope, distance = surface(x, *flesh)
        normal = torch.nn.functional.normalize(slope, dim=-1)
        above = surface(x + .05 * normal, *flesh)[2]
        sky = (above.min(-1, keepdim=True).values / .05).clamp(0, 1)
        joint = torch.full((len(x), 24), 9.)
        joint.scatter_reduce_(1, owner[near].expand(len(x), -1), distance, "amin")
        found.append(torch.cat([x, normal, sky, joint], 1)[value.abs() < .05])
    return torch.cat(found)


@functools.lru_cache(maxsize=2)
def template(sex):
    """The skin of one sex (0 female, 1 male) in the rest pose, made once in a process.

    A dict of tensors: place, normal and flat, the place in the T-pose (N, 3); weights of the joints
    (N, 24); label with the stray head spots, part without (N,) int64; openness to the sky (N,).
    """
    rng = np.random.default_rng(sex)
    turn, place = chain(rest_pose(), T_POSE)
    owner, a, b, ra, rb, soft = zip(*mirrored(CAPSULES + SEXED[sex]))
    owner = np.array(owner)
    a, b = (tensor(np.einsum("nij,nj->ni", turn[owner], np.array(end) - T_POSE[owner])
                   + place[owner]) for end in (a, b))
    capsules = torch.tensor(owner), a, b, tensor(ra), tensor(rb), tensor(soft) / 1000
    found = skin_points(capsules, rng)

    # Points are kept by the sparseness of their cell of 12 mm, which evens out the density.
    cell = (found[:, :3] / .012).floor().long() * torch.tensor((1, 1 << 16, 1 << 32))
    cell = torch.unique(cell.sum(1), return_inverse=True)[1]
    sparse = 1 / torch.bincount(cell)[cell].double().cpu().numpy()
    keep = rng.choice(len(found), POINTS, replace=len(found) < POINTS, p=sparse / sparse.sum())
    x, normal, sky, nearest_joint = found[keep].split((3, 3, 1, 24), 1)

    # A joint moves its own skin, its parent's and its children's, no other.
    part = nearest_joint.argmin(1)
    related = torch.eye(24, dtype=torch.bool)
    for j in range(1, 24):
        related[j, PARENT[j]] = related[PARENT[j], j] = True
    width = torch.full((24,), .010)
    width[[0, 3, 6, 9, 1, 2, 13, 14]] = .014
    width[[20, 21, 22, 23, 10, 11]] = .005
    farther = nearest_joint - nearest_joint.min(1, keepdim=True).values
    logit = -farther / width[part][:, None]
    weights = logit.masked_fill(~related[part], -torch.inf).softmax(1)

    turn, place, joints = (tensor(v) for v in (turn, place, T_POSE))
    back = turn.transpose(1, 2)
    flat = blended(weights, back, joints - torch.einsum("jab,jb->ja", back, place), x)
    label, torso = part + 1, torch.isin(part, torch.tensor([0, 3, 6, 9]))
    for sx, sy, side in STRAY:
        spot = (flat[:, 0] - sx) ** 2 + (flat[:, 1] - sy) ** 2 < .016 ** 2
        label[spot & (normal[:, 2] * side > .2) & torso] = HEAD
    return dict(place=x, normal=normal, flat=flat, weights=weights, label=label, part=part,
                openness=sky[:, 0])


# ------ body shape: SMPL's ten coefficients, here with a meaning each

def shape_scale(shape):
    """Scales (24, 3) along x, y, z of the T-pose of what hangs on each joint, from shape (10,)."""
    tall, fat, legs, arms, broad, muscle, head, hands, hips, deep = .03 * np.asarray(shape)
    scale = np.ones((24, 3)) * (1 + tall)
    girth = 1 + 1.6 * fat + muscle
    scale[[0, 3, 6, 9]] *= girth + .6 * broad, 1 - .3 * legs, girth + 1.5 * deep + fat
    scale[0, [0, 2]] *= 1 + hips
    scale[[13, 14]] *= 1 + broad, 1 + muscle, 1 + muscle
    scale[[1, 2, 4, 5]] *= girth, 1 + legs, girth
    scale[[16, 17, 18, 19]] *= 1 + arms, girth + muscle, girth + muscle
    scale[[12, 15]] *= 1 + head - .5 * tall
    scale[[20, 21, 22, 23]] *= 1 + hands
    return scale


def shaped_skin(sex, shape, points):
    """The template's first `points` points in this subject's shape, SMPL's first step; also its
    `joints` (24, 3) and `rest`, the global rotations and places of the rest pose."""
    body = {key: value[:points] for key, value in template(sex).items()}
    scale, joints = shape_scale(shape), T_POSE.copy()
    for j in range(1, 24):
        joints[j] = joints[PARENT[j]] + (T_POSE[j] - T_POSE[PARENT[j]]) * scale[PARENT[j]]
    turn, before = chain(rest_pose(), T_POSE)
    _, after = chain(rest_pose(), joints)
    stretch = np.einsum("jab,jb,jcb->jac", turn, scale, turn)
    shift = after - np.einsum("jab,jb->ja", stretch, before)
    body["place"] = blended(body["weights"], tensor(stretch), tensor(shift), body["place"])
    return body | dict(joints=joints, rest=(turn, after))


# ------ body pose
# Key poses stand for MoCap: weight, root (pitch, roll), spine (bend, side, twist, nod), in degrees,
# left and right leg, left and right arm. A limb is the directions (outward, up, forward) of its
# upper and its lower half; legs as the pelvis sees them, arms as the chest does.

LEG, ARM = ((.10, -1, .02), (.03, -1, -.06)), ((.24, -1, .0), (.15, -1, .25))
POSES = {
    "stand": (11, (0, 0), (3, 0, 0, 0), LEG, LEG, ARM, ARM),
    "ease": (4, (0, 4), (2, -8, 8, 5), LEG, ((.2, -1, .15), (.1, -1, -.2)),
        ((.75, -.8, -.25), (-.7, -.6, .5)), ARM),
    "walk": (13, (3, 0), (4, 0, 8, 0), ((.05, -1, .45), (.03, -1, -.1)),
        ((.05, -1, -.25), (0, -.9, -.6)), ((.22, -1, -.4), (.15, -1, .1)),
        ((.2, -1, .4), (.1, -.9, .8))),
    "step": (9, (2, 0), (4, 0, 3, 0), LEG, ((.05, -1, .3), (0, -.8, -.6)),
        ((.22, -1, .2), (.1, -1, .4)), ((.22, -1, -.1), (.15, -1, .2))),
    "run": (4, (10, 0), (10, 0, 12, -10), ((.05, -.7, .8), (0, -.9, -.6)),
        ((.05, -1, -.35), (0, -.3, -1)), ((.3, -.8, -.7), (.1, -.5, .8)),
        ((.25, -.9, .3), (-.2, .5, .9))),
    "reach up": (4, (0, 0), (-4, 5, 0, -20), LEG, LEG, ((.25, 1, .2), (.1, 1, .1)), ARM),
    "both up": (2, (0, 0), (-5, 0, 0, -10), LEG, LEG, ((.3, 1, .1), (0, 1, .1)),
        ((.3, 1, .1), (0, 1, .1))),
    "forward": (3, (5, 0), (8, 0, -10, 0), LEG, ((.1, -1, -.2), (.05, -1, -.35)),
        ((.1, -.1, 1), (0, .05, 1)), ARM),
    "aside": (3, (0, 0), (0, 6, 15, 0), LEG, LEG, ((1, .1, .1), (1, .2, .3)),
        ((.35, -.9, .2), (-.2, -.5, .8))),
    "wave": (3, (0, 0), (0, 0, 0, 0), LEG, LEG, ((.9, .1, .1), (.3, 1, .3)), ARM),
    "hips": (3, (0, 0), (0, 0, 0, 0), LEG, LEG, ((.75, -.8, -.25), (-.7, -.6, .5)),
        ((.75, -.8, -.25), (-.7, -.6, .5))),
    "phone": (3, (0, 0), (6, 0, 0, 15), LEG, LEG, ((.35, -.9, .3), (-.3, .9, .35)),
        ((.3, -1, .2), (-.6, -.1, .8))),
    "star": (3, (0, 0), (0, 0, 0, 0), ((.4, -1, 0), (.35, -1, -.03)),
        ((.4, -1, 0), (.35, -1, -.03)), ((1, 0, 0), (1, .05, .1)), ((1, 0, 0), (1, .05, .1))),
    "box": (2, (5, 0), (15, 0, 20, 0), ((.15, -1, .3), (.1, -1, -.25)),
        ((.15, -1, -.1), (.1, -.9, -.4)), ((.25, -.6, .7), (-.2, .6, .7)),
        ((.3, -.9, .3), (-.1, .7, .7))),
    "kick": (2, (-10, 0), (10, 0, -10, 0), LEG, ((.1, -.1, 1), (0, -.1, 1)),
        ((.5, -.6, .6), (.2, -.2, .9)), ((.7, -.7, -.3), (.6, -.7, .2))),
    "lunge": (3, (8, 0), (8, 0, 0, 0), ((.1, -.5, .9), (0, -1, -.1)),
        ((.1, -.8, -.6), (.05, -.6, -.9)), ((.3, -.9, .3), (.1, -.5, .9)),
        ((.3, -1, -.2), (.2, -1, .2))),
    "sit": (5, (-5, 0), (10, 0, 0, 0), ((.18, -.1, 1), (.05, -1, 0)),
        ((.18, -.1, 1), (.05, -1, -.15)), ((.2, -1, .3), (-.15, -.4, .9)),
        ((.2, -1, .3), (-.15, -.4, .9))),
    "sit low": (2, (-15, 0), (25, 0, 0, 0), ((.2, .25, 1), (.15, .2, 1)),
        ((.2, .5, .9), (.1, -.6, .6)), ((.35, -.9, -.5), (.3, -1, -.3)),
        ((.3, -.6, .7), (-.1, -.2, .9))),
    "cross": (2, (-5, 0), (20, 0, 0, 10), ((.8, 0, .75), (-.95, -.25, .2)),
        ((.8, 0, .75), (-.9, -.35, .05)), ((.25, -.9, .4), (.1, -.4, .9)),
        ((.25, -.9, .4), (.1, -.4, .9))),
    "crouch": (4, (30, 0), (30, 0, 0, -20), ((.25, .3, .95), (.1, -.55, -.5)),
        ((.25, .3, .95), (.1, -.55, -.5)), ((.2, -.3, .9), (0, -.3, .9)),
        ((.2, -.5, .8), (-.2, -.1, .9))),
    "squat": (3, (25, 0), (20, 0, 0, -10), ((.35, -.2, .9), (.1, -1, -.3)),
        ((.35, -.2, .9), (.1, -1, -.3)), ((.15, 0, 1), (0, .1, 1)), ((.15, 0, 1), (0, .1, 1))),
    "kneel": (2, (0, 0), (8, 0, 0, 0), ((.12, -.1, 1), (0, -1, 0)), ((.05, -1, .05), (0, -.1, -1)),
        ((.25, -.8, .5), (0, -.3, .9)), ARM),
    "bend": (3, (45, 0), (35, 0, 0, 0), ((.1, -.7, .75), (.05, -.8, .4)),
        ((.1, -.7, .75), (.05, -.8, .4)), ((.1, .25, .95), (0, .2, 1)), ((.2, -.1, 1), (0, .1, 1))),
    "double": (2, (75, 0), (55, 0, 0, 0), ((.1, -.26, .96), (.05, -.35, .92)),
        ((.1, -.26, .96), (.05, -.35, .92)), ((.1, .6, .8), (0, .6, .8)),
        ((.1, .6, .8), (0, .6, .8))),
    "crawl": (2, (85, 0), (0, 0, 0, -25), ((.1, -.2, 1), (0, -1, -.1)), ((.1, .1, 1), (0, -1, -.2)),
        ((.15, .1, 1), (0, .1, 1)), ((.15, -.2, 1), (0, 0, 1))),
    "plank": (1, (80, 0), (0, 0, 0, -20), LEG, LEG, ((.2, 0, 1), (0, .1, 1)),
        ((.2, 0, 1), (0, .1, 1))),
    "on back": (2, (-88, 0), (5, 0, 0, 10), LEG, ((.15, -.6, .7), (.05, -.7, -.7)),
        ((.6, -.8, 0), (.4, -.9, .1)), ((.8, .5, 0), (.1, 1, 0))),
    "on front": (2, (88, 0), (-5, 0, 0, -25), ((.2, -1, 0), (.1, -1, -.1)),
        ((.3, -1, .15), (.1, -.8, -.6)), ((.7, .7, .1), (0, 1, .1)), ((.5, -1, 0), (.3, -1, .1))),
    "on side": (2, (0, 85), (15, 0, 0, 10), ((.05, -.6, .8), (0, -.8, -.6)),
        ((.05, -.9, .4), (0, -.9, -.4)), ((.1, -.5, .9), (-.3, .2, .9)),
        ((.1, .4, .9), (0, .9, .3))),
    "handstand": (2, (178, 0), (-5, 0, 0, -25), ((.1, -1, .2), (.05, -1, -.1)),
        ((.1, -1, -.15), (.05, -1, -.3)), ((.15, 1, .1), (.05, 1, .05)),
        ((.15, 1, .1), (.05, 1, .05))),
    "cartwheel": (1, (0, 130), (0, 0, 0, 0), ((.7, -1, 0), (.6, -1, -.1)),
        ((.7, -1, .1), (.6, -1, -.1)), ((.4, 1, 0), (.35, 1, .05)), ((.4, 1, 0), (.35, 1, .05))),
    "roll": (1, (130, 0), (60, 0, 0, 25), ((.15, .5, .85), (0, -.7, -.4)),
        ((.15, .5, .85), (0, -.7, -.4)), ((.15, -.2, .9), (0, -.2, .9)),
        ((.15, -.2, .9), (0, -.2, .9))),
}


def turn_onto(start, end):
    """The smallest rotation that takes unit vector `start` to `end`."""
    cross, cosine = np.cross(start, end), np.clip(start @ end, -1, 1)
    sine = np.linalg.norm(cross)
    return rotation(cross / max(sine, 1e-6) * math.atan2(sine, cosine))


def limb(rest, flex, upper, lower, twist):
    """Local rotations of a limb's two halves that point it along `upper` and `lower`.

    rest: its direction in the T-pose. flex: where the hinge in its middle bends to. The upper half
    turns about itself, at most `twist` radians, to let it; what the hinge forbids is left out.
    """
    first = turn_onto(rest, upper / np.linalg.norm(upper))
    wanted = first.T @ (lower / np.linalg.norm(lower))
    side = np.cross(rest, flex)
    bend = math.hypot(wanted @ flex, wanted @ side)
    angle = math.atan2(wanted @ side, wanted @ flex) * min(1, bend / .4)
    roll = rotation(rest * np.clip(angle, -twist, twist))
    wanted = roll.T @ wanted
    along, forward, aside = wanted @ rest, max(wanted @ flex, 0), wanted @ side
    hinged = max(along, -.8) * rest + forward * flex + .3 * aside * side
    return first @ roll, turn_onto(rest, hinged / np.linalg.norm(hinged))


def key_pose(name, rng, flip):
    """Local rotations (24, 3, 3) of a key pose with a bit of chance; `flip` swaps the sides."""
    _, (pitch, roll), (bend, side, twist, nod), *limbs = POSES[name]
    if flip:
        roll, side, twist = -roll, -side, -twist
        limbs = [limbs[i] for i in (1, 0, 3, 2)]
    local = rotation(rng.normal(0, .04, (24, 3)))
    jitter = rng.normal(0, 1, 6) * (6, 5, 6, 3, 5, 9)
    pitch, roll, bend, side, twist, nod = np.radians(
        np.array([pitch, roll, bend, side, twist, nod]) + jitter)
    local[0] = rotation((pitch, 0, 0)) @ rotation((0, 0, roll))
    for j in (3, 6, 9):
        local[j] = rotation((bend / 3, twist / 3, side / 3))
    local[12] = local[15] = rotation((nod / 2, rng.normal(0, .2), rng.normal(0, .06)))
    for i, (upper, lower) in enumerate(limbs):
        left = np.array((1 if i % 2 == 0 else -1, 1, 1))
        upper, lower = ((np.array(v) + rng.normal(0, .09, 3)) * left for v in (upper, lower))
        first, second = ((1, 4), (2, 5), (16, 18), (17, 19))[i]
        if i < 2:
            rest, flex, twist = np.array((0, -1., 0)), np.array((0, 0, -1.)), .9
        else:
            rest, flex, twist = np.array((1., 0, 0)) * left, np.array((0, 0, 1.)), 1.5
        local[first], local[second] = limb(rest, flex, upper, lower, twist)
    for hand, sign in ((22, -1), (23, 1)):
        local[hand] = rotation((0, 0, sign * rng.uniform(0, 1.1)))
    turn, _ = chain(local, T_POSE)
    for ankle in (7, 8):                                # the foot lies as flat as the ankle allows
        tilt = math.asin(np.clip(turn[ankle][1, 2], -1, 1))
        local[ankle] = rotation((np.clip(tilt, -.45, .7), 0, 0)) @ local[ankle]
    return local


def to_quaternion(m):
    """Rotation matrices (..., 3, 3) to unit quaternions (..., 4), the real part first, >= 0."""
    trace = np.einsum("...ii", m)
    squares = np.stack([1 + trace] + [1 + 2 * m[..., i, i] - trace for i in range(3)], -1)  # 4 q^2
    w, x, y, z = np.moveaxis(np.sqrt(np.maximum(squares, 0)) / 2, -1, 0)
    x = np.copysign(x, m[..., 2, 1] - m[..., 1, 2])
    y = np.copysign(y, m[..., 0, 2] - m[..., 2, 0])
    z = np.copysign(z, m[..., 1, 0] - m[..., 0, 1])
    q = np.stack([w, x, y, z], -1)
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def axis_angle(matrix):
    """Rotation matrices (..., 3, 3) to axis-angle vectors (..., 3): SMPL's pose parameters."""
    q = to_quaternion(matrix)
    sine = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
    return q[..., 1:] / np.maximum(sine, 1e-9) * 2 * np.arctan2(sine, q[..., :1])


def motion(rng, frames):
    """Local rotations (T, 24, 3, 3) of a movement from one key pose to a similar one."""
    names, weights = list(POSES), np.array([pose[0] for pose in POSES.values()], float)
    first = rng.choice(names, p=weights / weights.sum())
    roots = np.array([pose[1] for pose in POSES.values()])
    weights = weights * (np.abs(roots - POSES[first][1]).sum(1) < 50)
    second = rng.choice(names, p=weights / weights.sum())
    start, end = (key_pose(name, rng, rng.random() < .5) for name in (first, second))
    step = axis_angle(np.swapaxes(start, -1, -2) @ end)
    time = np.linspace(rng.uniform(0, .5), rng.uniform(.5, 1), frames)
    ease = time * time * (3 - 2 * time)
    return start @ rotation(ease[:, None, None] * step)


def pose_skin(body, turn, place):
    """Dual quaternion skinning (Kavan et al. 2008): bent and twisted joints keep their volume.
    turn (24, 3, 3), place (24, 3): the joints now. Returns points and normals (N, 3)."""
    rest_turn, rest_place = body["rest"]
    turn = turn @ np.swapaxes(rest_turn, -1, -2)
    shift = place - np.einsum("jab,jb->ja", turn, rest_place)
    real = to_quaternion(turn)
    for j in range(1, 24):          # q and -q are the same rotation: keep neighbours on one side
        real[j] *= 1 if real[j] @ real[PARENT[j]] >= 0 else -1
    w, v = real[:, :1], real[:, 1:]
    dual = [-(shift * v).sum(1, keepdims=True), w * shift + np.cross(shift, v)]
    both = tensor(np.concatenate([real, .5 * np.concatenate(dual, 1)], 1))      # (24, 8)
    blend = both.T @ body["weights"].T                      # (8, N): contiguous rows make it fast
    blend = blend / (blend[:4] ** 2).sum(0).sqrt()
    w, v, dw, dv = blend[0], blend[1:4], blend[4], blend[5:]

    def cross(a, b):
        return torch.stack([a[i] * b[j] - a[j] * b[i] for i, j in ((1, 2), (2, 0), (0, 1))])

    def rotate(x):
        return x + 2 * cross(v, cross(v, x) + w * x)
    points = rotate(body["place"].T) + 2 * (w * dv - dw * v + cross(v, dv))
    return points.T, rotate(body["normal"].T).T


# ------ texture: colours as functions of the place on the T-posed body, as a texture map is

SKIN = np.array([(.96, .80, .69), (.90, .72, .58), (.82, .61, .46), (.68, .47, .33),
                 (.50, .33, .22), (.34, .22, .15)])
HAIR = np.array([(.08, .06, .05), (.16, .10, .07), (.30, .19, .11), (.50, .36, .20),
                 (.72, .58, .36), (.45, .20, .10), (.55, .54, .52)])


def value_noise(x, rng, size, channels):
    """Smooth noise (N, channels), about -1..1, at x (N, 3), from lattices of `size` metres."""
    total = 0
    for octave in range(3):
        lattice = tensor(rng.uniform(-1, 1, (1, channels, 24, 24, 24)) * .6 ** octave)
        where = torch.remainder(x / size * 2 ** octave + 5 * octave, 23) / 11.5 - 1
        where = where[None, None, None]                     # (1, 1, 1, N, 3)
        total = total + torch.nn.functional.grid_sample(lattice, where, align_corners=True)
    return total[0, :, 0, 0].T


def any_colour(rng, loud=.15):
    """A cloth's or a wall's colour (3,): mostly muted, warm or bluish, `loud` of them loud."""
    if rng.random() < loud:
        hue, saturation, value = rng.random(), rng.uniform(.4, .9), rng.uniform(.4, 1)
    else:
        hue = rng.choice((.08, .6)) + rng.normal(0, .05)
        saturation, value = rng.beta(1.2, 3), rng.beta(1.6, 1.4)
    ramps = np.clip(2 - np.abs((hue * 6 + np.array((5, 3, 1))) % 6 - 2), 0, 1)
    return value * (1 - saturation * ramps)


def cloth(x, noise, rng):
    """Colours (N, 3) of a piece of cloth at places x (N, 3), dyed unevenly by noise (N,)."""
    first, second = (tensor(any_colour(rng, .22)) for _ in range(2))
    wave = torch.sin(2 * math.pi / rng.uniform(.02, .09) * x[:, :2])
    kind = rng.choice(6, p=(.42, .16, .12, .06, .14, .1))
    plain = torch.zeros_like(x[:, 0])
    stripes = wave[:, rng.integers(2)] > rng.uniform(-.5, .7)
    checks, dots, blotches = (wave > 0).float().mean(1), wave.prod(1) > .25, noise > 0
    halves = x[:, 1] > rng.uniform(.2, .4)
    pattern = (plain, stripes, checks, dots, blotches, halves)[kind].float()[:, None]
    return (first + pattern * (second - first)) * (1 + .13 * noise[:, None])


def dress(body, sex, rng):
    """Colours (N, 3) of a subject's skin, hair and clothes. Clothes and hair add thickness to
    `body`, and wrinkles to its normals."""
    x, part, noise = body["flat"], body["part"], value_noise(body["flat"], rng, .06, 8)
    across, up, front = x[:, 0].abs(), x[:, 1], x[:, 2]
    wobble = .008 * noise[:, 1]

    def parts(*joints):
        chosen = torch.zeros(24, dtype=torch.bool)
        chosen[list(joints)] = True
        return chosen[part]                                 # ten times as fast as isin

    tone = SKIN[rng.integers(len(SKIN))] * rng.uniform(.9, 1.08) + rng.normal(0, .015, 3)
    colour = tensor(tone) * (1 + .06 * noise[:, :1])
    thick = torch.zeros_like(up)

    def put(where, paint, depth):
        colour[where] = paint[where]
        thick[where] = depth

    eyes, brows = (.032, .684, .013, .006, tone * .3), (.033, .700, .018, .004, tone * .5)
    mouth = (0, .630, .024, .007, tone * (.85, .55, .55))
    for cx, cy, rx, ry, paint in (eyes, brows, mouth):
        spot = ((across - cx) / rx) ** 2 + ((up - cy) / ry) ** 2 < 1
        colour[spot & parts(15) & (front > .05)] = tensor(paint)

    bare = rng.random() < .12                               # hardly dressed, as CAESAR's scans
    sleeve = rng.choice((.15, .25, .34, .67), p=(.15, .2, .35, .3)) + rng.normal(0, .015)
    shirt = parts(3, 6, 9, 13, 14, 16, 17, 18, 19) & (across < sleeve + wobble)
    shirt |= parts(0) & (up > wobble - rng.uniform(.02, .08))
    neckline = rng.uniform(.40, .48)
    shirt &= ~((up + 1.2 * across > neckline + .05) & (front > 0) & (across < .07))
    if bare:
        shirt = parts(6, 9) & (up < .40) & (up > .24) & (across < .3) & (sex == 0)
    put(shirt, cloth(x, noise[:, 2], rng), rng.uniform(.004, .012))

    hem = -.18 if bare else rng.choice((-.25, -.46, -.70, -.93), p=(.12, .2, .08, .6))
    waist = rng.uniform(.02, .1)
    trousers = parts(0, 1, 2, 4, 5, 7, 8) & (up > hem + wobble) & (up < waist) & ~shirt
    put(trousers, cloth(x, noise[:, 3], rng), rng.uniform(.003, .012))
    if sex == 0 and not bare and rng.random() < .3:
        skirt = trousers & parts(1, 2)
        thick[skirt] += .02 * ((-.05 - up[skirt]) / .3).clamp(0, 1.5)
    if rng.random() < .4:
        belt = parts(0, 3) & ((up - .03).abs() < .018)
        colour[belt] = tensor(any_colour(rng) * .5)
    if rng.random() < .75 and not bare:
        paint, feet = cloth(x, noise[:, 4], rng), parts(7, 8, 10, 11)
        put(feet & (up < rng.choice((-.86, -.90, -.78))), paint, .006)
        colour[feet & (up < -.953)] = tensor(any_colour(rng) * .8)

    style = rng.choice(("short", "long", "bald"), p=((.3, .65, .05), (.78, .1, .12))[sex])
    paint = tensor(HAIR[rng.integers(len(HAIR))] * rng.uniform(.8, 1.2))
    paint = paint * (1 + .25 * noise[:, 4:5])
    line = rng.uniform(.722, .742) + wobble / 2
    ear = (front < .02) & (front > -.03) & (up < .70) & (across > .085)
    scalp = parts(15) & (up > line - (.055 - front).clamp(min=0)) & (up > .645) & ~ear
    if style == "long":
        scalp |= parts(12, 15) & (front < -.02)
        scalp |= parts(15) & (front < .035) & (up > .60) & (across > .055)
    if style != "bald":
        put(scalp, paint, rng.uniform(.006, .02))
    elif rng.random() < .4:                                 # a cap
        put(parts(15) & (up > line), cloth(x, noise[:, 4], rng), .01)
    if sex == 1 and rng.random() < .3:
        lips = (across < .024) & ((up - .63).abs() < .008)
        beard = parts(15) & (up < .645) & (front > 0) & ~lips
        colour[beard] = .35 * colour[beard] + .65 * paint[beard]

    body["place"] = body["place"] + thick[:, None] * body["normal"]
    wrinkled = body["normal"] + (.05 + .18 * (thick > 0)[:, None]) * noise[:, 5:]
    body["normal"] = torch.nn.functional.normalize(wrinkled, dim=1)
    return (colour * (.55 + .45 * body["openness"])[:, None]).clamp(.01, 1)


# ------ light: nine spherical harmonics coefficients, drawn uniformly

def lit(normal, light):
    """Irradiance (N,) on normals (N, 3), world frame (Ramamoorthi & Hanrahan 2001, equation 13)."""
    x, y, z = normal.unbind(1)
    basis = torch.stack([
        .886227 * torch.ones_like(x), 1.023328 * y, 1.023328 * z, 1.023328 * x,
        .858086 * x * y, .858086 * y * z, .743125 * z * z - .247708, .858086 * x * z,
        .429043 * (x * x - y * y)], 1)
    light = tensor(light) * torch.tensor([1.] + [.75] * 3 + [.4] * 5)
    return torch.nn.functional.softplus(basis @ light * 6) / 6 + .1


# ------ camera
# As in SURREAL, a matrix of determinant -1, so that pictures are mirrored: what the data names left
# is on the visible person's right. The world's y points down; the camera, at +x, looks along -x.

def project(points, camera):
    """World points (N, 3) to x, y in pixels and depth in metres, each (N,)."""
    depth = camera[0] - points[:, 0]
    x = 160 - FOCAL * (points[:, 2] - camera[2]) / depth
    y = 120 + FOCAL * (points[:, 1] - camera[1]) / depth
    return x, y, depth


def splat(points, normals, camera):
    """The z-buffer (480, 640) int64, at twice the resolution: depth (1/4096 m) and, in the low 20
    bits, the point's index; EMPTY where there is none. Every point covers 2 x 2 half-pixels."""
    x, y, depth = project(points, camera)
    x, y = (((v + .5) * 2 - .5).floor().long() for v in (x, y))
    height, width = 2 * HEIGHT, 2 * WIDTH
    facing = (normals * (tensor(camera) - points)).sum(1)
    seen = (facing > -.15 * depth) & (x >= -1) & (x < width) & (y >= -1) & (y < height)
    index = seen.nonzero()[:, 0]                            # the skin's far side never is
    packed = ((depth[index] * 4096).long() << 20) | index
    cell = (y[index] + 1) * (width + 2) + x[index] + 1      # with a margin of one half-pixel
    buffer = torch.full(((height + 2) * (width + 2),), EMPTY, dtype=torch.int64)
    for beside in (0, 1, width + 2, width + 3):
        buffer.scatter_reduce_(0, cell + beside, packed, "amin")                # the nearest wins
    return buffer.view(height + 2, width + 2)[1:-1, 1:-1]


# ------ background: a room with things in it, a collage of dead leaves, or a folder's pictures

def fractal(rng, height, width, power):
    """1/f^power noise (height, width) float32, mean 0, standard deviation 1."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = (np.hypot(fy, fx) + .5 / width) ** -power
    amplitude[0, 0] = 0
    white = np.fft.rfft2(rng.standard_normal((height, width)))
    noise = np.fft.irfft2(amplitude * white, (height, width))
    return (noise / noise.std()).astype(np.float32)


def palette(rng, count, spread):
    """Colours that go together (count, 3): one, lighter and darker, the hue varied by `spread`."""
    others = np.array([any_colour(rng) for _ in range(count)])
    mixed = any_colour(rng) * (1 - spread) + spread * others
    return np.clip(mixed * rng.uniform(1 - spread, 1 + .3 * spread, (count, 1)), .02, 1)


def tile(rng, plain):
    """A surface (TILE, TILE, 3) float32; `plain` ones suit walls, floor and ceiling."""
    y, x = np.mgrid[:TILE, :TILE]
    kinds = ("paint", "bricks", "checks", "clouds", "books", "leaves", "paint")
    odds = (.65, .2, .05, .1) if plain else (.2, .25, .1, .15, .1, .1, .1)
    kind = rng.choice(kinds[:len(odds)], p=odds)
    colours, step = palette(rng, 16, rng.uniform(.1, .6)), int(rng.choice((8, 16, 32)))
    row, pick, dark = y // step, np.zeros((TILE, TILE), int), 1
    if kind == "bricks":                        # or planks, or tiles: every other row is shifted
        pick = (row * 7 + (x + row % 2 * step) % TILE // (step * rng.integers(1, 5)) * 3) % 16
        dark = np.where(y % step < 1, .6, 1)[..., None]
    elif kind == "checks":                      # or stripes
        pick = (x // step + row * rng.integers(2)) % 2
    elif kind == "clouds":
        pick = np.clip(fractal(rng, TILE, TILE, 1.3) * 2 + 8, 0, 15).astype(int)
    elif kind == "books":                       # of all heights, on shelves 32 pixels apart
        book = np.searchsorted(np.sort(rng.integers(0, TILE, 40)), x[0])[None]
        gap = y % 32 < rng.integers(2, 10, 41)[book]
        pick = np.where(gap, 15, (book * 5 + y // 32 * 3) % 16)
        colours = np.array([any_colour(rng, .3) for _ in range(16)])
    elif kind == "leaves":
        return leaves(rng, TILE, TILE, 100, 2, 50)
    grain = fractal(rng, TILE, TILE, rng.uniform(.6, 1.6)) * rng.uniform(.02, .1)
    return np.clip(colours[pick] * dark * (1 + grain[..., None]), 0, 1).astype(np.float32)


def leaves(rng, height, width, count, smallest, largest):
    """Textured dead leaves (Lee, Mumford & Huang 2001), (height, width, 3) float32: `count` shapes
    over shapes, sizes by a power law, so that edges occur at every scale, as in photographs."""
    base = palette(rng, 8, .6)
    image = np.tile(base[0].astype(np.float32), (height, width, 1))
    grains = [fractal(rng, TILE, TILE, power) for power in (.7, 1.1, 1.6)]
    sizes = 1 / np.sqrt(smallest ** -2. + rng.random(count) * (largest ** -2. - smallest ** -2.))
    sizes[:count // 20] = rng.uniform(largest / 3, largest, count // 20)
    for radius in rng.permutation(sizes):
        cx, cy = rng.uniform(0, width), rng.uniform(0, height)
        stretch, angle, kind = rng.uniform(.15, 1), rng.uniform(0, math.pi), rng.random()
        if kind < .4:
            angle = round(angle / (math.pi / 2)) * math.pi / 2          # people build upright
        x0, x1 = max(int(cx - radius), 0), min(int(cx + radius) + 2, width)
        y0, y1 = max(int(cy - radius), 0), min(int(cy + radius) + 2, height)
        y, x = np.arange(y0, y1)[:, None], np.arange(x0, x1)
        u = ((x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)) / radius
        v = ((y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)) / radius / stretch
        mask = u * u + v * v < 1 if kind > .6 else np.maximum(np.abs(u), np.abs(v)) < .7
        colour = base[rng.integers(8)] if rng.random() < .7 else any_colour(rng)
        if rng.random() < .1:
            colour = SKIN[rng.integers(len(SKIN))]
        grain = grains[rng.integers(3)]
        oy, ox = rng.integers(0, TILE, 2)
        u, v, grain = u[mask], v[mask], grain[(y + oy) % TILE, (x + ox) % TILE][mask]
        shade = 1 + rng.uniform(-.35, .35) * u + rng.uniform(-.2, .2) * v
        shade = shade + rng.uniform(0, .2) * grain
        if kind > .85:
            shade = shade * (1.1 - .6 * (u * u + v * v))                # round, like limbs are
        image[y0:y1, x0:x1][mask] = np.clip(colour * shade[:, None], 0, 1)
    return image


def furniture(rng, size):
    """Things in a room of `size` (3,): [(ball or else box, centre, half sizes, turn)]."""
    things = []

    def add(at, turn, half, shift=(0, 0, 0), ball=False):
        things.append((ball, at + turn @ np.array(shift, float), np.array(half, float), turn))

    for _ in range(rng.integers(3, 9)):             # pictures, doors, windows: flat, on the walls
        w, h, at = rng.uniform(.2, 1), rng.uniform(.2, 1), rng.uniform(.1, .9, 3) * size
        axis, wall = ((0, 0), (0, size[0]), (2, size[2]))[rng.integers(3)]
        at[1] = h if rng.random() < .3 else rng.uniform(1, size[1] - .3)
        at[axis] = wall                             # left, right or far
        add(at, np.eye(3), (w, h, .03) if axis == 2 else (.03, h, w))
    for _ in range(rng.integers(4, 10)):
        kind = rng.integers(6)
        turn = rotation((0, rng.choice((0, math.pi / 2)) + rng.normal(0, .2), 0))
        at = np.array((rng.uniform(.05, .95), 0, rng.uniform(.35, .95))) * size
        w, h, d = rng.uniform(.3, 1), rng.uniform(.3, .6), rng.uniform(.25, .6)
        if kind == 0:                               # table, desk, stool
            add(at, turn, (w, .03, d), (0, 2 * h, 0))
            for x, z in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                add(at, turn, (.03, h, .03), (.9 * w * x, h, .9 * d * z))
        elif kind == 1:                             # sofa, armchair, bed: seat, back, arms, cushion
            add(at, turn, (w, .22, .45), (0, .22, 0))
            add(at, turn, (w, .4, .1), (0, .5, .4))
            add(at, turn, (.1, .32, .45), (-w, .3, 0))
            add(at, turn, (.1, .32, .45), (w, .3, 0))
            add(at, turn, (.25, .2, .15), (.4 * w, .5, .2), ball=True)
        elif kind == 2:                             # cupboard, shelf
            add(at, turn, (w, 2 * h, d / 2), (0, 2 * h, 0))
        elif kind == 3:                             # lamp, stand
            add(at, turn, (.03, 2 * h, .03), (0, 2 * h, 0))
            add(at, turn, (.2, .15, .2), (0, 4 * h, 0), ball=True)
        else:                                       # plants, clothes, clutter: limb-like lumps
            for _ in range(rng.integers(4, 12)):
                place = at + rng.normal(0, .25, 3) + (0, rng.uniform(.2, 1.2), 0)
                half = rng.uniform(.03, .1, 3) * (1, rng.uniform(1, 5), 1)
                add(place, rotation(rng.normal(0, .7, 3)), half, ball=rng.random() < .8)
    return things


def trace(things, eye, view, focal, rays):
    """What is seen along rays (H, W, 3): the nearest thing's distance and number, (H, W) each.
    things[0] is the room, a box seen from inside. The others are tried only within the rectangle
    that their corners span in the picture, which saves most of the time."""
    height, width = rays.shape[:2]
    nearest = np.full((height, width), np.inf, np.float32)
    which = np.zeros((height, width), np.int16)
    for i, (ball, centre, half, turn) in enumerate(things):
        box = np.s_[:, :]
        if i > 0:
            corners = (np.array(list(np.ndindex(2, 2, 2))) * 2 - 1) * half @ turn.T + centre
            ahead = (corners - eye) @ view
            if ahead[:, 2].min() < .3:              # behind the eye, or in its face
                continue
            at = ahead[:, :2] / ahead[:, 2:] * (focal, -focal) + (width / 2, height / 2)
            low, high = at.min(0).astype(int).clip(0), (at.max(0) + 2).astype(int).clip(0)
            box = np.s_[low[1]:high[1], low[0]:high[0]]
        # Where the thing is stretched to a unit ball or cube: origin + distance * direction.
        o = ((eye - centre) @ turn / half).astype(np.float32)
        d = rays[box] @ (turn / half).astype(np.float32) + 1e-6
        if ball:
            aa, bb = (d * d).sum(-1), d @ o
            root = bb * bb - aa * (o @ o - 1)
            distance = np.where(root > 0, -bb - np.sqrt(np.maximum(root, 0)), np.inf) / aa
        else:
            middle, reach = -o / d, 1 / np.abs(d)
            leave, enter = middle + reach, middle - reach   # .min(-1) of three is slow
            leave = np.minimum(np.minimum(leave[..., 0], leave[..., 1]), leave[..., 2])
            enter = np.maximum(np.maximum(enter[..., 0], enter[..., 1]), enter[..., 2])
            distance = np.where(enter < leave, enter, np.inf) if i else leave
        closer = distance < nearest[box]
        nearest[box][closer], which[box][closer] = distance[closer], i
    return nearest, which


def pyramid(image):
    """A tile and its halved sizes, blown up again, five (TILE, TILE, 3): far ones do not alias."""
    levels = [image]
    for shrink in (2, 4, 8, 16):
        few = TILE // shrink
        cells = image.reshape(few, shrink, few, shrink, 3).transpose(1, 3, 0, 2, 4)
        means = cells.reshape(shrink * shrink, -1).mean(0)  # along rows, which is fast
        levels.append(means.reshape(few, few, 3).repeat(shrink, 0).repeat(shrink, 1))
    return levels


def room(rng, height, width):
    """A room (x across, y up, z away), ray-traced with one lamp: (height, width, 3)."""
    size = np.array((rng.uniform(3, 8), rng.uniform(2.4, 3.4), rng.uniform(4, 10)))
    eye = size * (rng.uniform(.2, .8), rng.uniform(.3, .7), rng.uniform(.02, .15))
    focal = width * rng.uniform(.6, 1.2)
    pan = rotation((0, rng.normal(0, .3), 0))
    view = pan @ rotation((rng.normal(.1, .12), 0, rng.normal(0, .02)))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    rays = np.stack([(x - width / 2) / focal, (height / 2 - y) / focal, np.ones_like(x)], -1)
    rays = rays @ view.T.astype(np.float32)
    lamp, ambient, power = size * rng.uniform(.1, .9, 3), rng.uniform(.3, .6), rng.uniform(2, 5)
    things = [(False, size / 2, size / 2, np.eye(3)), *furniture(rng, size)]
    distance, which = trace(things, eye, view, focal, rays)
    inside = which == 0

    # The point that a pixel shows, in its thing's axes; the face it lies on, and the normal there.
    ball, centre, half, turn = (np.array(v, np.float32)[which] for v in zip(*things))
    hit = eye.astype(np.float32) + distance[..., None] * rays
    local = np.einsum("hwi,hwij->hwj", hit - centre, turn)
    face = np.abs(local / half).argmax(-1)
    sign = np.sign(local) * np.where(inside, -1, 1)[..., None]
    flat = (np.arange(3) == face[..., None]) * sign
    normal = np.where(ball[..., None] > 0, local / half ** 2, flat)
    normal = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
    normal = np.einsum("hwj,hwji->hwi", normal, turn.swapaxes(-1, -2))

    # Light falls off with the distance from the lamp, and into the room's corners.
    beam = (lamp - hit).astype(np.float32)
    far = np.linalg.norm(beam, axis=-1) + .3
    light = ambient + power * np.maximum((normal * beam).sum(-1), 0) / far / (1 + far * far)
    a, b, c = np.moveaxis(half - np.abs(local), -1, 0)
    gap = np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))     # the second smallest
    light = light * np.where(inside, 1 - .4 * np.exp(-4 * gap), 1)

    # A thing has one of the eight tiles; the room has 0 on its walls, 1 or 3 below and 2 above.
    tiles = np.array([pyramid(tile(rng, plain=k in (0, 2, 3))) for k in range(8)])
    surfaces = rng.integers(0, 8, (len(things), 3))
    surfaces[0], surfaces[1:] = (0, 1, 0), surfaces[1:, :1]
    if rng.random() < .8:
        surfaces[0, 1] = 3
    ceiling = inside & (face == 1) & (local[..., 1] > 0)
    chosen = np.where(ceiling, 2, surfaces[which, face])
    scale = TILE * rng.uniform(.4, 1.2, len(things)).astype(np.float32)[which]
    v, u = (np.take_along_axis(local, (face[..., None] + k) % 3, -1)[..., 0] for k in (1, 2))
    v, u = ((along * scale).astype(int) % TILE for along in (v, u))
    level = np.clip(np.log2(distance * scale / focal), 0, 4).astype(int)
    colour = tiles[chosen, level, v, u]
    tint = rng.uniform(.5, 1.2, (len(things), 1)) * rng.normal(1, .06, (len(things), 3))
    bright = rng.random(len(things)) < .1                   # windows and lamps need no light
    tint[bright] = 2
    return colour * tint[which] * np.where(bright[which], 1, light)[..., None]


@functools.lru_cache(maxsize=4)
def pictures(folder):
    """All pictures under a folder, sorted. Raises Problem where there are fewer than ten."""
    found = sorted(path for path in Path(folder).rglob("*")
                   if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(found) < 10:
        raise Problem(f"--backgrounds {folder} has {len(found)} pictures (jpg, png); at least 10 "
                      "are needed, to share among the splits")
    return found


def background(rng, split, folder):
    """A static picture (240, 320, 3) float32 in 0..1. Of a folder's pictures, train has eight in
    ten, val and test one each, so that no split sees another's."""
    if folder:
        mine = [path for i, path in enumerate(pictures(folder))
                if SPLITS[max(i % 10 - 7, 0)] == split]
        path = mine[rng.integers(len(mine))]
        try:
            picture = ImageOps.fit(Image.open(path).convert("RGB"), (WIDTH, HEIGHT))
        except Exception as error:          # a garbled file makes the reader stumble in any way
            raise Problem(f"the background {path} cannot be used: {wording(error)}; mend or remove "
                          "it, and begin anew with another --out") from error
        return np.asarray(picture, np.float32) / 255
    kind = rng.random()
    image = room(rng, HEIGHT, WIDTH) if kind < .7 else leaves(rng, HEIGHT, WIDTH, 500, 2.5, 130)
    if kind > .9:                                           # out of focus
        image = ndimage.uniform_filter(image, (3, 3, 1))
    image = image / image.mean() * rng.uniform(.3, .6) * rng.normal((1.06, 1, .94), .04)
    image = 1 - np.exp(-1.4 * image)                        # film: highlights roll off
    glow = fractal(rng, HEIGHT // 4, WIDTH // 4, 1.8).repeat(4, 0).repeat(4, 1)
    return (image * (1 + .08 * glow[..., None])).clip(0, 1).astype(np.float32)


# ------ ground truth

def quarters(image):
    """The four pixels, each a view (H/2, W/2, ...), that become one at half the size."""
    return [image[dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)]


def paint_person(image, buffer, normals, albedo, label, light):
    """Paints a person over image (240, 320, 3), in place; returns the mask (240, 320) uint8.
    buffer (480, 640), of splat; normals and albedo (N, 3), label (N,)."""
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    lines = [(buffer < EMPTY).any(axis).nonzero()[:, 0] for axis in (1, 0)]     # rows, columns
    if len(lines[0]) == 0:
        return mask
    half = tuple(slice(int(line[0]) // 2, int(line[-1]) // 2 + 1) for line in lines)
    full = tuple(slice(2 * edge.start, 2 * edge.stop) for edge in half)
    # Holes one half-pixel wide are closed from both sides, by the farther of the two.
    seen = buffer[full]
    wide = torch.nn.functional.pad(seen, (1, 1, 1, 1), value=EMPTY)
    beside = torch.maximum(wide[1:-1, 2:], wide[1:-1, :-2])
    above = torch.maximum(wide[2:, 1:-1], wide[:-2, 1:-1])
    seen = torch.where(seen < EMPTY, seen, torch.minimum(beside, above))
    box, body = image[half].repeat_interleave(2, 0).repeat_interleave(2, 1), seen < EMPTY
    shown = seen[body] & INDEX                                          # only these cost shading
    box[body] = 1 - torch.exp(-1.4 * albedo[shown] * lit(normals[shown], light)[:, None])
    image[half] = sum(quarters(box)) / 4
    # A pixel is body where two of its quarters are; the nearest of them names it.
    front = torch.stack(quarters(seen))
    part = label[(front.amin(0) & INDEX).clamp(max=len(label) - 1)]
    mask[half] = torch.where((front < EMPTY).sum(0) >= 2, part, 0).to(torch.uint8)
    return mask


def render_clip(seed, split, frames, backgrounds=None):
    """One clip of one person: a dict of video (T, 240, 320, 3) uint8, segm (T, 240, 320) uint8 and
    info, the fields of SURREAL's info.mat. The work is done on torch's default device."""
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    sex = int(rng.integers(2))
    shape = np.clip(rng.normal(0, 1.2, 10), -2.5, 2.5)
    shape[0] += .8 if sex else -.8
    distance = float(np.clip(rng.normal(8, 1), 5, 11))
    yaw = rng.uniform(0, 2 * math.pi)
    aim = rng.normal(0, .5 if rng.random() < .08 else .1, 2)        # some people leave the picture
    light = rng.uniform(-.7, .7, 9)
    light[:2] = rng.uniform(.5, 1.2), rng.uniform(-.7, 0)           # never dark; more from above
    body = shaped_skin(sex, shape, min(POINTS, int(70_000 * (8 / distance) ** 2)))
    albedo = dress(body, sex, rng)
    local = motion(rng, frames)
    still = torch.tensor(background(rng, split, backgrounds))
    world = np.diag((1., -1, -1)) @ rotation((0, yaw + math.pi / 2, 0))
    drift = rng.normal(0, .1, 3) * (1, 0, 1)
    noise, blur = rng.uniform(.002, .02), rng.uniform(0, .7)
    video, masks, joints3d, camera = [], [], [], None
    for t in range(frames):
        turn, place = chain(local[t], body["joints"])
        place = place + drift * t / max(frames - 1, 1)
        place[:, 1] -= place[:, 1].min() - .06                      # what is lowest is on the floor
        joints = place @ world.T
        if camera is None:
            camera = joints[0] + (distance, *aim)
        points, normals = pose_skin(body, world @ turn, joints)
        image, buffer = still.clone(), splat(points, normals, camera)
        mask = paint_person(image, buffer, normals, albedo, body["label"], light)
        image = ndimage.gaussian_filter(image.cpu().numpy(), (blur, blur, 0), truncate=3)
        image = image + noise * rng.standard_normal(image.shape, dtype=np.float32)
        video.append((image.clip(0, 1) * 255).round().astype(np.uint8))
        masks.append(mask.cpu().numpy())
        joints3d.append(joints)
    joints3d = np.stack(joints3d, -1).transpose(1, 0, 2)            # (3, 24, T)
    x, y, _ = project(np.moveaxis(joints3d, 0, -1).reshape(-1, 3), camera)
    info = dict(
        joints2D=np.stack([x, y]).round().reshape(2, 24, frames), joints3D=joints3d,
        pose=axis_angle(local).reshape(frames, 72).T, shape=np.tile(shape[:, None], frames),
        zrot=np.full((frames, 1), yaw), light=np.tile(light[:, None], frames),
        camDist=np.array([[distance]]), camLoc=np.array(camera)[:, None])
    info = {key: value.astype(np.float32) for key, value in info.items()}
    names = np.array([[f"{split}-{seed}"] * frames], object)        # a MATLAB cell array
    info |= dict(
        gender=np.full((frames, 1), sex, np.uint8), stride=np.array([[50]], np.uint8),
        source="stand-in, not SURREAL", bg=names, cloth=names)
    return dict(video=np.stack(video), segm=np.stack(masks), info=info)


# ------ files

def matlab_file(fields):
    """The bytes of a compressed MATLAB 5 file, without the date that its header would carry."""
    file = io.BytesIO()
    savemat(file, fields, do_compression=True)
    return b"MATLAB 5.0 MAT-file".ljust(116) + file.getvalue()[116:]


def make_clip(raw, path, device, *settings):
    """Renders RAW/path.mp4, _segm.mat and, last, _info.mat: where that is, the clip is whole. A
    worker's job, on one thread, so that the files depend on none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.device(device):
            clip = render_clip(*settings)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if device == "cpu":
            raise
        raise Problem(f"--device {device} cannot render ({wording(error)}): try --device cpu, or "
                      "fewer --workers if its memory is short") from error
    finally:
        torch.set_num_threads(threads)              # --workers 0 works in the caller's process
    video = io.BytesIO()
    with av.open(video, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options=dict(crf="16", preset="veryfast"))
        stream.height, stream.width = HEIGHT, WIDTH
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        for image in clip["video"]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    masks = {f"segm_{t + 1}": mask for t, mask in enumerate(clip["segm"])}
    sequence, number = Path(path).name.rsplit("_c", 1)
    info = clip["info"] | dict(sequence=sequence, clipNo=np.array([[int(number)]], np.uint16))
    if len(clip["video"]) == 1:                 # SURREAL squeezes the joints of a single frame
        info |= {key: info[key][..., 0] for key in ("joints2D", "joints3D")}
    write_whole(raw, f"{path}.mp4", video.getvalue())
    write_whole(raw, f"{path}_segm.mat", matlab_file(dict(sorted(masks.items()))))
    write_whole(raw, f"{path}_info.mat", matlab_file(info))
    return path


def synthesize(raw, clips, frames, seed=0, workers=0, backgrounds=None, device="cpu"):
    """Fills raw/{train,val,test}/run0 with `clips` clips for train, a tenth for val and for test.

    backgrounds: folder of pictures, or None. The files depend on the seed, never on `workers`; a
    clip that is already there is kept. Raises Problem where `raw` was made with other settings.
    """
    settings = dict(clips=clips, frames=frames, seed=seed, device=device,
                    backgrounds=backgrounds and str(backgrounds))
    note = raw / "standin.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        raise Problem(f"{raw} holds stand-in clips made with other settings, "
                      f"{note.read_text().strip()}: name another --out or remove it")
    strange = raw.is_dir() and {entry.name for entry in os.scandir(raw)} - {".parts"}
    if strange and not note.exists():
        raise Problem(f"{raw} holds other files, and the stand-in's clips would go there: name "
                      "another --out or remove it")
    (raw / ".parts").mkdir(parents=True, exist_ok=True)
    write_whole(raw, note.name, json.dumps(settings).encode())
    jobs, tenth = [], max(2, clips // 10)
    for split, count, subject in (("train", clips, 200), ("val", tenth, 800), ("test", tenth, 900)):
        for i in range(count):                              # four clips a sequence, ten sequences
            sequence = f"{subject + i // 40:03d}_{i % 40 // 4 + 1:02d}"
            path = f"{split}/run0/{sequence}/{sequence}_c{i % 4 + 1:04d}"
            if not (raw / f"{path}_info.mat").exists():
                (raw / path).parent.mkdir(parents=True, exist_ok=True)
                jobs.append((raw, path, device, seed * 1_000_003 + i, split, frames,
                             backgrounds))
    with progress(len(jobs) * frames, "rendering the stand-in", "frames") as bar:
        for job, path in in_parallel(make_clip, jobs, workers):
            if path is None:
                raise Problem(f"rendering {job[1]} ended its process, maybe for want of memory: "
                              "try fewer --workers")
            bar.update(frames)
    shutil.rmtree(raw / ".parts")


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Help with defaults, no abbreviated options, errors of one line with exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def number(kind, low, high):
    """A converter for argparse: numbers of that kind within the bounds."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {name} from {low} to {high}")
        return value
    return convert


def parse(argv):
    parser = Parser(
        prog="prepare_surreal.py", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Turns raw SURREAL clips into the images, labels and joints that train.py "
                    "reads. A run that was stopped goes on with the same command; a folder made "
                    "with other options is never touched.")
    hidden, many = argparse.SUPPRESS, 10 ** 9
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--raw", type=Path, metavar="DIR", default=hidden,
        help="SURREAL's folder with train, val and test, usually SURREAL/data/cmu")
    source.add_argument(
        "--synthesize", action="store_true", default=False,
        help="render the stand-in into the folder OUT-raw, in SURREAL's layout, and prepare that")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, default=hidden,
        help="the prepared folder")
    group = parser.add_argument_group("which frames")
    group.add_argument(
        "--run", type=int, choices=(0, 1, 2), default=0,
        help="SURREAL's run: clips that overlap by 50 %%, 70 %% or 30 %%; the paper takes 0")
    group.add_argument(
        "--train", type=number(int, 1, many), metavar="N", default=90000,
        help="frames wanted for training")
    group.add_argument(
        "--val", type=number(int, 0, many), metavar="N", default=15000,
        help="frames wanted for validation, evenly over all its clips")
    group.add_argument(
        "--test", type=number(int, 0, many), metavar="N", default=15000,
        help="frames wanted for testing, never of clips that are in val. A chosen frame that turns "
             "out unusable is not replaced, so a split may end up a little smaller")
    group.add_argument(
        "--pick", choices=("spread", "cluster"), default="spread",
        help="spread: the same number from every cluster of poses, evenly over its clips; cluster: "
             "the one cluster nearest to the wanted size, as the authors did (less varied). A "
             "split with no more frames than wanted is taken whole")
    group.add_argument(
        "--clusters", type=number(int, 1, 1000), metavar="K", default=25, help="clusters of poses")
    group.add_argument(
        "--exclude", nargs="+", action="extend", metavar="GLOB", default=[],
        help="leave out clips whose name or sequence matches, such as the misshapen subjects: "
             "--exclude '18_*' '19_*' '143_21*'")
    group.add_argument(
        "--seed", type=number(int, 0, 2 ** 63), default=0,
        help="of the choice, and of the stand-in's people; the same command gives the same frames")
    group = parser.add_argument_group("the images")
    group.add_argument(
        "--size", type=number(int, 8, 4096), metavar="PIXELS", default=320,
        help="side of the square images; time and disk space grow with its square")
    group.add_argument(
        "--margin", type=number(float, 0, 2), default=0.1,
        help="added on each side of the person, as a share of its width and height")
    group = parser.add_argument_group("the stand-in (with --synthesize)")
    group.add_argument(
        "--clips", type=number(int, 1, 24_000), metavar="N", default=hidden,
        help="clips rendered for train; a tenth, at least 2, for val and for test "
             f"(default: {STANDIN['clips']})")
    group.add_argument(
        "--frames", type=number(int, 1, 999), metavar="N", default=hidden,
        help=f"frames of a clip (default: {STANDIN['frames']})")
    group.add_argument(
        "--backgrounds", type=Path, metavar="DIR", default=hidden,
        help="folder of pictures to put behind the people (default: made up by the program)")
    group.add_argument(
        "--device", metavar="NAME", default=hidden,
        help="where the people are rendered: cpu, cuda, ...; another device rounds otherwise, and "
             f"its people differ a little (default: {STANDIN['device']})")
    group = parser.add_argument_group("the machine")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    group.add_argument(
        "--workers", type=number(int, 0, 1024), metavar="N", default=cores,
        help="processes side by side, some 150 MB each (and what --device takes); 0: none but "
             "this one. No effect on files")
    args = parser.parse_args(argv)
    given = [name for name in STANDIN if hasattr(args, name)]
    if given and not args.synthesize:
        parser.error(f"--{given[0]} only goes with --synthesize")
    if args.synthesize and args.run != 0:
        parser.error("--synthesize renders run 0; leave --run out")
    return args


def main(argv=None):
    """The command line. Returns the exit status, 2 for what the user can mend, 1 for the rest."""
    args = parse(argv)
    settings = {name: getattr(args, name) for name in (
        "run", "train", "val", "test", "pick", "clusters", "size", "margin", "exclude", "seed")}
    try:
        if args.synthesize:
            args.raw = Path(f"{args.out}-raw")
            options = {name: getattr(args, name, default) for name, default in STANDIN.items()}
            settings |= options | dict(synthesize=True)
            try:
                torch.zeros(1, device=options["device"])
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                raise Problem(f"--device {options['device']} cannot be used "
                              f"({wording(error)}): cpu always can") from error
            if options["backgrounds"] is not None:
                if not options["backgrounds"].is_dir():
                    raise Problem(f"there is no folder --backgrounds {options['backgrounds']}")
                pictures(options["backgrounds"])            # enough of them?
                options["backgrounds"] = settings["backgrounds"] = str(
                    options["backgrounds"].resolve())
            source = "the stand-in, not SURREAL: people rendered by prepare_surreal.py"
        else:
            folder = args.raw / "train" / f"run{args.run}"
            if not folder.is_dir():
                raise Problem(f"there is no folder {folder}; --raw needs SURREAL's folder with "
                              "train, val and test, usually SURREAL/data/cmu")
            settings["raw"] = str(args.raw.resolve())
            source = (f"SURREAL (Varol et al., 2017), run{args.run}; what it calls left is on the "
                      "visible person's right")
        if not begin(args.out, settings):
            print(f"{args.out} is already prepared with these settings; remove it to make it again")
            return 0
        lock = open(args.out / ".parts" / "lock", "w")      # held until this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"another process is preparing {args.out}: wait for it") from None
        if args.synthesize:
            synthesize(args.raw, seed=args.seed, workers=args.workers, **options)
        prepare(args, settings, source)
    except Problem as problem:
        print(f"prepare_surreal.py: {problem}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"prepare_surreal.py: {error.strerror or error}{where}; what is done is kept, and "
              "the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_surreal.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
