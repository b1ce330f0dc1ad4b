"""evaluate.py: its figures against hand-worked ones, the paper's and NumPy's; strange files."""
import io
import json
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import tiny
from evaluate import Problem, SegNet

CPU = torch.device("cpu")
KWARGS = dict(num_classes=25, width=0.0625)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_prepared(tmp_path_factory.mktemp("data"), frames=7, size=64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SegNet(**KWARGS).eval()


@pytest.fixture
def run(tmp_path, data, model):
    """The best.pt of a run of an untrained network."""
    return tiny.write_checkpoint(tmp_path / "runs" / "first" / "best.pt", model, "segnet", data,
                                 kwargs=KWARGS)


def fails(capsys, *words, argv):
    """evaluate.py answers argv with status 2 and one sentence that has all `words`."""
    assert evaluate.main([str(word) for word in argv]) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1 and "Traceback" not in sentence
    assert all(str(word) in sentence for word in words), sentence


# metrics

def test_figures_of_a_matrix_worked_by_hand():
    result = evaluate.metrics([[5, 1, 0], [2, 3, 1], [0, 0, 4]], {"one": [0], "others": [1, 2]})
    assert result["per_class"]["iou"] == pytest.approx([5 / 8, 3 / 7, 4 / 5])
    assert result["per_class"]["f1"] == pytest.approx([10 / 13, 6 / 10, 8 / 9])
    assert result["miou"] == pytest.approx((5 / 8 + 3 / 7 + 4 / 5) / 3)
    assert result["accuracy"] == pytest.approx(12 / 16)
    assert result["precision"] == pytest.approx((5 / 7 + 3 / 4 + 4 / 5) / 3)
    assert result["recall"] == result["class_accuracy"] == pytest.approx((5 / 6 + 3 / 6 + 1) / 3)
    assert result["columns"] == pytest.approx({"one": 5 / 6, "others": (3 / 6 + 1) / 2})
    assert result["body_precision"] == pytest.approx(8 / 9)
    assert result["body_recall"] == pytest.approx(8 / 10)
    assert result["body_f1"] == pytest.approx(16 / 19)


def test_absent_classes_are_skipped_not_scored():
    result = evaluate.metrics([[8, 0, 0], [0, 0, 0], [2, 0, 0]], {"absent": [1], "both": [1, 2]})
    assert result["per_class"]["iou"] == [0.8, None, 0.0]    # 1 occurs nowhere, 2 is missed
    assert result["miou"] == pytest.approx(0.4)
    assert result["class_accuracy"] == pytest.approx(0.5)
    assert result["per_class"]["precision"] == [0.8, None, None]
    assert result["columns"] == {"absent": None, "both": 0.0}
    only_predicted = evaluate.metrics([[8, 2, 0], [0, 0, 0], [0, 0, 0]])
    assert only_predicted["per_class"]["iou"] == [0.8, 0.0, None]
    assert only_predicted["per_class"]["recall"] == [0.8, None, None]


def test_nothing_counted_is_unknown_everywhere():
    result = evaluate.metrics(np.zeros((3, 3)), {"all": [0, 1, 2]})
    assert all(result[key] is None for key in evaluate.FIGURES) and result["columns"]["all"] is None
    json.dumps(result, allow_nan=False)


def test_counts_and_figures_agree_with_numpy_pixel_by_pixel():
    rng, K = np.random.default_rng(1), 25
    labels = rng.integers(0, K, (3, 40, 30)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.2] = 255
    labels[labels == 7] = 255
    guess = rng.integers(0, K, labels.shape)
    prediction = np.where(rng.random(labels.shape) < 0.6, labels % K, guess).astype(np.int64)
    counted = evaluate.confusion_matrices(torch.from_numpy(prediction), torch.from_numpy(labels), K)
    assert counted.dtype == torch.int64 and counted.shape == (3, K, K)
    for image in range(3):
        expected = np.zeros((K, K), int)
        for true, predicted in zip(labels[image].ravel(), prediction[image].ravel()):
            if true != 255:
                expected[true, predicted] += 1
        assert (counted[image].numpy() == expected).all()
    result, valid = evaluate.metrics(counted.sum(0)), labels != 255
    ious, f1s = [], []
    for k in range(K):
        true, found = (labels == k) & valid, (prediction == k) & valid
        if (true | found).any():
            ious.append((true & found).sum() / (true | found).sum())
            f1s.append(2 * (true & found).sum() / (true.sum() + found.sum()))
    assert result["miou"] == pytest.approx(np.mean(ious))
    assert result["f1"] == pytest.approx(np.mean(f1s))
    assert result["accuracy"] == pytest.approx((labels == prediction)[valid].mean())


def test_macro_f1_never_exceeds_its_bound():
    rng = np.random.default_rng(2)
    for confusion in rng.integers(0, 50, (200, 6, 6)) * (rng.random((200, 6, 6)) < 0.5):
        result = evaluate.metrics(confusion)
        if result["miou"] is not None:
            assert result["f1"] <= 2 * result["miou"] / (1 + result["miou"]) + 1e-12


@pytest.mark.parametrize("columns, mean", [        # Table 2, ICNet normal; Table 5, SegNet doubled
    ((98.9, 84.9, 74.78, 64.3, 53.8, 64.0, 54.2, 52.7, 39.5, 32.3, 19.8, 9.3, 9.5), 48.7),
    ((99.1, 84.2, 70.9, 63.2, 58.4, 58.1, 51.8, 52.7, 43.9, 39.9, 28.8, 12.4, 9.8), 49.9)])
def test_the_papers_all_classes_column_is_the_mean_over_25(columns, mean):
    confusion = np.zeros((25, 25))
    for accuracy, ids in zip(columns, tiny.GROUPS.values()):
        for index in ids:               # what is missed goes to another class
            confusion[index, index] = 100 * accuracy
            confusion[index, (index + 1) % 25] = 10000 - 100 * accuracy
    result = evaluate.metrics(confusion, tiny.GROUPS)
    assert [100 * value for value in result["columns"].values()] == pytest.approx(columns)
    assert 100 * result["class_accuracy"] == pytest.approx(mean, abs=0.05)


def test_intervals_are_over_clips_not_frames():
    rng = np.random.default_rng(3)
    right = rng.integers(200, 900, 20)
    clips = torch.tensor(np.array([[[r, 1000 - r], [0, 1000]] for r in right]))
    frames = [f"c{clip:02d}_{t:03d}" for clip in range(20) for t in range(10)]
    repeated = clips.repeat_interleave(10, 0)       # ten equal frames a clip hold no more than one
    half = evaluate.bootstrap(repeated, frames)["accuracy"]
    assert half == pytest.approx(evaluate.bootstrap(clips, frames[::10])["accuracy"])
    accuracy = (right + 1000) / 2000
    assert half == pytest.approx(1.96 * accuracy.std() / 20 ** 0.5, rel=0.15)
    assert half > 2 * evaluate.bootstrap(repeated, [f"c{i}_001" for i in range(200)])["accuracy"]
    assert evaluate.bootstrap(repeated, ["c_%03d" % i for i in range(200)]) == {}


def test_paired_difference_sees_what_two_intervals_hide():
    rng = np.random.default_rng(4)
    right = rng.integers(200, 900, 20)
    frames = [f"c{clip}_001" for clip in range(20)]
    one, other = (torch.tensor(np.array([[[r, 1000 - r], [0, 1000]] for r in right + plus]))
                  for plus in (20, 0))
    difference, half = evaluate.paired_difference(one, other, frames)
    assert 0 < half < difference < evaluate.bootstrap(one, frames)["miou"]
    assert evaluate.paired_difference(one, one, frames) == (0, 0)


def test_left_right_confusion():
    classes = dict(names=["back", "leftArm", "rightArm", "head"], mirror=[0, 2, 1, 3])
    result = evaluate.left_right([[9, 1, 0, 0], [0, 5, 3, 0], [1, 1, 6, 0], [4, 0, 0, 0]], classes)
    assert result["of_error"] == pytest.approx(4 / 10)
    assert result["pairs"] == [dict(pair="leftArm/rightArm", of_error=pytest.approx(0.4),
                                    of_pair=pytest.approx(4 / 16))]


def test_direct_weighting_predicts_from_weighted_logits():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([2.0, 1.5]).view(1, 2, 1, 1).expand(len(images), 2, 4, 4)
    images = torch.zeros(1, 3, 4, 4)
    assert (evaluate.predict(Fixed(), images, (8, 8))[0] == 0).all()
    prediction, logits = evaluate.predict(Fixed(), images, (8, 8), [0.5, 1.0])
    assert (prediction == 1).all() and (logits.argmax(1) == 0).all()
    assert prediction.shape == (1, 8, 8)


# prepared data

def test_split_loads_what_is_stored(data):
    classes = evaluate.read_classes(data)
    plain = evaluate.Split(data, "val", classes).load([0])
    assert "joints" not in plain                            # evaluation needs none
    split = evaluate.Split(data, "val", classes, joints=True)
    batch = split.load([1, 0])
    frame = batch["frames"][0]
    stored = np.array(Image.open(data / "val" / "images" / f"{frame}.jpg"))
    assert (batch["images"][0].permute(1, 2, 0).numpy() == stored).all()
    assert batch["images"].dtype == torch.uint8
    expected = (stored / 255 - classes["mean"]) / classes["std"]
    normalised = evaluate.normalise(batch["images"], classes)[0].permute(1, 2, 0)
    assert np.allclose(normalised, expected, atol=1e-5)
    small = evaluate.Split(data, "val", classes, 32, labels_at_size=True, joints=True).load([1])
    assert small["images"].shape == (1, 3, 32, 32) and small["labels"].shape == (1, 32, 32)
    assert np.allclose(small["joints"][0], (batch["joints"][0] + 0.5) / 2 - 0.5, equal_nan=True)
    assert evaluate.Split(data, "val", classes, size=32).load([1])["labels"].shape == (1, 64, 64)


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_is_in_order_and_names_a_bad_file(data, workers, tmp_path):
    classes = evaluate.read_classes(data)
    split = evaluate.Split(data, "train", classes)
    batches = evaluate.Batches(split, [[3], [0, 1], [2], [5]])
    got = [batch["frames"] for batch in evaluate.stream(batches, 1, 4, workers, CPU)]
    assert got == [[split.frames[i] for i in chunk] for chunk in ([0, 1], [2], [5])]
    other = tiny.write_prepared(tmp_path, frames=4, size=32, splits=("train",))
    split = evaluate.Split(other, "train", evaluate.read_classes(other))
    (other / "train" / "images" / f"{split.frames[2]}.jpg").write_bytes(b"")
    with pytest.raises(Problem, match=split.frames[2]):
        list(evaluate.stream(evaluate.Batches(split, [[0, 1], [2, 3]]), 0, 2, workers, CPU))


def test_bad_labels_and_sizes_are_named(tmp_path):
    data = tiny.write_prepared(tmp_path, frames=2, size=32, splits=("train",))
    split = evaluate.Split(data, "train", evaluate.read_classes(data))
    label = data / "train" / "labels" / f"{split.frames[0]}.png"
    for values, word in ((np.full((32, 32), 25), "25"), (np.zeros((16, 32)), "32 x 16")):
        tiny.write_label(label, values.astype(np.uint8), tiny.colours())
        with pytest.raises(Problem, match=f"{label.name}.*{word}"):
            split.load([0])
    tiny.write_label(label, np.full((32, 32), 255, np.uint8), tiny.colours())
    assert (split.load([0])["labels"] == 255).all()
    label.unlink()
    with pytest.raises(Problem, match=f"{label.stem}.*no label"):
        evaluate.Split(data, "train", evaluate.read_classes(data))


@pytest.mark.parametrize("key, value", [
    ("palette", [[0, 0, 0]]), ("palette", [[0, 0, 256]] * 25), ("mirror", [True] * 25),
    ("mirror", [1, 2, 0] + list(range(3, 25))), ("joint_mirror", [5]), ("groups", {"x": [25]}),
    ("groups", {"x": [-1]}), ("groups", {"x": []}), ("size", 10 ** 9), ("size", "64"),
    ("std", [0, 1, 1]), ("mean", [float("nan")] * 3), ("names", ["a"] * 25), ("names", None),
    ("pixels", [1]), ("source", 3)])
def test_wrong_descriptions_of_classes_are_refused(data, key, value):
    classes = evaluate.read_classes(data)
    with pytest.raises(Problem, match=key):
        evaluate.check_classes(classes | {key: value})
    assert evaluate.check_classes(classes) is classes


# the command

def test_a_whole_report(run, data, capsys, monkeypatch):
    monkeypatch.chdir(run.parents[2])
    assert evaluate.main(["--ckpt", "--workers", "0", "--per-class", "--json", "all.json"]) == 0
    printed = capsys.readouterr().out
    for words in ("runs/first/best.pt", "stand-in, not SURREAL", "rightHandIndex1"):
        assert words in printed
    text = open("all.json").read()
    assert "NaN" not in text and "Infinity" not in text
    report = json.loads(text)
    network = report["networks"][0]
    assert report["images"] == 7 and report["clips"] == 3
    assert np.sum(network["confusion"]) == 7 * 64 * 64
    miou, half = network["metrics"]["miou"], network["interval"]["miou"]
    assert f"{100 * miou:.1f} +- {100 * half:.1f}" in printed
    assert network["cost"]["parameters"] == sum(p.numel() for p in SegNet(**KWARGS).parameters())
    for name in ("report.json", "report.md", "examples.png", "confusion.png"):
        assert (run.parent / "test" / name).stat().st_size > 100
    assert json.loads((run.parent / "test" / "report.json").read_text()) == report
    assert "stand-in, not SURREAL" in (run.parent / "test" / "report.md").read_text()


def test_results_do_not_depend_on_batches_workers_or_unused_weights(run, data, model):
    checkpoint = evaluate.load_checkpoint(run)
    split = evaluate.Split(data, "test", checkpoint["classes"])
    built = evaluate.build_model(checkpoint)
    first, raw = evaluate.evaluate_split(built, split, checkpoint["classes"], CPU, "fp32", 7, 0)
    second, _ = evaluate.evaluate_split(built, split, checkpoint["classes"], CPU, "fp32", 2, 1)
    assert raw is None and first.shape == (7, 25, 25) and (first == second).all()
    _, raw = evaluate.evaluate_split(built, split, checkpoint["classes"], CPU, "fp32", 7, 0,
                                     [3.0] + [1.0] * 24)
    assert (raw == first.sum(0)).all()
    for name, kind in evaluate.MODELS.items():      # training-only weights may be missing
        kwargs = dict(num_classes=25, width=0.125)
        weights = {key: value for key, value in kind(**kwargs).state_dict().items()
                   if not key.startswith(kind.training_only)}
        evaluate.build_model(checkpoint | dict(model=name, kwargs=kwargs, weights=weights))
        with pytest.raises(Problem, match="weights"):
            evaluate.build_model(checkpoint | dict(model=name, kwargs=kwargs, weights={}))
    with pytest.raises(Problem, match="colour"):
        evaluate.build_model(checkpoint | dict(kwargs=dict(colour=3)))


def test_several_networks_are_compared(run, data, model, tmp_path, capsys):
    torch.manual_seed(1)
    other = tiny.write_checkpoint(tmp_path / "second" / "last.pt", SegNet(**KWARGS), "segnet", data,
                                  kwargs=KWARGS, logit_weights=[1.0] * 25)
    assert evaluate.main(["--ckpt", str(run), str(other.parent), "--out", str(tmp_path / "out"),
                          "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    for words in ("first against second", "training seeds", "second (argmax of x)"):
        assert words in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    first, second = report["networks"]
    assert report["comparisons"][0]["difference"] == pytest.approx(
        first["metrics"]["miou"] - second["metrics"]["miou"])
    assert second["raw"] == second["metrics"] and first["cost"]["multiply_adds"] > 0
    assert Image.open(tmp_path / "out" / "comparison.png").width > 400


def test_pictures_of_all_kinds(run, tmp_path, capsys):
    rng, folder, out = np.random.default_rng(0), tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    image = Image.fromarray(rng.integers(0, 255, (30, 50, 3)).astype(np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "a.jpg", exif=turned)
    image.convert("RGBA").save(folder / "a.png")
    image.convert("L").save(folder / "grey.png")
    image.convert("P").save(folder / "palette.png", transparency=3)
    image.resize((1, 300)).save(folder / "thin.png")
    (folder / "bad.jpg").write_bytes(b"no picture")
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
                                      + struct.pack(">I", zlib.crc32(header)))
    (folder / "notes.txt").write_text("no picture either")
    argv = ["--ckpt", str(run), "--images", str(folder), str(tmp_path / "missing.png"),
            "--out", str(out)]
    assert evaluate.main(argv + ["--json", str(tmp_path / "all.json")]) == 1
    printed = capsys.readouterr().out
    pictures = json.loads((tmp_path / "all.json").read_text())["pictures"]
    failed = {os.path.basename(picture["picture"]) for picture in pictures if picture["error"]}
    assert failed == {"bad.jpg", "huge.png", "missing.png"}
    assert all(name in printed for name in failed) and len(list(out.iterdir())) == 10
    sizes = {name: Image.open(out / f"{name}-labels.png").size
             for name in ("a", "a-2", "grey", "thin")}
    assert sizes == {"a": (30, 50), "a-2": (50, 30), "grey": (50, 30), "thin": (1, 300)}
    assert Image.open(out / "a-labels.png").mode == "P"
    assert Image.open(out / "a-overlay.png").height > 50


def test_what_a_viewer_shows_is_what_the_network_sees():
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    assert np.array(evaluate.upright_rgb(clear)).min() == 255           # transparent is white
    grey = Image.fromarray(np.full((2, 4), 128 * 257, np.uint16))
    assert (np.array(evaluate.upright_rgb(grey)) == 128).all()
    file, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 3
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    Image.fromarray(pixels).save(file, "PNG", exif=turned)
    assert (np.array(evaluate.upright_rgb(Image.open(file))) == pixels[::-1, ::-1]).all()


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_strangers_checkpoints_are_refused_and_not_run(run, tmp_path, capsys):
    trace, bad = tmp_path / "trace", tmp_path / "bad.pt"
    for content in (dict(model=Malicious(trace)), Malicious(trace)):
        torch.save(content, bad)
        fails(capsys, bad, "run code", argv=["--ckpt", bad])
    bad.write_bytes(pickle.dumps(Malicious(trace)))
    fails(capsys, bad, argv=["--ckpt", bad])
    assert not trace.exists()
    whole = run.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:100], b"", b"hello"):
        bad.write_bytes(content)
        fails(capsys, bad, "truncated", argv=["--ckpt", bad])
    torch.save({"some": torch.zeros(3)}, bad)
    fails(capsys, bad, "no checkpoint", argv=["--ckpt", bad])
    torch.save([1, 2], bad)
    fails(capsys, bad, "no checkpoint", argv=["--ckpt", bad])
    good = torch.load(run, weights_only=True)
    for change, word in ((dict(model="unet"), "unet"), (dict(logit_weights=[1.0]), "logit_weights"),
                         (dict(kwargs=dict(num_classes=3)), "other classes"),
                         (dict(settings=dict(size=-1)), "size")):
        torch.save(good | change, bad)
        fails(capsys, bad, word, argv=["--ckpt", bad])


def test_wrong_use_gets_one_sentence(run, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path / "runs" / "first")
    fails(capsys, "runs", "train.py", argv=["--ckpt"])
    fails(capsys, "nowhere", argv=["--ckpt", "nowhere.pt"])
    fails(capsys, "nothing", argv=["--ckpt", run, "--data", "nothing"])
    other = tiny.write_prepared(tmp_path / "other", frames=2, size=32,
                                names=["background", "cat"], groups={})
    fails(capsys, "cat", "hips", argv=["--ckpt", run, "--data", other])
    empty = tiny.write_prepared(tmp_path / "empty", frames=dict(train=1, test=0), size=32,
                                splits=("train", "test"))
    fails(capsys, "'test'", argv=["--ckpt", run, "--data", empty])
    fails(capsys, "'val'", argv=["--ckpt", run, "--data", empty, "--split", "val"])
    (empty / "classes.json").unlink()
    fails(capsys, "unfinished", argv=["--ckpt", run, "--data", empty])
    fails(capsys, "--device", argv=["--ckpt", run, "--device", "toaster"])
    for argv in (["--ckpt", "--batch-size", "0"], ["--ckpt", "--split", "all"], [],
                 ["--ckpt", "--images", "x", "--data", "y"]):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(argv)
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_newest_best_is_preferred_to_a_newer_last(run, data, model, tmp_path):
    last = tiny.write_checkpoint(tmp_path / "runs" / "second" / "last.pt", model, "segnet",
                                 data, kwargs=KWARGS)
    os.utime(last, (4e9, 4e9))
    assert evaluate.find_checkpoint(tmp_path / "runs") == run
    run.unlink()
    assert evaluate.find_checkpoint(tmp_path / "runs") == last
