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
import fnmatch
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
from av.video.reformatter import VideoReformatter
from PIL import Image
from scipy import ndimage
from scipy.io import loadmat
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

    exclude: patterns for the clip's or the sequence's name. known: clips of another split.
    Returns ([(sequence, clip)], [(clip, "", reason)] of those left out).
    """
    usable, skipped, seen = [], [], {}
    for sequence in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        try:
            files = {entry.name for entry in os.scandir(folder / sequence)
                     if entry.is_file() and not entry.name.startswith(".")}
        except OSError as error:
            skipped.append((sequence, "", f"unreadable folder: {error.strerror}"))
            continue
        clips = {name.removesuffix(part) for name in files for part in PARTS if name.endswith(part)}
        for clip in sorted(clips - {""}):
            missing = [part.lstrip("._") for part in PARTS if clip + part not in files]
            if any(fnmatch.fnmatchcase(name, x) for name in (clip, sequence) for x in exclude):
                reason = "excluded"
            elif clip in known:
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
            return loadmat(path, variable_names=names)
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
    centres, distance = [few[rng.integers(len(few))]], np.full(len(few), np.inf)
    for _ in range(clusters - 1):
        distance = np.minimum(distance, ((few - centres[-1]) ** 2).sum(axis=1))
        odds = distance / distance.sum() if distance.any() else None
        centres.append(few[rng.choice(len(few), p=odds)])
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
        (parts / "plan.json").unlink()                      # mended clips get another chance
        shutil.rmtree(parts / "records")
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
    report(args, totals, skipped, plan)


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


def report(args, totals, skipped, plan):
    """Prints frames per split, class frequencies beside the paper's, and what was skipped."""
    print(f"\n{'split':<8}{'wanted':>9}{'chosen':>9}{'written':>9}")
    for split in SPLITS:
        chosen = sum(len(times) for name, _, _, times in plan["clips"] if name == split)
        print(f"{split:<8}{getattr(args, split):>9}{chosen:>9}{len(totals[split]['frames']):>9}")
    pixels = totals["train"]["pixels"]
    print(f"\n{'class':<18}{'train %':>9}{'paper %':>9}")
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
# The stand-in
# --------------------------------------------------------------------------------------------------

STANDIN = dict(clips=200, frames=10, backgrounds=None)     # 2,000 train, 200 val, 200 test frames


def synthesize(raw, clips, frames, backgrounds, seed, workers):
    raise Problem("the renderer of the stand-in is not here yet; --raw takes SURREAL's clips")


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
        "--exclude", nargs="+", metavar="GLOB", default=[],
        help="leave out clips whose name or sequence matches, such as the misshapen subjects: "
             "--exclude '18_*' '19_*' '143_21*'")
    group.add_argument(
        "--seed", type=number(int, 0, 2 ** 63), default=0,
        help="of the choice; the same command gives the same frames")
    group = parser.add_argument_group("the images")
    group.add_argument(
        "--size", type=number(int, 8, 4096), metavar="PIXELS", default=320,
        help="side of the square images; time and disk space grow with its square")
    group.add_argument(
        "--margin", type=number(float, 0, 2), default=0.1,
        help="added on each side of the person, as a share of its width and height")
    group = parser.add_argument_group("the stand-in (with --synthesize)")
    group.add_argument(
        "--clips", type=number(int, 1, 100_000), metavar="N", default=hidden,
        help=f"clips rendered for train, a tenth for val and test (default: {STANDIN['clips']})")
    group.add_argument(
        "--frames", type=number(int, 1, 999), metavar="N", default=hidden,
        help=f"frames of a clip (default: {STANDIN['frames']})")
    group.add_argument(
        "--backgrounds", type=Path, metavar="DIR", default=hidden,
        help="folder of pictures to put behind the people (default: made up by the program)")
    group = parser.add_argument_group("the machine")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    group.add_argument(
        "--workers", type=number(int, 0, 1024), metavar="N", default=cores,
        help="processes side by side, some 150 MB each; 0: none but this one. No effect on files")
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
            if options["backgrounds"] is not None:
                if not options["backgrounds"].is_dir():
                    raise Problem(f"there is no folder --backgrounds {options['backgrounds']}")
                settings["backgrounds"] = str(options["backgrounds"].resolve())
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
