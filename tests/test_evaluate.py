"""evaluate.py: its figures against hand-worked ones, the paper's and NumPy's; strange files."""
import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import tiny
from evaluate import Predictor, Problem, SegNet, Split, read_classes, scores

CPU = torch.device("cpu")
KWARGS = dict(num_classes=5, width=0.0625)
TURNED = Image.Exif()
TURNED[0x0112] = 6      # to be shown a quarter turn clockwise
GOOD = np.kron([[0, 1], [2, 255]], np.ones((16, 16))).astype(np.uint8)      # a label


def matrices(right):
    """(G, 2, 2): `right` of 1000 background pixels found, and all 1000 of the body."""
    return np.array([[[r, 1000 - r], [0, 1000]] for r in right])


def same(values, expected, tolerance=1e-5):
    return np.allclose(values, expected, atol=tolerance, equal_nan=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven frames a split, in groups of 3, 3 and 1."""
    return tiny.write_prepared(tmp_path_factory.mktemp("data"), 7, names=tiny.NAMES[:5], groups={})


def save(path, data, seed=0):
    torch.manual_seed(seed)
    return tiny.write_checkpoint(path, SegNet(**KWARGS), "segnet", data, kwargs=KWARGS)


@pytest.fixture
def run(tmp_path, data):
    return save(tmp_path / "runs/first/best.pt", data)


def report(confusion, **classes):
    """report_text of one image, its confusion (K, K)."""
    split = types.SimpleNamespace(frames=["a"], groups=["a"], folder=tiny.Path("test"), size=64)
    classes = dict(merge={}, source="own") | classes
    confusions = np.array([confusion])
    run = dict(name="net", confusions=confusions, split=split, classes=classes)
    return evaluate.report_text([run])


def command(capsys, *argv):
    """Exit status, printed text and complaint of evaluate.py, which is one sentence at most."""
    words = [str(word) for word in argv]
    with pytest.raises(SystemExit) as end:
        evaluate.run_command("evaluate.py", lambda: evaluate.main(words))
    printed, complaint = capsys.readouterr()
    assert complaint.count("\n") == (end.value.code == 2) and "Traceback" not in complaint
    return end.value.code, printed, complaint


def read(run, split, chunks, groups, workers=0, criterion=None):
    predict = Predictor(*evaluate.load_checkpoint(run), CPU, "fp32")
    batches = evaluate.reader(split, chunks, workers, CPU)
    return evaluate.evaluate_frames(predict, batches, groups, criterion)


# ---- Metrics

def test_figures_of_a_matrix_worked_by_hand():
    expected = dict(
        iou=[5 / 8, 3 / 7, 4 / 5],
        class_f1=[10 / 13, 6 / 10, 8 / 9],
        recall=[5 / 6, 3 / 6, 1],
        accuracy=12 / 16,
        body_f1=16 / 19,
    )
    means = dict(miou="iou", f1="class_f1", class_accuracy="recall")
    for mean, key in means.items():
        expected[mean] = np.mean(expected[key])
    result = scores([[5, 1, 0], [2, 3, 1], [0, 0, 4]])
    assert result.keys() == expected.keys() >= evaluate.FIGURES.keys()
    for key, value in expected.items():
        assert result[key] == pytest.approx(value), key


def test_absent_classes_are_skipped_not_scored():
    missed = scores([[8, 0, 0], [0, 0, 0], [2, 0, 0]])      # 1 occurs nowhere, 2 is missed
    predicted = scores([[8, 2, 0], [0, 0, 0], [0, 0, 0]])   # 1 is predicted, and never true
    assert same(missed["iou"], [0.8, np.nan, 0])
    assert same(predicted["iou"], [0.8, 0, np.nan])
    assert same(predicted["recall"], [0.8, np.nan, np.nan])
    assert same([missed["miou"], missed["class_accuracy"]], [0.4, 0.5])


def test_counts_agree_with_numpy_pixel_by_pixel():
    rng = np.random.default_rng(1)
    labels, prediction = rng.integers(0, 25, (2, 3, 40, 30))
    labels[rng.random(labels.shape) < 0.2] = 255
    expected = np.zeros((3, 25, 25), int)
    for image, *pixel in np.argwhere(labels != 255):
        expected[image, labels[image, *pixel], prediction[image, *pixel]] += 1
    labels = torch.tensor(labels, dtype=torch.uint8)
    counted = evaluate.confusion_matrices(torch.tensor(prediction), labels, 25)
    assert np.array_equal(counted, expected)


@pytest.mark.parametrize("columns, mean", [        # Table 2, ICNet normal; Table 5, SegNet doubled
    ((98.9, 84.9, 74.78, 64.3, 53.8, 64.0, 54.2, 52.7, 39.5, 32.3, 19.8, 9.3, 9.5), 48.7),
    ((99.1, 84.2, 70.9, 63.2, 58.4, 58.1, 51.8, 52.7, 43.9, 39.9, 28.8, 12.4, 9.8), 49.9)])
def test_the_papers_all_classes_column_is_the_mean_over_25(columns, mean):
    confusion = np.zeros((25, 25), int)
    for accuracy, ids in zip(columns, tiny.GROUPS.values()):
        right = round(100 * accuracy)
        confusion[ids, ids] = right
        confusion[ids, np.array(ids) - 1] = 10000 - right       # goes to another class
    text = report(confusion, names=tiny.NAMES, groups=tiny.GROUPS)
    for column, accuracy in zip(tiny.GROUPS, columns):
        assert f"{accuracy:.1f}" in re.search(rf"accuracy: {column} .*", text)[0]
    assert 100 * scores(confusion)["class_accuracy"] == pytest.approx(mean, abs=0.05)


def test_intervals_are_over_groups():
    right = np.random.default_rng(3).integers(200, 900, 20)
    half = evaluate.bootstrap(matrices(right))["accuracy"]
    accuracy = (right + 1000) / 2000
    assert half == pytest.approx(1.96 * accuracy.std() / 20 ** 0.5, rel=0.15)
    ten_frames_each = evaluate.bootstrap(10 * matrices(right))["accuracy"]
    assert half == pytest.approx(ten_frames_each)       # equal frames hold no more than one
    assert np.isnan(evaluate.bootstrap(matrices([500]))["miou"])


def test_paired_difference_sees_what_two_intervals_hide():
    right = np.random.default_rng(4).integers(200, 900, 20)
    one, other = matrices(right + 20), matrices(right)
    difference, half = evaluate.paired_difference(one, other)
    assert 0 < half < difference < evaluate.bootstrap(one)["miou"]
    assert evaluate.paired_difference(other, one) == pytest.approx((-difference, half))


@pytest.mark.parametrize("weights, ones", [(None, 3), ([0.3, 1.0], 6)])
def test_predictions_are_of_enlarged_and_weighted_logits(data, weights, ones):
    """Bilinear from 2 to 8 pixels, 0 and 4 become 0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4."""
    logits = torch.tensor([[0.0, 4.0], [1.1, 1.1]])
    network = SegNet(num_classes=2, width=0.0625)
    network.forward = lambda images: logits.view(1, 2, 1, 2).expand(1, 2, 2, 2)
    learned = dict(classes=read_classes(data), settings={}, logit_weights=weights)
    predict = Predictor(learned, network, CPU, "fp32")
    image = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    prediction, returned = predict(image, (8, 8))
    assert prediction.tolist() == [[[1] * ones + [0] * (8 - ones)] * 8]
    assert torch.equal(prediction, returned.argmax(1))


class Criterion:
    def totals(self, logits, labels):
        count = torch.tensor(labels.numel())
        self.mean = tiny.criterion(logits, labels)
        return self.mean * count, count


def test_results_do_not_depend_on_batches_or_workers(data, run):
    split = Split(data, "test", read_classes(data))
    every = range(7)
    criterion = Criterion()
    confusions, miou, loss = read(run, split, [every], every, criterion=criterion)
    assert loss == pytest.approx(criterion.mean.item())
    chunks = [[0, 1, 2], [3, 4, 5], [6]]
    again, same_miou, same_loss = read(run, split, chunks, every, 1, criterion)
    assert confusions.shape == (7, 5, 5) and confusions.sum() == 7 * 64 * 64
    assert np.array_equal(confusions, again) and np.array_equal(miou, same_miou)
    assert np.array_equal(miou, scores(confusions)["miou"])
    assert loss == pytest.approx(same_loss)
    grouped, _, no_loss = read(run, split, [[1, 4], [5]], [1, 0, 1])
    assert np.array_equal(grouped, [confusions[4], confusions[1] + confusions[5]])
    assert np.isnan(no_loss)


# ---- Prepared data

@pytest.mark.parametrize("frames, groups", [
    (["01_01_c0001_037", "ung_01_01_c0002_001", "104_02_c0001_001"], ["01_01", "01_01", "104_02"]),
    (["1200_03_c0001_001", "1200_03_c0002_001", "ung_1200_04_c0001_001"],
     ["1200_03", "1200_03", "1200_04"]),
    (["walk_0001", "walk_0002", "run_001"], ["walk", "walk", "run"]),
    (["walk0001", "walk-2001", "run 001"], ["walk", "walk", "run"]),
    (["NAME_001", "NAME_002", "NAME_003"], ["NAME_001", "NAME_002", "NAME_003"])])
def test_frames_of_a_video_are_one_group(tmp_path, frames, groups):
    for frame in frames:
        write_own(tmp_path, f"{frame}.png")
    split = Split(tmp_path, "train", read_classes(tmp_path))
    assert dict(zip(split.frames, split.groups)) == dict(zip(frames, groups))
    assert evaluate.shared_groups(tmp_path) == []
    write_own(tmp_path, f"{frames[0][:-3]}100.png", split="test")
    shared = groups[:1] if len(set(groups)) == 2 else []
    assert evaluate.shared_groups(tmp_path) == shared
    for split, found in dict(train=[], val=[], test=shared).items():
        assert evaluate.shared_groups(tmp_path, [split]) == found
    (tmp_path / "train").rename(tmp_path / "val")           # val and test may share
    assert evaluate.shared_groups(tmp_path) == []


def test_two_pictures_of_one_name_are_refused(tmp_path):
    for name in ("a.jpg", "a.png"):
        write_own(tmp_path, name)
    with pytest.raises(Problem, match="images/a.jpg and .*images/a.png"):
        Split(tmp_path, "train", read_classes(tmp_path))


def test_pictures_of_16_bits_are_refused(tmp_path):
    write_own(tmp_path, "a.png", GOOD.astype(np.uint16) * 256)
    with pytest.raises(Problem, match="a.png is no .*8 bits"):
        Split(tmp_path, "train", read_classes(tmp_path))[[0]]


def test_split_loads_what_is_stored(data):
    classes = read_classes(data) | dict(mean=[0.1, 0.2, 0.3])
    split = Split(data, "val", classes)
    frame = split.frames[1]
    stored = np.array(Image.open(data / f"val/images/{frame}.jpg"))
    label = np.array(Image.open(data / f"val/labels/{frame}.png"))
    joints = np.load(data / "val/joints.npz")["joints"][1]
    batch = split[[1, 0]]
    assert np.array_equal(batch["images"][0].permute(1, 2, 0), stored)
    assert np.array_equal(batch["labels"][0], label)
    assert np.array_equal(batch["joints"][0], joints, equal_nan=True)
    normalised = evaluate.normalise(batch["images"], classes)[0]
    assert same(normalised.permute(1, 2, 0), (stored / 255 - classes["mean"]) / 0.25)
    small = Split(data, "val", classes, 32)[[1]]
    image = small["images"][0].permute(1, 2, 0).numpy()
    halved = stored.reshape(32, 2, 32, 2, 3).mean((1, 3))   # means of 2 x 2 pixels
    assert abs(image - halved).mean() < 3
    assert np.array_equal(small["labels"][0], label)        # as large as they were prepared
    assert same(small["joints"][0], (joints + 0.5) / 2 - 0.5)


def write_own(data, name, image=GOOD, label=GOOD, split="train", **options):
    (data / "classes.json").write_text('{"names": ["sky", "cat", "dog"]}')
    path = data / split / "images" / name
    labels = data / split / "labels"
    path.parent.mkdir(parents=True, exist_ok=True)
    labels.mkdir(exist_ok=True)
    Image.fromarray(image).save(path, **options)
    Image.fromarray(label).save(labels / f"{path.stem}.png")
    path.with_name(f"._{name}").write_bytes(b"of macOS")


def test_own_data_needs_names_alone(tmp_path):
    """Also: suffixes in any case, a photo turned by its EXIF, grey labels resized to their ids."""
    label = np.full((32, 32), 1, np.uint8)
    label[:8] = 2
    label[8:, :8] = 255
    upright = label % 255 * 100     # a grey photo of 100, 200 and 0
    write_own(tmp_path, "a_1.JPG", np.rot90(upright), label, exif=TURNED)
    write_own(tmp_path, "b_1.PNG", np.stack([upright] * 3, -1), label)
    classes = read_classes(tmp_path, count=True)
    assert classes["size"] == 32
    assert classes["pixels"] == [0, 2 * 24 * 24, 2 * 8 * 32]
    assert same(classes["mean"], upright.mean() / 255, 0.01)
    assert same(classes["std"], upright.std() / 255, 0.01)
    np.savez(tmp_path / "train/joints", frames=["b_1"], joints=np.ones((1, 5, 2)))
    batch = Split(tmp_path, "train", classes, 16, labels_at_size=True)[[0, 1]]
    assert np.array_equal(batch["labels"][0], label[1::2, 1::2])
    assert same(batch["joints"][:, 4, 0], [np.nan, 0.25])
    turned, exact = batch["images"].float()
    assert turned.shape == (3, 16, 16)
    assert (turned - exact).abs().mean() < 5


def disk_full(path, text, encoding):
    path.write_bytes(b"{")
    raise OSError(28, "No space left on device", path)


def test_own_counts_are_kept_and_those_of_others_are_not_believed(tmp_path, capsys, monkeypatch):
    write_own(tmp_path, "a.png")
    path = tmp_path / "classes.json"
    path.write_text('{"names": ["sky", "cat", "dog"], "pixels": [9, 9, 9]}')
    classes = read_classes(tmp_path, count=True)
    assert classes["pixels"] == [256, 256, 256]
    assert sorted(os.listdir(tmp_path)) == ["classes.json", "train"]
    counted = path.read_text()
    monkeypatch.setattr(evaluate, "count_pixels", None)
    assert read_classes(tmp_path, count=True) == classes        # nothing is counted again
    monkeypatch.undo()
    write_own(tmp_path, "b.png")
    path.write_text(counted)
    monkeypatch.setattr(evaluate.Path, "write_text", disk_full)
    assert read_classes(tmp_path, count=True)["pixels"] == [512, 512, 512]
    assert "cannot be written" in capsys.readouterr().out and path.read_text() == counted


def test_what_the_user_wrote_is_kept(tmp_path):
    write_own(tmp_path, "a.png")
    path = tmp_path / "classes.json"
    own = dict(names=["sky", "cat", "dog"], mean=[0.1, 0.2, 0.3], groups={"pets": [1, 2]})
    path.write_text(json.dumps(own))
    classes = read_classes(tmp_path, count=True)
    assert classes["mean"] == own["mean"]
    assert same(classes["std"], GOOD.std() / 255)
    stored = json.loads(path.read_text())
    del stored["counts"]
    assert stored == own


def test_corrected_labels_and_added_classes_are_counted_again(tmp_path):
    write_own(tmp_path, "a.png")
    read_classes(tmp_path, count=True)
    path = tmp_path / "train/labels/a.png"
    Image.fromarray(np.where(GOOD == 2, 1, GOOD)).save(path)
    os.utime(path, (1000, 1000))                # older than before, out of an archive
    assert read_classes(tmp_path, count=True)["pixels"] == [256, 512, 0]
    path = tmp_path / "classes.json"
    stored = json.loads(path.read_text())
    stored["names"].append("bird")
    path.write_text(json.dumps(stored))
    classes = read_classes(tmp_path, count=True)
    assert classes["pixels"] == [256, 512, 0, 0] and classes["mirror"] == [0, 1, 2, 3]


def test_accents_may_be_stored_in_two_ways(tmp_path):
    composed = "caf\u00e9"      # one character, as Linux and Windows store it
    apart = "cafe\u0301"        # an e and an accent, as macOS does
    write_own(tmp_path, f"{apart}.png")
    label = tmp_path / f"train/labels/{apart}.png"
    label.rename(label.with_stem(composed))
    np.savez(tmp_path / "train/joints", frames=[apart], joints=np.ones((1, 2, 2)))
    split = Split(tmp_path, "train", read_classes(tmp_path))
    assert split.frames == [composed] and same(split[[0]]["joints"], 1)
    np.savez(tmp_path / "train/joints", frames=["other"], joints=np.ones((1, 2, 2)))
    with pytest.raises(Problem, match="joints.npz .* no frame"):
        Split(tmp_path, "train", read_classes(tmp_path))
    np.savez(tmp_path / "train/joints", frames=[apart], joints=np.ones((1, 2, 2)))
    with pytest.raises(Problem, match="joint_mirror.* 3 entries.*joints.npz"):
        Split(tmp_path, "train", read_classes(tmp_path) | dict(joint_mirror=[0, 2, 1]))


@pytest.mark.parametrize("label, words", [
    (GOOD + (GOOD == 2), "labels/b.png;label 3;0 to 2"),
    (GOOD[:16], "labels/b.png;32x16"),
    (GOOD > 0, "labels/b.png;grey or palette PNG;README"),
    (np.stack([GOOD] * 3, -1), "labels/b.png;grey or palette PNG;README"),
    (GOOD // 255 * 255, "255 means ignore;0 and 1")])
def test_bad_labels_are_named(label, words, tmp_path):
    write_own(tmp_path, "b.png", label=label)
    with pytest.raises(Problem) as problem:
        read_classes(tmp_path, count=True)
    assert all(word in str(problem.value) for word in words.split(";")), problem.value
    path = tmp_path / "train/labels/b.png"
    path.rename(path.with_suffix(".jpg"))       # JPEG would blur the ids
    with pytest.raises(Problem, match="images/b.png has no label .*labels/b.png"):
        Split(tmp_path, "train", read_classes(tmp_path))


@pytest.mark.parametrize("entry, words", [
    ('"mean": [120, 110, 100]', "mean;to 1"),
    ('"std": [60, 60, 60]', "std;to 1"),
    ('"std": [0.2, 0, 0.2]', "std;[0.2, 0, 0.2]"),
    ('"std": [0.2, -0.1, 0.2]', "std;-0.1"),
    ('"size": "64"', "size;'64'"),
    ('"mirror": [1, 2, 0]', "mirror;back"),
    ('"joint_mirror": [1, 2, 0]', "joint_mirror;back"),
    ('"joint_mirror": [1, 2]', "joint_mirror;back"),
    ('"mirror": [0, 1]', "mirror;(3,)"),
    ('"mirror": [[1, 2]]', "mirror;(3,)"),
    ('"mirror": ["sky", "dog", "cat"]', "mirror;dog"),
    ('"mirror": [0, 1, 3]', "mirror;2"),
    ('"palette": [[0, 0, 0]]', "palette;(3, 3)"),
    ('"palette": ["#000000", "#ff0000", "#00ff00"]', "palette;#ff0000"),
    ('"palette": [[0, 0, 0], [1, 0, 0], [0, 0.5, 0]]', "palette;255"),
    ('"names": "sky"', "names;list"),
    ('"names": {"sky": 0, "cat": 1, "dog": 2}', "names;list"),
    ('"names": ["sky"]', "names;2"),
    (f'"names": {json.dumps([str(i) for i in range(256)])}', "names;255"),
    ('"merge": {"animal": [1, 3]}', "merge;0 to 2"),
    ('"merge": {"animal": [1, -1]}', "merge;0 to 2"),
    ('"merge": null', "merge;None"),
    ('"groups": [[0]]', "groups;[[0]]"),
    ('"mirror": [0, 2, 1', "line 2;column"),
    ('"title": "\udce9"', "utf-8")])
def test_classes_are_checked_where_they_are_read(entry, words, tmp_path):
    names = "" if "names" in entry else '"names": ["sky", "cat", "dog"],'
    text = f"{{{names}\n{entry}}}"
    (tmp_path / "classes.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(Problem) as problem:
        read_classes(tmp_path)
    for word in ("classes.json", *words.split(";")):
        assert word in str(problem.value)


# ---- Devices

@pytest.mark.parametrize("able, picked", [
    ({"avx512_bf16": True}, "bf16"),
    ({"avx2": True}, "fp32"),
    (None, "fp32")])
def test_a_cpu_computes_in_what_it_is_fast_in(able, picked, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")      # as in torch 2.11
    if able:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert evaluate.pick_device("cpu") == (CPU, picked)
    assert evaluate.pick_device("cpu", "fp16") == (CPU, "fp16")


@pytest.mark.parametrize("model, options, precision, able, fast", [
    ("segnet", {}, "fp32", "avx2", torch.contiguous_format),
    ("segnet", {}, "fp32", "avx512_f", torch.channels_last),
    ("segnet", {}, "bf16", "avx2", torch.channels_last),
    ("segnet", dict(variant="vgg16"), "fp32", "avx2", torch.channels_last),
    ("hourglass", dict(stacks=1, features=16), "fp32", "avx2", torch.channels_last),
    ("icnet", dict(width=0.05), "fp32", "avx2", torch.contiguous_format),
    ("icnet", dict(width=0.05), "fp32", "avx512_f", torch.channels_last),
    ("icnet", dict(width=0.07), "fp32", "avx2", torch.channels_last),
    ("icnet", {}, "bf16", "avx512_f", torch.channels_last),
    ("icnet", dict(width=0.35), "bf16", "avx512_f", torch.contiguous_format),
    ("icnet", dict(width=0.35), "fp32", "avx512_f", torch.channels_last)])
def test_layout_is_channels_last_but_where_it_is_slow_or_wrong(
        model, options, precision, able, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
    network = evaluate.MODELS[model](**options)
    assert evaluate.layout(network, CPU, precision) == fast
    assert evaluate.layout(network, torch.device("cuda"), precision) == torch.channels_last


def test_half_precision_without_its_instructions_warns(monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    evaluate.pick_device("cpu", "bf16")
    assert "ten times slower" in capsys.readouterr().err
    evaluate.pick_device("cpu", "fp32")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("capability, picked", [((7, 5), "fp16"), ((8, 0), "bf16")])
def test_cards_before_ampere_compute_in_fp16(capability, picked, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")      # nobody asks the CPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert evaluate.fastest_precision(torch.device("cuda")) == picked


@pytest.mark.parametrize("workers, device, processes, cores, count", [
    (None, "cpu", 1, 12, 1),
    (None, "cuda", None, 12, 12),
    (None, "cuda", 4, 12, 3),
    (None, "cuda", 24, 12, 1),
    (None, "cuda", 2, 200, 16),
    (0, "cuda", 1, 12, 0),
    (5, "cpu", 1, 12, 5)])
def test_a_gpu_is_fed_by_every_core(workers, device, processes, cores, count, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 500)       # of which a scheduler leaves `cores`
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert evaluate.reader_count(workers, torch.device(device)) == count
    monkeypatch.delattr(os, "sched_getaffinity")            # as on macOS and Windows
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert evaluate.reader_count(workers, torch.device(device)) == count


@pytest.mark.parametrize("precision, tolerance", [("fp16", 0.01), ("bf16", 0.1)])
def test_half_precision_predicts_like_fp32(precision, tolerance, data, run):
    images = Split(data, "test", read_classes(data))[range(4)]["images"]
    checkpoint = evaluate.load_checkpoint(run)
    _, exact = Predictor(*checkpoint, CPU, "fp32")(images, (64, 64))
    _, logits = Predictor(*checkpoint, CPU, precision)(images, (64, 64))
    assert logits.dtype == torch.float32
    error = (logits - exact).abs().mean()
    assert tolerance / 100 < error < tolerance


def test_frames_are_decoded_once_where_few_enough(data, monkeypatch):
    classes = read_classes(data)
    first = Split(data, "test", classes)[[0, 1]]
    splits = [Split(data, "test", classes) for _ in range(2)]
    for workers, split in enumerate(splits, 1):
        split.keep(workers)
        split[[0, 1]]["images"].zero_()                     # a batch is a copy
    monkeypatch.setattr(evaluate, "open_picture", None)
    second = splits[0][[1, 0]]
    for key, value in first.items():
        torch.testing.assert_close(second[key], value.flip(0), equal_nan=True)
    with pytest.raises(TypeError):                          # two workers keep nothing
        splits[1][[0]]
    large = Split(data, "train", classes, 32000)
    large.keep(1)
    assert large.kept is None


def test_readers_can_stay_alive(data):
    split = Split(data, "test", read_classes(data))
    batches = evaluate.reader(split, [[1], [2, 3]], 1, CPU, persistent=True)
    for _ in range(2):
        assert [len(batch["images"]) for batch in batches] == [1, 2]
        assert multiprocessing.active_children()


# ---- The command

def test_a_report_worked_by_hand(monkeypatch):
    shared = {"test": ["walk", "run"]}
    monkeypatch.setattr(evaluate, "shared_groups", lambda data, splits: shared[splits[0]])
    confusion = [[9, 1, 0, 0],
                 [0, 5, 3, 0],
                 [1, 1, 6, 0],
                 [4, 0, 0, 0]]
    names = ["ground", "leftArm", "rightArm", "head"]
    merge = dict(ground=[0], arms=[1, 2])
    text = report(confusion, names=names, groups=dict(arms=[1, 2]), merge=merge)
    assert "2 groups are in train too, walk for example" in text
    assert "68.8" in re.search("accuracy: arms.*", text)[0]                 # 5 / 8 and 6 / 8
    fine, merged = text.split("merged")
    cells = fine.partition("| rightArm ")[2].split()[1:7:2]
    assert cells == ["54.5", "70.6", "75.0"]        # IoU 6 / 11, F1 12 / 17, accuracy 6 / 8
    assert merged.partition("| arms ")[2].split()[1] == "88.2"      # [[9, 1], [1, 15]]: 15 / 17
    assert merged.partition("| mean ")[2].split()[1] == "85.0"      # and 9 / 11


def test_networks_are_measured_and_compared(run, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = save(tmp_path / "elsewhere/first/best.pt", data, seed=1)
    split = Split(data, "test", read_classes(data))
    expected = []
    for path in (run, other):
        groups, _, _ = read(path, split, [range(7)], [0, 0, 0, 1, 1, 1, 2])
        half = evaluate.bootstrap(groups)["miou"]
        miou = scores(groups.sum(0))["miou"]
        expected.append(evaluate.percent(miou, half))
    for paths, values in ([], expected[:1]), ([run, other], expected):
        argv = ["--ckpt", *paths, "--workers", 0, "--precision", "fp32"]
        status, printed, _ = command(capsys, *argv)
        found = re.search(r"\| mIoU .*", printed)[0]
        assert status == 0 and re.findall(r"[\d.]+ \+- [\d.]+", found) == values
        assert "| rightUpLeg" not in printed            # without --per-class
    assert f"{run.parent}/best against {other.parent}/best" in printed      # alike names differ
    report = (run.parent / "test/report.md").read_text()
    for words in "stand-in, not SURREAL", "7 images of", "3 groups (sequences", "| rightUpLeg":
        assert words in report
    assert min(Image.open(run.parent / "test/examples.png").size) > 300


def bright(images, size):
    """Stands in for a Predictor: class 3 where the picture is bright, else 0."""
    bright.shapes.add(tuple(images.shape[2:]))
    red = F.interpolate(images[:, :1].float(), size)
    return 3 * (red[:, 0] > 100).long(), None


def test_pictures_of_all_kinds(run, data, tmp_path, capsys, monkeypatch):
    photo = np.zeros((30, 50, 3), np.uint8)
    photo[:, 25:] = 200
    image = Image.fromarray(photo)
    strange = os.fsdecode(b"two/deep/d\xe9.webp")       # not UTF-8
    pictures = {
        "one/a.JPG": image,
        "one/a.png": image.convert("RGBA"),
        "two/a.png": image.resize((4000, 3)),
        strange: image,
    }
    for name, picture in pictures.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    image.save(tmp_path / "in/one/a.JPG", exif=TURNED)
    (tmp_path / "in/bad.jpg").write_bytes(b"GIF89a")
    (tmp_path / "in/Thumbs.db").write_bytes(b"of Windows")
    bright.shapes = set()
    bright.classes = read_classes(data)
    bright.settings = dict(size=None)
    monkeypatch.setattr(evaluate, "Predictor", lambda *arguments: bright)
    monkeypatch.chdir(tmp_path)
    status, printed, _ = command(capsys, "--ckpt", run, "--images", "in", "no.png", "--out", "out")
    assert status == 1 and all(f"{name} is no" in printed for name in ("bad.jpg", "no.png"))
    assert bright.shapes == {(64, 38), (38, 64), (1, 64)}       # as large as in training
    labels = {name: Image.open(f"out/in/{name}-labels.png") for name in pictures}
    assert len([*tiny.Path("out").rglob("*.png")]) == 2 * 4     # and as many overlays
    assert labels["two/a.png"].size == (4000, 3)
    assert np.array_equal(labels["one/a.png"], photo[..., 0] // 200 * 3)
    turned = np.array(labels["one/a.JPG"])
    assert (turned[:25] == 0).all() and (turned[25:] == 3).all()
    assert labels["one/a.JPG"].getpalette()[:15] == np.ravel(tiny.PALETTE[:5]).tolist()


def test_chinese_names_draw_without_a_warning(tmp_path):
    names = ["背景", "头", "手", "脚", "臂"]
    folder = tiny.write_prepared(tmp_path / "data", 1, names=names, groups={})
    path = save(tmp_path / "net.pt", folder)
    argv = [sys.executable, evaluate.__file__, "--ckpt", path, "--images", folder / "test"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == "" and done.returncode == 0 and "test_c0001_001" in done.stdout


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("trace",)


def test_bad_checkpoints_are_refused_and_run_nothing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unknown = torch.load(run, weights_only=True) | dict(model="unet")
    for content in [1, 2], dict(model=Hostile()), unknown, Hostile():
        torch.save(content, "bad.pt")
        status, _, complaint = command(capsys, "--ckpt", "bad.pt")
        assert status == 2 and "bad.pt is no usable checkpoint" in complaint
    assert not os.path.exists("trace")


def test_the_newest_best_checkpoint_is_found(tmp_path):
    for age, name in enumerate(("disk/b/best.pt", "disk/a/best.pt", "runs/c/last.pt")):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        os.utime(path, (1000 - age, 1000 - age))
    runs = tmp_path / "runs"
    with pytest.raises(Problem, match="no best.pt in .*runs/c/last.pt"):
        evaluate.find_checkpoint(runs)
    (runs / "linked").symlink_to(tmp_path / "disk")
    assert evaluate.find_checkpoint(runs) == runs / "linked/b/best.pt"
    assert len(evaluate.newest(runs, "best.pt")) == 2
    assert evaluate.find_checkpoint(runs / "c/last.pt").name == "last.pt"


def test_wrong_use_gets_one_sentence(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path / "runs/first")
    other = tiny.write_prepared(tmp_path / "other", 2, 32, ("train",), names=["ground", "cat"])
    alike = tiny.write_prepared(tmp_path / "alike", 2, 32, ("train", "val"), names=tiny.NAMES[:5])
    elsewhere = save(tmp_path / "elsewhere.pt", alike)
    broken = alike / "train/images/train_c0001_001.jpg"
    broken.write_bytes(broken.read_bytes()[:600])
    (tmp_path / "bad.pt").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    cases = {
        "": "runs;train.py",
        "nowhere.pt": "nowhere.pt",
        f"{run} --data nothing": "nothing;missing",
        f"{run} --data {alike} --split train --workers 1": f"{broken}",
        f"{run} --data {other} --split train": f"{other};other classes",
        f"{run} --data {alike}": "no split 'test'",
        f"{run} {elsewhere} --split train": "different data;--data",       # before it is broken
        f"{run} --split all": "all",
        f"{tmp_path}/bad.pt --workers -1": "--workers;0 or more",
        f"{run} --device toaster": "--device toaster",
        f"{run} {run} --images {broken}": "one --ckpt",
        f"{run} --images {broken} --data {alike}": "--images;--data",
        f"{run} --images {broken} --split test": "--images;--split",
        f"{run} --images {broken} --per-class": "--images;--per-class",
        f"{run} --images nowhere.jpg {tmp_path}/empty": "nowhere.jpg;no picture"}
    for argv, words in cases.items():
        status, _, complaint = command(capsys, "--ckpt", *argv.split())
        assert status == 2 and all(word in complaint for word in words.split(";")), complaint


@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    (PermissionError(13, "Permission denied", "runs"), 2, "Permission denied: 'runs'"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "--batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--batch-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error"), 2, "--workers"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), None, "")])
def test_only_a_bug_keeps_its_traceback(error, status, words, capsys):
    def function():
        raise error

    with pytest.raises(SystemExit if status else RuntimeError) as end:
        evaluate.run_command("evaluate.py", function)
    complaint = capsys.readouterr().err
    assert words in complaint and complaint.count("\n") == bool(status)
    assert not status or end.value.code == status


def test_train_can_leave_the_defaults_out():
    parser = evaluate.Parser(argument_default=argparse.SUPPRESS)
    assert not vars(parser.parse_args([]))
    args = evaluate.build_parser().parse_args([])
    assert (args.device, args.precision, args.workers) == ("auto", "auto", None)
