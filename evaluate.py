"""Measures trained networks, compares them, and segments anybody's pictures.

    python evaluate.py --ckpt                         the newest run: table, report and pictures beside its checkpoint
    python evaluate.py --ckpt A/best.pt B/best.pt     several networks side by side
    python evaluate.py --ckpt A/best.pt --images me.jpg holiday/

Everything rests on one confusion matrix per image: confusion[true, predicted], int64, counted at the size of the
prepared labels, 255 ("ignore") left out. Sums of them give the paper's figures (Section 2.4 of the paper; F1 in both of its
readings), resampled sums give the 95 % intervals. A class that does not occur is skipped, not scored.

The first half of the file is what train.py shares: prepared folders, batches, devices, checkpoints.
"""
import argparse
import json
import math
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from hourglass import StackedHourglass
from icnet import ICNet
from segnet import SegNet

IGNORE = 255                        # label of pixels that count nowhere
MODELS = {"icnet": ICNet, "segnet": SegNet, "hourglass": StackedHourglass}
LARGEST_PICTURE = 100_000_000       # pixels; a header that claims more is refused before anything is allocated


class Problem(Exception):
    """Something the user can mend, as one sentence that names the value and the way out."""


class Parser(argparse.ArgumentParser):
    """Help with defaults, no abbreviated options, and errors of one line with exit status 2."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def write_atomically(path, function):
    """Calls function(binary file) on a temporary file beside `path` and renames it: the file is whole or not there."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.chmod(temporary, 0o644)          # mkstemp's 0600 would keep colleagues out
            function(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------- prepared data

def check_classes(classes):
    """Checks the content of a classes.json (types, lengths, ranges) and returns it. Raises Problem with what is wrong."""
    def need(holds, sentence):
        if not holds:
            raise Problem(f"the description of the classes is unusable: {sentence}")

    def whole(value, low, high):
        return type(value) is int and low <= value <= high

    def involution(values, length):
        return (type(values) is list and len(values) == length
                and all(whole(v, 0, length - 1) for v in values)
                and all(values[v] == i for i, v in enumerate(values)))

    need(type(classes) is dict, "it is not a dictionary")
    kinds = dict(names=list, palette=list, mirror=list, groups=dict, pixels=list, size=int, mean=list, std=list, source=str)
    for key, kind in kinds.items():
        need(type(classes.get(key)) is kind, f"`{key}` is missing or no {kind.__name__}")
    names = classes["names"]
    K = len(names)
    need(2 <= K <= IGNORE, f"{K} class names, 2 to {IGNORE} are possible")
    need(all(type(name) is str and 0 < len(name) <= 60 for name in names) and len(set(names)) == K,
         "`names` needs distinct strings of 1 to 60 characters")
    need(len(classes["palette"]) == K and all(
        type(colour) is list and len(colour) == 3 and all(whole(v, 0, 255) for v in colour)
        for colour in classes["palette"]), f"`palette` needs {K} colours of three numbers from 0 to 255")
    need(involution(classes["mirror"], K), f"`mirror` needs {K} ids that, applied twice, change nothing")
    for name, members in classes["groups"].items():
        need(type(members) is list and len(members) > 0 and all(whole(v, 0, K - 1) for v in members),
             f"the group {name!r} needs a list of ids from 0 to {K - 1}")
    joint_mirror = classes.get("joint_mirror", [])
    need(type(joint_mirror) is list and involution(joint_mirror, len(joint_mirror)),
         "`joint_mirror` needs ids that, applied twice, change nothing")
    need(len(classes["pixels"]) == K and all(whole(v, 0, 2 ** 62) for v in classes["pixels"]),
         f"`pixels` needs {K} whole numbers from 0")
    need(whole(classes["size"], 8, 8192), "`size` must lie between 8 and 8192")
    for key, low in (("mean", 0), ("std", 1e-6)):
        need(len(classes[key]) == 3 and all(type(v) in (int, float) and low <= v <= 1 for v in classes[key]),
             f"`{key}` needs three numbers between 0 and 1")
    return classes


def read_classes(data):
    """The checked content of DATA/classes.json. Raises Problem where the folder is missing, unfinished or wrong."""
    path = Path(data) / "classes.json"
    if not Path(data).is_dir():
        raise Problem(f"there is no folder {data}; prepare_surreal.py makes one, --data names another")
    if not path.is_file():
        raise Problem(f"{data} has no classes.json, so it is unfinished or no prepared folder; "
                      "run prepare_surreal.py again to finish it, or name another with --data")
    try:
        return check_classes(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise Problem(f"{path} cannot be read: {error}") from error
    except Problem as problem:
        raise Problem(f"{path}: {problem}") from problem


def open_picture(path, size=None):
    """A decoded PIL image. With `size`, its (width, height) must be that. Raises Problem naming the file."""
    try:
        with Image.open(path) as image:
            if size is not None and image.size != size:
                raise Problem(f"{path} is {image.width} x {image.height} pixels, {size[0]} x {size[1]} are expected")
            if image.width * image.height > LARGEST_PICTURE:
                raise Problem(f"{path} says it has {image.width} x {image.height} pixels, which is refused")
            image.load()
            return image
    except Problem:
        raise
    except Image.DecompressionBombError as error:
        raise Problem(f"{path} says it has more pixels than are accepted, which is refused") from error
    except Exception as error:          # Pillow answers garbled files with whatever its parser stumbled over
        reason = str(error).replace(str(path), "").strip(" '\"") or type(error).__name__
        raise Problem(f"{path} cannot be read: {reason}") from error


class Split:
    """The frames of one split of a prepared folder; no image is opened before it is loaded.

    size: side to which images are resized (default: as prepared). Labels keep the prepared size, at which all
    metrics are taken, unless `labels_at_size` (training) brings them, nearest neighbour, to the images' size.
    Raises Problem for a missing or empty split and for an image without label.
    """

    def __init__(self, data, split, classes, size=None, labels_at_size=False):
        self.folder = Path(data) / split
        self.num_classes, self.prepared = len(classes["names"]), classes["size"]
        self.size = size or self.prepared
        self.label_size = self.size if labels_at_size else self.prepared
        if not (self.folder / "images").is_dir():
            raise Problem(f"{data} has no split {split!r}: there is no folder {self.folder / 'images'}")
        self.frames = sorted(name[:-4] for name in os.listdir(self.folder / "images") if name.endswith(".jpg"))
        if not self.frames:
            raise Problem(f"the split {split!r} of {data} is empty: no .jpg in {self.folder / 'images'}")
        labels = set(os.listdir(self.folder / "labels")) if (self.folder / "labels").is_dir() else set()
        for frame in self.frames:
            if frame + ".png" not in labels:
                raise Problem(f"{self.folder / 'images' / frame}.jpg has no label {self.folder / 'labels' / frame}.png")
        self.has_joints = (self.folder / "joints.npz").is_file()
        self.joints = None              # (frames, J, 2), read when first needed

    def load(self, indices):
        """A batch: images (B, 3, S, S) uint8 (channels last in memory), labels (B, L, L) uint8, frames, and, where the
        split has them, joints (B, J, 2) float32 in pixels of the loaded images. Raises Problem naming a bad file."""
        frames = [self.frames[i] for i in indices]
        images, labels = zip(*(self.load_frame(frame) for frame in frames))
        batch = dict(images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
                     labels=torch.from_numpy(np.stack(labels)), frames=frames)
        if self.has_joints:
            scale = self.size / self.prepared
            joints = (self.read_joints()[list(indices)] + 0.5) * scale - 0.5        # a joint lies on a pixel's centre
            batch["joints"] = torch.from_numpy(joints.astype(np.float32))
        return batch

    def load_frame(self, frame):
        prepared = (self.prepared, self.prepared)
        image = open_picture(self.folder / "images" / f"{frame}.jpg", prepared).convert("RGB")
        label = open_picture(self.folder / "labels" / f"{frame}.png", prepared)
        if label.mode not in ("P", "L"):
            raise Problem(f"{self.folder / 'labels' / frame}.png has mode {label.mode}; a label is a palette image")
        if self.size != self.prepared:
            image = image.resize((self.size, self.size), Image.BILINEAR)            # Pillow averages when shrinking
        if self.label_size != self.prepared:
            label = label.resize((self.label_size, self.label_size), Image.NEAREST)
        label = np.array(label)
        beyond = label[(label >= self.num_classes) & (label != IGNORE)]
        if beyond.size:
            raise Problem(f"{self.folder / 'labels' / frame}.png has the label {beyond[0]}; "
                          f"0 to {self.num_classes - 1} and {IGNORE} (ignore) are possible")
        return np.asarray(image), label

    def read_joints(self):
        if self.joints is None:
            path = self.folder / "joints.npz"
            try:
                with np.load(path, allow_pickle=False) as stored:
                    rows = {str(frame): row for row, frame in enumerate(stored["frames"])}
                    joints = np.asarray(stored["joints"], dtype=np.float32)
                if joints.ndim != 3 or joints.shape[2] != 2 or len(rows) != len(joints):
                    raise ValueError(f"joints of shape {joints.shape} for {len(rows)} frames")
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise Problem(f"{path} cannot be read: {error}") from error
            joints = np.concatenate([joints, np.full((1,) + joints.shape[1:], np.nan, np.float32)])
            self.joints = joints[[rows.get(frame, -1) for frame in self.frames]]    # -1: the row of NaN
        return self.joints


class Batches(Dataset):
    """Item i is split.load(chunks[i]); a Problem comes back as a value, since DataLoader would wrap it in a traceback."""

    def __init__(self, split, chunks):
        self.split, self.chunks = split, chunks

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, item):
        try:
            return self.split.load(self.chunks[item])
        except Problem as problem:
            return problem


def stream(batches, start, stop, workers, device):
    """Batches start ... stop - 1 in order, their tensors on `device`. Raises Problem for bad data or a dead worker."""
    loader = DataLoader(batches, batch_size=None, sampler=range(start, stop), num_workers=workers,
                        pin_memory=device.type == "cuda")
    try:
        for batch in loader:
            if isinstance(batch, Problem):
                raise batch
            yield {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
                   for key, value in batch.items()}
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise Problem("a data worker died, perhaps for want of memory; fewer --workers need less") from error


def chunks_of(count, batch_size):
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def normalise(images, classes):
    """(B, 3, H, W) uint8 -> (x / 255 - mean) / std, float32, channels last, in one pass over memory."""
    mean, std = (torch.tensor(classes[key], dtype=torch.float32, device=images.device).view(1, 3, 1, 1)
                 for key in ("mean", "std"))
    images = torch.addcmul(-mean / std, images, 1 / (255 * std))
    return images.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- devices and checkpoints

def pick_device(name="auto"):
    """torch.device for --device; "auto" is the GPU where CUDA finds one. Raises Problem for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise Problem(f"--device {name} cannot be used: {reason}; try auto or cpu") from error


def pick_precision(device, name="auto"):
    """"fp32" or "bf16"; "auto" takes bf16 where the hardware multiplies it, since elsewhere it is slower than fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def autocast(device, precision):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def load_checkpoint(path):
    """The checked dictionary of a checkpoint (tensors on the CPU). Nothing in the file is ever run: weights_only.

    Raises Problem for a missing or truncated file, one that is no checkpoint of ours, a pickle that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise Problem(f"there is no checkpoint {path}")
    if not zipfile.is_zipfile(path):
        raise Problem(f"{path} is truncated or no checkpoint; try best.pt or last.pt beside it, or an older copy")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:          # a garbled pickle can raise anything; none of it is executed
        if "GLOBAL" in str(error) or "weights_only" in str(error):
            raise Problem(f"{path} is refused: it holds Python objects that could run code when loaded") from error
        raise Problem(f"{path} is damaged or no checkpoint; try best.pt or last.pt beside it") from error
    kinds = dict(model=str, kwargs=dict, weights=dict, step=int, classes=dict, settings=dict)
    wrong = ([key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]
             if isinstance(checkpoint, dict) else list(kinds))
    if wrong:
        raise Problem(f"{path} is no checkpoint of this project: {', '.join(wrong)} missing or of the wrong type")
    if checkpoint["model"] not in MODELS:
        raise Problem(f"{path} holds a network {checkpoint['model']!r}; known are {', '.join(MODELS)}")
    try:
        K = len(check_classes(checkpoint["classes"])["names"])
    except Problem as problem:
        raise Problem(f"{path}: {problem}") from problem
    weights = checkpoint.get("logit_weights")
    size = checkpoint["settings"].get("size")
    if checkpoint["kwargs"].get("num_classes", 25) != K:
        raise Problem(f"{path}: the network has other classes than the {K} of its `classes`")
    if weights is not None and not (type(weights) is list and len(weights) == K and all(
            type(w) is float and math.isfinite(w) for w in weights)):
        raise Problem(f"{path}: `logit_weights` needs {K} finite numbers")
    if size is not None and not (type(size) is int and 8 <= size <= 8192):
        raise Problem(f"{path}: `size` in its settings must lie between 8 and 8192")
    return checkpoint


def build_model(checkpoint):
    """The checkpoint's network on the CPU, in eval() mode. Weights of parts that only training uses may be missing.

    Built on the "meta" device first, so weights that do not fit are found before memory is spent on them.
    """
    kind, kwargs = MODELS[checkpoint["model"]], checkpoint["kwargs"]
    try:
        with torch.device("meta"):
            expected = kind(**kwargs).state_dict()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise Problem(f"the checkpoint's network cannot be built with {kwargs}: {error}") from error
    used = {name for name in expected if not name.startswith(kind.training_only)}
    weights = {name: tensor for name, tensor in checkpoint["weights"].items()
               if not str(name).startswith(kind.training_only)}
    for name in sorted(used | weights.keys(), key=str):
        if not (name in used and torch.is_tensor(weights.get(name)) and weights[name].shape == expected[name].shape):
            raise Problem(f"the checkpoint's weights do not fit its network {checkpoint['model']}: {name} is "
                          "missing, surplus or of another shape")
    model = kind(**kwargs)
    model.load_state_dict(weights, strict=False)
    return model.eval()


def find_checkpoint(root="runs"):
    """The newest best.pt under runs/, else the newest last.pt. Raises Problem where there is none."""
    for name in ("best.pt", "last.pt"):
        found = [path for path in Path(root).rglob(name) if path.is_file()]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    raise Problem(f"there is no best.pt or last.pt under {root}/; train a network first (python train.py --model segnet) "
                  "or name a checkpoint: --ckpt PATH")


# ---------------------------------------------------------------- predictions and what is counted

@torch.no_grad()
def predict(model, images, size, logit_weights=None):
    """images (B, 3, H, W) normalised -> prediction (B, *size) int64 and logits (B, K, *size) float32.

    logits are resized bilinearly where `size` is another than theirs. `logit_weights` (K floats): the network was trained
    with direct weighting, softmax(x w), and predicts from x w; the logits returned are x.
    """
    logits = model(images).float()
    if tuple(logits.shape[2:]) != tuple(size):
        logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
    scores = logits if logit_weights is None else logits * logits.new_tensor(logit_weights).view(1, -1, 1, 1)
    return scores.argmax(1), logits


def confusion_matrices(prediction, labels, K):
    """(B, H, W) int64 predictions and uint8 labels -> (B, K, K) int64, [image, true, predicted], 255 left out.

    One bincount: ignored pixels fall into a row K of their own, which is cut off.
    """
    B = len(labels)
    rows = labels.clamp(max=K).to(torch.int64).view(B, -1)
    rows += torch.arange(B, device=labels.device).view(B, 1) * (K + 1)
    cells = rows.mul_(K).add_(prediction.view(B, -1))
    return torch.bincount(cells.view(-1), minlength=B * (K + 1) * K).view(B, K + 1, K)[:, :K]


def evaluate_split(model, split, classes, device, precision, batch_size, workers, logit_weights=None):
    """One confusion matrix per frame of `split`: (N, K, K) int64 on the CPU, in the order of split.frames.

    model: on `device`, in eval() mode. classes: for the normalisation, so those of the checkpoint.
    Returns (confusions, raw): raw (K, K) is the total of the authors' reading of direct weighting (the argmax of the
    logits as they are), None without `logit_weights`.
    """
    K = len(classes["names"])
    parts, raw = [], None if logit_weights is None else 0
    batches = Batches(split, chunks_of(len(split.frames), batch_size))
    with tqdm(total=len(split.frames), unit="image", disable=None, leave=False) as bar:
        for batch in stream(batches, 0, len(batches), workers, device):
            labels = batch["labels"]
            with autocast(device, precision):
                prediction, logits = predict(model, normalise(batch["images"], classes), labels.shape[1:], logit_weights)
            parts.append(confusion_matrices(prediction, labels, K))
            if logit_weights is not None:
                raw = raw + confusion_matrices(logits.argmax(1), labels, K).sum(0)
            bar.update(len(labels))
    return torch.cat(parts).cpu(), raw if raw is None else raw.cpu()


# ---------------------------------------------------------------- metrics

def ratio(numerator, denominator):
    """numerator / denominator, NaN (skipped by nanmean) where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)


def mean_known(values):
    """Mean over the last axis without NaN; NaN where nothing is known."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0).sum(-1), known.sum(-1))


def scores(confusion):
    """All figures from (..., K, K) matrices: dict of (...) arrays and, for the classes, (..., K) arrays; NaN: not defined.

    IoU = TP / (TP + FP + FN) and F1 = 2 TP / (2 TP + FP + FN) of a class count where it occurs in truth or prediction,
    precision where it was predicted, recall (which is its accuracy) where it occurs in the truth.
    body_*: every class but 0, background, taken as one.
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    true, predicted = confusion.sum(-1), confusion.sum(-2)
    iou, f1 = ratio(right, true + predicted - right), ratio(2 * right, true + predicted)
    precision, recall = ratio(right, predicted), ratio(right, true)
    body, body_true, body_predicted = confusion[..., 1:, 1:].sum((-2, -1)), true[..., 1:].sum(-1), predicted[..., 1:].sum(-1)
    return dict(miou=mean_known(iou), accuracy=ratio(right.sum(-1), true.sum(-1)), f1=mean_known(f1),
                body_f1=ratio(2 * body, body_true + body_predicted), body_precision=ratio(body, body_predicted),
                body_recall=ratio(body, body_true), precision=mean_known(precision), recall=mean_known(recall),
                class_accuracy=mean_known(recall), per_class=dict(iou=iou, f1=f1, precision=precision, recall=recall))


def plain(value):
    """Arrays and NumPy numbers as lists, floats and None (for NaN), so that JSON has no NaN."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        return [plain(item) for item in value]
    return None if math.isnan(value) else float(value)


def metrics(confusion, groups=None):
    """The figures of `scores` for one (K, K) matrix as floats or None, and `columns`: the mean accuracy of each group's
    classes, as in the paper's Tables 2 and 5."""
    result = scores(confusion)
    accuracy = result["per_class"]["recall"]
    result["columns"] = {name: mean_known(accuracy[members]) for name, members in (groups or {}).items()}
    return plain(result)


def resample(confusions, frames, draws=1000, seed=0):
    """(draws, K, K) sums of the matrices of randomly drawn clips, as many as there are, with replacement; or None for
    fewer than two clips. Whole clips, since the frames of one clip (its name without _ddd) are much alike."""
    clips = np.unique([frame.rpartition("_")[0] or frame for frame in frames], return_inverse=True)[1]
    count = clips.max(initial=-1) + 1
    if count < 2:
        return None
    confusions = np.asarray(confusions)
    per_clip = np.zeros((count, *confusions.shape[1:]))
    np.add.at(per_clip, clips, confusions)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return (times.astype(np.float64) @ per_clip.reshape(count, -1)).reshape(draws, *confusions.shape[1:])


def bootstrap(confusions, frames, draws=1000, seed=0):
    """Half widths of the 95 % intervals of every figure, by bootstrap over clips (Efron 1979, percentile method)."""
    totals = resample(confusions, frames, draws, seed)
    if totals is None:
        return {}
    return {key: plain(np.subtract(*np.nanpercentile(values, (97.5, 2.5))) / 2)
            for key, values in scores(totals).items() if key != "per_class"}


def palette_image(labels, palette):
    """labels (H, W) uint8 -> a PIL palette image of 256 entries; 255, "ignore", is light grey."""
    image = Image.fromarray(np.ascontiguousarray(labels, dtype=np.uint8))
    entries = [value for colour in palette for value in colour]
    image.putpalette(entries + [0] * (3 * IGNORE - len(entries)) + [224, 224, 224])
    return image


def write_report(folder, report):
    """Writes report.json into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", lambda file: file.write(json.dumps(report, indent=1).encode()))


def main(argv=None):
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", nargs="*", default=[], metavar="PATH", help="checkpoints; none: the newest best.pt under runs/")
    parser.add_argument("--data", help="prepared folder; none: the one the run was trained on")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="split to measure on")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 where the hardware has it")
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time; more need more memory, results stay the same")
    parser.add_argument("--workers", type=int, default=1, help="processes that read images")
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    path = options.ckpt[0] if options.ckpt else find_checkpoint()
    checkpoint = load_checkpoint(path)
    data = options.data or checkpoint["settings"].get("data")
    split = Split(data, options.split, read_classes(data), checkpoint["settings"].get("size"))
    model = build_model(checkpoint).to(device, memory_format=torch.channels_last)
    confusions, _ = evaluate_split(model, split, checkpoint["classes"], device, pick_precision(device, options.precision),
                                   options.batch_size, options.workers, checkpoint.get("logit_weights"))
    print(json.dumps(metrics(confusions.sum(0), checkpoint["classes"]["groups"]), indent=1))


if __name__ == "__main__":
    main()
