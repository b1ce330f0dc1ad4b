"""Measures trained networks, compares them, and segments anybody's pictures.

    python evaluate.py --ckpt                         the newest run: table, report, pictures
    python evaluate.py --ckpt A/best.pt B/best.pt     several networks side by side
    python evaluate.py --ckpt A/best.pt --images me.jpg holiday/

Everything rests on one matrix per image, confusion[true, predicted], int64, counted at the size of
the prepared labels without the pixels labelled 255 ("ignore"). Sums of them give the figures of
the paper's tables (F1 in both of its readings), sums over resampled clips their 95 % intervals.
A class that does not occur is skipped, not scored.

The first half is what train.py shares: prepared folders, batches, devices, checkpoints.
"""
import argparse
import atexit
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
import weakref
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from hourglass import StackedHourglass
from icnet import ICNet
from segnet import SegNet

# On Linux torch then asks for memory in pages of 2 MiB, not 4 KiB. On a CPU every large tensor is
# fresh memory, and getting it page by page cost a fifth of ICNet's time in evaluation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

IGNORE = 255                            # label of pixels that count nowhere
MODELS = {"icnet": ICNet, "segnet": SegNet, "hourglass": StackedHourglass}
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
FIGURES = dict(miou="mIoU", accuracy="accuracy", f1="F1, mean over classes",
               body_f1="F1, body against background", body_precision="precision, body",
               body_recall="recall, body", precision="precision, mean over classes",
               recall="recall, mean over classes", class_accuracy="accuracy, mean over classes")


class Problem(Exception):
    """Something the user can mend: one sentence that names the value and the way out."""


class Parser(argparse.ArgumentParser):
    """Help with defaults, no abbreviated options, errors of one line with exit status 2."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         allow_abbrev=False, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def write_atomically(path, function):
    """function(binary file) writes beside `path`, then a rename: the file is whole or absent."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep colleagues out
            function(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# ------------------------------------------------------------------------------- prepared data

def check_classes(classes):
    """The content of a classes.json, checked: types, lengths, ranges. Raises Problem."""
    def is_list(values, length, kinds, low, high):
        return (isinstance(values, list) and len(values) == length
                and all(type(value) in kinds and low <= value <= high for value in values))

    def is_mirror(values, length):
        return is_list(values, length, (int,), 0, length - 1) and all(
            values[there] == here for here, there in enumerate(values))

    def need(holds, sentence):
        if not holds:
            raise Problem(f"the description of the classes is wrong: {sentence}")

    need(isinstance(classes, dict), "it is no dictionary")
    names, groups, palette = map(classes.get, ("names", "groups", "palette"))
    joints = classes.get("joint_mirror")
    need(isinstance(names, list) and 2 <= len(names) < IGNORE and len(set(map(str, names))) == len(
        names) and all(isinstance(name, str) and 0 < len(name) <= 60 for name in names),
        f"`names` needs 2 to {IGNORE - 1} different strings of 1 to 60 characters")
    K = len(names)
    need(isinstance(palette, list) and len(palette) == K and all(
        is_list(colour, 3, (int,), 0, 255) for colour in palette), f"`palette` needs {K} colours")
    need(is_mirror(classes.get("mirror"), K), f"`mirror` needs {K} ids; twice it changes nothing")
    need(joints is None or isinstance(joints, list) and is_mirror(joints, len(joints)),
         "`joint_mirror` needs ids; twice it changes nothing")
    need(isinstance(groups, dict) and all(isinstance(ids, list) and ids and is_list(
        ids, len(ids), (int,), 0, K - 1) for ids in groups.values()),
        f"`groups` needs lists of ids from 0 to {K - 1}")
    need(is_list(classes.get("pixels"), K, (int,), 0, 2**62), f"`pixels` needs {K} counts")
    need(is_list([classes.get("size")], 1, (int,), 8, 8192), "`size` must lie between 8 and 8192")
    need(is_list(classes.get("mean"), 3, (int, float), 0, 1)
         and is_list(classes.get("std"), 3, (int, float), 1e-6, 1),
         "`mean` and `std` need three numbers between 0 and 1, `std` above 0")
    need(isinstance(classes.get("source"), str), "`source` must say where frames came from")
    return classes


def read_classes(data):
    """The content of DATA/classes.json. Raises Problem: folder missing, unfinished or wrong."""
    path = Path(data) / "classes.json"
    if not path.parent.is_dir():
        raise Problem(f"there is no folder {data}: prepare_surreal.py makes one, --data names one")
    if not path.is_file():
        raise Problem(f"{data} has no classes.json, so it is unfinished or no prepared folder: "
                      "repeat the command of prepare_surreal.py, or name another with --data")
    try:
        return check_classes(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError, Problem) as error:
        raise Problem(f"{path} cannot be used: {error}") from error


def open_picture(path, size=None):
    """A decoded PIL image, of (width, height) `size` if given. Raises Problem naming the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # 89 million pixels
            image = Image.open(path)    # reads the header only
        if size and image.size != size:
            raise ValueError(f"{image.width} x {image.height} pixels, not {size[0]} x {size[1]}")
        image.load()
        return image
    except Exception as error:          # Pillow lets through whatever a parser stumbled over
        raise Problem(f"{path} cannot be used: {str(error) or type(error).__name__}") from error


class Split:
    """The frames of one split of a prepared folder; no file is opened before it is needed.

    size: side to which images are resized (default: as prepared). Labels keep the prepared size,
    at which metrics are taken, unless `labels_at_size` (training) brings them to the images'.
    joints: whether batches have the joints, where there are any.
    Raises Problem for a missing or empty split and for an image without label.
    """

    def __init__(self, data, split, classes, size=None, labels_at_size=False, joints=False):
        self.folder, self.num_classes = Path(data) / split, len(classes["names"])
        self.prepared, self.size = classes["size"], size or classes["size"]
        self.label_size = self.size if labels_at_size else self.prepared
        images, labels = self.folder / "images", self.folder / "labels"
        self.frames = sorted(path.stem for path in images.glob("*.jpg"))
        if not self.frames:
            raise Problem(f"{data} has no split {split!r}: there is no .jpg in {images}")
        missing = set(self.frames) - {path.stem for path in labels.glob("*.png")}
        if missing:
            raise Problem(f"{images / min(missing)}.jpg has no label {labels / min(missing)}.png")
        self.has_joints = joints and (self.folder / "joints.npz").is_file()
        self.joints = None              # (frames, J, 2), read when first needed

    def load(self, indices):
        """A batch: images (B, 3, S, S) uint8, labels (B, L, L) uint8, frames and, where known,
        joints (B, J, 2) float32 in pixels of the loaded images. Raises Problem naming the file."""
        frames = [self.frames[index] for index in indices]
        images, labels = zip(*map(self.load_frame, frames))
        batch = dict(images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),  # channels last
                     labels=torch.from_numpy(np.stack(labels)), frames=frames)
        if self.has_joints:             # whole numbers are the centres of pixels
            joints = (self.read_joints()[list(indices)] + 0.5) * self.size / self.prepared - 0.5
            batch["joints"] = torch.from_numpy(joints.astype(np.float32))
        return batch

    def load_frame(self, frame):
        path, prepared = self.folder / "labels" / f"{frame}.png", (self.prepared, self.prepared)
        image = open_picture(self.folder / "images" / f"{frame}.jpg", prepared).convert("RGB")
        label = open_picture(path, prepared)
        if label.mode not in ("P", "L"):
            raise Problem(f"{path} is no palette image but of mode {label.mode}")
        if self.size != self.prepared:
            image = image.resize((self.size, self.size), Image.BILINEAR)   # averages when shrinking
        label = np.asarray(label.resize((self.label_size, self.label_size), Image.NEAREST))
        unknown = label[(label >= self.num_classes) & (label != IGNORE)]
        if unknown.size:
            raise Problem(f"{path} has the label {unknown[0]}; 0 to {self.num_classes - 1} and "
                          f"{IGNORE} (ignore) are possible")
        return np.asarray(image), label

    def read_joints(self):
        if self.joints is None:
            path = self.folder / "joints.npz"
            try:
                with np.load(path, allow_pickle=False) as stored:
                    frames, joints = stored["frames"].tolist(), stored["joints"].astype(np.float32)
                if joints.shape != (len(frames), joints.shape[1], 2):
                    raise ValueError(f"joints of shape {joints.shape} for {len(frames)} frames")
            except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
                raise Problem(f"{path} cannot be used: {error}") from error
            row = {frame: index for index, frame in enumerate(frames)}
            joints = np.concatenate([joints, np.full_like(joints[:1], np.nan)])
            self.joints = joints[[row.get(frame, len(frames)) for frame in self.frames]]
        return self.joints


class Batches(Dataset):
    """Item i is split.load(chunks[i]). A Problem is returned, not raised: raised in a worker, it
    would arrive as a traceback."""

    def __init__(self, split, chunks):
        self.split, self.chunks = split, chunks

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, item):
        try:
            return self.split.load(self.chunks[item])
        except Problem as problem:
            return problem


@functools.cache
def end_workers_at_exit():
    """multiprocessing waits at the end for workers of a loop that was left by an exception, after a
    SIGTERM that they do not see (below): end them before that. Registered once."""
    atexit.register(lambda: [child.kill() for child in multiprocessing.active_children()
                             if child.daemon])


def stream(batches, start, stop, workers, device):
    """Batches start .. stop - 1 in order, tensors on `device`.

    Raises Problem for bad data, RuntimeError ("DataLoader worker ...") for a worker that died.
    """
    loader = DataLoader(batches, batch_size=None, sampler=range(start, stop), num_workers=workers,
                        pin_memory=device.type == "cuda")
    # Ctrl-C and a scheduler's SIGTERM reach workers too, but it is this process that ends them:
    # they inherit that both are blocked. What arrives here meanwhile is delivered afterwards.
    end_workers_at_exit()
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        loaded = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    for batch in loaded:
        if isinstance(batch, Problem):
            raise batch
        yield {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
               for key, value in batch.items()}


@functools.lru_cache
def constant(values, device, dtype=torch.float32):
    """A tensor of these numbers (a tuple), made once: copying to a GPU would wait for it."""
    return torch.tensor(values, device=device, dtype=dtype)


def normalise(images, classes):
    """(B, 3, H, W) uint8 -> (x / 255 - mean) / std, float32, channels last, in one pass."""
    mean, std = (constant(tuple(classes[key]), images.device).view(1, 3, 1, 1)
                 for key in ("mean", "std"))
    return torch.addcmul(-mean / std, images, 1 / (255 * std)).contiguous(
        memory_format=torch.channels_last)


# --------------------------------------------------------------------- devices and checkpoints

def pick_device(name="auto"):
    """torch.device; "auto" is CUDA's where there is one. Raises Problem for one that is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
        torch.zeros(1, device=device).cpu()                 # "meta" cannot
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Problem(f"--device {name} cannot be used ({str(error).splitlines()[0]}): "
                      "auto and cpu always can") from error


def pick_precision(device, name="auto"):
    """"fp32" or "bf16"; "auto": bf16 where the hardware multiplies it, else it would be slower."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def autocast(device, precision):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def lacks_memory(error):
    """Whether an exception says in one of torch's ways that the device's or the host's memory is
    full."""
    said = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        all(word in said for word in words)                 # CUDA, cuBLAS and cuDNN, the CPU
        for words in (["out of memory"], ["alloc_failed"], ["alloc", "memory"]))


def find_checkpoint(root="runs"):
    """The newest best.pt under `root`, else the newest last.pt. Raises Problem for none."""
    for name in ("best.pt", "last.pt"):
        found = [path for path in Path(root).rglob(name) if path.is_file()]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    raise Problem(f"there is no best.pt or last.pt under {root}: train a network first (python "
                  "train.py --model segnet --quick) or name a checkpoint, --ckpt PATH")


def load_plain(path):
    """What torch.load makes of a file on the CPU without running code of it; raises whatever a
    garbled pickle can raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles of other makes
        return torch.load(path, map_location="cpu", weights_only=True)


def check_sums(path):
    """Raises ValueError where a checkpoint's bytes differ from the checksums that torch.save stored
    and torch.load does not compare."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise ValueError("checksum")


def load_checkpoint(path):
    """A checkpoint's dictionary, checked, tensors on the CPU. weights_only: no code in it is run.

    Raises Problem: missing, truncated, not a checkpoint of ours, a pickle that would run code.
    """
    if not Path(path).is_file():
        raise Problem(f"there is no checkpoint {path}")
    if not zipfile.is_zipfile(path):
        raise Problem(f"{path} is truncated or no checkpoint: try best.pt or last.pt beside it")
    try:
        check_sums(path)
        checkpoint = load_plain(path)
    except Exception as error:          # a garbled pickle can raise anything
        if "GLOBAL" in str(error):
            raise Problem(f"{path} is refused: it holds more than plain values and tensors, and "
                          "loading that could run code") from error
        raise Problem(f"{path} is damaged: try best.pt or last.pt beside it") from error
    kinds = dict(model=str, kwargs=dict, weights=dict, step=int, classes=dict, settings=dict)
    wrong = [key for key, kind in kinds.items()
             if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), kind))]
    if wrong:
        raise Problem(f"{path} is no checkpoint of train.py: no usable {', '.join(wrong)}")
    size, weights = checkpoint["settings"].get("size"), checkpoint.get("logit_weights")
    data, tensors = checkpoint["settings"].get("data"), checkpoint["weights"].values()
    try:
        K = len(check_classes(checkpoint["classes"])["names"])
        if checkpoint["model"] not in MODELS:
            raise Problem(f"its network {checkpoint['model']!r} is none of {', '.join(MODELS)}")
        if not all(isinstance(value, (int, float, str)) for value in checkpoint["kwargs"].values()):
            raise Problem("`kwargs` needs plain numbers and strings")
        if checkpoint["kwargs"].get("num_classes", 25) != K:
            raise Problem(f"its network has other classes than the {K} it describes")
        if weights is not None and not (isinstance(weights, list) and len(weights) == K and all(
                isinstance(weight, float) and math.isfinite(weight) for weight in weights)):
            raise Problem(f"`logit_weights` needs {K} finite numbers")
        if size is not None and not (isinstance(size, int) and 8 <= size <= 8192):
            raise Problem("`size` in its settings must lie between 8 and 8192")
        if data is not None and not isinstance(data, str):
            raise Problem("`data` in its settings must name a folder")
        if not all(torch.is_tensor(value) and value.layout == torch.strided for value in tensors):
            raise Problem("`weights` needs dense tensors")
    except Problem as problem:
        raise Problem(f"{path} cannot be used: {problem}") from problem
    return checkpoint


def build_model(checkpoint):
    """The checkpoint's network on the CPU, in eval(). Weights that only training uses may lack.

    Built on the "meta" device first: what does not fit is found before memory is spent on it.
    """
    kind, kwargs = MODELS[checkpoint["model"]], checkpoint["kwargs"]
    try:
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in kind(**kwargs).state_dict().items()
                      if not name.startswith(kind.training_only)}
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise Problem(f"a {checkpoint['model']} cannot be built with {kwargs}: {error}") from error
    weights = {name: tensor for name, tensor in checkpoint["weights"].items()
               if not name.startswith(kind.training_only)}
    for name in shapes | weights:
        if getattr(weights.get(name), "shape", None) != shapes.get(name, ()):
            raise Problem(f"the weights are not those of a {checkpoint['model']} with {kwargs}: "
                          f"{name} is missing, unknown or of another shape")
    model = kind(**kwargs)
    model.load_state_dict(weights, strict=False)
    return model.eval()


# ------------------------------------------------------------------- predictions and metrics

@torch.no_grad()
def predict(model, images, size, logit_weights=None):
    """images (B, 3, H, W) normalised -> prediction (B, *size) int64, logits (B, K, *size) float32.

    logit_weights (K floats): the loss trained softmax(x w), so the prediction is argmax of x w,
    x being the logits returned. .max(1), not .argmax(1), up to four times slower on the CPU.
    """
    logits = model(images).float()
    if logits.shape[2:] != tuple(size):
        logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
    if logit_weights is None:
        return logits.max(1).indices, logits
    weights = constant(tuple(logit_weights), logits.device).view(1, -1, 1, 1)
    return (logits * weights).max(1).indices, logits


def confusion_matrices(prediction, labels, K):
    """(B, H, W) int64 and uint8 -> (B, K, K) int64, [image, true, predicted], without label 255.

    One bincount; ignored pixels fall into a row K of their own, which is cut off.
    """
    B = len(labels)
    cells = labels.clamp(max=K).to(torch.int64).view(B, -1)
    cells += (K + 1) * torch.arange(B, device=labels.device).view(B, 1)
    cells.mul_(K).add_(prediction.reshape(B, -1))
    return torch.bincount(cells.view(-1), minlength=B * (K + 1) * K).view(B, K + 1, K)[:, :K]


def evaluate_split(model, split, classes, device, precision, batch_size, workers,
                   logit_weights=None):
    """One confusion matrix per frame, (N, K, K) int64 on the CPU, in the order of split.frames.

    model: on `device`, eval(). classes: the checkpoint's, whose mean and std its network knows.
    Also returns, with logit_weights only, the (K, K) total of the authors' reading of direct
    weighting, the argmax of the logits as they are; else None.
    """
    K, N = len(classes["names"]), len(split.frames)
    chunks = [range(start, min(start + batch_size, N)) for start in range(0, N, batch_size)]
    confusions, raw = [], []
    with tqdm(total=N, unit="image", disable=None, leave=False) as bar:
        for batch in stream(Batches(split, chunks), 0, len(chunks), workers, device):
            labels, images = batch["labels"], normalise(batch["images"], classes)
            with autocast(device, precision):
                prediction, logits = predict(model, images, labels.shape[1:], logit_weights)
            confusions.append(confusion_matrices(prediction, labels, K))
            if logit_weights is not None:
                raw.append(confusion_matrices(logits.max(1).indices, labels, K).sum(0))
            bar.update(len(labels))
    return torch.cat(confusions).cpu(), sum(raw).cpu() if raw else None


def scores(confusion):
    """(..., K, K) matrices -> dict of (...) arrays and, by class, (..., K) arrays; NaN: unknown.

    IoU = TP / (TP + FP + FN) and F1 = 2 TP / (2 TP + FP + FN) of a class count where it occurs in
    truth or prediction, precision where it was predicted, recall (its accuracy) where it is true.
    body_*: all classes but 0, the background, taken as one.
    """
    def ratio(part, whole):
        return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)

    def mean(values):
        return ratio(np.nansum(values, -1), np.sum(~np.isnan(values), -1))

    confusion = np.asarray(torch.as_tensor(confusion).cpu(), dtype=np.float64)
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    true, predicted = confusion.sum(-1), confusion.sum(-2)
    body = confusion[..., 1:, 1:].sum((-2, -1))
    body_true, body_predicted = true[..., 1:].sum(-1), predicted[..., 1:].sum(-1)
    classes = dict(iou=ratio(right, true + predicted - right),
                   f1=ratio(2 * right, true + predicted),
                   precision=ratio(right, predicted), recall=ratio(right, true))
    return dict(miou=mean(classes["iou"]), accuracy=ratio(right.sum(-1), true.sum(-1)),
                f1=mean(classes["f1"]), body_f1=ratio(2 * body, body_true + body_predicted),
                body_precision=ratio(body, body_predicted), body_recall=ratio(body, body_true),
                precision=mean(classes["precision"]), recall=mean(classes["recall"]),
                class_accuracy=mean(classes["recall"]), per_class=classes)


def plain(value):
    """The same with lists for arrays, and None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic, torch.Tensor)) else value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metrics(confusion, groups=None):
    """`scores` of one (K, K) matrix as floats or None, and `columns`, the mean accuracy of each
    group's classes: the 13 columns of the paper's Tables 2 and 5."""
    result = plain(scores(confusion))
    accuracy, result["columns"] = result["per_class"]["recall"], {}
    for name, ids in (groups or {}).items():
        known = [accuracy[index] for index in ids if accuracy[index] is not None]
        result["columns"][name] = sum(known) / len(known) if known else None
    return result


def resampled(confusions, frames, draws, seed):
    """`scores` of `draws` sums over clips drawn with replacement, or None below two clips. Clips (a
    frame's name without _ddd), since the frames of one are much alike (bootstrap, Efron 1979)."""
    clips = np.unique([frame.rpartition("_")[0] for frame in frames], return_inverse=True)[1]
    C = clips.max(initial=0) + 1
    per_clip = np.zeros((C, confusions[0].numel()))
    np.add.at(per_clip, clips, confusions.reshape(len(clips), -1).numpy())
    times = np.random.default_rng(seed).multinomial(C, np.full(C, 1 / C), size=draws)   # (draws, C)
    return scores((times @ per_clip).reshape(-1, *confusions.shape[1:])) if C > 1 else None


def half_width(values):
    return float(np.subtract(*np.nanpercentile(values, (97.5, 2.5))) / 2)


def bootstrap(confusions, frames, draws=1000, seed=0):
    """Figure -> half width of its 95 % interval, over clips; empty for fewer than two clips."""
    drawn = resampled(confusions, frames, draws, seed)
    return {key: half_width(drawn[key]) for key in FIGURES} if drawn else {}


def paired_difference(one, other, frames, draws=1000, seed=0):
    """mIoU of `one` minus that of `other` on the same frames, and the half width of its 95 %
    interval over clips (infinite for fewer than two): both networks meet the same drawn clips."""
    difference = float(scores(one.sum(0))["miou"] - scores(other.sum(0))["miou"])
    drawn = [resampled(confusions, frames, draws, seed) for confusions in (one, other)]
    if drawn[0] is None:
        return difference, math.inf
    return difference, half_width(drawn[0]["miou"] - drawn[1]["miou"])


def left_right(confusion, classes):
    """How much of the error is a left part taken for its right twin or the other way round."""
    confusion, names = np.asarray(confusion), classes["names"]
    wrong, pairs = confusion.sum() - np.trace(confusion), []
    for a, b in enumerate(classes["mirror"]):
        swapped, both = confusion[a, b] + confusion[b, a], confusion[[a, b]].sum()
        if a < b and swapped:
            pairs.append(dict(pair=f"{names[a]}/{names[b]}", of_error=float(swapped / wrong),
                              of_pair=float(swapped / both)))
    pairs.sort(key=lambda pair: -pair["of_error"])
    return dict(of_error=sum(pair["of_error"] for pair in pairs), pairs=pairs)


class TensorMemory(TorchDispatchMode):
    """Measures the peak, in bytes, of all living tensors that the operations inside it made."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            storage = tensor.untyped_storage() if torch.is_tensor(tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        return result

    def release(self, key, size):
        self.alive.discard(key)
        self.now -= size


def cost(model, size, batch_size, device, precision):
    """What a network costs at `size`: parameters (those evaluation uses), multiply-adds an image,
    images/s, and the peak memory, in bytes, of weights, images and activations at `batch_size`."""
    used = [p for name, p in model.named_parameters() if not name.startswith(model.training_only)]
    images = torch.zeros(batch_size, 3, size, size, device=device).to(
        memory_format=torch.channels_last)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(images[:1])
    with autocast(device, precision):
        with TensorMemory() as memory:
            predict(model, images, (size, size))
        runs, start = 0, time.perf_counter()
        while runs < 2 or time.perf_counter() - start < 1:
            predict(model, images, (size, size))[0].sum().item()   # .item() waits for a GPU
            runs += 1
        seconds = time.perf_counter() - start
    held = sum(tensor.nbytes for tensor in [*used, *model.buffers(), images])
    return dict(parameters=sum(p.numel() for p in used), multiply_adds=flops.get_total_flops() // 2,
                images_per_second=runs * batch_size / seconds, peak_memory=held + memory.peak)


# ------------------------------------------------------------------------- reports and pictures

def percent(value, half=None):
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" +- {100 * half:.1f}" if half is not None else "")


def markdown(rows):
    """A Markdown table, padded so that it reads in a terminal too; the first row is its head."""
    rows = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows) + "\n"


def report_text(report, per_class=False):
    """The report as Markdown: one column a network, intervals, left and right, comparisons."""
    networks, names = report["networks"], report["classes"]
    columns = [(n["name"], n["metrics"], n["interval"], n) for n in networks]
    columns += [(f"{n['name']} (argmax of x)", n["raw"], {}, None) for n in networks if n["raw"]]
    rows = [["%"] + [name for name, *_ in columns]]
    for key, title in FIGURES.items():
        rows.append([title] + [percent(m[key], half.get(key)) for _, m, half, _ in columns])
    for group in columns[0][1]["columns"]:
        rows.append([f"accuracy: {group}"] + [percent(m["columns"][group]) for _, m, *_ in columns])
    rows.append(["", *("" for _ in columns)])
    for key, title, unit in (
            ("parameters", "parameters, million", 1e6), ("images_per_second", "images/s", 1),
            ("multiply_adds", "multiply-adds an image, billion", 1e9),
            ("peak_memory", "peak memory, MiB", 2**20)):
        rows.append([title] + [f"{n['cost'][key] / unit:.2f}" if n else "" for *_, n in columns])
    rows.append(["image size"] + [n["size"] if n else "" for *_, n in columns])
    lines = [f"**{report['note']}**: split {report['split']} of {report['data']}, "
             f"{report['images']} images from {report['clips']} clips; {report['device']}, "
             f"{report['precision']}, {report['batch_size']} images at a time.\n", markdown(rows)]
    if networks[0]["interval"]:
        lines.append("+- is half the 95 % interval over other clips (bootstrap).")
    if len(columns) > len(networks):
        lines.append("argmax of x: the authors' reading of direct weighting, which trains on x w.")
    for n in networks:
        sides = n["left_right"]
        pairs = [f"; {pair['pair']} {percent(pair['of_error'])} % (that is "
                 f"{percent(pair['of_pair'])} % of the pair)" for pair in sides["pairs"][:3]]
        lines.append(f"{n['name']}: {percent(sides['of_error'])} % of the wrong pixels confuse "
                     f"left and right{''.join(pairs)}.")
    for pair in report["comparisons"]:
        half, more = pair["half_width"], "more" if pair["significant"] else "no more"
        verdict = "from one clip, which proves nothing" if half is None else (
            f"+- {100 * half:.2f}, {more} than chance over the images")
        lines.append(f"{pair['one']} against {pair['other']}: {100 * pair['difference']:+.2f} "
                     f"points of mIoU {verdict}. Other training seeds are another matter.")
    for n in networks if per_class else ():
        table = [n["metrics"]["per_class"][key] for key in ("iou", "f1", "precision", "recall")]
        lines += [f"\n{n['name']}, %\n", markdown(
            [["class", "IoU", "F1", "precision", "accuracy"]]
            + [[name, *map(percent, row)] for name, *row in zip(names, *table)])]
    return "\n".join(lines)


def palette_image(labels, palette):
    """labels (H, W) uint8 -> a PIL palette image of 256 entries; 255, "ignore", is light grey."""
    image = Image.fromarray(np.ascontiguousarray(labels, dtype=np.uint8))
    entries = [value for colour in palette for value in colour]
    image.putpalette(entries + [0] * (3 * IGNORE - len(entries)) + [224] * 3)
    return image


def with_legend(picture, classes, ids, note):
    """`picture` with a line of text and the colours and names of `ids` below it."""
    font, across = ImageFont.load_default(14), max(1, picture.width // 150)
    height = 28 + 22 * math.ceil(len(ids) / across)
    sheet = Image.new("RGB", (max(picture.width, 150), picture.height + height), "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    draw.text((6, picture.height + 5), note, "black", font)
    for place, index in enumerate(ids):
        x, y = 6 + 150 * (place % across), picture.height + 28 + 22 * (place // across)
        draw.rectangle((x, y, x + 16, y + 15), tuple(classes["palette"][index]), "gray")
        draw.text((x + 22, y - 1), classes["names"][index], "black", font)
    return sheet


def draw_examples(runs, classes, note, device, precision):
    """Photos, ground truth and one row a network, for the best, median and worst images by their
    own mIoU (mean over the networks)."""
    own = np.array([np.nan_to_num(scores(run["confusions"])["miou"]) for run in runs])
    order, N = np.argsort(-own.mean(0), kind="stable"), own.shape[1]
    titles = {rank: "median" for rank in (N // 2 - 1, N // 2)}          # rank: place in that order
    titles |= {N - 2: "worst", N - 1: "worst", 1: "best", 0: "best"} if N > 3 else {0: "best"}
    ranks = [rank for rank in sorted(titles) if rank >= 0]
    frames, side, left, font = order[ranks], 224, 130, ImageFont.load_default(14)
    rows = []
    for run, values in zip(runs, own):
        checkpoint, batch = run["checkpoint"], run["split"].load(frames)
        with autocast(device, precision):
            images = normalise(batch["images"].to(device), checkpoint["classes"])
            prediction = predict(run["model"].to(device), images, batch["labels"].shape[1:],
                                 checkpoint.get("logit_weights"))[0].cpu()
        rows.append((run["name"] if len(runs) > 1 else "prediction",
                     [palette_image(ids, classes["palette"]) for ids in prediction],
                     [f"mIoU {percent(value)} %" for value in values[frames]]))
    photos = [Image.fromarray(image) for image in batch["images"].permute(0, 2, 3, 1).numpy()]
    truth = [palette_image(ids, classes["palette"]) for ids in batch["labels"]]
    rows = [("photo", photos, [titles[rank] for rank in ranks]),
            ("ground truth", truth, [frame[-28:] for frame in batch["frames"]])] + rows
    sheet = Image.new("RGB", (left + (side + 6) * len(frames), (side + 26) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, tiles, texts) in enumerate(rows):
        y = (side + 26) * row
        draw.text((6, y + side // 2), name[:18], "black", font)
        for x, (tile, text) in zip(range(left, sheet.width, side + 6), zip(tiles, texts)):
            sheet.paste(tile.resize((side, side)).convert("RGB"), (x, y))   # labels: nearest
            draw.text((x, y + side + 3), text, "black", font)
    return with_legend(sheet, classes, range(len(classes["names"])), note)


def draw_confusion(file, network, classes, note):
    """The confusion matrix in percent of each true class, with the names, as a PNG into `file`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    confusion, names = np.array(network["confusion"], dtype=float), classes["names"]
    share, ids = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1), range(len(names))
    figure = Figure((3 + 0.36 * len(ids), 3 + 0.34 * len(ids)), dpi=110, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(ids, names, rotation=90)
    axes.set_yticks(ids, names)
    axes.set(xlabel="predicted", ylabel="true",
             title=f"{network['name']}: % of the pixels of each true class\n{note}")
    for row, column in np.argwhere(share >= 0.5):
        axes.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center", fontsize=7,
                  color="white" if share[row, column] > 60 else "black")
    figure.savefig(file, format="png")


def write_json(path, value):
    text = json.dumps(value, indent=1, allow_nan=False)
    write_atomically(path, lambda file: file.write(text.encode()))


def write_report(folder, report, runs, classes, device, precision):
    """report.json, report.md (with all classes), the example picture and, of one network, the
    confusion matrix. Returns the paths."""
    folder, single = Path(folder), len(runs) == 1
    folder.mkdir(parents=True, exist_ok=True)
    text = f"# {', '.join(run['name'] for run in runs)}\n\n{report_text(report, per_class=True)}\n"
    write_json(folder / "report.json", report)
    write_atomically(folder / "report.md", lambda file: file.write(text.encode()))
    picture = folder / ("examples.png" if single else "comparison.png")
    examples = draw_examples(runs, classes, report["note"], device, precision)
    write_atomically(picture, lambda file: examples.save(file, "PNG"))
    if single:
        write_atomically(folder / "confusion.png", lambda file: draw_confusion(
            file, report["networks"][0], classes, report["note"]))
    written = [folder / "report.md", folder / "report.json", picture]
    return written + [folder / "confusion.png"] if single else written


# --------------------------------------------------------------------------- anybody's pictures

def upright_rgb(image):
    """Any PIL image as the RGB image a viewer shows: turned by its EXIF, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):      # 16 bits of grey
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def segment_pictures(paths, checkpoint, model, device, precision, out):
    """Writes <name>-overlay.png and <name>-labels.png of each picture into `out`. One that cannot
    be read costs itself alone. Returns [{picture, overlay, labels, error}], str or None."""
    files = [file for path in map(Path, paths) for file in (sorted(
        f for f in path.iterdir() if f.suffix.lower() in PICTURES) if path.is_dir() else [path])]
    if not files:
        raise Problem(f"there is no picture in {', '.join(map(str, paths))}: "
                      f"{', '.join(PICTURES)} are looked for")
    classes, out = checkpoint["classes"], Path(out)
    side = checkpoint["settings"].get("size") or classes["size"]
    taken, results = {file.resolve() for file in files}, []
    out.mkdir(parents=True, exist_ok=True)
    for file in tqdm(files, unit="picture", disable=None, leave=False):
        try:
            image = upright_rgb(open_picture(file))
        except Exception as error:      # of a garbled EXIF, for one, Pillow raises a SyntaxError
            said = str(error) if isinstance(error, Problem) else f"{file} cannot be used: {error}"
            results.append(dict(picture=str(file), overlay=None, labels=None, error=said))
            continue
        for count in itertools.count(1):                # two pictures of one name both keep theirs
            name = file.stem if count == 1 else f"{file.stem}-{count}"
            overlay, labels = (out / f"{name}-{kind}.png" for kind in ("overlay", "labels"))
            if not {overlay.resolve(), labels.resolve()} & taken:
                break
        taken |= {overlay.resolve(), labels.resolve()}
        longer = max(image.size)
        small, shown = (image.resize([max(1, round(length * most / longer))
                                      for length in image.size], Image.BILINEAR)
                        for most in (side, min(1024, longer)))
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].to(device)
        with autocast(device, precision):               # the network pads itself
            prediction = predict(model, normalise(pixels, classes), shown.size[::-1],
                                 checkpoint.get("logit_weights"))[0][0].cpu()
        coloured = palette_image(prediction, classes["palette"])
        mask = Image.fromarray(np.where(prediction > 0, 160, 0).astype(np.uint8))
        blended = with_legend(Image.composite(coloured.convert("RGB"), shown, mask), classes,
                              prediction.unique().tolist(), f"trained on: {source_note(classes)}")
        whole = coloured.resize(image.size, Image.NEAREST)
        write_atomically(labels, lambda file: whole.save(file, "PNG"))
        write_atomically(overlay, lambda file: blended.save(file, "PNG"))
        results.append(dict(picture=str(file), overlay=str(overlay), labels=str(labels),
                            error=None))
    return results


def source_note(classes):
    """What stands on every table and picture: where the frames came from."""
    return "stand-in, not SURREAL" if "stand-in" in classes["source"] else classes["source"][:80]


# ----------------------------------------------------------------------------------------- main

def measure(path, data, name, options, device, precision):
    """One checkpoint on one split: its part of the report, and what the pictures and comparisons
    need, dict(name, checkpoint, model, split, classes, confusions)."""
    checkpoint, classes = load_checkpoint(path), read_classes(data)
    trained = checkpoint["classes"]
    if classes["names"] != trained["names"]:
        say = lambda names: f"{len(names)}: {', '.join(names[:3])}, ..."
        raise Problem(f"the classes of {data} ({say(classes['names'])}) are not those of {path} "
                      f"({say(trained['names'])}): name other data with --data")
    size = checkpoint["settings"].get("size") or trained["size"]
    split = Split(data, options.split, classes, size)
    model = build_model(checkpoint).to(device, memory_format=torch.channels_last)
    confusions, raw = evaluate_split(model, split, trained, device, precision, options.batch_size,
                                     options.workers, checkpoint.get("logit_weights"))
    total, groups = confusions.sum(0), classes["groups"]
    report = dict(
        name=name, checkpoint=str(path), model=checkpoint["model"], kwargs=checkpoint["kwargs"],
        step=checkpoint["step"], size=size, metrics=metrics(total, groups),
        raw=None if raw is None else metrics(raw, groups), left_right=left_right(total, classes),
        interval=bootstrap(confusions, split.frames), confusion=total,
        cost=cost(model, size, options.batch_size, device, precision))
    return report, dict(name=name, checkpoint=checkpoint, model=model.cpu(), split=split,
                        classes=classes, confusions=confusions)


def evaluate(options, paths, device, precision):
    """Measures, prints and writes everything about the checkpoints `paths`. Returns the report."""
    trained_on = [load_checkpoint(path)["settings"].get("data") for path in paths]
    if not options.data and (len(set(trained_on)) > 1 or not isinstance(trained_on[0], str)):
        raise Problem(f"the checkpoints name {' and '.join(map(str, trained_on))} as their data: "
                      "say with --data on which to measure")
    data, names = options.data or trained_on[0], [path.resolve().parent.name for path in paths]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    networks, runs = zip(*(measure(path, data, name, options, device, precision)
                           for path, name in zip(paths, names)))
    split, classes, comparisons = runs[0]["split"], runs[0]["classes"], []
    for one, other in itertools.combinations(runs, 2):
        difference, half = paired_difference(one["confusions"], other["confusions"], split.frames)
        comparisons.append(dict(one=one["name"], other=other["name"], difference=difference,
                                half_width=half, significant=abs(difference) > half))
    cuda = device.type == "cuda"
    report = plain(dict(
        data=str(data), split=options.split, source=classes["source"], note=source_note(classes),
        images=len(split.frames), clips=len({f.rpartition("_")[0] for f in split.frames}),
        device=torch.cuda.get_device_name(device) if cuda else device.type, precision=precision,
        batch_size=options.batch_size, classes=classes["names"], networks=networks,
        comparisons=comparisons))
    print(report_text(report, options.per_class))
    beside = paths[0].parent / options.split if len(paths) == 1 else Path("runs/comparison")
    written = write_report(options.out or beside, report, runs, classes, device, precision)
    print("Written:", ", ".join(map(str, written)))
    return report


def parse(argv):
    parser = Parser(prog="evaluate.py", description=__doc__.splitlines()[0])
    add = parser.add_argument_group("what").add_argument
    add("--ckpt", nargs="*", type=Path, metavar="PATH", required=True,
        help="checkpoints or run folders; several are compared; none: the newest run under runs/")
    add("--images", nargs="+", metavar="PATH", help="segment these pictures or folders of pictures")
    add("--data", help="prepared folder (none: the one the network was trained on)")
    add("--split", choices=("train", "val", "test"), help="frames to measure on (none: test)")
    add = parser.add_argument_group("what is written").add_argument
    add("--per-class", action="store_true", help="print the figures of every class too")
    add("--json", metavar="FILE", help="also write everything printed to FILE")
    add("--out", metavar="DIR", help="where reports and pictures go (none: <run>/<split>, or "
        "runs/comparison for several networks, runs/pictures for --images)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"),
        help="bf16 is faster where the hardware has it; results differ in the last digit")
    add("--batch-size", type=int, default=8, help="images at a time; changes memory and speed only")
    add("--workers", type=int, default=1, help="processes that read images; 0: none but this one")
    options = parser.parse_args(argv)
    if options.batch_size < 1 or options.workers < 0:
        parser.error("--batch-size begins at 1, --workers at 0")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json {options.json}: its folder does not exist")
    if options.images and (options.data or options.split or options.per_class
                           or len(options.ckpt) > 1):
        parser.error("--images takes one checkpoint, and no --data, --split or --per-class")
    options.split = options.split or "test"
    return options


def main(argv=None):
    """Returns the exit status: 0; 1 where a picture could not be read; 2 after one sentence."""
    options = parse(argv)
    try:
        device = pick_device(options.device)
        precision = pick_precision(device, options.precision)
        paths = [find_checkpoint(path) if path.is_dir() else path for path in options.ckpt]
        paths = paths or [find_checkpoint()]
        print(f"Checkpoint: {', '.join(map(str, paths))}")
        if options.images:
            checkpoint = load_checkpoint(paths[0])
            model = build_model(checkpoint).to(device, memory_format=torch.channels_last)
            results = segment_pictures(options.images, checkpoint, model, device, precision,
                                       options.out or "runs/pictures")
            for result in results:
                print(result["error"] or "{picture}: {overlay}, {labels}".format_map(result))
            report = dict(note=source_note(checkpoint["classes"]), pictures=results)
            failed = any(result["error"] for result in results)
        else:
            report, failed = evaluate(options, paths, device, precision), False
        if options.json:
            write_json(options.json, report)
        return int(failed)
    except Problem as problem:
        message = str(problem)
    except OSError as error:
        message = f"{error.filename} cannot be used ({error.strerror}): --out names another folder"
    except (RuntimeError, MemoryError) as error:        # allocators raise RuntimeError
        if "DataLoader worker" in str(error):
            message = "a data worker died, maybe of little memory: try fewer --workers"
        elif lacks_memory(error):
            message = f"out of memory: try --batch-size {max(1, options.batch_size // 2)}"
        else:
            raise
    print(f"evaluate.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
