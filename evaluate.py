"""Measures trained networks, compares them, and segments your own pictures.

Everything rests on one matrix: confusion[true, predicted] counts the pixels of class `true` that
the network took for `predicted`, at the size of the prepared labels, without the pixels labelled
255 ("ignore"). Sums of these matrices give every measure in the paper. The main one is mIoU, the
mean over classes of the intersection over union: the pixels that are of a class in truth and
prediction, divided by those that are in either. A class that occurs in neither is skipped.

The file goes from the metrics to the prepared folder that they are taken on, to tables and
pictures, and then to what only the machine needs: devices, checkpoints and the command line.
"""
import argparse
import glob
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, figure, patches
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset
from tqdm import tqdm

from hourglass import StackedHourglass
from icnet import ICNet
from segnet import SegNet

MODELS = {"icnet": ICNet, "segnet": SegNet, "hourglass": StackedHourglass}
IGNORE = 255        # label of pixels that count nowhere
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# The figures of scores() and their titles. The paper calls two of them F1.
FIGURES = dict(
    miou="mIoU",
    accuracy="accuracy",
    class_accuracy="accuracy, mean over classes",
    f1="F1, mean over classes",
    body_f1="F1, body against background",
)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # huge pages save ICNet a fifth of its time
# NaN means "unknown" here. Matplotlib would warn for every Chinese letter that its font lacks.
warnings.filterwarnings("ignore", "Mean of empty slice|All-NaN slice|Glyph .* missing")


class Problem(Exception):
    """Something the user can mend: one sentence that names the value and the way out."""


# ---- Metrics

def confusion_matrices(prediction, labels, K):
    """Counts of (true class, predicted class), one matrix for every image.

    prediction (B, H, W) int64 and labels (B, H, W) uint8 -> (B, K, K) int64, [image, true,
    predicted]. Pixels labelled 255 are left out: they fall into an extra row K, which is cut off.

    Example, one image of four pixels and K = 2:   labels     [0, 1, 1, 255]
                                                   prediction [0, 1, 0,   1]
    Row and column of a pixel become one number, row * K + column: 0, 3, 2, 5. Counted with
    bincount over (K + 1) * K = 6 cells, they give [1, 0, 1, 1, 0, 1], as a matrix
        [[1, 0],       one background pixel, found
         [1, 1],       two pixels of class 1, one missed and one found
         [0, 1]]       row K: the ignored pixel
    """
    # 255 becomes K, the number of the extra row that is cut off in the last line.
    row = labels.long().clamp(max=K)
    cells = (row * K + prediction).flatten(1)       # (B, H W)
    counts = [torch.bincount(image, minlength=(K + 1) * K) for image in cells]
    return torch.stack(counts).view(-1, K + 1, K)[:, :K]


@np.errstate(invalid="ignore")          # 0 / 0 is NaN, "unknown"
def scores(confusion):
    """Every figure of the paper from confusion matrices (..., K, K).

    Returns a dict: those of FIGURES, (...) float64 from 0 to 1; and iou, class_f1 and recall of
    each class, (..., K). With TP, FP, FN the true positive, false positive and false negative
    pixels of a class, IoU = TP / (TP + FP + FN) and F1 = 2 TP / (2 TP + FP + FN) count where the
    class occurs in truth or prediction, its recall (which the paper calls accuracy) where it is
    true. body_f1 takes all classes but 0, the background, as one.
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    tp = np.diagonal(confusion, 0, -2, -1)
    true = confusion.sum(-1)            # TP + FN
    predicted = confusion.sum(-2)       # TP + FP
    iou = tp / (true + predicted - tp)
    class_f1 = 2 * tp / (true + predicted)
    recall = tp / true
    body_tp = confusion[..., 1:, 1:].sum((-2, -1))
    body_sum = (true + predicted)[..., 1:].sum(-1)
    return dict(
        iou=iou,
        class_f1=class_f1,
        recall=recall,
        miou=np.nanmean(iou, -1),
        accuracy=tp.sum(-1) / true.sum(-1),
        class_accuracy=np.nanmean(recall, -1),
        f1=np.nanmean(class_f1, -1),
        body_f1=2 * body_tp / body_sum,
    )


def merge_classes(confusion, merge):
    """(..., K, K) -> (..., M, M): confusion matrices of coarser classes.

    merge: coarse name -> its ids. A left hand that was taken for left fingers is right when both
    are "left hand": the rows and the columns of a coarse class are added up.
    """
    # Row m of belongs marks the ids of coarse class m: [0, 2] of K = 4 is 1 0 1 0. Multiplied from
    # the left it adds rows, from the right columns.
    one_hot = np.eye(confusion.shape[-1], dtype=np.int64)
    belongs = np.stack([one_hot[ids].sum(0) for ids in merge.values()])     # (M, K) of 0 and 1
    return belongs @ confusion @ belongs.T


def bootstrap(confusions, other=None):
    """Half widths of the 95 % intervals of all FIGURES, or of their differences to `other`.

    The bootstrap (Efron 1979) asks how far a figure would move with other frames of the same kind:
    it draws as many groups as there are, with replacement, computes the figure again, and does so
    a thousand times. Whole groups are drawn, because the frames of one video are much alike.
    confusions, other: (G, K, K) int64, one per group. Returns a dict of floats, NaN for one group.
    """
    G = len(confusions)
    rng = np.random.default_rng(0)
    # times_drawn[d, g]: how often draw d holds group g. Its product with the matrices of the groups
    # is the matrix of each draw.
    times_drawn = rng.multinomial(G, [1 / G] * G, size=1000)        # (draws, G)
    times_drawn = times_drawn.astype(float)
    values = scores(np.tensordot(times_drawn, confusions, 1))       # of (draws, K, K) matrices
    if other is not None:
        others = scores(np.tensordot(times_drawn, other, 1))
        values = {key: values[key] - others[key] for key in FIGURES}
    half_widths = {}
    for key in FIGURES:
        low, high = np.nanpercentile(values[key], (2.5, 97.5))
        half_widths[key] = (high - low) / 2 if G > 1 else np.nan
    return half_widths


def paired_difference(one, other):
    """mIoU of `one` minus that of `other` (both (G, K, K), the same frames), and its half width.

    What is hard for one network is hard for the other too, so the interval of the difference is
    narrower than the two intervals suggest.
    """
    miou = scores(one.sum(0))["miou"]
    other_miou = scores(other.sum(0))["miou"]
    return float(miou - other_miou), bootstrap(one, other)["miou"]


class Predictor:
    """A network on `device` at a precision, with what evaluation takes from its checkpoint.

    logit_weights w: K floats, or None. A network trained on logits * w also predicts from these.
    """

    def __init__(self, checkpoint, network, device, precision):
        self.memory_format = layout(network, device, precision)
        self.network = network.to(device, memory_format=self.memory_format)
        self.classes = checkpoint["classes"]
        self.settings = checkpoint["settings"]
        self.logit_weights = checkpoint["logit_weights"]
        self.device = device
        self.precision = precision

    @torch.no_grad()
    def __call__(self, images, size):
        """(B, 3, H, W) uint8 -> prediction (B, *size) int64, logits (B, K, *size) float32."""
        size = tuple(size)
        images = normalise(images.to(self.device), self.classes, self.memory_format)
        with autocast(self.device, self.precision):
            logits = self.network(images)
        logits = logits.float()
        if logits.shape[2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear")
        if self.logit_weights is not None:
            weights = torch.tensor(self.logit_weights, device=self.device)
            logits = logits * weights.view(-1, 1, 1)
        prediction = logits.max(1).indices      # argmax(1) is up to four times slower on the CPU
        return prediction, logits


def evaluate_frames(predict, batches, groups, criterion=None):
    """Predicts every frame and counts, without keeping a matrix for each of them.

    predict: a Predictor. batches: a reader(). groups: (N,) ints, the group 0..G-1 of each frame in
    the order of the batches. criterion: train.py's; totals(logits, labels) -> (sum, count).
    Returns confusions (G, K, K) int64, frame_miou (N,) float64, and the mean loss (NaN without a
    criterion).
    """
    K = len(predict.classes["names"])
    confusions = np.zeros((max(groups) + 1, K, K), np.int64)
    frame_miou = []
    loss = np.zeros(2)      # sum and count
    for batch in progress(iterable=batches, unit=" batches", leave=False):
        batch = to_device(batch, predict.device)
        labels = batch["labels"]
        prediction, logits = predict(batch["images"], labels.shape[1:])
        matrices = confusion_matrices(prediction, labels, K).cpu().numpy()
        # len(frame_miou) frames were counted before this batch.
        for group, matrix in zip(groups[len(frame_miou):], matrices):
            confusions[group] += matrix
        frame_miou.extend(scores(matrices)["miou"])
        if criterion:
            loss += [float(part) for part in criterion.totals(logits, labels)]
    mean_loss = loss[0] / max(loss[1], 1) if criterion else np.nan
    return confusions, np.array(frame_miou), mean_loss


# ---- The prepared folder

def check_classes(classes):
    """Raises ValueError, TypeError or LookupError for entries of classes.json that are wrong."""
    names = classes["names"]
    K = len(names)
    if not isinstance(names, list) or not 2 <= K <= IGNORE:
        raise ValueError(f'"names" has to be a list of 2 to {IGNORE} names, from id 0 on')
    # The shape, the lowest number, and the range of the largest one, which shows the unit: means of
    # 0 to 255 and palettes of 0 to 1 are the usual mistakes. Images are divided by the std.
    expected = dict(
        palette=((K, 3), 0, 2, 255),
        mirror=((K,), 0, K - 1, K - 1),
        mean=((3,), 0, 0, 1),
        std=((3,), 0.0001, 0, 1),
    )
    for key, (shape, lowest, low, high) in expected.items():
        values = np.array(classes[key])
        numbers = np.issubdtype(values.dtype, np.number) and values.shape == shape
        if not numbers or values.min() < lowest or not low <= values.max() <= high:
            raise ValueError(f'"{key}" has to be a list of shape {shape}, of numbers from {lowest} '
                             f"whose largest is from {low} to {high}, not {str(classes[key])[:80]}")
    if not isinstance(classes["size"], int):
        raise ValueError(f'"size" has to be a whole number, not {classes["size"]!r}')
    for key in ("mirror", "joint_mirror"):
        mirror = classes[key] or []
        # Mirrored twice, a picture is itself: the inverse, which argsort gives, is the mirror.
        if np.argsort(mirror).tolist() != mirror:
            raise ValueError(f'"{key}" has to lead from left to right and back: {mirror}')
    known = set(range(K))
    for key in ("groups", "merge"):
        groups = classes[key]
        if not isinstance(groups, dict) or not all(map(known.issuperset, groups.values())):
            raise ValueError(f'"{key}" has to be like {{"arms": [1, 2]}} with ids from 0 to '
                             f"{K - 1}, not {groups}")


def read_classes(data, count=False):
    """The checked content of DATA/classes.json, with defaults for all but `names`.

    count: add size, pixels (K ints), mean and std (RGB, 0 to 1) of the train split. They are
    counted on first use, and again when the classes, the number of frames or a label has changed.
    A mean and std that the user wrote are kept, but pixels are believed only of this function and
    of prepare_surreal.py. Raises Problem for a missing or unfinished folder and for wrong values.
    """
    path = Path(data) / "classes.json"
    if not path.is_file():
        raise Problem(f"{data} is missing or unfinished: name other --data, run prepare_surreal.py "
                      f'or write your own {path}: {{"names": ["background", ...]}}')
    try:
        stored = json.loads(path.read_bytes())      # the error names line and column
        names = stored["names"]
        if isinstance(names, dict) and all(map(str.isdigit, names)):    # {"0": "sky", "1": "cat"}
            stored["names"] = [names[key] for key in sorted(names, key=int)]
        K = len(stored["names"])
        shades = np.linspace(0, 0.95, K)
        palette = colormaps["nipy_spectral"](shades, bytes=True)
        defaults = dict(
            palette=palette[:, :3].tolist(),
            mirror=list(range(K)),
            joint_mirror=None,
            groups={},
            merge={},
            mean=[0.5] * 3,
            std=[0.25] * 3,
            size=0,     # the first picture's
            settings={},
            source=f"own data, {data}",
        )
        classes = defaults | stored
        check_classes(classes)
    except (ValueError, TypeError, LookupError) as error:
        raise Problem(f"{path} cannot be right: {error}") from error
    # prepare_surreal.py leaves its settings, and has counted. The counts of own data hold for as
    # many classes and frames, and for labels that were written at the same times.
    if count and not classes["settings"]:
        train = Split(data, "train", classes)
        times = map(os.path.getmtime, train.labels.values())
        basis = [K, len(train.frames), sum(times)]
        if stored.get("counts", {}).get("basis") != basis:
            stored["counts"] = dict(basis=basis, **count_pixels(train))
            beside = path.with_suffix(f".{os.getpid()}")    # torchrun's processes count at once
            try:
                beside.write_text(json.dumps(stored, indent=1), encoding="utf-8")
                os.replace(beside, path)
            except OSError as error:
                print(f"{path} cannot be written ({error.strerror}): its counts are not kept")
        counts = stored["counts"]
        classes = defaults | counts | stored
        classes["pixels"] = counts["pixels"]
    return classes


def count_pixels(split):
    """Their side, label pixels of each class (K ints), mean and std of RGB in 0..1."""
    K = len(split.classes["names"])
    count = len(split.frames)
    pixels = np.zeros(IGNORE + 1, np.int64)
    mean, square = np.zeros((2, 3))
    for frame in progress(iterable=split.frames, desc="counting labels: "):
        image, label = split.load_frame(frame)
        values = image.reshape(-1, 3) / 255
        mean += values.mean(0) / count
        square += (values ** 2).mean(0) / count
        pixels += np.bincount(label.ravel(), minlength=IGNORE + 1)
    pixels = pixels[:K].tolist()
    if pixels.count(0) >= K - 1:
        raise Problem(f"{split.folder}/labels show one class. 255 means ignore, so a mask of 0 and "
                      "255 has to become one of 0 and 1")
    variance = np.maximum(square - mean ** 2, 1e-6)
    return dict(
        size=split.prepared,
        pixels=pixels,
        mean=mean.tolist(),
        std=np.sqrt(variance).tolist(),
    )


def find_files(folder, pattern="*", endings=PICTURES):
    """Sorted paths that fit the pattern and end so, in linked folders too (which rglob skips), but
    without hidden files (macOS leaves "._" ones)."""
    names = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
    return [Path(folder, name) for name in names if name.lower().endswith(endings)]


def composed(name):
    """macOS stores an accent as a character of its own (NFD), others do not (NFC)."""
    return unicodedata.normalize("NFC", name)


def frames_in(folder, endings=PICTURES):
    """Frame name -> path of its picture. Raises Problem for a.jpg beside a.png."""
    frames = {}
    for path in find_files(folder, endings=endings):
        first = frames.setdefault(composed(path.stem), path)
        if first != path:
            raise Problem(f"{first} and {path} have one name: rename or remove one")
    return frames


def group_of(frame):
    """SURREAL's sequence, 01_01 for 01_01_c0001_037 and ung_01_01_c0001_037: its neighbouring clips
    share half their poses. For other names, the name without the number of the frame: walk for
    walk_0001, walk-1 and walk0001. prepare_surreal.py has the same rule, as it imports nothing from
    here."""
    sequence = re.fullmatch(r"(?:ung_)?(\d{2,4}_\d{2})_c\d+_\d+", frame)
    return sequence[1] if sequence else re.sub(r"[-_. ]?\d+$", "", frame)


def shared_groups(data, splits=("val", "test")):
    """Sorted names of the groups of these splits that train has too, [] if none. (SURREAL's val and
    test share sequences, of which they have different clips.)"""
    groups = {}
    for split in ("train", *splits):
        frames = frames_in(Path(data) / split / "images")
        groups[split] = {group_of(frame) for frame in frames}
    train = groups.pop("train")
    others = set().union(*groups.values())
    if len(train | others) == 1:        # no videos: all pictures are called IMG, for example
        return []
    return sorted(train & others)


def open_picture(path, side=None, size=None):
    """A decoded PIL image, turned upright as its EXIF says.

    side: the width and height that it has to have, or None for any. size: the side to which it will
    be shrunk. A JPEG of twice that is decoded at half its size or less, which takes half the time.
    Raises Problem naming the file.
    """
    try:
        image = Image.open(path)
        if image.mode[0] in "IF":       # which convert("RGB") would clip to 255
            raise ValueError("more than 8 bits a channel")
        width, height = image.size
        if size:
            image.draft("RGB", (size, size))
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
    except Exception as error:          # a garbled file makes Pillow stumble in any way
        raise Problem(f"{path} is no readable picture ({error}): mend or remove it") from error
    if side and (width, height) != (side, side):
        raise Problem(f'{path} has {width}x{height} pixels, not {side}x{side}: README, "Your own"')
    return image


class Split(Dataset):
    """The frames of one split of a prepared folder: split[[3, 5]] loads a batch of two.

    Images get the side `size` (default: as prepared). Labels keep the prepared size, at which
    metrics are taken, unless `labels_at_size` (training). Raises Problem where an image or label is
    missing.
    """

    def __init__(self, data, split, classes, size=None, labels_at_size=False):
        self.folder = Path(data) / split
        self.classes = classes
        self.images = frames_in(self.folder / "images")
        self.labels = frames_in(self.folder / "labels", ".png")     # JPEG would blur ids
        self.frames = sorted(self.images)
        if not self.frames:
            raise Problem(f"{data} has no split {split!r}: no pictures in {self.folder}/images")
        unlabelled = sorted(self.images.keys() - self.labels.keys())
        if unlabelled:
            raise Problem(f"{self.images[unlabelled[0]]} has no label {self.folder}/labels/"
                          f"{unlabelled[0]}.png ({len(unlabelled)} images have none)")
        self.groups = [group_of(frame) for frame in self.frames]
        if len(set(self.groups)) == 1:
            self.groups = self.frames
        first_image = self.images[self.frames[0]]
        self.prepared = classes["size"] or open_picture(first_image).width
        self.size = size or self.prepared
        self.label_size = self.size if labels_at_size else self.prepared
        self.kept = None
        joints = self.folder / "joints.npz"
        self.joints = self.read_joints(joints) if joints.is_file() else None

    def read_joints(self, path):
        """(frames, J, 2) float32, x and y in pixels of the prepared images, NaN where unknown."""
        stored = np.load(path)
        names = map(composed, stored["frames"])
        known = dict(zip(names, stored["joints"]))
        if not known.keys() & self.images.keys():
            raise Problem(f"{path} has joints of no frame in {self.folder}/images")
        unknown = np.full_like(stored["joints"][0], np.nan)
        mirror = self.classes["joint_mirror"] or unknown
        if len(mirror) != len(unknown):
            raise Problem(f'"joint_mirror" has {len(mirror)} entries, unlike the joints of {path}')
        return np.float32([known.get(frame, unknown) for frame in self.frames])

    def __getitem__(self, indices):
        """Images (B, 3, S, S) and labels (B, L, L) uint8, joints (B, J, 2) float32 in pixels of the
        images, if known."""
        pairs = [self.load_kept(index) for index in indices]
        images, labels = zip(*pairs)
        images = torch.from_numpy(np.stack(images))
        batch = dict(
            images=images.permute(0, 3, 1, 2),      # channels last in memory
            labels=torch.from_numpy(np.stack(labels)),
        )
        if self.joints is not None:     # whole numbers are the centres of pixels
            scale = self.size / self.prepared
            joints = (self.joints[list(indices)] + 0.5) * scale - 0.5
            batch["joints"] = torch.from_numpy(joints)
        return batch

    def keep(self, workers):
        """From now on a frame is decoded once. A quick run takes each of 2,000 small ones ten times
        and decoding costs a CPU a tenth of its time. Not where all would take half a GB or more,
        nor where several workers would each keep their own."""
        N = len(self.frames)
        if workers < 2 and N * (3 * self.size ** 2 + self.label_size ** 2) < 2 ** 29:
            images = np.zeros((N, self.size, self.size, 3), np.uint8)
            labels = np.zeros((N, self.label_size, self.label_size), np.uint8)
            self.kept = images, labels, np.zeros(N, bool)

    def load_kept(self, index):
        """What load_frame gives for the frame with that index; from memory, if it is kept."""
        if self.kept is None:
            return self.load_frame(self.frames[index])
        images, labels, known = self.kept
        if not known[index]:
            images[index], labels[index] = self.load_frame(self.frames[index])
            known[index] = True
        return images[index], labels[index]

    def load_frame(self, frame):
        """Image (S, S, 3) and label (L, L), uint8. Raises Problem naming the file."""
        image = open_picture(self.images[frame], self.prepared, self.size).convert("RGB")
        image = image.resize((self.size, self.size), Image.BILINEAR)    # averages where it shrinks
        path = self.labels[frame]
        label = open_picture(path, self.prepared)
        if label.mode not in ("P", "L"):
            raise Problem(f'{path} has to be a grey or palette PNG of ids: README, "Your own"')
        label = np.asarray(label.resize((self.label_size, self.label_size), Image.NEAREST))
        K = len(self.classes["names"])
        unknown = label[(label >= K) & (label != IGNORE)]
        if unknown.size:
            raise Problem(f"{path} has the label {unknown[0]}: classes are 0 to {K - 1}, or 255")
        return np.asarray(image), label


def ignore_signals(worker):
    """Ctrl-C, a scheduler's SIGTERM and a lost connection reach the readers too, but the main
    process still needs their images to finish its step. They end with it."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):       # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def reader(dataset, chunks, workers, device, persistent=False):
    """A DataLoader of dataset[chunk] for every chunk (a list of indices), in order, on the CPU.

    workers: processes that read ahead; 0: this one reads. persistent: they live on after the last
    chunk, because to start one imports torch again. For CUDA the batches are in pinned memory,
    from which they are copied while the device computes.
    """
    return DataLoader(dataset, batch_size=None, sampler=chunks, num_workers=workers,
                      persistent_workers=persistent and workers > 0,
                      pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)


def reader_count(workers, device):
    """How many processes read images: `workers`, if that is not None. A GPU is fed by every core
    that torchrun's processes on this machine can have each, at most 16; a CPU needs them to train.
    """
    if workers is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = os.cpu_count()
        if hasattr(os, "sched_getaffinity"):        # a scheduler may have left it fewer
            cores = len(os.sched_getaffinity(0))
        return min(max(cores // processes, 1), 16) if device.type == "cuda" else 1
    if workers < 0:
        raise Problem(f"--workers has to be 0 or more, not {workers}")
    return workers


def to_device(batch, device):
    """The batch on `device`, without waiting for the copy."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def normalise(images, classes, memory_format=torch.channels_last):
    """(B, 3, H, W) uint8 -> (x / 255 - mean) / std, float32, in one pass."""
    moments = torch.tensor([classes["mean"], classes["std"]])
    moments = moments.to(images.device, non_blocking=True)
    mean, std = moments.view(2, 1, 3, 1, 1)
    # -mean / std + x / (255 std) = (x / 255 - mean) / std
    normalised = torch.addcmul(-mean / std, images, 1 / (255 * std))
    return normalised.contiguous(memory_format=memory_format)


# ---- Progress and tables

def progress(**settings):
    """tqdm(**settings): a bar on a terminal; elsewhere, in a log file, a line every 20 seconds."""
    if not sys.stderr.isatty():
        line = "{desc}{n_fmt} of {total_fmt}{unit}, {rate_fmt}, {remaining} left{postfix}\n"
        settings |= dict(file=sys.stdout, mininterval=20, delay=20, miniters=1, bar_format=line)
    return tqdm(**settings)


def percent(value, half=np.nan, digits=1):
    """0.4512, 0.003 -> "45.1 +- 0.3"; "-" for what is unknown."""
    if np.isnan(value):
        return "-"
    interval = "" if np.isnan(half) else f" +- {100 * half:.{digits}f}"
    return f"{100 * value:.{digits}f}{interval}"


def markdown(rows):
    """A Markdown table, padded so that it reads in a terminal too; the first row is its head."""
    widths = [max(map(len, map(str, column))) for column in zip(*rows)]
    rule = ["-" * width for width in widths]
    text = ""
    for row in [rows[0], rule, *rows[1:]]:
        cells = [str(cell).ljust(width) for cell, width in zip(row, widths)]
        text += f"| {' | '.join(cells)} |\n"
    return text


def report_column(run):
    """title -> cell: the figures of one run of measure()."""
    figures = scores(run["confusions"].sum(0))
    half_widths = bootstrap(run["confusions"])
    column = {"%": run["name"], "image size": run["split"].size}
    for key, title in FIGURES.items():
        column[title] = percent(figures[key], half_widths[key])
    for group, ids in run["classes"]["groups"].items():
        column[f"accuracy: {group}"] = percent(np.nanmean(figures["recall"][ids]))
    return column


def class_table(title, names, confusion):
    """Markdown: the figures of every class, and their means in the last row."""
    figures = scores(confusion)
    rows = [(title, "IoU", "F1", "accuracy")]
    columns = (figures["iou"], figures["class_f1"], figures["recall"])
    table = np.stack(columns, 1)        # (K, 3)
    means = np.nanmean(table, 0)
    for name, values in zip([*names, "mean"], [*table, means]):
        rows.append((name, *map(percent, values)))
    return "\n" + markdown(rows)


def report_text(runs, per_class=True):
    """Markdown: a column for each run of measure(), comparisons, and tables of classes."""
    classes = runs[0]["classes"]
    split = runs[0]["split"]
    columns = [report_column(run) for run in runs]
    titles = columns[0].keys()
    cells = [column.values() for column in columns]
    kind = "every frame is one" if split.groups == split.frames else "sequences or videos"
    lines = [
        f"**{classes['source']}**: {len(split.frames)} images of {split.folder}, "
        f"{len(set(split.groups))} groups ({kind})\n",
        markdown([*zip(titles, *cells)]),
        "+-: half the 95 % interval over the choice of groups, not of the training seed.",
    ]
    shared = shared_groups(split.folder.parent, [split.folder.name])
    if shared:
        lines.append(f"{len(shared)} groups are in train too, {shared[0]} for example, so these "
                     "figures are too good for new data.")
    for one, other in itertools.combinations(runs, 2):
        difference = paired_difference(one["confusions"], other["confusions"])
        points = percent(*difference, digits=2)
        lines.append(f"{one['name']} against {other['name']}: {points} points of mIoU, paired.")
    for run in runs:
        confusion = run["confusions"].sum(0)
        if per_class:
            lines.append(class_table(f"{run['name']}, %", classes["names"], confusion))
        if classes["merge"]:
            merged = merge_classes(confusion, classes["merge"])
            lines.append(class_table(f"{run['name']}, merged, %", classes["merge"], merged))
    return "\n".join(lines)


# ---- Pictures

def colours(labels, palette):
    """labels (..., H, W) integers -> (..., H, W, 3) uint8; 255, "ignore", is light grey."""
    table = np.full((IGNORE + 1, 3), 224, np.uint8)
    table[:len(palette)] = palette
    return table[labels]


def draw_grid(path, rows, classes, side=3):
    """Rows (name, pictures (H, W, 3) uint8) above a legend of the classes. side: in inches."""
    across = len(rows[0][1])
    width = side * across
    columns = width // 2                # of the legend, four lines of which take an inch
    legend = len(classes["names"]) / columns / 4 + 1
    sheet = figure.Figure((width, side * len(rows) + legend), dpi=110, layout="constrained")
    grid = sheet.subplots(len(rows), across, squeeze=False)
    for line, (name, pictures) in zip(grid, rows):
        line[0].set_ylabel(name)
        for axes, picture in zip(line, pictures):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
    handles = []
    for name, colour in zip(classes["names"], classes["palette"]):
        handles.append(patches.Patch(color=np.array(colour) / 255, label=name))
    sheet.legend(
        handles=handles,
        title=classes["source"],
        loc="outside lower center",
        ncols=columns,
    )
    sheet.savefig(path)


def draw_examples(path, runs):
    """Six frames, from the first network's best mIoU to its worst: photo, ground truth, and a row
    for each network."""
    split = runs[0]["split"]
    classes = runs[0]["classes"]
    best_first = np.argsort(-runs[0]["frame_miou"])
    last = len(best_first) - 1
    places = np.linspace(0, last, min(6, last + 1))
    chosen = best_first[places.astype(int)]
    batch = split[chosen]
    labels = batch["labels"].numpy()
    photos = batch["images"].permute(0, 2, 3, 1).numpy()
    rows = [("photo", photos), ("ground truth", colours(labels, classes["palette"]))]
    for run in runs:
        images = run["split"][chosen]["images"]
        prediction, _ = run["predict"](images, labels.shape[1:])
        ids = prediction.cpu().numpy()
        rows.append((run["name"], colours(ids, classes["palette"])))
    draw_grid(path, rows, classes)


def fitted(image, side):
    """The PIL image with its longer side `side`; the shorter one keeps at least a pixel."""
    scale = side / max(image.size)
    size = [max(1, round(length * scale)) for length in image.size]
    return image.resize(size, Image.BILINEAR)


def find_pictures(entries):
    """The files among `entries` and the pictures at any depth in its folders, as absolute paths."""
    files = []
    for entry in map(os.path.abspath, entries):
        files += find_files(entry, "**/*") or [entry]
    if not any(map(os.path.isfile, files)):
        raise Problem(f"--images {' '.join(entries)}: no picture is there")
    return files


def segment(predict, files, out):
    """Writes <file>-overlay.png and <file>-labels.png of pictures of any size into the folder
    `out`, where they keep their folders, because two of these can have a 1.jpg. A broken picture is
    reported and skipped; the exit status is then 1, else 0."""
    classes = predict.classes
    size = predict.settings["size"] or classes["size"]
    palette = colours(np.arange(IGNORE + 1), classes["palette"])        # of all labels
    common = os.path.commonpath(map(os.path.dirname, files))
    status = 0
    for file in files:
        try:
            image = open_picture(file).convert("RGB")
        except Problem as problem:
            print(problem)
            status = 1
            continue
        pixels = np.array(fitted(image, size))      # as large as in training
        pixels = torch.from_numpy(pixels).permute(2, 0, 1)
        photo = np.array(fitted(image, 1024))       # to look at
        prediction, _ = predict(pixels[None], photo.shape[:2])
        ids = prediction[0].byte().cpu().numpy()
        overlay = photo // 2 + palette[ids] // 2
        result = Path(out) / os.path.relpath(file, common)
        result.parent.mkdir(parents=True, exist_ok=True)
        draw_grid(f"{result}-overlay.png", [("", [photo, overlay])], classes, side=8)
        labels = Image.fromarray(ids).resize(image.size, Image.NEAREST)
        labels.putpalette(palette.tobytes())
        labels.save(f"{result}-labels.png")
        print(f"{file}: {result}-overlay.png, -labels.png")
    return status


# ---- Devices

def cpu_has(instructions):
    """Whether this CPU has "avx512_f", "avx512_bf16", ...; False where torch (2.11) cannot tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    return torch.cpu.get_capabilities().get(instructions, False)


def fastest_precision(device):
    """bf16 where the hardware has it; fp16 on CUDA cards before Ampere, which have no bf16."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu" and (cpu_has("avx512_bf16") or cpu_has("amx_bf16")):
        return "bf16"
    return "fp32"


def pick_device(name="auto", precision="auto"):
    """(torch.device, "fp32", "bf16" or "fp16"). auto: CUDA where there is one, else the CPU, and
    the fastest precision there. (torch warns where the driver is too old for it.) Raises Problem
    for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise Problem(f"--device {name} cannot be used here: auto and cpu always can") from error
    fastest = fastest_precision(device)
    if precision == "auto":
        precision = fastest
    if device.type == "cpu" and precision not in ("fp32", fastest):
        print(f"This CPU computes {precision} about ten times slower than fp32.", file=sys.stderr)
    return device, precision


def layout(network, device, precision):
    """The torch.memory_format in which the network is fast and right: channels last, but for three
    kinds of convolutions on a CPU.

    In float32 without AVX-512, the gradient of a 7x7 convolution's weights takes twice as long in
    it, and that of a strided 1x1 convolution's is wrong where the input has fewer than 8 channels
    (torch 2.13.0; ICNet of a 20th of the width). And in bf16 the gradient of a dilated
    convolution's weights is wrong in it where the input's channels are more than 16 and no multiple
    of 16: oneDNN then reads memory that nobody has written (findings/bf16-weight-gradient.sh).
    """
    if device.type != "cpu":
        return torch.channels_last
    has_7x7 = has_odd_dilated = has_narrow_strided = False
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            channels = layer.in_channels
            if layer.kernel_size == (7, 7) and channels > 3:
                has_7x7 = True
            if layer.dilation > (1, 1) and channels > 16 and channels % 16 > 0:
                has_odd_dilated = True
            if layer.kernel_size == (1, 1) and layer.stride > (1, 1) and channels < 8:
                has_narrow_strided = True
    without_avx512 = not cpu_has("avx512_f")
    slow = has_7x7 and precision == "fp32" and without_avx512
    wrong = has_narrow_strided and without_avx512 or has_odd_dilated and precision == "bf16"
    return torch.contiguous_format if slow or wrong else torch.channels_last


def autocast(device, precision):
    """The context in which a forward pass computes at that precision; none for fp32."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtypes.get(precision), enabled=precision in dtypes)


# ---- Checkpoints

def newest(folder, name):
    """Paths of all files called `name` in `folder` or below, newest first."""
    paths = find_files(folder, f"**/{name}", name)
    return sorted(paths, key=os.path.getmtime, reverse=True)


def find_checkpoint(path):
    """The file `path`, or the newest best.pt in that folder. Raises Problem for none."""
    if Path(path).is_file():
        return Path(path)
    best = newest(path, "best.pt")
    if best:
        return best[0]
    last = newest(path, "last.pt")
    if last:
        raise Problem(f"there is no best.pt in {path}, as nothing was validated: name {last[0]}")
    raise Problem(f"there is no checkpoint {path} or best.pt in it: train one (train.py --help)")


def load_checkpoint(path):
    """(checkpoint of train.py, its network in eval()). Raises Problem for a file that is damaged or
    something else. weights_only: no code in the file is run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        network = MODELS[checkpoint["model"]](**checkpoint["kwargs"])
        network.load_state_dict(checkpoint["weights"])
    except Exception as error:          # a garbled file can raise anything
        raise Problem(f"{path} is no usable checkpoint of train.py ({error!r:.150})") from error
    return checkpoint, network.eval()


def fold_batch_norms(network):
    """Merges each batch normalisation of an eval() network into the convolution before it.

    Evaluation subtracts a channel's stored mean, divides by its deviation, multiplies and adds: two
    constants a and b with a * x + b. A convolution whose kernels are multiplied by a, and whose
    bias is b, gives the same, up to rounding, and saves a pass over the map.
    """
    for block in network.modules():
        if not isinstance(block, nn.Sequential):
            continue
        for place in range(len(block) - 1):
            conv = block[place]
            norm = block[place + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                block[place] = nn.utils.fuse_conv_bn_eval(conv, norm)
                block[place + 1] = nn.Identity()


def load_predictor(path, device, precision):
    """A Predictor with the checkpoint's network, made faster. Raises Problem."""
    checkpoint, network = load_checkpoint(path)
    fold_batch_norms(network)
    return Predictor(checkpoint, network, *pick_device(device, precision))


def measure(path, split, data=None, device="auto", precision="auto", batch_size=None, workers=None):
    """One checkpoint on one split: what reports and pictures need, as a dict."""
    path = Path(path)
    predict = load_predictor(path, device, precision)
    data = data or predict.settings["data"]
    classes = read_classes(data)
    if classes["names"] != predict.classes["names"]:
        raise Problem(f"{data} has other classes than {path}: name other data with --data")
    size = predict.settings["size"] or predict.classes["size"]
    frames = Split(data, split, classes, size)
    if batch_size is None:      # the maps of more than two images leave a CPU's cache
        batch_size = 32 if predict.device.type == "cuda" else 2
    chunks = BatchSampler(range(len(frames.frames)), batch_size, drop_last=False)
    workers = reader_count(workers, predict.device)
    batches = reader(frames, chunks, workers, predict.device)
    # codes: the group of each frame as 0, 1, 2 ... Above 1,000 groups, group 1,000 is drawn
    # together with group 0: a thousand matrices take 180 MB for 150 classes, and the intervals are
    # alike.
    _, codes = np.unique(frames.groups, return_inverse=True)
    confusions, frame_miou, _ = evaluate_frames(predict, batches, codes % 1000)
    return dict(
        name=str(path.with_suffix("")),
        predict=predict,
        split=frames,
        classes=classes,
        confusions=confusions,
        frame_miou=frame_miou,
    )


# ---- Command line

def run_command(program, function):
    """Ends the process with the status of function(); with 2 after one sentence on what a user can
    mend or a machine runs out of; with 130 after Ctrl-C. A bug keeps its traceback."""
    def stop(status, message):
        print(f"{program}: {message}", file=sys.stderr)
        sys.exit(status)

    sys.stdout.reconfigure(errors="backslashreplace")       # names of files that are not UTF-8
    try:
        sys.exit(function())
    except KeyboardInterrupt:
        stop(130, "stopped by Ctrl-C")
    except (Problem, OSError) as error:     # a reader's traceback ends in "Problem: ..."
        stop(2, (str(error) or repr(error)).splitlines()[-1].split("Problem: ")[-1])
    except RuntimeError as error:
        text = str(error)
        if "out of memory" in text or "allocate memory" in text:
            stop(2, "out of memory: try --device cpu or, in training, a smaller --batch-size or "
                    "--size")
        if "DataLoader worker (pid" in text:
            stop(2, "a process that reads images was killed, often because /dev/shm or the memory "
                    "is too small: try fewer --workers, or 0")
        raise
    finally:
        end_readers()


def end_readers():
    """Kills the readers that an error left behind: they ignore SIGTERM, with which Python would try
    to end them at exit, and it would wait for ever."""
    if hasattr(signal, "SIGCHLD"):      # torch would raise an error for each of them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


class Parser(argparse.ArgumentParser):
    """argparse with the machine's options, errors of one line, and no abbreviations."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         allow_abbrev=False, **settings)
        add = self.add_argument_group("machine").add_argument
        add("--device", help="auto, cpu, cuda, cuda:1, mps, ...")
        add("--precision", choices=("auto", "fp32", "bf16", "fp16"),
            help="auto: the fastest on the device")
        add("--workers", type=int, help="processes that read images; 0: only this one; without it, "
            "1 on a CPU, and one a core, at most 16, for a GPU")

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def build_parser():
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n\n")[0])
    parser.set_defaults(device="auto", precision="auto")
    add = parser.add_argument
    add("--ckpt", nargs="*", default=[], metavar="PATH",
        help="checkpoints, several are compared; of a folder, its newest best.pt is taken")
    add("--images", nargs="+", metavar="PATH", help="pictures or folders to segment")
    add("--data", metavar="DIR", help="prepared folder, if not the one trained on")
    add("--split", choices=("train", "val", "test"), help="frames to measure on; without it, test")
    add("--per-class", action="store_true", help="print the figures of every class too")
    add("--out", metavar="DIR", help="folder for results, if not beside the checkpoint or in runs/")
    return parser


def main(argv=None):
    """Returns the exit status, or raises what run_command explains."""
    args = build_parser().parse_args(argv)
    if args.images and (args.data or args.split or args.per_class):
        raise Problem("--images measures nothing: leave --data, --split and --per-class out")
    reader_count(args.workers, torch.device("cpu"))     # refuses a negative number
    split = args.split or "test"
    paths = [find_checkpoint(path) for path in args.ckpt or ["runs"]]
    machine = (args.device, args.precision)
    if args.images:
        if len(paths) > 1:
            raise Problem("--images takes one --ckpt")
        files = find_pictures(args.images)
        predict = load_predictor(paths[0], *machine)
        return segment(predict, files, args.out or "runs/pictures")
    folders = {Path(load_checkpoint(path)[0]["settings"]["data"]) for path in paths}
    if len(folders) > 1 and not args.data:
        raise Problem("these networks were trained on different data: choose one with --data")
    runs = []
    for path in paths:
        runs.append(measure(path, split, args.data, *machine, workers=args.workers))
    beside = paths[0].parent / split if len(runs) == 1 else "runs/comparison"
    out = Path(args.out or beside)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(report_text(runs), encoding="utf-8")
    draw_examples(out / "examples.png", runs)
    print(report_text(runs, args.per_class), f"\nWritten into {out}: report.md, examples.png")
    return 0


if __name__ == "__main__":
    run_command("evaluate.py", main)
