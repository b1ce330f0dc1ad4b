"""train.py: weights and losses by hand, augmentation on small pictures, the order of frames, and
runs through the command line, among them killed ones that have to end like undisturbed ones."""
import argparse
import os
import re
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

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("prepared") / "tiny")


def command(data, out, *more, model="segnet", iterations=2):
    if model == "hourglass":
        more = ("--stacks", "2", "--features", "16", "--stem-stride", "4", "--width", "1", *more)
    return ["--model", model, "--data", str(data), "--out", str(out), "--width", "0.25",
            "--iterations", str(iterations), "--batch-size", "4", "--val-every", "2",
            "--val-images", "4", "--workers", "0", "--precision", "fp32", *more]


def started(argv, *torchrun):
    """train.py as a process group of its own, once it has saved a step or ended."""
    process = subprocess.Popen(
        [sys.executable, *torchrun, train.__file__, *argv], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    last = Path(argv[argv.index("--out") + 1]) / "last.pt"
    while process.poll() is None and not (last.exists() and load(last.parent)["step"]):
        time.sleep(0.02)
    return process


def refused(argv, capsys):
    """The one sentence that a command ends with, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.run_command("train.py", lambda: train.start([str(word) for word in argv]))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    return error


def stop_in(owner, name, monkeypatch, argv):
    """Starts a run that ends like a killed one when it calls owner.name."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train.start(argv)


def load(folder, name="last.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def same_end(one, other):
    """Whether two runs have equal weights, rows and best checkpoints."""
    same = []
    for a, b in ((load(one, name), load(other, name)) for name in ("last.pt", "best.pt")):
        same += [a[key] == b[key] for key in ("rows", "step", "best_miou")]
        same += [torch.equal(value, b["weights"][key]) for key, value in a["weights"].items()]
    return all(same)


def test_class_weights_by_hand():
    # C = 80, 15, 5 of 100. W2: B = 1, 16/3, 16; mean 67/9, population std 6.3026.
    counts = torch.tensor([80, 15, 5], dtype=torch.float64)
    assert train.class_weights(counts, "w1").tolist() == pytest.approx([0.20, 0.85, 0.95])
    expected = np.array([1.2912, 5.7994, 11.3964])          # B exp(-(B - 7.4444) / 25.2106)
    assert train.class_weights(counts, "w2").numpy() == pytest.approx(expected / 11.3964, rel=1e-4)
    assert train.class_weights(0 * counts + 7, "w2").tolist() == [1, 1, 1]


@pytest.mark.parametrize("weighting", train.WEIGHTINGS)
def test_losses_against_numpy(weighting):
    rng, pixels = np.random.default_rng(0), [700, 200, 60, 40]
    x, labels = rng.normal(size=(4, 30)).astype(np.float32), rng.integers(0, 4, 30).astype(np.uint8)
    scheme, _, form = weighting.partition("-")
    w = train.class_weights(torch.tensor(pixels).double(), scheme).numpy() if form else np.ones(4)
    scaled = x * w[:, None] if form == "direct" else x
    losses = np.log(np.exp(scaled).sum(0)) - scaled[labels, range(30)]
    losses = (losses * w[labels] if form == "outer" else losses)[2:]
    labels[:2] = IGNORE
    criterion = train.Criterion({"pixels": pixels, "names": list("abcd")}, weighting)
    ours = criterion(torch.tensor(x).view(1, 4, 5, 6), torch.tensor(labels).view(1, 5, 6))
    assert ours.item() == pytest.approx(losses.mean(), rel=1e-5)


def test_labels_shrink_by_cell_centres_and_coarser_ids_add_up_pixels_before_the_weights():
    fine = train.Criterion({"pixels": [700, 200, 60, 40], "names": list("abcd")}, "w2-outer")
    coarse = train.Criterion({"pixels": [700, 300], "names": list("ab")}, "w2-outer")
    logits, levels = torch.randn(1, 2, 2, 2).requires_grad_(), torch.tensor([0, 1, 1, 1])
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[0, 2::4, 2::4] = torch.tensor([[0, 1], [3, IGNORE]])     # next to 4x4 cells' centres
    merged = torch.tensor([[[0, 1], [1, IGNORE]]], dtype=torch.uint8)
    assert torch.isclose(fine(logits, labels, levels), coarse(logits, merged))
    nothing = fine(logits, torch.full_like(labels, IGNORE), levels)
    nothing.backward()
    assert nothing.item() == 0 and logits.grad.abs().max() == 0


@pytest.mark.parametrize("model, weighting, heads", [
    ("icnet", "none", "head16 head8 head4"), ("segnet", "w2-outer", "classifier"),
    ("icnet", "w1-direct", "head4"),
    ("hourglass", "w2-direct", "stages.0.predict stages.1.predict")])
def test_heads_start_at_the_prior(data, tmp_path, monkeypatch, model, weighting, heads):
    more = ["--coarse-to-fine"] if model == "hourglass" else []
    argv = command(data, tmp_path / "run", "--weighting", weighting, *more, model=model)
    stop_in(evaluate, "stream", monkeypatch, argv)
    scheme, _, form = weighting.partition("-")
    pixels = np.array(evaluate.read_classes(data)["pixels"], float)
    body = np.array([pixels[0], pixels[1:].sum()])          # what the first of two modules learns
    for head in heads.split():
        C = body if head == "stages.0.predict" else pixels
        w = train.class_weights(torch.tensor(C), scheme).double().numpy() if form else 1
        expected = (C + 1) * (w if form == "outer" else 1)
        bias = load(tmp_path / "run")["weights"][f"{head}.bias"].double().numpy()
        found = np.exp(bias * w if form == "direct" else bias)
        assert (load(tmp_path / "run")["logit_weights"] is None) == (form != "direct")
        assert found / found.sum() == pytest.approx(expected / expected.sum(), rel=1e-3)


def test_mirror_swaps_sides_unless_naive_and_twice_is_the_identity(data):
    classes, chosen = evaluate.read_classes(data), torch.tensor([True])
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[0, 1, 0], labels[0, 3, 3] = 21, IGNORE           # a left hand, and its joint on it
    joints = torch.full((1, 24, 2), -9.0)
    joints[0, 20] = torch.tensor([0.0, 1.0])
    batch = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4), labels, joints
    once = images, labels, joints = train.mirror_batch(*batch, chosen, classes)
    assert labels[0, 1].tolist() == [0, 0, 0, 22] and labels[0, 3, 0] == IGNORE
    assert images[0, 0, 0].tolist() == [3, 2, 1, 0] and joints[0, 21].tolist() == [3.0, 1.0]
    twice, never = (train.mirror_batch(*inputs, classes) for inputs in (
        (*once, chosen), (*batch, ~chosen)))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(batch, twice, never))
    _, labels, joints = train.mirror_batch(*batch, chosen, classes, swap=False)
    assert labels[0, 1].tolist() == [0, 0, 0, 21] and joints[0, 20].tolist() == [3.0, 1.0]


def test_scale_by_two_cuts_a_corner_and_by_half_surrounds_with_ignore():
    labels = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    images = labels[:, None].float().expand(1, 3, 4, 4).contiguous()
    scaled = lambda *draw: train.scale_batch(images, labels, torch.tensor([[[1.0, 0.0]]]), *map(
        torch.tensor, draw))
    for place, row, joint in (((0.0, 0.0), [0, 0, 1, 1], [2.5, 0.5]),
                              ((1.0, 0.5), [6, 6, 7, 7], [-1.5, -1.5])):
        _, large, moved = scaled([2.0], [place])
        assert large[0, 0].tolist() == row and moved[0, 0].tolist() == joint
    small, ids, moved = scaled([0.5], [[0.0, 1.0]])
    assert (ids[0, 2:, :2] != IGNORE).all() and (ids == IGNORE).sum() == 12
    assert small[0, 0, 2, 0] == pytest.approx(2.5) and small[0, 0, 0, 3] == 0   # of 0, 1, 4, 5
    assert moved[0, 0].tolist() == [0.25, 1.75]


def test_augmentation_is_a_function_of_seed_and_step():
    draw = lambda seed=3, step=17: train.draw_augmentation(seed, step, 4000)
    mirror, scale, place = draw()
    assert all(torch.equal(one, two) for one, two in zip(draw(), draw()))
    assert not any(torch.equal(scale, draw(*other)[1]) for other in ((3, 18), (4, 17)))
    assert 0.5 <= scale.min() < 0.51 and 1.97 < scale.max() <= 2
    assert scale.log2().mean() == pytest.approx(0, abs=0.03)        # as often half as double
    assert mirror.float().mean() == pytest.approx(0.5, abs=0.03)
    assert place.min() < 0.01 and place.max() > 0.99 and place.shape == (4000, 2)


def test_frame_order():
    order = list(train.frame_order(frames=10, batch_size=4, seed=1, start=0, steps=10))
    epochs = np.array(order).reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all() and len(np.unique(epochs, axis=0)) == 4
    assert list(train.frame_order(10, 4, 1, 7, 10)) == order[7:]
    assert list(train.frame_order(10, 4, 2, 0, 10)) != order
    large, = train.frame_order(frames=3, batch_size=8, seed=0, start=0, steps=1)
    assert sorted(large[:3]) == sorted(large[3:6]) == [0, 1, 2] and len(large) == 8


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """Two plain steps, to which every option is compared."""
    folder = tmp_path_factory.mktemp("plain")
    for model in ("segnet", "hourglass"):
        assert train.start(command(data, folder / model, model=model)) == 0
    return folder


@pytest.mark.parametrize("flag", """--weighting w1-outer, --weighting w1-direct, --lr 0.5, --seed 5,
    --lr 0 --bn-after 2, --lr 0 --bn-after 2 --seed 5,
    --weighting w2-outer, --weighting w2-direct, --augment mirror, --augment scale, --size 96,
    --augment naive-mirror, --bn-after 2, --batch-size 3, --precision bf16, --variant vgg16,
    --width 0.5, --coarse-to-fine, --joints surreal --joints-from 1, --stem-stride 2,
    --joints centroids --joints-from 1, --checkpoint-activations""".split(","))
def test_every_flag_changes_what_is_learned(data, plain, tmp_path, flag):
    model = "hourglass" if flag.strip().startswith(("--c", "--j", "--st")) else "segnet"
    run = plain / flag.strip()                              # which no other run equals
    assert train.start(command(data, run, *flag.split(), model=model)) == 0
    one, *others = (load(path)["weights"] for path in [run, *{*plain.iterdir()} - {run}])
    for other in others:
        assert one.keys() != other.keys() or any(not one[key].equal(other[key]) for key in one)


def test_frozen_batch_normalisation_stays_as_it_was_drawn(data, tmp_path):
    argv = command(data, tmp_path / "run", "--bn-after", "2", "--val-every", "1")
    for argv, updates in ((argv, 0), (["--resume", argv[5], "--iterations", "3"], 1)):
        assert train.start(argv) == 0
        weights = load(tmp_path / "run")["weights"]
        for norm in (name[:-12] for name in weights if name.endswith("running_mean")):
            moved = (weights[norm + "weight"] - 1).abs().max()      # drawn as 1; Adam's step: lr
            assert moved == pytest.approx(0.01 * updates, rel=0.01)
            assert weights[norm + "num_batches_tracked"] == updates


def test_a_row_is_the_figures_of_the_saved_network_on_unaugmented_frames(data, tmp_path):
    argv = command(data, tmp_path / "run", "--weighting", "w2-direct", "--augment", "--val-images",
                   "7", "--size", "32", iterations=8)
    assert train.start(argv) == 0
    row, args = load(tmp_path / "run")["rows"][-1], argparse.Namespace(
        device="cpu", precision="fp32", batch_size=5, workers=0)
    for i, name in enumerate(("train", "val")):
        run = evaluate.measure(tmp_path / "run" / "last.pt", args, name)
        chosen = sorted(np.random.default_rng([2, i]).permutation(12)[:7])
        confusions, loss = evaluate.evaluate_split(
            run["predict"], run["split"], 5, 0, chosen, train.Criterion(run["classes"]))
        miou = evaluate.scores(run["confusions"][chosen].sum(0))["miou"]
        assert row[f"{name}_miou"] == pytest.approx(miou, abs=1e-6) and torch.equal(
            confusions, run["confusions"][chosen])
        assert row[f"{name}_loss"] == pytest.approx(loss, rel=1e-4) and run["predict"].logit_weights
    assert run["predict"].settings["augment"] == ["mirror", "scale"]
    assert (tmp_path / "run" / "log.csv").read_text().count("\n") == 5
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5000


def test_killed_or_stopped_and_resumed_equals_undisturbed(data, plain, tmp_path, monkeypatch):
    """A run with everything that could be forgotten; signals go to workers too, as a terminal's."""
    more = ["--augment", "--weighting", "w1-direct", "--bn-after", "3", "--workers", "1",
            "--init-from", str(plain / "segnet" / "last.pt")]
    run = lambda name: command(data, tmp_path / name, *more, iterations=8)
    assert train.start(run("whole")) == 0
    stop_in(evaluate, "stream", monkeypatch, run("early"))
    assert load(tmp_path / "early")["step"] == 0
    for name, number, status in (("killed", signal.SIGKILL, -9), ("stopped", signal.SIGTERM, 143)):
        process = started(run(name))
        os.killpg(process.pid, number)
        output, errors = process.communicate()
        assert process.returncode == status and not errors and 0 < load(tmp_path / name)["step"] < 8
    assert f"--resume {tmp_path / 'stopped'}" in output
    for name in ("early", "killed", "stopped"):
        assert train.start(["--resume", str(tmp_path / name)]) == 0
        assert same_end(tmp_path / "whole", tmp_path / name)


@pytest.mark.parametrize("broken", ["training", "validation"])
def test_best_has_the_highest_miou_and_nan_stays_out(data, tmp_path, capsys, monkeypatch, broken):
    nan, measure, real = float("nan"), train.validate, train.Criterion.__call__
    losses = iter([1] * 6 + [nan if broken == "training" else 1] * 9)      # of each step
    rows = iter([(0.1, 5), (0.3, 4), (0.2, 3), (0.9, nan if broken == "validation" else 2)])
    monkeypatch.setattr(train.Criterion, "__call__",
                        lambda self, *inputs, **more: real(self, *inputs, **more) * next(losses))
    monkeypatch.setattr(train, "validate", lambda *inputs: measure(*inputs) | dict(
        zip(("val_miou", "val_loss"), next(rows))))
    error = refused(command(data, tmp_path / "run", iterations=8), capsys)
    assert "nan" in error and "--lr" in error
    for name, step in (("last.pt", 6), ("best.pt", 4)):
        kept = load(tmp_path / "run", name)
        assert (kept["step"], kept["best_miou"]) == (step, 0.3)
        assert all(value.isfinite().all() for value in kept["weights"].values())
    losses, rows = iter([1] * 9), iter([(0.2, 3)])
    train.start(["--resume", str(tmp_path / "run")])        # still knows the best
    assert load(tmp_path / "run", "best.pt")["step"] == 4


def test_one_command_starts_a_run_and_continues_it(data, tmp_path, monkeypatch):
    argv, run = command(data, tmp_path / "run", "--resume", model="icnet"), tmp_path / "run"
    stop_in(train, "read_data", monkeypatch, argv)          # killed while it rendered or counted
    for more, step in (([], 2), ([], 2), (["--iterations", "4"], 4)):
        assert train.start([*argv, *more]) == 0 and load(run)["step"] == step
    assert train.start(["--resume", str(run / "last.pt"), "--iterations", "5"]) == 0
    assert [row["step"] for row in load(run)["rows"]] == [2, 4, 5]


def test_weight_decay_acts_on_convolution_kernels_alone(data, tmp_path):
    assert train.start(command(data, tmp_path / "run", model="icnet")) == 0
    checkpoint = load(tmp_path / "run")
    kernels = [value.ndim == 4 for name, value in checkpoint["weights"].items()
               if name.endswith(("weight", "bias"))]
    groups, rate = checkpoint["optimizer"]["param_groups"], 0.01 * 0.5 ** 0.9      # of step 1 of 2
    assert [(group["weight_decay"], group["lr"], len(group["params"])) for group in groups] == [
        (1e-4, rate, sum(kernels)), (0, rate, len(kernels) - sum(kernels))]


def test_resume_refuses_other_settings_and_damaged_files(data, plain, tmp_path, capsys):
    run, damaged = plain / "segnet", tmp_path / "last.pt"
    for more, named in ((["--lr", "0.5"], "0.01"), (["--seed", "1"], "seed"),
                        (["--augment"], "augment"), (["--model", "icnet"], "segnet")):
        assert named in refused(["--resume", run, *more], capsys)
    for taken in (run, tmp_path):                           # empty: of another process, perhaps
        assert f"--resume {taken}" in refused(command(data, taken), capsys)
    damaged.write_bytes((run / "last.pt").read_bytes()[:9999])
    assert str(damaged) in refused(["--resume", tmp_path], capsys)


@pytest.mark.parametrize("words, named", [
    ("", "--model"), ("--model unet", "unet"), ("--resume nowhere", "nowhere"),
    ("--model icnet --variant vgg16", "--variant"), ("--model segnet --joints surreal", "--joints"),
    *((f"--model segnet {options}", named) for options, named in (
        ("--iterations 2.5", "2.5"), ("--size 100", "128"), ("--val-every 0", "--val-every"),
        ("--weighting w3", "w3"), ("--learning-rate 1", "--learning-rate"), ("--device gpu", "gpu"),
        ("--double-filters --width 3", "--double-filters"), ("--data nowhere", "nowhere"),
        ("--study --width 2", "--study"), ("--init-from nowhere.pt", "nowhere.pt")))])
def test_wrong_options_make_nothing(words, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prepare_surreal.main", lambda argv: pytest.fail("rendered"))
    assert named in refused(words.split(), capsys)
    assert {path.name for path in tmp_path.rglob("*")} <= {"runs"}


def test_data_that_an_option_does_not_fit_is_refused(tmp_path, capsys):
    data, run = write_prepared(tmp_path / "data", frames=3, size=80, joints=False,
                               names=[f"{name}*" for name in NAMES]), tmp_path / "run"
    text = (data / "classes.json").read_text()
    (data / "classes.json").write_text(text.replace('"pixels": [', '"pixels": [0, '))
    for options, named in (("", "--size"), ("--size 64 --joints surreal", "centroids"),
                           ("--size 64 --coarse-to-fine", "--coarse-to-fine"),
                           ("--size 64 --weighting w1-outer", "background*")):
        error = refused(command(data, run, *options.split(), model="hourglass"), capsys)
        assert named in error and not run.exists()


def test_init_from_takes_what_fits(plain):
    path, weights = plain / "segnet" / "last.pt", load(plain / "segnet")["weights"]
    network = evaluate.MODELS["segnet"](num_classes=7, width=0.25)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train.start_from(network, path)
    for name, value in network.state_dict().items():
        assert torch.equal(value, (before if name.startswith("classifier") else weights)[name])
    with pytest.raises(Problem, match="fits"):
        train.start_from(evaluate.MODELS["icnet"](), path)


def test_two_processes_train_like_one(data, tmp_path):
    """gloo, batch normalisation frozen: the weights of one process with the same whole batch."""
    more = ["--bn-after", "4", "--augment", "--weighting", "w1-outer"]
    one, two = (command(data, tmp_path / run, *more, model="icnet", iterations=4) for run in "ab")
    assert train.start(one) == 0
    process = started(two, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    one, two = load(tmp_path / "a"), load(tmp_path / "b")
    for name, value in one["weights"].items():
        assert torch.allclose(value, two["weights"][name], rtol=1e-3, atol=1e-5), name
    assert one["rows"][-1]["val_loss"] == pytest.approx(two["rows"][-1]["val_loss"], rel=1e-4)


class Further(torch.nn.Sequential):
    """A fourth network, with nothing but what DESIGN's contract asks for."""
    recipe = dict(batch_size=4, lr=0.01, optimizer="SGD", schedule="constant", iterations=2)

    def __init__(self, num_classes=25):
        super().__init__(torch.nn.Conv2d(3, num_classes, 3, padding=1))

    def loss(self, outputs, batch, criterion):
        return (criterion(outputs, batch["labels"]),) * 2


def test_a_further_network_and_the_study_on_data_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(evaluate.MODELS, "further", Further)
    write_prepared("own", names=["background", "cat", "dog"], frames=4, joints=False)
    Path("own/classes.json").write_text('{"names": ["background", "cat", "dog"]}')
    own = ["--data", "own", "--workers", "0", "--val-every", "2", "--final-iterations", "3"]
    assert train.start(["--model", "further", "--out", "run", *own]) == 0
    assert train.start(["--resume", "run", "--iterations", "4"]) == 0 and load("run")["step"] == 4
    assert evaluate.main(["--ckpt", "run", "--per-class", "--workers", "0"]) == 0
    assert "cat" in capsys.readouterr().out and Path("run/test/examples.png").is_file()
    assert train.start(["--model", "further", "--study", *own]) == 0
    assert "w2-direct" in Path("runs/further-study/report.md").read_text()
    argv = ["--model", "segnet", "--study", "--iterations", "2", "--batch-size", "2", *own]
    assert train.start(argv) == 0
    report = Path("runs/segnet-study/report.md").read_text()
    assert all(words in report for words in ("39.17", "own/test", "w1-outer", "long"))
    assert len(list(Path("runs/segnet-study").glob("*/last.pt"))) == 6 and train.start(argv) == 0
    runs = {path.name: load(path) for path in Path("runs/segnet-study").glob("*-*")}
    for name, run in runs.items():
        assert ("augm" in name) == (run["settings"]["augment"] == ["mirror", "scale"])
        assert run["step"] == (3 if name.endswith("long") else 2)
    for one, other, points, best in re.findall(r"- (.*) against (.*?): (\S+).*\*(.+)\*\*", report):
        assert best == (one if float(points) > 0 else other)
