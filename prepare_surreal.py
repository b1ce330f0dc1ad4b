"""From raw SURREAL clips to the images a network trains on: chosen by pose, repaired, cropped around the person.

The procedure is that of the paper (Borrego Carazo, 2018, Section 2.2), on the dataset of Varol et al. (2017, arXiv 1701.01370):

    joints3D of all frames -> k-means -> chosen frames
      -> mp4 and masks -> stray head labels refilled -> square crop -> OUT/{train,val,test}/{images,labels}, joints.npz

It differs from the paper in what is chosen (the same number of frames from every pose cluster; `--pick cluster` takes the
authors' one cluster) and in that no clip is in both val and test. A broken clip or frame costs itself alone; OUT/skipped.csv says why.
A run that was stopped goes on with the same command. OUT/classes.json comes last: a folder without it is unfinished.

    python prepare_surreal.py --raw SURREAL/data/cmu --out data/surreal     the dataset (licence: di.ens.fr/willow/research/surreal)
    python prepare_surreal.py --synthesize --out data/standin               made-up people, for those without it
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
from PIL import Image
from scipy import ndimage
from scipy.io import loadmat
from tqdm import tqdm

SPLITS = ("train", "val", "test")
HEAD = 16
IGNORE = 255                    # label of what lies outside the frame

# SURREAL's labels: 0, then the SMPL joint's number + 1. Its pictures are mirrored: what it calls "left" is on the visible
# person's right. Labels and joints agree with each other, so the names stay as they are. Colours: green torso, teal head;
# limbs grow paler outwards, arms red (left) and orange (right), legs blue (left) and violet (right).
CLASSES = (                     # name, colour, share of the pixels in the paper's cropped training set
    ("background", (26, 28, 36), 0.87346), ("hips", (20, 102, 52), 0.02098),
    ("leftUpLeg", (28, 66, 190), 0.01220), ("rightUpLeg", (104, 38, 158), 0.01201),
    ("spine", (58, 150, 66), 0.00702), ("leftLeg", (50, 126, 236), 0.00996), ("rightLeg", (158, 84, 222), 0.00978),
    ("spine1", (120, 188, 78), 0.00601), ("leftFoot", (112, 186, 255), 0.00239), ("rightFoot", (206, 136, 250), 0.00247),
    ("spine2", (188, 222, 110), 0.00915), ("leftToeBase", (190, 228, 255), 0.00043), ("rightToeBase", (236, 200, 255), 0.00082),
    ("neck", (128, 228, 212), 0.00162), ("leftShoulder", (138, 14, 34), 0.00230), ("rightShoulder", (158, 78, 6), 0.00210),
    ("head", (0, 158, 150), 0.00865), ("leftArm", (212, 34, 50), 0.00408), ("rightArm", (232, 124, 10), 0.00408),
    ("leftForeArm", (250, 96, 104), 0.00321), ("rightForeArm", (252, 172, 48), 0.00341),
    ("leftHand", (255, 154, 164), 0.00116), ("rightHand", (255, 210, 104), 0.00129),
    ("leftHandIndex1", (255, 206, 216), 0.00067), ("rightHandIndex1", (255, 238, 176), 0.00077),
)
NAMES, PALETTE, PAPER = (list(column) for column in zip(*CLASSES))
SWAPPED = {name: name.replace("left", "right") if "left" in name else name.replace("right", "left") for name in NAMES}
MIRROR = [NAMES.index(SWAPPED[name]) for name in NAMES]
GROUPS = {                      # the columns of the paper's Tables 2 and 5
    "Background": [0], "Head": [16], "Torso": [1, 4, 7, 10], "U.Legs": [2, 3], "L.Legs": [5, 6], "Neck": [13],
    "Shoulder": [14, 15], "U.Arms": [17, 18], "L.Arms": [19, 20], "Feet": [8, 9], "Hands": [21, 22], "Fingers": [23, 24],
    "Toes": [11, 12],
}


class Problem(Exception):
    """Something the user can mend, as one sentence that names the value and the way out."""


class Unusable(Exception):
    """Why a clip or a frame is left out."""


# ---------------------------------------------------------------------------------------------------------------------
# Working in parallel, and files that are whole or not there
# ---------------------------------------------------------------------------------------------------------------------

def start_worker():
    """Ctrl-C is the main process's affair; and when that is killed, its workers end too instead of waiting for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


def limited(seconds, function, *job):
    """function(*job), in a process that is ended if that takes more than `seconds` of processor time: a decoder hangs."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    result = function(*job)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, 0)
    return result


def in_parallel(function, jobs, workers, seconds=300):
    """Yields (job, function(*job)) as they finish; (job, None) for a job that ended its process twice (crash, hang, memory)."""
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")

    def processes(count):
        return ProcessPoolExecutor(count, context, start_worker)

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
        for job in running.values():            # one of these ended its process: each again, alone, to find out which
            with processes(1) as pool:
                try:
                    result = pool.submit(limited, seconds, function, *job).result()
                except BrokenProcessPool:
                    result = None
            if result is None:
                check_processes(processes)
            yield job, result


def check_processes(processes):
    """Raises Problem when not even an idle process can be started, so that no clip is blamed for it."""
    try:
        with processes(1) as pool:
            pool.submit(os.getpid).result()
    except BrokenProcessPool as error:
        raise Problem("no worker process could be started; --workers 0 does without") from error


def write_whole(out, path, data):
    """Writes bytes to OUT/path such that the file appears whole or not at all. What a kill leaves lies in OUT/.parts."""
    temporary = out / ".parts" / f"{os.getpid()}.tmp"
    temporary.write_bytes(data)
    os.replace(temporary, out / path)


def as_json(content):
    return (json.dumps(content, indent=1) + "\n").encode()


def progress(total, what, unit):
    """A bar with the time left; without a terminal a line now and then."""
    return tqdm(total=total, desc=what, unit=f" {unit}", mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing the frames
# ---------------------------------------------------------------------------------------------------------------------

def list_clips(raw, split, run, exclude, known):
    """The clips RAW/split/run/<sequence>/<clip>{.mp4,_segm.mat,_info.mat}.

    exclude: patterns for the clip's or the sequence's name. known: names of clips that belong to another split.
    Returns ([(sequence, clip)], [(clip, "", reason)] of those left out), both in alphabetical order.
    """
    usable, skipped, seen = [], [], {}
    folder = raw / split / f"run{run}"
    for sequence in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        try:
            files = {entry.name for entry in os.scandir(folder / sequence)
                     if entry.is_file() and not entry.name.startswith(".")}
        except OSError as error:
            skipped.append((sequence, "", f"unreadable folder: {error.strerror}"))
            continue
        clips = {name.removesuffix(ending) for name in files for ending in (".mp4", "_segm.mat", "_info.mat")
                 if name.endswith(ending)} - {""}
        for clip in sorted(clips):
            missing = [clip + ending for ending in (".mp4", "_segm.mat", "_info.mat") if clip + ending not in files]
            if any(fnmatch.fnmatchcase(name, pattern) for name in (clip, sequence) for pattern in exclude):
                reason = "excluded"
            elif clip in known:
                reason = "also in val"
            elif clip in seen:
                reason = f"name already taken: by the clip in {seen[clip]}"
            elif missing:
                reason = f"no {missing[0].removeprefix(clip).lstrip('._')}"
            elif len(os.fsencode(clip)) > 200:
                reason = "name too long"
            else:
                usable.append((sequence, clip))
                seen[clip] = sequence
                continue
            skipped.append((clip, "", reason))
    return usable, skipped


def read_mat(path, names):
    """{name: array} of those variables that the MATLAB file has. Raises Unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loadmat(path, variable_names=names)
    except Exception as error:          # a garbled file makes the reader stumble in any way; it costs this clip alone
        raise Unusable(f"unreadable {path.stem.rsplit('_', 1)[-1]}.mat: {wording(error)}") from error


def wording(error):
    """The first line of an error's message without the path, or its type."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:100]


def read_joints(path):
    """joints2D (T, 24, 2), x and y in pixels, and joints3D (T, 24, 3), metres, both float32. Raises Unusable.

    With one frame the file has them squeezed: (2, 24) and (3, 24).
    """
    mat, joints = read_mat(path, ["joints2D", "joints3D"]), []
    for name, axes in (("joints2D", 2), ("joints3D", 3)):
        array = mat.get(name)
        if array is None or array.dtype.kind not in "fiu" or array.shape[:2] != (axes, 24) or array.ndim not in (2, 3):
            found = "missing" if array is None else f"{array.dtype} of shape {array.shape}"
            raise Unusable(f"wrong joints: {name} is {found}, expected numbers of shape ({axes}, 24, T)")
        with np.errstate(over="ignore", invalid="ignore"):
            joints.append(array.reshape(axes, 24, -1).transpose(2, 1, 0).astype(np.float32))
    if len(joints[0]) != len(joints[1]) or len(joints[0]) == 0:
        raise Unusable(f"wrong joints: {len(joints[0])} frames of joints2D, {len(joints[1])} of joints3D")
    return joints


def read_poses(path):
    """(poses (T, 72) float32 with the pelvis at 0, {t: reason} of unusable frames), or the reason why there are none."""
    try:
        flat, solid = read_joints(path)
    except Unusable as reason:
        return str(reason)
    bad = {}
    for joints in (flat, solid):
        with np.errstate(invalid="ignore"):
            bad |= {int(t): "joints not finite" for t in np.flatnonzero(~(np.abs(joints) < 1e6).all(axis=(1, 2)))}
        bad |= {int(t): "joints all zero" for t in np.flatnonzero(~joints.any(axis=(1, 2)))}
    with np.errstate(invalid="ignore", over="ignore"):
        return (solid - solid[:, :1]).reshape(len(solid), 72), bad


def kmeans(poses, clusters, rng, rounds=100, chunk=8192):
    """Lloyd's algorithm from k-means++ seeds (Arthur & Vassilvitskii 2007), over chunks that stay in the cache.

    poses (N, D) float32. Returns each pose's cluster (N,) int32. Stops when fewer than one pose in 2,000 moves.
    """
    sample = poses[np.sort(rng.choice(len(poses), min(len(poses), 20_000), replace=False))]
    centres = [sample[rng.integers(len(sample))]]
    nearest = np.full(len(sample), np.inf)
    for _ in range(clusters - 1):
        nearest = np.minimum(nearest, ((sample - centres[-1]) ** 2).sum(axis=1))
        odds = nearest / nearest.sum() if nearest.sum() > 0 else None
        centres.append(sample[rng.choice(len(sample), p=odds)])
    centres = np.stack(centres)
    assigned = np.full(len(poses), -1, np.int32)
    chunk = max(256, min(chunk, 2 ** 22 // clusters))
    with progress(rounds, "k-means", "rounds") as bar:
        for _ in range(rounds):
            moved, sums, counts = 0, np.zeros(centres.shape), np.zeros(clusters)
            for start in range(0, len(poses), chunk):
                part = poses[start:start + chunk]
                closest = ((centres ** 2).sum(axis=1) - 2 * part @ centres.T).argmin(axis=1)
                moved += np.count_nonzero(assigned[start:start + chunk] != closest)
                assigned[start:start + chunk] = closest
                chosen = np.zeros((len(part), clusters), np.float32)
                chosen[np.arange(len(part)), closest] = 1
                sums += chosen.T @ part
                counts += chosen.sum(axis=0)
            bar.update()
            if moved <= len(poses) // 2000:
                break
            kept = counts > 0
            centres[kept] = (sums[kept] / counts[kept, None]).astype(np.float32)
    return assigned


def share(sizes, wanted, rng):
    """How many to take from groups of these sizes: the same number from each as far as it has them, `wanted` in all."""
    sizes = np.asarray(sizes)
    if wanted >= sizes.sum():
        return sizes.copy()
    low, high = 0, wanted               # the highest level to which all groups can be filled
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.minimum(sizes, level).sum() <= wanted else (low, level - 1)
    counts = np.minimum(sizes, low)
    counts[rng.choice(np.flatnonzero(sizes > low), wanted - counts.sum(), replace=False)] += 1
    return counts


def evenly(clip_of, wanted, rng):
    """Rows to take from frames with these clips (N,) ascending: the same number from every clip, at even steps in time."""
    _, first, sizes = np.unique(clip_of, return_index=True, return_counts=True)
    counts = share(sizes, wanted, rng)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(rng.random(len(counts)), counts)
    step = np.repeat(sizes / np.maximum(counts, 1), counts)
    return np.repeat(first, counts) + np.minimum((place * step).astype(int), np.repeat(sizes, counts) - 1)


def pick(clip_of, poses, wanted, how, clusters, rng):
    """Rows of the frames to take, ascending. clip_of (N,) ascending; poses (N, 72), or None to go by clips alone (val)."""
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
    return np.sort(np.concatenate([rows[evenly(clip_of[rows], count, rng)] for rows, count in zip(members, counts)]))


def choose(args):
    """All decisions of the run: {"clips": [[split, sequence, clip, [t, ...]], ...], "skipped": [[clip, frame, reason], ...]}.

    Raises Problem where no train frame is usable.
    """
    plan, val_clips = dict(clips=[], skipped=[]), set()
    for number, split in enumerate(("val", "train", "test")):
        wanted = getattr(args, split)
        if not (args.raw / split / f"run{args.run}").is_dir():
            if wanted and split == "train":
                raise Problem(f"--raw {args.raw} has no folder train/run{args.run}; give the one that holds train, val and test "
                              "(SURREAL/data/cmu)")
            continue
        clips, skipped = list_clips(args.raw, split, args.run, args.exclude, val_clips if split == "test" else set())
        if split == "val":
            val_clips = set(clip for _, clip in clips) | set(clip for clip, _, _ in skipped)
        if wanted == 0:
            continue
        folder = args.raw / split / f"run{args.run}"
        jobs = {(folder / sequence / f"{clip}_info.mat",): index for index, (sequence, clip) in enumerate(clips)}
        found = [None] * len(clips)
        with progress(len(clips), f"{split}: poses", "clips") as bar:
            for job, result in in_parallel(read_poses, jobs, args.workers):
                found[jobs[job]] = "unreadable info.mat: reading it ended the process" if result is None else result
                bar.update()
        frames = []                     # (clip's index, t) of all usable ones
        for index, ((_, clip), result) in enumerate(zip(clips, found)):
            if isinstance(result, str):
                skipped.append((clip, "", result))
                continue
            poses, bad = result
            skipped += [(clip, t + 1, reason) for t, reason in sorted(bad.items())]
            good = np.setdiff1d(np.arange(len(poses)), list(bad))
            frames.append(np.stack([np.full(len(good), index), good], axis=1))
            found[index] = poses[good] if split != "val" else None
        frames = np.concatenate(frames or [np.zeros((0, 2), int)])
        poses = [part for part in found if isinstance(part, np.ndarray)] if split != "val" else None
        del found
        if poses is not None:
            table = np.empty((len(frames), 72), np.float32)
            end = len(table)
            while poses:                # from the back, each part freed as it is copied: the table fits in memory only once
                part = poses.pop()
                table[end - len(part):end] = part
                end -= len(part)
            poses = table
        rows = pick(frames[:, 0], poses, wanted, args.pick, args.clusters, np.random.default_rng([args.seed, number]))
        indices, first = np.unique(frames[rows, 0], return_index=True)
        for index, times in zip(indices, np.split(frames[rows, 1], first[1:])):
            plan["clips"].append([split, *clips[index], times.tolist()])
        plan["skipped"] += skipped
    if not any(split == "train" for split, *_ in plan["clips"]):
        why = collections.Counter(reason for *_, reason in plan["skipped"]).most_common(1)
        raise Problem(f"no usable clip in {args.raw / 'train' / f'run{args.run}'}"
                      + (f"; most often: {why[0][0]}" if why else ""))
    return plan


# ---------------------------------------------------------------------------------------------------------------------
# One frame: repair and crop
# ---------------------------------------------------------------------------------------------------------------------

def repair_head(labels):
    """Refills stray head labels (paper, Section 2.2), in place. labels (H, W) uint8. Returns the number of pixels changed.

    All 8-connected components of label 16 but the largest are refilled, ring by ring from their border inward, with
    the most common label among a pixel's 8 neighbours: body parts before background, the lower id where they tie.
    """
    rows, columns = np.nonzero(labels == HEAD)
    if len(rows) == 0:
        return 0
    top, left = rows.min(), columns.min()
    window = labels[top:rows.max() + 1, left:columns.max() + 1]
    components, count = ndimage.label(window == HEAD, np.ones((3, 3)))
    if count == 1:
        return 0
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    rows, columns = np.nonzero((components > 0) & (components != sizes.argmax()))
    rows, columns, changed = rows + top + 1, columns + left + 1, len(rows)
    padded = np.pad(labels, 1, constant_values=IGNORE)
    padded[rows, columns] = IGNORE                                                  # not known yet
    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    while len(rows):
        neighbours = np.stack([padded[rows + dy, columns + dx] for dy, dx in around], axis=1)       # (pixels, 8)
        votes = (neighbours[:, :, None] == np.arange(len(NAMES))).sum(axis=1)                       # (pixels, 25)
        votes[:, 1:] *= 10                                                          # one body part outvotes 8 x background
        ring = votes.any(axis=1)
        padded[rows[ring], columns[ring]] = votes[ring].argmax(axis=1)
        rows, columns = rows[~ring], columns[~ring]
    labels[...] = padded[1:-1, 1:-1]
    return changed


def crop_box(labels, margin):
    """The square (x0, y0, side), whole pixels, around the person. labels (H, W). Raises Unusable without a person.

    The tight box of the body, `margin` of its width and height added on each side, the longer of the two for both; moved,
    not shrunk, into the frame. Where it is larger than the frame, the whole frame lies inside it.
    """
    body = labels != 0
    columns, rows = np.flatnonzero(body.any(axis=0)), np.flatnonzero(body.any(axis=1))
    if len(rows) == 0:
        raise Unusable("no person in the frame")
    side = max(1, round(max(columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]) * (1 + 2 * margin)))
    corner = []
    for line, length in ((columns, labels.shape[1]), (rows, labels.shape[0])):
        centred = (int(line[0]) + int(line[-1]) + 1 - side) // 2
        corner.append(min(max(centred, min(0, length - side)), max(0, length - side)))
    return corner[0], corner[1], side


def cut(array, box, fill):
    """The square (side, side, ...) that box = (x0, y0, side) cuts out of array (H, W, ...), `fill` outside it."""
    (x0, y0, side), (height, width) = box, array.shape[:2]
    square = np.empty((side, side) + array.shape[2:], array.dtype)
    top, bottom, left, right = max(0, y0), min(height, y0 + side), max(0, x0), min(width, x0 + side)
    if (bottom - top, right - left) != (side, side):
        square[...] = fill
    square[top - y0:bottom - y0, left - x0:right - x0] = array[top:bottom, left:right]
    return square


def crop_frame(image, labels, joints, size, margin):
    """Repairs and crops one frame.

    image (H, W, 3) uint8, labels as read from the masks file, joints (24, 2) float32. Returns a PIL RGB image, a PIL palette
    image, both size x size, and the joints (24, 2) float32 in their pixels. Raises Unusable.
    """
    if labels is None:
        raise Unusable("no mask")
    if labels.dtype.kind not in "iub" or labels.shape != image.shape[:2]:
        raise Unusable(f"wrong mask: {labels.dtype} of shape {labels.shape}, the frame is {image.shape[:2]}")
    if labels.min() < 0 or labels.max() >= len(NAMES):
        beyond = labels.max() if labels.max() >= len(NAMES) else labels.min()
        raise Unusable(f"label out of range: {beyond}, 0 to {len(NAMES) - 1} are known")
    labels = labels.astype(np.uint8)
    repair_head(labels)
    x0, y0, side = box = crop_box(labels, margin)
    padded = x0 < 0 or y0 < 0 or x0 + side > image.shape[1] or y0 + side > image.shape[0]
    image = Image.fromarray(cut(image, box, image.mean(axis=(0, 1)).round() if padded else 0))
    labels = Image.fromarray(cut(labels, box, IGNORE)).resize((size, size), Image.NEAREST)
    labels.putpalette([value for colour in PALETTE for value in colour] + [128] * 3 * (256 - len(PALETTE)))
    joints = (joints - np.float32([x0, y0]) + 0.5) * (size / side) - 0.5
    return image.resize((size, size), Image.BICUBIC), labels, joints.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# One clip
# ---------------------------------------------------------------------------------------------------------------------

def decode(path, wanted, length):
    """Yields (t, image (H, W, 3) uint8) of the wanted frames of a video, in order. Raises Unusable.

    `length` is the number of frames the video should have; behind the last wanted one, packets are counted, not decoded.
    The t-th picture must carry the t-th time stamp: a decoder that drops one would shift all later labels.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1                                   # clips run in parallel already
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(2 ** 24)}
            packets = list(container.demux(stream))                                 # the last one, empty, flushes the decoder
            stamps = sorted(packet.pts for packet in packets if packet.size)
            if len(stamps) != length:
                raise Unusable(f"different length: {len(stamps)} frames of video, {length} of joints")
            frames = (frame for packet in packets for frame in stream.codec_context.decode(packet if packet.size else None))
            wanted = list(wanted)
            for t, frame in enumerate(frames):
                if frame.pts != stamps[t] or frame.is_corrupt:
                    raise Unusable("unreadable video: a frame is damaged")
                if t == wanted[0]:
                    yield t, frame.to_ndarray(format="rgb24")
                    wanted.pop(0)
                    if not wanted:
                        return
            raise Unusable("unreadable video: it ends early")
    except Unusable:
        raise
    except Exception as error:          # a garbled file makes the decoder stumble in any way; it costs this clip alone
        raise Unusable(f"unreadable video: {wording(error)}") from error


def empty_record(skipped):
    return dict(frames=[], joints=[], skipped=skipped, pixels=[0] * len(NAMES), sums=[0] * 3, squares=[0] * 3)


def extract(raw, out, split, sequence, clip, times, size, margin):
    """Writes the chosen frames of one clip, and then their record, OUT/.parts/records/<split>/<clip>.json.

    times: ascending frame numbers from 0. The record has the frames' names and joints, sums over the pixels, and what was
    skipped; all whole numbers or exact, so that their totals do not depend on who adds them up when. Returns the record.
    """
    record, files, levels = empty_record([]), [], np.arange(256)
    try:
        joints = read_joints(raw / sequence / f"{clip}_info.mat")[0]
        length = len(joints)
        masks = read_mat(raw / sequence / f"{clip}_segm.mat", [f"segm_{t + 1}" for t in {*times, length - 1, length}])
        if f"segm_{length}" not in masks or f"segm_{length + 1}" in masks:
            raise Unusable(f"different length: {length} frames of joints, {'fewer' if f'segm_{length}' not in masks else 'more'} masks")
        for t, image in decode(raw / sequence / f"{clip}.mp4", times, length):
            try:
                image, labels, moved = crop_frame(image, masks.get(f"segm_{t + 1}"), joints[t], size, margin)
            except Unusable as reason:
                record["skipped"].append([clip, t + 1, str(reason)])
                continue
            frame = f"{clip}_{t + 1:03d}"
            for picture, path, settings in ((image, f"images/{frame}.jpg", dict(format="JPEG", quality=95)),
                                            (labels, f"labels/{frame}.png", dict(format="PNG"))):
                buffer = io.BytesIO()
                picture.save(buffer, **settings)
                files.append((f"{split}/{path}", buffer.getvalue()))
            record["frames"].append(frame)
            record["joints"].append(moved.tolist())
            colours = np.array(image.histogram()).reshape(3, 256)
            record["sums"] = (record["sums"] + colours @ levels).tolist()
            record["squares"] = (record["squares"] + colours @ levels ** 2).tolist()
            record["pixels"] = (np.array(record["pixels"]) + labels.histogram()[:len(NAMES)]).tolist()
    except Unusable as reason:
        record, files = empty_record([[clip, "", str(reason)]]), []
    for path, data in files:
        write_whole(out, path, data)
    write_whole(out, f".parts/records/{split}/{clip}.json", json.dumps(record).encode())
    return record


# ---------------------------------------------------------------------------------------------------------------------
# The whole folder
# ---------------------------------------------------------------------------------------------------------------------
def prepare(args, settings, source):
    """Carries out or continues the preparation of `args.raw` into `args.out`. Raises Problem."""
    out, parts = args.out, args.out / ".parts"
    plan_file = parts / "plan.json"
    if not plan_file.is_file():
        plan = choose(args)
        write_whole(out, ".parts/plan.json", json.dumps(plan).encode())
    plan = json.loads(plan_file.read_text())
    for split in SPLITS:
        for folder in (out / split / "images", out / split / "labels", parts / "records" / split):
            folder.mkdir(parents=True, exist_ok=True)
    jobs = {}
    for split, sequence, clip, times in plan["clips"]:
        folder = args.raw / split / f"run{args.run}"
        jobs[(folder, out, split, sequence, clip, tuple(times), args.size, args.margin)] = f".parts/records/{split}/{clip}.json"
    done = {split: {entry.name for entry in os.scandir(parts / "records" / split)} for split in SPLITS}
    open_jobs = [job for job in jobs if f"{job[4]}.json" not in done[job[2]]]
    with progress(sum(len(job[5]) for job in jobs), "frames", "frames") as bar:
        bar.update(bar.total - sum(len(job[5]) for job in open_jobs))
        bar.unpause()                   # the time left goes by the speed of this run alone
        for job, record in in_parallel(extract, open_jobs, args.workers):
            if record is None:
                record = empty_record([[job[4], "", "unreadable: reading it ended the process"]])
                write_whole(out, jobs[job], json.dumps(record).encode())
            bar.update(len(job[5]))
    finish(args, settings, source, plan)


def finish(args, settings, source, plan):
    """Adds up the clips' records, writes what belongs to the folder as a whole, classes.json last, and prints a summary."""
    out, parts = args.out, args.out / ".parts"
    skipped, totals, train_frames = list(plan["skipped"]), {}, []
    for split in SPLITS:
        total = totals[split] = empty_record([])
        for _, _, clip, _ in (row for row in plan["clips"] if row[0] == split):
            record = json.loads((parts / "records" / split / f"{clip}.json").read_text())
            for key in ("frames", "joints", "skipped"):
                total[key] += record[key]
            for key in ("pixels", "sums", "squares"):
                total[key] = [a + b for a, b in zip(total[key], record[key])]
        skipped += total["skipped"]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("clip", "frame", "reason")] + sorted(skipped, key=lambda row: [str(row[0]), int(row[1] or 0)]))
    write_whole(out, "skipped.csv", table.getvalue().encode(errors="surrogateescape"))
    train = totals["train"]
    if not train["frames"]:
        plan_file, records = parts / "plan.json", parts / "records"
        plan_file.unlink()              # mended clips get another chance
        shutil.rmtree(records)
        raise Problem(f"none of the train frames is usable; {out / 'skipped.csv'} says why")
    for split in SPLITS:
        order = np.argsort(totals[split]["frames"])
        buffer = io.BytesIO()
        np.savez(buffer, frames=np.array(totals[split]["frames"], dtype=str)[order],
                 joints=np.array(totals[split]["joints"], dtype=np.float32).reshape(-1, 24, 2)[order])
        write_whole(out, f"{split}/joints.npz", buffer.getvalue())
    write_whole(out, "preview.png", preview(out, sorted(train["frames"])))
    count = 255 * len(train["frames"]) * args.size ** 2
    mean = [total / count for total in train["sums"]]
    std = [max(1 / 255, math.sqrt(max(0, squares / (255 * count) - m * m))) for squares, m in zip(train["squares"], mean)]
    write_whole(out, "classes.json", as_json(dict(
        names=NAMES, palette=PALETTE, mirror=MIRROR, groups=GROUPS, joint_mirror=[MIRROR[joint + 1] - 1 for joint in range(24)],
        pixels=train["pixels"], size=args.size, mean=mean, std=std, source=source, settings=settings)))
    shutil.rmtree(parts)
    report(args, totals, skipped, plan)


def preview(out, frames, columns=8, tile=160):
    """PNG bytes: crops of up to 16 train frames, of different people as far as there are, above their coloured labels."""
    people = collections.defaultdict(list)
    for frame in frames:                # <subject>_<motion>_c<clip>_<frame>
        people[frame.rsplit("_", 3)[0]].append(frame)
    people = list(people.values())
    counts = share([len(group) for group in people], 2 * columns, np.random.default_rng(0))
    chosen = [group[(2 * i + 1) * len(group) // (2 * count)] for group, count in zip(people, counts) for i in range(count)]
    rows = math.ceil(len(chosen) / columns)
    picture = Image.new("RGB", (columns * tile, rows * 2 * tile), (255, 255, 255))
    for i, frame in enumerate(chosen):
        x, y = i % columns * tile, i // columns * 2 * tile
        with Image.open(out / "train" / "images" / f"{frame}.jpg") as image, \
                Image.open(out / "train" / "labels" / f"{frame}.png") as labels:
            picture.paste(image.resize((tile, tile), Image.LANCZOS), (x, y))
            picture.paste(labels.convert("RGB").resize((tile, tile), Image.LANCZOS), (x, y + tile))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


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
        print("\nskipped (OUT/skipped.csv has each)" + f"{'clips':>9}{'frames':>9}".rjust(20))
        kinds = collections.Counter((str(reason).split(":")[0], frame == "") for _, frame, reason in skipped)
        for kind in sorted({kind for kind, _ in kinds}):
            print(f"  {kind:<34}{kinds[kind, True]:>9}{kinds[kind, False]:>9}")
    print(f"\n{args.out} is ready; {args.out / 'preview.png'} shows some of it")


# ---------------------------------------------------------------------------------------------------------------------
# The stand-in
# ---------------------------------------------------------------------------------------------------------------------

STANDIN = dict(clips=80, frames=25, backgrounds=None)          # about 2,000 train, 200 val and 200 test frames


def synthesize(raw, clips, frames, backgrounds, seed, workers):
    raise Problem("the renderer of the stand-in is not here yet; --raw takes SURREAL's clips")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Errors of one line, exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def whole(low, high):
    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return value
    return convert


def fraction(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 2")
    return value


def parse(argv):
    parser = Parser(prog="prepare_surreal.py", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description="Turns raw SURREAL clips into the images, labels and joints that train.py reads. A run that was "
                                "stopped goes on with the same command; a folder made with other options is never touched.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--raw", type=Path, metavar="DIR", default=argparse.SUPPRESS,
                        help="SURREAL's folder with train, val and test, usually SURREAL/data/cmu")
    source.add_argument("--synthesize", action="store_true", default=False,
                        help="render the stand-in into OUT-raw, in SURREAL's layout, and prepare that")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, default=argparse.SUPPRESS, help="the prepared folder")
    many = 10 ** 9
    group = parser.add_argument_group("which frames")
    group.add_argument("--run", type=int, choices=(0, 1, 2), default=0,
                       help="SURREAL's run: clips that overlap by 50 %%, 70 %% or 30 %%; the paper takes 0")
    group.add_argument("--train", type=whole(1, many), metavar="N", default=90000, help="frames wanted for training")
    group.add_argument("--val", type=whole(0, many), metavar="N", default=15000,
                       help="frames wanted for validation, evenly over all its clips")
    group.add_argument("--test", type=whole(0, many), metavar="N", default=15000,
                       help="frames wanted for testing, never of clips that are in val. A chosen frame that turns out unusable is "
                            "not replaced, so a split may end up a little smaller")
    group.add_argument("--pick", choices=("spread", "cluster"), default="spread",
                       help="spread: the same number from every cluster of poses, evenly over its clips; cluster: the one cluster "
                            "nearest to the wanted size, as the authors did (less varied). A split with fewer frames is taken whole")
    group.add_argument("--clusters", type=whole(1, 1000), metavar="K", default=25, help="clusters of poses")
    group.add_argument("--exclude", nargs="+", metavar="GLOB", default=[],
                       help="leave out clips whose name or sequence matches, such as the misshapen subjects: "
                            "--exclude '18_*' '19_*' '143_21*'")
    group.add_argument("--seed", type=whole(0, 2 ** 63), default=0, help="of the choice; the same command gives the same frames")
    group = parser.add_argument_group("the images")
    group.add_argument("--size", type=whole(8, 4096), metavar="PIXELS", default=320,
                       help="side of the square images; time and disk space grow with its square")
    group.add_argument("--margin", type=fraction, default=0.1, help="added on each side of the person, as a share of its size")
    group = parser.add_argument_group("the stand-in (with --synthesize)")
    group.add_argument("--clips", type=whole(1, 100_000), metavar="N", default=argparse.SUPPRESS,
                       help=f"clips to render for training; val and test get a tenth each (default: {STANDIN['clips']})")
    group.add_argument("--frames", type=whole(1, 999), metavar="N", default=argparse.SUPPRESS,
                       help=f"frames of a clip (default: {STANDIN['frames']})")
    group.add_argument("--backgrounds", type=Path, metavar="DIR", default=argparse.SUPPRESS,
                       help="folder of pictures to put behind the people (default: rooms made up by the program)")
    group = parser.add_argument_group("the machine")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    group.add_argument("--workers", type=whole(0, 1024), metavar="N", default=cores,
                       help="processes that work side by side, each with some 150 MB; 0: none but this one. No effect on the result")
    args = parser.parse_args(argv)
    given = [f"--{name}" for name in ("clips", "frames", "backgrounds") if hasattr(args, name)]
    if given and not args.synthesize:
        parser.error(f"{given[0]} only goes with --synthesize")
    if args.synthesize and args.run != 0:
        parser.error("--synthesize renders run 0; leave --run out")
    return args


def begin(args, settings):
    """Makes OUT ready for a new or a continued run. Returns False where it is finished. Raises Problem where it is not ours."""
    out, parts = args.out, args.out / ".parts"
    if out.exists() and not out.is_dir():
        raise Problem(f"--out {out} is a file; name a folder")
    done, begun = out / "classes.json", parts / "settings.json"
    found = None
    for path in (done, begun):
        if path.is_file() and found is None:
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                found = found["settings"] if path == done else found
                found.keys()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise Problem(f"{path} is not readable as ours; choose another --out or remove {out}") from error
    if found is None:
        if out.is_dir() and {entry.name for entry in os.scandir(out)} - {".parts"}:
            raise Problem(f"--out {out} holds other files; choose a new or empty folder")
        parts.mkdir(parents=True, exist_ok=True)
        write_whole(out, ".parts/settings.json", as_json(settings))
    elif found != settings:
        differing = [key for key in settings | found if settings.get(key) != found.get(key)]
        raise Problem(f"{out} was {'prepared' if done.is_file() else 'begun'} with other settings ("
                      + ", ".join(f"{key} {json.dumps(found.get(key))} there, {json.dumps(settings.get(key))} here" for key in differing)
                      + f"); choose another --out or remove {out}")
    elif done.is_file():
        shutil.rmtree(parts, ignore_errors=True)
        return False
    return True


def main(argv=None):
    """The command line; returns the exit status: 0, 2 for what the user can mend, 1 for the machine's failures."""
    args = parse(argv)
    settings = {key: getattr(args, key) for key in
                ("run", "train", "val", "test", "pick", "clusters", "size", "margin", "exclude", "seed")}
    try:
        if args.synthesize:
            args.raw = args.out.with_name(args.out.name + "-raw")
            options = STANDIN | {key: value for key, value in vars(args).items() if key in STANDIN}
            settings |= {"synthesize": True} | {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
            source = "the stand-in of prepare_surreal.py --synthesize: rendered figures, not SURREAL"
        else:
            if not args.raw.is_dir():
                raise Problem(f"there is no folder --raw {args.raw}; give SURREAL's folder with train, val and test, or --synthesize")
            settings["raw"] = str(args.raw.resolve())
            source = f"SURREAL (Varol et al., 2017), run{args.run}; its left is the visible person's right"
        if not begin(args, settings):
            print(f"{args.out} is already prepared with these settings; remove it to have it made again")
            return 0
        if args.synthesize:
            synthesize(args.raw, seed=args.seed, workers=args.workers, **options)
        prepare(args, settings, source)
    except Problem as problem:
        print(f"prepare_surreal.py: {problem}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"prepare_surreal.py: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}; what is done is "
              "kept, and the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_surreal.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
