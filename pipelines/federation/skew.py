"""Feature skew: every client sees the same kinds of things through a sensor, a style or a camera of its own.

A skew is drawn once per federation and changes the inputs, never the labels, when the federation is built. The
training and test examples of a client go through the same transform. A severity of 0 changes nothing; 1 is strong, and
classes can still be told apart.

Images are uint8[H, W, C], or floats[H, W, C] in [0, 1], and stay what they are; vectors are floats[d] and recordings of
sensors floats[T, d], both thought of as standardized. Adding a skew is writing a function and entering it in `SKEWS`.

Letters: n examples, b of them of one client, N clients, images of H x W pixels in C channels.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import ndimage

from fedjax_core import checks
from fedjax_core.types import ArrayLike
from pipelines.common.names import pick
from pipelines.federation.assignment import Assignment

_VALUES = 2**20  # values transformed at once, so that little more than the result is ever in memory
_STYLES = ("plain", "inverted", "edges", "textured", "synthetic")
_DOMAINS = ("plain", "rotated", "blurred", "colored", "restyled")


class Skew(NamedTuple):
    """What the clients of one federation do to their inputs.

    Attributes:
      parameters: name to [N, ...], one row per client: all that tells their transforms apart.
      transform: `transform(x, client, rng) -> x'` for inputs [b, ...] of one client: floats, and for images in [0, 1]
        but for what is clipped afterwards. What differs between examples is drawn from rng, in one call.
    """

    parameters: dict[str, np.ndarray]
    transform: Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def apply(
    kind: str,
    x: Any,
    owner: ArrayLike,
    num_clients: int,
    *,
    severity: float = 1.0,
    seed: int = 0,
    part: Literal["train", "validation", "test"] = "train",
) -> np.ndarray:
    """The inputs as their clients see them.

    What a client sees depends on its own rows alone, not on which others there are.

    Args:
      kind: one of `SKEWS`.
      x: inputs [n, ...], not changed.
      owner: int[n], the client of each input, -1 for one that is to stay as it is.
      num_clients: N.
      severity: at least 0; 0 changes nothing.
      seed: of the clients' transforms.
      part: of the data; what differs between examples, such as noise, is drawn anew for each part.

    Returns:
      x', of the shape and dtype of x.

    Raises:
      ValueError: if the kind is unknown or does not apply to such inputs, float images leave [0, 1], there is not one
        owner in -1..N-1 for each input, or the severity is out of range.
    """
    x, held = np.asarray(x), Assignment.from_owner(owner, num_clients)
    if len(x) != len(np.asarray(owner)):
        raise ValueError(f"owner has {len(np.asarray(owner))} entries for {len(x)} inputs: give each input one")
    checks.one_of("part", part, ("train", "validation", "test"))
    skew = _draw(kind, x.shape[1:], num_clients, severity, seed)
    images = x.ndim == 4
    if not (np.issubdtype(x.dtype, np.floating) or (images and x.dtype == np.uint8)):
        raise ValueError(
            f"skew {kind!r} changes images and measurements, but x is {x.dtype}{list(x.shape[1:])}: use uint8 images "
            "[H, W, C] or floats, tokens have no feature skew"
        )
    pixels = x.dtype == np.uint8
    if images and not pixels and not (x.min(initial=0) >= 0 and x.max(initial=0) <= 1):
        raise ValueError(
            f"float images must lie in [0, 1], got {x.min():g} to {x.max():g}: skew them before they are normalized"
        )
    result = np.array(x)
    if severity == 0:
        return result
    at_once = max(1, _VALUES // max(1, result[:1].size))
    for client in np.flatnonzero(held.sizes).tolist():
        rng = np.random.default_rng([seed, zlib.crc32(f"{kind} {part}".encode()), client])
        rows = held[client]
        for start in range(0, len(rows), at_once):
            chosen = rows[start : start + at_once]
            with np.errstate(over="ignore", invalid="ignore"):  # told below, in words
                seen = skew.transform(x[chosen] / np.float32(255) if pixels else x[chosen], client, rng)
                if images:
                    seen = np.clip(seen, 0, 1)
                seen = seen if pixels else seen.astype(x.dtype, copy=False)
            if not np.isfinite(seen).all() and np.isfinite(x[chosen]).all():
                raise ValueError(
                    f"severity={severity:g} of the skew {kind!r} makes inputs that are not finite: lower it"
                )
            result[chosen] = np.rint(255 * seen) if pixels else seen
    return result


def parameters(
    kind: str, input_shape: Sequence[int], num_clients: int, *, severity: float = 1.0, seed: int = 0
) -> dict[str, np.ndarray]:
    """What tells the clients' transforms apart, name to [N, ...]: what `apply` uses, for a report.

    Args:
      kind: one of `SKEWS`.
      input_shape: shape of one input.
      num_clients: N.
      severity: as for `apply`.
      seed: as for `apply`.

    Raises:
      ValueError: if the kind is unknown or does not apply to inputs of this shape, or the severity is out of range.
    """
    return _draw(kind, tuple(input_shape), num_clients, severity, seed).parameters


def rotation(input_shape: tuple[int, ...], num_clients: int, severity: float, rng: np.random.Generator) -> Skew:
    """Every client's images are turned by an angle of its own.

    The angles, in degrees counterclockwise, are evenly spread over -45 severity to 45 severity and assigned at random;
    at severity 4 they go all around. Pixels in between are interpolated linearly and the border is continued outwards.
    """
    _check_images("rotation", input_shape)
    steps = (2 * np.arange(num_clients) + 1 - num_clients) / num_clients
    angles = rng.permutation(45 * severity * steps)

    def transform(x: np.ndarray, client: int, rng: np.random.Generator) -> np.ndarray:
        return _turned(x, angles[client])

    return Skew({"angle": angles}, transform)


def blur(input_shape: tuple[int, ...], num_clients: int, severity: float, rng: np.random.Generator) -> Skew:
    """Every client's lens is out of focus by its own amount: a Gaussian filter.

    Its standard deviations sigma, in pixels, are evenly spread from 0 to severity / 14 of the shorter side (2 pixels of
    28) and assigned at random.
    """
    _check_images("blur", input_shape)
    sigmas = rng.permutation(np.linspace(0, severity * min(input_shape[:2]) / 14, num_clients))

    def transform(x: np.ndarray, client: int, rng: np.random.Generator) -> np.ndarray:
        return _blurred(x, sigmas[client])

    return Skew({"sigma": sigmas}, transform)


def noise(input_shape: tuple[int, ...], num_clients: int, severity: float, rng: np.random.Generator) -> Skew:
    """Every client's sensor adds Gaussian noise of its own level to each value. For measurements as well as images.

    The standard deviations are evenly spread from 0 to severity / 2, where images range over [0, 1], and assigned at
    random. (Li, Diao, Chen, He, "Federated Learning on Non-IID Data Silos: An Experimental Study", 2022, whose 0.1 is a
    severity of 0.2; like its released code this takes the level for a standard deviation, where the paper writes
    Gau(level), and gives the first client none.)
    """
    levels = rng.permutation(np.linspace(0, severity / 2, num_clients))

    def transform(x: np.ndarray, client: int, rng: np.random.Generator) -> np.ndarray:
        return x + levels[client] * rng.standard_normal(x.shape)

    return Skew({"level": levels}, transform)


def color(input_shape: tuple[int, ...], num_clients: int, severity: float, rng: np.random.Generator) -> Skew:
    """Every client's camera has its own brightness, contrast and hue; gray ones may show the negative instead.

    A pixel becomes contrast (pixel - 1/2) + 1/2 + brightness. Brightness is uniform within 0.2 severity of 0, contrast
    within a factor of 2**severity of 1. Before that colors are turned about the gray axis of the color cube by a hue
    angle within 90 severity degrees, which mixes the channels and keeps their mean; gray images of a share of
    min(severity, 1) / 2 of the clients, rounded down, are inverted.
    """
    _check_images("color", input_shape, channels=(1, 3))
    brightness = 0.2 * severity * rng.uniform(-1, 1, num_clients)
    contrast = 2 ** (severity * rng.uniform(-1, 1, num_clients))
    if input_shape[2] == 3:
        own: dict[str, np.ndarray] = {"hue": 90 * severity * rng.uniform(-1, 1, num_clients)}
    else:
        own = {"inverted": rng.permutation(num_clients) < int(min(severity, 1) / 2 * num_clients)}

    def transform(x: np.ndarray, client: int, rng: np.random.Generator) -> np.ndarray:
        if "hue" in own:
            x = x @ _hue_matrix(own["hue"][client]).T
        elif own["inverted"][client]:
            x = 1 - x
        return contrast[client] * (x - 0.5) + 0.5 + brightness[client]

    return Skew({"brightness": brightness, "contrast": contrast, **own}, transform)


def style(input_shape: tuple[int, ...], num_clients: int, severity: float, rng: np.random.Generator) -> Skew:
    """Every client's images are drawn in one of five styles, as in collections of digits from different sources.

    plain: as they are. inverted: the negative. edges: the length of the gradient. textured: the absolute
    difference to a random crop of a smooth random texture, after MNIST-M (Ganin et al., 2016), which crops photographs.
    synthetic: smoothed, and drawn in one random color on another, which differ in every channel by 1/3 to 2/3 and are
    drawn for every example.

    The styles are assigned evenly at random; the severity, at most 1, is the share of the clients that keep theirs,
    rounded, and the others are plain.
    """
    _check_images("style", input_shape)
    checks.scalar("severity", severity, low=0, high=1)
    height, width, channels = input_shape
    index = rng.permutation(np.arange(num_clients) % len(_STYLES))
    plain = rng.permutation(num_clients) >= round(severity * num_clients)
    styles = np.asarray(_STYLES)[np.where(plain, 0, index)]
    smooth = min(height, width) / 28
    side = 8 * max(height, width)
    texture = rng.standard_normal((side, side, channels))
    texture = ndimage.gaussian_filter(texture, (3 * smooth, 3 * smooth, 0), mode="wrap")
    low, high = texture.min(axis=(0, 1)), texture.max(axis=(0, 1))
    texture = ((texture - low) / (high - low)).astype(np.float32)

    def textured(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        corners = (side * rng.random((len(x), 2))).astype(int)
        rows = (corners[:, :1] + np.arange(height)) % side
        columns = (corners[:, 1:] + np.arange(width)) % side
        return np.abs(texture[rows[:, :, None], columns[:, None, :]] - x)

    def synthetic(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        drawn = rng.random((len(x), 2, 1, 1, channels))
        background = drawn[:, 0]
        stroke = (background + (1 + drawn[:, 1]) / 3) % 1
        return background + (stroke - background) * _blurred(x, smooth)

    def transform(x: np.ndarray, client: int, rng: np.random.Generator) -> np.ndarray:
        match styles[client]:
            case "inverted":
                return 1 - x
            case "edges":
                return _edges(x)
            case "textured":
                return textured(x, rng)
            case "synthetic":
                return synthetic(x, rng)
        return x

    return Skew({"style": styles}, transform)


def mixed(input_shape: tuple[int, ...], num_clients: int, severity: float, rng: np.random.Generator) -> Skew:
    """Every client's images are of one of five domains made of the data set; the clients of a domain see alike.

    plain: as they are. rotated: by 45 severity degrees counterclockwise. blurred: by a Gaussian filter whose standard
    deviation is severity / 14 of the shorter side. colored: turned about the gray axis of the color cube by 90 severity
    degrees, or where images are gray moved toward the negative, which severity 1 is. restyled: moved likewise toward
    the outlines, the length of the gradient.

    The domains are assigned evenly at random. Unlike in the other skews, where no two clients are alike or each example
    is, clients fall into groups that can be told apart and found. The severity is at most 1.
    """
    _check_images("mixed", input_shape, channels=(1, 3))
    checks.scalar("severity", severity, low=0, high=1)
    kinds = np.asarray(_DOMAINS)[rng.permutation(np.arange(num_clients) % len(_DOMAINS))]
    hue = _hue_matrix(90 * severity).T
    sigma = severity * min(input_shape[:2]) / 14

    def toward(other: np.ndarray, x: np.ndarray) -> np.ndarray:
        return x + severity * (other - x)

    def transform(x: np.ndarray, client: int, rng: np.random.Generator) -> np.ndarray:
        match kinds[client]:
            case "rotated":
                return _turned(x, 45 * severity)
            case "blurred":
                return _blurred(x, sigma)
            case "colored":
                return x @ hue if x.shape[-1] == 3 else toward(1 - x, x)
            case "restyled":
                return toward(_edges(x), x)
        return x

    return Skew({"domain": kinds}, transform)


def scale(input_shape: tuple[int, ...], num_clients: int, severity: float, rng: np.random.Generator) -> Skew:
    """Every client's instruments are out of calibration: x' = gain x + offset, for vectors and recordings of sensors.

    Gain and offset belong to a client and an entry of the last axis: a measured quantity, or a channel of a recording.
    The logarithm of a gain is drawn from N(0, (severity / 2)^2), an offset from the same in the units of the inputs.
    """
    if len(input_shape) not in (1, 2):
        raise ValueError(
            f"skew 'scale' changes vectors [d] and recordings [T, d], but an input is {list(input_shape)}: use "
            "color or another skew of images"
        )
    gain = np.exp(severity / 2 * rng.standard_normal((num_clients, input_shape[-1])))
    offset = severity / 2 * rng.standard_normal((num_clients, input_shape[-1]))

    def transform(x: np.ndarray, client: int, rng: np.random.Generator) -> np.ndarray:
        return gain[client] * x + offset[client]

    return Skew({"gain": gain, "offset": offset}, transform)


SKEWS: dict[str, Callable[[tuple[int, ...], int, float, np.random.Generator], Skew]] = {
    "rotation": rotation,
    "blur": blur,
    "noise": noise,
    "color": color,
    "style": style,
    "mixed": mixed,
    "scale": scale,
}
"""Name to `skew(input_shape, num_clients, severity, rng) -> Skew`, whose docstring describes it."""

KINDS: dict[str, str] = {"style": "style", "mixed": "domain"}
"""Of the skews in which clients fall into groups that see alike, the parameter that names the group."""


def _draw(kind: str, input_shape: tuple[int, ...], num_clients: int, severity: float, seed: int) -> Skew:
    function = SKEWS[pick("skew", kind, SKEWS)]
    checks.positive_int("num_clients", num_clients, "a federation has at least one client")
    checks.scalar("severity", severity, low=0, high_open=True)
    # The name of the skew takes part, so that the draws of two skews on top of each other are unrelated.
    with np.errstate(over="ignore", invalid="ignore"):  # told where inputs become infinite by it
        return function(input_shape, num_clients, severity, np.random.default_rng([seed, zlib.crc32(kind.encode())]))


def _hue_matrix(degrees: float) -> np.ndarray:
    """The rotation [3, 3] of color space about the axis of the grays."""
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees)) / np.sqrt(3)
    cross = np.asarray([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    rotation: np.ndarray = cosine * np.eye(3) + (1 - cosine) / 3 + sine * cross
    return rotation


def _turned(x: np.ndarray, degrees: float) -> np.ndarray:
    """Images turned counterclockwise, interpolated linearly, the border continued outwards."""
    turned: np.ndarray = ndimage.rotate(x, degrees, axes=(2, 1), reshape=False, order=1, mode="nearest")
    return turned


def _blurred(x: np.ndarray, sigma: float) -> np.ndarray:
    """Images out of focus by a Gaussian filter of that many pixels."""
    blurred: np.ndarray = ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")
    return blurred


def _edges(x: np.ndarray) -> np.ndarray:
    """The length of the gradient: central differences, doubled, so that a step from 0 to 1 gives 1."""
    edges: np.ndarray = 2 * np.hypot(*np.gradient(x, axis=(1, 2)))
    return edges


def _check_images(kind: str, input_shape: tuple[int, ...], channels: tuple[int, ...] | None = None) -> None:
    if len(input_shape) != 3:
        raise ValueError(
            f"skew {kind!r} changes images [H, W, C], but an input is {list(input_shape)}: use noise or scale for "
            "measurements"
        )
    if channels is not None and input_shape[2] not in channels:
        raise ValueError(
            f"skew {kind!r} changes images of {' or '.join(map(str, channels))} channels, but an input is "
            f"{list(input_shape)}: use another skew"
        )
