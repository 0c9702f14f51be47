"""Cross-entropy fused with the projection to the vocabulary: schema, fake, autograd and the public function."""

import torch
from torch import Tensor

from pynlp.ops.common.checks import (
    as_fp32,
    autocast,
    check_dtype,
    check_is_tensor,
    check_not_negative,
    check_range,
    check_share,
    check_tensor,
    rows_at_one_stride,
)
from pynlp.ops.common.library import LIBRARY, define, refuse_further, register_autograd
from pynlp.reference.common.dtypes import compute_dtype
from pynlp.reference.layers import loss as reference

REDUCTIONS = ("mean", "sum", "none")


define(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? row_scale, "
    "bool needs_x, bool needs_weight, bool needs_bias, "
    "float label_smoothing, int ignore_index, float softcap, float z_loss) -> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    triton="layers.loss",
    dtype_of="x",
)


@torch.library.register_fake("pynlp::linear_cross_entropy", lib=LIBRARY)
def _fake(x, weight, bias, target, row_scale, needs_x, needs_weight, needs_bias, *options):
    exact = compute_dtype(x)
    return (
        x.new_empty(target.shape if row_scale is None else (), dtype=exact),
        x.new_empty(x.shape if needs_x else (0,), dtype=reference.gradient_dtype(x)),
        weight.new_empty(weight.shape if needs_weight else (0,), dtype=reference.gradient_dtype(weight)),
        x.new_empty(weight.shape[:1] if needs_bias else (0,), dtype=exact),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, target, row_scale, *_, smoothing, ignore_index, softcap, z_loss = inputs
    _, *gradients = output
    ctx.weighted = row_scale is not None
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(*(output if ctx.weighted else (x, weight, bias, target)))
    ctx.options = smoothing, ignore_index, softcap, z_loss
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)


def _backward(ctx, saved, needs, grad, *_):
    needs = needs[:3]  # of x, weight and bias
    if grad is None:
        return (None,) * 12
    if ctx.weighted:  # computed in forward, but for a factor
        loss, *gradients = saved
    else:
        loss, *gradients = _linear_cross_entropy(*saved, grad.contiguous(), *needs, *ctx.options)
    if torch.is_grad_enabled():  # the loss, which depends on all, says whether there is more to differentiate
        gradients = [refuse_further("pynlp's linear_cross_entropy has", x, loss) for x in gradients]
    if ctx.weighted:
        gradients = [x * grad if needed else None for x, needed in zip(gradients, needs, strict=True)]
    gradients = [x.to(dtype) if needed else None for x, dtype, needed in zip(gradients, ctx.dtypes, needs, strict=True)]
    return (*gradients, *[None] * 9)


_linear_cross_entropy = register_autograd("linear_cross_entropy", _setup_context, _backward)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of `softcap(x @ weight.T + bias)` and target; the logits of all rows are never in memory.

    Gradients are computed in forward, chunk by chunk of the rows, while their logits are at hand; with `"none"`, whose
    weighting is not known then, in backward.

    Args:
        x: Hidden states `(.., dim)`; fp32, bf16, fp16 (fp64 on the reference), in autocast its dtype.
        weight: `(vocabulary, dim)`, in x's dtype or in fp32, whose products are then those of x's dtype; its gradient
            is summed up in fp32.
        target: int64 `(..)`, 0 to vocabulary - 1, or ignore_index.
        bias: `(vocabulary,)`.
        label_smoothing: Share of the target that is spread over the vocabulary. Szegedy et al., arXiv 1512.00567.
        ignore_index: A target that does not count.
        softcap: c > 0 turns a logit s into `c * tanh(s / c)` (Gemma 2, arXiv 2408.00118).
        z_loss: Factor of the squared log-sum-exp of the logits, which is added (PaLM, arXiv 2204.02311).
        reduction: "mean" over the targets that count (0 where none does), "sum", or "none".

    Returns:
        fp32: one value, or `(..)` with "none". The same bits for every run and any number of threads.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range is off; the message names it.

    Source: Liger Kernel (Hsu et al., arXiv 2410.10989); Cut Cross-Entropy (Wijmans et al., arXiv 2411.09009).

    Example:
        >>> import torch
        >>> from pynlp.functional import linear_cross_entropy
        >>> x = torch.randn(4, 10, 64, requires_grad=True)  # hidden states of 4 rows of 10 tokens
        >>> vocabulary = torch.randn(1000, 64, requires_grad=True)
        >>> loss = linear_cross_entropy(x, vocabulary, torch.randint(1000, (4, 10)), label_smoothing=0.1)
        >>> loss.backward()
        >>> vocabulary.grad.shape
        torch.Size([1000, 64])
    """
    check_dtype("x", x)
    check_is_tensor("weight", weight)
    check_is_tensor("target", target)
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (.., dim) with a dim of at least 1, got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape (vocabulary, {x.shape[-1]}), got {tuple(weight.shape)}")
    check_tensor("weight", weight, x, [(weight.shape[0], x.shape[-1])], of="x")
    (x,) = autocast(x)
    if weight.dtype != torch.float32:  # sums of the gradient stay in fp32 where the weight is
        (weight,) = autocast(weight)
    if weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"weight: expected x's dtype {x.dtype} or float32, got {weight.dtype}")
    if bias is not None:
        check_tensor("bias", bias, x, [(weight.shape[0],)], of="x")
        bias = as_fp32(bias, x)
    if target.shape != x.shape[:-1]:
        raise ValueError(f"target: expected shape {tuple(x.shape[:-1])}, got {tuple(target.shape)}")
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected dtype int64, got {target.dtype}")
    if target.device != x.device:
        raise ValueError(f"target: expected x's device {x.device}, got {target.device}")
    check_share("label_smoothing", label_smoothing)
    check_not_negative("softcap", softcap)
    check_not_negative("z_loss", z_loss)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | torch.SymInt):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    target = target.contiguous()
    counts = target != ignore_index
    check_range("target", target.where(counts, 0), 0, weight.shape[0] - 1)
    row_scale, needs = None, [False] * 3
    if reduction != "none":
        row_scale = counts.to(compute_dtype(x))
        if reduction == "mean":
            row_scale = row_scale / counts.sum().clamp_min(1)
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    return _linear_cross_entropy(
        rows_at_one_stride(x), rows_at_one_stride(weight), bias, target, row_scale, *needs,
        label_smoothing, ignore_index, softcap, z_loss,
    )[0]  # fmt: skip
