import numpy as np
import pytest
from PIL import Image

from pipelines.data import datasets, sources

RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (40, 5, 4, 3), dtype=np.uint8)
LABELS = np.arange(40) % 4


def images(name, shape=(4, 4, 1), num_classes=3, fill=None):
    def part(n):
        x = RNG.integers(0, 256, (n, *shape), dtype=np.uint8)
        return x if fill is None else np.full_like(x, fill), np.arange(n) % num_classes

    return sources.from_arrays(*part(9), test=part(6), name=name)


def test_images_stay_bytes_and_get_their_statistics():
    dataset = sources.from_arrays(IMAGES, LABELS)
    for part in (dataset.train, dataset.test):
        assert part["x"].dtype == np.uint8
        assert part["y"].dtype == np.int32
    seen = dataset.train["x"].reshape(-1, 3) / 255
    np.testing.assert_allclose(dataset.normalization.mean, seen.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(dataset.normalization.std, seen.std(axis=0), rtol=1e-12)
    assert dataset.num_classes == 4
    assert dataset.vocabulary_size is None
    assert sources.from_arrays(IMAGES[..., 0], LABELS).input_shape == (5, 4, 1)


def test_statistics_do_not_depend_on_the_block(monkeypatch):
    whole = datasets.normalization(IMAGES)
    monkeypatch.setattr("pipelines.data.dataset._BLOCK", 100)
    assert datasets.normalization(IMAGES) == whole


def test_a_constant_channel_becomes_zero_and_not_nan():
    statistics = datasets.normalization(np.full((3, 2, 2, 1), 51, np.uint8))
    assert statistics.mean == pytest.approx((0.2,))
    assert statistics.std == (1.0,)


def test_floats_become_single_and_integers_tokens():
    floats = sources.from_arrays(np.ones((10, 2)), np.arange(10) % 2)
    assert floats.train["x"].dtype == np.float32
    assert floats.normalization is None
    tokens = sources.from_arrays(np.arange(30).reshape(10, 3), np.arange(10) % 2)
    assert tokens.train["x"].dtype == np.int32
    assert tokens.vocabulary_size == 30
    assert tokens.num_classes == 2


def test_sequences_may_be_padded():
    x = np.arange(40).reshape(10, 4) % 7
    y = np.where(np.arange(4) == 3, -1, x)
    dataset = sources.from_arrays(x, y)
    assert dataset.is_sequence
    assert dataset.pad_id == -1
    assert dataset.num_classes == dataset.vocabulary_size == 7
    assert sources.from_arrays(x, x).pad_id is None


def test_groups_are_numbered_in_sorted_order():
    names = np.array(["zoe", "ann", "bob", "ann"] * 10)
    dataset = sources.from_arrays(IMAGES, LABELS, groups=names)
    assert dataset.group_names == ("ann", "bob", "zoe")
    assert dataset.groups.dtype == dataset.test_groups.dtype == np.int32
    assert np.bincount(dataset.groups).tolist() == [16, 8, 8]
    assert np.bincount(dataset.test_groups).tolist() == [4, 2, 2]
    both = sources.from_arrays(
        IMAGES, LABELS, test=(IMAGES[:2], LABELS[:2]), groups=np.full(40, 7), test_groups=np.array([3, 7])
    )
    assert both.group_names == ("3", "7")
    assert both.test_groups.tolist() == [0, 1]
    assert set(both.groups.tolist()) == {1}


@pytest.mark.parametrize("kind", [str, int])
def test_groups_may_be_a_list(kind):
    dataset = sources.from_arrays(IMAGES, LABELS, groups=[kind(i // 10) for i in range(40)])
    assert dataset.group_names == ("0", "1", "2", "3")


def test_a_fifth_of_every_class_or_of_every_group_is_held_out():
    y = np.repeat([0, 1, 2], [50, 30, 20])
    out = sources.held_out(y)
    assert np.bincount(y[out]).tolist() == [10, 6, 4]
    np.testing.assert_array_equal(out, sources.held_out(y))
    groups = RNG.permutation(np.repeat(np.arange(6), [1, 2, 3, 4, 40, 50]))
    out = sources.held_out(y, groups)
    assert np.bincount(groups[out], minlength=6).tolist() == [0, 0, 1, 1, 8, 10]
    # Within a large group the classes have their share too.
    largest = groups == 5
    share = np.bincount(y[largest & out], minlength=3) - 0.2 * np.bincount(y[largest], minlength=3)
    assert np.abs(share).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": None}, r"arrays.train\['y'\] is object\[\]: give integer labels"),
        ({"y": LABELS / 2}, r"arrays.train\['y'\] is float64\[40\]: give integer labels"),
        ({"y": LABELS[:, None, None]}, r"int64\[40, 1, 1\]: give integer labels"),
        ({"y": LABELS[1:]}, "40 inputs and 39 labels"),
        ({"y": np.where(LABELS == 0, -1, LABELS)}, r"must lie in \[0, 4\), got -1"),
        ({"num_classes": 3}, r"must lie in \[0, 3\), got 3"),
        ({"y": LABELS + 2**40}, "which is no class"),
        ({"x": IMAGES.astype(np.int64) + 200}, r"int64\[40, 5, 4, 3\] with values from 2\d\d to 4\d\d: .* images"),
        ({"x": IMAGES.astype(np.int16) - 200}, r"int16\[40, 5, 4, 3\] with values from -\d+ to \d+: .* images"),
        ({"x": np.full(40, "a")}, "give floats"),
        ({"x": IMAGES.astype(bool)}, "give floats"),
        ({"x": np.where(LABELS == 3, np.nan, 1.0)[:, None]}, "NaN or infinite"),
        ({"x": np.full((40, 2), np.inf)}, "NaN or infinite"),
        ({"x": np.where(LABELS == 3, -1e300, 1.0)[:, None]}, r"holds -1e\+300 at index \(3, 0\), which is finite but"),
        ({"x": np.full((40, 2), 2**32)}, r"int64\[40, 2\] and holds 4294967296: .* tokens"),
        ({"x": np.full((40, 2), -(2**32))}, r"int64\[40, 2\] and holds -4294967296: .* tokens"),
        ({"x": np.arange(80).reshape(40, 2) - 1}, r"\['x'\] must lie in \[0, .*got -1"),
        ({"x": IMAGES[:0], "y": LABELS[:0]}, "has no examples"),
        ({"x": IMAGES[:1], "y": LABELS[:1]}, "arrays.test has no examples"),
        ({"groups": LABELS[1:]}, "one group per example"),
        ({"groups": LABELS / 2}, r"float64\[40\]: give one whole number or name per example"),
        ({"groups": [None] * 40}, r"object\[40\]: give one whole number or name"),
        ({"test_groups": LABELS}, "test_groups goes with a test part"),
        ({"test": (IMAGES, LABELS), "test_groups": LABELS}, "test_groups but no groups"),
        ({"test": (IMAGES, LABELS), "groups": LABELS, "test_groups": LABELS.astype(str)}, "name both alike"),
        ({"test": (IMAGES, LABELS), "groups": LABELS, "test_groups": LABELS[1:]}, "groups of arrays.test must be"),
        ({"test": (IMAGES[:, :4], LABELS)}, r"arrays.test\['x'\] is uint8\[0, 4, 4, 3\]"),
        ({"test": (IMAGES / 255, LABELS)}, r"arrays.test\['x'\] is float"),
    ],
)
def test_arrays_that_do_not_fit_are_named(arguments, message):
    arguments = {"x": IMAGES, "y": LABELS} | arguments
    with pytest.raises(ValueError, match=message):
        sources.from_arrays(arguments.pop("x"), arguments.pop("y"), **arguments)


def test_a_file_of_arrays(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, x=IMAGES, y=LABELS, groups=np.arange(40) // 20)
    dataset = datasets.load(str(path))
    assert dataset.name == "mine"
    assert (len(dataset.train["y"]), len(dataset.test["y"])) == (32, 8)
    assert np.bincount(dataset.test_groups).tolist() == [4, 4]
    assert dataset.group_names == ("0", "1")
    np.savez(path, x=IMAGES, y=LABELS, test_x=IMAGES[:3], test_y=LABELS[:3])
    dataset = datasets.load(str(path))
    np.testing.assert_array_equal(dataset.train["x"], IMAGES)
    np.testing.assert_array_equal(dataset.test["x"], IMAGES[:3])
    assert datasets.options(str(path)) == []


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-60])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def no_archive(path):
    path.write_text("x,y\n1,2\n")


def one_array(path):
    with path.open("wb") as file:
        np.save(file, IMAGES)


@pytest.mark.parametrize("damage", [cut_short, flipped, no_archive, one_array])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "mine.npz"
    np.savez(path, x=IMAGES, y=LABELS)
    damage(path)
    with pytest.raises(ValueError, match=r"mine\.npz cannot be read as a \.npz file of plain arrays"):
        sources.from_npz(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": IMAGES}, "has no array 'y'"),
        ({"x": IMAGES, "y": LABELS, "label": LABELS}, "unknown array in .*mine.npz 'label'"),
        ({"x": IMAGES, "y": LABELS, "test_x": IMAGES}, "only one of test_x and test_y"),
        ({"x": IMAGES, "y": np.array([None] * 40)}, "without arrays of Python objects"),
        ({"x": IMAGES, "y": LABELS * 1.0}, r"mine.train\['y'\] is float64"),
    ],
)
def test_a_file_that_lacks_something_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        sources.from_npz(tmp_path / "mine.npz")
    with pytest.raises(ValueError, match="there is no file"):
        sources.from_npz(tmp_path / "other.npz")


class Frame:
    """As much of a data frame as is looked at."""

    def __init__(self, **columns):
        self.columns = list(columns)
        self._columns = columns

    def __getitem__(self, column):
        return self._columns[column]


def frame(**changes):
    columns = {
        "age": np.arange(20),
        "city": np.array(["oslo", "bern"] * 10, object),
        "sick": ["yes", "no", "no", "no"] * 5,
        "clinic": np.repeat([10, 20], 10),
    }
    return Frame(**columns | changes)


def test_columns_are_standardized_or_taken_apart():
    dataset = sources.from_frame(frame(), label="sick", group="clinic", name="clinics")
    assert dataset.name == "clinics"
    assert dataset.input_shape == (3,)
    assert dataset.group_names == ("10", "20")
    assert np.bincount(dataset.test_groups).tolist() == [2, 2]
    x = dataset.train["x"]
    assert x.dtype == np.float32
    np.testing.assert_allclose([x[:, 0].mean(), x[:, 0].std()], [0, 1], atol=1e-6)
    # In sorted order bern comes first, and people of an odd age are from there.
    everyone = np.concatenate([x, dataset.test["x"]])
    everyone = everyone[np.argsort(everyone[:, 0])]
    np.testing.assert_array_equal(everyone[:, 1], np.arange(20) % 2)
    np.testing.assert_array_equal(everyone[:, 2], 1 - everyone[:, 1])
    labels = np.concatenate([dataset.train["y"], dataset.test["y"]])
    assert np.bincount(labels).tolist() == [15, 5]  # no comes before yes


def test_without_groups_a_fifth_of_every_class_is_held_out():
    dataset = sources.from_frame(frame(), label="sick")
    assert dataset.groups is None
    assert dataset.input_shape == (4,)
    assert np.bincount(dataset.test["y"]).tolist() == [3, 1]


def test_pandas_frames_are_read():
    pandas = pytest.importorskip("pandas")
    ours = frame()
    theirs = pandas.DataFrame({column: ours[column] for column in ours.columns})
    theirs["city"] = theirs["city"].astype("category")
    expected = sources.from_frame(ours, label="sick", group="clinic")
    got = sources.from_frame(theirs, label="sick", group="clinic")
    np.testing.assert_array_equal(got.train["x"], expected.train["x"])
    np.testing.assert_array_equal(got.test["y"], expected.test["y"])


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        (frame(), {"label": "sik"}, "unknown column of frame 'sik': did you mean 'sick'"),
        (frame(), {"label": "sick", "group": "clinics"}, "did you mean 'clinic'"),
        (
            frame(age=np.where(np.arange(20) == 4, np.nan, 1)),
            {"label": "sick"},
            "'age' holds .*nan.* at row 4: fill in",
        ),
        (frame(city=["oslo", None] * 10), {"label": "sick"}, "'city' holds None at row 1"),
        (frame(sick=np.arange(20) / 2), {"label": "sick"}, "label column 'sick' holds float64 numbers"),
        (frame(age=np.full(20, "2020-01-01", "M8[D]")), {"label": "sick"}, r"column 'age' is datetime64\[D\]"),
        (Frame(sick=[0, 1] * 5, clinic=[1] * 10), {"label": "sick", "group": "clinic"}, "no column left"),
    ],
)
def test_a_table_that_does_not_fit_is_named(table, arguments, message):
    with pytest.raises(ValueError, match=message):
        sources.from_frame(table, **arguments)


def test_columns_need_names_of_their_own():
    table = frame()
    table.columns.append("age")
    with pytest.raises(ValueError, match="several columns called 'age'"):
        sources.from_frame(table, label="sick")


def test_domains_are_brought_to_one_shape():
    small, color = images("small", (4, 6, 1)), images("color", (8, 5, 3))
    joined = sources.join([small, color])
    assert joined.name == "small+color"
    assert joined.input_shape == (8, 6, 3)
    assert joined.groups.tolist() == [0] * 9 + [1] * 9
    assert joined.test_groups.tolist() == [0] * 6 + [1] * 6
    assert joined.group_names == ("small", "color")
    gray = joined.train["x"][:9]
    np.testing.assert_array_equal(gray[..., 0], gray[..., 2])
    expected = Image.fromarray(small.train["x"][2, :, :, 0]).resize((6, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(gray[2, :, :, 1], np.asarray(expected))
    expected = Image.fromarray(color.test["x"][1]).resize((6, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(joined.test["x"][7], np.asarray(expected))
    np.testing.assert_array_equal(joined.train["y"], np.concatenate([small.train["y"], color.train["y"]]))
    assert joined.normalization == datasets.normalization(joined.train["x"])


def test_domains_that_fit_are_left_as_they_are():
    one, other = images("one"), images("other")
    joined = sources.join([one, other])
    np.testing.assert_array_equal(joined.train["x"][:9], one.train["x"])
    np.testing.assert_array_equal(joined.test["x"][6:], other.test["x"])
    flat = sources.join([datasets.load("iris"), datasets.load("iris")._replace(name="again")])
    assert flat.normalization is None
    assert flat.group_names == ("iris", "again")
    assert np.bincount(flat.groups).tolist() == [120, 120]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: [images("a"), images("a")], "names one domain twice"),
        (lambda: [images("a"), images("b", num_classes=2)], "a has 3 classes and b 2"),
        (lambda: [images("a", (4, 4, 3)), images("b", (4, 4, 4))], "3 channels and others 4: only gray"),
        (lambda: [datasets.load("wine"), datasets.load("iris")], r"wine are \[13\] and those of iris \[4\]"),
        (lambda: [images("a"), datasets.load("iris")], r"a are uint8\[4, 4, 1\] and those of iris float32\[4\]"),
        (lambda: [sources.from_arrays(np.eye(9, dtype=int), np.zeros(9, int), name="words")] * 1, "words holds tokens"),
    ],
)
def test_domains_that_do_not_fit_are_named(parts, message):
    with pytest.raises(ValueError, match=message):
        sources.join(parts())


def test_domains_by_name(tmp_path):
    paths = [str(tmp_path / f"{name}.npz") for name in ("one", "two")]
    for path in paths:
        np.savez(path, x=IMAGES, y=LABELS)
    joined = datasets.load("+".join(paths))
    assert joined.group_names == ("one", "two")
    assert len(joined.train["y"]) == 64
    with pytest.raises(ValueError, match="unknown data set 'iriss': did you mean 'iris'"):
        datasets.load("iris+iriss")


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int16, np.uint16])
def test_whole_numbers_of_any_width_are_images(dtype):
    plain, wide = sources.from_arrays(IMAGES, LABELS), sources.from_arrays(IMAGES.astype(dtype), LABELS)
    np.testing.assert_array_equal(wide.train["x"], plain.train["x"])
    assert wide.train["x"].dtype == np.uint8
    assert wide.normalization == plain.normalization


def test_tokens_may_be_padded_at_the_end():
    rows = np.array([[0, 3, -1], [2, -1, -1], [1, 1, 1], [-1, -1, -1]] * 10)
    dataset = sources.from_arrays(rows, LABELS)
    assert dataset.pad_token == 4
    assert dataset.vocabulary_size == 5
    assert np.bincount(dataset.train["x"].ravel(), minlength=5)[4] == (rows == -1).sum() * 4 // 5


def test_what_a_function_may_return():
    x, y = RNG.normal(size=(40, 2)), LABELS
    for made in ((x, y), [x, y], {"x": x, "y": y}, {"x_train": x, "y_train": y}, sources.from_arrays(x, y)):
        assert sources.from_any(made).train["x"].shape == (32, 2)
    for made in (((x, y), (x[:5], y[:5])), {"x": x, "y": y, "x_test": x[:5], "y_test": y[:5]}):
        assert len(sources.from_any(made).test["y"]) == 5
    for made, message in (
        (3, "data is int: return"),
        ((x, y, x, y), r"return \(\(x, y\), \(test_x, test_y\)\)"),
        ({"x": x, "y": y, "x_tets": x}, "did you mean 'x_test'"),
        ({"x": x, "y": y, "x_train": x}, "under two names"),
        ({"x": x}, "no array 'y'"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.from_any(made)


def test_polars_frames():
    polars = pytest.importorskip("polars")
    columns = {
        "age": [1.0, 2.0] * 20,
        "kind": ["u", "v"] * 20,
        "seen": [True, False] * 20,
        "label": LABELS.tolist(),
        "ward": ["p", "q", "r", "s"] * 10,
    }
    frame = polars.DataFrame(columns)
    dataset = sources.from_frame(frame, label="label", group="ward")
    assert dataset.input_shape == (4,)
    assert dataset.group_names == ("p", "q", "r", "s")
    as_categories = frame.with_columns(
        polars.col("kind").cast(polars.Categorical), polars.col("label").cast(polars.Int8)
    )
    plain, other = (sources.from_any(made.drop("ward")).train["x"] for made in (frame, as_categories))
    np.testing.assert_array_equal(other, plain)
    np.testing.assert_array_equal(plain[:, 1] + plain[:, 2], 1)  # one input for each kind
    lists = polars.DataFrame({"pixels": RNG.normal(size=(40, 6)).tolist(), "label": LABELS.tolist()})
    assert sources.from_any(lists).input_shape == (6,)
    fixed = lists.with_columns(polars.col("pixels").cast(polars.Array(polars.Float64, 6)))
    np.testing.assert_array_equal(sources.from_any(fixed).train["x"], sources.from_any(lists).train["x"])
    for made, message in (
        (frame.lazy(), r"return frame.collect\(\)"),
        (frame.rename({"label": "diagnosis"}), "label=COLUMN"),
        (lists.with_columns(other=polars.lit(1)), "a column of lists beside others"),
        (frame.drop("ward").with_columns(polars.lit(None).alias("age")), "column 'age' holds"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.from_any(made)


def test_hugging_face_data_sets():
    datasets = pytest.importorskip("datasets")
    labels = datasets.ClassLabel(names=["a", "b", "c", "d"])

    def made(features=None, **columns):
        return datasets.Dataset.from_dict(columns, features=features and datasets.Features(features))

    pictures = [Image.fromarray(image) for image in IMAGES]
    images = made({"image": datasets.Image(), "label": labels}, image=pictures, label=LABELS.tolist())
    dataset = sources.from_any(datasets.DatasetDict(train=images, test=images.select(range(6))))
    np.testing.assert_array_equal(dataset.train["x"], IMAGES)
    assert (len(dataset.test["y"]), dataset.num_classes) == (6, 4)
    alone, arrays = sources.from_huggingface(images), sources.from_arrays(IMAGES, LABELS)
    np.testing.assert_array_equal(alone.test["x"], arrays.test["x"])
    nested = made(
        {"pixels": datasets.Array3D(IMAGES.shape[1:], "uint8"), "label": labels}, pixels=IMAGES, label=LABELS.tolist()
    )
    np.testing.assert_array_equal(sources.from_huggingface(nested).train["x"], alone.train["x"])

    texts = ["good film", "bad"] * 20
    said = {"sentence": texts, "label": [1, 0] * 20, "idx": list(range(40)), "who": ["p", "q", "r", "s"] * 10}
    review = sources.from_huggingface(
        made(**said), input="sentence", group="who", vocabulary="words", sequence_length=3
    )
    assert review.group_names == ("p", "q", "r", "s")
    assert (review.vocabulary_size, review.pad_token) == (5, 4)  # bad, film, good, the unknown, the padding
    assert {tuple(row) for row in review.train["x"].tolist()} == {(2, 1, 4), (0, 4, 4)}
    unlabeled = made({"text": datasets.Value("string"), "label": labels}, text=texts, label=[-1] * 40)
    told = made({"text": datasets.Value("string"), "label": labels}, text=texts, label=[1, 0] * 20)
    splits = datasets.DatasetDict(train=told, validation=told.select(range(8)), test=unlabeled)
    assert len(sources.from_any(splits).test["y"]) == 8
    assert sources.from_any(told.remove_columns("label")).is_sequence

    tokens = sources.from_any(made(input_ids=[[1, 2], [3, 4, 5]] * 20, label=[0, 1] * 20))
    assert (tokens.input_shape, tokens.pad_token) == ((3,), 6)
    numbers = sources.from_any(made(age=[1.0, 2.0] * 20, height=[3, 4] * 20, label=["no", "yes"] * 20))
    np.testing.assert_allclose(numbers.train["x"].mean(axis=0), 0, atol=0.3)

    for wrong, message in (
        (told.to_iterable_dataset(), "streamed"),
        (datasets.DatasetDict(a=told, b=told), "splits a, b: one called train"),
        (made(**said), r"who \(text\): say which to learn from"),
        (made(text=["a", None], label=[0, 1]), "nothing at row 1"),
        (made(x=[[1.0]] * 4), "no class: say which to predict"),
        (made(x=[[1.0], [1.0, 2.0]] * 2, label=[0, 1] * 2), "bring all to"),
        (made(x=[1.0] * 4, label=[0.5] * 4), "is no class of each example"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.from_any(wrong)
    with pytest.raises(ValueError, match="did you mean 'sentence'"):
        sources.from_huggingface(made(**said), input="sentense")
