"""Activations with dropout: schema, fake, autograd and the public functions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pynlp.ops.common.checks import check_dtype, check_tensor, prepare_dropout, promoted, rows_at_one_stride
from pynlp.ops.common.library import LIBRARY, define, refuse_double_backward, register_autograd
from pynlp.ops.common.plans import planned
from pynlp.reference.layers import activation as reference
from pynlp.reference.layers.activation import KINDS

define(
    "activation_forward",
    "(Tensor x, Tensor? up, int kind, float dropout_p, Tensor? dropout_seed) -> Tensor",
    reference,
    triton="layers.activation",
    dtype_of="x",
)
define(
    "activation_backward",
    "(Tensor grad, Tensor x, Tensor? up, int kind, float dropout_p, Tensor? dropout_seed) -> (Tensor, Tensor)",
    reference,
    triton="layers.activation",
    dtype_of="x",
)


@torch.library.register_fake("pynlp::activation_forward", lib=LIBRARY)
def _forward_fake(x, up, kind, dropout_p, dropout_seed):
    packed = KINDS[kind] == "swiglu" and up is None
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2 if packed else x.shape[-1]))


@torch.library.register_fake("pynlp::activation_backward", lib=LIBRARY)
def _backward_fake(grad, x, up, kind, dropout_p, dropout_seed):
    return x.new_empty(x.shape), x.new_empty(0 if up is None else x.shape)


def _setup_context(ctx, inputs, output):
    x, up, ctx.kind, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(x, up, seed)


def _backward(ctx, saved, needs, grad):
    x, up, seed = saved
    grad_x, grad_up = _activation_backward(rows_at_one_stride(grad), x, up, ctx.kind, ctx.dropout_p, seed)
    return grad_x, None if up is None else grad_up, None, None, None


_activation_forward = register_autograd("activation_forward", _setup_context, _backward)
_activation_backward = refuse_double_backward("activation_backward", "pynlp's activations have")


@planned
def gelu(x: Tensor, *, dropout_p: float = 0.0, seed: int | Tensor | None = None) -> Tensor:
    """dropout(x * Phi(x)), Phi the normal distribution's: the exact GELU, in one pass.

    Args:
        x: `(.., dim)`; fp32, bf16, fp16 (fp64 on the reference).
        dropout_p: Share of the result that is set to 0, in steps of 1/65536; the rest is divided by the share kept.
        seed: Which values: an int, or an int64 tensor of one value; drawn from torch's generator by default. The same
            seed drops the same values on every back end, and again in backward. Philox; Salmon et al., SC 2011.

    Returns:
        `(.., dim)` in x's dtype. The same bits for every run and any number of threads, forward and backward.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range is off; the message names it.

    Source: Hendrycks and Gimpel, arXiv 1606.08415; dropout: Srivastava et al., JMLR 15, 2014.

    Example:
        >>> import torch
        >>> from pynlp.functional import gelu
        >>> x = torch.randn(4, 256, requires_grad=True)
        >>> y = gelu(x, dropout_p=0.1, seed=1)
        >>> torch.equal(y, gelu(x, dropout_p=0.1, seed=1))
        True
        >>> y.sum().backward()
    """
    return _activation("x", x, None, "gelu", dropout_p, seed)


@planned
def relu(x: Tensor, *, dropout_p: float = 0.0, seed: int | Tensor | None = None) -> Tensor:
    """dropout(max(x, 0)), in one pass. Arguments, result and errors are those of `gelu`.

    Without dropout, where nothing is fused, it is F.relu.

    Example:
        >>> import torch
        >>> from pynlp.functional import relu
        >>> relu(torch.tensor([-1.0, 0.5])).tolist()
        [0.0, 0.5]
    """
    return _activation("x", x, None, "relu", dropout_p, seed)


@planned
def swiglu(
    gate: Tensor, up: Tensor | None = None, *, dropout_p: float = 0.0, seed: int | Tensor | None = None
) -> Tensor:
    """dropout(silu(gate) * up), in one pass.

    Args:
        gate: `(.., dim)`; or `(.., 2 * dim)`, gate and up side by side, as one projection gives them.
        up: `(.., dim)`, like gate; None where gate has both.
        dropout_p, seed, result and errors: those of `gelu`.

    Source: Shazeer, arXiv 2002.05202.

    Example:
        >>> import torch
        >>> from pynlp.functional import swiglu
        >>> gate, up = torch.randn(2, 4, 256)
        >>> torch.allclose(swiglu(gate, up), torch.nn.functional.silu(gate) * up, atol=1e-6)
        True
        >>> swiglu(torch.randn(4, 512)).shape  # gate and up side by side
        torch.Size([4, 256])
    """
    check_dtype("gate", gate)
    if up is not None:
        gate, up = promoted(gate, up)
        check_tensor("up", up, gate, [tuple(gate.shape)], of="gate")
        if up.dtype != gate.dtype:
            raise TypeError(f"up: expected gate's dtype {gate.dtype}, got {up.dtype}")
        up = rows_at_one_stride(up)
    elif gate.dim() == 0 or gate.shape[-1] % 2:
        raise ValueError(f"gate: expected shape (.., 2 * dim) without up, got {tuple(gate.shape)}")
    return _activation("gate", gate, up, "swiglu", dropout_p, seed)


def _activation(name: str, x: Tensor, up: Tensor | None, kind: str, dropout_p: float, seed: int | Tensor | None):
    check_dtype(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name}: expected shape (.., dim), got a tensor without dimensions")
    dropout_p, seed = prepare_dropout(dropout_p, seed, x, of=name)
    if kind == "relu" and not dropout_p:
        return F.relu(x)
    return _activation_forward(rows_at_one_stride(x), up, KINDS.index(kind), dropout_p, seed)
