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
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from dataclasses import dataclass
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

# Huge pages on Linux: a CPU takes fresh memory for every large tensor, a fifth of ICNet's time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
MODELS = {"icnet": ICNet, "segnet": SegNet, "hourglass": StackedHourglass}
IGNORE = 255        # label of pixels that count nowhere
FIGURES = dict(     # of scores(); the paper calls two of them F1
    miou="mIoU", accuracy="accuracy", f1="F1, mean over classes",
    precision="precision, mean over classes", class_accuracy="accuracy, mean over classes",
    body_f1="F1, body against background", body_precision="precision, body against background",
    body_recall="recall, body against background")


class Problem(Exception):
    """Something the user can mend: one sentence that names the value and the way out."""


# ---- The prepared folder

def read_classes(data, count=False):
    """The content of DATA/classes.json and defaults for what is missing; `names` has to be there.
    count: also pixels, mean and std, taken from the train split on first use and kept there.
    Raises Problem for a folder that is missing, unfinished or has bad labels."""
    path, images = Path(data) / "classes.json", Path(data) / "train" / "images"
    try:
        stored = json.loads(path.read_bytes())
        K = len(stored["names"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Problem(f"{data} is missing or unfinished: {path} is not usable. prepare_surreal.py "
                      'makes one; your own needs {"names": ["background", ...]}') from error
    palette = (255 * colormaps["nipy_spectral"](np.linspace(0, 0.95, K))[:, :3]).astype(int)
    classes = dict(palette=palette.tolist(), mirror=list(range(K)), groups={}, joint_mirror=None,
                   source=f"own data, {data}", settings={}) | stored
    if "size" not in stored and pictures_in(images):
        classes["size"] = open_picture(images / min(pictures_in(images).values())).width
    if count and not {"pixels", "mean", "std"} <= set(stored):
        classes |= count_pixels(Split(data, "train", classes))
        Path(f"{path}.new").write_text(json.dumps(classes, indent=1))
        os.replace(f"{path}.new", path)
    return classes


def count_pixels(split):
    """Label pixels of each class (K ints), mean and std of RGB in 0..1, over all frames."""
    names, pixels, moments = split.classes["names"], 0, 0
    for frame in tqdm(split.frames, desc="counting labels", unit=" frames", disable=None):
        image, label = split.load_frame(frame)
        values = image.reshape(-1, 3) / 255
        moments = moments + np.stack([values.mean(0), (values ** 2).mean(0)]) / len(split.frames)
        pixels = pixels + np.bincount(label.ravel(), minlength=IGNORE + 1)[:len(names)]
    absent = ", ".join(name for name, count in zip(names, pixels) if count == 0)
    if np.count_nonzero(pixels) < 2:
        raise Problem(f"no label of {split.folder} has a pixel of {absent}; 255 means ignore, so a "
                      "mask of 0 and 255 has to become one of 0 and 1")
    if absent:
        print(f"Note: no label of {split.folder} has a pixel of {absent}.")
    std = np.sqrt(np.maximum(moments[1] - moments[0] ** 2, 1e-6))
    return dict(pixels=pixels.tolist(), mean=moments[0].tolist(), std=std.tolist())


def pictures_in(folder):
    """{frame: file name} of a folder's pictures, without the "._" files that macOS leaves."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return {Path(name).stem: name for name in names if not name.startswith("._")
            and name.lower().endswith((".jpg", ".jpeg", ".png"))}


def open_picture(path):
    """A decoded PIL image, turned upright as its EXIF says. Raises Problem naming the file."""
    try:
        image = Image.open(path)
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        return image
    except Exception as error:          # a garbled file makes Pillow stumble in any way
        raise Problem(f"{path} is no readable picture ({error}): mend or remove it") from error


class Split(Dataset):
    """The frames of one split of a prepared folder: split[[3, 5]] loads a batch of two.

    size: side to which images are resized (default: as prepared). Labels keep the prepared size,
    at which metrics are taken, unless `labels_at_size` (training) brings them to the images'.
    Raises Problem for a split without images and for an image without label.
    """

    def __init__(self, data, split, classes, size=None, labels_at_size=False):
        self.folder, self.classes, self.prepared = Path(data) / split, classes, classes.get("size")
        self.images = pictures_in(self.folder / "images")
        self.labels = pictures_in(self.folder / "labels")
        self.frames = sorted(self.images)
        if not self.frames:
            raise Problem(f"{data} has no split {split!r}: no .jpg or .png in {self.folder}/images")
        for frame in sorted(self.images.keys() - self.labels.keys()):
            raise Problem(f"{self.folder}/images/{self.images[frame]} has no label "
                          f"{self.folder}/labels/{frame}.png: add it, or remove the image")
        self.size = size or self.prepared
        self.label_size = self.size if labels_at_size else self.prepared
        self.joints = None              # (frames, J, 2) float32, pixels of the prepared images
        if (self.folder / "joints.npz").is_file():
            stored = np.load(self.folder / "joints.npz")
            rows = dict(zip(stored["frames"].tolist(), stored["joints"].astype(np.float32)))
            unknown = np.full(stored["joints"].shape[1:], np.nan, np.float32)
            self.joints = np.stack([rows.get(frame, unknown) for frame in self.frames])

    def __getitem__(self, indices):
        """A batch: images (B, 3, S, S) uint8, labels (B, L, L) uint8 and, where known, joints
        (B, J, 2) float32 in pixels of the loaded images. For a bad file it returns a Problem, which
        would arrive as a traceback if it were raised in a worker process."""
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
        image_path = self.folder / "images" / self.images[frame]
        path, K = self.folder / "labels" / self.labels[frame], len(self.classes["names"])
        image, label = open_picture(image_path).convert("RGB"), open_picture(path)
        if {image.size, label.size} != {(self.prepared,) * 2} or label.mode not in ("P", "L"):
            raise Problem(f"{image_path} {image.size} and {path} {label.size} {label.mode} have to be "
                          f"squares of {self.prepared} pixels, the label a grey or palette PNG of "
                          'class ids: see "Your own" in the README')
        if self.size != self.prepared:
            image = image.resize((self.size, self.size), Image.BILINEAR)   # averages when shrinking
        label = np.asarray(label.resize((self.label_size, self.label_size), Image.NEAREST))
        unknown = label[(label >= K) & (label != IGNORE)]
        if unknown.size:
            raise Problem(f"{path} has the label {unknown[0]}; 0 to {K - 1} are classes, 255 ignore")
        return np.asarray(image), label


def ignore_signals(worker):
    """Ctrl-C and a scheduler's SIGTERM reach workers too, but the main process ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def stream(split, chunks, workers, device):
    """split[chunk] for every chunk of indices, in order, on `device`. Raises Problem: bad data."""
    loader = DataLoader(split, batch_size=None, sampler=chunks, num_workers=workers,
                        timeout=90 if workers else 0, pin_memory=device.type == "cuda",
                        worker_init_fn=ignore_signals)
    for batch in loader:
        if isinstance(batch, Problem):
            raise batch
        yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def normalise(images, classes):
    """(B, 3, H, W) uint8 -> (x / 255 - mean) / std, float32, channels last, in one pass."""
    mean, std = (torch.tensor(classes[key]).to(images.device, non_blocking=True).view(1, 3, 1, 1)
                 for key in ("mean", "std"))
    return torch.addcmul(-mean / std, images, 1 / (255 * std)).contiguous(
        memory_format=torch.channels_last)


# ---- Predictions and metrics

@dataclass
class Predictor:
    """A network on `device`, the classes it learned (for mean and std), "fp32" or "bf16", and
    logit_weights (K floats): direct weighting trained softmax(x w), so w counts here as well."""
    model: torch.nn.Module
    classes: dict
    device: torch.device
    precision: str
    logit_weights: list | None = None

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
    cells = labels.clamp(max=K).to(torch.int64).view(B, -1)
    cells += (K + 1) * torch.arange(B, device=labels.device).view(B, 1)
    cells.mul_(K).add_(prediction.reshape(B, -1))
    return torch.bincount(cells.view(-1), minlength=B * (K + 1) * K).view(B, K + 1, K)[:, :K]


def evaluate_split(predict, split, batch_size, workers, indices=None, criterion=None):
    """Confusion matrices (N, K, K) int64 on the CPU, one a frame (all, or those of `indices`), and
    the mean of criterion's loss over their pixels (NaN without one). predict: a Predictor."""
    indices = range(len(split.frames)) if indices is None else indices
    chunks = [indices[start:start + batch_size] for start in range(0, len(indices), batch_size)]
    confusions, totals = [], []
    with tqdm(total=len(indices), unit="image", disable=None, leave=False) as bar:
        for batch in stream(split, chunks, workers, predict.device):
            labels = batch["labels"]
            prediction, logits = predict(batch["images"], labels.shape[1:])
            confusions.append(confusion_matrices(prediction, labels, logits.shape[1]))
            if criterion:
                totals.append(torch.stack(criterion.totals(logits, labels)).double())
            bar.update(len(labels))
    loss, count = sum(totals).tolist() if totals else (math.nan, 1)
    return torch.cat(confusions).cpu(), loss / max(count, 1)


def scores(confusion):
    """(..., K, K) matrices -> dict of FIGURES, (...) arrays, and of each class's iou, class_f1,
    class_precision and recall, (..., K). NaN: unknown.

    IoU = TP / (TP + FP + FN) and F1 = 2 TP / (2 TP + FP + FN) of a class count where it occurs in
    truth or prediction, precision where it was predicted, recall (its accuracy) where it is true.
    body_*: all classes but 0, the background, taken as one.
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    true, found, body = confusion.sum(-1), confusion.sum(-2), confusion[..., 1:, 1:].sum((-2, -1))
    body_true, body_found = true[..., 1:].sum(-1), found[..., 1:].sum(-1)
    with np.errstate(invalid="ignore"), warnings.catch_warnings(action="ignore"):
        iou, f1 = right / (true + found - right), 2 * right / (true + found)    # 0 / 0 is NaN
        precision, recall = right / found, right / true
        return dict(iou=iou, class_f1=f1, class_precision=precision, recall=recall,
                    miou=np.nanmean(iou, -1), f1=np.nanmean(f1, -1),
                    precision=np.nanmean(precision, -1), class_accuracy=np.nanmean(recall, -1),
                    accuracy=right.sum(-1) / true.sum(-1), body_precision=body / body_found,
                    body_recall=body / body_true, body_f1=2 * body / (body_true + body_found))


def clip_of(frame):
    """The clip of a frame: its name without _ddd; a name without that ending is its own clip."""
    return re.sub(r"_\d{3}$", "", frame)


def bootstrap(confusions, frames, other=None, draws=1000, seed=0):
    """Half widths of the 95 % intervals of all FIGURES, or of their differences to `other`'s.

    The bootstrap (Efron 1979) sums the matrices of clips drawn with replacement: as far as `draws`
    such sums scatter, other clips would move a figure. Whole clips are drawn, since the frames of
    one are much alike. confusions, other: (N, K, K) int64; frames: N names. NaN below two clips.
    """
    clips = np.unique([clip_of(frame) for frame in frames], return_inverse=True)[1]
    C, drawn = clips.max(initial=0) + 1, []
    times = np.random.default_rng(seed).multinomial(C, np.full(C, 1 / C), size=draws)   # (draws, C)
    for matrices in [confusions] if other is None else [confusions, other]:
        per_clip = np.zeros((C, matrices[0].numel()))
        np.add.at(per_clip, clips, matrices.reshape(len(clips), -1).numpy())
        drawn.append(scores((times @ per_clip).reshape(-1, *matrices.shape[1:])))
    values = [drawn[0][key] - (0 if other is None else drawn[1][key]) for key in FIGURES]
    with warnings.catch_warnings(action="ignore"):          # of figures that are unknown
        halves = np.subtract(*np.nanpercentile(values, (97.5, 2.5), axis=1)) / 2
    return dict(zip(FIGURES, halves if C > 1 else np.full_like(halves, np.nan)))


def paired_difference(one, other, frames):
    """mIoU of `one` minus that of `other` on the same frames, and its half width of 95 %."""
    difference = float(scores(one.sum(0))["miou"] - scores(other.sum(0))["miou"])
    return difference, bootstrap(one, frames, other)["miou"]


def cost(predict, size, batch_size):
    """The cells of a table on what evaluation costs at `size` (memory: on a GPU alone)."""
    images, gpu = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8), torch.cuda
    with FlopCounterMode(display=False) as flops:
        predict(images[:1], (size, size))
    runs, start = 0, time.perf_counter()
    while runs < 2 or time.perf_counter() - start < 1:
        predict(images, (size, size))[0].sum().item()       # .item() waits for a GPU
        runs += 1
    speed = runs * batch_size / (time.perf_counter() - start)
    used = sum(value.numel() for name, value in predict.model.named_parameters()
               if not name.startswith(getattr(predict.model, "training_only", ())))
    memory = gpu.max_memory_allocated() >> 20 if predict.device.type == "cuda" else "-"
    return {"image size": size, "parameters, million": f"{used / 1e6:.2f}",
            "multiply-adds an image, billion": f"{flops.get_total_flops() / 2e9:.2f}",
            "images/s": f"{speed:.1f}", "peak memory, MiB": memory}


# ---- Tables and pictures

def percent(value, half=math.nan, digits=1):
    """0.4512, 0.003 -> "45.1 +- 0.3"; "-" for what is unknown."""
    interval = "" if math.isnan(half) else f" +- {100 * half:.{digits}f}"
    return "-" if math.isnan(value) else f"{100 * value:.{digits}f}{interval}"


def markdown(rows):
    """A Markdown table, padded so that it reads in a terminal too; the first row is its head."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    lines = [[str(cell).ljust(width) for cell, width in zip(row, widths)] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report_text(runs, per_class=True):
    """Markdown: a column for each run of measure(), with intervals; sides confused; comparisons."""
    classes, frames = runs[0]["classes"], runs[0]["split"].frames
    names, mirror, groups = classes["names"], classes["mirror"], classes["groups"]
    totals = [run["confusions"].sum(0).numpy() for run in runs]
    figures = [scores(confusion) for confusion in totals]
    halves = [bootstrap(run["confusions"], frames) for run in runs]
    rows = [["%", *(run["name"] for run in runs)]]
    rows += [[title, *(percent(f[key], half[key]) for f, half in zip(figures, halves))]
             for key, title in FIGURES.items()
             if names[0].lower() == "background" or not key.startswith("body")]
    if mirror != sorted(mirror):
        swapped = [sum(c[a, b] for a, b in enumerate(mirror) if a != b) for c in totals]
        rows += [["left and right confused, of wrong pixels", *(
            percent(s / max(c.sum() - c.trace(), 1)) for s, c in zip(swapped, totals))]]
    rows += [[f"accuracy: {group}", *(percent(group_accuracies(f, groups)[group]) for f in figures)]
             for group in groups]
    rows += [[key, *(run["cost"][key] for run in runs)] for key in runs[0]["cost"]]
    lines = [f"**{source_note(classes)}**: {len(frames)} images of {runs[0]['split'].folder}, "
             f"{len(set(map(clip_of, frames)))} clips; {runs[0]['machine']}\n", markdown(rows),
             "+-: half the 95 % interval over other clips. Another training seed is not in it."]
    for one, other in itertools.combinations(runs, 2):
        points = percent(*paired_difference(one["confusions"], other["confusions"], frames), 2)
        lines += [f"{one['name']} against {other['name']}: {points} points of mIoU, same clips."]
    for run, f in zip(runs, figures) if per_class else ():
        values = zip(names, f["iou"], f["class_f1"], f["class_precision"], f["recall"])
        head = [f"{run['name']}, %", "IoU", "F1", "precision", "accuracy"]
        lines += ["\n" + markdown([head] + [[name, *map(percent, row)] for name, *row in values])]
    return "\n".join(lines)


def group_accuracies(figures, groups):
    """{column: mean accuracy of its classes}, the 13 columns of the paper's Tables 2 and 5."""
    with warnings.catch_warnings(action="ignore"):          # the mean of nothing is NaN
        return {name: float(np.nanmean(figures["recall"][ids])) for name, ids in groups.items()}


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
    sheet = figure.Figure((2.3 * across + 1, 2.3 * len(rows) * height / width + 1.3), dpi=110,
                          layout="constrained")
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
    """Photos, ground truth and one row a network, for the two best, median and worst images by
    their own mIoU (mean over the networks)."""
    own = np.array([np.nan_to_num(scores(run["confusions"])["miou"]) for run in runs])
    order, N = np.argsort(-own.mean(0), kind="stable"), own.shape[1]
    frames = order[sorted({0, 1, N // 2 - 1, N // 2, N - 2, N - 1} & set(range(N)))]
    batch, classes, blank = runs[0]["split"][frames], runs[0]["classes"], [""] * len(frames)
    rows = [("photo", batch["images"].permute(0, 2, 3, 1).numpy(), blank),
            ("ground truth", colours(batch["labels"].numpy(), classes["palette"]), blank)]
    for run, values in zip(runs, own):
        prediction, _ = run["predict"](run["split"][frames]["images"], batch["labels"].shape[1:])
        rows += [(run["name"], colours(prediction.cpu().numpy(), classes["palette"]),
                  [f"mIoU {percent(value)} %" for value in values[frames]])]
    draw_grid(path, rows, classes, range(len(classes["names"])))


def draw_confusion(path, run):
    """The confusion matrix in percent of each true class, with the names."""
    confusion, names = run["confusions"].sum(0).numpy(), run["classes"]["names"]
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    sheet = figure.Figure((3 + 0.36 * len(names),) * 2, layout="constrained")
    axes = sheet.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=150)      # so that no number lies on dark blue
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true",
             title=f"% of the pixels of each true class ({source_note(run['classes'])})")
    for row, column in np.argwhere(share >= 0.5):
        axes.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center", fontsize=7)
    sheet.savefig(path)


def segment(file, predict, size, out):
    """Writes <name>-overlay.png and <name>-labels.png of a picture of any size into `out`."""
    image, palette = open_picture(file).convert("RGB"), predict.classes["palette"]
    factor = size / max(image.size)     # as large as the network saw people in training
    small = image.resize([max(1, round(side * factor)) for side in image.size], Image.BILINEAR)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
    prediction = predict(pixels, image.size[::-1])[0][0].cpu().numpy()
    photo, coloured = np.asarray(image), colours(prediction, palette)
    blended = np.where(prediction[..., None] > 0, photo // 3 + coloured // 3 * 2, photo)
    draw_grid(out / f"{file.name}-overlay.png", [("", [photo, blended], ["", ""])],
              predict.classes, np.unique(prediction))
    labels = Image.fromarray(prediction.astype(np.uint8))
    labels.putpalette(colours(np.arange(IGNORE + 1), palette).tobytes())
    labels.save(out / f"{file.name}-labels.png")


# ---- Devices, checkpoints, errors

def pick_device(name="auto", precision="auto"):
    """(torch.device, "fp32" or "bf16"). auto: CUDA where there is one, and bf16 where the hardware
    multiplies it; elsewhere it would be slower. Raises Problem for a device that is missing."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=auto if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise Problem(f"--device {name} cannot be used here: auto and cpu always can") from error
    able = getattr(torch.cpu, "get_capabilities", dict)()
    fast = able.get("avx512_bf16") or able.get("amx_bf16")
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    return device, precision if precision != "auto" else "bf16" if fast else "fp32"


def find_checkpoint(path="runs", name="best.pt"):
    """The file `path`, or the newest `name` in that folder. Raises Problem for none."""
    found = [Path(path)] if Path(path).is_file() else list(Path(path).rglob(name))
    if not found:
        raise Problem(f"there is no checkpoint {path}: train a network first (python train.py "
                      "--model icnet --quick), or name another")
    return max(found, key=lambda file: file.stat().st_mtime)


def load_checkpoint(path):
    """A checkpoint of train.py and its network in eval(), on the CPU. weights_only: no code in the
    file is run. Raises Problem for a file that is missing, damaged or something else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        network = MODELS[checkpoint["model"]](**checkpoint["kwargs"])
        network.load_state_dict(checkpoint["weights"])
        return checkpoint, network.eval()
    except Exception as error:          # a garbled file can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        raise Problem(f"{path} is no usable checkpoint of train.py ({reason}): try best.pt or "
                      "last.pt beside it") from error


TROUBLE = {     # words of an exception, and what they mean to a user
    "dataloader": "the processes that read images died or hang; they hand batches over through shared "
                  "memory (/dev/shm), which may be too small here: try --workers 0",
    "alloc": "out of memory: try a smaller --batch-size or --size",
    "out of memory": "out of memory: try a smaller --batch-size or --size",
    "gloo": "another process of this run ended; what it said stands above or below",
    "distbackend": "another process of this run ended; what it said stands above or below",
    "writing file": "a checkpoint cannot be written: is the disk full? The last one is whole",
}


def run_command(program, function):
    """Ends the process with the status of function(); with 2 after one sentence on what a user can
    mend or a machine runs out of; with 130 after Ctrl-C. A bug keeps its traceback."""
    status, message = 2, None
    try:
        status = function()
    except BrokenPipeError:             # of "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        status, message = 130, "stopped by Ctrl-C"
    except Exception as error:
        text = f"{type(error).__name__}: {error}".lower()
        message = next((said for words, said in TROUBLE.items() if words in text), None)
        if isinstance(error, (Problem, OSError)):
            message = str(error)
        if message is None:
            raise
    finally:
        for child in multiprocessing.active_children():
            child.kill()                # workers ignore gentler signals
    if message:
        print(f"{program}: {message}", file=sys.stderr)
    sys.exit(status)


# ---- Command line

class Parser(argparse.ArgumentParser):
    """argparse with the machine's options, errors of one line, and no abbreviations."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
                         **settings)
        add = self.add_argument_group("machine").add_argument
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
        add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
            help="auto: bf16 where the hardware has it, in half the time and memory")
        add("--workers", type=int, default=1, help="processes that read images; 0: none but this one")

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def build_predictor(path, args):
    """(checkpoint, Predictor) on args.device."""
    device, precision = pick_device(args.device, args.precision)
    checkpoint, model = load_checkpoint(path)
    return checkpoint, Predictor(model.to(device, memory_format=torch.channels_last),
                                 checkpoint["classes"], device, precision,
                                 checkpoint["logit_weights"])


def measure(path, args, split, data=None, raw=False):
    """One checkpoint on one split: a dictionary of what reports and pictures need. raw: direct
    weighting as its authors read it, the argmax of x from a network that trained on x w."""
    checkpoint, predict = build_predictor(path, args)
    data, size = data or checkpoint["settings"]["data"], checkpoint["settings"]["size"]
    classes, trained = read_classes(data), predict.classes
    if classes["names"] != trained["names"]:
        raise Problem(f"{data} has other classes ({', '.join(classes['names'])[:40]}) than {path} "
                      f"({', '.join(trained['names'])[:40]}): name other data with --data")
    if raw:
        predict.logit_weights = None
    frames = Split(data, split, classes, size or trained["size"])
    name = path.resolve().parent.name if path.name in ("best.pt", "last.pt") else path.stem
    return dict(name=name + ", argmax of x" * raw, predict=predict, split=frames, classes=classes,
                machine=f"{predict.device}, {predict.precision}, {args.batch_size} images at a time",
                confusions=evaluate_split(predict, frames, args.batch_size, args.workers)[0],
                cost=cost(predict, frames.size, args.batch_size))


def parse(argv=None):
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--ckpt", nargs="*", default=["runs"], metavar="PATH", help="checkpoints or folders of runs, "
        "of which the newest best.pt is taken; several are compared")
    add("--images", nargs="+", type=Path, default=[], metavar="PATH", help="pictures or folders of "
        "pictures to segment")
    add("--data", default="", metavar="DIR", help="prepared folder, if not the one trained on")
    add("--split", choices=("train", "val", "test"), default="test", help="frames to measure on")
    add("--per-class", action="store_true", help="print the figures of every class too")
    add("--out", default="", metavar="DIR", help="folder for the results, if not the run's own, "
        "runs/comparison or runs/pictures")
    add("--batch-size", type=int, default=8, help="images at a time; changes memory and speed only")
    return parser.parse_args(argv)


def segment_all(args, path):
    """Segments args.images; a broken picture costs itself alone, and the exit status is 1 then."""
    files = [file for path in args.images for file in (
        [path / name for name in pictures_in(path).values()] if path.is_dir() else [path])]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise Problem(f"there is no picture {', '.join(missing or map(str, args.images))}")
    checkpoint, predict = build_predictor(path, args)
    out, status = Path(args.out or "runs/pictures"), 0
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        try:
            segment(file, predict, checkpoint["settings"]["size"] or 320, out)
            print(f"{file}: {out / file.name}-overlay.png, -labels.png")
        except Problem as problem:
            print(problem)
            status = 1
    return status


def main(argv=None):
    """Returns the exit status, or raises what run_command explains."""
    args = parse(argv)
    paths = [find_checkpoint(path) for path in args.ckpt or ["runs"]]
    if args.images:
        return segment_all(args, paths[0])
    runs = [measure(path, args, args.split, args.data) for path in paths]
    runs += [measure(path, args, args.split, args.data, raw=True)
             for path, run in zip(paths, runs) if run["predict"].logit_weights]
    if len({run["split"].folder for run in runs}) > 1:
        raise Problem("these networks were trained on different data: name with --data what to "
                      "measure them on")
    own = paths[0].parent if paths[0].name == "best.pt" else Path("runs") / paths[0].stem
    out = Path(args.out or (own / args.split if len(paths) == 1 else "runs/comparison"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(report_text(runs), encoding="utf-8")
    draw_examples(out / "examples.png", runs)
    draw_confusion(out / "confusion.png", runs[0])
    print(report_text(runs, args.per_class))
    print(f"Written into {out}: report.md, examples.png, confusion.png")
    return 0


if __name__ == "__main__":
    run_command("evaluate.py", main)
