"""Measures trained networks, compares them, and segments your own pictures.

Everything rests on one matrix per image: confusion[true, predicted] counts the pixels of class
`true` that the network took for `predicted`, at the size of the prepared labels, without the pixels
labelled 255 ("ignore"). Sums of these matrices give every measure in the paper. The main one is
mIoU, the mean over classes of the intersection over union: the pixels that are of a class in truth
and prediction, divided by those that are in either. A class that occurs in neither is skipped.
"""
import argparse
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, figure, patches
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from hourglass import StackedHourglass
from icnet import ICNet
from segnet import SegNet

MODELS = {"icnet": ICNet, "segnet": SegNet, "hourglass": StackedHourglass}
IGNORE = 255        # label of pixels that count nowhere
# The figures of scores() and their titles. The paper calls two of them F1.
FIGURES = dict(miou="mIoU", accuracy="accuracy", class_accuracy="accuracy, mean over classes",
               f1="F1, mean over classes", body_f1="F1, body against background")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # huge pages save ICNet a fifth of its time
warnings.filterwarnings("ignore", "Mean of empty slice|All-NaN slice")     # NaN means "unknown"


class Problem(Exception):
    """Something the user can mend: one sentence that names the value and the way out."""


# ---- Predictions and metrics

class Predictor:
    """A network on `device` in "fp32" or "bf16", with what evaluation takes from its checkpoint.
    logit_weights w: K floats, or None. A network trained on logits * w also predicts from these."""

    def __init__(self, checkpoint, network, device, precision):
        self.network = network.to(device, memory_format=torch.channels_last)
        self.classes, self.settings = checkpoint["classes"], checkpoint["settings"]
        self.logit_weights = checkpoint["logit_weights"]
        self.device, self.precision = device, precision

    @torch.no_grad()
    def __call__(self, images, size):
        """(B, 3, H, W) uint8 -> prediction (B, *size) int64, logits (B, K, *size) float32."""
        images = normalise(images.to(self.device), self.classes)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.network(images).float()
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
    """Confusion matrices (N, K, K) int64 on the CPU, one per frame (of `indices`, else of all), and
    criterion's mean loss over their pixels (NaN without a criterion). predict: a Predictor."""
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
    recall (its accuracy) where it is true. body_f1: all classes but 0, the background, as one."""
    confusion = np.asarray(confusion, dtype=np.float64)
    tp, true, predicted = np.diagonal(confusion, 0, -2, -1), confusion.sum(-1), confusion.sum(-2)
    body_tp, body_sum = confusion[..., 1:, 1:].sum((-2, -1)), (true + predicted)[..., 1:].sum(-1)
    iou, f1, recall = tp / (true + predicted - tp), 2 * tp / (true + predicted), tp / true
    return dict(iou=iou, class_f1=f1, class_precision=tp / predicted, recall=recall,
                miou=np.nanmean(iou, -1), f1=np.nanmean(f1, -1), body_f1=2 * body_tp / body_sum,
                class_accuracy=np.nanmean(recall, -1), accuracy=tp.sum(-1) / true.sum(-1))


def bootstrap(confusions, clips, other=None, draws=1000, seed=0):
    """Half widths of the 95 % intervals of all FIGURES, or of their differences to `other`'s. The
    bootstrap (Efron 1979) computes them again for clips drawn with replacement; whole clips, since
    frames of one are much alike. confusions, other: (N, K, K) int64; clips: N names of clips."""
    names, clips = np.unique(clips, return_inverse=True)
    C, drawn = len(names), []
    times = np.random.default_rng(seed).multinomial(C, np.full(C, 1 / C), size=draws)   # (draws, C)
    for matrices in [confusions] if other is None else [confusions, other]:
        per_clip = np.zeros((C, matrices[0].numel()))
        np.add.at(per_clip, clips, matrices.reshape(len(clips), -1).numpy())
        drawn.append(scores((times @ per_clip).reshape(-1, *matrices.shape[1:])))
    values = [drawn[0][key] - (0 if other is None else drawn[1][key]) for key in FIGURES]
    halves = np.subtract(*np.nanpercentile(values, (97.5, 2.5), axis=1)) / 2
    return dict(zip(FIGURES, halves if C > 1 else np.full_like(halves, np.nan)))


def paired_difference(one, other, clips):
    """mIoU of `one` minus that of `other` on the same frames, and its half width of 95 %."""
    difference = float(scores(one.sum(0))["miou"] - scores(other.sum(0))["miou"])
    return difference, bootstrap(one, clips, other)["miou"]


# ---- The prepared folder

def read_classes(data, count=False):
    """The content of DATA/classes.json, with defaults for all but `names`. count: add what
    count_pixels finds in the train split; stored on first use. Raises Problem for a bad folder."""
    path = Path(data) / "classes.json"
    try:
        stored = json.loads(path.read_bytes())
        K = len(stored["names"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Problem(f"{data} is missing or unfinished: name other --data, run prepare_surreal.py "
                      f'or write your own {path}: {{"names": ["background", ...]}}') from error
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
    K, pixels, moments = len(split.classes["names"]), 0, 0
    for frame in tqdm(split.frames, desc="counting labels", unit=" frames", disable=None):
        image, label = split.load_frame(frame)
        values = image.reshape(-1, 3) / 255
        moments = moments + np.stack([values.mean(0), (values ** 2).mean(0)]) / len(split.frames)
        pixels = pixels + np.bincount(label.ravel(), minlength=IGNORE + 1)[:K]
    if np.count_nonzero(pixels) < 2:
        raise Problem(f"{split.folder}/labels show one class. 255 means ignore, so a mask of 0 and "
                      "255 has to become one of 0 and 1")
    mean, std = moments[0], np.sqrt(np.maximum(moments[1] - moments[0] ** 2, 1e-6))
    return dict(size=split.prepared, pixels=pixels.tolist(), mean=mean.tolist(), std=std.tolist())


def pictures_in(folder, endings=(".jpg", ".jpeg", ".png")):
    """Sorted paths of a folder's pictures, without the "._" files that macOS leaves."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [f"{folder}/{name}" for name in names
            if name.lower().endswith(endings) and not name.startswith("._")]


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
        self.images = {Path(p).stem: p for p in pictures_in(self.folder / "images")}
        self.labels = {Path(p).stem: p for p in pictures_in(self.folder / "labels", ".png")}
        self.frames = sorted(self.images)
        if not self.frames:
            raise Problem(f"{data} has no split {split!r}: no .jpg or .png in {self.folder}/images")
        for frame in sorted(self.images.keys() - self.labels.keys()):
            raise Problem(f"{self.images[frame]} has no label {self.folder}/labels/{frame}.png")
        self.clips = [re.sub(r"_\d{3}$", "", frame) for frame in self.frames]   # without _ddd
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
        images, if known."""
        images, labels = zip(*(self.load_frame(self.frames[index]) for index in indices))
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
            raise Problem(f"{image_path} and {path} have to be {self.prepared} pixels square, and "
                          'the label a grey or palette PNG of ids: README, "Your own"')
        image = image.resize((self.size, self.size), Image.BILINEAR)    # averages when shrinking
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
    """Yields split[chunk] for every chunk of indices, in order, on `device`."""
    for batch in DataLoader(split, batch_size=None, sampler=chunks, num_workers=workers,
                            timeout=90 if workers else 0, pin_memory=device.type == "cuda",
                            worker_init_fn=ignore_signals):
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
    classes, split = runs[0]["classes"], runs[0]["split"]
    names, columns, tables = classes["names"], [], []
    for run in runs:
        confusion = run["confusions"].sum(0).numpy()
        figures, halves = scores(confusion), bootstrap(run["confusions"], split.clips)
        pairs = [(a, b) for a, b in enumerate(classes["mirror"]) if a != b]     # left and right
        swapped = sum(confusion[pair] for pair in pairs)
        swapped /= max(confusion.sum() - confusion.trace(), 1)
        column = {"%": run["name"], "image size": run["split"].size}
        column |= {title: percent(figures[key], halves[key]) for key, title in FIGURES.items()}
        column["left and right confused, of wrong pixels"] = percent(swapped if pairs else np.nan)
        columns.append(column | {f"accuracy: {group}": percent(np.nanmean(figures["recall"][ids]))
                                 for group, ids in classes["groups"].items()})
        cells = zip(names, *(map(percent, figures[key]) for key in (
            "iou", "class_f1", "class_precision", "recall")))
        tables.append([(f"{run['name']}, %", "IoU", "F1", "precision", "accuracy"), *cells])
    lines = [f"**{classes['source']}**: {len(split.frames)} images of {split.folder}, "
             f"{len(set(split.clips))} clips\n",
             markdown([[title, *(column[title] for column in columns)] for title in columns[0]]),
             "+-: half the 95 % interval over the choice of clips, not of the training seed."]
    for one, other in itertools.combinations(runs, 2):
        points = percent(*paired_difference(one["confusions"], other["confusions"], split.clips), 2)
        lines.append(f"{one['name']} against {other['name']}: {points} points of mIoU, same clips.")
    return "\n".join(lines + ["\n" + markdown(table) for table in tables if per_class])


def colours(labels, palette):
    """labels (..., H, W) integers -> (..., H, W, 3) uint8; 255, "ignore", is light grey."""
    table = np.full((IGNORE + 1, 3), 224, np.uint8)
    table[:len(palette)] = palette
    return table[labels]


def draw_grid(path, rows, classes, ids):
    """Rows (name, pictures (H, W, 3) uint8, their titles) above a legend of the classes `ids`."""
    across, (height, width) = len(rows[0][1]), rows[0][1][0].shape[:2]
    cell = max(2.9, min(width, 1024) / 110)     # inches: a pixel for every pixel up to 1024
    inches = cell * across + 1, cell * len(rows) * height / width + 1.3
    sheet = figure.Figure(inches, dpi=110, layout="constrained")
    grid = sheet.subplots(len(rows), across, squeeze=False)
    for line, (name, pictures, titles) in zip(grid, rows):
        line[0].set_ylabel(name)
        for axes, picture, title in zip(line, pictures, titles):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[], title=title)
    sheet.legend([patches.Patch(color=np.array(classes["palette"][i]) / 255) for i in ids],
                 [classes["names"][i] for i in ids], title=classes["source"], fontsize=9,
                 loc="outside lower center", frameon=False, ncols=int(1.6 * across))
    sheet.savefig(path)


def draw_examples(path, runs):
    """Six clips, from the best mIoU to the worst: photo, ground truth, a row for each network."""
    own = np.array([np.nan_to_num(scores(run["confusions"])["miou"]) for run in runs])
    split, classes = runs[0]["split"], runs[0]["classes"]
    first = np.unique(split.clips, return_index=True)[1]
    order = first[np.argsort(-own.mean(0)[first], kind="stable")]
    chosen = order[np.unique(np.linspace(0, len(order) - 1, 6).astype(int))]
    batch = Split(split.folder.parent, split.folder.name, classes)[chosen]     # as prepared
    rows = [("photo", batch["images"].permute(0, 2, 3, 1).numpy(), [""] * 6),
            ("ground truth", colours(batch["labels"].numpy(), classes["palette"]), [""] * 6)]
    for run, values in zip(runs, own[:, chosen]):
        prediction, _ = run["predict"](run["split"][chosen]["images"], batch["labels"].shape[1:])
        rows.append((run["name"], colours(prediction.cpu().numpy(), classes["palette"]),
                     [f"mIoU {percent(value)} %" for value in values]))
    draw_grid(path, rows, classes, range(len(classes["names"])))


# ---- Devices, checkpoints, errors, command line

def pick_device(name="auto", precision="auto"):
    """(torch.device, "fp32" or "bf16"). auto: CUDA, and bf16, where the hardware has them."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, dtype=torch.double, device=best if name == "auto" else name).device
    except (RuntimeError, AssertionError, TypeError) as error:  # MPS has no float64
        raise Problem(f"--device {name} cannot be used here: auto and cpu always can") from error
    able = torch.cpu.get_capabilities()
    fast = able.get("avx512_bf16") or able.get("amx_bf16")      # elsewhere bf16 would be slower
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    return device, precision if precision != "auto" else "bf16" if fast else "fp32"


def find_checkpoint(path, name="best.pt"):
    """The file `path`, or the newest `name` in that folder. Raises Problem for none."""
    found = [Path(path)] if Path(path).is_file() else list(Path(path).rglob(name))
    if not found:
        raise Problem(f"there is no checkpoint {path} or {name} in it: train one (train.py --help)")
    return max(found, key=os.path.getmtime)


def load_checkpoint(path):
    """(checkpoint of train.py, its network in eval()). Raises Problem for a file that is damaged or
    something else. weights_only: no code in the file is run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        network = MODELS[checkpoint["model"]](**checkpoint["kwargs"])
        network.load_state_dict(checkpoint["weights"])
        return checkpoint, network.eval()
    except Exception as error:          # a garbled file can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        raise Problem(f"{path} is no usable checkpoint of train.py ({reason})") from error


TROUBLE = {     # words in an exception, and what they mean to a user
    r"dataloader (worker \(|timed)": "the processes that read images died or hang: --workers 0",
    "alloc|out of memory|memoryerror": "out of memory: try a smaller --batch-size or --size"}


def run_command(program, function):
    """Ends the process with the status of function(); with 2 after one sentence on what a user can
    mend or a machine runs out of; with 130 after Ctrl-C. A bug keeps its traceback."""
    status, message = 2, None
    try:
        status = function()
    except KeyboardInterrupt:
        status, message = 130, "stopped by Ctrl-C"
    except (Problem, OSError) as error:     # a worker's traceback ends in "Problem: ..."
        message = (str(error) or repr(error)).splitlines()[-1].split("Problem: ")[-1]
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
        add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: fastest")
        add("--workers", type=int, default=1, help="processes that read images; 0: only this one")

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def measure(path, args, split, data=None):
    """One checkpoint on one split: what reports and pictures need."""
    predict = Predictor(*load_checkpoint(path), *pick_device(args.device, args.precision))
    data = data or predict.settings["data"]
    classes, trained = read_classes(data), predict.classes
    if classes["names"] != trained["names"]:
        raise Problem(f"{data} has other classes than {path}: name other data with --data")
    frames = Split(data, split, classes, predict.settings["size"] or trained["size"])
    confusions, _ = evaluate_split(predict, frames, args.batch_size, args.workers)
    name = path.resolve().parent.name if path.name in ("best.pt", "last.pt") else path.stem
    return dict(name=name, predict=predict, split=frames, classes=classes, confusions=confusions)


def segment(path, args):
    """Writes <picture>-overlay.png and <picture>-labels.png of args.images, of any size. A broken
    or missing picture is reported and skipped; the exit status is then 1, else 0."""
    predict = Predictor(*load_checkpoint(path), *pick_device(args.device, args.precision))
    size, palette = predict.settings["size"] or predict.classes["size"], predict.classes["palette"]
    out, status = Path(args.out or "runs/pictures"), 0
    out.mkdir(parents=True, exist_ok=True)
    for file in (Path(f) for entry in args.images for f in pictures_in(entry) or [entry]):
        try:
            image = open_picture(file).convert("RGB")
        except Problem as problem:
            print(problem)
            status = 1
            continue
        small = ImageOps.contain(image, (size, size), Image.BILINEAR)       # as in training
        shown = ImageOps.contain(image, [min(1024, max(image.size))] * 2)   # to look at
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
        prediction = predict(pixels, shown.size[::-1])[0][0].cpu().numpy()
        photo, coloured = np.asarray(shown), colours(prediction, palette)
        overlay = np.where(prediction[..., None] > 0, photo // 3 + coloured // 3 * 2, photo)
        result = out / "-".join(file.parts[-2:]).lstrip("./-")  # two folders can have a 1.jpg
        draw_grid(f"{result}-overlay.png", [("", [photo, overlay], ["", ""])], predict.classes,
                  np.unique(prediction))
        labels = Image.fromarray(prediction.astype(np.uint8)).resize(image.size, Image.NEAREST)
        labels.putpalette(colours(np.arange(IGNORE + 1), palette).tobytes())
        labels.save(f"{result}-labels.png")
        print(f"{file}: {result}-overlay.png, -labels.png")
    return status


def main(argv=None):
    """Returns the exit status, or raises what run_command explains."""
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--ckpt", nargs="*", default=[], metavar="PATH",
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
        return segment(paths[0], args)
    runs = [measure(path, args, args.split, args.data) for path in paths]
    if len({run["split"].folder for run in runs}) > 1:
        raise Problem("these networks were trained on different data: choose one with --data")
    beside = paths[0].parent / args.split if len(paths) == 1 else "runs/comparison"
    out = Path(args.out or beside)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(report_text(runs), encoding="utf-8")
    draw_examples(out / "examples.png", runs)
    print(report_text(runs, args.per_class), f"\nWritten into {out}: report.md, examples.png")
    return 0


if __name__ == "__main__":
    run_command("evaluate.py", main)
