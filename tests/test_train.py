"""train.py: weights and losses by hand, augmentation on small pictures, the order of frames, and
runs through the command line, among them killed ones that have to end like undisturbed ones."""
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import nn

import evaluate
import train
from evaluate import IGNORE, Problem
from tiny import write_prepared

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Of a training of two steps, three quarters of the time would go into curves.png."""
    monkeypatch.setattr(train, "Figure", MagicMock())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("prepared") / "tiny")


def command(data, out, more="", model="segnet", iterations=2):
    """A small run; what `more` repeats replaces what stands before it."""
    network = "--width 0.25"
    if model == "hourglass":
        network = "--stacks 2 --features 16 --stem-stride 4"
    words = (f"--model {model} {network} --data {data} --out {out} --iterations {iterations} "
             f"--batch-size 4 --val-every 2 --val-images 4 --workers 0 --precision fp32 {more}")
    return words.split()


def trained(data, out, more="", **options):
    """last.pt of a small run."""
    assert train.main(command(data, out, more, **options)) == 0
    return load(out)


def started(argv, *torchrun):
    """train.py as a process group of its own, once it has saved a step or ended."""
    process = subprocess.Popen(
        [sys.executable, *torchrun, train.__file__, *argv], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder = Path(argv[argv.index("--out") + 1])
    while process.poll() is None:
        if (folder / "last.pt").exists() and load(folder)["step"]:
            break
        time.sleep(0.02)
    return process


def refused(argv, capsys):
    """The one sentence that a command ends with, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.run_command("train.py", lambda: train.main(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    return error


def stop_in(owner, name, monkeypatch, argv):
    """Starts a run that ends like a killed one when it calls owner.name."""
    def killed(*inputs, **options):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, killed)
        train.main(argv)


def load(folder, name="last.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def same_end(one, other):
    """Whether two runs have equal weights, rows and best checkpoints."""
    for name in "last.pt", "best.pt":
        a, b = load(one, name), load(other, name)
        if any(a[key] != b[key] for key in ("rows", "step", "best_miou", "scaler")):
            return False
        if not all(torch.equal(value, b["weights"][key]) for key, value in a["weights"].items()):
            return False
    return True


# ---- Weights and losses

def test_class_weights_by_hand():
    # C = 80, 15, 5 of 100. W2: B = 1, 16/3, 16; mean 67/9, population std 6.3026.
    pixels = torch.tensor([80.0, 15.0, 5.0]).double()
    assert train.class_weights(pixels, "w1").tolist() == pytest.approx([0.20, 0.85, 0.95])
    damped = np.array([1.2912, 5.7994, 11.3964])            # B exp(-(B - 7.4444) / 25.2106)
    weights = train.class_weights(pixels, "w2").numpy()
    assert weights == pytest.approx(damped / 11.3964, rel=1e-4)
    assert train.class_weights(0 * pixels + 7, "w2").tolist() == [1, 1, 1]


@pytest.mark.parametrize("weighting", train.WEIGHTINGS)
def test_losses_against_numpy(weighting):
    rng = np.random.default_rng(0)
    pixels = [700, 200, 60, 40]
    logits = rng.normal(size=(4, 30)).astype(np.float32)
    labels = rng.integers(0, 4, 30).astype(np.uint8)
    scheme, _, form = weighting.partition("-")
    w = train.class_weights(torch.tensor(pixels).double(), scheme).numpy()
    x = logits * w[:, None] if form == "direct" else logits
    losses = np.log(np.exp(x).sum(0)) - x[labels, range(30)]
    if form == "outer":
        losses = losses * w[labels]
    labels[:2] = IGNORE
    criterion = train.Criterion({"pixels": pixels, "names": list("abcd")}, weighting)
    images = torch.tensor(logits).view(1, 4, 5, 6)
    ours = criterion(images, torch.tensor(labels).view(1, 5, 6))
    assert ours.item() == pytest.approx(losses[2:].mean(), rel=1e-5)


def test_labels_shrink_by_cell_centres_and_coarser_ids_add_up_pixels_before_the_weights():
    fine = train.Criterion({"pixels": [700, 200, 60, 40], "names": list("abcd")}, "w2-outer")
    coarse = train.Criterion({"pixels": [700, 300], "names": list("ab")}, "w2-outer")
    logits = torch.randn(1, 2, 2, 2).requires_grad_()
    levels = torch.tensor([0, 1, 1, 1])
    labels = torch.zeros(1, 8, 8).byte()
    labels[0, 2::4, 2::4] = torch.tensor([[0, 1], [3, IGNORE]])     # next to 4x4 cells' centres
    merged = torch.tensor([[[0, 1], [1, IGNORE]]]).byte()
    assert torch.isclose(fine(logits, labels, levels), coarse(logits, merged))
    nothing = fine(logits, 0 * labels + IGNORE, levels)
    nothing.backward()
    assert nothing.item() == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("model, weighting, heads", [
    ("icnet", "none", 3),
    ("segnet", "w2-outer", 1),
    ("icnet", "w1-direct", 3),
    ("hourglass", "w2-direct", 2),
])
def test_heads_start_at_the_prior(data, tmp_path, monkeypatch, model, weighting, heads):
    more = f"--weighting {weighting}"
    if model == "hourglass":
        more += " --coarse-to-fine"
    argv = command(data, tmp_path / "run", more, model=model)
    stop_in(evaluate, "reader_count", monkeypatch, argv)    # before anything is made
    assert not (tmp_path / "run").exists()
    stop_in(train, "progress_bar", monkeypatch, argv)
    checkpoint, network = evaluate.load_checkpoint(tmp_path / "run" / "last.pt")
    scheme, _, form = weighting.partition("-")
    assert (checkpoint["logit_weights"] is None) == (form != "direct")
    pixels = torch.tensor(evaluate.read_classes(data)["pixels"]).double()
    body = torch.stack([pixels[0], pixels[1:].sum()])       # what the first of two modules learns
    assert len(network.heads) == heads
    for head, _ in network.heads:
        C = body if len(head.bias) == 2 else pixels
        w = train.class_weights(C, scheme).double()
        expected = (C + 1) * w if form == "outer" else C + 1
        bias = head.bias.detach().double()
        found = torch.exp(bias * w if form == "direct" else bias)
        assert torch.allclose(found / found.sum(), expected / expected.sum(), rtol=1e-3)


# ---- Augmentation and the order of frames

def test_mirror_swaps_sides_and_twice_is_the_identity(data):
    """Of two alike samples, the first one is chosen."""
    classes = evaluate.read_classes(data)
    chosen = torch.tensor([True, False])
    images = torch.arange(16).byte().expand(2, 3, 16).reshape(2, 3, 4, 4)
    labels = torch.zeros(2, 4, 4).byte()
    labels[:, 1, 0] = 21                                    # a left hand, and its joint on it
    labels[:, 3, 3] = IGNORE
    joints = torch.full((2, 24, 2), -9.0)
    joints[:, 20] = torch.tensor([0.0, 1.0])
    before = images, labels, joints
    once = train.mirror_batch(*before, chosen, classes)
    twice = train.mirror_batch(*once, chosen, classes)
    for one, two, three in zip(before, once, twice):
        assert torch.equal(one[1], two[1])
        assert torch.equal(one, three)
    images, labels, joints = once
    assert images[0, 0, 0].tolist() == [3, 2, 1, 0]
    assert labels[0, 1].tolist() == [0, 0, 0, 22]
    assert labels[0, 3, 0] == IGNORE
    assert joints[0, 21].tolist() == [3.0, 1.0]


@pytest.mark.parametrize("scale, align, row, joint", [
    (2.0, (0.0, 0.0), [0, 0, 1, 1], [2.5, 0.5]),
    (2.0, (1.0, 0.5), [6, 6, 7, 7], [-1.5, -1.5]),
    (0.5, (0.0, 1.0), [IGNORE] * 4, [0.25, 1.75]),
])
def test_scale_by_two_cuts_a_corner_and_by_half_surrounds_with_ignore(scale, align, row, joint):
    labels = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    images = labels[:, None].float().expand(1, 3, 4, 4).contiguous()
    joints = torch.tensor([[[1.0, 0.0]]])
    small, ids, moved = train.scale_batch(
        images, labels, joints, torch.tensor([[scale]]), torch.tensor([align]))
    assert ids[0, 0].tolist() == row
    assert moved[0, 0].tolist() == joint
    if scale < 1:
        assert (ids[0, 2:, :2] != IGNORE).all()
        assert (ids == IGNORE).sum() == 12
        assert small[0, 0, 2, 0] == pytest.approx(2.5)      # the mean of 0, 1, 4, 5
        assert small[0, 0, 0, 3] == 0


@pytest.mark.parametrize("factors, first, second", [
    ([1.0, 1, 1], [60, 90, 120], [0, 0, 30]),
    ([2.0, 1, 1], [120, 180, 240], [0, 0, 60]),
    ([1.0, 1, 0], [90, 90, 90], [10, 10, 10]),
    ([1.0, 0, 1], [50, 50, 50], [50, 50, 50]),
    ([3.0, 1, 1], [180, 255, 255], [0, 0, 90]),
])
def test_colour_scales_light_contrast_and_saturation(factors, first, second):
    """Two pixels whose greys are 90 and 10, in the mean 50."""
    images = torch.tensor([[60, 0], [90, 0], [120, 30]]).view(1, 3, 1, 2)
    coloured = train.colour_batch(images.byte(), torch.tensor([factors])).squeeze()
    assert coloured[:, 0].tolist() == pytest.approx(first)
    assert coloured[:, 1].tolist() == pytest.approx(second)


def test_augmentation_is_a_function_of_seed_and_step():
    draws = train.draw_augmentation(3, 17, 4000)
    assert draws.dtype == torch.float32
    assert torch.equal(draws, train.draw_augmentation(3, 17, 4000))
    for seed, step in (3, 18), (4, 17):
        assert (draws != train.draw_augmentation(seed, step, 4000)).any(0).all()
    assert draws[:, 0].unique().tolist() == [0, 1]          # mirror
    draws[:, 1].log2_()                                     # as often half as double
    lowest = [0, -1, 0, 0, 0.6, 0.6, 0.6]
    highest = [1, 1, 1, 1, 1.4, 1.4, 1.4]
    middle = [0.5, 0, 0.5, 0.5, 1, 1, 1]
    assert draws.amin(0).tolist() == pytest.approx(lowest, abs=0.01)
    assert draws.amax(0).tolist() == pytest.approx(highest, abs=0.01)
    assert draws.mean(0).tolist() == pytest.approx(middle, abs=0.03)


def test_frame_order():
    order = list(train.frame_order(10, 4, 1, 0, 10))
    epochs = np.array(order).reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len(np.unique(epochs, axis=0)) == 4
    assert list(train.frame_order(10, 4, 1, 7, 10)) == order[7:]
    assert list(train.frame_order(10, 4, 2, 0, 10)) != order
    large, = train.frame_order(3, 8, 0, 0, 1)
    assert sorted(large[:3]) == sorted(large[3:6]) == [0, 1, 2]
    assert len(large) == 8


@pytest.mark.parametrize("schedule, step, rate", [
    ("constant", 99, 1),
    ("constant", 4, 0.5),
    ("poly", 50, 0.25),
    ("poly", 0, 0.1),
    ("step", 59, 0.5 ** 5),
])
def test_learning_rates_rise_over_a_tenth_of_the_run_and_follow_the_schedule(schedule, step, rate):
    args = Namespace(lr=1, warmup=1000, iterations=100, schedule=schedule, power=2, factor=0.5,
                     every=10)
    assert train.learning_rate(args, step) == pytest.approx(rate)


# ---- Runs

@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """Two plain steps, to which every option is compared."""
    folder = tmp_path_factory.mktemp("plain")
    for model in "segnet", "hourglass":
        trained(data, folder / model, model=model)
    return folder


@pytest.mark.parametrize("flag", """--weighting w1-outer, --weighting w1-direct, --lr 0.5, --seed 5,
    --lr 0 --bn-after 2, --lr 0 --bn-after 2 --seed 5, --augment colour, --precision fp16,
    --weighting w2-outer, --weighting w2-direct, --augment mirror, --augment scale, --size 96,
    --bn-after 2, --batch-size 3, --precision bf16, --variant vgg16, --width 0.5,
    --coarse-to-fine, --joints surreal, --joints centroids, --stem-stride 1""".split(","))
def test_every_flag_changes_what_is_learned(data, plain, flag):
    flag = flag.strip()
    model = "hourglass" if flag.startswith(("--c", "--j", "--st")) else "segnet"
    run = plain / flag.replace(" ", "_")
    weights = trained(data, run, flag, model=model)["weights"]
    for other in {*plain.iterdir()} - {run}:                # no other run is the same
        theirs = load(other)["weights"]
        same_names = weights.keys() == theirs.keys()
        assert not same_names or any(not weights[key].equal(theirs[key]) for key in weights)


def test_frozen_batch_normalisation_stays_as_it_was_drawn(data, tmp_path):
    run = tmp_path / "run"
    trained(data, run, "--bn-after 2 --val-every 1")
    for iterations, updates in (2, 0), (3, 1):
        assert train.main(["--resume", str(run), "--iterations", str(iterations)]) == 0
        weights = load(run)["weights"]
        norms = [name.removesuffix("running_mean") for name in weights if "running_mean" in name]
        for norm in norms:
            moved = (weights[norm + "weight"] - 1).abs().max()      # drawn as 1; Adam's step: lr
            assert moved == pytest.approx(0.01 * updates, rel=0.01)
            assert weights[norm + "num_batches_tracked"] == updates


def test_a_row_is_the_figures_of_the_saved_network_on_unaugmented_frames(data, tmp_path,
                                                                         monkeypatch):
    monkeypatch.undo()                                      # draws curves.png
    run = tmp_path / "run"
    more = "--weighting w2-direct --augment --val-images 7 --size 32"
    row = trained(data, run, more, iterations=8)["rows"][-1]
    for number, name in enumerate(("train", "val")):
        chosen = sorted(np.random.default_rng([2, number]).permutation(12)[:7])
        found = evaluate.measure(run / "last.pt", name, device="cpu", precision="fp32", workers=0)
        batches = [found["split"][[index]] for index in chosen]
        confusions, _, loss = evaluate.evaluate_frames(
            found["predict"], batches, np.zeros(7, int), train.Criterion(found["classes"]))
        miou = evaluate.scores(confusions[0])["miou"]
        assert row[f"{name}_miou"] == pytest.approx(miou, abs=1e-6)
        assert row[f"{name}_loss"] == pytest.approx(loss, rel=1e-4)
    assert found["predict"].settings["augment"] == ["mirror", "scale"]
    assert found["predict"].logit_weights
    assert (run / "log.csv").read_text().count("\n") == 5
    assert (run / "curves.png").stat().st_size > 5000


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_killed_or_stopped_and_resumed_equals_undisturbed(data, plain, tmp_path, monkeypatch,
                                                          precision):
    """A run with everything that could be forgotten; signals go to workers too, as a terminal's."""
    more = ("--quick --size 32 --augment --weighting w1-direct --bn-after 3 --workers 1 "
            f"--precision {precision} --init-from {plain}/segnet/last.pt")
    argv = {name: command(data, tmp_path / name, more, iterations=8)
            for name in ("whole", "early", "killed", "stopped")}
    assert train.main(argv["whole"]) == 0
    stop_in(train, "progress_bar", monkeypatch, argv["early"])
    assert load(tmp_path / "early")["step"] == 0
    warning = ""
    if precision == "fp16":
        warning = "This CPU computes fp16 about ten times slower than fp32.\n"
    stopped = [("killed", signal.SIGKILL, -9), ("stopped", signal.SIGTERM, 143)]
    for name, number, status in stopped if precision == "fp32" else stopped[:1]:
        process = started(argv[name])
        os.killpg(process.pid, number)
        output, errors = process.communicate()
        assert process.returncode == status
        assert errors == warning
        assert 0 < load(tmp_path / name)["step"] < 8
        if status > 0:
            assert f"--resume {tmp_path / name}" in output
        assert train.main(["--resume", str(tmp_path / name)]) == 0
        assert same_end(tmp_path / "whole", tmp_path / name)
    assert train.main(["--resume", str(tmp_path / "early")]) == 0
    assert same_end(tmp_path / "whole", tmp_path / "early")


@pytest.mark.parametrize("broken", ["training", "validation"])
def test_best_has_the_highest_miou_and_nan_stays_out(data, tmp_path, capsys, monkeypatch, broken):
    nan = float("nan")
    validate, criterion = train.validate, train.Criterion.__call__
    losses = iter([1] * 6 + [nan if broken == "training" else 1] * 9)      # of each step
    rows = iter([(0.1, 5), (0.3, 4), (0.2, 3), (0.9, nan if broken == "validation" else 2)])

    def call(self, *inputs, **more):
        return criterion(self, *inputs, **more) * next(losses)

    def validated(*inputs):
        miou, loss = next(rows)
        return validate(*inputs) | dict(val_miou=miou, val_loss=loss)

    monkeypatch.setattr(train.Criterion, "__call__", call)
    monkeypatch.setattr(train, "validate", validated)
    error = refused(command(data, tmp_path / "run", iterations=8), capsys)
    assert "nan" in error
    assert "--lr" in error
    for name, step in ("last.pt", 6), ("best.pt", 4):
        kept = load(tmp_path / "run", name)
        assert (kept["step"], kept["best_miou"]) == (step, 0.3)
        assert all(value.isfinite().all() for value in kept["weights"].values())
    losses, rows = iter([1] * 9), iter([(0.2, 3)])
    train.main(["--resume", str(tmp_path / "run")])         # still knows the best
    assert load(tmp_path / "run", "best.pt")["step"] == 4


def test_a_stop_saves_no_weights_that_are_not_finite(data, tmp_path, capsys, monkeypatch):
    """The loss of a step is finite, as it is of the weights before it."""
    monkeypatch.setattr(train, "learning_rate", lambda *_: float("nan"))
    monkeypatch.setattr(train, "StopRequest", lambda world: Namespace(number=15))
    assert "weights" in refused(command(data, tmp_path / "run"), capsys)
    assert load(tmp_path / "run")["step"] == 0


def test_a_step_that_fp16_skips_is_no_loss_that_is_not_finite(data, tmp_path, monkeypatch):
    """The first loss is inf: the scale is halved, weights stay, and training goes on."""
    criterion = train.Criterion.__call__
    factors = iter([float("inf"), 1, 1, 1])
    monkeypatch.setattr(train.Criterion, "__call__",
                        lambda self, *inputs: criterion(self, *inputs) * next(factors))
    run = trained(data, tmp_path / "run", "--precision fp16 --val-every 1")
    assert run["scaler"]["scale"] == 2 ** 15


def test_a_compiler_that_is_missing_is_one_sentence(data, tmp_path, capsys, monkeypatch):
    def missing(network):
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nand its traceback")
    monkeypatch.setattr(torch.nn.Module, "compile", missing)
    assert "(no compiler)" in refused(command(data, tmp_path / "run", "--compile"), capsys)


def test_a_run_belongs_to_one_process(data, tmp_path, capsys):
    argv = command(data, tmp_path / "run", "--resume", iterations=10 ** 6)
    process = started(argv)
    assert "another process" in refused(argv, capsys)
    process.kill()
    process.communicate()
    stop = load(tmp_path / "run")["step"] + 1
    assert train.main([*argv, "--iterations", str(stop)]) == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_stop_a_run_but_not_under_nohup_and_not_its_readers(name):
    number = getattr(signal, name)
    for before, noted in (lambda *_: None, number), (signal.SIG_IGN, 0):
        signal.signal(number, before)
        stop = train.StopRequest(world=1)
        signal.raise_signal(number)
        assert stop.number == noted
    signal.signal(number, signal.SIG_DFL)
    evaluate.ignore_signals(0)
    assert signal.getsignal(number) == signal.SIG_IGN


def test_three_forms_of_resume(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "a"
    argv = command(data, run, "--resume", model="icnet")
    stop_in(train, "read_data", monkeypatch, argv)          # killed while it rendered or counted
    assert train.main(argv) == 0
    assert train.main(argv) == 0
    assert f"finished: --resume {run} --iterations" in capsys.readouterr().out
    assert load(run)["step"] == 2
    assert "is unfinished" in refused(["--resume"], capsys)
    stop_in(train, "progress_bar", monkeypatch, command(data, "runs/older", iterations=3))
    trained(data, "runs/newer")
    assert train.main(["--resume"]) == 0                    # the newest that is not finished
    assert load("runs/older")["step"] == 3
    assert train.main([*argv, "--iterations", "4"]) == 0
    assert train.main(["--resume", str(run), "--iterations", "5"]) == 0
    assert [row["step"] for row in load(run)["rows"]] == [2, 4, 5]
    for words, named in ("--model icnet --resume", "--out DIR"), (
            "--resume runs/a --out b", "--resume DIR"), ("--resume runs", "no run in runs"):
        assert named in refused(words.split(), capsys)


def test_the_start_names_absent_classes_and_groups_in_two_splits(tmp_path, capsys):
    own_data(tmp_path)
    (tmp_path / "classes.json").write_text('{"names": ["background", "cat", "dog", "cow"]}')
    for name in "images/{}.jpg", "labels/{}.png":
        frame = tmp_path / "train" / name.format("train_c0001_001")
        shutil.copy(frame, tmp_path / "train" / name.format("val_c0001_009"))
    trained(tmp_path, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "no training label shows cow\n" in printed
    assert "val_c0001" in printed


def test_weight_decay_acts_on_convolution_kernels_alone(data, tmp_path):
    checkpoint = trained(data, tmp_path / "run", model="icnet")
    learned = [value for name, value in checkpoint["weights"].items()
               if name.endswith(("weight", "bias"))]
    kernels = sum(value.ndim == 4 for value in learned)
    first, second = checkpoint["optimizer"]["param_groups"]
    assert (first["weight_decay"], len(first["params"])) == (1e-4, kernels)
    assert (second["weight_decay"], len(second["params"])) == (0, len(learned) - kernels)
    assert first["lr"] == second["lr"] == 0.01 * 0.5 ** 0.9         # of step 1 of 2


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (40, 8, 1, 1)])
def test_muon_moves_kernels_as_torchs_own_and_its_state_loads(shape):
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(shape))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    theirs = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    state = None
    for _ in range(3):
        ours = train.Muon([dict(params=[kernel], weight_decay=0.1)], lr=0.01)
        if state:
            ours.load_state_dict(state)
        kernel.grad = torch.randn(shape)
        matrix.grad = kernel.grad.flatten(1)
        ours.step()
        theirs.step()
        state = ours.state_dict()
    torch.testing.assert_close(kernel.flatten(1), matrix, atol=5e-4, rtol=0)    # theirs: bf16


def test_muon_moves_the_rest_as_adamw_and_sees_unscaled_gradients():
    torch.manual_seed(0)
    start, gradient, bias = torch.randn(8, 3, 3, 3), torch.randn(8, 3, 3, 3), torch.randn(5)
    kernel, other, plain = (nn.Parameter(x.clone()) for x in (start, bias, bias))
    muon = train.Muon([dict(params=[kernel], weight_decay=0.1),
                       dict(params=[other], weight_decay=0.0)], lr=0.01)
    adamw = torch.optim.AdamW([plain], lr=0.01, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)             # as in fp16
    for factor in 1.0, float("inf"):                        # the second step is left out
        scaler.scale(factor * ((kernel * gradient).sum() + other.sum())).backward()
        scaler.step(muon)
        scaler.update()
    plain.sum().backward()
    adamw.step()
    torch.testing.assert_close(other, plain)
    torch.testing.assert_close(muon.state[kernel]["momentum"], 0.05 * gradient)


def test_resume_refuses_other_settings_other_frames_and_damaged_files(data, plain, tmp_path,
                                                                      capsys):
    run = plain / "segnet"
    for more, named in ("--lr 0.5", "0.01"), ("--seed 1", "seed"), ("--augment", "augment"), (
            "--model icnet", "segnet"):
        assert named in refused(["--resume", str(run), *more.split()], capsys)
    for taken in run, tmp_path:                             # empty: of another process, perhaps
        assert f"--resume {taken}" in refused(command(data, taken), capsys)
    fewer = shutil.copytree(data, tmp_path / "fewer")
    for kind in "images/{}.jpg", "labels/{}.png":
        (fewer / "val" / kind.format("val_c0001_001")).unlink()
    argv = f"--resume {run} --data {fewer} --iterations 3".split()
    assert "other frames" in refused(argv, capsys)
    (tmp_path / "last.pt").write_bytes((run / "last.pt").read_bytes()[:9999])
    assert f"{tmp_path}/last.pt" in refused(["--resume", str(tmp_path)], capsys)


@pytest.mark.parametrize("words, named", [
    ("", "--model"), ("--model unet", "unet"), ("--resume nowhere", "nowhere"),
    ("--model icnet --variant vgg16", "--variant"), ("--model segnet --joints surreal", "--joints"),
    ("--model hourglass --features 0", "--features 0"),
    *((f"--model segnet {options}", options.split()[-1]) for options in """
        --iterations 2.5, --val-every 0, --weighting w3, --learning-rate 1, --device gpu,
        --data nowhere, --init-from nowhere.pt, --width 0, --width -1, --iterations 0, --lr inf,
        --bn-after -3, --lr nan, --seed 12345678901234567890, --size 100""".split(",")),
    ("--model segnet --study --augment", "--augment"), ("--study --resume", "--model")])
def test_wrong_options_make_nothing(words, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prepare_surreal.main", lambda argv: pytest.fail("rendered"))
    assert named in refused(words.split(), capsys)
    assert {path.name for path in tmp_path.rglob("*")} <= {"runs"}


def test_data_that_an_option_does_not_fit_is_refused(tmp_path, capsys):
    names = ["background", "cat", "dog"]
    data = write_prepared(tmp_path / "data", frames=3, size=80, joints=False, names=names)
    (data / "classes.json").write_text('{"names": ["background", "cat", "dog", "cow"]}')
    for options, named in ("", "--size"), ("--size 64 --joints surreal", "centroids"), (
            "--size 64 --coarse-to-fine", "--coarse-to-fine"), (
            "--size 64 --weighting w1-outer", "cow"), (
            "--size 32 --batch-size 1 --stem-stride 4", "--batch-size"):
        argv = command(data, tmp_path / "run", options, model="hourglass")
        assert named in refused(argv, capsys)
        assert (tmp_path / "run").exists() == ("--batch-size" in options)


def test_init_from_takes_what_fits(plain):
    path, weights = plain / "segnet" / "last.pt", load(plain / "segnet")["weights"]
    network = evaluate.MODELS["segnet"](num_classes=7, width=0.25)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train.start_from(network, path)
    for name, value in network.state_dict().items():
        taken = before if name.startswith("classifier") else weights
        assert torch.equal(value, taken[name])
    with pytest.raises(Problem, match="fits"):
        train.start_from(evaluate.MODELS["icnet"](), path)


def test_two_processes_train_like_one(data, tmp_path):
    """gloo, batch normalisation frozen: the weights of one process with the same whole batch."""
    options = dict(more="--bn-after 4 --augment --weighting w1-outer", model="icnet", iterations=4)
    one = trained(data, tmp_path / "one", **options)
    process = started(command(data, tmp_path / "two", **options), *TORCHRUN)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    two = load(tmp_path / "two")
    for name, value in one["weights"].items():
        assert torch.allclose(value, two["weights"][name], rtol=1e-3, atol=1e-5), name
    assert one["rows"][-1]["val_loss"] == pytest.approx(two["rows"][-1]["val_loss"], rel=1e-4)


def test_ctrl_c_ends_several_processes_within_a_minute(data, tmp_path):
    process = started(command(data, tmp_path / "run", iterations=10 ** 6), *TORCHRUN)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode


class Further(torch.nn.Sequential):
    """A fourth network, with nothing but what the contract asks for."""
    recipe = dict(batch_size=4, lr=0.01, optimizer="SGD", schedule="constant", iterations=2)

    def __init__(self, num_classes=25, width=1):
        super().__init__(torch.nn.Conv2d(3, num_classes, 3, padding=1))

    def loss(self, outputs, batch, criterion):
        loss = criterion(outputs, batch["labels"])
        return loss, loss


def own_data(folder):
    write_prepared(folder, names=["background", "cat", "dog"], frames=4, joints=False)
    Path(folder, "classes.json").write_text('{"names": ["background", "cat", "dog"]}')
    return ["--data", str(folder), "--workers", "0", "--val-every", "2"]


def test_a_further_network_trains_resumes_and_is_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(evaluate.MODELS, "further", Further)
    assert train.main(["--model", "further", "--out", "run", *own_data("own")]) == 0
    assert train.main(["--resume", "run", "--iterations", "4"]) == 0
    assert load("run")["step"] == 4
    assert evaluate.main(["--ckpt", "run", "--per-class", "--workers", "0"]) == 0
    assert "cat" in capsys.readouterr().out
    assert Path("run/test/examples.png").is_file()


def test_the_study_is_the_runs_of_the_papers_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = "--model segnet --study --iterations 2 --batch-size 2 --width 0.1".split()
    argv += own_data("own")
    assert train.main(argv) == 0
    study = Path("runs/segnet-study")
    assert "double-filters-augment" in (study / "report.md").read_text()
    assert (study / "test" / "report.md").is_file()
    runs = {path.parent.name: load(path.parent) for path in study.glob("*/last.pt")}
    assert len(runs) == 6
    for name, run in runs.items():
        settings = run["settings"]
        assert run["kwargs"]["width"] == (0.2 if "double" in name else 0.1)
        assert settings["augment"] == (["mirror", "scale"] if "augment" in name else ["none"])
        assert settings["weighting"] == (name[-8:] if name[-5:] == "outer" else "none")
        assert run["step"] == (4 if "iterations" in name else 2)
    stop_in(evaluate, "main", monkeypatch, argv)            # nothing is trained again
