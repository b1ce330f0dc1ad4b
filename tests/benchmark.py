"""Measures what the README's section "Speed" says. Run by a person; pytest does not collect it.

    python tests/benchmark.py [networks] [prepare]     none: both, some ten minutes

What is compared takes turns in one process, since the speed of a shared machine drifts. On a GPU
batches are the paper's, and the card's own rate of bf16 matrix products is the measure.
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate                                             # noqa: E402
import tiny                                                 # noqa: E402
import train                                                # noqa: E402

SIZE = 320
NETWORKS = [    # name, options, batch on a CPU; None: only a GPU is fast enough
    ("icnet", {}, 8), ("icnet", dict(width=2), 8), ("segnet", {}, 2), ("segnet", dict(width=2), 1),
    ("hourglass", dict(stem_stride=4), 2), ("hourglass", {}, None)]
CLASSES = dict(names=list(range(25)), pixels=[1] * 25, mean=[0.5] * 3, std=[0.25] * 3)


def side_by_side(ways, seconds=4):
    """Median seconds of each of `ways` {name: function}, which take turns, twice at least."""
    times = {name: [] for name in ways}
    for function in ways.values():                          # the first call allocates and compiles
        function()
    began = time.perf_counter()
    while min(map(len, times.values())) < 2 or time.perf_counter() - began < seconds:
        for name, function in ways.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


# ---- The networks

def build(model, options, batch, device, precision, ours, compiled=False):
    """(inference, training step). Plain is float32, NCHW and eager; ours is as in train.py."""
    layout = torch.channels_last if ours else torch.contiguous_format
    network = evaluate.MODELS[model](**options).to(device, memory_format=layout)
    images = torch.randint(256, (batch, 3, SIZE, SIZE), device=device, dtype=torch.uint8)
    normalised = evaluate.normalise(images, CLASSES).contiguous(memory_format=layout)
    labels = torch.randint(25, (batch, SIZE, SIZE), device=device, dtype=torch.uint8)
    criterion = train.Criterion(CLASSES, device=device) if ours else tiny.criterion
    optimizer = getattr(torch.optim, network.recipe["optimizer"])(network.parameters(), lr=1e-5)
    known = dict(classes=CLASSES, settings={}, logit_weights=None)
    predict = evaluate.Predictor(known, network, device, precision) if ours else None
    if compiled:
        network.compile()

    def infer():
        network.eval()
        with torch.no_grad():
            first = predict(images, (SIZE, SIZE))[0] if ours else network(normalised).argmax(1)
        first[0, 0, 0].item()

    def step():
        network.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=ours and precision == "bf16"):
            outputs = network(normalised)
        total, _ = network.loss(outputs, dict(labels=labels), criterion)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        total.item()                                        # waits for a GPU

    return infer, step


def networks(options):
    """Images/s of the three networks, plain and ours; on a GPU its use and memory too."""
    device, precision = evaluate.pick_device()
    cuda, where = device.type == "cuda", f"CPU, {torch.get_num_threads()} threads"
    rows = [["network", "batch", "inference: plain", "ours", "ratio", "training: plain", "ours",
             "ratio", *(["share of the matrix rate", "peak GiB"] if cuda else [])]]
    if cuda:
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        rate = 2 * 8192 ** 3 / side_by_side({"": lambda: (a @ a)[0, 0].item()})[""]
        where = f"{torch.cuda.get_device_name()}, {rate / 1e12:.0f} TFLOP/s in a matrix product"
    for model, kwargs, batch in NETWORKS:
        name = " ".join([model, *(f"{key} {value}" for key, value in kwargs.items())])
        batch = evaluate.MODELS[model].recipe["batch_size"] if cuda else batch
        if options.only not in name or not batch:
            continue
        rows.append([name, batch])
        for pair in zip(build(model, kwargs, batch, device, precision, ours=False),
                        build(model, kwargs, batch, device, precision, True, options.compile)):
            seconds = side_by_side(dict(zip(("plain", "ours"), pair)))
            rows[-1] += [f"{batch / value:.2f}" for value in seconds.values()]
            rows[-1] += [f"**{seconds['plain'] / seconds['ours']:.1f}**"]
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            pair[1]()                                       # a training step of ours; of plain:
            with FlopCounterMode(display=False) as flops:
                pair[0]()
            rows[-1] += [f"{100 * flops.get_total_flops() / seconds['ours'] / rate:.0f} %",
                         f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f}"]
    print(f"\n### Networks at {SIZE}x{SIZE}, images/s: plain (float32, NCHW), ours ({precision}, "
          f"channels last{', compiled' * options.compile}), {where}\n\n{evaluate.markdown(rows)}")


# ---- Preparation, by the command line of prepare_surreal.py

POSES = """
import time, numpy as np, prepare_surreal
rng = np.random.default_rng(0)
poses = rng.normal(0, 0.01, (1_600_000, 72)).astype(np.float32)
for walk in poses.reshape(400, 4000, 72):       # a pose, and a long walk from there
    walk[0] = rng.normal(0, 0.5, 72)
    np.cumsum(walk, axis=0, out=walk)
start = time.perf_counter()
prepare_surreal.pick(poses, 90_000, "spread", 25, rng)
memory = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
print(f"{time.perf_counter() - start:.1f}, {int(memory) / 2 ** 20:.2f}")
"""


def timed(*argv):
    """Seconds that a Python program takes, and what it prints."""
    start = time.perf_counter()
    printed = subprocess.check_output([sys.executable, *argv], cwd=ROOT, text=True).strip()
    return time.perf_counter() - start, printed


def prepare(options):
    """Rendering the stand-in, preparing clips, and choosing from 1.6 million poses."""
    with tempfile.TemporaryDirectory() as folder:
        common = ["--workers", str(options.workers), "--out"]
        both, _ = timed("prepare_surreal.py", "--synthesize", "--clips", "20", "--frames", "20",
                        *common, f"{folder}/one")
        alone, _ = timed("prepare_surreal.py", "--raw", f"{folder}/one-raw", *common,
                         f"{folder}/two")
        rendered = 20 * len(list(Path(folder, "one-raw").rglob("*.mp4")))
        prepared = len(list(Path(folder, "two").rglob("images/*.jpg"))) / 20
    print(f"\n### Preparation, {options.workers} workers, starts included\n\n" + evaluate.markdown([
        ["part", "figure"], ["stand-in rendered, frames/s", f"{rendered / (both - alone):.1f}"],
        ["prepared, clips of 20 frames/s", f"{prepared / alone:.2f}"],
        ["90,000 of 1.6 million poses chosen: seconds, GiB", timed("-c", POSES)[1]]]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["networks", "prepare"], help="which")
    parser.add_argument("--only", default="", help="networks whose name has these letters")
    parser.add_argument("--compile", action="store_true", help="networks: ours with torch.compile")
    parser.add_argument("--workers", type=int, default=2, help="prepare: processes")
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True                   # as train.py on a GPU
    for part in arguments.parts:
        globals()[part](arguments)
