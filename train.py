"""Trains a network on a prepared folder: class weights, augmentation, the loop, the study.

The procedure of "Fully Convolutional Architectures for Multi-Part Body Segmentation" (Borrego
Carazo, 2018, Section 3.1). Which frames make up step t, and how they are augmented, is a function
of (seed, t) alone, and no layer draws at random. So a run continues exactly where it stopped
without any saved random state (on a CPU, with as many threads); a layer that draws from the global
generator, such as Dropout, would break that in silence.

Differs from the authors' code: a mirror swaps left and right, factors of scale are drawn
log-uniformly (there uniformly), and class heads start at the classes' prior. The paper's "180
degrees flip" is read as this mirror.
"""
import csv
import functools
import hashlib
import io
import os
import signal
import sys
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
from evaluate import IGNORE, MODELS, Predictor, Problem, Split
from hourglass import NAMES


# ---- Class weights and the loss (paper, Section 3.1)

def class_weights(pixels, scheme):
    """Class weights of the paper's Section 3.1.

    pixels: (K,) float64, label pixels C of each of the K classes in the train split, all above 0.
    scheme: "none" = 1; "w1" = 1 - C / sum(C); "w2" = B exp(-(B - mean B) / (4 std B)) with
        B = max(C) / C and the population's std, scaled so that the largest weight is 1.
    Returns (K,) float32. In the paper's data w2 weighs a toe's pixel 700 times the background's.
    """
    if scheme == "none":
        return torch.ones_like(pixels).float()
    if scheme == "w1":
        return (1 - pixels / pixels.sum()).float()
    rarity = pixels.max() / pixels                  # B: 1 for the most common class
    std = rarity.std(correction=0).clamp(min=1e-12)         # equal counts have equal weights
    # B alone would give every class the same share of the loss. The exponential takes up to two
    # thirds of it from the rarest classes, whose labels are least exact; the paper gives no reason.
    weights = rarity * torch.exp(-(rarity - rarity.mean()) / (4 * std))
    return (weights / weights.max()).float()        # unscaled, SGD at 0.01 diverges


def map_ids(labels, table):
    """labels (...) uint8 -> int64 (...), table[id] for each id; 255, "ignore", stays.
    table: K ids, a list or a tensor (K,) on the device of the labels."""
    whole = torch.full((IGNORE + 1,), IGNORE, device=labels.device)
    whole[:len(table)] = torch.as_tensor(table)
    return whole[labels.long()]


class Criterion:
    """Cross-entropy, plain or weighted: the mean over the pixels that count (label 255 does not).

    outer:  mean of w[label] * CE(logits, label), not divided by the sum of w, as the paper has it
    direct: mean of CE(logits * w, label); such a network also predicts from logits * w

    classes: of evaluate.read_classes, with "pixels" and "names". Raises Problem for a weighting
    where a class has no pixels to weight it by.
    """

    def __init__(self, classes, weighting="none", device=torch.device("cpu")):
        pixels = classes["pixels"]
        if weighting != "none" and 0 in pixels:
            absent = classes["names"][pixels.index(0)]
            raise Problem(f"--weighting {weighting}: no training label has a pixel of {absent}")
        self.scheme, _, self.form = weighting.partition("-")
        exact = torch.float32 if device.type == "mps" else torch.float64    # MPS has no float64
        self.pixels = torch.tensor(pixels, dtype=exact, device=device)

    def pixels_and_weights(self, K, levels=None):
        """Label pixels and class weights, (K,) each. levels: the coarser class 0..K-1 of each id,
        int64; the pixels of its ids are added up before the weights are formed."""
        pixels = self.pixels
        if levels is not None:
            pixels = torch.zeros_like(pixels[:K]).index_add_(0, levels, pixels)
        return pixels, class_weights(pixels, self.scheme)

    def prior(self, K, levels=None):
        """Biases (K,) of the class head that minimise this loss while features say nothing.

        With p, each class's share of the pixels: direct: (log p) / w; else log(w p), normalised.
        Without them a network spends its first hundreds of steps finding out that most pixels are
        background (Lin et al., arXiv 1708.02002, Section 4.1).
        """
        pixels, weights = self.pixels_and_weights(K, levels)
        log_p = torch.log_softmax(torch.log(pixels + 1), 0)     # + 1: no class is impossible
        if self.form == "direct":
            return (log_p - log_p.max()) / weights
        return torch.log_softmax(log_p + weights.log(), 0)

    def totals(self, logits, labels, levels=None):
        """Summed loss (float32 scalar) and number of pixels that count (int64 scalar).
        logits (B, K, H, W) of any float dtype; labels (B, H', W') uint8; levels (ids,) int64."""
        B, K, H, W = logits.shape
        if labels.shape[-2:] != (H, W):
            # nearest-exact samples cell centres; nearest samples their corners.
            labels = F.interpolate(labels[:, None], (H, W), mode="nearest-exact")[:, 0]
        target = labels.long() if levels is None else map_ids(labels, levels)
        target = target.flatten()                           # (B H W,)
        # Channels last makes this a view, and softmax over the last axis is the fast one.
        logits = logits.permute(0, 2, 3, 1).reshape(-1, K).float()      # (B H W, K)
        _, weights = self.pixels_and_weights(K, levels)
        if self.form == "direct":
            logits = logits * weights
            weights = None
        loss = F.cross_entropy(logits, target, weight=weights, ignore_index=IGNORE,
                               reduction="none")            # "sum" runs on one block on CUDA
        return loss.sum(), (target != IGNORE).sum()

    def __call__(self, logits, labels, levels=None):
        """The mean loss over all pixels that count, of all processes; 0 where none counts."""
        loss, count = self.totals(logits, labels, levels)
        if dist.is_initialized():
            dist.all_reduce(count)
            loss = loss * dist.get_world_size()             # DDP divides gradients by it again
        return loss / count.clamp(min=1)


# ---- Frames and augmentation: functions of (seed, step)

def frame_order(count, batch_size, seed, start, steps):
    """Yields, for each step of range(start, steps), a list of `batch_size` indices below `count`:
    shuffled epochs, one after the other."""
    @functools.lru_cache(maxsize=2)    # a batch may need the end of one and the start of the next
    def shuffled(epoch):
        return np.random.default_rng([seed, 0, epoch]).permutation(count)

    for step in range(start, steps):
        positions = range(step * batch_size, (step + 1) * batch_size)
        yield [int(shuffled(position // count)[position % count]) for position in positions]


def draw_augmentation(seed, step, B):
    """What happens to each of the B images of a step. Returns (B, 7) float32, its columns: mirror,
    0 or 1; scale, 0.5 to 2; align, x and y, 0 to 1; brightness, contrast, saturation, factors."""
    rng = np.random.default_rng([seed, 1, step])
    mirror = rng.random((B, 1)) < 0.5
    scale = 2 ** rng.uniform(-1, 1, (B, 1))                 # as often half as double
    align = rng.random((B, 2))
    colour = rng.uniform(0.6, 1.4, (B, 3))
    return torch.tensor(np.hstack([mirror, scale, align, colour])).float()


def mirror_batch(images, labels, joints, chosen, classes):
    """Flips the chosen (B,) bool samples of images (B, 3, H, W), labels (B, H, W), joints (B, J, 2)
    or None. A mirrored left hand is a right hand, so ids and joints swap sides."""
    chosen = chosen[:, None, None]
    sides = map_ids(labels.flip(-1), classes["mirror"]).to(torch.uint8)
    labels = torch.where(chosen, sides, labels)
    images = torch.where(chosen[..., None], images.flip(-1), images)
    if joints is not None:
        moved = joints[:, classes["joint_mirror"]]
        moved[..., 0] = images.shape[-1] - 1 - moved[..., 0]
        joints = torch.where(chosen, moved, joints)
    return images, labels, joints


def colour_batch(images, factors):
    """images (B, 3, H, W), 0 to 255, as other light and film would show them: float32, 0 to 255.
    factors (B, 3): of brightness; of contrast, the distance to the image's mean grey; and of
    saturation, the distance of each pixel to its own grey."""
    brightness, contrast, saturation = factors.T[..., None, None, None]     # (B, 1, 1, 1) each
    grey = images.float().mean(1, keepdim=True)             # (B, 1, H, W)
    mean = grey.mean((2, 3), keepdim=True)                  # (B, 1, 1, 1)
    images = grey + saturation * (images - grey)
    images = mean + contrast * (images - mean)
    return (brightness * images).clamp(0, 255)


def scale_batch(images, labels, joints, scale, align):
    """Scales normalised images (B, 3, W, W) bilinearly, labels (B, W, W) uint8 by nearest pixel and
    joints (B, J, 2) or None by scale (B, 1). align (B, 2), x and y: 0 aligns left (upper) edges, 1
    right (lower) ones. Outside are the mean colour and 255.
    Pixel x goes to scale * (x + 0.5) + offset - 0.5."""
    size = images.shape[-1]
    offset = align * (size - scale * size)                  # (B, 2) pixels
    # grid_sample asks where each output pixel comes from, on sides that run from -1 to 1.
    shift = (1 - 2 * offset / size) / scale - 1
    zoom = torch.eye(2, device=images.device) / scale[..., None]
    theta = torch.cat([zoom, shift[..., None]], 2)          # (B, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    shifted = labels[:, None].float() - IGNORE      # grid_sample fills with 0, so 0 means ignore
    shifted = F.grid_sample(shifted, grid, mode="nearest", align_corners=False)
    labels = (shifted[:, 0] + IGNORE).to(torch.uint8)
    if joints is not None:
        joints = scale[..., None] * (joints + 0.5) + offset[:, None] - 0.5
    return images, labels, joints


def augment_batch(batch, draws, kinds, classes, memory_format=torch.channels_last):
    """Augments and normalises a loaded batch on its device.
    batch: images (B, 3, H, W) uint8, labels (B, H, W) uint8 and perhaps joints (B, J, 2); draws: of
    draw_augmentation, (B, 7); kinds: those of mirror, colour and scale that are wanted.
    Returns images (B, 3, H, W) float32 and a dict of labels and joints (or None)."""
    images = batch["images"]
    labels = batch["labels"]
    joints = batch.get("joints")
    mirror, scale, align, colour = draws.to(images.device).split([1, 1, 2, 3], dim=1)
    if "mirror" in kinds:
        images, labels, joints = mirror_batch(images, labels, joints, mirror[:, 0] > 0, classes)
    if "colour" in kinds:
        images = colour_batch(images, colour)
    images = evaluate.normalise(images, classes, memory_format)
    if "scale" in kinds:
        images, labels, joints = scale_batch(images, labels, joints, scale, align)
    images = images.contiguous(memory_format=memory_format)
    return images, dict(labels=labels, joints=joints)


# ---- The loop

def learning_rate(args, step):
    """The rate at a step: the schedule, times a linear rise over the first `warmup` steps, which
    are at most a tenth of the run."""
    warmup = max(1, min(args.warmup, args.iterations // 10))
    rate = args.lr * min(1, (step + 1) / warmup)
    if args.schedule == "poly":
        return rate * (1 - step / args.iterations) ** args.power
    if args.schedule == "step":
        return rate * args.factor ** (step // args.every)
    return rate                                             # constant


def train(args, run_dir, checkpoint=None):
    """Trains one network into the folder run_dir, from step 0 or from a checkpoint of that run.
    args: every setting, see OPTIONS. Raises Problem."""
    # 1. This is process `rank` of `world`. All validate, so that none waits; the first one writes.
    rank, world = join_processes(args.device)
    device, precision = evaluate.pick_device(args.device, args.precision)
    workers = evaluate.reader_count(args.workers, device)

    # 2. Data: frames to train on, and a fixed choice of both splits to measure.
    classes, training = read_data(args)
    training.keep(workers)
    warn(classes, args.data)
    measured = validation_readers(args, classes, workers, device)

    # 3. Network, loss and optimiser; in fp16, a scale of the loss keeps small gradients above 0.
    torch.manual_seed(args.seed)
    network, kwargs = build_network(args, classes)
    criterion = Criterion(classes, args.weighting, device)
    _, factors = criterion.pixels_and_weights(len(classes["names"]))
    fixed = dict(
        model=args.model,
        kwargs=kwargs,
        classes=classes,
        settings=vars(args),
        logit_weights=factors.tolist() if criterion.form == "direct" else None,
    )
    predict = Predictor(fixed, network, device, precision)     # moves the network there
    for head, levels in getattr(network, "heads", ()):
        head.bias.data.copy_(criterion.prior(len(head.bias), levels))
    optimizer = build_optimizer(args, network)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # 4. Where the run stands. last.pt is the run: nothing else is needed to continue it.
    progress = checkpoint or dict(step=0, best_miou=-1.0, rows=[])
    start = progress["step"]
    best = progress["best_miou"]
    rows = progress["rows"]
    if checkpoint:
        check_same_data(checkpoint, classes, args.data)
        network.load_state_dict(checkpoint["weights"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"] and scaler.is_enabled():    # both in fp16
            scaler.load_state_dict(checkpoint["scaler"])
    elif args.init_from:
        start_from(network, args.init_from)

    def save(name, step):
        if rank:
            return
        state = dict(
            weights=network.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
            step=step,
            best_miou=best,
            rows=rows,
        )
        buffer = io.BytesIO()                               # so a full disk raises an OSError
        torch.save(fixed | state, buffer)
        (run_dir / "new.pt").write_bytes(buffer.getbuffer())
        os.replace(run_dir / "new.pt", run_dir / name)      # never leaves half a file

    lock = claim(run_dir, args.resume is not None) if rank == 0 else None
    if not checkpoint:
        save("last.pt", 0)
    print(f"{args.model}, {precision} on {device}, into {run_dir}, steps {start} to "
          f"{args.iterations}; {args.data}: {classes['source']}")
    if args.compile:
        network.compile()                                   # in place: weights keep their names
    model = distribute(network, device) if world > 1 else network
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    order = frame_order(len(training.frames), args.batch_size, args.seed, start, args.iterations)
    shares = (indices[rank::world] for indices in order)
    batches = evaluate.reader(training, shares, workers, device)
    bar = progress_bar(args, start, rank)
    stop = StopRequest(world)

    # 5. The loop.
    for step, batch in enumerate(batches, start):
        network.train()
        for norm in norms:
            norm.train(step >= args.bn_after)               # frozen, it keeps its statistics
        draws = draw_augmentation(args.seed, step, args.batch_size)
        batch = evaluate.to_device(batch, device)
        images, truth = augment_batch(batch, draws[rank::world], args.augment, classes,
                                      predict.memory_format)
        with evaluate.autocast(device, precision):
            outputs = model(images)
        total, main = network.loss(outputs, truth, criterion)
        optimizer.zero_grad()
        scaler.scale(total).backward()
        if step < args.bn_after:        # of a gradient of 0, momentum would still move them
            for norm in norms:
                norm.weight.grad = norm.bias.grad = None
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        scaler.step(optimizer)
        scaler.update()

        done = step + 1
        due = done % args.val_every == 0 or done == args.iterations
        stopping = stop.number                              # it may change at any line below
        look = due or stopping or done % 10 == 0
        if not look:                                        # main.item() would wait for the GPU
            bar.update(args.batch_size)
            continue
        loss = mean_over_processes(main)
        check_finite(loss, done, scaler.get_scale(), network)
        if due:
            row = dict(step=done) | validate(predict, measured)
            check_finite(row["val_loss"], done)
            rows.append(row)
            if row["val_miou"] > best:
                best = row["val_miou"]
                save("best.pt", done)
            if rank == 0:
                write_log(run_dir, rows, classes["source"])
        if due or stopping:
            save("last.pt", done)
        bar.set_postfix_str(f"step {done}, loss {loss:.3f}, best mIoU {max(best, 0):.1%}", False)
        bar.update(args.batch_size)
        if stopping:
            bar.close()
            print(f"Stopped at step {done}: --resume {run_dir} goes on (a study: its command)")
            sys.exit(128 + stopping)
    bar.close()
    stop.number = -1                                        # from here on, a signal ends at once
    if world > 1:
        dist.destroy_process_group()
    if lock:
        lock.close()


def validate(predict, measured):
    """A row of the log: mean unweighted loss (the same for all runs, so that they compare) and
    figures of the frames that `measured` reads, which are fixed and never augmented."""
    predict.network.eval()
    unweighted = Criterion(predict.classes, device=predict.device)
    row = {}
    for name, (batches, groups) in measured.items():
        confusions, _, loss = evaluate.evaluate_frames(predict, batches, groups, unweighted)
        figures = evaluate.scores(confusions[0])
        row[f"{name}_loss"] = float(loss)
        row |= {f"{name}_{key}": float(figures[key]) for key in evaluate.FIGURES}
    return row


def mean_over_processes(loss):
    """A float: the loss of the whole batch, of which each process has a part (Criterion)."""
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def check_finite(loss, step, scale=1, network=None):
    """Raises Problem for a loss, or weights after the step, that are nan or inf, before they are
    saved. In fp16 a step with such gradients is skipped and the scale halved, so a loss is only
    final once the scale is down to 1."""
    weights = sum(p.detach().sum() for p in network.parameters()) if network else 0.0
    sound = np.isfinite(loss) or scale > 1
    if not sound or not np.isfinite(float(weights)):
        raise Problem(f"loss {loss} at step {step}, or weights that are not finite: lower --lr, or "
                      "take --precision fp32")


def write_log(run_dir, rows, source):
    """log.csv and curves.png (as in the paper's Fig. 4, 8, 10, 17), for people: the run itself is
    continued from last.pt."""
    with open(run_dir / "log.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    steps = [row["step"] for row in rows]
    sheet = Figure((9, 7), layout="constrained")
    for axes, kind in zip(sheet.subplots(2), ("miou", "loss")):
        for part in "train", "val":
            axes.plot(steps, [row[f"{part}_{kind}"] for row in rows], ".-", label=part)
        axes.set(xlabel="step", ylabel=kind, title=source, ylim=(0, None))
        axes.legend()
    sheet.savefig(run_dir / "curves.png")
    say = tqdm.write if sys.stderr.isatty() else print      # above the bar; in a log, a line
    say("step {step}: mIoU train {train_miou:.1%}, val {val_miou:.1%}".format(**rows[-1]))


# ---- What the loop stands on: data, network, processes, signals

def read_data(args):
    """Classes and train split of args.data; without SURREAL, of the stand-in, which is rendered on
    first use. Raises Problem where the data and the options do not fit."""
    if not args.data:
        args.data = "data/surreal" if Path("data/surreal").exists() else "data/standin"
    if args.data == "data/standin" and not Path("data/standin/classes.json").exists():
        render_standin()
    classes = evaluate.read_classes(args.data, count=True)
    training = Split(args.data, "train", classes, args.size, labels_at_size=True)
    frames = training.frames + Split(args.data, "val", classes).frames
    classes["frames"] = hashlib.sha256(repr(frames).encode()).hexdigest()
    if training.size % 32:
        raise Problem(f"{args.data} has {training.size} pixels, no multiple of 32: give --size")
    if args.coarse_to_fine and classes["names"] != NAMES:
        raise Problem(f"--coarse-to-fine is for SURREAL's 25 classes, and {args.data} has others")
    if args.joints != "surreal":
        training.joints = None                              # they need not be augmented
    elif training.joints is None or not classes["joint_mirror"]:
        raise Problem(f"{args.data} has no joints or joint_mirror: use --joints centroids")
    return classes, training


def warn(classes, data):
    """Prints what is no mistake of the options, but may be one of the data."""
    absent = [name for name, count in zip(classes["names"], classes["pixels"]) if count == 0]
    if absent:
        print(f"{data}: no training label shows", ", ".join(absent))
    shared = evaluate.shared_groups(data)
    if shared:
        print(f"{data}: {len(shared)} groups of train are in val or test too, {shared[0]} for "
              "example, so the figures are too good for new data")


def render_standin():
    """Makes data/standin. Raises Problem under torchrun, where each process would render it."""
    if "RANK" in os.environ:
        raise Problem("torchrun needs data: python prepare_surreal.py --synthesize --out "
                      "data/standin first, or --data")
    print("Rendering a stand-in for SURREAL, which it is not, into data/standin.", flush=True)
    import prepare_surreal                                  # not needed by those who have data
    status = prepare_surreal.main(["--synthesize", "--out", "data/standin"])
    if status:
        sys.exit(status)                                    # it has said why


def validation_readers(args, classes, workers, device):
    """{"train" and "val": (reader, group of each frame)} of a fixed, seeded choice of frames. The
    readers' processes live on between validations, about as many as training's."""
    measured = {}
    for number, name in enumerate(("train", "val")):
        split = Split(args.data, name, classes, args.size)
        # Not of args.seed, since all runs are measured on the same frames.
        order = np.random.default_rng([2, number]).permutation(len(split.frames))
        chosen = np.sort(order[:args.val_images])
        chunks = torch.tensor(chosen).split(min(16, args.batch_size))
        batches = evaluate.reader(split, chunks, (workers + 1) // 2, device, persistent=True)
        measured[name] = batches, np.zeros(len(chosen), int)            # one group
    return measured


def check_same_data(checkpoint, classes, data):
    """Raises Problem unless the classes and frames are those that the checkpoint's run began with.
    """
    for key, what in dict(names="classes", size="sizes", pixels="labels", frames="frames").items():
        if checkpoint["classes"].get(key) != classes[key]:
            raise Problem(f"{data} has other {what} than when this run began: restore the folder, "
                          "or start another run with --out")


# Settings that only one of the networks takes.
ONLY_FOR = dict(
    variant="segnet",
    stacks="hourglass",
    features="hourglass",
    stem_stride="hourglass",
    coarse_to_fine="hourglass",
    joints="hourglass",
)


def build_network(args, classes):
    """The network that the options describe, and its keyword arguments, which checkpoints keep."""
    kwargs = dict(num_classes=len(classes["names"]), width=args.width)
    if args.double_filters:
        kwargs["width"] *= 2
    for option, model in ONLY_FOR.items():
        if model == args.model:
            kwargs[option] = getattr(args, option)
    if args.joints == "surreal":
        kwargs["num_joints"] = len(classes["joint_mirror"])
    return MODELS[args.model](**kwargs), kwargs


def orthogonal(matrix):
    """(R, C) float32 -> about U V', where the matrix is U S V': all singular values about 1.

    X, the matrix divided by its norm, has S of 0 to 1. (a + b XX' + c (XX')^2) X is U p(S) V' with
    p(s) = a s + b s^3 + c s^5: U and V stay. Five times p, with the a, b, c of Muon's author,
    brings 0.002 to 1 to between 0.68 and 1.21; less grows up to 485 times, and 0 stays 0.

    The bracket is an R x R matrix and X is wider, so the five brackets are multiplied first and X
    once. All of them are polynomials of the first XX', so their order does not matter.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    X = matrix / (matrix.norm() + 1e-7)
    square = X @ X.T                                        # (R, R)

    def bracket(square):                                    # a + b XX' + c (XX')^2
        result = torch.addmm(square, square, square, beta=b, alpha=c)
        result.diagonal().add_(a)
        return result

    factor = product = bracket(square)
    for _ in range(4):
        square = factor @ square @ factor                   # XX' of the next X, factor @ X
        factor = bracket(square)
        product = factor @ product
    return product @ X


class Muon(torch.optim.AdamW):
    """AdamW, except for the first parameter group, whose kernels move by orthogonal momentum.

    A kernel is a matrix, outputs by (inputs x height x width), and a few directions dominate its
    gradient. Steps that are as long in all of them learn from the rare ones too: the hourglass came
    further in 2,250 quick steps than with AdamW in 4,500 (stand-in, not SURREAL, validation: 27.7
    and 26.7 % mIoU). Jordan et al., kellerjordan.github.io/posts/muon; they leave the last layer to
    AdamW. torch.optim.Muon takes 2-D parameters alone and rounds them to bf16, which makes steps
    of noise (findings/muon-steps-of-rounding-noise.sh).
    """

    def __init__(self, groups, lr):
        super().__init__(groups, lr=lr, fused=True)
        # Else a GradScaler hands on gradients times its scale, inf included, for the fused kernel
        # to divide (findings/fused-optimiser-scaled-gradients.sh).
        self._step_supports_amp_scaling = False

    def __setstate__(self, state):                          # when a run goes on
        torch.optim.Optimizer.__setstate__(self, state)     # AdamW's wants a "step" of kernels too

    @torch.no_grad()
    def step(self):
        kernels = self.param_groups[0]
        rate = kernels["lr"]
        for p in kernels["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            momentum = state["momentum"].lerp_(p.grad, 0.05)        # the mean of about 20 steps
            # Nesterov: what it becomes if the next gradient is the same. It starts at 0 and is too
            # short at first, as Adam's is, but orthogonal() takes any length out.
            ahead = p.grad.lerp(momentum, 0.95)
            update = orthogonal(ahead.flatten(1))           # (R, C)
            # An orthogonal matrix's numbers have the root mean square 1 / sqrt(max(R, C)); AdamW's
            # steps have about 0.2 on noisy gradients (Liu et al., arXiv 2502.16982). So about the
            # same --lr suits both.
            size = 0.2 * max(update.shape) ** 0.5
            p.mul_(1 - rate * kernels["weight_decay"])
            p.sub_(rate * size * update.view_as(p))
            p.grad = None                                   # so AdamW leaves the kernel alone
        super().step()


def build_optimizer(args, network):
    """The Muon above or torch.optim's args.optimizer; weight decay acts on kernels alone."""
    kernels = [p for p in network.parameters() if p.ndim == 4]
    others = [p for p in network.parameters() if p.ndim != 4]
    groups = [
        dict(params=kernels, weight_decay=args.weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    kind = Muon if args.optimizer == "Muon" else getattr(torch.optim, args.optimizer)
    return kind(groups, lr=args.lr, **args.optimizer_args)


def start_from(network, path):
    """Copies the tensors that fit by name and shape. Raises Problem if no convolution fits."""
    checkpoint, _ = evaluate.load_checkpoint(evaluate.find_checkpoint(path))
    own = network.state_dict()
    taken = {name: value for name, value in checkpoint["weights"].items()
             if name in own and value.shape == own[name].shape}
    if not any(value.ndim == 4 for value in taken.values()):
        raise Problem(f"nothing in --init-from {path} fits this network: model or width differ")
    network.load_state_dict(taken, strict=False)
    print(f"--init-from {path}: took {len(taken)} of {len(own)} tensors")


def join_processes(device):
    """(rank, world) of the processes that torchrun started; (0, 1) without it. Only the first one
    speaks, errors aside. A dead peer ends the others: NCCL waits ten minutes, gloo half an hour."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    torch.backends.cudnn.benchmark = True                   # to try kernels pays: batches are alike
    if world > 1:
        card = None
        if device != "cpu" and torch.cuda.is_available():
            card = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(card)                     # which "cuda" stands for from here on
        dist.init_process_group("nccl" if card else "gloo", device_id=card)
    if rank:
        sys.stdout = open(os.devnull, "w")
    return rank, world


def distribute(network, device):
    """The network in DistributedDataParallel. On CUDA batch normalisation sees the whole batch:
    each such layer makes the host wait for the device once a step (ICNet has 63)."""
    options = {}
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
        options["broadcast_buffers"] = False                # they are alike already
    return nn.parallel.DistributedDataParallel(network, **options)


def claim(run_dir, may_exist):
    """Makes the run's folder and returns a file whose lock ends with this process, or when it is
    closed. Raises Problem where another process works in the folder, or made it first."""
    try:
        import fcntl
    except ImportError:                                     # Windows has none, and no lock then
        fcntl = None
    try:
        run_dir.mkdir(parents=True, exist_ok=may_exist)
        lock = open(run_dir / "lock", "w")
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileExistsError, BlockingIOError) as error:
        raise Problem(f"{run_dir} belongs to another process: name another --out") from error
    return lock


class StopRequest:
    """Keeps the `number` of the first Ctrl-C, SIGTERM or SIGHUP (a lost connection), so that the
    step is finished and saved; the second one ends the process at once. Several processes could
    stop at different steps, so they just end and repeat the steps since the last validation."""

    def __init__(self, world):
        self.number = 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP") if world == 1 else ():
            number = getattr(signal, name, None)            # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:       # nohup ignores it
                signal.signal(number, self.note)

    def note(self, number, frame):
        if self.number:
            sys.exit(128 + number)
        self.number = number


def progress_bar(args, start, rank):
    """Images done, images/s and time left of the whole run; the caller adds step and loss."""
    total = args.iterations * args.batch_size
    done = start * args.batch_size
    return evaluate.progress(total=total, initial=done, unit=" images", disable=rank > 0)


# ---- The study (paper, Section 3.1, and for the hourglass 4.1.3)

STUDY = dict(           # the runs of the paper's tables
    icnet=["", "--double-filters", "--augment", "--weighting w1-outer", "--weighting w1-direct",
           "--weighting w2-outer", "--weighting w2-direct"],
    segnet=["", "--double-filters", "--double-filters --augment",
            "--double-filters --weighting w1-outer", "--double-filters --weighting w2-outer"],
    hourglass=["", "--coarse-to-fine", "--joints surreal"])


def study(args, argv, folder):
    """The runs of the paper's tables, each a command line that goes on where it was stopped; their
    table on the validation split, in `folder`. Then the best one, which for ICNet and SegNet trains
    again for 90,000 / 40,000 of the steps, is tested."""
    base = [word for word in argv if word not in ("--study", "--resume")]

    def run_dir(options):
        return str(folder / ("-".join(options.replace("--", "").split()) or "normal"))

    def command(options):
        return [*base, "--augment", "none", *options.split(), "--out", run_dir(options), "--resume"]

    def miou(options):
        checkpoint, _ = evaluate.load_checkpoint(run_dir(options) + "/best.pt")
        return checkpoint["best_miou"]

    series = STUDY[args.model]
    settings = [parse(command(options))[0] for options in series]
    for run in settings:                                    # what cannot work fails now
        classes, _ = read_data(run)
        Criterion(classes, run.weighting)
    for options in series:
        main(command(options))
    machine = ["--device", args.device, "--precision", args.precision]
    folders = [run_dir(options) for options in series]
    evaluate.main(["--ckpt", *folders, "--split", "val", "--out", str(folder), *machine])
    best = max(series, key=miou)
    if args.model != "hourglass":
        best += f" --iterations {round(args.iterations * 90000 / 40000)}"
    main(command(best))
    evaluate.main(["--ckpt", run_dir(best), "--out", str(folder / "test"), *machine])


# ---- Settings and command line

# A run's settings: OPTIONS and OTHERS, then the `recipe` in the network's file (the paper's
# values), then QUICK with --quick, then what is typed; each overrides those before. See --help.
OPTIONS = dict(         # name: (default, help)
    data=("", "prepared folder; else data/surreal, or data/standin, which is made on first use"),
    size=(0, "side of the images, a multiple of 32; 0: as prepared"),
    double_filters=(False, "twice the filters of every layer"),
    width=(1.0, "factor on the number of filters of every layer"),
    variant=("basic", "segnet: basic, or vgg16, the full form"),
    stacks=(4, "hourglass: number of modules, one after the other"),
    features=(256, "hourglass: channels of a module"),
    stem_stride=(1, "hourglass: 1, or 4, which works at a quarter of the size"),
    coarse_to_fine=(False, "hourglass: its modules learn 2, 6, 12, then 25 classes"),
    joints=("none", "hourglass: a training branch finds the data's joints, or parts' centroids"),
    weighting=("none", "class weights, see Criterion"),
    iterations=(0, "training steps"),                       # set by every recipe, as the next two
    batch_size=(0, "images in a step, over all processes"),
    lr=(0.0, "first learning rate"),
    val_every=(200, "steps between validations"),
    val_images=(500, "images of train and of val in a validation"),
    bn_after=(0, "steps before batch normalisation starts to learn"),
    init_from=("", "checkpoint whose weights are taken where they fit"),
    seed=(0, "of first weights, order of images and augmentation"),
    compile=(False, "torch.compile, for GPUs"),
    out=("", "folder of a new run; else runs/, named after the options"),
    quick=(False, "other settings: some minutes on a laptop's CPU"),
    study=(False, "the paper's series of runs, in runs/<model>-study"))
OTHERS = dict(          # without an entry above, or set by recipes alone
    device="auto",
    precision="auto",
    workers=None,
    augment=["none"],
    resume=None,
    optimizer_args={},
    weight_decay=0.0,
    warmup=0,
    power=1.0,
)
QUICK_COMMON = dict(
    optimizer="Muon", optimizer_args={}, weight_decay=0.1, lr=0.01, schedule="poly",
    warmup=100, batch_size=16, val_images=200, augment=["mirror"])
QUICK = dict(           # some minutes on two cores, found by trial
    icnet=QUICK_COMMON | dict(size=192, width=0.5, iterations=1000, val_every=250),
    segnet=QUICK_COMMON | dict(size=96, width=0.5, iterations=1200, val_every=300),
    hourglass=QUICK_COMMON | dict(size=96, stacks=1, features=128, stem_stride=4, lr=0.016,
                                  iterations=1200, val_every=400))
WEIGHTINGS = ["none", "w1-outer", "w1-direct", "w2-outer", "w2-direct"]
CHOICES = dict(
    variant=["basic", "vgg16"],
    stem_stride=[1, 4],
    joints=["none", "surreal", "centroids"],
    weighting=WEIGHTINGS,
)
LOWEST = dict(width=0.001, size=0, lr=0, bn_after=0, seed=0, workers=0)     # all others: 1
MAY_CHANGE = {"workers", "device", "precision", "compile", "iterations", "out", "resume", "data"}
SET_BY_STUDY = {"double_filters", "weighting", "augment", "coarse_to_fine", "joints"}


def build_parser():
    """Options without defaults, so that what was typed can be told from what was not."""
    recipes = {model: network.recipe for model, network in MODELS.items()}
    parser = evaluate.Parser(prog="train.py", description=__doc__.split("\n\n")[0],
                             argument_default=SUPPRESS,
                             epilog=f"Recipes: {recipes}; --quick: {QUICK}; others: {OTHERS}")
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), help="the network")
    for name, (default, text) in OPTIONS.items():
        option = "--" + name.replace("_", "-")
        if default is False:
            add(option, action="store_true", help=text)
        else:
            set_by_recipe = name in ("iterations", "batch_size", "lr")
            text += " (see below)" if set_by_recipe else f" ({default!r})"
            add(option, type=type(default), choices=CHOICES.get(name), help=text)
    add("--augment", nargs="*", choices=["mirror", "scale", "colour", "none"],
        help="alone: mirror and scale, the paper's")
    add("--resume", nargs="?", const="", metavar="DIR",
        help="go on with that run; alone: with the newest unfinished one; with --model and --out: "
             "with the run in --out, or begin it there")
    return parser


def find_run(typed, argv):
    """(run folder, checkpoint to go on from or None) of the typed options. Raises Problem."""
    model, out, resume = map(typed.get, ("model", "out", "resume"))
    study = typed.get("study")
    if not model and (study or resume is None):
        raise Problem(f"--model is missing: {', '.join(sorted(MODELS))}")
    if study:
        return Path(out or f"runs/{model}-study"), None
    if resume is None:
        words = [Path(word.lstrip("-")).name for word in argv if word != "--model"]
        run_dir = Path(out or "runs/" + "-".join(words)[:80])
        if run_dir.exists():
            raise Problem(f"{run_dir} exists: --resume {run_dir} goes on, --out starts another")
        return run_dir, None
    if (resume and out) or (model and not resume and not out):
        raise Problem("--resume DIR goes on with DIR; --resume alone with the newest unfinished "
                      "run; --model with --out DIR and --resume goes on with DIR or begins it")
    run_dir = Path(resume or out or newest_unfinished())
    if not (run_dir / "last.pt").exists():
        if model and out:
            return run_dir, None
        raise Problem(f"there is no run in {run_dir}, as it has no last.pt")
    checkpoint, _ = evaluate.load_checkpoint(run_dir / "last.pt")
    return run_dir, checkpoint


def newest_unfinished():
    """The folder of the newest run below runs/ that has steps left. Raises Problem for none."""
    for path in evaluate.newest("runs", "last.pt"):
        try:
            checkpoint, _ = evaluate.load_checkpoint(path)
        except Problem as problem:
            print(problem)
            continue
        if checkpoint["step"] < checkpoint["settings"]["iterations"]:
            return path.parent
    raise Problem("no run below runs/ is unfinished: --resume DIR --iterations N prolongs one")


def complete(typed, checkpoint):
    """All settings, as a Namespace: typed ones, and what they leave open; of a run that goes on,
    those that it began with. Raises Problem where the two differ."""
    if typed.get("augment") == []:
        typed["augment"] = ["mirror", "scale"]
    if checkpoint:
        began = checkpoint["settings"]
        for name in typed.keys() - MAY_CHANGE:
            if typed[name] != began[name]:
                raise Problem(f"this run began with {name} {began[name]!r}: leave the option out, "
                              "or start another run with --out")
        return Namespace(**began | typed)
    model = typed["model"]
    defaults = {name: default for name, (default, _) in OPTIONS.items()}
    settings = defaults | OTHERS | MODELS[model].recipe
    if typed.get("quick"):
        quick = QUICK.get(model, QUICK_COMMON)
        settings |= quick
        print("--quick:", quick, "where no option says otherwise")
    return Namespace(**settings | typed)


def check_options(args, typed):
    """Raises Problem for values and combinations that cannot work, before anything is made."""
    for name, value in typed.items():
        option = "--" + name.replace("_", "-")
        lowest = LOWEST.get(name, 1)
        if isinstance(value, (int, float)) and not lowest <= value < 2 ** 63:   # nor nan, inf
            raise Problem(f"{option} {value}: it has to be from {lowest} to 2^63")
        if ONLY_FOR.get(name, args.model) != args.model:
            raise Problem(f"{option} is no option of {args.model}: leave it out")
        if args.study and name in SET_BY_STUDY:
            raise Problem(f"{option} is set by each run of --study: leave it out")
    if args.size % 32:
        raise Problem(f"--size {args.size} is no multiple of 32, such as 96, 192 or 320")
    if args.coarse_to_fine and args.stacks == 1:
        raise Problem("--coarse-to-fine needs --stacks 2 or more (--quick has one)")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and (args.study or world > args.batch_size or ":" in args.device):
        raise Problem("torchrun: no --study, no --device with a number, and --batch-size at least "
                      "the number of processes")


def parse(argv):
    """(args, run folder, checkpoint to go on from or None) of a command line. Raises Problem."""
    typed = vars(build_parser().parse_args(argv))
    run_dir, checkpoint = find_run(typed, argv)
    args = complete(typed, checkpoint)
    check_options(args, typed)
    if args.init_from and not checkpoint:
        evaluate.find_checkpoint(args.init_from)            # fail before data are rendered
    return args, run_dir, checkpoint


def main(argv):
    """From the command line to a finished run. Returns the exit status 0, or raises Problem."""
    args, run_dir, checkpoint = parse(argv)
    if args.study:
        study(args, argv, run_dir)
        return 0
    if checkpoint and checkpoint["step"] >= args.iterations:
        print(f"{run_dir} is finished: --resume {run_dir} --iterations N prolongs it")
        return 0
    try:
        train(args, run_dir, checkpoint)
    except Exception as error:
        if "more than 1 value per channel" in str(error):
            raise Problem("batch normalisation needs more than one value: remove "
                          f"{run_dir} and raise --batch-size or --size") from error
        if args.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            reason = str(error).splitlines()[0]
            raise Problem(f"--compile failed ({reason}): remove {run_dir}, leave it out") from error
        raise
    return 0


if __name__ == "__main__":
    evaluate.run_command("train.py", lambda: main(sys.argv[1:]))
