"""Train a network on a prepared folder: augmentation, class weights, losses, the loop, the study.

The procedure is the one of "Fully Convolutional Architectures for Multi-Part Body Segmentation"
(Borrego Carazo, 2018, Section 3.1). How one step goes:

    JPEG, PNG -> uint8 (workers) -> device -> mirror, normalise, scale (whole batch)
      -> forward (bf16 autocast) -> loss (float32) -> backward -> loss finite? -> step

Which frames make up step t, and how they are augmented, is a function of (seed, t) alone; nothing
else is random once the weights are drawn. So a run that was killed continues exactly where it
stopped, on any number of processes.

    python train.py --model segnet --quick                        a few minutes on a laptop
    python train.py --model icnet --augment --weighting w1-outer  the paper's 40,000 iterations
    python train.py --model icnet --study                         the paper's Section 3, one network
    torchrun --nproc_per_node=8 train.py --model segnet           the same on several devices
"""
import atexit
import contextlib
import csv
import functools
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from argparse import ArgumentTypeError, BooleanOptionalAction, Namespace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import evaluate
from evaluate import (IGNORE, MODELS, Batches, Parser, Problem, Split, constant,
                      write_atomically)
from hourglass import NAMES, centroids, level_maps

WEIGHTINGS = ("none", "w1-outer", "w1-direct", "w2-outer", "w2-direct")
LOG = ("step", "train_loss", "val_loss", "train_miou", "val_miou", "val_accuracy", "val_f1",
       "val_body_f1", "lr", "images_per_s", "data_wait")
MAY_CHANGE = ("workers", "device", "precision", "compile", "iterations")        # on --resume
HOURGLASS_ONLY = ("stacks", "features", "stem_stride", "coarse_to_fine", "joints", "joints_from",
                  "joints_modules", "joints_weight", "checkpoint_activations")

# What --quick puts in the place of the paper's values: small crops and few iterations.
QUICK = {
    "icnet": dict(size=160, batch_size=8, iterations=3000, val_every=500, val_images=200, lr=0.3,
                  augment=["mirror"]),
    "segnet": dict(size=96, batch_size=8, iterations=800, val_every=200, val_images=200, lr=1e-3),
    "hourglass": dict(size=128, batch_size=8, iterations=600, val_every=100, val_images=100,
                      lr=1e-3, stacks=2, features=96, stem_stride=4, joints_from=1,
                      joints_modules=1),
}


class Trouble(Problem):
    """Something went wrong that no option could have prevented: exit status 1, not 2."""
    status = 1


class Stopped(Exception):
    """SIGINT or SIGTERM arrived; the checkpoint is written."""


# -------------------------------------------- class weights and the loss (paper, Section 3.1)

def class_weights(pixels, scheme, names=None):
    """Class weights of the paper's Section 3.1.

    pixels: (K,) counts, label pixels of each class in the train split.
    scheme: "w1" = 1 - C_i / sum(C), or "w2" = B exp(-(B - mean B) / (4 std B)) with B = max(C) / C
    and the population std, scaled to max 1: as printed the weights of W2 reach into the hundreds,
    and SGD at 0.01 diverges.
    Returns (K,) float32. Raises Problem naming any class without pixels.
    """
    counts = torch.as_tensor(pixels, dtype=torch.float64)
    absent = [str(names[i] if names else i) for i in (counts <= 0).nonzero().flatten().tolist()]
    if absent:
        raise Problem(f"--weighting {scheme} needs label pixels of every class, and the train "
                      f"split has none of: {', '.join(absent)}; train with --weighting none or add "
                      "frames")
    return weight_formula(counts, scheme)


def weight_formula(counts, scheme):
    """The formulas of class_weights, for (K,) float64 counts above 0, without looking at them."""
    if scheme == "w1":
        return (1 - counts / counts.sum()).float()
    rarity = counts.max() / counts
    spread = rarity.std(correction=0).clamp(min=1e-12)      # equal counts: equal weights
    weights = rarity * torch.exp(-(rarity - rarity.mean()) / (4 * spread))
    return (weights / weights.max()).float()


class Criterion:
    """Cross-entropy, plain or weighted: the mean over the pixels that count (label 255 does not).

    outer:  mean of w[label] * CE(logits, label), not divided by the sum of w, as the paper has it
    direct: mean of CE(logits * w, label); such a network also predicts from logits * w
    """

    def __init__(self, classes, weighting="none", device="cpu"):
        self.scheme, _, self.way = weighting.partition("-")
        self.pixels = torch.tensor(classes["pixels"], dtype=torch.float64, device=device)
        self.weights = None
        if self.scheme != "none":
            weights = class_weights(classes["pixels"], self.scheme, classes["names"])
            self.weights = weights.to(device)

    def weights_of(self, levels, ids):
        """(ids,) weights of the classes, or of the coarser ids `levels` (K,) maps them to."""
        if levels is None or self.weights is None:
            return self.weights
        merged = torch.zeros_like(self.pixels[:ids]).index_add_(0, levels, self.pixels)
        return weight_formula(merged, self.scheme)          # pixels add up first, then the weights

    def totals(self, logits, labels, levels=None):
        """Summed loss (float32 scalar) and number of pixels that count (int64 scalar).

        logits (B, K, H, W) any float dtype, labels (B, H', W') uint8, levels (K,) int64 or None.
        """
        if labels.shape[-2:] != logits.shape[-2:]:          # nearest would take a cell's corner
            labels = F.interpolate(labels[:, None], logits.shape[-2:], mode="nearest-exact")[:, 0]
        target = labels.long().flatten()
        if levels is not None:
            target = F.pad(levels, (0, IGNORE + 1 - len(levels)), value=IGNORE)[target]
        # Channels last makes this a view, and softmax over the last axis is the fast one.
        logits = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).float()
        weights = self.weights_of(levels, logits.shape[1])
        if self.way == "direct":
            logits, weights = logits * weights, None
        loss = F.cross_entropy(logits, target, weight=weights, ignore_index=IGNORE,
                               reduction="none")            # CUDA's "sum" runs on one block
        return loss.sum(), (target != IGNORE).sum()

    def __call__(self, logits, labels, levels=None):
        """The mean over the pixels of all processes, times the number of processes, since
        DistributedDataParallel averages gradients."""
        loss, count = self.totals(logits, labels, levels)
        if dist.is_initialized():
            dist.all_reduce(count)
            loss = loss * dist.get_world_size()
        return loss / count.clamp(min=1)                    # without a valid pixel: 0, not nan


# -------------------------------------------- frames and augmentation: functions of (seed, step)

class FrameOrder:
    """Entry t lists the frames of step t: epochs in fresh random order, end to end, cut in batches.

    A batch larger than the set runs on into the next epoch. Process r of n takes every n-th frame.
    """

    def __init__(self, frames, batch_size, steps, seed, rank=0, world=1):
        self.frames, self.batch_size, self.steps, self.seed = frames, batch_size, steps, seed
        self.rank, self.world, self.epochs = rank, world, {}

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        places = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)
        return [int(self.epoch(place // self.frames)[place % self.frames]) for place in places]

    def epoch(self, number):
        if number not in self.epochs:
            if len(self.epochs) > 1:                        # a batch touches two, or is large
                self.epochs.clear()
            rng = np.random.default_rng([self.seed, 0, number])
            self.epochs[number] = rng.permutation(self.frames)
        return self.epochs[number]


def draw_augmentation(seed, step, batch_size, augment, rank=0, world=1):
    """Random numbers for the whole batch of a step, of which each process keeps its share.

    Returns mirror (B,) bool; scale (B,) float32, log-uniform in 0.5 to 2; place (B, 2) float32 in
    0 to 1: where the enlarged picture is cut, or where in the frame the shrunken one lies.
    """
    rng = np.random.default_rng([seed, 1, step])
    mirror = torch.from_numpy(rng.random(batch_size) < 0.5)
    scale = torch.from_numpy(2 ** rng.uniform(-1, 1, batch_size)).float()
    place = torch.from_numpy(rng.random((batch_size, 2))).float()
    if not {"mirror", "naive-mirror"} & set(augment):
        mirror[:] = False
    if "scale" not in augment:
        scale[:], place[:] = 1, 0
    return mirror[rank::world], scale[rank::world], place[rank::world]


def mirror_batch(images, labels, joints, chosen, classes, swap=True):
    """Flips the chosen samples left to right; what was a left hand is a right hand then, so ids and
    joints swap.

    images (B, 3, H, W), labels (B, H, W) uint8, joints (B, J, 2) or None, chosen (B,) bool.
    swap=False leaves the ids, as the paper's code did: every picture then also says the opposite.
    """
    flipped, joints_flipped = labels.flip(-1), joints
    if swap:
        table = (*classes["mirror"], *range(len(classes["mirror"]), IGNORE + 1))
        table = constant(table, labels.device, torch.uint8)
        flipped = table[flipped.long()]
    if joints is not None:
        order = constant(tuple(classes["joint_mirror"]), joints.device, torch.int64)
        joints_flipped = joints[:, order] if swap else joints.clone()
        joints_flipped[..., 0] = images.shape[-1] - 1 - joints_flipped[..., 0]
        joints = torch.where(chosen[:, None, None], joints_flipped, joints)
    return (torch.where(chosen[:, None, None, None], images.flip(-1), images),
            torch.where(chosen[:, None, None], flipped, labels), joints)


def scale_batch(images, labels, joints, scale, place):
    """Enlarges or shrinks each sample within its frame: images bilinear, labels nearest, outside =
    mean colour / 255.

    images (B, 3, H, W) normalised float32, labels (B, H, W) uint8, joints (B, J, 2) or None,
    scale (B,), place (B, 2). With offset t = place * (W - scale W), pixel x goes to
    scale (x + 0.5) + t - 0.5.
    """
    size = constant((images.shape[-1], images.shape[-2]), images.device)     # W, H
    offset = place * (size - scale[:, None] * size)                          # (B, 2)
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = (1 - 2 * offset / size) / scale[:, None] - 1   # affine_grid: -1 to 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    shifted = labels[:, None].float() - IGNORE              # the fill is 0, which was background
    shifted = F.grid_sample(shifted, grid, mode="nearest", align_corners=False)
    labels = (shifted + IGNORE)[:, 0].to(torch.uint8)
    if joints is not None:
        joints = scale[:, None, None] * (joints + 0.5) + offset[:, None] - 0.5
    return images, labels, joints


def prepare_batch(batch, step, args, classes, rank=0, world=1):
    """A loaded batch, on the device, augmented and normalised.

    Returns (images (B, 3, H, W) float32 channels last, batch with the labels and joints to match).
    """
    images, labels = batch["images"], batch["labels"]
    joints = batch["joints"] if args.joints == "surreal" else None
    draws = draw_augmentation(args.seed, step, args.batch_size, args.augment, rank, world)
    mirror, scale, place = (draw.to(images.device, non_blocking=True) for draw in draws)
    if {"mirror", "naive-mirror"} & set(args.augment):
        images, labels, joints = mirror_batch(images, labels, joints, mirror, classes,
                                              swap="mirror" in args.augment)
    images = evaluate.normalise(images, classes)
    if "scale" in args.augment:
        images, labels, joints = scale_batch(images, labels, joints, scale, place)
    batch = {"labels": labels} if joints is None else {"labels": labels, "joints": joints}
    return images.contiguous(memory_format=torch.channels_last), batch


# -------------------------------------------- options

def number(kind, low, high=math.inf):
    """An argparse type: a finite number from low (for float: above it) to high."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high and value < math.inf and (kind is int or value > low):
            return value
        kinds = f"a whole number of {low} or more" if kind is int else f"a number above {low}"
        limit = f" and at most {high}" if high < math.inf else ""
        raise ArgumentTypeError(f"{text!r} is not {kinds}{limit}")
    return convert


def build_parser():
    parser = Parser(prog="train.py", description=__doc__.split("\n\n")[0],
                    epilog="Defaults are the paper's; None means: the model's recipe decides.")
    parser.add_argument("--model", choices=sorted(MODELS), help="the network (but for --resume)")

    add = parser.add_argument_group("data").add_argument
    add("--data", help="prepared folder; without it data/surreal if there, else the stand-in, "
        "which is rendered on first use")
    add("--size", type=number(int, 32, 4096), help="side images are resized to, a multiple of 32; "
        "time and memory grow with its square; metrics stay at the prepared labels' size")
    add("--workers", type=number(int, 0, 256), default=max(1, min(8, (os.cpu_count() or 2) - 1)),
        help="processes that read images; 0 reads in the training process")

    add = parser.add_argument_group("network").add_argument
    add("--double-filters", action="store_true", help="twice the filters: four times the "
        "parameters and multiply-adds, twice the activations")
    add("--width", type=number(float, 0, 64), default=1.0, help="factor on every layer's filters")
    add("--variant", choices=("basic", "vgg16"), default="basic", help="segnet: the paper's small "
        "one, or the 13 layers of VGG-16 (21 times the parameters, twice the time)")
    add("--stacks", type=number(int, 1, 16), default=4, help="hourglass: modules in a row; time "
        "and memory grow in proportion")
    add("--features", type=number(int, 2, 4096), default=256, help="hourglass: module's channels")
    add("--stem-stride", type=int, choices=(1, 2, 4), default=1, help="hourglass: 1 works at full "
        "resolution (the paper), 4 at a quarter, with a sixteenth of the memory and time")
    add("--coarse-to-fine", action="store_true", help="hourglass: stage s learns the coarser label "
        "set of its level (2, 6, 12, 25 classes)")
    add("--joints", choices=("none", "surreal", "centroids"), default="none", help="hourglass: a "
        "parallel branch learns heat maps of the data's joints, or of the parts' centres (training "
        "only; more memory and time)")
    add("--joints-from", type=number(int, 1, 16), default=2, help="hourglass: stack that feeds it")
    add("--joints-modules", type=number(int, 1, 16), default=2, help="hourglass: its modules")
    add("--joints-weight", type=number(float, 0, 1e6), default=1.0, help="hourglass: of its loss")

    add = parser.add_argument_group("loss and augmentation").add_argument
    add("--weighting", choices=WEIGHTINGS, default="none", help="class weights (W1: 1 - frequency; "
        "W2: exponential), on the loss (outer) or on the logits (direct)")
    add("--augment", nargs="*", choices=("mirror", "scale", "naive-mirror", "none"), default=[],
        help="alone: mirror and scale (0.5 to 2); naive-mirror flips without swapping left and "
        "right, as the paper's code did; none: as without --quick")

    add = parser.add_argument_group("optimisation").add_argument
    add("--iterations", type=number(int, 1, 10**9), help="steps (40,000; hourglass 150,000)")
    add("--final-iterations", type=number(int, 1, 10**9), help="--study: of its last run (90,000; "
        "hourglass: no longer run)")
    add("--batch-size", type=number(int, 1, 10**6), help="images of a step over all processes; "
        "memory grows in proportion")
    add("--lr", type=number(float, 0, 1e3), help="learning rate at the start")
    add("--val-every", type=number(int, 1), default=200, help="steps from one validation and "
        "checkpoint to the next")
    add("--val-images", type=number(int, 1), default=500, help="frames validated on (a fixed "
        "choice, and as many of the train split); more cost time, fewer are noisier")
    add("--bn-after", type=number(int, 0), default=0, help="batch normalisation stays frozen for "
        "this many steps (the paper: half of them)")
    add("--init-from", metavar="CKPT", help="start from the layers of this checkpoint that fit")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, order, augmentation")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where "
        "the device is fast at it: less than half the time, half the activations")
    add("--compile", action=BooleanOptionalAction, default=False, help="torch.compile, for "
        "GPUs: minutes at the start, faster steps after; CPUs gained nothing by it")
    add("--checkpoint-activations", action="store_true", help="hourglass: recompute activations in "
        "the backward pass: a third of their memory at --stem-stride 1 for 1.3 of the time, with "
        "the same result; the paper's batch of 3 then fits a card of 8 GB, without it one of 16 GB")

    add = parser.add_argument_group("run").add_argument
    add("--out", help="run folder (default: runs/ and the options that differ from the defaults)")
    add("--resume", nargs="?", const="", metavar="DIR", help="continue a run (without DIR: the one "
        "these options name, or the newest)")
    add("--quick", action="store_true", help="smaller defaults: minutes on a laptop's CPU")
    add("--study", action="store_true", help="the paper's protocol for this model, as runs under "
        "runs/<model>-study; the same command continues it")
    return parser


def parse(argv):
    """The options that were given on the command line, by name, without any defaults."""
    parser = build_parser()
    nothing = Namespace(**dict.fromkeys(vars(parser.parse_args([]))))   # set: no default comes in
    given = {name: value for name, value in vars(parser.parse_args(argv, nothing)).items()
             if value is not None}
    if "augment" in given:
        given["augment"] = sorted(set(given["augment"])) or ["mirror", "scale"]
        if "none" in given["augment"]:
            if len(given["augment"]) > 1:
                raise Problem("--augment none excludes the other choices")
            given["augment"] = []
    if "data" in given:
        given["data"] = str(Path(given["data"]))
    return given


def flag(name):
    return "--" + str(name).replace("_", "-")


def resolve(given):
    """All options as a Namespace: the defaults, under the model's recipe, under --quick, under what
    was given. Raises Problem for combinations without meaning.
    """
    if "model" not in given:
        raise Problem(f"--model is missing: one of {', '.join(sorted(MODELS))}")
    model = given["model"]
    for owner, names in (("hourglass", HOURGLASS_ONLY), ("segnet", ("variant",))):
        for name in given:
            if name in names and model != owner:
                raise Problem(f"{flag(name)} is an option of {owner}, not of {model}: leave it out "
                              f"or use --model {owner}")
    if "double_filters" in given and "width" in given:
        raise Problem("--double-filters is --width 2: give one of the two")
    if "final_iterations" in given and "study" not in given:
        raise Problem("--final-iterations belongs to --study: use --iterations for a single run")
    tried = {"joints", "coarse_to_fine"} if model == "hourglass" else \
        {"augment", "double_filters", "width", "weighting", "init_from"}
    if "study" in given and tried & set(given):
        raise Problem(f"--study tries {', '.join(flag(name) for name in sorted(tried))} itself: "
                      "leave those options out")

    recipe = MODELS[model].recipe
    defaults = vars(build_parser().parse_args([]))
    defaults |= dict(iterations=recipe.get("iterations", 40000), batch_size=recipe["batch_size"],
                     lr=recipe["lr"])
    if given.get("quick"):
        defaults |= QUICK[model]
    if "study" in given:                                    # its rows say which are augmented
        defaults["augment"] = []
    steps = given.get("iterations", defaults["iterations"])
    defaults["final_iterations"] = steps if model == "hourglass" else \
        2 * steps if given.get("quick") else 90000
    args = Namespace(**(defaults | given))
    args.width = 2.0 if args.double_filters else args.width
    if {"mirror", "naive-mirror"} <= set(args.augment):
        raise Problem("--augment mirror and naive-mirror exclude each other: the first swaps left "
                      "and right ids")
    if args.size and args.size % 32:
        below = args.size // 32 * 32
        raise Problem(f"--size {args.size} is not a multiple of 32: the nearest are {below} and "
                      f"{below + 32}")
    trained = args.joints != "none" or args.study and model == "hourglass"
    if trained and args.joints_from > args.stacks:
        raise Problem(f"--joints-from {args.joints_from} is more than --stacks {args.stacks}: "
                      "there is no such stack")
    for name in ("joints_from", "joints_modules", "joints_weight"):
        if name in given and args.joints == "none" and not args.study:
            raise Problem(f"{flag(name)} does nothing without --joints surreal or centroids")
    return args


def to_argv(settings):
    """The command line that gives these settings; parsing it checks every type and range."""
    argv = []
    for name, value in settings.items():
        if value is True:
            argv += [flag(name)]
        elif isinstance(value, list):
            argv += [flag(name), *map(str, value or ["none"])]
        elif value is not None and value is not False:
            argv += [flag(name), str(value)]
    return argv


def run_name(args):
    """"segnet-double-filters": the model, and the options that differ from its defaults and change
    the result."""
    base = resolve({"model": args.model} | ({"quick": True} if args.quick else {}))
    silent = {"out", "resume", "workers", "device", "precision", "compile", "final_iterations",
              "checkpoint_activations"} | ({"width"} if args.double_filters else set())
    words = [args.model] + (["quick"] if args.quick else [])
    for name, value in vars(args).items():
        if value != getattr(base, name) and name not in silent:
            value = Path(value).stem if name in ("data", "init_from") else value
            words += to_argv({name: value})
    text = "-".join(word.removeprefix("--") for word in words)
    return "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in text)[:120]


# -------------------------------------------- the run folder: settings, log, curves, checkpoints

def read_settings(folder):
    """The options of the run in this folder, checked like a command line. Raises Problem."""
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text())
        with contextlib.redirect_stderr(io.StringIO()):     # the parser's own line
            given = parse(to_argv(stored))
    except FileNotFoundError:
        raise Problem(f"{folder} holds no run (config.json is missing): leave --resume out to "
                      "start one") from None
    except (OSError, ValueError, AttributeError, SystemExit) as error:
        raise Problem(f"{path} is not readable as the settings of a run ({type(error).__name__}): "
                      "restore it, or start a new run with --init-from "
                      f"{folder / 'best.pt'}") from None
    defaults = vars(build_parser().parse_args([]))
    if set(stored) != set(defaults) or "model" not in given:
        names = ", ".join(sorted(set(stored) ^ set(defaults))) or "model"
        raise Problem(f"{path} does not hold the options of this version (different: {names})")
    return Namespace(**(defaults | given))


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def read_log(path, until=math.inf):
    """Rows of log.csv up to step `until`, as dicts of numbers; later ones are computed again."""
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            rows = [{key: float(row[key]) if row[key] else None for key in LOG}
                    for row in csv.DictReader(file)]
        return [row | {"step": int(row["step"])} for row in rows if row["step"] <= until]
    except (KeyError, TypeError, ValueError) as error:
        raise Problem(f"{path} is not readable as a run's log ({error}): mend or remove it; the "
                      "run goes on without its rows") from None


def write_log(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, LOG, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def draw_curves(path, runs, title):
    """Loss and mIoU against steps, as in the paper's Fig. 4, 8, 10, 17. runs: {name: log rows}."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8 + 2.5 * (len(runs) > 3), 7),
                                         sharex=True, layout="constrained")
    for index, (name, rows) in enumerate(runs.items()):
        for part, word, style in (("val", "validation", "-"), ("train", "train", ":")):
            for axes, kind, factor in ((top, "miou", 100), (bottom, "loss", 1)):
                values = [row[f"{part}_{kind}"] for row in rows]
                axes.plot([row["step"] for row in rows],
                          [math.nan if value is None else factor * value for value in values],
                          style, color=f"C{index}", marker="." if len(rows) < 40 else None,
                          label=f"{name}, {word}" if len(runs) > 1 else word)
    top.set(ylabel="mIoU (%)", title=title, ylim=(0, None))
    bottom.set(ylabel="loss", xlabel="step", ylim=(0, None))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    beside = dict(loc="upper left", bbox_to_anchor=(1, 1)) if len(runs) > 3 else {}
    top.legend(fontsize=8, **beside)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def start_from(network, path, classes):
    """Copies every layer of a checkpoint, or of a plain state dict, that fits `network`.

    The classification layers stay out where the checkpoint's classes are not ours. Returns a
    sentence on what was taken and what was not. Raises Problem if nothing fits.
    """
    try:
        evaluate.check_sums(path)
        source = evaluate.load_plain(path)
    except Exception as error:                             # torch raises a dozen kinds for damage
        raise Problem(f"--init-from {path} cannot be read as a checkpoint "
                      f"({type(error).__name__}): it must be one of ours, or a state dict of "
                      "tensors") from None
    source = source if isinstance(source, dict) else {}
    other = source.get("classes")
    names = other.get("names") if isinstance(other, dict) else classes["names"]
    source = source.get("weights", source)
    source = source if isinstance(source, dict) else {}
    own = network.state_dict()
    taken = {name: value for name, value in source.items()
             if name in own and torch.is_tensor(value) and value.shape == own[name].shape
             and (names == classes["names"] or not name.startswith(network.classifiers))}
    if not any(name in taken for name, _ in network.named_parameters()):
        raise Problem(f"--init-from {path}: none of its {len(source)} entries fits a layer of this "
                      "network by name and shape; the model and its width must be the same")
    network.load_state_dict(taken, strict=False)
    left = sorted({name.rsplit(".", 1)[0] for name in own if name not in taken})
    said = (f"{len(left)} layers keep their random start: {', '.join(left[:6])}"
            f"{', ...' if len(left) > 6 else ''}" if left else "nothing was left out")
    return f"--init-from {path}: took {len(taken)} of {len(own)} tensors; {said}"


def draw_supervision(folder, split, args, classes):
    """What a specialised hourglass learns, on the frame among the first with the most parts:
    labels_pyramid.png, one level a module (Fig. 14), and joints.png, both kinds (Fig. 16)."""
    frames = split.load(range(min(20, len(split.frames))))
    index = max(range(len(frames["labels"])), key=lambda i: len(frames["labels"][i].unique()))
    labels, palette = frames["labels"][index], classes["palette"]
    photo = Image.fromarray(frames["images"][index].permute(1, 2, 0).numpy())
    zoom = -(-320 // split.size)                            # at least 320 pixels a panel
    enlarge = lambda panel: panel.convert("RGB").resize((zoom * split.size,) * 2, Image.NEAREST)

    def save_row(name, panels):
        sheet = Image.new("RGB", (len(panels) * panels[0].width, panels[0].height))
        for place, panel in enumerate(panels):
            sheet.paste(panel, (place * panel.width, 0))
        write_atomically(folder / name, lambda file: sheet.save(file, format="png"))

    if args.coarse_to_fine:
        levels = [evaluate.palette_image(level.numpy(), palette)
                  for level in level_maps(labels, args.stacks)]
        save_row("labels_pyramid.png", [enlarge(panel) for panel in (photo, *levels)])
    if args.joints != "none":
        kinds = [centroids(labels[None], len(classes["names"]))[0]]
        if split.has_joints:
            kinds.insert(0, frames["joints"][index])
        panels = []
        for joints in kinds:
            panels.append(enlarge(photo))
            for joint, (x, y) in enumerate(((joints + 0.5) * zoom).tolist()):
                if not math.isnan(x):
                    colour = tuple(palette[(joint + 1) % len(palette)])
                    ImageDraw.Draw(panels[-1]).ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour,
                                                       outline="white")
        save_row("joints.png", panels)


def load_run(path):
    """The checkpoint to resume from. Raises Problem that names a broken file and a stand-in."""
    try:
        checkpoint = evaluate.load_checkpoint(path)
        if not isinstance(checkpoint.get("optimizer"), dict):
            raise Problem(f"{path} holds no optimiser state")
        return checkpoint
    except Problem as problem:
        best = path.with_name("best.pt")
        way = (f"to go on from the best one, copy {best} over it and repeat the command"
               if best.exists() else f"remove it, and --resume {path.parent} starts from step 0")
        raise Problem(f"{problem}; {way}") from None


# -------------------------------------------- the loop

class Signals:
    """SIGINT and SIGTERM ask the loop to stop after the step; a second one stops at once, but not
    under torchrun, which passes signals on that a scheduler may have sent to every process."""

    def __init__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self.receive)
                       for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(self, number, frame):
        self.received = number
        if not dist.is_initialized():
            signal.signal(number, signal.SIG_DFL)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def learning_rate(recipe, lr, step, steps):
    """poly: lr (1 - t/T)^power (ICNet) · step: lr factor^(t // every) (hourglass) · constant."""
    arguments = recipe.get("schedule_args", {})
    if recipe["schedule"] == "poly":
        return lr * (1 - step / steps) ** arguments["power"]
    if recipe["schedule"] == "step":
        return lr * arguments["factor"] ** (step // arguments["every"])
    return lr


def build_optimizer(network, recipe, lr, device):
    """The recipe's optimiser; weight decay acts on convolution kernels only. Batch normalisation is
    a group of its own: fused SGD wants either all or none of a group to have been frozen so far."""
    kernels, norms, biases = [], [], []
    for module in network.modules():
        for p in module.parameters(recurse=False):
            kind = norms if isinstance(module, nn.modules.batchnorm._BatchNorm) else biases
            (kernels if p.ndim == 4 else kind).append(p)
    groups = [dict(params=kernels, weight_decay=recipe.get("weight_decay", 0)),
              dict(params=norms, weight_decay=0), dict(params=biases, weight_decay=0)]
    arguments = dict(recipe.get("optimizer_args", {}), lr=lr)
    if device.type == "cuda" and recipe["optimizer"] in ("SGD", "Adam", "AdamW"):
        arguments["fused"] = True
    return getattr(torch.optim, recipe["optimizer"])(groups, **arguments)


def to_host(values, device):
    """Starts copying a small tensor to the host; the returned function waits for its floats.

    On a GPU the copy runs while the backward pass is queued behind it, so the check before the step
    stalls nothing.
    """
    if device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return lambda: (done.synchronize(), host.tolist())[1]


def validate(network, split, chosen, args, classes, criterion, device, interrupted):
    """Loss and confusion matrix of the chosen frames (indices), never augmented, at labels' size.

    Returns (loss float, confusion (K, K) int64 on the CPU), summed over processes; None if a signal
    came in between.
    """
    network.eval()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, size = chosen[rank::world], min(16, max(1, args.batch_size // world))
    chunks = [mine[start:start + size] for start in range(0, len(mine), size)]
    K = len(classes["names"])
    confusion = torch.zeros(K, K, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    weights = criterion.weights.tolist() if criterion.way == "direct" else None
    with torch.inference_mode():
        for batch in evaluate.stream(Batches(split, chunks), 0, len(chunks), args.workers, device):
            images, labels = evaluate.normalise(batch["images"], classes), batch["labels"]
            with evaluate.autocast(device, args.precision):
                prediction, logits = evaluate.predict(network, images, labels.shape[-2:], weights)
            confusion += evaluate.confusion_matrices(prediction, labels, K).sum(0)
            sums += torch.stack(criterion.totals(logits, labels)).double()
            if world == 1 and interrupted():
                return None
    if world > 1:
        dist.all_reduce(confusion)
        dist.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1)).item(), confusion.cpu()


def network_options(args, classes):
    """The keyword arguments of the model's class; they go into the checkpoint."""
    options = dict(num_classes=len(classes["names"]), width=args.width)
    if args.model == "segnet":
        options |= dict(variant=args.variant)
    if args.model == "hourglass":
        options |= {name: getattr(args, name) for name in HOURGLASS_ONLY}
        if args.joints == "surreal":
            options |= dict(num_joints=len(classes["joint_mirror"]))
    return options


def find_data(args, rank):
    """The prepared folder: --data, else data/surreal, else the stand-in, rendered if need be."""
    if args.data is not None:
        return args.data
    if Path("data/surreal").exists():
        return "data/surreal"
    if rank == 0 and not Path("data/standin/classes.json").exists():
        print("No SURREAL here (data/surreal): rendering the stand-in into data/standin, once, in "
              "about two minutes. Its people are synthetic, made by this repository, and figures "
              "on it are not SURREAL's. To use SURREAL: python prepare_surreal.py --raw "
              "SURREAL/data/cmu --out data/surreal", flush=True)
        import prepare_surreal                              # only here: whoever has data needs none
        status = prepare_surreal.main(["--synthesize", "--out", "data/standin"])
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise Problem("the stand-in could not be rendered (see above); --data DIR takes any "
                          "prepared folder")
    return "data/standin"


def join_processes(args):
    """This process's (rank, number of processes, device); joins those torchrun started."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1 and ":" in args.device:
        raise Problem(f"--device {args.device} under torchrun would be one device for all {world} "
                      "processes: leave the number out, and each takes its own")
    several_gpus = world > 1 and args.device in ("auto", "cuda") and torch.cuda.is_available()
    device = evaluate.pick_device(f"cuda:{local}" if several_gpus else args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)                       # events and barriers use this one
    if world > 1 and not dist.is_initialized():
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
        atexit.register(leave_alone)
    return rank, world, device


def leave_processes():
    """Together: one that failed alone would wait here for the others, and torchrun for it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_alone():
    """At the exit of a process that failed alone: NCCL's own end would wait for the others, which
    wait for this one. Without it torchrun sees an exit and ends them."""
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(1)


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def train(args, folder, resume=False):
    """Trains one network into the run folder. Raises Problem, Trouble or Stopped.

    args: all options, resolved. The loop is written out in full, like the picture at the top.
    """
    rank, world, device = join_processes(args)
    if args.batch_size % world:
        raise Problem(f"--batch-size {args.batch_size} cannot be shared out evenly to {world} "
                      "processes")
    say = functools.partial(print, flush=True) if rank == 0 else lambda *words: None
    args.data = find_data(args, rank)
    wait_for_all()                                          # for the rendering
    stored = vars(args).copy()                              # with "auto" as it was asked for
    args = Namespace(**stored)
    args.precision = evaluate.pick_precision(device, args.precision)

    # Data, network, optimiser.
    classes = evaluate.read_classes(args.data)
    if classes["size"] % 32 and args.size is None:
        raise Problem(f"{args.data} is prepared at size {classes['size']}, which is no multiple of "
                      "32: give --size")
    training = Split(args.data, "train", classes, args.size, labels_at_size=True,
                     joints=args.joints != "none")
    measured = Split(args.data, "train", classes, args.size)
    validation = Split(args.data, "val", classes, args.size)
    chosen = []                                             # frames to measure, whatever the seed
    for index, split in enumerate((measured, validation)):
        shuffled = np.random.default_rng([2, index]).permutation(len(split.frames))
        chosen.append(sorted(shuffled[:args.val_images].tolist()))
    if args.joints == "surreal":
        there = training.read_joints().shape[1] if training.has_joints else 0
        if not 0 < there == len(classes.get("joint_mirror") or []):
            raise Problem(f"{args.data} has no train/joints.npz that fits the joint_mirror of its "
                          "classes.json, for --joints surreal: use --joints centroids, the centres "
                          "of the labelled parts")
    if args.coarse_to_fine and classes["names"] != NAMES:
        raise Problem(f"--coarse-to-fine groups SURREAL's 25 parts, and the classes of {args.data} "
                      "are others: leave it out")
    torch.manual_seed(args.seed)
    model_class = MODELS[args.model]
    recipe = model_class.recipe
    try:
        network = model_class(**network_options(args, classes))
    except ValueError as error:
        raise Problem(str(error)) from None
    criterion = Criterion(classes, args.weighting, device)
    if args.init_from and not resume:
        say(start_from(network, args.init_from, classes))
    network.to(device, memory_format=torch.channels_last)
    if world > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    optimizer = build_optimizer(network, recipe, args.lr, device)

    # Where the run stands.
    step, best, rows = 0, -1.0, []
    last = folder / "last.pt"
    if resume and last.exists():
        checkpoint = load_run(last)
        try:
            network.load_state_dict(checkpoint["weights"])
            for group in checkpoint["optimizer"]["param_groups"]:
                if "fused" in group:                        # as this device has it
                    group["fused"] = optimizer.defaults["fused"]
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Problem(f"{last} does not fit the settings in {folder / 'config.json'} "
                          f"({str(error).splitlines()[0]})") from None
        step, best = checkpoint["step"], checkpoint["best_miou"]
        rows = read_log(folder / "log.csv", step)
        if step > args.iterations:
            raise Problem(f"--iterations {args.iterations} is less than the {step} steps that "
                          f"{folder} has behind it")
        if checkpoint["classes"] != classes:
            say(f"Note: {args.data} is not what it was when {last} was written.")
        say(f"Continuing {folder} at step {step}.")
    elif resume and len(read_log(folder / "log.csv")) > 1:   # one row: a kill came in between
        raise Problem(f"{last} is missing: copy {folder / 'best.pt'} there to go on from the best "
                      "one, or start a new run with another --out")
    signals = Signals()                                     # from here on a signal saves first
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.json", json.dumps(stored, indent=1))
    say(f"{args.model}, {sum(p.numel() for p in network.parameters()):,} parameters, on "
        f"{classes['source']} ({args.data}: {len(training.frames):,} train, "
        f"{len(validation.frames):,} val frames, images at {training.size}x{training.size})\n"
        f"{args.iterations:,} steps of {args.batch_size} images, {recipe['optimizer']}, learning "
        f"rate {args.lr:g}, {args.precision} on {device}, seed {args.seed}; into {folder}")
    if criterion.weights is not None:
        pairs = zip(classes["names"], criterion.weights.tolist())
        say(f"class weights, {args.weighting}: " + ", ".join(f"{n} {w:.4f}" for n, w in pairs))
    if world > 1 and device.type == "cpu" and args.bn_after < args.iterations:
        say("Note: synchronised batch normalisation needs GPUs; here each process normalises by "
            "its own share.")
    if rank == 0 and (args.coarse_to_fine or args.joints != "none"):
        draw_supervision(folder, training, args, classes)

    if args.compile:
        torch.compiler.reset()                              # a study's rows share its limits
        network.compile()                                   # in place: weights keep their names
    model = network
    if world > 1:
        devices = [device.index] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(network, devices)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    norms = [module for module in network.modules()
             if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def to_train_mode():
        network.train()
        for norm in norms:
            norm.train(step >= args.bn_after)

    def save(name):
        if not all(value.isfinite().all() for value in network.state_dict().values()):
            raise Trouble(f"the weights of step {step} are not finite, so they are not saved; a "
                          f"lower --lr often helps; the checkpoint before them is {last}")
        checkpoint = dict(
            model=args.model, kwargs=network_options(args, classes), weights=network.state_dict(),
            optimizer=optimizer.state_dict(), step=step, best_miou=best, classes=classes,
            settings=stored,
            logit_weights=criterion.weights.tolist() if criterion.way == "direct" else None)
        if rank == 0:
            memory = io.BytesIO()                           # torch.save hides that a disk is full
            torch.save(checkpoint, memory)
            write_atomically(folder / name, lambda file: file.write(memory.getbuffer()))

    def check_point(throughput, wait):
        """Validates; writes best.pt, log.csv, last.pt and curves in an order no kill can hurt."""
        nonlocal best
        results = [validate(network, split, indices, args, classes, criterion, device,
                            lambda: signals.received)
                   for split, indices in zip((measured, validation), chosen)]
        if None in results:
            return
        (train_loss, on_train), (val_loss, on_val) = ((loss, evaluate.metrics(confusion))
                                                      for loss, confusion in results)
        rate = learning_rate(recipe, args.lr, step - 1, args.iterations)
        rows.append(dict(zip(LOG, (
            step, train_loss, val_loss, on_train["miou"], on_val["miou"], on_val["accuracy"],
            on_val["f1"], on_val["body_f1"], rate, throughput, wait))))
        if (on_val["miou"] or 0.0) > best:
            best = on_val["miou"] or 0.0
            save("best.pt")
        if rank == 0:
            write_log(folder / "log.csv", rows)
            save("last.pt")
            draw_curves(folder / "curves.png", {args.model: rows},
                        f"{folder.name} ({classes['source']})")
            tqdm.write(f"step {step:6d}  loss {train_loss:.4f} / {val_loss:.4f}  "
                       f"mIoU {percent(on_train['miou']):>5} / {percent(on_val['miou']):>5} %  "
                       f"(train / validation)  {throughput:6.1f} images/s  "
                       f"waiting for data {100 * wait:4.1f} %")

    def whole_batch(step):
        order = FrameOrder(len(training.frames), args.batch_size, args.iterations, args.seed)
        return [training.frames[index] for index in order[step]]

    def due():
        measured_at = rows[-1]["step"] if rows else 0
        return step > measured_at and (step % args.val_every == 0 or step == args.iterations)

    order = FrameOrder(len(training.frames), args.batch_size, args.iterations, args.seed, rank,
                       world)
    bar = tqdm(total=args.iterations, initial=step, unit="step",
               disable=rank > 0 or not sys.stderr.isatty())
    try:
        if due():                                           # stopped between step and validation
            check_point(0.0, 0.0)
        to_train_mode()
        batches = evaluate.stream(Batches(training, order), step, args.iterations, args.workers,
                                  device)
        began, waited, images_seen = time.perf_counter(), 0.0, 0
        stop = signals.received if world == 1 else 0
        while step < args.iterations and not stop:
            asked = time.perf_counter()
            loaded = next(batches)
            waited += time.perf_counter() - asked
            images, batch = prepare_batch(loaded, step, args, classes, rank, world)
            with evaluate.autocast(device, args.precision):
                outputs = model(images)
            total, main = network.loss(outputs, batch, criterion)
            signalled = torch.full((), float(signals.received), device=device)
            seen = torch.stack([total.detach(), main.detach(), signalled])
            if world > 1:                                   # all see the same loss and signal,
                dist.all_reduce(seen)                       # and so all leave the loop together
            seen = to_host(seen, device)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if step < args.bn_after:                        # without a gradient, no update
                for norm in norms:
                    norm.weight.grad = norm.bias.grad = None
            loss, main_loss, stop = seen()
            if not math.isfinite(loss):
                raise Trouble(f"the loss of step {step} is {loss}; the weights were not touched. "
                              f"The frames of that batch: {', '.join(whole_batch(step))}. A lower "
                              f"--lr often helps; the checkpoint before it is {last}")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, args.lr, step, args.iterations)
            optimizer.step()
            step += 1
            images_seen += args.batch_size
            bar.update()
            if step == args.bn_after:
                to_train_mode()
            elapsed = time.perf_counter() - began
            if step % 10 == 0 or step == args.iterations:
                bar.set_postfix_str(f"loss {main_loss / world:.3f}, best mIoU "
                                    f"{100 * max(best, 0):.1f} %, {images_seen / elapsed:.1f} "
                                    "images/s", refresh=False)
            if due():
                check_point(images_seen / elapsed, waited / elapsed)
                to_train_mode()
                began, waited, images_seen = time.perf_counter(), 0.0, 0
            if world == 1:
                stop = signals.received
        if stop:
            save("last.pt")
            raise Stopped(signals.received or signal.SIGTERM, step, folder)
    except StopIteration:
        raise Trouble(f"the data ended before step {step}; {last} is kept") from None
    except OSError as error:
        raise Trouble(f"{error.filename or folder} cannot be written or read "
                      f"({error.strerror or error}); the last good checkpoint stays as it is. When "
                      f"that is mended: python train.py --resume {folder}") from None
    except (Problem, Stopped):
        raise
    except Exception as error:
        if "more than 1 value per channel" in str(error):
            raise Problem(f"images of {training.size}x{training.size} shrink to a single value per "
                          f"channel, which batch normalisation cannot use: remove {folder}, and "
                          "give a larger --size or --batch-size") from None
        if "DataLoader worker" in str(error):
            raise Trouble(f"a data worker died at step {step} (killed, or out of memory); what was "
                          f"saved is intact: python train.py --resume {folder}, with fewer "
                          "--workers if memory is short") from None
        if evaluate.lacks_memory(error):
            way = (f"--batch-size {args.batch_size // 2}" if args.batch_size > 1 else
                   "a smaller --size, or --checkpoint-activations (hourglass)")
            raise Trouble(f"out of memory at --batch-size {args.batch_size}: try {way}") from None
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            raise Trouble(f"another process of this run ended at step {step} (what it said stands "
                          "above or below); what was saved is intact: the same command with "
                          f"--resume {folder}") from None
        if args.compile:                                    # which tells its bugs in many ways
            raise Trouble(f"step {step} failed under --compile ({type(error).__name__}: "
                          f"{(str(error) or '-').splitlines()[0]}); what was saved is intact: "
                          f"python train.py --resume {folder} --no-compile") from error
        raise
    finally:
        bar.close()
        signals.restore()


# -------------------------------------------- the study (paper, Section 3.1): the better goes on

# Published: (mIoU, accuracy, F1) in percent. The F1 of ICNet and the hourglass is that of body
# against background, the F1 of SegNet the mean over classes. The hourglass's figures are the final
# thesis's; the paper leaves them empty.
PUBLISHED = {
    "icnet": {"normal": (38.19, 94.64, 88.17), "doubled": (27.51, 93.01, 84.97),
              "normal + augmentation": (32.60, 91.15, 91.61), "test": (45.14, 95.76, 89.73)},
    "segnet": {"normal": (38.80, 94.87, 54.34), "doubled": (39.17, 94.79, 54.49),
               "doubled + augmentation": (23.28, 89.24, 33.21), "test": (33.59, 94.62, 44.32)},
    "hourglass": {"plain": (63.19, 98.75, 95.24), "coarse-to-fine": (16.22, 90.58, 61.98),
                  "joint branch": (58.05, 97.18, 96.05), "test": (55.32, 97.02, 93.07)},
}
TABLES = {"icnet": "123", "segnet": "456"}
PUBLISHED_BASE = {"icnet": "normal", "segnet": "doubled"}       # what Tables 2 and 5 weight
# Tables 2 and 5: mIoU, mean class accuracy, and the accuracy of background, head, torso, upper and
# lower legs, neck, shoulders, upper and lower arms, feet, hands, fingers, toes; as printed.
PUBLISHED_CLASSES = {
    "icnet": {
        "none": "38.2 48.7 98.9 84.9 74.78 64.3 53.8 64.0 54.2 52.7 39.5 32.3 19.8 9.3 9.5",
        "w1-outer": "37.5 52.3 97.7 90.0 74.8 70.9 61.7 60.9 56.0 57.34 50.1 38.9 22.9 10.2 11.3",
        "w1-direct": "6.5 7.9 99.9 6.13 15.5 7.7 0.8 0.0 4.7 1.9 0.0 3.6 0.0 0.0 0.0",
        "w2-outer": "25.8 54.8 89.2 89.3 61.6 64.1 65.2 72.4 60.3 47.0 46.03 52.35 33.4 31.0 36.9",
        "w2-direct": "25.5 34.0 99.3 78.7 70.7 70.0 59.0 1.9 8.9 32.9 15.7 7.1 0.5 0.0 0.0"},
    "segnet": {
        "none": "39.17 49.9 99.1 84.2 70.9 63.2 58.4 58.1 51.8 52.7 43.9 39.9 28.8 12.4 9.8",
        "w1-outer": "38.8 55.6 97.5 90.3 74.2 66.8 61.8 58.3 65.1 62.0 49.6 42.0 36.3 25.3 14.2",
        "w2-outer": "21.65 56.3 78.18 79.8 65.6 60.0 57.1 85.8 71.1 52.5 51.8 44.2 41.7 34.1 38.4"},
}


def study(args, given, folder):
    """The paper's protocol for one network, as ordinary runs under `folder`, and report.md.

    icnet, segnet: normal or doubled; the better, with augmentation; the better of that, weighted
    (SegNet: outer only, as in Table 5); the best for --final-iterations; the test split. hourglass:
    plain, coarse-to-fine, joint branch. Rows that are finished are only measured again; the one
    that was interrupted continues.
    """
    rank, _, device = join_processes(args)
    args.data = find_data(args, rank)
    config = folder / "config.json"
    if config.exists():
        before = vars(read_settings(folder))
        free = {"out", *MAY_CHANGE} - {"iterations"}
        for name, value in vars(args).items():
            if value != before[name] and name not in free:
                raise Problem(f"{folder} holds a study with another {flag(name)} ({before[name]}): "
                              "repeat that command to continue it, or give --out")
    classes = evaluate.read_classes(args.data)              # what would fail at a later row
    if args.model != "hourglass":
        class_weights(classes["pixels"], "w1", classes["names"])
    elif classes["names"] != NAMES:
        raise Problem(f"--study tries coarse-to-fine labels, which group SURREAL's 25 parts, and "
                      f"the classes of {args.data} are others: train without --study")
    wait_for_all()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(config, json.dumps(vars(args), indent=1))
    rows, decisions = {}, []

    def row(name, **changes):
        """Trains one row (or finishes, or skips it) and measures its best.pt on all of val."""
        options = {key: value for key, value in given.items()
                   if key not in ("study", "out", "final_iterations")
                   and not (key.startswith("joints_") and "joints" not in changes)}
        settings = resolve({"augment": []} | options | {"data": args.data} | changes)
        place = folder / name.replace(" + ", "-").replace(", ", "-").replace(" ", "-")
        resume, measured = (place / "config.json").exists(), read_log(place / "log.csv")
        done = (place / "last.pt").exists() and bool(measured) and (
            measured[-1]["step"] >= settings.iterations <= load_run(place / "last.pt")["step"])
        wait_for_all()                                      # before one of them writes there
        state = "finished" if done else "continuing" if resume else "starting"
        if rank == 0:
            print(f"\n--- {name}: {state} ({place})", flush=True)
        if not done:
            train(settings, place, resume)
        wait_for_all()
        rows[name] = measure(place, "val", device) | dict(changes=changes, name=name, folder=place)
        return rows[name]

    def better(old, new):
        """The row with the higher mIoU; a difference within its confidence interval is noted."""
        difference, half = evaluate.paired_difference(new["confusions"], old["confusions"],
                                                      new["frames"])
        if dist.is_initialized():                           # GPUs round differently; one decides
            decided = [difference, half]
            dist.broadcast_object_list(decided)
            difference, half = decided
        winner = new if difference > 0 else old
        points = f"{100 * difference:+.2f} +- {100 * half:.2f} points of mIoU" + (
            "" if abs(difference) > half else
            ", within its 95 % interval: over these images it may be chance")
        if not math.isfinite(half):
            points = f"{100 * difference:+.2f} points of mIoU, too few clips for an interval"
        decisions.append(f"{new['name']} against {old['name']}: {points}. On goes: "
                         f"**{winner['name']}**.")
        return winner

    base, weightings = None, []
    if args.model == "hourglass":
        has_joints = (Path(args.data) / "train" / "joints.npz").exists()
        best = better(row("plain"), row("coarse-to-fine", coarse_to_fine=True))
        best = better(best, row("joint branch", joints="surreal" if has_joints else "centroids"))
    else:
        best = better(row("normal"), row("doubled", double_filters=True))
        base = best = better(best, row(f"{best['name']} + augmentation",
                                       augment=["mirror", "scale"], **best["changes"]))
        weightings = [w for w in WEIGHTINGS[1:] if args.model == "icnet" or w.endswith("outer")]
        for way in weightings:
            best = better(best, row(f"{base['name']} + {way}", weighting=way, **base["changes"]))
    final = best if args.final_iterations == args.iterations else row(
        f"{best['name']}, long", **best["changes"], iterations=args.final_iterations)
    test = measure(final["folder"], "test", device) | {"name": best["name"]}
    if rank:
        return
    report = study_report(args, rows, base, weightings, test, decisions)
    write_text(folder / "report.md", report)
    draw_curves(folder / "curves.png",
                {name: read_log(one["folder"] / "log.csv") for name, one in rows.items()},
                f"{args.model} study ({test['source']})")
    print(f"\n{report}\nWritten: {folder / 'report.md'}, {folder / 'curves.png'}")


def measure(folder, split, device):
    """The best.pt of a run over a whole split: confusions (N, K, K), frames, metrics, their 95 %
    half widths, and mIoU from the raw logits where the weighting is direct."""
    checkpoint = evaluate.load_checkpoint(folder / "best.pt")
    settings, classes = checkpoint["settings"], checkpoint["classes"]
    precision = evaluate.pick_precision(device, settings["precision"])
    model = evaluate.build_model(checkpoint).to(device, memory_format=torch.channels_last)
    data = Split(settings["data"], split, classes, settings["size"])
    confusions, raw = evaluate.evaluate_split(
        model, data, classes, device, precision, min(16, settings["batch_size"]),
        settings["workers"], checkpoint["logit_weights"])
    return dict(confusions=confusions, frames=data.frames, source=classes["source"],
                figures=evaluate.metrics(confusions.sum(0), classes["groups"]),
                halves=evaluate.bootstrap(confusions, data.frames),
                raw=None if raw is None else evaluate.metrics(raw)["miou"])


def percent(value):
    return "-" if value is None else f"{100 * value:.2f}"


def table(header, rows):
    """Lines of a Markdown table; header and rows are lists of strings."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)] + [""]


def study_report(args, rows, base, weightings, test, decisions):
    """report.md: the paper's tables for this network, published figures beside ours, who won."""
    published = PUBLISHED[args.model]
    f1, meaning = ("f1", "mean over classes") if args.model == "segnet" else \
        ("body_f1", "body against background")
    titles = [f"Table {number}: " for number in TABLES.get(args.model, "")] or ["", "", ""]
    weighted = {way: f"{base['name']} + {way}" for way in weightings}

    def figures(name, one, key):
        cells = [name]
        for metric, theirs in zip(("miou", "accuracy", f1), published.get(key, (None,) * 3)):
            half = one["halves"].get(metric)
            interval = "" if half is None else f" +- {percent(half)}"
            cells += [percent(one["figures"][metric]) + interval,
                      "-" if theirs is None else f"{theirs:.2f}"]
        return cells

    header = ["architecture", "mIoU (%)", "published", "accuracy (%)", "published",
              f"F1, {meaning} (%)", "published"]
    lines = [f"# The study of {args.model}", "",
             f"Data: **{test['source']}**. The published columns are SURREAL's, on other frames "
             f"and after {'150,000' if args.model == 'hourglass' else '40,000 (final: 90,000)'} "
             f"steps; here {args.iterations:,} steps (final: {args.final_iterations:,}) of "
             f"{args.batch_size} images at {args.size or 'full'} pixels, seed {args.seed}. Behind "
             "+-: 95 % intervals over the clips that were measured; another training seed moves "
             "the figures too.", "",
             f"## {titles[0]}validation", ""]
    lines += table(header, [figures(name, one, name) for name, one in rows.items()
                            if name not in weighted.values() and not name.endswith(", long")])
    if weightings:
        groups = list(base["figures"]["columns"])
        cells = []
        for way, one in [("none", base)] + [(way, rows[name]) for way, name in weighted.items()]:
            ours = one["figures"]
            cells.append([way, *map(percent, [ours["miou"], ours["class_accuracy"],
                                              *ours["columns"].values()])])
            if len(groups) == 13:
                theirs = PUBLISHED_CLASSES[args.model][way].split()
                cells.append([f"*{way}, published ({PUBLISHED_BASE[args.model]})*",
                              *(f"*{cell}*" for cell in theirs)])
        lines += [f"## {titles[1]}class weighting ({base['name']}), accuracy per class (%), "
                  "validation", ""]
        lines += table(["weighting", "mIoU", "all classes", *groups], cells)
        raw = [f"{way} {percent(rows[name]['raw'])} instead of "
               f"{percent(rows[name]['figures']['miou'])}"
               for way, name in weighted.items() if rows[name]["raw"] is not None]
        if raw:
            lines += ["Direct weighting as its authors read it, the argmax of the unweighted "
                      f"logits: mIoU {'; '.join(raw)}.", ""]
    lines += [f"## {titles[2]}test", ""]
    name = f"{test['name']}, {args.final_iterations:,} steps"
    lines += table(header, [figures(name, test, "test")])
    lines += ["## Which step won", "", *(f"- {decision}" for decision in decisions),
              "", "![loss and mIoU of every row](curves.png)", ""]
    return "\n".join(lines)


# -------------------------------------------- the command line

def newest_run():
    runs = sorted(Path("runs").glob("**/config.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise Problem("--resume: there is no run under runs/; start one with --model")
    return runs[-1].parent


def start(argv):
    """From the command line to a finished run. Raises Problem, Trouble or Stopped."""
    given = parse(argv)
    if "resume" not in given:
        args = resolve(given)
        if args.quick and int(os.environ.get("RANK", 0)) == 0:
            print("--quick stands for", *to_argv({name: getattr(args, name) for name in
                                                  QUICK[args.model] if name not in given}))
        if args.study:
            return study(args, given, Path(args.out or f"runs/{args.model}-study"))
        folder = Path(args.out or f"runs/{run_name(args)}")
        if any((folder / name).exists() for name in ("config.json", "last.pt", "best.pt")):
            raise Problem(f"{folder} already holds a run: continue it with --resume {folder}, or "
                          "give another --out")
        return train(args, folder)

    if "study" in given:
        raise Problem("--study needs no --resume: the same command continues it")
    folder = given["resume"] or given.get("out")
    if not folder:
        folder = f"runs/{run_name(resolve(given))}" if "model" in given else newest_run()
    folder = Path(folder)
    args = read_settings(folder)
    if args.study:
        raise Problem(f"{folder} holds a study: repeat the command that started it to continue it")
    for name, value in given.items():
        if name in MAY_CHANGE:
            setattr(args, name, value)
        elif name not in ("resume", "out") and value != getattr(args, name):
            raise Problem(f"{flag(name)} {value} differs from the {getattr(args, name)} that "
                          f"{folder} was started with; only {', '.join(map(flag, MAY_CHANGE))} may "
                          "change on --resume")
    return train(args, folder, resume=True)


def main(argv=None):
    """Runs the command line; returns the exit status: 0, 1 (trouble on the way), 2 (bad input), 130
    or 143 (signals)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        start(argv)
        leave_processes()
        return 0
    except Problem as problem:
        print(f"train.py: {problem}", file=sys.stderr)
        return getattr(problem, "status", 2)
    except OSError as error:                                # before the first step
        print(f"train.py: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        number, step, folder = stopped.args
        leave_processes()
        if int(os.environ.get("RANK", 0)):
            return 128 + number
        again = argv if "--study" in argv else ["--resume", str(folder)]
        world = os.environ.get("WORLD_SIZE")
        start_it = f"torchrun --nproc_per_node={world}" if world else "python"
        print(f"Stopped by {signal.Signals(number).name} after step {step}; everything is saved. "
              f"To continue:\n{start_it} train.py {shlex.join(again)}", file=sys.stderr)
        return 128 + number
    except KeyboardInterrupt:                               # between two runs, or while rendering
        print("Stopped between two runs or before the first step; to go on: the same command, with "
              "--resume if it says that the folder already holds a run.", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:            # of the loop, train() knows more
        if "DataLoader worker" in str(error):
            said = "a data worker died (killed, or out of memory): the same command goes on"
        elif evaluate.lacks_memory(error):
            said = "out of memory: give a smaller network, --size or --batch-size"
        else:
            raise
        print(f"train.py: {said}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
