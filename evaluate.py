"""Measures trained networks, compares them, and segments your own pictures.

Everything rests on one matrix per image: confusion[true, predicted] counts the pixels of class
`true` that the network took for `predicted`, at the size of the prepared labels, without the pixels
labelled 255 ("ignore"). Sums of these matrices give every figure of the paper. Its main one is
mIoU, the mean over classes of the intersection over union: the pixels that are of a class in truth
and prediction, divided by those that are in either. A class that occurs in neither is skipped.
"""
import argparse
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, figure, patches
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from hourglass import StackedHourglass
from icnet import ICNet
from segnet import SegNet

MODELS = {"icnet": ICNet, "segnet": SegNet, "hourglass": StackedHourglass}
IGNORE = 255        # label of pixels that count nowhere
FIGURES = dict(     # of scores(); the paper calls two of them F1
    miou="mIoU", accuracy="accuracy", f1="F1, mean over classes",
    precision="precision, mean over classes", class_accuracy="accuracy, mean over classes",
    body_f1="F1, body against background", body_precision="precision, body against background",
    body_recall="recall, body against background")
# Huge pages on Linux: a CPU takes fresh memory for every large tensor, a fifth of ICNet's time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
warnings.filterwarnings("ignore", "Mean of empty slice|All-NaN slice")     # NaN means "unknown"


class Problem(Exception):
    """Something the user can mend: one sentence that names the value and the way out."""


# ---- Predictions and metrics

class Predictor:
    """A network on `device`, the classes it learned (for mean and std), "fp32" or "bf16", and
    logit_weights w (K floats) or None: a network trained on logits * w also predicts from them."""

    def __init__(self, model, classes, device, precision, logit_weights=None):
        self.model, self.classes, self.device = model, classes, device
        self.precision, self.logit_weights = precision, logit_weights

    @torch.no_grad()
    def __call__(self, images, size):
        """(B, 3, H, W) uint8 -> prediction (B, *size) int64, logits (B, K, *size) float32."""
        images = normalise(images.to(self.device), self.classes)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.model(images).float()
        if logits.shape[2:] != tuple(size):
            logits = F.interpolate(logits, size=tuple(size), mode="bilinear")
        if self.logit_weights is not None:
            logits = logits * torch.tensor(self.logit_weights, device=self.device).view(-1, 1, 1)
        return logits.max(1).indices, logits    # argmax(1) is up to four times slower on the CPU


def confusion_matrices(prediction, labels, K):
    """(B, H, W) int64 and uint8 -> (B, K, K) int64, [image, true, predicted], without label 255.
    One bincount; ignored pixels fall into a row K of their own, which is cut off."""
    B = len(labels)
    first_row = (K + 1) * torch.arange(B, device=labels.device).view(B, 1, 1)
    cells = (first_row + labels.clamp(max=K)) * K + prediction
    return torch.bincount(cells.flatten(), minlength=B * (K + 1) * K).view(B, K + 1, K)[:, :K]


def evaluate_split(predict, split, batch_size, workers, indices=None, criterion=None):
    """Confusion matrices (N, K, K) int64 on the CPU, one a frame (all, or those of `indices`), and
    the mean of criterion's loss over their pixels (NaN without one). predict: a Predictor."""
    indices = range(len(split.frames)) if indices is None else indices
    chunks = [indices[start:start + batch_size] for start in range(0, len(indices), batch_size)]
    confusions, totals = [], []
    batches = stream(split, chunks, workers, predict.device)
    for batch in tqdm(batches, total=len(chunks), unit="batch", disable=None, leave=False):
        labels = batch["labels"]
        prediction, logits = predict(batch["images"], labels.shape[1:])
        confusions.append(confusion_matrices(prediction, labels, logits.shape[1]))
        if criterion:
            totals.append(torch.stack(criterion.totals(logits, labels)).double())
    loss, count = sum(totals).tolist() if totals else (np.nan, 1)
    return torch.cat(confusions).cpu(), loss / max(count, 1)


@np.errstate(invalid="ignore")          # 0 / 0 is NaN, "unknown"
def scores(confusion):
    """(..., K, K) matrices -> dict of FIGURES, (...) arrays, and of each class's iou, class_f1,
    class_precision and recall, (..., K). IoU = TP / (TP + FP + FN) and F1 = 2 TP / (2 TP + FP + FN)
    of a class count where it occurs in truth or prediction, precision where it was predicted,
    recall (its accuracy) where it is true. body_*: all classes but 0, the background, as one."""
    confusion = np.asarray(confusion, dtype=np.float64)
    tp, true, predicted = np.diagonal(confusion, 0, -2, -1), confusion.sum(-1), confusion.sum(-2)
    body, body_true = confusion[..., 1:, 1:].sum((-2, -1)), true[..., 1:].sum(-1)
    body_predicted = predicted[..., 1:].sum(-1)
    iou, f1 = tp / (true + predicted - tp), 2 * tp / (true + predicted)
    precision, recall = tp / predicted, tp / true
    return dict(iou=iou, class_f1=f1, class_precision=precision, recall=recall,
                miou=np.nanmean(iou, -1), f1=np.nanmean(f1, -1),
                precision=np.nanmean(precision, -1), class_accuracy=np.nanmean(recall, -1),
                accuracy=tp.sum(-1) / true.sum(-1), body_precision=body / body_predicted,
                body_recall=body / body_true, body_f1=2 * body / (body_true + body_predicted))


def clip_of(frame):
    """The clip of a frame: its name without _ddd; a name without that ending is its own clip."""
    return re.sub(r"_\d{3}$", "", frame)


def bootstrap(confusions, frames, other=None, draws=1000, seed=0):
    """Half widths of the 95 % intervals of all FIGURES, or of their differences to `other`'s.
    The bootstrap (Efron 1979) computes them again for clips drawn with replacement: they scatter as
    they would for other clips. Whole clips are drawn, since the frames of one are much alike.
    confusions, other: (N, K, K) int64; frames: N names. NaN below two clips."""
    clips = np.unique([clip_of(frame) for frame in frames], return_inverse=True)[1]
    C, drawn = clips.max(initial=0) + 1, []
    times = np.random.default_rng(seed).multinomial(C, np.full(C, 1 / C), size=draws)   # (draws, C)
    for matrices in [confusions] if other is None else [confusions, other]:
        per_clip = np.zeros((C, matrices[0].numel()))
        np.add.at(per_clip, clips, matrices.reshape(len(clips), -1).numpy())
        drawn.append(scores((times @ per_clip).reshape(-1, *matrices.shape[1:])))
    values = [drawn[0][key] - (0 if other is None else drawn[1][key]) for key in FIGURES]
    halves = np.subtract(*np.nanpercentile(values, (97.5, 2.5), axis=1)) / 2
    return dict(zip(FIGURES, halves if C > 1 else np.full_like(halves, np.nan)))


def paired_difference(one, other, frames):
    """mIoU of `one` minus that of `other` on the same frames, and its half width of 95 %."""
    difference = float(scores(one.sum(0))["miou"] - scores(other.sum(0))["miou"])
    return difference, bootstrap(one, frames, other)["miou"]


# ---- The prepared folder

def read_classes(data, count=False):
    """The content of DATA/classes.json, with defaults for all but `names`. count: what the train
    split says (count_pixels) too, taken on first use and kept. Raises Problem for a bad folder."""
    path = Path(data) / "classes.json"
    try:
        stored = json.loads(path.read_bytes())
        K = len(stored["names"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Problem(f"{data} is missing or unfinished. prepare_surreal.py makes such a folder; "
                      f'your own needs a {path} of {{"names": ["background", ...]}}') from error
    palette = colormaps["nipy_spectral"](np.linspace(0, 0.95, K), bytes=True)[:, :3].tolist()
    classes = dict(palette=palette, mirror=list(range(K)), groups={}, joint_mirror=None, size=None,
                   source=f"own data, {data}", settings={}) | stored
    if count and not {"size", "pixels", "mean", "std"} <= set(stored):
        classes |= count_pixels(Split(data, "train", classes)) | stored
        Path(f"{path}.new").write_text(json.dumps(classes, indent=1))
        os.replace(f"{path}.new", path)
    return classes


def count_pixels(split):
    """Size of the images, label pixels of each class (K ints), mean and std of RGB in 0..1."""
    names, pixels, moments = split.classes["names"], 0, 0
    for frame in tqdm(split.frames, desc="counting labels", unit=" frames", disable=None):
        image, label = split.load_frame(frame)
        values = image.reshape(-1, 3) / 255
        moments = moments + np.stack([values.mean(0), (values ** 2).mean(0)]) / len(split.frames)
        pixels = pixels + np.bincount(label.ravel(), minlength=IGNORE + 1)[:len(names)]
    absent = ", ".join(name for name, count in zip(names, pixels) if count == 0)
    if absent:
        print(f"Note: no label of {split.folder} has a pixel of {absent}.")
    if np.count_nonzero(pixels) < 2:
        raise Problem(f"{split.folder}/labels show one class. 255 means ignore, so a mask of 0 and "
                      "255 has to become one of 0 and 1")
    mean, std = moments[0], np.sqrt(np.maximum(moments[1] - moments[0] ** 2, 1e-6))
    return dict(size=split.prepared, pixels=pixels.tolist(), mean=mean.tolist(), std=std.tolist())


def pictures_in(folder, kinds=(".jpg", ".jpeg", ".png")):
    """Sorted paths of a folder's pictures, without the "._" files that macOS leaves."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [f"{folder}/{name}" for name in names
            if name.lower().endswith(kinds) and not name.startswith("._")]


def open_picture(path):
    """A decoded PIL image, turned upright as its EXIF says. Raises Problem naming the file."""
    try:
        return ImageOps.exif_transpose(Image.open(path))
    except Exception as error:          # a garbled file makes Pillow stumble in any way
        raise Problem(f"{path} is no readable picture ({error}): mend or remove it") from error


class Split(Dataset):
    """The frames of one split of a prepared folder: split[[3, 5]] loads a batch of two. Images get
    the side `size` (default: as prepared). Labels keep the prepared size, at which metrics are
    taken, unless `labels_at_size` (training). Raises Problem where an image or label is missing."""

    def __init__(self, data, split, classes, size=None, labels_at_size=False):
        self.folder, self.classes = Path(data) / split, classes
        images, labels = pictures_in(f"{data}/{split}/images"), pictures_in(
            f"{data}/{split}/labels", ".png")
        self.images = {Path(path).stem: path for path in images}
        self.labels = {Path(path).stem: path for path in labels}
        self.frames = sorted(self.images)
        if not self.frames:
            raise Problem(f"{data} has no split {split!r}: no .jpg or .png in {self.folder}/images")
        for frame in sorted(self.images.keys() - self.labels.keys()):
            raise Problem(f"{self.images[frame]} has no label {self.folder}/labels/{frame}.png")
        self.prepared = classes["size"] or open_picture(self.images[self.frames[0]]).width
        self.size = size or self.prepared
        self.label_size = self.size if labels_at_size else self.prepared
        self.joints = None              # (frames, J, 2) float32, pixels of the prepared images
        if (self.folder / "joints.npz").is_file():
            stored = np.load(self.folder / "joints.npz")
            known = dict(zip(stored["frames"].tolist(), stored["joints"].astype(np.float32)))
            unknown = np.full(stored["joints"].shape[1:], np.nan, np.float32)
            self.joints = np.stack([known.get(frame, unknown) for frame in self.frames])

    def __getitem__(self, indices):
        """Images (B, 3, S, S) and labels (B, L, L) uint8, joints (B, J, 2) float32 in pixels of the
        images, if known. A Problem is returned: raised in a worker, it would bring a traceback."""
        try:
            images, labels = zip(*(self.load_frame(self.frames[index]) for index in indices))
        except Problem as problem:
            return problem
        batch = dict(images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),  # channels last
                     labels=torch.from_numpy(np.stack(labels)))
        if self.joints is not None:     # whole numbers are the centres of pixels
            joints = (self.joints[list(indices)] + 0.5) * self.size / self.prepared - 0.5
            batch["joints"] = torch.from_numpy(joints.astype(np.float32))
        return batch

    def load_frame(self, frame):
        """Image (S, S, 3) and label (L, L), uint8. Raises Problem naming the file."""
        image_path, path, K = self.images[frame], self.labels[frame], len(self.classes["names"])
        image, label = open_picture(image_path).convert("RGB"), open_picture(path)
        if {image.size, label.size} != {(self.prepared,) * 2} or label.mode not in ("P", "L"):
            raise Problem(f"{image_path} {image.size} and {path} {label.size} {label.mode} have to "
                          f"be {self.prepared} pixels square, the label a grey or palette PNG of "
                          'class ids: see "Your own" in the README')
        if self.size != self.prepared:
            image = image.resize((self.size, self.size), Image.BILINEAR)   # averages when shrinking
        label = np.asarray(label.resize((self.label_size, self.label_size), Image.NEAREST))
        unknown = label[(label >= K) & (label != IGNORE)]
        if unknown.size:
            raise Problem(f"{path} has the label {unknown[0]}: classes are 0 to {K - 1}, or 255")
        return np.asarray(image), label


def ignore_signals(worker):
    """Ctrl-C and a scheduler's SIGTERM reach workers too, but the main process ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def stream(split, chunks, workers, device):
    """split[chunk] for every chunk of indices, in order, on `device`. Raises Problem: bad data."""
    for batch in DataLoader(split, batch_size=None, sampler=chunks, num_workers=workers,
                            timeout=90 if workers else 0, pin_memory=device.type == "cuda",
                            worker_init_fn=ignore_signals):
        if isinstance(batch, Problem):
            raise batch
        yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def normalise(images, classes):
    """(B, 3, H, W) uint8 -> (x / 255 - mean) / std, float32, channels last, in one pass."""
    mean, std = (torch.tensor(classes[key]).to(images.device, non_blocking=True).view(1, 3, 1, 1)
                 for key in ("mean", "std"))
    return torch.addcmul(-mean / std, images, 1 / (255 * std)).contiguous(
        memory_format=torch.channels_last)


# ---- Tables and pictures

def percent(value, half=np.nan, digits=1):
    """0.4512, 0.003 -> "45.1 +- 0.3"; "-" for what is unknown."""
    interval = "" if np.isnan(half) else f" +- {100 * half:.{digits}f}"
    return "-" if np.isnan(value) else f"{100 * value:.{digits}f}{interval}"


def markdown(rows):
    """A Markdown table, padded so that it reads in a terminal too; the first row is its head."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    lines = [[str(cell).ljust(width) for cell, width in zip(row, widths)] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report_text(runs, per_class=True):
    """Markdown: a column for each run of measure(), comparisons, a table of classes for each."""
    classes, frames = runs[0]["classes"], runs[0]["split"].frames
    names, mirror, columns, tables = classes["names"], classes["mirror"], [], []
    for run in runs:
        confusion = run["confusions"].sum(0).numpy()
        figures, halves = scores(confusion), bootstrap(run["confusions"], frames)
        column = {"%": run["name"]}
        for key, title in FIGURES.items():
            if names[0].lower() == "background" or not key.startswith("body"):
                column[title] = percent(figures[key], halves[key])
        if mirror != sorted(mirror):
            swapped = sum(confusion[a, b] for a, b in enumerate(mirror) if a != b)
            wrong = max(confusion.sum() - confusion.trace(), 1)
            column["left and right confused, of wrong pixels"] = percent(swapped / wrong)
        for group, accuracy in group_accuracies(figures, classes["groups"]).items():
            column[f"accuracy: {group}"] = percent(accuracy)
        columns.append(column | run["cost"])
        cells = zip(names, *(map(percent, figures[key]) for key in (
            "iou", "class_f1", "class_precision", "recall")))
        tables.append([(f"{run['name']}, %", "IoU", "F1", "precision", "accuracy"), *cells])
    clips = len(set(map(clip_of, frames)))
    lines = [f"**{source_note(classes)}**: {len(frames)} images of {runs[0]['split'].folder}, "
             f"{clips} clips; {runs[0]['machine']}\n",
             markdown([[title, *(column[title] for column in columns)] for title in columns[0]]),
             "+-: half the 95 % interval over other clips. Another training seed is not in it."
             if clips > 1 else "No intervals: all frames are of one clip (names that end in _001)."]
    for one, other in itertools.combinations(runs, 2):
        points = percent(*paired_difference(one["confusions"], other["confusions"], frames), 2)
        lines.append(f"{one['name']} against {other['name']}: {points} points of mIoU, same clips.")
    return "\n".join(lines + ["\n" + markdown(table) for table in tables if per_class])


def group_accuracies(figures, groups):
    """{column: mean accuracy of its classes}, the 13 columns of the paper's Tables 2 and 5."""
    return {group: float(np.nanmean(figures["recall"][ids])) for group, ids in groups.items()}


def source_note(classes):
    """What stands on every table and picture: where the frames came from."""
    return "stand-in, not SURREAL" if "stand-in" in classes["source"] else classes["source"]


def colours(labels, palette):
    """labels (..., H, W) integers -> (..., H, W, 3) uint8; 255, "ignore", is light grey."""
    table = np.full((IGNORE + 1, 3), 224, np.uint8)
    table[:len(palette)] = palette
    return table[labels]


def draw_grid(path, rows, classes, ids):
    """Rows (name, pictures (H, W, 3) uint8, their titles) above a legend of the classes `ids`."""
    across, (height, width) = len(rows[0][1]), rows[0][1][0].shape[:2]
    inch = max(2.9, min(width, 1024) / 110)                 # a pixel for every pixel up to 1024
    inches = inch * across + 1, inch * len(rows) * height / width + 1.3
    sheet = figure.Figure(inches, dpi=110, layout="constrained")
    grid = sheet.subplots(len(rows), across, squeeze=False)
    for line, (name, pictures, titles) in zip(grid, rows):
        line[0].set_ylabel(name)
        for axes, picture, title in zip(line, pictures, titles):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[], title=title)
    sheet.legend([patches.Patch(color=np.array(classes["palette"][i]) / 255) for i in ids],
                 [classes["names"][i] for i in ids], title=source_note(classes), fontsize=9,
                 loc="outside lower center", frameon=False, ncols=int(1.6 * across))
    sheet.savefig(path)


def draw_examples(path, runs):
    """The clips of best, median and worst mIoU: photo, ground truth, a row for each network."""
    own = np.array([np.nan_to_num(scores(run["confusions"])["miou"]) for run in runs])
    split, classes = runs[0]["split"], runs[0]["classes"]
    first = np.unique([clip_of(frame) for frame in split.frames], return_index=True)[1]
    order, N = first[np.argsort(-own.mean(0)[first], kind="stable")], len(first)
    chosen = order[sorted({0, 1, N // 2 - 1, N // 2, N - 2, N - 1} & set(range(N)))]
    batch = Split(split.folder.parent, split.folder.name, classes)[chosen]     # as prepared
    blank = [""] * len(chosen)
    rows = [("photo", batch["images"].permute(0, 2, 3, 1).numpy(), blank),
            ("ground truth", colours(batch["labels"].numpy(), classes["palette"]), blank)]
    for run, values in zip(runs, own[:, chosen]):
        prediction, _ = run["predict"](run["split"][chosen]["images"], batch["labels"].shape[1:])
        rows.append((run["name"], colours(prediction.cpu().numpy(), classes["palette"]),
                     [f"mIoU {percent(value)} %" for value in values]))
    draw_grid(path, rows, classes, range(len(classes["names"])))


def draw_confusion(path, run):
    """The confusion matrix in percent of each true class."""
    confusion, names = run["confusions"].sum(0).numpy(), run["classes"]["names"]
    sheet = figure.Figure((3 + 0.2 * len(names),) * 2, layout="constrained")
    axes = sheet.subplots()
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    sheet.colorbar(axes.imshow(share, cmap="Blues"), label="% of the pixels of the true class")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true", title=source_note(run["classes"]))
    sheet.savefig(path)


def segment(file, predict, size, out):
    """Writes <out>-overlay.png and <out>-labels.png of a picture of any size."""
    image, palette = open_picture(file).convert("RGB"), predict.classes["palette"]
    small, shown = (image.resize([max(1, round(side * longer / max(image.size)))
                                  for side in image.size], Image.BILINEAR)
                    for longer in (size, min(1024, max(image.size))))  # as in training; to look at
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
    prediction = predict(pixels, shown.size[::-1])[0][0].cpu().numpy()
    photo, coloured = np.asarray(shown), colours(prediction, palette)
    blended = np.where(prediction[..., None] > 0, photo // 3 + coloured // 3 * 2, photo)
    draw_grid(f"{out}-overlay.png", [("", [photo, blended], ["", ""])], predict.classes,
              np.unique(prediction))
    labels = Image.fromarray(prediction.astype(np.uint8)).resize(image.size, Image.NEAREST)
    labels.putpalette(colours(np.arange(IGNORE + 1), palette).tobytes())
    labels.save(f"{out}-labels.png")


# ---- Devices, checkpoints, errors, command line

def pick_device(name="auto", precision="auto"):
    """(torch.device, "fp32" or "bf16"). auto: CUDA, and bf16, where the hardware has them."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise Problem(f"--device {name} cannot be used here: auto and cpu always can") from error
    able = torch.cpu.get_capabilities()
    fast = able.get("avx512_bf16") or able.get("amx_bf16")      # elsewhere bf16 would be slower
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    return device, precision if precision != "auto" else "bf16" if fast else "fp32"


def find_checkpoint(path="runs", name="best.pt"):
    """The file `path`, or the newest `name` in that folder. Raises Problem for none."""
    found = [Path(path)] if Path(path).is_file() else list(Path(path).rglob(name))
    if not found:
        raise Problem(f"there is no checkpoint {path}: train one (python train.py --help)")
    return max(found, key=os.path.getmtime)


def load_checkpoint(path, device="cpu"):
    """(checkpoint of train.py, its network in eval()). Raises Problem for a file that is damaged or
    something else. weights_only: no code in the file is run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        network = MODELS[checkpoint["model"]](**checkpoint["kwargs"])
        network.load_state_dict(checkpoint["weights"])
        return checkpoint, network.eval().to(device, memory_format=torch.channels_last)
    except Exception as error:          # a garbled file can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        raise Problem(f"{path} is no usable checkpoint of train.py ({reason})") from error


SHARED = shutil.disk_usage("/dev/shm").total / 2 ** 20 if os.path.isdir("/dev/shm") else 0
TROUBLE = {     # words in an exception, and what they mean to a user
    r"dataloader (worker \(|timed)": "the processes that read images died or hang. They hand images"
        f" over in /dev/shm ({SHARED:.1f} MiB here): try --workers 0",
    "alloc|out of memory|memoryerror": "out of memory: try a smaller --batch-size or --size",
    "gloo|distbackend": "another process of this run ended; its message is above or below"}


def run_command(program, function):
    """Ends the process with the status of function(); with 2 after one sentence on what a user can
    mend or a machine runs out of; with 130 after Ctrl-C. A bug keeps its traceback."""
    status, message = 2, None
    try:
        status = function()
        sys.stdout.flush()
    except BrokenPipeError:             # of "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        status, message = 130, "stopped by Ctrl-C"
    except (Problem, OSError) as error:
        message = error
    except Exception as error:
        known = [TROUBLE[words] for words in TROUBLE if re.search(words, repr(error), re.I)]
        if not known:
            raise
        message = known[0]
    finally:
        if hasattr(signal, "SIGCHLD"):  # else torch would raise an error for each worker below
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.kill()                # workers ignore gentler signals
    if message:
        print(f"{program}: {message}", file=sys.stderr)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """argparse with the machine's options, errors of one line, and no abbreviations."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         allow_abbrev=False, **settings)
        add = self.add_argument_group("machine").add_argument
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
        add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
            help="auto: bf16 where the hardware has it, in half the time and memory")
        add("--workers", type=int, default=1, help="processes that read images; 0: only this one")

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def cost(predict, size):
    """{row of the report: cell}: what the network costs at evaluation."""
    with FlopCounterMode(display=False) as flops:           # counts 2 for a multiply-add
        predict(torch.zeros(1, 3, size, size, dtype=torch.uint8), (size, size))
    used = sum(value.numel() for name, value in predict.model.named_parameters()
               if not name.startswith(getattr(predict.model, "training_only", ())))
    return {"image size": size, "parameters, million": f"{used / 1e6:.2f}",
            "multiply-adds an image, billion": f"{flops.get_total_flops() / 2e9:.2f}"}


def measure(path, args, split, data=None, raw=False):
    """One checkpoint on one split: what reports and pictures need. raw: predict from the logits
    without the weights w, as the authors of the paper did after training on logits * w."""
    device, precision = pick_device(args.device, args.precision)
    checkpoint, network = load_checkpoint(path, device)
    data, trained = data or checkpoint["settings"]["data"], checkpoint["classes"]
    classes, size = read_classes(data), checkpoint["settings"]["size"] or trained["size"]
    if classes["names"] != trained["names"]:
        raise Problem(f"{data} has other classes ({', '.join(classes['names'])[:40]}) than {path} "
                      f"({', '.join(trained['names'])[:40]}): name other data with --data")
    weights = None if raw else checkpoint["logit_weights"]
    predict = Predictor(network, trained, device, precision, weights)
    frames = Split(data, split, classes, size)
    figures = cost(predict, frames.size)
    start = time.perf_counter()
    confusions, _ = evaluate_split(predict, frames, args.batch_size, args.workers)
    figures["images/s, reading included"] = f"{len(confusions) / (time.perf_counter() - start):.1f}"
    name = path.resolve().parent.name if path.name in ("best.pt", "last.pt") else path.stem
    return dict(name=name + ", argmax of x" * raw, predict=predict, split=frames, classes=classes,
                machine=f"{device}, {precision}, {args.batch_size} images at a time",
                confusions=confusions, cost=figures)


def segment_all(args, path):
    """Segments args.images. A broken picture costs only itself; the exit status is 1 then."""
    files = [Path(file) for path in args.images for file in pictures_in(path) or [path]]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise Problem(f"there is no picture {', '.join(missing)}")
    device, precision = pick_device(args.device, args.precision)
    checkpoint, network = load_checkpoint(path, device)
    classes, weights = checkpoint["classes"], checkpoint["logit_weights"]
    predict = Predictor(network, classes, device, precision, weights)
    out, status = Path(args.out or "runs/pictures"), 0
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        alone = [other.name for other in files].count(file.name) == 1
        result = out / (file.name if alone else "-".join(file.parts[-2:]))
        try:
            segment(file, predict, checkpoint["settings"]["size"] or classes["size"], result)
            print(f"{file}: {result}-overlay.png, -labels.png")
        except Problem as problem:
            print(problem)
            status = 1
    return status


def main(argv=None):
    """Returns the exit status, or raises what run_command explains."""
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--ckpt", nargs="*", default=["runs"], metavar="PATH",
        help="checkpoints, several are compared; of a folder, its newest best.pt is taken")
    add("--images", nargs="+", type=Path, metavar="PATH", help="pictures or folders to segment")
    add("--data", metavar="DIR", help="prepared folder, if not the one trained on")
    add("--split", choices=("train", "val", "test"), default="test", help="frames to measure on")
    add("--per-class", action="store_true", help="print the figures of every class too")
    add("--out", metavar="DIR", help="folder for results, if not beside the checkpoint or in runs/")
    add("--batch-size", type=int, default=8, help="images at a time; changes memory and speed only")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.workers < 0:
        parser.error("--batch-size starts at 1, --workers at 0")
    paths = [find_checkpoint(path) for path in args.ckpt or ["runs"]]
    if args.images:
        return segment_all(args, paths[0])
    runs = [measure(path, args, args.split, args.data) for path in paths]
    runs += [measure(path, args, args.split, args.data, raw=True)
             for path, run in zip(paths, runs) if run["predict"].logit_weights]
    if len({run["split"].folder for run in runs}) > 1:
        raise Problem("these networks were trained on different data: choose one with --data")
    usual = paths[0].parent / args.split if len(paths) == 1 else "runs/comparison"
    out = Path(args.out or usual)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(report_text(runs), encoding="utf-8")
    draw_examples(out / "examples.png", runs)
    draw_confusion(out / "confusion.png", runs[0])
    print(report_text(runs, args.per_class))
    print(f"Written into {out}: report.md, examples.png, confusion.png")
    return 0


if __name__ == "__main__":
    run_command("evaluate.py", main)
