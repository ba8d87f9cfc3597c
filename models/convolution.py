"""Two-dimensional convolution and pooling made of slices and dots.

`vmap` over per-client kernels turns a convolution into a grouped one, which accelerators are slow at: there dots were
1.5 to 2.4 times as fast for a small CNN in many lanes (docs/gpu.md). On a processor the clients' loop rewrites
convolutions by itself (`fedjax_core.convolutions`), in less time than dots take; `benchmarks/convolution.py` compares
them all. Pooling by slices is as fast there as the rewritten `reduce_window`, and fast in loops of one's own.

Axis letters: N examples, H height, W width, C input channels, F output channels (features), kernel KH x KW.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from fedjax_core import Array

Backend = Literal["auto", "dots", "native"]
Patches = Literal["auto", "rows", "full"]

# Row patches give matrix products of depth KW * C. Up to about this depth a product is too thin to run near
# the peak, and the KH times larger full patches pay for themselves: with batch 20 in a scan, 3x3 on 3 or 8
# channels and 5x5 on 1 channel are faster full (by 1.3 to 1.9), 5x5 on 8 and anything on 16 or more channels
# as rows.
_THIN = 32


def convolution(backend: Backend | Callable[..., Array] = "auto") -> Callable[..., Array]:
    """The convolution to hand to flax as `nn.Conv(conv_general_dilated=...)`.

    Args:
      backend: "auto" or "native" for `jax.lax.conv_general_dilated`, which a plan makes fast on a processor; "dots"
        for `dot_conv_general_dilated`; or a function with the signature of `jax.lax.conv_general_dilated`, returned as
        it is. The command line tries out dots on an accelerator for "auto"; a model does not see how many lanes it has.
    """
    if callable(backend):
        return backend
    if backend in ("auto", "native"):
        return lax.conv_general_dilated
    if backend == "dots":
        return dot_conv_general_dilated
    raise ValueError(f"convolution must be 'auto', 'dots', 'native' or a function, got {backend!r}.")


def dot_conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    patches: Patches = "auto",
) -> Array:
    """`jax.lax.conv_general_dilated` for two-dimensional NHWC images and HWIO kernels, as dots.

    Row patches hold, for each pixel, the KW neighbors in its row: [N, H, W', KW C], KW times the input. One
    dot per kernel row contracts them, and the KH results are added. Full patches (im2col) hold all KH KW
    neighbors and need one dot. Rows move less memory, full patches make the deeper product; see `_THIN`.

    Args:
      lhs: the images, [N, H, W, C].
      rhs: the kernel, [KH, KW, C, F].
      window_strides: (vertical, horizontal) stride.
      padding: "SAME", "SAME_LOWER", "VALID" or ((top, bottom), (left, right)), none of them negative.
      lhs_dilation: must be 1.
      rhs_dilation: must be 1.
      dimension_numbers: must mean ("NHWC", "HWIO", "NHWC"), as flax's do; None, for jax.lax, does not.
      feature_group_count: must be 1.
      batch_group_count: must be 1.
      precision: of the dots.
      preferred_element_type: of the dots.
      patches: "rows", "full" or "auto".

    Returns:
      [N, H', W', F].
    """
    if jnp.ndim(lhs) != 4 or jnp.ndim(rhs) != 4:
        raise ValueError(
            f"dot convolution takes images [N, H, W, C] and a kernel [KH, KW, C, F], got "
            f"shapes {jnp.shape(lhs)} and {jnp.shape(rhs)}; use convolution='native' for other ranks."
        )
    _check_supported(lhs, rhs, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count)
    N, H, W, C = lhs.shape
    KH, KW, kernel_channels, F = rhs.shape
    if kernel_channels != C:
        raise ValueError(
            f"the images have {C} channels and the kernel expects {kernel_channels}; make the last axis of "
            "the images and the third of the kernel agree."
        )
    if patches not in ("auto", "rows", "full"):
        raise ValueError(f"patches must be 'auto', 'rows' or 'full', got {patches!r}.")
    stride_h, stride_w = window_strides
    if isinstance(padding, str):
        padding = lax.padtype_to_pads((H, W), (KH, KW), (stride_h, stride_w), padding)
    (top, bottom), (left, right) = padding
    if min(top, bottom, left, right) < 0:
        raise ValueError(f"padding must not be negative, got {padding}; crop the images instead.")
    out_h = (H + top + bottom - KH) // stride_h + 1
    out_w = (W + left + right - KW) // stride_w + 1
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f"a {KH}x{KW} kernel does not fit images of {H}x{W} with padding {padding}; "
            "pad more or use a smaller kernel."
        )

    images = jnp.pad(lhs, ((0, 0), (top, bottom), (left, right), (0, 0)))
    rows = _shifted(images, 2, KW, stride_w, out_w)
    # Rows first, then rows of rows, is im2col in KH + KW slices instead of KH * KW: half the compile time.
    windows = _shifted_list(rows, 1, KH, stride_h, out_h)
    if patches == "full" or (patches == "auto" and KW * C <= _THIN):
        windows = [jnp.concatenate(windows, axis=3)]
    kernels = rhs.reshape(len(windows), -1, F)

    # Plain matrices, because XLA:CPU first transposes the operands of a dot that contracts or keeps more axes.
    def dot(window: Array, kernel: Array) -> Array:
        matrix = window.reshape(N * out_h * out_w, kernel.shape[0])
        return jnp.matmul(matrix, kernel, precision=precision, preferred_element_type=preferred_element_type)

    out = dot(windows[0], kernels[0])
    for window, kernel in zip(windows[1:], kernels[1:], strict=True):
        out = out + dot(window, kernel)
    return out.reshape(N, out_h, out_w, F)


def max_pool_2x2(x: Array) -> Array:
    """Maximum over 2x2 windows with stride 2, as `nn.max_pool`; [N, H, W, C] -> [N, H // 2, W // 2, C].

    Made of slices because the select-and-scatter of `reduce_window`'s gradient is slow on a CPU. Where entries of a
    window are equal the gradient is shared between them, half at each comparison, whereas `nn.max_pool` gives all of
    it to the first.
    """
    H, W = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = jnp.maximum(x[:, 0:H:2], x[:, 1:H:2])
    return jnp.maximum(x[:, :, 0:W:2], x[:, :, 1:W:2])


def _shifted_list(x: Array, axis: int, count: int, stride: int, length: int) -> list[Array]:
    """`count` views of `x`, view k being the `length` entries k, k + stride, ... of `axis`."""
    span = stride * (length - 1) + 1
    return [lax.slice_in_dim(x, k, k + span, stride, axis) for k in range(count)]


def _shifted(x: Array, axis: int, count: int, stride: int, length: int) -> Array:
    """Those views side by side on the channel axis."""
    views = _shifted_list(x, axis, count, stride, length)
    return views[0] if count == 1 else jnp.concatenate(views, axis=3)


def _check_supported(
    lhs: Array,
    rhs: Array,
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
) -> None:
    """Raise ValueError on what `lax.conv_general_dilated` can do and dots, here, cannot."""
    for name, dilation in (("lhs_dilation", lhs_dilation), ("rhs_dilation", rhs_dilation)):
        if dilation is not None and any(d != 1 for d in dilation):
            raise ValueError(
                f"dot convolution supports only {name} 1, got {tuple(dilation)}; use convolution='native'."
            )
    for name, count in (
        ("feature_group_count", feature_group_count),
        ("batch_group_count", batch_group_count),
    ):
        if count != 1:
            raise ValueError(f"dot convolution supports only {name} 1, got {count}; use convolution='native'.")
    layout = ("NHWC", "HWIO", "NHWC")
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    if numbers != lax.conv_dimension_numbers(lhs.shape, rhs.shape, layout):
        raise ValueError(
            f"dot convolution supports only dimension_numbers {layout}, got {dimension_numbers} (None means NCHW, "
            "as it does for jax.lax); pass them, or use convolution='native'."
        )
