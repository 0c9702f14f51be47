"""What the tests of the Triton launchers share: cases, poisoned inputs, guarded outputs, and the criterion.

Every input lies in a sea of NaN (padding between rows and heads, keys beyond key_lengths, unused table rows), and every
tensor the launcher allocates is poisoned and has guard zones, so that a stray read or write shows.
"""

import contextlib

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
triton = pytest.importorskip("triton")

from cases import interpreter  # noqa: E402
from pynlp.kernels.attention import launch as attention  # noqa: E402

from pynlp.functional import relative_position_buckets  # noqa: E402
from pynlp.reference.attention import attention as reference  # noqa: E402
from pynlp.reference.attention.attention import Options  # noqa: E402
from pynlp.reference.common.random import attention_keeps, dropped_parts  # noqa: E402

if not GPU:
    for function in (attention.attention_forward_kernel, triton.language.sum):
        if type(function).__name__ != "InterpretedFunction":
            raise RuntimeError("Triton was imported before conftest.py chose its interpreter: set TRITON_INTERPRET=1")
    interpreter.hasten()

GUARD = 64  # elements
ZONE = 0x5A  # what guards integers
NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_slopes", "grad_table", "grad_sinks")


def in_a_sea_of_nan(x: torch.Tensor) -> torch.Tensor:
    """x with NaN around every row of the last dimension, strides that TMA can read, and a contiguous last dimension."""
    wider = [size + 1 for size in x.shape[:-1]] + [(x.shape[-1] // 8 + 2) * 8]
    sea = torch.full([2, *wider], torch.nan, dtype=x.dtype, device=x.device)[1]
    view = sea[tuple(slice(0, size) for size in x.shape)]
    view.copy_(x)
    return view


class GuardedAllocations:
    """torch.empty and torch.zeros with guard zones; what is empty starts as NaN, or of integers as ZONE."""

    def __init__(self):
        self.zones = []

    def _allocate(self, shape, value, dtype, device):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = torch.Size(shape).numel()
        # Guards of NaN show a stray read too; their bits are compared.
        guard = torch.nan if dtype.is_floating_point else ZONE
        flat = torch.full((size + 2 * GUARD,), guard, dtype=dtype, device=device)
        flat[GUARD : GUARD + size] = guard if value != value else value
        self.zones.append((flat, size))
        return flat[GUARD : GUARD + size].view(shape)

    @contextlib.contextmanager
    def active(self):
        empty, zeros, like = torch.empty, torch.zeros, torch.empty_like
        torch.empty = lambda shape, *, dtype, device: self._allocate(shape, torch.nan, dtype, device)
        torch.zeros = lambda shape, *, dtype, device: self._allocate(shape, 0.0, dtype, device)
        torch.empty_like = lambda x: self._allocate(x.shape, torch.nan, x.dtype, x.device)
        try:
            yield self
        finally:
            torch.empty, torch.zeros, torch.empty_like = empty, zeros, like

    def check(self):
        assert self.zones
        for flat, size in self.zones:
            bits, guard = flat, ZONE
            if flat.dtype.is_floating_point:
                bits, guard = flat.view(torch.int32 if flat.dtype == torch.float32 else torch.int16), torch.nan
            clean = torch.full((GUARD,), guard, dtype=flat.dtype, device=flat.device).view(bits.dtype)
            for guard in (bits[:GUARD], bits[GUARD + size :]):
                assert torch.equal(guard, clean), "a write outside an output"


def guarded(run, *arguments):
    """The results of a launcher whose allocations are guarded."""
    allocations = GuardedAllocations()
    with allocations.active():
        results = run(*arguments)
    allocations.check()
    return results


def tiles(monkeypatch, forward=(16, 32, 16), queries=(16, 16), keys=(16, 32), descriptors=False, piece=256):
    """Small tiles, so that small shapes reach every loop; on a GPU the launcher's own."""
    if GPU:
        return

    def config(block_m, block_n, masked=0):
        return attention.Config(block_m, block_n, 1, 1, descriptors, masked, precision="ieee", piece=piece)

    small = dict(forward=config(*forward), queries=config(*queries), table=config(*queries), keys=config(*keys))
    monkeypatch.setattr(attention, "configs", lambda kernel, *_: [small[kernel]])


def make_case(
    batch=None, seqlen_q=37, seqlen_k=70, heads=2, kv_heads=1, head_dim=20, head_dim_v=None, window=(-1, -1),
    softcap=0.0, lengths=None, packed=None, sinks=False, slopes=None, table=False, rotary_dim=0, interleaved=False,
    position_ids=False, offset=0, dropout=0.0, scale=None, max_distance=12, grad_lse=True, dtype=torch.float32, seed=0,
):  # fmt: skip
    """(q, k, v, grad_out, grad_lse) and the options of attention_forward, everything finite.

    packed: the numbers of queries and of keys of each sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    if batch is None:
        batch = 2 if lengths or slopes == 2 or position_ids else 1
    sequences, positions = batch, seqlen_k
    cu_seqlens = [None, None]
    if packed:
        batch, sequences, positions = 1, len(packed), max(keys for _, keys in packed)
        cu_seqlens = [torch.tensor([0, *n], device=DEVICE).cumsum(0).int() for n in zip(*packed, strict=True)]
        seqlen_q, seqlen_k = (int(cu[-1]) for cu in cu_seqlens)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    head_dim_v = head_dim_v or head_dim
    q = normal(batch, seqlen_q, heads, head_dim)
    k = normal(batch, seqlen_k, kv_heads, head_dim)
    v = normal(batch, seqlen_k, kv_heads, head_dim_v)
    grad_out = normal(batch, seqlen_q, heads, head_dim_v)
    grad = normal(batch, heads, seqlen_q).float() if grad_lse else None
    alibi = bias = buckets = cos = sin = ids = None
    if slopes:
        alibi = torch.rand((heads,) if slopes == 1 else (sequences, heads), generator=generator).to(DEVICE) * 0.3
    if table:
        bias = torch.randn(8, heads, generator=generator).to(DEVICE)
        buckets = relative_position_buckets(8, max_distance, window[1] != 0, DEVICE)
    if rotary_dim:
        angle = torch.rand(positions + offset + 5, rotary_dim // 2, generator=generator).to(DEVICE) * 6
        cos, sin = angle.cos(), angle.sin()
        cos[positions + offset :] = sin[positions + offset :] = torch.nan  # rows that no key needs
        if position_ids:
            size = (batch, seqlen_k)
            ids = torch.randint(0, positions, size, generator=generator, dtype=torch.int32).to(DEVICE)
    options = Options(
        softmax_scale=head_dim**-0.5 if scale is None else scale,
        window_left=window[0],
        window_right=window[1],
        softcap=softcap,
        key_lengths=None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        cu_seqlens_q=cu_seqlens[0],
        cu_seqlens_k=cu_seqlens[1],
        sinks=torch.randn(heads, generator=generator).to(DEVICE) if sinks else None,
        alibi_slopes=alibi,
        relative_bias=bias,
        relative_buckets=buckets,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_positions=ids,
        rotary_offset=offset,
        rotary_interleaved=interleaved,
        dropout_p=dropout,
        dropout_seed=torch.tensor([-(3**37)], device=DEVICE) if dropout else None,
    )
    return [q, k, v, grad_out, grad], options


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def needs(options):
    """Which gradients of biases are asked for: of all there are."""
    return [x is not None for x in (options.alibi_slopes, options.relative_bias, options.sinks)]


def sequences_of(tensors, options):
    """(number, slices of the rows of q and of k) of each packed sequence, or of each entry of the batch."""
    q, k, *_ = tensors
    if options.cu_seqlens_q is None:
        return [(i, (i, slice(None)), (i, slice(None))) for i in range(q.shape[0])]
    starts = [cu.tolist() for cu in (options.cu_seqlens_q, options.cu_seqlens_k)]
    return [(i, *((0, slice(cu[i], cu[i + 1])) for cu in starts)) for i in range(len(starts[0]) - 1)]


def run_kernels(tensors, options):
    """The launchers on poisoned inputs and guarded outputs: (out, lse, *gradients)."""
    q, k, v, grad_out, grad_lse = [x if x is None else in_a_sea_of_nan(x) for x in tensors]
    if options.key_lengths is not None:
        for i, _, keys in sequences_of(tensors, options):
            for x in (k, v):
                x[keys][options.key_lengths[i] :] = torch.nan
    allocations = GuardedAllocations()
    with allocations.active():
        out, lse = attention.attention_forward(q, k, v, *options)
        gradients = attention.attention_backward(grad_out, grad_lse, q, k, v, out, lse, *options, *needs(options))
    allocations.check()
    return out, lse, *gradients


def oracle(tensors, options):
    """The same from the reference in fp64."""
    q, k, v, grad_out, grad_lse = map(double, tensors)
    options = Options(*map(double, options))
    out, lse = reference.attention_forward(q, k, v, *options)
    gradients = reference.attention_backward(grad_out, grad_lse, q, k, v, out, lse, *options, *needs(options))
    return out, lse, *gradients


def plain_pytorch(tensors, options):
    """What PyTorch's own operators and autograd give in the inputs' dtype: their error is the measure."""
    *leaves, grad_out, grad_lse = tensors
    leaves += [options.alibi_slopes, options.relative_bias, options.sinks]
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in leaves]
    q, k, v, slopes, bias, sinks = leaves
    options = options._replace(alibi_slopes=slopes, relative_bias=bias, sinks=sinks)
    results = []
    for i, queries, keys in sequences_of(tensors, options):
        lengths, positions = options.key_lengths, options.rotary_positions
        own = options._replace(
            key_lengths=None if lengths is None else lengths[i],
            alibi_slopes=slopes[i] if slopes is not None and slopes.dim() == 2 else slopes,
            rotary_positions=None if positions is None else positions[keys].long(),
        )
        results.append(plain_sequence(q[queries], k[keys], v[keys], own, i))
    out, lse, empty = ([result[n] for result in results] for n in range(3))
    if options.cu_seqlens_q is None:
        out, lse, empty = map(torch.stack, (out, lse, empty))
    else:
        out, lse, empty = torch.cat(out)[None], torch.cat(lse, dim=1)[None], torch.cat(empty, dim=1)[None]
    loss = (out * grad_out).sum()
    if grad_lse is not None:
        loss = loss + (lse.masked_fill(empty, 0.0) * grad_lse).sum()
    needed = [x for x in leaves if x is not None]
    gradients = iter(torch.autograd.grad(loss, needed))
    gradients = [next(gradients) if x is not None else torch.empty(0) for x in leaves]
    return out, lse.masked_fill(empty, -torch.inf), *gradients


def plain_sequence(q, k, v, options, i):
    """out (Sq, H, Dv), lse (H, Sq), and whether a row sees nothing (H, Sq), of sequence i."""
    dtype, (seqlen_q, heads, _), seqlen_k = q.dtype, q.shape, k.shape[0]
    if options.rotary_cos is not None:
        key = options.rotary_positions
        place = torch.arange(seqlen_q, device=k.device) + seqlen_k - seqlen_q
        if key is None:
            key, query = torch.arange(seqlen_k, device=k.device) + options.rotary_offset, place + options.rotary_offset
        else:
            query = key[place]
        tables = options.rotary_cos, options.rotary_sin
        q, k = (
            reference.rotate(x[None], *(table[None, at] for table in tables), options.rotary_interleaved)[0]
            for x, at in ((q, query), (k, key))
        )
    keys, values = (x.repeat_interleave(heads // k.shape[1], dim=1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ keys.transpose(1, 2) * options.softmax_scale
    if options.softcap > 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    distance = reference.relative_distance(seqlen_q, seqlen_k, q.device)
    if options.alibi_slopes is not None:
        scores = scores - (options.alibi_slopes[:, None, None] * distance.abs()).to(dtype)
    if options.relative_bias is not None:
        bucket = reference.bucket_of(distance, options.relative_buckets)
        scores = scores + options.relative_bias[bucket].permute(2, 0, 1).to(dtype)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if options.window_left >= 0:
        visible = visible & (distance >= -options.window_left)
    if options.window_right >= 0:
        visible = visible & (distance <= options.window_right)
    if options.key_lengths is not None:
        visible = visible & (torch.arange(seqlen_k, device=q.device) < options.key_lengths)
    scores = scores.masked_fill(~visible, -torch.inf)
    # One score more without a value: the sink, or a 0 in the rows that would be NaN, for they see nothing.
    empty = ~visible.any(-1).expand(heads, -1)
    sink = torch.where(empty, 0.0, -torch.inf)
    if options.sinks is not None:
        sink, empty = options.sinks[:, None].expand(heads, seqlen_q), torch.zeros_like(empty)
    scores = torch.cat((scores, sink[..., None].to(dtype)), dim=-1)
    weights = torch.softmax(scores, -1)[..., :-1]
    if options.dropout_p:
        entry = torch.tensor([i], device=q.device)
        keeps = attention_keeps(options.dropout_seed, options.dropout_p, entry, heads, seqlen_q, seqlen_k)[0]
        weights = weights * keeps / (1 - dropped_parts(options.dropout_p) / 65536)
    return (weights @ values).transpose(0, 1), torch.logsumexp(scores, -1), empty


def largest_error(x, exact):
    """The largest error of the finite values; what is infinite must be so in both."""
    assert x.shape == exact.shape
    if x.numel() == 0:
        return 0.0
    x, finite = x.double(), exact.isfinite()
    assert torch.equal(x[~finite], exact[~finite])
    return (x - exact)[finite].abs().max().item() if finite.any() else 0.0


def check_against_oracle(tensors, options):
    ours, exact, theirs = (run(tensors, options) for run in (run_kernels, oracle, plain_pytorch))
    for name, x, e, p in zip(NAMES, ours, exact, theirs, strict=True):
        assert x.dtype == (tensors[0].dtype if name in ("out", "grad_q", "grad_k", "grad_v") else torch.float32), name
        size = e[e.isfinite()].abs().max().item() if e.isfinite().any() else 0.0
        allowed = (3 if name.startswith("grad") else 2) * largest_error(p.to(e.device), e) + 3e-6 * size  # 25 roundings
        error = largest_error(x, e)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return ours
