"""The weights that attention gives to its keys, for plots and checks: schema, fake and the public function."""

import torch
from torch import Tensor

from pynlp.ops.attention import checks
from pynlp.ops.attention.attention import OPTIONS
from pynlp.ops.common.checks import as_fp32, autocast, check_is_tensor, check_range, check_tensor, rows_in_place
from pynlp.ops.common.library import LIBRARY, define, refuse_derivatives
from pynlp.reference.attention import weights as reference
from pynlp.reference.common.dtypes import compute_dtype

define(
    "attention_weights",
    f"(Tensor q, Tensor k, Tensor? rows, Tensor? lse, {OPTIONS}) -> Tensor",
    reference,
    triton="attention.weights",
    dtype_of="q",
)


@torch.library.register_fake("pynlp::attention_weights", lib=LIBRARY)
def _weights_fake(q, k, rows, lse, *options):
    count = q.shape[1] if rows is None else rows.shape[0]
    return q.new_empty((q.shape[0], q.shape[2], count, k.shape[1]), dtype=compute_dtype(q))


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    rows: Tensor | None = None,
    lse: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_max_distance: int = 128,
    relative_bidirectional: bool | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
    rotary_offset: int | Tensor = 0,
    softcap: float = 0.0,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """The weights by which `attention` sums up the values: softmax(scores) of chosen queries, before any dropout.

    No gradients. Memory grows with rows x seqlen_k: for plots and checks, and for the rows that one looks at.

    Args:
        q, k: As in `attention`.
        rows: int32 or int64 `(rows,)`, which queries, in any order; all by default.
        lse: What `attention(..., return_lse=True)` gave for the same arguments; it spares a pass over the keys.
        The others: as in `attention`.

    Returns:
        `(batch, heads, rows, seqlen_k)`, fp32 (fp64 for fp64). A row adds up to 1; to less with sinks, to 0 where a
        query sees no key.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range is off; the message names it.

    Example:
        >>> import torch
        >>> from pynlp.functional import attention_weights
        >>> q, k = torch.randn(2, 1, 50, 8, 64).unbind(0)
        >>> weights = attention_weights(q, k, causal=True, rows=torch.tensor([0, 49]))  # first query, last query
        >>> weights.shape
        torch.Size([1, 8, 2, 50])
        >>> weights[0, 0, 0, :3].tolist()
        [1.0, 0.0, 0.0]
    """
    q, k = autocast(q, k)
    checks.check_queries_keys_values(q, k, k)
    batch, seqlen_q, heads, head_dim = q.shape
    if rows is not None:
        check_is_tensor("rows", rows)
        checks.check_integers("rows", rows, (rows.numel(),), q)
        check_range("rows", rows, 0, seqlen_q - 1)
        rows = checks.int32(rows)
    if lse is not None:
        check_tensor("lse", lse, q, [(batch, heads, seqlen_q)])
        lse = as_fp32(lse, q)
    table, buckets = checks.prepare_relative(relative_bias, relative_max_distance, relative_bidirectional, causal, q)
    refuse_derivatives("attention_weights", q, k, lse, sinks, alibi_slopes, table)
    with torch.no_grad():
        return torch.ops.pynlp.attention_weights(
            *map(rows_in_place, (q, k)), rows, lse,
            checks.prepare_scale(softmax_scale, head_dim), *checks.prepare_window(window, causal),
            checks.check_softcap(softcap), checks.prepare_key_lengths(key_lengths, q, batch, k.shape[1]), None, None,
            checks.prepare_sinks(sinks, q), checks.prepare_slopes(alibi_slopes, q, batch), table, buckets,
            *checks.prepare_rotary(rotary, rotary_offset, q, k.shape[1]), rotary_interleaved, 0.0, None,
        )  # fmt: skip
