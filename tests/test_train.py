"""train.py: weights and losses by hand, augmentation on small pictures, the order of frames, runs
through the command line: every option changes something, wrong ones say so, a resumed run equals an
undisturbed one."""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train
from evaluate import IGNORE, Problem
from tiny import NAMES, write_prepared

REPOSITORY = Path(train.__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("prepared") / "tiny", size=64)


@pytest.fixture(scope="module")
def classes(data):
    return evaluate.read_classes(data)


def command(data, out, *more, model="segnet", iterations=2):
    return ["--model", model, "--data", str(data), "--out", str(out), "--width", "0.25",
            "--iterations", str(iterations), "--batch-size", "4", "--val-every", "2",
            "--val-images", "4", "--workers", "0", "--precision", "fp32", *more]


SMALL_HOURGLASS = ("--stacks", "2", "--features", "32", "--stem-stride", "4", "--width", "1")


def weights_of(folder, name="last.pt"):
    return evaluate.load_checkpoint(Path(folder) / name)["weights"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key])
                                                 for key in first)


# -------------------------------------------- class weights and losses

def test_class_weights_by_hand():
    # C = 80, 15, 5 of 100. W1 = 1 - C/100.
    # W2: B = 1, 16/3, 16; mean 67/9 = 7.444, population std 6.3026.
    assert train.class_weights([80, 15, 5], "w1").tolist() == pytest.approx([0.20, 0.85, 0.95])
    expected = np.array([1.2912, 5.7994, 11.3964])        # B exp(-(B - 7.4444) / 25.2106)
    ours = train.class_weights([80, 15, 5], "w2").numpy()
    assert ours == pytest.approx(expected / expected.max(), rel=1e-4)
    with pytest.raises(Problem, match="neck"):
        train.class_weights([80, 0, 5], "w1", ["background", "neck", "head"])


def numpy_loss(logits, labels, weights, way):
    """(K, N) logits and (N,) labels, one pixel after the other."""
    losses = []
    for column, label in zip(logits.T, labels):
        if label == IGNORE:
            continue
        column = column * weights if way == "direct" else column
        log_softmax = column - column.max() - np.log(np.exp(column - column.max()).sum())
        losses.append(-log_softmax[label] * (weights[label] if way == "outer" else 1))
    return np.mean(losses)


@pytest.mark.parametrize("weighting", train.WEIGHTINGS)
def test_losses_against_numpy(weighting):
    rng = np.random.default_rng(0)
    pixels, names = [700, 200, 60, 40], list("abcd")
    logits = rng.normal(size=(4, 5, 6)).astype(np.float32)
    labels = rng.integers(0, 4, (5, 6)).astype(np.uint8)
    labels[1, 2:4] = IGNORE
    scheme, _, way = weighting.partition("-")
    weights = np.ones(4) if scheme == "none" else train.class_weights(pixels, scheme).numpy()
    criterion = train.Criterion({"pixels": pixels, "names": names}, weighting)
    ours = criterion(torch.tensor(logits)[None], torch.tensor(labels)[None])
    expected = numpy_loss(logits.reshape(4, -1), labels.ravel(), weights, way)
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_loss_on_coarser_ids_adds_up_pixels_before_the_weights():
    levels = torch.tensor([0, 1, 1, 1])
    fine = train.Criterion({"pixels": [700, 200, 60, 40], "names": list("abcd")}, "w2-outer")
    coarse = train.Criterion({"pixels": [700, 300], "names": list("ab")}, "w2-outer")
    logits = torch.randn(1, 2, 3, 3)
    labels = torch.tensor([[[0, 1, 2], [3, 0, 255], [2, 2, 1]]], dtype=torch.uint8)
    merged = torch.where(labels == 255, labels, labels.clamp(max=1))
    expected = coarse(logits, merged).item()
    assert fine(logits, labels, levels).item() == pytest.approx(expected, rel=1e-6)


def test_labels_shrink_by_cell_centres_and_a_batch_without_valid_pixels_costs_nothing():
    criterion = train.Criterion({"pixels": [1, 1], "names": list("ab")})
    labels = torch.zeros(1, 6, 6, dtype=torch.uint8)
    labels[:, 1::3, 1::3] = 1                              # the centre of each 3x3 cell
    logits = torch.tensor([-30.0, 30.0]).view(1, 2, 1, 1).repeat(1, 1, 2, 2).requires_grad_()
    assert criterion(logits, labels).item() == pytest.approx(0, abs=1e-6)
    nothing = criterion(logits, torch.full_like(labels, IGNORE))
    nothing.backward()
    assert nothing.item() == 0 and logits.grad.abs().max() == 0


# -------------------------------------------- augmentation and order

def labelled(classes):
    """One 4x4 picture: a left hand (21) at the left edge, its joint on it, a pixel to ignore."""
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[0, 1, 0], labels[0, 3, 3] = 21, IGNORE
    joints = torch.full((1, len(classes["joint_mirror"]), 2), float("nan"))
    joints[0, 20] = torch.tensor([0.0, 1.0])
    return torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4), labels, joints


def test_mirror_swaps_sides_and_twice_is_the_identity(classes):
    batch, chosen = labelled(classes), torch.tensor([True])
    images, labels, joints = train.mirror_batch(*batch, chosen, classes)
    assert labels[0, 1].tolist() == [0, 0, 0, 22] and labels[0, 3, 0] == IGNORE
    assert images[0, 0, 0].tolist() == [3, 2, 1, 0]
    other = classes["joint_mirror"][20]
    assert other != 20 and joints[0, other].tolist() == [3.0, 1.0]
    again = train.mirror_batch(images, labels, joints, chosen, classes)
    assert torch.equal(again[0], batch[0]) and torch.equal(again[1], batch[1])
    assert torch.equal(again[2].nan_to_num(-9), batch[2].nan_to_num(-9))
    untouched = train.mirror_batch(*batch, torch.tensor([False]), classes)
    assert torch.equal(untouched[0], batch[0]) and torch.equal(untouched[1], batch[1])


def test_naive_mirror_leaves_ids_as_they_are(classes):
    chosen = torch.tensor([True])
    images, labels, joints = train.mirror_batch(*labelled(classes), chosen, classes, swap=False)
    assert labels[0, 1].tolist() == [0, 0, 0, 21] and joints[0, 20].tolist() == [3.0, 1.0]


def test_scale_by_two_cuts_a_quadrant_and_by_half_surrounds_with_ignore():
    labels = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    images = labels[:, None].float().expand(1, 3, 4, 4).contiguous()
    joints = torch.tensor([[[1.0, 0.0]]])
    bigger = train.scale_batch(images, labels, joints, torch.tensor([2.0]), torch.zeros(1, 2))
    assert bigger[1][0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [4, 4, 5, 5], [4, 4, 5, 5]]
    assert bigger[2][0, 0].tolist() == [2.5, 0.5]          # pixel (1, 0), enlarged: columns 2, 3
    corner = train.scale_batch(images, labels, joints, torch.tensor([2.0]), torch.ones(1, 2))
    assert corner[1][0, 3].tolist() == [14, 14, 15, 15]
    smaller = train.scale_batch(images, labels, joints, torch.tensor([0.5]), torch.zeros(1, 2))
    assert (smaller[1][0, :2, :2] != IGNORE).all() and (smaller[1] == IGNORE).sum() == 12
    assert smaller[0][0, 0, 0, 0] == pytest.approx(2.5)    # mean of 0, 1, 4, 5
    assert smaller[0][0, 0, 3, 3] == 0                     # outside
    assert smaller[2][0, 0].tolist() == [0.25, -0.25]


def test_augmentation_is_a_function_of_seed_and_step_and_shared_out_without_change():
    whole = train.draw_augmentation(3, 17, 8, ["mirror", "scale"])
    again = train.draw_augmentation(3, 17, 8, ["mirror", "scale"])
    assert all(torch.equal(one, two) for one, two in zip(whole, again))
    assert not torch.equal(whole[1], train.draw_augmentation(3, 18, 8, ["mirror", "scale"])[1])
    for rank in range(2):
        part = train.draw_augmentation(3, 17, 8, ["mirror", "scale"], rank, 2)
        assert torch.equal(part[1], whole[1][rank::2])
    assert whole[1].min() >= 0.5 and whole[1].max() <= 2
    assert not train.draw_augmentation(3, 17, 8, ["scale"])[0].any()
    assert (train.draw_augmentation(3, 17, 8, ["mirror"])[1] == 1).all()


def test_order_shows_every_frame_once_an_epoch_on_any_number_of_processes():
    order = train.FrameOrder(frames=10, batch_size=4, steps=5, seed=1)
    seen = sum((order[step] for step in range(5)), [])
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:20]) and seen[:10] != seen[10:20]
    for step in range(5):
        parts = [train.FrameOrder(10, 4, 5, 1, rank, 2)[step] for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == sorted(order[step]) and len(parts[0]) == 2
    assert len(train.FrameOrder(frames=3, batch_size=8, steps=1, seed=0)[0]) == 8


def test_unswapped_mirror_caps_what_can_be_learned():
    """Two mirror-symmetric halves, left = 1, right = 2: with the naive mirror each pixel is seen
    with both labels, and the best a network can do is to guess; with the swap the labels agree and
    the loss goes to zero."""
    classes = {"mirror": [0, 2, 1], "joint_mirror": [], "pixels": [1, 1, 1], "names": list("abc")}
    labels = torch.tensor([[[1, 1, 2, 2]] * 4] * 2, dtype=torch.uint8)
    images, chosen = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([True, False])
    losses = {}
    for swap in (True, False):
        _, seen, _ = train.mirror_batch(images, labels, None, chosen, classes, swap)
        logits = torch.zeros(1, 3, 4, 4, requires_grad=True)    # free logits: the best of all nets
        optimizer = torch.optim.Adam([logits], 0.3)
        for _ in range(60):
            loss = train.Criterion(classes)(logits.expand(2, -1, -1, -1), seen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[swap] = loss.item()
    assert losses[True] < 0.01
    assert losses[False] == pytest.approx(np.log(2), abs=0.01)   # half left, half right: one bit


# -------------------------------------------- runs

@pytest.mark.parametrize("model, options", [
    ("icnet", {}), ("segnet", {}), ("hourglass", dict(stem_stride=4, joints="centroids")),
    ("hourglass", dict(coarse_to_fine=True, joints="surreal", checkpoint_activations=True))])
@pytest.mark.parametrize("weighting", ["w1-outer", "w2-direct"])
def test_a_step_looks_at_no_value_of_the_device(classes, model, options, weighting):
    """Tensors on "meta" have no values: there, whatever would make a GPU wait for the host raises,
    and so does a tensor that was left on the CPU."""
    if model == "hourglass":
        options = dict(stacks=2, features=8, joints_from=1, joints_modules=1) | options
    criterion = train.Criterion(classes, weighting)
    criterion.weights, criterion.pixels = criterion.weights.to("meta"), criterion.pixels.to("meta")
    with torch.device("meta"):
        network = evaluate.MODELS[model](width=0.25 if model != "hourglass" else 1, **options)
        batch = dict(images=torch.zeros(4, 3, 64, 64, dtype=torch.uint8), joints=torch.zeros(
            4, 24, 2), labels=torch.zeros(4, 64, 64, dtype=torch.uint8))
    optimizer = train.build_optimizer(network, network.recipe, 1e-3, torch.device("meta"))
    for augment in (["mirror", "scale"], ["naive-mirror"]):
        args = argparse.Namespace(seed=0, batch_size=4, augment=augment,
                                  joints=options.get("joints", "none"))
        images, prepared = train.prepare_batch(batch, 0, args, classes)
        total, main = network.loss(network(images), prepared, criterion)
        total.backward()
        optimizer.step()
        assert images.is_meta and total.is_meta and main.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        total.item()                                        # so it would have been noticed


def test_learning_rates():
    poly = {"schedule": "poly", "schedule_args": {"power": 0.9}}
    assert train.learning_rate(poly, 0.01, 50, 100) == pytest.approx(0.01 * 0.5 ** 0.9)
    step = {"schedule": "step", "schedule_args": {"factor": 0.96, "every": 2000}}
    assert train.learning_rate(step, 1.0, 1999, 9999) == 1
    assert train.learning_rate(step, 1.0, 4000, 9999) == 0.96 ** 2
    assert train.learning_rate({"schedule": "constant"}, 0.01, 7, 9) == 0.01


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """The weights after two plain steps of each network, to which every option is compared."""
    folder = tmp_path_factory.mktemp("plain")
    for model in train.MODELS:
        more = SMALL_HOURGLASS if model == "hourglass" else ()
        assert train.main(command(data, folder / model, *more, model=model)) == 0
    return folder


FLAGS = [("segnet", ["--weighting", way]) for way in train.WEIGHTINGS[1:]] + [
    ("segnet", ["--augment", "mirror"]), ("segnet", ["--augment", "scale"]),
    ("segnet", ["--augment", "naive-mirror"]), ("segnet", ["--bn-after", "2"]),
    ("segnet", ["--lr", "0.5"]), ("segnet", ["--seed", "5"]), ("segnet", ["--size", "96"]),
    ("segnet", ["--batch-size", "3"]), ("segnet", ["--precision", "bf16"]),
    ("segnet", ["--variant", "vgg16"]), ("segnet", ["--width", "0.5"]),
    ("hourglass", ["--coarse-to-fine"]),
    ("hourglass", ["--joints", "surreal", "--joints-from", "1"]),
    ("hourglass", ["--joints", "centroids", "--joints-from", "1", "--joints-modules", "1"]),
    ("hourglass", ["--stem-stride", "2"])]


@pytest.mark.parametrize("model, flag", FLAGS, ids=[" ".join(flag) for _, flag in FLAGS])
def test_every_flag_changes_what_is_learned(data, plain, tmp_path, model, flag):
    more = [*(SMALL_HOURGLASS if model == "hourglass" else ()), *flag]
    assert train.main(command(data, tmp_path / "run", *more, model=model)) == 0
    assert not same(weights_of(plain / model), weights_of(tmp_path / "run"))
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5000


def test_frozen_batch_normalisation_stays_as_it_was_drawn(data, tmp_path):
    assert train.main(command(data, tmp_path / "run", "--bn-after", "2")) == 0
    weights = weights_of(tmp_path / "run")
    norms = [name for name in weights if name.endswith("running_var")]
    assert norms and all((weights[name] == 1).all() for name in norms)
    assert all((weights[name.replace("running_var", "weight")] == 1).all() for name in norms)


def test_frozen_batch_normalisation_thaws_under_the_fused_optimiser(data, tmp_path, monkeypatch):
    build = train.build_optimizer                           # what a GPU gets, here on the CPU
    monkeypatch.setattr(train, "build_optimizer",
                        lambda *inputs: build(*inputs[:3], torch.device("cuda")))
    for bn_after in ("1", "0"):
        out = tmp_path / bn_after
        assert train.main(command(data, out, "--bn-after", bn_after, model="icnet")) == 0
    checkpoint = evaluate.load_checkpoint(tmp_path / "1" / "last.pt")
    assert checkpoint["optimizer"]["param_groups"][0]["fused"]
    assert not same(weights_of(tmp_path / "1"), weights_of(tmp_path / "0"))
    monkeypatch.undo()                                      # and goes on where there is none
    assert train.main(["--resume", str(tmp_path / "1"), "--iterations", "3"]) == 0
    checkpoint = evaluate.load_checkpoint(tmp_path / "1" / "last.pt")
    assert not checkpoint["optimizer"]["param_groups"][0]["fused"]


def test_checkpointed_activations_compute_the_same(data, plain, tmp_path):
    assert train.main(command(data, tmp_path / "run", *SMALL_HOURGLASS, "--checkpoint-activations",
                              model="hourglass")) == 0
    one, two = weights_of(plain / "hourglass"), weights_of(tmp_path / "run")
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), rtol=1e-4, atol=1e-5)


def test_log_and_checkpoint_hold_what_they_should(data, plain):
    rows = train.read_log(plain / "icnet" / "log.csv", 99)
    assert [row["step"] for row in rows] == [2] and tuple(rows[0]) == train.LOG
    checkpoint = torch.load(plain / "icnet" / "best.pt", weights_only=True)
    assert checkpoint["settings"]["batch_size"] == 4 and checkpoint["step"] == 2
    assert checkpoint["classes"] == evaluate.read_classes(data)
    assert checkpoint["logit_weights"] is None


def started(argv):
    """train.py in a process of its own, to be killed once it has written its first checkpoint."""
    process = subprocess.Popen([sys.executable, "train.py", *argv], cwd=REPOSITORY, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    checkpoint = Path(argv[argv.index("--out") + 1]) / "last.pt"
    deadline = time.time() + 60
    while not checkpoint.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("workers", ["0", "1"])
def test_killed_and_resumed_equals_undisturbed(data, tmp_path, workers):
    """kill -9 after the first validation; then the same weights, log and best one, bit for bit."""
    more = ["--augment", "--weighting", "w1-direct", "--bn-after", "3", "--workers", workers]
    assert train.main(command(data, tmp_path / "whole", *more, iterations=8)) == 0
    process = started(command(data, tmp_path / "cut", *more, iterations=8))
    process.kill()
    process.communicate()
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    for name in ("last.pt", "best.pt"):
        assert same(weights_of(tmp_path / "whole", name), weights_of(tmp_path / "cut", name))
    timed = ("images_per_s", "data_wait")
    logs = [[{key: value for key, value in row.items() if key not in timed}
             for row in train.read_log(tmp_path / run / "log.csv", 99)] for run in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_sigterm_saves_and_says_how_to_go_on(data, tmp_path):
    process = started(command(data, tmp_path / "run", iterations=100000))
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Traceback" not in errors
    assert f"--resume {tmp_path / 'run'}" in errors
    assert evaluate.load_checkpoint(tmp_path / "run" / "last.pt")["step"] > 0


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(data, tmp_path, monkeypatch,
                                                                        capsys):
    class Broken(train.Criterion):
        calls = 0

        def __call__(self, *inputs):
            Broken.calls += 1
            return super().__call__(*inputs) * (float("nan") if Broken.calls == 3 else 1)

    monkeypatch.setattr(train, "Criterion", Broken)
    assert train.main(command(data, tmp_path / "run", iterations=6)) == 1
    said = capsys.readouterr().err
    assert "step 2" in said and "nan" in said and "_0" in said
    kept = evaluate.load_checkpoint(tmp_path / "run" / "last.pt")
    assert kept["step"] == 2 and all(value.isfinite().all() for value in kept["weights"].values())


def test_a_bug_of_the_compiler_is_told_from_ours(data, tmp_path, monkeypatch, capsys):
    def compile_badly(network):
        def forward(images):
            raise NameError("name 'buf55' is not defined")  # as one of inductor's
        network.forward = forward
    monkeypatch.setattr(torch.nn.Module, "compile", compile_badly)
    assert train.main(command(data, tmp_path / "run", "--compile")) == 1
    assert "NameError" in (said := capsys.readouterr().err) and "--no-compile" in said
    assert train.main(["--resume", str(tmp_path / "run"), "--no-compile"]) == 0


def test_init_from_takes_what_fits_and_refuses_what_does_not(data, plain, tmp_path, capsys):
    before, other = plain / "segnet" / "last.pt", tmp_path / "other.pt"
    assert train.main(command(data, tmp_path / "run", "--init-from", str(before))) == 0
    assert "nothing was left out" in capsys.readouterr().out
    torch.save({"conv.weight": torch.zeros(3)}, other)
    assert train.main(command(data, tmp_path / "no", "--init-from", str(other))) == 2
    assert "none of its 1 entries fits" in capsys.readouterr().err


def test_init_from_leaves_out_the_classifier_of_other_classes(data, plain, tmp_path, classes):
    checkpoint = torch.load(plain / "segnet" / "last.pt", weights_only=True)
    checkpoint["classes"]["names"] = [f"other {name}" for name in classes["names"]]
    torch.save(checkpoint, tmp_path / "other.pt")
    network = train.MODELS["segnet"](width=0.25)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train.start_from(network, tmp_path / "other.pt", classes)
    for name, value in network.state_dict().items():
        if name.startswith(network.classifiers):
            assert torch.equal(value, before[name])
        else:
            assert torch.equal(value, checkpoint["weights"][name])


WRONG = [
    ([], "--model"), (["--model", "unet"], "unet"), (["--resume", "nowhere"], "nowhere"),
    (["--model", "icnet", "--variant", "basic"], "--variant"),
    (["--model", "hourglass", "--joints", "surreal", "--joints-from", "5"], "--joints-from 5"),
    *((["--model", "segnet", *options], named) for options, named in (
        (["--lr", "-1"], "-1"), (["--lr", "nan"], "nan"), (["--batch-size", "0"], "0"),
        (["--iterations", "2.5"], "2.5"),
        (["--size", "100"], "100"), (["--seed", "-3"], "-3"), (["--weighting", "w3"], "w3"),
        (["--joints", "surreal"], "--joints"), (["--device", "gpu"], "gpu"),
        (["--double-filters", "--width", "3"], "--double-filters"),
        (["--augment", "mirror", "naive-mirror"], "naive-mirror"),
        (["--learning-rate", "1"], "--learning-rate"), (["--data", "nowhere"], "nowhere"),
        (["--init-from", "nowhere.pt"], "nowhere.pt"), (["--study", "--width", "2"], "--width")))]


@pytest.mark.parametrize("argv, named", WRONG, ids=[" ".join(argv) for argv, _ in WRONG])
def test_wrong_options_cost_one_sentence_and_status_2(argv, named, data, tmp_path, capsys):
    if "--resume" not in argv:
        argv = ["--out", str(tmp_path / "run"), "--data", str(data), *argv]    # the last one counts
    try:
        status = train.main(argv)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err.strip()
    assert status == 2 and named in said and len(said.splitlines()) == 1 and "Traceback" not in said
    assert not (tmp_path / "run" / "last.pt").exists()


def test_an_option_that_the_data_cannot_serve_is_refused(tmp_path, capsys):
    other = write_prepared(tmp_path / "other", frames=3, joints=False,
                           names=[f"{name}*" for name in NAMES])
    for option, named in ((["--joints", "surreal"], "centroids"),
                          (["--coarse-to-fine"], "--coarse-to-fine")):
        argv = command(other, tmp_path / "run", *SMALL_HOURGLASS, *option, model="hourglass")
        assert train.main(argv) == 2
        said = capsys.readouterr().err.strip()
        assert named in said and str(other) in said and len(said.splitlines()) == 1


def test_resume_refuses_other_settings_and_a_run_is_never_overwritten(data, plain, capsys):
    assert train.main(["--resume", str(plain / "segnet"), "--lr", "0.5"]) == 2
    assert "--lr 0.5 differs from the 0.01" in capsys.readouterr().err
    assert train.main(["--resume", str(plain / "segnet"), "--model", "icnet"]) == 2
    assert train.main(command(data, plain / "segnet")) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_truncated_checkpoint_is_named_and_the_best_one_offered(data, tmp_path, capsys):
    assert train.main(command(data, tmp_path / "run")) == 0
    whole = (tmp_path / "run" / "last.pt").read_bytes()
    (tmp_path / "run" / "last.pt").write_bytes(whole[:len(whole) // 2])
    assert train.main(["--resume", str(tmp_path / "run"), "--iterations", "4"]) == 2
    said = capsys.readouterr().err
    assert "last.pt" in said and "best.pt" in said and "Traceback" not in said


def on_two_processes(argv):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                "--master_port=29611"]
    return subprocess.run([*torchrun, "train.py", *argv], cwd=REPOSITORY, capture_output=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1"), text=True, timeout=120)


def test_two_processes_train_like_one(data, tmp_path):
    """gloo, batch normalisation frozen: the losses of one process with the same whole batch."""
    more = ["--bn-after", "4", "--augment", "--weighting", "w1-outer"]
    assert train.main(command(data, tmp_path / "one", *more, iterations=4)) == 0
    done = on_two_processes(command(data, tmp_path / "two", *more, iterations=4))
    assert done.returncode == 0, done.stderr
    logs = [train.read_log(tmp_path / run / "log.csv", 99) for run in ("one", "two")]
    for one, two in zip(*logs):
        for name in ("train_loss", "val_loss", "val_miou", "val_accuracy"):
            assert one[name] == pytest.approx(two[name], rel=2e-3, abs=1e-4)


def test_one_of_two_processes_fails_and_both_end_with_a_sentence(tmp_path):
    data = write_prepared(tmp_path / "spoilt", frames=40, size=64)
    seen = train.FrameOrder(40, batch_size=4, steps=9, seed=0, rank=1, world=2)[3][0]
    picture = sorted((data / "train" / "images").iterdir())[seen]
    picture.write_bytes(picture.read_bytes()[:300])
    done = on_two_processes(command(data, tmp_path / "run", "--bn-after", "9", "--val-every", "9",
                                    "--workers", "1", iterations=9))
    ours = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode and len(ours) == 2 and "[rank0]" not in done.stderr
    assert any(str(picture) in line for line in ours)
    assert any("another process" in line and "--resume" in line for line in ours)


def test_study_reports_the_tables_and_skips_what_is_finished(data, tmp_path, capsys):
    argv = ["--model", "segnet", "--study", "--data", str(data), "--out", str(tmp_path / "study"),
            "--iterations", "2", "--final-iterations", "3", "--batch-size", "4", "--size", "32",
            "--val-every", "2", "--val-images", "4", "--workers", "0", "--precision", "fp32"]
    assert train.main(argv) == 0
    report = (tmp_path / "study" / "report.md").read_text()
    for words in ("Table 4", "Table 5", "Table 6", "39.17", "w2-outer, published",
                  "Which step won"):
        assert words in report
    written = (tmp_path / "study" / "normal" / "last.pt").stat().st_mtime_ns
    capsys.readouterr()
    assert train.main(argv) == 0
    assert (tmp_path / "study" / "normal" / "last.pt").stat().st_mtime_ns == written
    assert "starting" not in capsys.readouterr().out
    assert json.loads((tmp_path / "study" / "config.json").read_text())["final_iterations"] == 3
