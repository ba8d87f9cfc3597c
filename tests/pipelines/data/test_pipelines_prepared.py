import gzip
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from pipelines import Config
from pipelines.data import datasets, prepared, text
from pipelines.experiment import setup

ROOT = Path(__file__).resolve().parents[3]
REAL = Path(os.environ.get("FEDJAX_CORE_DATA") or ROOT.parent / "shared" / "data")

real_data = pytest.mark.skipif(not (REAL / "README.md").is_file(), reason=f"no prepared data in {REAL}")
RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (1200, 5, 4, 1), dtype=np.uint8)


@pytest.fixture(autouse=True)
def nothing_of_the_machine(monkeypatch, tmp_path):
    """No test reads or writes the user's folders."""
    monkeypatch.delenv("FEDJAX_CORE_DATA", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, kind)
    return file.getvalue()


def prepare(data_dir, name, features, splits, version="1.0.0", **info):
    """What download_and_prepare leaves behind, for features {key: (feature, values)} that need no tensorflow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = data_dir / name / version
    folder.mkdir(parents=True)
    described = tfds.features.FeaturesDict(features(tfds.features))
    described.save_config(str(folder))
    serializer = tfds.core.example_serializer.ExampleSerializer(described.get_serialized_info())
    listed = []
    for split, examples in splits.items():
        path = folder / f"{name.split('/')[0]}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for example in examples:
            writer.write(serializer.serialize_example(described.encode_example(example)))
        writer.close()
        pattern = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        size = str(path.stat().st_size)
        listed.append(
            {"name": split, "shardLengths": [str(len(examples))], "numBytes": size, "filepathTemplate": pattern}
        )
    about = {"name": name.split("/")[0], "version": version, "fileFormat": "array_record", "splits": listed}
    if "/" in name:
        about["configName"] = name.split("/")[1]
    (folder / "dataset_info.json").write_text(json.dumps(about | info))
    return folder


def image_features(f):
    return {"picture": f.Image(shape=(5, 4, 1)), "digit": f.ClassLabel(num_classes=3), "id": f.Text()}


def pictures(rows):
    return [{"picture": encoded(GRAY[i]), "digit": i % 3, "id": f"n{i}"} for i in rows]


def text_features(f):
    return {"idx": np.int32, "label": f.ClassLabel(num_classes=2), "sentence": f.Text()}


def sentences(*pairs):
    return [{"idx": i, "label": label, "sentence": said} for i, (said, label) in enumerate(pairs)]


def only_text(f):
    return {"text": f.Text()}


def test_images_are_read_and_kept(tmp_path):
    # More than one block of records, the last one not full.
    prepare(tmp_path, "toy", image_features, {"train": pictures(range(1050)), "test": pictures(range(1050, 1100))})
    for _ in range(2):
        dataset = datasets.load("toy", tmp_path)
        np.testing.assert_array_equal(dataset.train["x"], GRAY[:1050])
        np.testing.assert_array_equal(dataset.test["x"], GRAY[1050:1100])
        assert dataset.train["y"].tolist() == [i % 3 for i in range(1050)]
        assert dataset.train["y"].dtype == np.int32
        assert dataset.num_classes == 3
        assert dataset.normalization == datasets.normalization(GRAY[:1050])
        assert isinstance(dataset.train["x"], np.memmap)
        assert dataset.groups is None
    assert datasets.options("toy", tmp_path) == ["input_key", "label_key"]


def test_the_folder_may_be_a_parent_or_come_from_the_environment(tmp_path, monkeypatch):
    folder = prepare(
        tmp_path / "data" / "tfds", "toy", image_features, {s: pictures(range(6)) for s in ("train", "test")}
    )
    monkeypatch.setenv("FEDJAX_CORE_DATA", str(tmp_path / "data"))
    assert datasets.load("toy").num_classes == 3
    assert prepared.available() == ["toy"]
    monkeypatch.delenv("FEDJAX_CORE_DATA")
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder.parents[1]))
    assert datasets.load("toy").num_classes == 3
    monkeypatch.setenv("FEDJAX_CORE_DATA", str(tmp_path / "dat"))
    with pytest.raises(ValueError, match=r"environment variable FEDJAX_CORE_DATA=.*dat' is not a folder"):
        datasets.load("toy")


def test_prepared_again_it_is_read_again(tmp_path):
    splits = {split: pictures(range(6)) for split in ("train", "test")}
    folder = prepare(tmp_path, "toy", image_features, splits)
    datasets.load("toy", tmp_path)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    prepare(tmp_path, "toy", image_features, splits | {"train": pictures(range(9))})
    assert len(datasets.load("toy", tmp_path).train["y"]) == 9
    # A higher version is another set, and 1.10 is above 1.9.
    prepare(tmp_path, "toy", image_features, splits | {"train": pictures(range(12))}, version="1.9.0")
    prepare(tmp_path, "toy", image_features, splits | {"train": pictures(range(15))}, version="1.10.0")
    assert len(datasets.load("toy", tmp_path).train["y"]) == 15


def test_color_and_palette_images_have_the_channels_they_should(tmp_path):
    color = RNG.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    palette = Image.fromarray(color[3]).quantize(16)
    file = io.BytesIO()
    palette.save(file, "PNG")
    images = [encoded(color[0]), encoded(color[1], "BMP"), encoded(color[2]), file.getvalue()]
    examples = [{"image": image, "label": i % 2} for i, image in enumerate(images)]
    prepare(
        tmp_path,
        "toy",
        lambda f: {"image": f.Image(shape=(6, 5, 3)), "label": f.ClassLabel(num_classes=2)},
        {"train": examples, "test": examples[:1]},
    )
    x = datasets.load("toy", tmp_path).train["x"]
    np.testing.assert_array_equal(x[:3], color[:3])
    np.testing.assert_array_equal(x[3], np.asarray(palette.convert("RGB")))


def test_numbers_with_a_label_are_read(tmp_path):
    x = RNG.normal(size=(10, 3)).astype(np.float32)
    examples = [{"measured": x[i], "kind": i % 2} for i in range(10)]
    features = lambda f: {  # noqa: E731
        "measured": f.Tensor(shape=(3,), dtype=np.float32),
        "kind": f.ClassLabel(num_classes=2),
    }
    prepare(tmp_path, "toy", features, {"train": examples[:8], "test": examples[8:]})
    dataset = datasets.load("toy", tmp_path, input_key="measured")
    np.testing.assert_array_equal(dataset.train["x"], x[:8])
    assert dataset.normalization is None
    with pytest.raises(ValueError, match=r"kind \(ClassLabel\), measured \(Tensor\); name an image.*input_key"):
        datasets.load("toy", tmp_path)


def test_without_a_test_split_one_is_found(tmp_path):
    labelled, unlabelled = pictures(range(20)), [p | {"digit": -1} for p in pictures(range(20, 25))]
    prepare(tmp_path, "with", image_features, {"train": labelled, "validation": labelled[:7], "test": unlabelled})
    assert len(datasets.load("with", tmp_path).test["y"]) == 7
    prepare(tmp_path, "without", image_features, {"train": labelled, "test": unlabelled})
    dataset = datasets.load("without", tmp_path)
    assert (len(dataset.train["y"]), len(dataset.test["y"])) == (16, 4)
    both = np.concatenate([dataset.train["x"], dataset.test["x"]]).reshape(20, -1)
    np.testing.assert_array_equal(np.unique(both, axis=0), np.unique(GRAY[:20].reshape(20, -1), axis=0))
    prepare(tmp_path, "none", image_features, {"test": labelled})
    with pytest.raises(ValueError, match="none has the splits test: one called train is needed"):
        datasets.load("none", tmp_path)


def test_bad_labels_are_found_and_nothing_is_kept(tmp_path):
    wrong = pictures(range(6))
    wrong[2]["digit"] = -1
    prepare(tmp_path / "data", "toy", image_features, {"train": wrong, "test": pictures(range(3))})
    with pytest.raises(ValueError, match=r"toy.train\['y'\] must lie in \[0, 3\), got -1 at position 2"):
        datasets.load("toy", tmp_path / "data", cache_dir=tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())


def test_texts_with_labels_become_padded_rows(tmp_path):
    train = sentences(("ab", 0), ("ba b", 1), ("", 1), ("漢", 0))
    prepare(tmp_path, "toy/said", text_features, {"train": train, "test": sentences(("axb", 1), ("b", 0))})
    dataset = datasets.load("toy/said", tmp_path, sequence_length=3)
    # " ", "a", "b", "漢", the unknown, the padding.
    assert dataset.vocabulary_size == 6
    assert dataset.pad_token == 5
    assert datasets.load("toy/said", tmp_path, sequence_length=3).pad_token == 5  # from the cache
    assert dataset.num_classes == 2
    assert dataset.pad_id is None
    assert dataset.train["x"].tolist() == [[1, 2, 5], [2, 1, 0], [5, 5, 5], [3, 5, 5]]
    assert dataset.train["x"].dtype == np.int32
    assert dataset.train["y"].tolist() == [0, 1, 1, 0]
    assert dataset.test["x"].tolist() == [[1, 4, 2], [2, 5, 5]]
    assert datasets.options("toy/said", tmp_path) == ["input_key", "label_key", "sequence_length", "vocabulary"]
    as_bytes = datasets.load("toy/said", tmp_path, vocabulary="bytes")
    assert as_bytes.vocabulary_size == 257
    assert as_bytes.input_shape == (80,)
    assert bytes(as_bytes.train["x"][3, :3].astype(np.uint8)).decode() == "漢"
    with pytest.raises(ValueError, match="'toy' has several variants: take toy/said"):
        datasets.load("toy", tmp_path)


def classified(**changes):
    """A round of FedAvg on texts with the command line's transformer, traced; and the experiment."""
    config = Config(
        model="transformer",
        methods=("fedavg",),
        clients=2,
        cohort_size=2,
        partition="iid",
        batch_size=2,
        epochs=None,
        steps=1,
        seeds=1,
        **changes,
    )
    with jax.enable_x64(False):
        return setup.prepare(config)


def test_texts_are_classified_by_the_transformer(tmp_path):
    train = sentences(*[("ab", 0), ("ba b", 1)] * 4)
    prepare(tmp_path, "toy/said", text_features, {"train": train, "test": sentences(("axb", 1), ("b", 0))})
    experiment = classified(dataset="toy/said", data_dir=str(tmp_path), sequence_length=6, min_size=1)
    with jax.enable_x64(False):
        params = jax.jit(experiment.model.init)(jax.random.key(0))
        whole = jax.jit(experiment.model.apply)(params, experiment.test["x"])
        assert whole.shape == (2, 2)
        # The rows are of one and three characters: what is beyond them changes nothing.
        np.testing.assert_allclose(experiment.model.apply(params, experiment.test["x"][:, :3]), whole, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"'char_lstm' predicts the next token, .* with one label each: take transformer"
    ):
        setup.prepare(experiment.config.replace(model="char_lstm", x64=True))


def test_a_text_alone_becomes_windows(tmp_path):
    prepare(
        tmp_path,
        "book",
        only_text,
        {"train": [{"text": "abcab"}, {"text": ""}], "test": [{"text": "cb?"}], "validation": [{"text": "no"}]},
    )
    dataset = datasets.load("book", tmp_path, sequence_length=3)
    assert dataset.is_sequence
    assert dataset.num_classes == dataset.vocabulary_size == 4
    assert dataset.train["x"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert dataset.train["y"].tolist() == [[1, 2, 0], [1, -1, -1]]
    assert dataset.test["x"].tolist() == [[2, 1, 0]]
    assert dataset.test["y"].tolist() == [[1, 3, -1]]
    assert dataset.pad_id == -1
    prepare(tmp_path, "empty", only_text, {"train": [{"text": ""}], "test": [{"text": "a"}]})
    with pytest.raises(ValueError, match="none of 1 texts has two tokens"):
        datasets.load("empty", tmp_path)


def test_the_authors_choice_of_features_is_taken(tmp_path):
    supervised = {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "fine"}]}}
    features = lambda f: {  # noqa: E731
        "image": f.Image(shape=(5, 4, 1)),
        "coarse": f.ClassLabel(num_classes=2),
        "fine": f.ClassLabel(num_classes=4),
    }
    examples = [{"image": encoded(GRAY[i]), "coarse": i % 2, "fine": i % 4} for i in range(8)]
    splits = {"train": examples, "test": examples}
    prepare(tmp_path, "chosen", features, splits, supervisedKeys=supervised)
    assert datasets.load("chosen", tmp_path).num_classes == 4
    assert datasets.load("chosen", tmp_path, label_key="coarse").num_classes == 2
    prepare(tmp_path, "open", features, splits)
    with pytest.raises(ValueError, match=r"open leaves a choice.*coarse \(ClassLabel\), fine \(ClassLabel\)"):
        datasets.load("open", tmp_path)
    with pytest.raises(ValueError, match="unknown feature of open 'fin': did you mean 'fine'"):
        datasets.load("open", tmp_path, label_key="fin")
    with pytest.raises(ValueError, match="feature 'image' of open is no class label"):
        datasets.load("open", tmp_path, input_key="image", label_key="image")
    same = {"tuple": {"items": [{"featureKey": "text"}, {"featureKey": "text"}]}}
    both = {"train": [{"text": "abc"}], "test": [{"text": "abc"}]}
    prepare(tmp_path, "book", only_text, both, supervisedKeys=same)
    assert datasets.load("book", tmp_path).is_sequence


def test_images_of_several_sizes_are_refused(tmp_path):
    features = lambda f: {"image": f.Image(shape=(None, None, 1)), "label": f.ClassLabel(num_classes=2)}  # noqa: E731
    examples = [{"image": encoded(GRAY[0][:k]), "label": 0} for k in (3, 4)]
    prepare(tmp_path, "toy", features, {"train": examples, "test": examples})
    with pytest.raises(ValueError, match=r"'image' of toy is uint8\[None, None, 1\].*of one size"):
        datasets.load("toy", tmp_path)


def test_options_that_mean_nothing_are_refused(tmp_path):
    prepare(tmp_path, "toy", image_features, {"train": pictures(range(6)), "test": pictures(range(6))})
    with pytest.raises(ValueError, match="toy is no text: leave out sequence_length and vocabulary"):
        datasets.load("toy", tmp_path, sequence_length=8)
    with pytest.raises(ValueError, match="unknown option of data set toy 'labelkey': did you mean 'label_key'"):
        datasets.load("toy", tmp_path, labelkey="digit")
    with pytest.raises(ValueError, match="unknown option of data set digits 'vocabulary': there are none"):
        datasets.load("digits", vocabulary="bytes")


def test_a_set_of_another_format_is_refused(tmp_path):
    folder = prepare(tmp_path, "toy", image_features, {"train": pictures(range(3)), "test": pictures(range(3))})
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match=r"was not prepared as array_record.*again.*file_format='array_record'"):
        datasets.load("toy", tmp_path)


def lose(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """Another byte in what is compressed or checked, whichever position that is."""
    content = bytearray(path.read_bytes())
    content[: len(content) // 2] = bytes(byte ^ 1 for byte in content[: len(content) // 2])
    path.write_bytes(content)


RECORDS = "toy-train.array_record-00000-of-00001"


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (lose, RECORDS),
        (truncate, RECORDS),
        (flip, RECORDS),
        (lose, "features.json"),
        (truncate, "features.json"),
        (flip, "dataset_info.json"),
    ],
)
def test_damaged_records_are_named_and_nothing_is_kept(tmp_path, damage, file):
    folder = prepare(tmp_path, "toy", image_features, {"train": pictures(range(60)), "test": pictures(range(6))})
    damage(folder / file)
    with pytest.raises(ValueError, match=r"(cannot be read|has empty records).*copy or prepare it again") as caught:
        datasets.load("toy", tmp_path, cache_dir=tmp_path / "kept")
    assert str(folder.parent) in str(caught.value)
    assert not list(tmp_path.glob("kept/*"))


def test_what_is_not_there_is_told_with_its_place(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    with pytest.raises(ValueError, match="'fashion_mnist' is not prepared in") as caught:
        datasets.load("fashion_mnist", root)
    for part in (
        f"put it at {root}/fashion_mnist/<version>",
        "tfds.builder('fashion_mnist', data_dir='DATA').download_and_prepare(file_format='array_record')",
        "--data-dir",
        "FEDJAX_CORE_DATA",
    ):
        assert part in str(caught.value)
    for name, file in (("har", "har.npz"), ("usps", "usps.npz"), ("shakespeare", "shakespeare_roles.jsonl.gz")):
        with pytest.raises(
            ValueError, match=rf"put {file} at {root}/{name}/{file}.*fedjax-core list {name}.*--data-dir"
        ):
            datasets.load(name, root)
    with pytest.raises(ValueError, match=r"data_dir='.*typo' is not a folder"):
        datasets.load("har", tmp_path / "typo")


def test_an_unknown_name_gets_the_nearest_of_all(tmp_path):
    prepare(tmp_path, "toy/said", text_features, {"train": sentences(("a", 0)), "test": sentences(("b", 0))})
    with pytest.raises(ValueError, match=rf"unknown data set 'fashion_mnst': did you mean 'fashion_mnist'.*{tmp_path}"):
        datasets.load("fashion_mnst", tmp_path)
    with pytest.raises(ValueError, match="unknown data set 'toi/said': did you mean 'toy/said'"):
        datasets.load("toi/said", tmp_path)
    with pytest.raises(ValueError, match="'toy/sad' is not prepared"):
        datasets.load("toy/sad", tmp_path)
    for name in ("../toy/said", "", "toy//said"):
        with pytest.raises(ValueError, match=r"unknown data set|is not prepared"):
            datasets.load(name, tmp_path)


def test_tensorflow_is_not_imported(tmp_path):
    """Not even where it is installed: here it is a module that says when it is imported."""
    prepare(tmp_path / "data", "toy", image_features, {"train": pictures(range(6)), "test": pictures(range(6))})
    prepare(tmp_path / "data", "book", only_text, {"train": [{"text": "abc"}], "test": [{"text": "abc"}]})
    fake = tmp_path / "path" / "tensorflow"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise AssertionError('tensorflow was imported')")
    program = (
        "import sys; from pipelines.data import datasets\n"
        f"print(len(datasets.load('toy', {str(tmp_path / 'data')!r}).train['y']))\n"
        f"print(len(datasets.load('book', {str(tmp_path / 'data')!r}).train['y']))\n"
        "assert 'tensorflow' not in sys.modules and 'tensorflow_datasets' in sys.modules\n"
    )
    path = os.pathsep.join([str(fake.parent), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "1"]


def roles(data_dir, speeches):
    folder = data_dir / "shakespeare"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"client": client, "speeches": said}, ensure_ascii=False) for client, said in speeches.items()]
    with gzip.open(folder / "shakespeare_roles.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return folder / "shakespeare_roles.jsonl.gz"


def test_roles_are_clients_and_end_in_their_test_part(tmp_path):
    long = "abcdefghij" * 5
    roles(tmp_path, {"p/LONG": [long[:20], long[20:]], "p/MUTE": [], "p/SHORT": ["é漢é"], "q/ONE": ["abcde"]})
    dataset = datasets.load("shakespeare", tmp_path, sequence_length=4)
    assert dataset.group_names == ("p/LONG", "q/ONE")
    # 51 characters with the line break between two speeches: 46 to train on, 5 to test on, none in both.
    whole = long[:20] + "\n" + long[20:]
    letters = "\nabcdefghij"
    x, y = dataset.train["x"], dataset.train["y"]
    mine = dataset.groups == 0
    assert "".join(letters[t] for t in y[mine][y[mine] >= 0]) == whole[1:46]
    assert dataset.test["x"].tolist() == [[letters.index(c) for c in whole[46:50]]]
    assert dataset.test["y"].tolist() == [[letters.index(c) for c in whole[47:51]]]
    assert dataset.test_groups.tolist() == [0]
    # One window and no more: too short to be cut.
    assert "".join(letters[t] for t in x[dataset.groups == 1][0]) == "abcd"
    assert (dataset.groups == 1).sum() == 1
    assert dataset.num_classes == dataset.vocabulary_size == 12
    assert dataset.pad_id == -1

    every = datasets.load("shakespeare", tmp_path, sequence_length=4, min_length=2, vocabulary="bytes")
    assert every.group_names == ("p/LONG", "p/SHORT", "q/ONE")
    assert every.num_classes == 256
    assert every.train["x"][every.groups == 1].reshape(-1)[:6].tolist() == list("é漢é".encode()[:6])
    with pytest.raises(ValueError, match=r"no role of .* has 1000 characters: lower min_length"):
        datasets.load("shakespeare", tmp_path, min_length=1000)
    assert datasets.options("shakespeare") == ["sequence_length", "vocabulary", "min_length"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "Not a gzipped file"),
        (gzip.compress(b"{"), "cannot be read"),
        (gzip.compress(b'{"client": "a"}'), "'speeches'"),
        (gzip.compress(b'{"client": "a", "speeches": [1]}'), "cannot be read"),
        (gzip.compress(b'{"client": "a", "speeches": []}\n' * 2), "role 'a' is there twice, again in line 2"),
        (gzip.compress(b'{"client": "a", "speeches": []}' * 9)[:-9], "cannot be read"),
        (gzip.compress('{"client": "é"}'.encode("latin-1")), "cannot be read"),
    ],
    ids=["no gzip", "no JSON", "no speeches", "not texts", "twice", "cut off", "not UTF-8"],  # gzip writes the time
)
def test_a_damaged_file_of_roles_is_named(tmp_path, content, message):
    path = roles(tmp_path, {})
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        datasets.load("shakespeare", tmp_path)
    assert str(path) in str(caught.value)


def test_windows_of_sensors_are_cut_from_the_signal(tmp_path):
    signal = RNG.integers(-3000, 3000, (6, 1000)).astype(np.int16)
    start = np.arange(0, 800, 64).astype(np.int32)
    label = (np.arange(13) % 6).astype(np.uint8)
    subject = np.array([0] * 5 + [1] * 5 + [29] * 3, np.uint8)  # of these UCI's number 2 is a published test subject
    (tmp_path / "har").mkdir()
    np.savez(tmp_path / "har" / "har.npz", signal=signal, start=start, label=label, subject=subject)
    dataset = datasets.load("har", tmp_path)
    assert dataset.groups.tolist() == [0] * 5 + [29] * 3
    assert dataset.test_groups.tolist() == [1] * 5
    assert dataset.group_names[1] == "subject 2"
    assert dataset.input_shape == (128, 6)
    assert dataset.train["x"].dtype == np.float32
    np.testing.assert_allclose(dataset.test["x"][2, 7], signal[:, start[7] + 7] / 1000, rtol=1e-6)
    np.savez(tmp_path / "har" / "har.npz", signal=signal, start=start)
    with pytest.raises(ValueError, match=r"har.npz has no array 'label'"):
        datasets.load("har", tmp_path)


def test_gray_levels_are_rounded_to_bytes(tmp_path):
    gray = RNG.integers(0, 2001, (6, 16, 16)).astype(np.uint16)
    gray[0, 0, :2] = [0, 2000]
    y = np.arange(6, dtype=np.uint8)
    (tmp_path / "usps").mkdir()
    np.savez(tmp_path / "usps" / "usps.npz", train_images=gray, train_labels=y, test_images=gray, test_labels=y)
    dataset = datasets.load("usps", tmp_path)
    assert dataset.train["x"].shape == (6, 16, 16, 1)
    assert dataset.train["x"][0, 0, :2, 0].tolist() == [0, 255]
    np.testing.assert_allclose(dataset.train["x"][..., 0] / 255, gray / 2000, atol=0.51 / 255)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A cache for the prepared data, so that each set is read once."""
    return tmp_path_factory.mktemp("kept")


def real(name, kept, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return datasets.load(name, REAL, cache_dir=kept, **options)


@real_data
def test_real_images(kept):
    dataset = real("cifar10", kept)
    assert np.bincount(dataset.train["y"]).tolist() == [5000] * 10
    assert np.bincount(dataset.test["y"]).tolist() == [1000] * 10
    np.testing.assert_allclose(dataset.normalization.mean, [0.49139968, 0.48215841, 0.44653091], atol=5e-9)


@real_data
def test_real_domains(kept):
    dataset = real("mnist+usps", kept)
    assert dataset.input_shape == (28, 28, 1)
    mnist = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    usps = [1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644]
    assert np.bincount(dataset.train["y"][dataset.groups == 0]).tolist() == mnist
    assert np.bincount(dataset.train["y"][dataset.groups == 1]).tolist() == usps
    assert np.bincount(dataset.test_groups).tolist() == [10_000, 2007]
    # Resized digits keep about their share of ink.
    parts = [dataset.train["x"][dataset.groups == 1].mean(), real("usps", kept).train["x"].mean()]
    assert parts[0] == pytest.approx(parts[1], rel=0.01)


@real_data
def test_real_text(kept):
    labelled = real("glue/sst2", kept)
    assert np.bincount(labelled.train["y"]).tolist() == [29_780, 37_569]
    assert np.bincount(labelled.test["y"]).tolist() == [428, 444]  # validation: the test split has no labels
    in_words = classified(dataset="glue/sst2", data_dir=str(REAL), vocabulary="words", sequence_length=24).dataset
    assert in_words.pad_token == in_words.vocabulary_size - 1
    assert (in_words.train["x"] == in_words.pad_token).mean() > 0.5
    tiny = real("tiny_shakespeare", kept)
    assert (tiny.train["y"] != text.PAD_LABEL).sum() == 1_003_854 - 1
    assert tiny.num_classes == 66
    roles = real("shakespeare", kept)
    assert roles.group_names[0] == "1kinghenryiv/KING HENRY IV"
    assert roles.num_classes == 74 + 1
    hamlet = roles.group_names.index("hamlet/HAMLET")
    counts = [np.bincount(groups, minlength=len(roles.group_names)) for groups in (roles.groups, roles.test_groups)]
    assert counts[0].argmax() == counts[1].argmax() == hamlet
    assert counts[1][hamlet] / (counts[0] + counts[1])[hamlet] == pytest.approx(0.1, abs=0.005)
    assert counts[0].min() > 0
    # The folder's own count of roles with 1,000 characters has a line break after the last speech too.
    longer = real("shakespeare", kept, min_length=999)
    assert len(longer.group_names) == 639


@real_data
def test_real_sensors(kept):
    dataset = real("har", kept)
    assert np.bincount(dataset.train["y"]).tolist() == [1226, 1073, 986, 1286, 1374, 1407]
    assert np.bincount(dataset.test["y"]).tolist() == [496, 471, 420, 491, 532, 537]
    assert len(np.unique(dataset.groups)) == 21
    assert not set(dataset.groups.tolist()) & set(dataset.test_groups.tolist())
    # A phone at rest feels the earth: 1 g.
    still = dataset.train["x"][dataset.train["y"] == 4][..., :3]
    assert np.linalg.norm(still.mean(axis=1), axis=-1).mean() == pytest.approx(1, abs=0.05)
