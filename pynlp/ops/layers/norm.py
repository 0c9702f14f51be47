"""Dropout, residual and normalisation in one pass: schema, fake, autograd and the public functions."""

import torch
from torch import Tensor

from pynlp.ops.common.checks import (
    as_fp32,
    check_dtype,
    check_number,
    check_tensor,
    prepare_dropout,
    promoted,
    rows_at_one_stride,
)
from pynlp.ops.common.library import LIBRARY, define, refuse_double_backward, register_autograd
from pynlp.ops.common.plans import planned
from pynlp.reference.layers import norm as reference

define(
    "norm_forward",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, bool centred, float eps, "
    "float dropout_p, Tensor? dropout_seed) -> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    triton="layers.norm",
    dtype_of="x",
)
define(
    "norm_backward",
    "(Tensor grad_y, Tensor? grad_new, Tensor new, Tensor weight, Tensor mean, Tensor rstd, bool centred, "
    "float dropout_p, Tensor? dropout_seed, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    triton="layers.norm",
    dtype_of="grad_y",
)


@torch.library.register_fake("pynlp::norm_forward", lib=LIBRARY)
def _forward_fake(x, residual, weight, bias, centred, eps, dropout_p, dropout_seed):
    rows = x.shape[:-1]
    new = x.new_empty(0)
    if residual is not None:
        new = residual.new_empty(x.shape)
    elif dropout_p > 0:
        new = x.new_empty(x.shape)
    return x.new_empty(x.shape), new, weight.new_empty(rows if centred else (0,)), weight.new_empty(rows)


@torch.library.register_fake("pynlp::norm_backward", lib=LIBRARY)
def _backward_fake(grad_y, grad_new, new, weight, mean, rstd, centred, dropout_p, dropout_seed, needs_bias):
    separate = dropout_p > 0 or new.dtype != grad_y.dtype
    grad_x = grad_y.new_empty(new.shape if separate else (0,))
    return (
        new.new_empty(new.shape),
        grad_x,
        torch.empty_like(weight),
        weight.new_empty(weight.shape if needs_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, centred, _, ctx.dropout_p, seed = inputs
    _, new, mean, rstd = output
    ctx.save_for_backward(new if new.shape == x.shape else x, weight, mean, rstd, seed)
    ctx.centred, ctx.dtype = centred, x.dtype
    ctx.has_residual, ctx.has_bias = residual is not None, bias is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, saved, needs, grad_y, grad_new, *_):
    new, weight, mean, rstd, seed = saved
    grad_y = new.new_zeros(new.shape, dtype=ctx.dtype) if grad_y is None else rows_at_one_stride(grad_y)
    if grad_new is not None:  # of the empty one that is returned where new is x: nothing
        grad_new = rows_at_one_stride(grad_new) if grad_new.shape == new.shape else None
    grad_residual, grad_x, grad_weight, grad_bias = _norm_backward(
        grad_y, grad_new, new, weight, mean, rstd,
        ctx.centred, ctx.dropout_p, seed, ctx.has_bias,
    )  # fmt: skip
    return (
        grad_x if grad_x.shape == new.shape else grad_residual,
        grad_residual if ctx.has_residual else None,
        grad_weight,
        grad_bias if ctx.has_bias else None,
        *[None] * 4,
    )


_norm_forward = register_autograd("norm_forward", _setup_context, _backward)
_norm_backward = refuse_double_backward("norm_backward", "pynlp's norms have")


@planned
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation of residual + dropout(x), in one pass: `(new - mean) / sqrt(variance + eps) * weight + bias`.

    Args:
        x: `(.., dim)`; fp32, bf16, fp16 (fp64 on the reference).
        weight, bias: `(dim,)`, of any floating-point dtype.
        residual: As x, in its dtype or, where that is narrower, in fp32; 0 by default.
        dropout_p: Share of x that is set to 0, in steps of 1/65536; the rest is divided by the share that is kept.
        seed: Which values: an int, or an int64 tensor of one value; drawn from torch's generator by default. The same
            seed drops the same values on every back end, and again in backward. Philox; Salmon et al., SC 2011.
        eps: Added to the variance.

    Returns:
        y `(.., dim)` in x's dtype; with a residual `(y, new)`, new = residual + dropout(x) in the residual's dtype.
        The same bits for every run and any number of threads, forward and backward.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range is off; the message names it.

    Source: Ba et al., arXiv 1607.06450; dropout: Srivastava et al., JMLR 15, 2014.

    Example:
        >>> import torch
        >>> from pynlp.functional import layer_norm
        >>> x, residual = torch.randn(2, 4, 10, 64)
        >>> y = layer_norm(x, torch.ones(64), torch.zeros(64))
        >>> y, new = layer_norm(x, torch.ones(64), torch.zeros(64), residual=residual)
        >>> torch.equal(new, residual + x)
        True
    """
    return _norm(x, weight, bias, residual, True, eps, dropout_p, seed)


@planned
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation of residual + dropout(x), in one pass: `new / sqrt(mean(new^2) + eps) * weight`.

    Arguments, results and errors are those of `layer_norm`.

    Source: Zhang and Sennrich, arXiv 1910.07467.

    Example:
        >>> import torch
        >>> from pynlp.functional import rms_norm
        >>> x = torch.randn(4, 10, 64)
        >>> torch.allclose(rms_norm(x, torch.ones(64)), torch.nn.functional.rms_norm(x, (64,), eps=1e-6), atol=1e-5)
        True
    """
    return _norm(x, weight, None, residual, False, eps, dropout_p, seed)


def _norm(x, weight, bias, residual, centred, eps, dropout_p, seed):
    check_dtype("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (.., dim) with a dim of at least 1, got {tuple(x.shape)}")
    check_tensor("weight", weight, x, [(x.shape[-1],)], of="x")
    if bias is not None:
        check_tensor("bias", bias, x, [(x.shape[-1],)], of="x")
    if residual is not None:
        check_tensor("residual", residual, x, [tuple(x.shape)], of="x")
        residual = promoted(x, residual)[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        if residual.dtype not in (x.dtype, wide):
            expected = f"{x.dtype}" if x.dtype == wide else f"{x.dtype} or float32"
            raise TypeError(f"residual: expected x's dtype {expected}, got {residual.dtype}")
        residual = rows_at_one_stride(residual)
    check_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    y, new, _, _ = _norm_forward(
        rows_at_one_stride(x), residual, as_fp32(weight, x), None if bias is None else as_fp32(bias, x),
        centred, eps, *prepare_dropout(dropout_p, seed, x, of="x"),
    )  # fmt: skip
    return y if residual is None else (y, new)
