import tracemalloc

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from pipelines.federation import skew

CLIENTS = 10
IMAGES = ("rotation", "blur", "noise", "color", "style", "mixed")
# The shape of an input and its type, and the skews it can have.
INPUTS = {
    "gray": ((12, 10, 1), np.uint8, IMAGES),
    "colored": ((12, 10, 3), np.uint8, IMAGES),
    "floats": ((12, 10, 1), np.float32, IMAGES),
    "double": ((12, 10, 3), np.float64, IMAGES),
    "vectors": ((7,), np.float32, ("noise", "scale")),
    "recordings": ((9, 4), np.float32, ("noise", "scale")),
}
CASES = [(name, kind) for name, (_, _, kinds) in INPUTS.items() for kind in kinds]


def inputs(name, n=60, seed=0):
    shape, dtype, _ = INPUTS[name]
    rng = np.random.default_rng(seed)
    if dtype == np.uint8:
        return rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return (rng.random((n, *shape)) if len(shape) == 3 else rng.normal(size=(n, *shape))).astype(dtype)


def owners(n=60):
    return np.random.default_rng(1).permutation(np.arange(n) % CLIENTS)


def test_every_skew_is_tested():
    assert {kind for _, kind in CASES} == set(skew.SKEWS)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_severity_of_zero_changes_no_bit(name, kind):
    x = inputs(name)
    same = skew.apply(kind, x, owners(), CLIENTS, severity=0)
    np.testing.assert_array_equal(same, x)
    assert same.dtype == x.dtype
    assert not np.shares_memory(same, x)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_inputs_keep_their_shape_and_type_and_the_seed_decides(name, kind):
    x = inputs(name)
    before = x.copy()
    x.flags.writeable = False  # as a memory map may be
    owner = np.where(np.arange(60) < 5, -1, owners())
    seen = skew.apply(kind, x, owner, CLIENTS)
    assert seen.shape == x.shape
    assert seen.dtype == x.dtype
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(seen[:5], x[:5])  # no client's
    assert (seen != x).any()
    if x.ndim == 4 and x.dtype != np.uint8:
        assert seen.min() >= 0
        assert seen.max() <= 1
    np.testing.assert_array_equal(seen, skew.apply(kind, x, owner, CLIENTS))
    assert (seen != skew.apply(kind, x, owner, CLIENTS, seed=1)).any()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_a_client_sees_does_not_depend_on_other_rows_nor_on_blocks(name, kind, monkeypatch):
    x, owner = inputs(name), owners()
    seen = skew.apply(kind, x, owner, CLIENTS)
    for client in range(CLIENTS):
        rows = owner == client
        alone = skew.apply(kind, x[rows], owner[rows], CLIENTS)
        np.testing.assert_array_equal(alone, seen[rows])
    monkeypatch.setattr(skew, "_VALUES", 2 * x[0].size)  # two inputs at once
    np.testing.assert_array_equal(skew.apply(kind, x, owner, CLIENTS), seen)


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] not in ("noise", "style")])
def test_the_parts_of_a_client_go_through_the_same_transform(name, kind):
    x, owner = inputs(name), owners()
    seen = {part: skew.apply(kind, x, owner, CLIENTS, part=part) for part in ("train", "validation", "test")}
    np.testing.assert_array_equal(seen["train"], seen["test"])
    np.testing.assert_array_equal(seen["train"], seen["validation"])


def test_the_parts_of_a_client_have_its_style():
    x, owner = inputs("gray"), owners()
    train, test = (skew.apply("style", x, owner, CLIENTS, part=part) for part in ("train", "test"))
    same = np.asarray([np.array_equal(train[owner == i], test[owner == i]) for i in range(CLIENTS)])
    styles = skew.parameters("style", (12, 10, 1), CLIENTS)["style"]
    np.testing.assert_array_equal(same, ~np.isin(styles, ["textured", "synthetic"]))


def test_noise_has_the_level_of_its_client_and_is_drawn_anew_for_each_part():
    owner = np.arange(20_000) % 4
    x = np.zeros((20_000, 5))
    train, test = (skew.apply("noise", x, owner, 4, severity=0.6, part=part) for part in ("train", "test"))
    levels = skew.parameters("noise", (5,), 4, severity=0.6)["level"]
    np.testing.assert_allclose(np.sort(levels), [0, 0.1, 0.2, 0.3])
    for client in range(4):
        drawn, again = train[owner == client], test[owner == client]
        # 25,000 draws: 0.02 are more than four standard errors of a standard deviation, and of a correlation.
        np.testing.assert_allclose([drawn.std(), again.std()], levels[client], rtol=0.02)
        if levels[client]:
            assert abs(np.corrcoef(drawn.ravel(), again.ravel())[0, 1]) < 0.03
            assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.07
            assert abs(drawn.mean()) < 0.03 * levels[client]


def test_noise_of_images_is_clipped_and_not_wrapped_around():
    seen = skew.apply("noise", np.full((200, 4, 4, 1), 250, np.uint8), np.arange(200) % 2, 2, severity=0.1)
    noisy = seen[np.arange(200) % 2 == np.argmax(skew.parameters("noise", (4, 4, 1), 2)["level"])]
    assert noisy.min() > 150
    assert noisy.max() == 255


@pytest.mark.parametrize("clients", [1, 2, 7])
def test_angles_are_evenly_spread(clients):
    angles = np.sort(skew.parameters("rotation", (5, 5, 1), clients, severity=2)["angle"])
    np.testing.assert_allclose(np.diff(angles), 180 / clients)
    np.testing.assert_allclose(angles, -angles[::-1], atol=1e-12)
    assert abs(angles).max() < 90


def test_a_quarter_turn_is_exact_and_counterclockwise():
    x = inputs("gray")[:, :10]
    angles = skew.parameters("rotation", (10, 10, 1), 2, severity=4)["angle"]
    assert sorted(angles) == [-90, 90]
    seen = skew.apply("rotation", x, np.full(60, np.argmax(angles)), 2, severity=4)
    np.testing.assert_array_equal(seen, np.rot90(x, 1, axes=(1, 2)))


def test_blur_spreads_a_point_by_its_standard_deviation():
    x = np.zeros((8, 41, 41, 1))
    x[:, 20, 20] = 1
    sigmas = skew.parameters("blur", (41, 41, 1), 8)["sigma"]
    np.testing.assert_allclose(np.sort(sigmas), np.linspace(0, 41 / 14, 8))
    seen = skew.apply("blur", x, np.arange(8), 8)
    np.testing.assert_allclose(seen.sum(axis=(1, 2, 3)), 1, rtol=1e-6)
    variance = np.sum(seen[..., 0] * np.square(np.arange(41) - 20)[:, None], axis=(1, 2))
    # Sampling the bell narrows it where it is hardly wider than a pixel.
    np.testing.assert_allclose(variance[sigmas > 0.8], np.square(sigmas[sigmas > 0.8]), rtol=0.02)
    assert np.all(np.argsort(variance) == np.argsort(sigmas))


def test_gray_cameras_have_brightness_contrast_and_negatives():
    x, owner = inputs("gray"), owners()
    own = skew.parameters("color", (12, 10, 1), CLIENTS)
    assert own["inverted"].sum() == CLIENTS // 2
    assert abs(own["brightness"]).max() <= 0.2
    assert abs(np.log2(own["contrast"])).max() <= 1
    pixels = x / 255
    pixels = np.where(own["inverted"][owner][:, None, None, None], 1 - pixels, pixels)
    brightness, contrast = (own[key][owner][:, None, None, None] for key in ("brightness", "contrast"))
    expected = np.clip((pixels - 0.5) * contrast + 0.5 + brightness, 0, 1)
    np.testing.assert_allclose(skew.apply("color", x, owner, CLIENTS) / 255, expected, atol=0.51 / 255)
    half = skew.parameters("color", (12, 10, 1), CLIENTS, severity=0.5)
    assert half["inverted"].sum() == CLIENTS // 4
    np.testing.assert_allclose(half["brightness"], own["brightness"] / 2)


def test_hue_turns_the_color_cube_about_its_gray_axis():
    x, owner = inputs("double") * 0.2 + 0.4, owners()  # far from the ends, so that nothing is clipped
    own = skew.parameters("color", (12, 10, 3), CLIENTS)
    seen = skew.apply("color", x, owner, CLIENTS)
    for client in range(CLIENTS):
        axis = np.ones(3) / np.sqrt(3)
        turned = Rotation.from_rotvec(np.deg2rad(own["hue"][client]) * axis).apply(x[owner == client].reshape(-1, 3))
        expected = (turned - 0.5) * own["contrast"][client] + 0.5 + own["brightness"][client]
        np.testing.assert_allclose(seen[owner == client].reshape(-1, 3), np.clip(expected, 0, 1), atol=1e-12)
    assert abs(own["hue"]).max() <= 90


def test_styles_are_dealt_out_evenly_and_severity_is_the_share_that_keeps_its_own():
    full, half, none = (skew.parameters("style", (8, 8, 1), 100, severity=share)["style"] for share in (1, 0.5, 0))
    assert np.unique(full, return_counts=True)[1].tolist() == [20] * 5
    assert set(none) == {"plain"}
    assert set(half[half != full]) == {"plain"}
    # Half the clients are plain, and of the others those that are so anyway.
    assert 50 <= np.sum(half == "plain") <= 70


def test_styles_do_what_they_are_called():
    x = inputs("gray", 40)
    shape = (12, 10, 1)
    styles = skew.parameters("style", shape, CLIENTS)["style"]

    def as_seen(images, wanted):
        return skew.apply("style", images, np.full(len(images), np.flatnonzero(styles == wanted)[0]), CLIENTS)

    np.testing.assert_array_equal(as_seen(x, "plain"), x)
    np.testing.assert_array_equal(as_seen(x, "inverted"), 255 - x)
    step = np.zeros((1, *shape))
    step[:, :, 5:] = 0.5
    edges = as_seen(step, "edges")[0, :, :, 0]
    np.testing.assert_array_equal(edges, np.broadcast_to(np.isin(np.arange(10), (4, 5)) * 0.5, (12, 10)))
    # On black a textured image is the texture, on white its negative, at the same place.
    black, white = (as_seen(np.full((40, *shape), value, np.float64), "textured") for value in (0, 1))
    np.testing.assert_allclose(black + white, 1)
    assert black.std() > 0.05
    assert len(np.unique(black[:, 0, 0, 0])) > 20  # crops differ
    # A black image shows the background alone, a white one the stroke.
    background, stroke = (as_seen(np.full((40, *shape), value, np.float64), "synthetic") for value in (0, 1))
    contrast = abs(background - stroke)
    np.testing.assert_allclose(np.ptp(contrast, axis=(1, 2)), 0, atol=1e-9)
    assert contrast.min() >= 1 / 3 - 1e-9
    assert contrast.max() <= 2 / 3 + 1e-9


def test_mixed_clients_are_of_five_domains_that_see_alike():
    x = inputs("double", 40)
    kinds = skew.parameters("mixed", (12, 10, 3), CLIENTS)["domain"]
    assert np.unique(kinds, return_counts=True)[1].tolist() == [2] * 5

    def as_seen(kind, images=x, **choices):
        of_each = [
            skew.apply("mixed", images, np.full(len(images), client), CLIENTS, **choices)
            for client in np.flatnonzero(kinds == kind)
        ]
        np.testing.assert_array_equal(*of_each)  # two clients of a domain do the same
        return of_each[0]

    np.testing.assert_array_equal(as_seen("plain"), x)
    point = np.zeros((1, 41, 41, 1))
    point[0, 20, 30] = 1  # right of the middle; it goes up by a half turn of a right angle
    y, across = np.unravel_index(np.argmax(as_seen("rotated", point)), (41, 41))
    assert (y, across) == (20 - 7, 20 + 7)
    wide = as_seen("blurred", point)[0, :, :, 0]
    spread = np.sum(wide * np.square(np.arange(41) - 20)[:, None])
    np.testing.assert_allclose([wide.sum(), spread], [1, np.square(41 / 14)], rtol=0.02)
    turned = Rotation.from_rotvec(np.deg2rad(90) * np.ones(3) / np.sqrt(3)).apply(x.reshape(-1, 3))
    np.testing.assert_allclose(as_seen("colored").reshape(-1, 3), np.clip(turned, 0, 1), atol=1e-12)
    gray = inputs("gray", 5)
    np.testing.assert_array_equal(as_seen("colored", gray), 255 - gray)
    styles = skew.parameters("style", (12, 10, 3), CLIENTS)["style"]
    edges = skew.apply("style", x, np.full(40, np.flatnonzero(styles == "edges")[0]), CLIENTS)
    np.testing.assert_allclose(as_seen("restyled"), edges, atol=1e-12)
    half = as_seen("colored", gray / 255, severity=0.5)
    np.testing.assert_allclose(half, 0.5)  # half way to the negative everything is gray


@pytest.mark.parametrize("name", ["vectors", "recordings"])
def test_scale_has_a_gain_and_an_offset_per_client_and_quantity(name):
    x, owner = inputs(name), owners()
    own = skew.parameters("scale", x.shape[1:], CLIENTS)
    assert own["gain"].shape == own["offset"].shape == (CLIENTS, x.shape[-1])
    between = (slice(None), *[None] * (x.ndim - 2))
    expected = x * own["gain"][owner][between] + own["offset"][owner][between]
    np.testing.assert_allclose(skew.apply("scale", x, owner, CLIENTS), expected, rtol=1e-5, atol=1e-6)


def test_scale_is_drawn_as_strongly_as_said():
    own = skew.parameters("scale", (40,), 500, severity=0.8)
    # 20,000 draws: a relative standard error of 0.005.
    np.testing.assert_allclose([np.log(own["gain"]).std(), own["offset"].std()], 0.4, rtol=0.03)
    assert abs(np.log(own["gain"]).mean()) < 0.015
    assert abs(np.corrcoef(own["gain"].ravel(), own["offset"].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("kind", IMAGES)
def test_memory_stays_near_that_of_the_result(kind, monkeypatch):
    monkeypatch.setattr(skew, "_VALUES", 2**15)
    x = inputs("gray", 20_000)
    owner = np.arange(20_000) % 2
    skew.parameters(kind, x.shape[1:], 2)
    tracemalloc.start()
    try:
        skew.apply(kind, x, owner, 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The result, the rows of each client, and a few copies of a block in double precision; all at once would be
    # eight bytes and more for each byte of x.
    assert peak < x.nbytes + 8 * 20_000 * 5 + 12 * 8 * 2**15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: skew.apply("rotatoin", inputs("gray"), owners(), CLIENTS), r"unknown skew.*did you mean 'rotation'"),
        (lambda: skew.apply("noise", np.zeros((60, 80), np.int32), owners(), CLIENTS), r"int32\[80\].*tokens have no"),
        (lambda: skew.apply("blur", inputs("vectors"), owners(), CLIENTS), r"'blur' changes images.*\[7\].*use noise"),
        (lambda: skew.apply("style", inputs("recordings"), owners(), CLIENTS), r"'style' changes images.*\[9, 4\]"),
        (lambda: skew.apply("scale", inputs("gray"), owners(), CLIENTS), r"'scale' changes vectors.*\[12, 10, 1\]"),
        (lambda: skew.apply("color", np.zeros((60, 4, 4, 2)), owners(), CLIENTS), r"1 or 3 channels.*\[4, 4, 2\]"),
        (lambda: skew.apply("blur", inputs("floats") * 255, owners(), CLIENTS), r"lie in \[0, 1\].*before they are"),
        (lambda: skew.apply("blur", inputs("floats") * np.nan, owners(), CLIENTS), r"lie in \[0, 1\], got nan"),
        (lambda: skew.apply("blur", inputs("gray"), owners()[:-1], CLIENTS), r"59 entries for 60 inputs"),
        (lambda: skew.apply("blur", inputs("gray"), owners(), 5), r"owner holds \d, but clients are numbered 0 to 4"),
        (
            lambda: skew.apply("blur", inputs("gray"), owners(), CLIENTS, severity=-1),
            r"severity must lie in \[0, inf\)",
        ),
        (lambda: skew.apply("style", inputs("gray"), owners(), CLIENTS, severity=2), r"severity must lie in \[0, 1\]"),
        (lambda: skew.apply("mixed", inputs("gray"), owners(), CLIENTS, severity=2), r"severity must lie in \[0, 1\]"),
        (lambda: skew.apply("blur", inputs("gray"), owners(), CLIENTS, part="dev"), r"part must be one of"),
        (lambda: skew.parameters("blur", (8, 8, 1), 0), r"num_clients must be an integer of at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
