"""Trains a network on a prepared folder: class weights, augmentation, the loop, the study.

The procedure of "Fully Convolutional Architectures for Multi-Part Body Segmentation" (Borrego
Carazo, 2018, Section 3.1). Which frames make up step t, and how they are augmented, is a function
of (seed, t) alone, so a run that was killed continues exactly where it stopped.
Differs from the authors' code: a mirror swaps left and right, factors of scale are drawn
log-uniformly (there uniformly), and class heads start at the classes' prior.
"""
import argparse
import csv
import functools
import inspect
import math
import os
import shutil
import signal
import sys
import time
from argparse import SUPPRESS, Namespace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import evaluate
from evaluate import IGNORE, MODELS, Predictor, Problem, Split, percent
from hourglass import NAMES

WEIGHTINGS = ("none", "w1-outer", "w1-direct", "w2-outer", "w2-direct")


# ---- Class weights and the loss (paper, Section 3.1)

def class_weights(counts, scheme):
    """Class weights (K,) float32 of the paper's Section 3.1.

    counts: (K,) float64, label pixels of each class in the train split, all above 0.
    scheme: "w1" = 1 - C_i / sum(C), or "w2" = B exp(-(B - mean B) / (4 std B)) with B = max(C) / C
    and the population std, scaled to max 1, without which SGD at 0.01 diverges. In the paper's data
    W2 makes an error on the background cost 1/350 of one on a toe.
    """
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
    Raises Problem for a class without pixels, which has no weight.
    """

    def __init__(self, classes, weighting="none", device="cpu"):
        self.scheme, _, self.form = weighting.partition("-")
        self.pixels = torch.tensor(classes["pixels"], dtype=torch.float64, device=device)
        absent = [name for name, count in zip(classes["names"], classes["pixels"]) if count == 0]
        if absent and self.form:
            raise Problem(f"--weighting {weighting} needs pixels of every class, and there are none "
                          f"of {', '.join(absent)}: leave the option out, or add frames")

    def pixels_and_weights(self, K, levels=None):
        """(K,) each, of the K classes to which levels maps the ids: pixels add up, then come weights
        (None without weighting)."""
        pixels = self.pixels
        if levels is not None:
            pixels = torch.zeros_like(pixels[:K]).index_add_(0, levels, pixels)
        return pixels, class_weights(pixels, self.scheme) if self.form else None

    def prior(self, K, levels=None):
        """(K,) biases with which softmax gives each class its share p of the train split's pixels:
        log p, log(w p) under outer weights, log p / w under direct ones. Undecided heads take some
        hundred steps to find that out (Lin et al., arXiv 1708.02002, Section 4.1)."""
        pixels, weights = self.pixels_and_weights(K, levels)
        logs = torch.log((pixels + 1) / (pixels + 1).sum())     # + 1: no class is impossible
        if self.form == "direct":
            return (logs - logs.max()) / weights
        return logs if weights is None else torch.log_softmax(logs + weights.log(), 0)

    def totals(self, logits, labels, levels=None):
        """Summed loss (float32 scalar) and number of pixels that count (int64 scalar).
        logits (B, K, H, W) any float dtype, labels (B, H', W') uint8, levels (K',) int64 or None."""
        if labels.shape[-2:] != logits.shape[-2:]:          # nearest-exact samples cell centres
            labels = F.interpolate(labels[:, None], logits.shape[-2:], mode="nearest-exact")[:, 0]
        target = labels.long().flatten()
        if levels is not None:
            target = F.pad(levels, (0, IGNORE + 1 - len(levels)), value=IGNORE)[target]
        # Channels last makes this a view, and softmax over the last axis is the fast one.
        logits = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).float()
        _, weights = self.pixels_and_weights(logits.shape[1], levels)
        if self.form == "direct":
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


# ---- Frames and augmentation: functions of (seed, step)

def frame_order(frames, batch_size, seed, start, steps):
    """Yields the frames (indices) of each step from `start` on: epochs in fresh random order, end
    to end, cut in batches. A batch larger than the set runs on into the next epoch."""
    epoch = functools.lru_cache(2)(
        lambda number: np.random.default_rng([seed, 0, number]).permutation(frames))
    for step in range(start, steps):
        places = range(step * batch_size, (step + 1) * batch_size)
        yield [int(epoch(place // frames)[place % frames]) for place in places]


def draw_augmentation(seed, step, batch_size, augment):
    """Random numbers for the whole batch of a step: mirror (B,) bool; scale (B,) in 0.5 to 2; place
    (B, 2) in 0 to 1: where the enlarged picture is cut, or in the frame the shrunken one lies."""
    rng = np.random.default_rng([seed, 1, step])
    mirror = torch.from_numpy(rng.random(batch_size) < 0.5)
    scale = torch.from_numpy(2 ** rng.uniform(-1, 1, batch_size)).float()
    place = torch.from_numpy(rng.random((batch_size, 2))).float()
    if "scale" not in augment:
        scale[:], place[:] = 1, 0
    return mirror & bool({"mirror", "naive-mirror"} & set(augment)), scale, place


def mirror_batch(images, labels, joints, chosen, classes, swap=True):
    """Flips the chosen samples. A mirrored left hand is a right hand, so ids and joints swap sides
    (swap=False leaves them, as the authors' code did).
    images (B, 3, H, W), labels (B, H, W) uint8, joints (B, J, 2) or None, chosen (B,) bool."""
    flipped = labels.flip(-1)
    if swap:
        table = torch.arange(IGNORE + 1, dtype=torch.uint8)
        table[:len(classes["mirror"])] = torch.tensor(classes["mirror"], dtype=torch.uint8)
        flipped = table.to(labels.device, non_blocking=True)[flipped.long()]
    if joints is not None:
        order = classes["joint_mirror"] if swap else range(joints.shape[1])
        moved = joints[:, torch.tensor(list(order)).to(joints.device, non_blocking=True)]
        moved[..., 0] = images.shape[-1] - 1 - moved[..., 0]
        joints = torch.where(chosen[:, None, None], moved, joints)
    return (torch.where(chosen[:, None, None, None], images.flip(-1), images),
            torch.where(chosen[:, None, None], flipped, labels), joints)


def scale_batch(images, labels, joints, scale, place):
    """Enlarges or shrinks each sample within its frame: images bilinear, labels nearest; outside
    are the mean colour and 255. With offset t = place * (W - scale W), pixel x goes to
    scale (x + 0.5) + t - 0.5. images (B, 3, H, W) normalised float32, labels (B, H, W) uint8,
    joints (B, J, 2) or None, scale (B,), place (B, 2)."""
    size = torch.tensor([images.shape[-1], images.shape[-2]]).to(images.device, non_blocking=True)
    offset = place * (size - scale[:, None] * size)                          # (B, 2)
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = (1 - 2 * offset / size) / scale[:, None] - 1   # affine_grid: -1 to 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    shifted = labels[:, None].float() - IGNORE      # grid_sample fills with 0, so 0 means ignore
    shifted = F.grid_sample(shifted, grid, mode="nearest", align_corners=False)
    labels = (shifted + IGNORE)[:, 0].to(torch.uint8)
    if joints is not None:
        joints = scale[:, None, None] * (joints + 0.5) + offset[:, None] - 0.5
    return images, labels, joints


def prepare_batch(batch, step, args, classes, rank=0, world=1):
    """A loaded batch (this process's share), augmented and normalised, on its device: images
    (B, 3, H, W) float32 channels last, and a batch with the labels and joints to match."""
    images, labels = batch["images"], batch["labels"]
    joints = batch["joints"] if args.joints == "surreal" else None
    mirror, scale, place = (draw[rank::world].to(images.device, non_blocking=True) for draw in
                            draw_augmentation(args.seed, step, args.batch_size, args.augment))
    if {"mirror", "naive-mirror"} & set(args.augment):
        images, labels, joints = mirror_batch(images, labels, joints, mirror, classes,
                                              swap="mirror" in args.augment)
    images = evaluate.normalise(images, classes)
    if "scale" in args.augment:
        images, labels, joints = scale_batch(images, labels, joints, scale, place)
    return images.contiguous(memory_format=torch.channels_last), dict(labels=labels, joints=joints)


# ---- The loop

def learning_rate(args, step):
    """Of step t of T. poly: lr (1 - t/T)^power; step: lr factor^(t // every); constant: lr; each
    after a linear rise over `warmup` steps."""
    rate = args.lr * min(1, (step + 1) / max(args.warmup, 1))
    if args.schedule == "poly":
        rate *= (1 - step / args.iterations) ** args.power
    elif args.schedule == "step":
        rate *= args.factor ** (step // args.every)
    return rate


def train(args, run_dir, checkpoint=None):
    """Trains one network into the folder run_dir, from step 0 or from a checkpoint of that run."""
    # 1. Processes: this one is `rank` of `world`; the first validates, reports and writes.
    rank, world, device, precision = join_processes(args)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *words: None

    # 2. Data: frames to train on, and a choice of frames to measure that no seed changes.
    classes = read_data(args, rank)
    training = Split(args.data, "train", classes, args.size, labels_at_size=True)
    measured = [Split(args.data, split, classes, args.size) for split in ("train", "val")]
    check_data(args, classes, training)

    # 3. Network, loss and optimiser. Weight decay acts on convolution kernels alone.
    torch.manual_seed(args.seed)
    options = network_options(args, classes)
    network = MODELS[args.model](**options).to(device, memory_format=torch.channels_last)
    criterion = Criterion(classes, args.weighting, device)
    for head, levels in getattr(network, "heads", ()):
        head.bias.data.copy_(criterion.prior(len(head.bias), levels))
    if args.init_from and checkpoint is None:
        say(start_from(network, args.init_from, classes))
    if world > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kernels, others = ([p for p in network.parameters() if (p.ndim == 4) == kernel]
                       for kernel in (True, False))
    optimizer = getattr(torch.optim, args.optimizer)(
        [dict(params=kernels, weight_decay=args.weight_decay), dict(params=others, weight_decay=0)],
        lr=args.lr, **args.optimizer_args)

    # 4. Where the run stands. last.pt is the run: nothing else is needed to continue it.
    start, best, rows = 0, -1.0, []
    if checkpoint:
        start, best, rows = checkpoint["step"], checkpoint["best_miou"], checkpoint["rows"]
        network.load_state_dict(checkpoint["weights"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    _, weights = criterion.pixels_and_weights(len(classes["names"]))
    direct = weights.tolist() if criterion.form == "direct" else None
    predict = Predictor(network, classes, device, precision, direct)

    def save(name, step):
        torch.save(dict(model=args.model, kwargs=options, weights=network.state_dict(),
                        optimizer=optimizer.state_dict(), step=step, best_miou=best, rows=rows,
                        classes=classes, settings=vars(args), logit_weights=direct),
                   run_dir / "new.pt")
        os.replace(run_dir / "new.pt", run_dir / name)      # whole, or not there

    def train_mode(step):
        network.train()
        for norm in norms:
            norm.train(step >= args.bn_after)               # frozen ones keep their statistics

    if rank == 0 and checkpoint is None:
        save("last.pt", 0)
    say(f"{args.model}, {sum(p.numel() for p in network.parameters()):,} parameters, {precision} on "
        f"{device}, into {run_dir}; steps {start:,} to {args.iterations:,} of {args.batch_size} of "
        f"{len(training.frames):,} images at {training.size} pixels, {classes['source']}")
    for name, weight in zip(classes["names"], () if weights is None else weights.tolist()):
        say(f"class weight {weight:.4f} {name}")
    if args.compile:
        network.compile()                                   # in place: weights keep their names
    model = nn.parallel.DistributedDataParallel(network) if world > 1 else network
    torch.backends.cudnn.benchmark = True
    stop = []                                               # a signal ends the loop after its step
    for number in (signal.SIGINT, signal.SIGTERM) if world == 1 else ():
        signal.signal(number, lambda number, _: stop.append(number))

    # 5. The loop.
    order = frame_order(len(training.frames), args.batch_size, args.seed, start, args.iterations)
    chunks = (chunk[rank::world] for chunk in order)
    batches = evaluate.stream(training, chunks, args.workers, device)
    train_mode(start)
    since, began = start, time.perf_counter()
    quiet = True if rank else None                          # None: without a terminal
    with tqdm(total=args.iterations, initial=start, unit="step", disable=quiet) as bar:
        for step, loaded in enumerate(batches, start):
            images, batch = prepare_batch(loaded, step, args, classes, rank, world)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                outputs = model(images)
            total, main = network.loss(outputs, batch, criterion)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if step < args.bn_after:                        # without a gradient, no update
                for norm in norms:
                    norm.weight.grad = norm.bias.grad = None
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step)
            optimizer.step()

            step += 1
            bar.update()
            if step == args.bn_after:
                train_mode(step)
            due = step % args.val_every == 0 or step == args.iterations
            if step % 10 == 0 or due or stop:               # looking at the loss waits for a GPU
                check_finite(main.item(), step, run_dir)
                bar.set_postfix_str(f"loss {main.item():.3f}, best mIoU {percent(max(best, 0))} %")
            if due and rank == 0:
                speed = (step - since) * args.batch_size / (time.perf_counter() - began)
                rows.append(dict(step=step, **validate(predict, measured, args),
                                 lr=learning_rate(args, step - 1), images_per_s=speed))
                check_finite(rows[-1]["val_loss"], step, run_dir)
                if rows[-1]["val_miou"] > best:
                    best = rows[-1]["val_miou"]
                    save("best.pt", step)
                write_log(run_dir, rows, evaluate.source_note(classes))
            if (due or stop) and rank == 0:
                save("last.pt", step)
            if due:
                train_mode(step)
                since, began = step, time.perf_counter()
            if stop:
                say(f"Stopped after step {step}, saved. To go on: python train.py --resume {run_dir}")
                sys.exit(128 + stop[0])
    signal.signal(signal.SIGINT, signal.default_int_handler)


def check_finite(loss, step, run_dir):
    if not math.isfinite(loss):
        raise Problem(f"the loss at step {step} is {loss}: try a lower --lr. {run_dir} keeps what it "
                      "had before")


def validate(predict, measured, args):
    """Figures of the train and val split, on the same --val-images frames of each every time, never
    augmented. The loss is the unweighted one, so that runs with different weights compare."""
    predict.model.eval()
    unweighted, row = Criterion(predict.classes), {}
    for i, (name, split) in enumerate(zip(("train", "val"), measured)):
        chosen = np.random.default_rng([2, i]).permutation(len(split.frames))[:args.val_images]
        confusions, row[f"{name}_loss"] = evaluate.evaluate_split(
            predict, split, min(16, args.batch_size), args.workers, sorted(chosen), unweighted)
        figures = evaluate.scores(confusions.sum(0))
        for key in ("miou", "accuracy", "f1", "body_f1"):
            row[f"{name}_{key}"] = float(figures[key])
    return row


def write_log(run_dir, rows, note):
    """log.csv and curves.png, for people: the run itself goes on from last.pt."""
    with open(run_dir / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw_curves(run_dir / "curves.png", {run_dir.name: rows}, note)
    tqdm.write("step {step:6d}  loss {train_loss:.4f} / {val_loss:.4f}  mIoU {train_miou:.1%} / "
               "{val_miou:.1%} (train / val)  {images_per_s:.1f} images/s".format(**rows[-1]))


def draw_curves(path, runs, note):
    """Loss and mIoU against steps, as in the paper's Fig. 4, 8, 10, 17. runs: {name: log rows}."""
    sheet = Figure((10, 7), dpi=110, layout="constrained")
    top, bottom = sheet.subplots(2, 1, sharex=True)
    for index, (name, rows) in enumerate(runs.items()):
        for part, style in (("val", "-"), ("train", ":")):
            for axes, kind in ((top, "miou"), (bottom, "loss")):
                axes.plot([row["step"] for row in rows], [row[f"{part}_{kind}"] for row in rows],
                          style, color=f"C{index}", marker=".", label=f"{name}, {part}")
    top.set(ylabel="mIoU", title=note, ylim=(0, None))
    bottom.set(ylabel="loss, unweighted", xlabel="step", ylim=(0, None))
    sheet.legend(*top.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    sheet.savefig(path)


# ---- What the loop stands on: data, network, processes, signals

def read_data(args, rank):
    """The classes of args.data, which the first process renders or counts while the others wait."""
    if rank:
        dist.barrier()
    args.data = args.data or ("data/surreal" if Path("data/surreal").exists() else "data/standin")
    if args.data == "data/standin" and not Path("data/standin/classes.json").exists():
        print("There is no data/surreal: rendering the stand-in, once; its people are made up, and "
              "figures on it are not SURREAL's.", flush=True)
        import prepare_surreal                              # whoever has data does not need it
        if prepare_surreal.main(["--synthesize", "--out", "data/standin"]):
            raise Problem("the stand-in could not be rendered (see above)")
    classes = evaluate.read_classes(args.data, count=True)
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    return classes


def check_data(args, classes, training):
    """Raises Problem where the data cannot serve the options."""
    if training.size % 32:
        raise Problem(f"{args.data} has images of {training.size} pixels, no multiple of 32: add --size")
    if args.coarse_to_fine and classes["names"] != NAMES:
        raise Problem(f"--coarse-to-fine is for SURREAL's 25 classes, and {args.data} has others")
    if args.joints == "surreal" and (training.joints is None or not classes["joint_mirror"]):
        raise Problem(f"{args.data} lacks train/joints.npz or the joint_mirror of classes.json: "
                      "--joints centroids takes the centres of the parts")


def network_options(args, classes):
    """The keyword arguments of the model's class: the options of the same name."""
    known = inspect.signature(MODELS[args.model]).parameters
    joints = dict(num_joints=len(classes["joint_mirror"])) if args.joints == "surreal" else {}
    return {name: getattr(args, name) for name in known if hasattr(args, name)} | dict(
        num_classes=len(classes["names"]), **joints)


def start_from(network, path, classes):
    """Copies the tensors of a checkpoint that fit `network` by name and shape; the heads stay out
    where the classes are others. Returns a sentence. Raises Problem where nothing fits."""
    checkpoint, own = evaluate.load_checkpoint(path)[0], network.state_dict(keep_vars=True)
    same = checkpoint["classes"]["names"] == classes["names"]
    heads = {id(p) for head, _ in getattr(network, "heads", ()) for p in head.parameters()}
    taken = {name: value for name, value in checkpoint["weights"].items() if name in own
             and value.shape == own[name].shape and (same or id(own[name]) not in heads)}
    if not taken:
        raise Problem(f"nothing in --init-from {path} fits this network: model or width differ")
    network.load_state_dict(taken, strict=False)
    return f"--init-from {path}: took {len(taken)} of {len(own)} tensors"


def join_processes(args):
    """(rank, number of processes, device, precision); joins the processes that torchrun started."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    several = world > 1 and args.device in ("auto", "cuda") and torch.cuda.is_available()
    device, precision = evaluate.pick_device(f"cuda:{local}" if several else args.device,
                                             args.precision)
    if world > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device, precision


# ---- The study (paper, Section 3.1): the better one goes on

# Published mIoU, accuracy and F1 in percent. F1 is that of body against background but for SegNet,
# where it is the mean over classes. The hourglass's figures are the final thesis's.
PUBLISHED = {
    "icnet": {"normal": (38.19, 94.64, 88.17), "doubled": (27.51, 93.01, 84.97),
              "normal + augmentation": (32.60, 91.15, 91.61), "test": (45.14, 95.76, 89.73)},
    "segnet": {"normal": (38.80, 94.87, 54.34), "doubled": (39.17, 94.79, 54.49),
               "doubled + augmentation": (23.28, 89.24, 33.21), "test": (33.59, 94.62, 44.32)},
    "hourglass": {"plain": (63.19, 98.75, 95.24), "coarse-to-fine": (16.22, 90.58, 61.98),
                  "joint head": (58.05, 97.18, 96.05), "test": (55.32, 97.02, 93.07)},
}


def study(args, out):
    """The paper's protocol for one network, as ordinary runs in `out`: normal or doubled; the
    better augmented; the better of those with each weighting (SegNet: outer only, as in Table 5); the best
    for --final-iterations; the test split. Hourglass: plain, coarse-to-fine, joint head. Finished
    runs are only measured again, others continue. Writes report.md and curves.png."""
    runs, decisions = {}, []

    def row(name, **changes):
        run_dir = out / "-".join(name.replace(" +", "").replace(",", "").split())
        settings, checkpoint = Namespace(**vars(args) | changes), None
        if (run_dir / "last.pt").exists():
            checkpoint = evaluate.load_checkpoint(run_dir / "last.pt")[0]
        if not checkpoint or checkpoint["step"] < settings.iterations:
            print(f"\n--- {name} ({run_dir})", flush=True)
            run_dir.mkdir(parents=True, exist_ok=True)
            train(settings, run_dir, checkpoint)
        runs[name] = evaluate.measure(run_dir / "best.pt", args, "val") | dict(
            name=name, run_dir=run_dir, changes=changes)
        return runs[name]

    def better(old, new):
        difference, half = evaluate.paired_difference(new["confusions"], old["confusions"],
                                                      new["split"].frames)
        winner = new if difference > 0 else old
        chance = ", which may be chance" if abs(difference) < half else ""
        decisions.append(f"- {new['name']} against {old['name']}: {percent(difference, half, 2)} "
                         f"points of mIoU{chance}. On goes **{winner['name']}**.")
        return winner

    if args.model == "hourglass":
        best = better(row("plain"), row("coarse-to-fine", coarse_to_fine=True))
        best = better(best, row("joint head", joints="centroids"))
    else:
        base = better(row("normal"), row("doubled", width=2.0))
        base = best = better(base, row(f"{base['name']} + augmentation", **base["changes"],
                                       augment=["mirror", "scale"]))
        for weighting in WEIGHTINGS[1:]:
            if args.model != "segnet" or weighting.endswith("outer"):
                best = better(best, row(f"{base['name']} + {weighting}", **base["changes"],
                                        weighting=weighting))
    final = best if args.final_iterations == args.iterations else row(
        f"{best['name']}, long", **best["changes"], iterations=args.final_iterations)
    test = evaluate.measure(final["run_dir"] / "best.pt", args, "test")

    key = "f1" if args.model == "segnet" else "body_f1"
    table = [["%", "mIoU", "published", "accuracy", "published", "F1", "published"]]
    for name, run in [*runs.items(), ("test", test)]:
        figures = evaluate.scores(run["confusions"].sum(0))
        ours = (percent(figures[kind]) for kind in ("miou", "accuracy", key))
        cells = zip(ours, PUBLISHED.get(args.model, {}).get(name, "---"))
        table.append([name, *(cell for pair in cells for cell in pair)])
    raw = [evaluate.measure(run["run_dir"] / "best.pt", args, "val", raw=True)
           for run in runs.values() if run["predict"].logit_weights]
    text = "\n".join([
        f"# The study of {args.model}\n\nSeed {args.seed}, {args.iterations:,} steps of "
        f"{args.batch_size} images (final: {args.final_iterations:,}), val split. Published: SURREAL, "
        f"40,000 steps (90,000; hourglass: 150,000). F1: {evaluate.FIGURES[key]}.\n",
        evaluate.markdown(table), *decisions, "\n![curves](curves.png)\n",
        evaluate.report_text([*runs.values(), *raw], per_class=False), "",
        evaluate.report_text([test])])
    (out / "report.md").write_text(text, encoding="utf-8")
    rows = {name: evaluate.load_checkpoint(run["run_dir"] / "last.pt")[0]["rows"]
            for name, run in runs.items()}
    draw_curves(out / "curves.png", rows, evaluate.source_note(final["classes"]))
    print(text)


# ---- Command line

# What --quick puts in the place of the paper's values: small crops and few iterations.
QUICK = {
    "icnet": dict(size=160, batch_size=8, iterations=3000, val_every=500, val_images=200, lr=0.3,
                  augment=["mirror"]),
    "segnet": dict(size=96, batch_size=8, iterations=800, val_every=200, val_images=200, lr=1e-3),
    "hourglass": dict(size=128, batch_size=8, iterations=600, val_every=100, val_images=100,
                      lr=1e-3, stacks=2, features=96, stem_stride=4, joints_from=1,
                      joints_modules=1),
}
DEFAULTS = dict(optimizer_args={}, weight_decay=0.0, warmup=0, val_every=200, val_images=500, data="",
                init_from="", out="", resume="")
MAY_CHANGE = ("workers", "device", "precision", "compile", "iterations", "final_iterations", "out",
              "resume", "quick", "model", "study")


def build_parser():
    def each(key):
        values = (f"{name} {kind.recipe.get(key, DEFAULTS.get(key))}" for name, kind in MODELS.items())
        return f"(default: {', '.join(values)})"

    parser = evaluate.Parser(prog="train.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default=SUPPRESS, help="the network")
    add = parser.add_argument_group("data").add_argument
    add("--data", default=SUPPRESS, help="prepared folder; else data/surreal, else the stand-in, rendered "
        "on first use")
    add("--size", type=int, default=0, help="images are resized to this multiple of 32; 0: as prepared")
    add = parser.add_argument_group("network").add_argument
    add("--double-filters", action="store_true", help="--width 2: four times the parameters")
    add("--width", type=float, default=1.0, help="factor on every layer's filters")
    add("--variant", choices=("basic", "vgg16"), default="basic", help="segnet: SegNet-Basic or SegNet")
    add("--stacks", type=int, default=4, help="hourglass: modules in a row")
    add("--features", type=int, default=256, help="hourglass: channels of a module")
    add("--stem-stride", type=int, choices=(1, 2, 4), default=1,
        help="hourglass: 1 works at full resolution (paper), 4 at 1/4 with 1/16 of time and memory")
    add("--coarse-to-fine", action="store_true", help="hourglass: 2, 6, 12, 25 classes in turn")
    add("--joints", choices=("none", "surreal", "centroids"), default="none",
        help="hourglass: a branch learns the data's joints or the parts' centres, in training only")
    add("--joints-from", type=int, default=2, help="hourglass: the module that feeds the branch")
    add("--joints-modules", type=int, default=2, help="hourglass: modules of the branch")
    add("--checkpoint-activations", action="store_true",
        help="hourglass: a third of the memory at --stem-stride 1, for 1.3 of the time")
    add = parser.add_argument_group("loss and augmentation").add_argument
    add("--weighting", choices=WEIGHTINGS, default="none",
        help="W1 (1 - frequency) or W2 (exponential), on the loss (outer) or the logits (direct)")
    add("--augment", nargs="*", choices=("mirror", "scale", "naive-mirror", "none"), default=[],
        help="alone: mirror and scale (0.5 to 2); naive-mirror leaves left and right as they are")
    add = parser.add_argument_group("optimisation").add_argument
    add("--iterations", type=int, default=SUPPRESS, help=f"steps {each('iterations')}")
    add("--batch-size", type=int, default=SUPPRESS,
        help=f"images a step, over all processes {each('batch_size')}")
    add("--lr", type=float, default=SUPPRESS, help=f"learning rate {each('lr')}")
    add("--val-every", type=int, default=SUPPRESS,
        help=f"steps from one validation and checkpoint to the next {each('val_every')}")
    add("--val-images", type=int, default=SUPPRESS,
        help=f"frames of train and val measured then {each('val_images')}")
    add("--bn-after", type=int, default=0, help="steps for which batch normalisation stays frozen")
    add("--init-from", default=SUPPRESS, metavar="CKPT", help="start from what fits of this checkpoint")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add = parser.add_argument_group("run").add_argument
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile: faster steps on a GPU after some minutes; a CPU gains nothing")
    add("--out", default=SUPPRESS, help="run folder; else runs/ and the options that were given")
    add("--resume", nargs="?", const="runs", default=SUPPRESS, metavar="DIR", help="continue this run, or "
        "the newest; with --model the run of these options, which starts if there is none yet")
    add("--quick", action="store_true", help="smaller defaults: minutes on a laptop's CPU")
    add("--study", action="store_true", help="the paper's protocol for this network, as runs in "
        "runs/<model>-study; the same command continues it")
    add("--final-iterations", type=int, default=0, help="--study: steps of its last run; 0: 90000")
    return parser


def parse(argv):
    """(options, run folder, checkpoint to go on from or None). A wrong option ends the process."""
    parser = build_parser()
    blank = Namespace(**dict.fromkeys(vars(parser.parse_args([]))))    # keeps defaults out
    given = {name: value for name, value in vars(parser.parse_args(argv, blank)).items()
             if value is not None}
    model, checkpoint = given.get("model"), None
    run_dir = Path(given.get("out", f"runs/{model}-study" if "study" in given else run_name(given)))
    if "resume" in given:
        if given["resume"] != "runs" or not (model or "out" in given):
            run_dir = Path(given["resume"])
        if not model or run_dir.is_file() or (run_dir / "last.pt").is_file():
            path = evaluate.find_checkpoint(run_dir, "last.pt")
            checkpoint, run_dir = evaluate.load_checkpoint(path)[0], path.parent
            parser.set_defaults(**checkpoint["settings"])
    elif not model:
        parser.error(f"--model is missing: {', '.join(sorted(MODELS))}")
    if not checkpoint:
        quick = QUICK.get(model, {}) if "quick" in given else {}
        parser.set_defaults(**DEFAULTS | MODELS[model].recipe | quick)
    args = parser.parse_args(argv)

    own = inspect.signature(MODELS[args.model]).parameters
    for kind in MODELS.values():
        for name in (inspect.signature(kind).parameters.keys() - own.keys()) & given.keys():
            parser.error(f"--{name.replace('_', '-')} is no option of {args.model}: leave it out")
    if "double_filters" in given and "width" in given:
        parser.error("--double-filters is --width 2: give one of the two")
    if args.size % 32:
        parser.error(f"--size {args.size} is no multiple of 32: {args.size // 32 * 32 + 32} is")
    if args.joints_from > args.stacks and args.joints != "none":
        parser.error(f"--joints-from {args.joints_from} is more than --stacks {args.stacks}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world or args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size} cannot be shared by {world} processes: "
                     f"{args.batch_size // world * world + world} can")
    args.width = 2.0 if args.double_filters else args.width
    if "augment" in given or args.study:
        chosen = given.get("augment", ["none"]) or ["mirror", "scale"]
        args.augment = [kind for kind in chosen if kind != "none"]
    if args.study and not args.final_iterations:
        args.final_iterations = 2 * args.iterations if args.quick else 90000
        if args.model == "hourglass":
            args.final_iterations = args.iterations
    if checkpoint and args.schedule == "poly" and "iterations" in given:
        print(f"Note: with {args.iterations} iterations the learning rate goes on as if they had been "
              "chosen from the start, since poly falls to 0 at the last step.")
    return args, run_dir, checkpoint


def run_name(given):
    """"runs/segnet-double-filters": the model, quick, and the other options that were given."""
    words = [str(given.get("model"))] + ["quick"] * ("quick" in given)
    for name, value in given.items():
        if name not in MAY_CHANGE:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [name.replace("_", "-"), *(Path(str(value)).name for value in values)]
    return "runs/" + "-".join(words)


def start(argv):
    """From the command line to a finished run. Returns the exit status."""
    args, run_dir, checkpoint = parse(argv)
    first = int(os.environ.get("RANK", 0)) == 0
    if args.init_from:
        evaluate.load_checkpoint(args.init_from)            # before anything is rendered
    if args.quick and first:
        print("--quick:", QUICK.get(args.model), "where no option says otherwise")
    if args.study:
        study(args, run_dir)
        return 0
    if first and not checkpoint:
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            raise Problem(f"{run_dir} is there already: --resume {run_dir} goes on, --out DIR starts "
                          "elsewhere") from None
    try:
        train(args, run_dir, checkpoint)
    except Exception:
        if first and not checkpoint and not (run_dir / "best.pt").exists():
            shutil.rmtree(run_dir)      # nothing was learned: the same command can be repeated
        raise
    return 0


if __name__ == "__main__":
    evaluate.run_command("train.py", lambda: start(sys.argv[1:]))
