"""flash-attn's rotary embedding, apart from attention."""

import torch
from torch import Tensor

from pynlp.integrations.flash_attn.arguments import may_have_padding, sequence_and_place
from pynlp.integrations.names import in_own_names
from pynlp.ops.attention import checks
from pynlp.ops.common.checks import check
from pynlp.reference.attention.attention import rotate
from pynlp.reference.common.dtypes import compute


@in_own_names(q="x", rotary="cos", rotary_tables="cos", rotary_cos="cos", rotary_sin="sin")
def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x with its first rotary_dim channels turned by the angles of their positions.

    Args:
        x: `(batch, seqlen, heads, head_dim)`, or with `cu_seqlens` `(total, heads, head_dim)`.
        cos, sin: `(positions, rotary_dim / 2)` with rotary_dim <= head_dim, see `rotary_tables`; they get no gradients.
        interleaved: Pairs are channels (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        inplace: Write the result to x, which may be a leaf that requires a gradient. Use what is returned: gradients
            flow through that, and not through x.
        seqlen_offsets: Position of each sequence's first token: an int, or int32 `(batch,)`.
        cu_seqlens: int32 `(batch + 1,)`, where packed sequences start and end; rows behind the last stay as they are.
        max_seqlen: The longest packed sequence, or more. Not needed.

    Returns:
        x's shape and dtype, computed in fp32.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range is off; the message names it. A position
            beyond the tables is one too; there, tokens at such positions stay as they are.

    Source: Su et al., arXiv 2104.09864.

    Example:
        >>> import torch
        >>> from pynlp.integrations.flash_attn import apply_rotary_emb
        >>> from pynlp.functional import rotary_tables
        >>> cos, sin = rotary_tables(128, 64)
        >>> apply_rotary_emb(torch.randn(2, 100, 8, 64), cos, sin).shape
        torch.Size([2, 100, 8, 64])
    """
    layout = "(batch, seqlen, heads, head_dim)" if cu_seqlens is None else "(total, heads, head_dim)"
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"x: expected {layout.count(',') + 1} dimensions {layout}, got {tuple(x.shape)}")
    tables = checks.prepare_tables((cos.detach(), sin.detach()), x)
    if cu_seqlens is None:
        return _Rotary.apply(x, *_padded_rows(tables, x, seqlen_offsets), interleaved, inplace)
    cos, sin = _packed_rows(tables, x, seqlen_offsets, cu_seqlens, max_seqlen)
    return _Rotary.apply(x[None], cos, sin, interleaved, inplace)[0]


class _Rotary(torch.autograd.Function):
    """x (B, S, H, D) turned by the angles of each token (B or 1, S, rotary_dim / 2); keeps nothing but the angles."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved, inplace):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        turned = turn(x, cos, sin, interleaved)
        # Without mark_dirty, which would refuse leaves and views of them; flash-attn takes both.
        return x.copy_(turned) if inplace else turned

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin, ctx.interleaved), None, None, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, S, H, D) with its first channels turned, computed in fp32 (fp64 for fp64) and rounded once."""
    return rotate(compute(x), cos, sin, interleaved).to(x.dtype)


def _padded_rows(tables: tuple[Tensor, Tensor], x: Tensor, offsets: int | Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each token of x (B, S, H, D): (B or 1, S, rotary_dim / 2)."""
    batch, seqlen = x.shape[:2]
    if isinstance(offsets, Tensor):
        checks.check_integers("seqlen_offsets", offsets, (batch,), x)
        return angles_at(tables, offsets[:, None] + torch.arange(seqlen, device=x.device))
    cos, sin = tables
    if offsets < 0 or offsets + seqlen > cos.shape[0]:
        raise ValueError(
            f"seqlen_offsets: expected positions within cos, 0 to {cos.shape[0] - 1}, "
            f"got {offsets} to {offsets + seqlen - 1}"
        )
    return cos[None, offsets : offsets + seqlen], sin[None, offsets : offsets + seqlen]


def _packed_rows(
    tables: tuple[Tensor, Tensor], x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    """cos and sin of each token of x (total, H, D): (1, total, rotary_dim / 2)."""
    checks.check_cu_seqlens("cu_seqlens", cu_seqlens, x.shape[0], "max_seqlen", max_seqlen, x, padded=True)
    batch = cu_seqlens.shape[0] - 1
    sequence, position = sequence_and_place(checks.int32(cu_seqlens), x.shape[0])
    if isinstance(offsets, Tensor):
        checks.check_integers("seqlen_offsets", offsets, (batch,), x)
        offsets = torch.nn.functional.pad(offsets, (0, 1))[sequence]
    if not may_have_padding(cu_seqlens, x.shape[0]):
        return angles_at(tables, (position + offsets)[None])
    behind = sequence == batch  # turned by no angle
    cos, sin = angles_at(tables, (position + offsets).masked_fill(behind, 0)[None])
    return cos.masked_fill(behind[:, None], 1.0), sin.masked_fill(behind[:, None], 0.0)


def angles_at(tables: tuple[Tensor, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin at these positions (B or 1, S): (B or 1, S, rotary_dim / 2)."""
    cos, sin = tables
    if positions.numel():
        first, last = torch.aminmax(positions)
        check(
            (first >= 0) & (last < cos.shape[0]),
            "rotary tables: expected positions within cos and sin",
            lambda: f"got {first.item()} to {last.item()} in tables of {cos.shape[0]}",
        )
    return cos[positions], sin[positions]
