"""The attention kernels against the reference in fp64: in Triton's interpreter, on a GPU where there is one.

Every input lies in a sea of NaN (padding between rows and heads, keys beyond key_lengths, unused table rows), and every
tensor the launcher allocates is poisoned and has guard zones, so that a stray read or write shows.
"""

import contextlib

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
triton = pytest.importorskip("triton")

from pynlp.kernels import attention  # noqa: E402
from pynlp.ops.positions import relative_position_buckets  # noqa: E402
from pynlp.reference import attention as reference  # noqa: E402
from pynlp.reference.attention import Options  # noqa: E402
from pynlp.reference.random import attention_keeps, dropped_parts  # noqa: E402

if not GPU:
    for function in (attention.attention_forward_kernel, triton.language.sum):
        if type(function).__name__ != "InterpretedFunction":
            raise RuntimeError("Triton was imported before conftest.py chose its interpreter: set TRITON_INTERPRET=1")

# NumPy, which the interpreter computes with, warns of log2(0) and of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU: the kernels' machine code runs nowhere else")
GUARD = 64  # elements
NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_slopes", "grad_table", "grad_sinks")


def in_a_sea_of_nan(x: torch.Tensor) -> torch.Tensor:
    """x with NaN around every row of the last dimension, strides that TMA can read, and a contiguous last dimension."""
    wider = [size + 1 for size in x.shape[:-1]] + [(x.shape[-1] // 8 + 2) * 8]
    sea = torch.full([2, *wider], torch.nan, dtype=x.dtype, device=x.device)[1]
    view = sea[tuple(slice(0, size) for size in x.shape)]
    view.copy_(x)
    return view


class GuardedAllocations:
    """torch.empty and torch.zeros with guard zones; what is empty starts as NaN."""

    def __init__(self):
        self.zones = []

    def _allocate(self, shape, value, dtype, device):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = torch.Size(shape).numel()
        # Guards of NaN show a stray read too; their bits are compared.
        flat = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
        flat[GUARD : GUARD + size] = value
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
            bits = flat.view(torch.int32 if flat.dtype == torch.float32 else torch.int16)
            clean = torch.full((GUARD,), torch.nan, dtype=flat.dtype, device=flat.device).view(bits.dtype)
            for guard in (bits[:GUARD], bits[GUARD + size :]):
                assert torch.equal(guard, clean), "a write outside an output"


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
    """Of the finite values; what is infinite must be so in both."""
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


CASES = {
    "plain": dict(),
    "more_queries_than_keys": dict(seqlen_q=70, seqlen_k=37),
    "grouped": dict(heads=4, kv_heads=2, seqlen_k=40, window=(-1, 0)),
    "causal": dict(window=(-1, 0)),
    "causal_more_queries": dict(seqlen_q=50, seqlen_k=21, window=(-1, 0)),
    "window": dict(window=(9, 4)),
    "window_right": dict(window=(-1, 20)),
    "causal_window": dict(window=(5, 0)),
    "window_of_one": dict(window=(0, 0), seqlen_q=33, seqlen_k=33),
    "lengths": dict(lengths=[19, 0]),
    "causal_lengths": dict(lengths=[48, 64], window=(-1, 0)),
    "window_lengths": dict(lengths=[48, 64], window=(20, 3)),
    "alibi": dict(slopes=1),
    "alibi_causal": dict(slopes=1, window=(-1, 0)),
    "alibi_batch_more_queries": dict(slopes=2, seqlen_q=70, seqlen_k=37, lengths=[30, 37]),
    "table": dict(table=True),
    "table_causal": dict(table=True, window=(-1, 0), lengths=[70, 33]),
    "table_more_queries": dict(table=True, seqlen_q=70, seqlen_k=35),
    "table_wide": dict(table=True, max_distance=50, window=(-1, 9)),
    "table_and_alibi_window": dict(table=True, slopes=2, window=(25, 30)),
    "softcap": dict(softcap=2.0),
    "softcap_biases_causal": dict(softcap=30.0, slopes=1, table=True, window=(-1, 0)),
    "rotary": dict(rotary_dim=20),
    "rotary_part_causal": dict(rotary_dim=8, window=(-1, 0), offset=3),
    "rotary_interleaved": dict(rotary_dim=20, interleaved=True),
    "rotary_interleaved_part": dict(rotary_dim=12, interleaved=True, seqlen_q=45, seqlen_k=30, offset=15),
    "rotary_positions": dict(rotary_dim=16, position_ids=True, lengths=[70, 20]),
    "rotary_interleaved_positions": dict(rotary_dim=20, position_ids=True, interleaved=True, window=(12, 6)),
    "negative_scale": dict(scale=-0.3, window=(-1, 0)),
    "no_scale": dict(scale=0.0),
    "no_grad_lse": dict(grad_lse=False),
    "one_channel": dict(head_dim=1),
    "odd_channels": dict(head_dim=33, window=(-1, 0), seqlen_k=37),
    "one_query": dict(seqlen_q=1, window=(-1, 0)),
    "sinks": dict(sinks=True),
    "sinks_causal_more_queries": dict(sinks=True, seqlen_q=50, seqlen_k=21, window=(-1, 0)),
    "sinks_lengths_alibi": dict(sinks=True, lengths=[0, 50], slopes=1, window=(-1, 0)),
    "values_of_fewer_channels": dict(head_dim=24, head_dim_v=7, window=(-1, 0)),
    "values_of_more_channels": dict(head_dim=9, head_dim_v=40, rotary_dim=4, window=(7, 3)),
    "dropout": dict(dropout=0.3),
    "dropout_causal_lengths": dict(dropout=0.5, window=(-1, 0), lengths=[48, 64], seqlen_k=66),
    "packed": dict(packed=[(20, 37), (17, 5), (0, 9), (6, 0), (0, 0), (31, 33)]),
    "packed_causal": dict(packed=[(18, 18), (3, 21), (1, 0), (40, 9)], window=(-1, 0)),
    "everything": dict(
        heads=4, kv_heads=2, window=(33, 17), softcap=5.0, lengths=[66, 40], slopes=2, table=True, rotary_dim=12
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_match_the_reference(name, monkeypatch):
    tiles(monkeypatch)
    tensors, options = make_case(**CASES[name])
    check_against_oracle(tensors, options)


@pytest.mark.parametrize(
    "name", ["plain", "causal_lengths", "alibi_causal", "table", "softcap", "rotary", "everything"]
)
def test_half_precision_is_as_good_as_pytorch(name, monkeypatch):
    tiles(monkeypatch)
    tensors, options = make_case(**CASES[name], dtype=torch.float16)
    ours = check_against_oracle(tensors, options)
    assert ours[0].dtype == torch.float16 and ours[1].dtype == torch.float32 and ours[2].dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        ("plain", 20, torch.float32),
        ("causal", 16, torch.float16),
        ("causal_lengths", 24, torch.float16),
        ("alibi", 16, torch.float32),
        ("table_and_alibi_window", 16, torch.float32),
        ("rotary_part_causal", 24, torch.float16),
    ],
)
def test_tensor_descriptors_read_the_same(name, head_dim, dtype, monkeypatch):
    tiles(monkeypatch, descriptors=True)
    tensors, options = make_case(**{**CASES[name], "head_dim": head_dim}, dtype=dtype)
    seen = []
    describe = attention._descriptors

    def spy(*arguments):
        seen.append(describe(*arguments))
        return seen[-1]

    monkeypatch.setattr(attention, "_descriptors", spy)
    check_against_oracle(tensors, options)
    if not GPU:
        assert len(seen) == 3 and all(d is not None for pair in seen for d in pair)


def test_tensors_that_tma_cannot_read_take_the_pointer_path(monkeypatch):
    tiles(monkeypatch, descriptors=True)
    config = attention.Config(16, 16, 1, 1, True)
    x = torch.zeros(2, 8, 2, 24, dtype=torch.float16)
    assert attention._descriptors(config, 16, x)[0] is not None
    assert attention._descriptors(config, 16, x, x.flatten()[1:2].expand_as(x)) == [None, None]
    assert attention._descriptors(config, 16, x[..., :20].contiguous()) == [None]  # rows 40 bytes apart
    assert attention._descriptors(config, 16, x[:1].expand(2, -1, -1, -1)) == [None]  # stride 0
    assert attention._descriptors(attention.Config(16, 16, 1, 1), 16, x) == [None]
    tensors, options = make_case(head_dim=20, dtype=torch.float16, seqlen_q=18, seqlen_k=40)
    check_against_oracle([x if x is None else x.contiguous() for x in tensors], options)


@pytest.mark.parametrize("name", ["causal", "alibi", "rotary", "rotary_interleaved_positions", "everything"])
def test_heads_in_pieces_give_the_same(name, monkeypatch):
    tiles(monkeypatch, piece=16)
    sizes = dict(head_dim=72) | (dict(rotary_dim=40) if "rotary_dim" in CASES[name] else {})
    tensors, options = make_case(**CASES[name] | sizes)
    check_against_oracle(tensors, options)


@pytest.mark.parametrize("name", ["causal", "table_and_alibi_window", "everything"])
def test_other_tiles_give_the_same(name, monkeypatch):
    tiles(monkeypatch, forward=(32, 16, 0), queries=(32, 32), keys=(32, 16))
    tensors, options = make_case(**CASES[name], seed=1)
    check_against_oracle(tensors, options)


def test_offsets_within_a_tile_can_need_64_bits(monkeypatch):
    tiles(monkeypatch)
    x = torch.zeros(1, 2, 1, 64, device="meta")
    assert not attention._long(128, x.as_strided((1, 2, 1, 64), (1, 2**23, 1, 1)))
    assert attention._long(128, x.as_strided((1, 2, 1, 64), (1, 2**24, 1, 1)))
    monkeypatch.setattr(attention, "_long", lambda *_: True)
    tensors, options = make_case(seqlen_q=20, seqlen_k=40, rotary_dim=8)
    check_against_oracle(tensors, options)


@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_k", "heads"])
def test_nothing_in_nothing_out(empty, monkeypatch):
    tiles(monkeypatch)
    sizes = dict(batch=2, seqlen_q=5, seqlen_k=7, slopes=1, table=True) | {empty: 0}
    if empty == "heads":
        sizes["kv_heads"] = 0
    tensors, options = make_case(**sizes)
    q, k, v, grad_out, grad_lse = tensors
    out, lse = attention.attention_forward(q, k, v, *options)
    assert out.shape == q.shape and (out == 0).all()
    assert lse.shape == grad_lse.shape and (lse == -torch.inf).all()
    gradients = attention.attention_backward(grad_out, grad_lse, q, k, v, out, lse, *options, True, True, False)
    for x, expected in zip(gradients, (q, k, v, options.alibi_slopes, options.relative_bias), strict=False):
        assert x.shape == expected.shape and (x == 0).all()


def test_rows_that_see_nothing_are_zero_and_give_no_gradient(monkeypatch):
    tiles(monkeypatch)
    tensors, options = make_case(seqlen_q=40, seqlen_k=21, window=(-1, 0), slopes=1, lengths=[0, 15])
    out, lse, grad_q, grad_k, grad_v, *_ = check_against_oracle(tensors, options)
    assert (lse[0] == -torch.inf).all() and (out[0] == 0).all() and (grad_q[0] == 0).all()
    assert (grad_k[0] == 0).all() and (grad_v[0] == 0).all()
    assert (lse[1, :, :19] == -torch.inf).all() and (out[1, :19] == 0).all() and (grad_q[1, :19] == 0).all()
    assert (grad_k[1, 15:] == 0).all() and (grad_v[1, 15:] == 0).all() and (grad_v[1, :15] != 0).all()


@pytest.mark.parametrize(("bad", "extra"), [(torch.nan, dict()), (torch.inf, dict(rotary_dim=8))])
@pytest.mark.parametrize("which", ["q", "k", "v", "grad_out"])
def test_nan_reaches_only_the_rows_that_may_see_it(which, bad, extra, monkeypatch):
    """A bad row in a partly masked block: whatever may not see it keeps the value it has without it."""
    tiles(monkeypatch)
    tensors, options = make_case(batch=2, seqlen_q=40, seqlen_k=40, heads=1, head_dim=12, window=(6, 2), **extra)
    clean = run_kernels(tensors, options)
    index, row = ["q", "k", "v", "grad_out"].index(which), 21
    tensors[index][1, row] = bad
    spoiled = run_kernels(tensors, options)
    position = torch.arange(40, device=DEVICE)
    # Queries that see the bad row, and the keys that those see.
    queries = (position == row) if which in ("q", "grad_out") else (row >= position - 6) & (row <= position + 2)
    seen = (position[None] >= position[queries][:, None] - 6) & (position[None] <= position[queries][:, None] + 2)
    keys = seen.any(0)
    no_rows = torch.zeros_like(queries)
    reach = dict(zip(NAMES, (queries, queries, queries, keys, keys), strict=False))
    if which == "grad_out":
        reach |= dict(out=no_rows, lse=no_rows)
    if which == "v":
        reach |= dict(lse=no_rows, grad_v=no_rows)
    visibly_bad = dict(q="grad_k", k="grad_q", v="grad_q", grad_out="grad_v")[which]
    for name, x, y in zip(NAMES[:5], spoiled, clean, strict=False):
        if name == "lse":
            x, y = x.transpose(1, 2), y.transpose(1, 2)
        untouched = ~reach[name]
        assert torch.equal(x[0], y[0]), f"{name}: another batch"
        # Not bit for bit: a block with a bad row is computed again in narrower blocks.
        torch.testing.assert_close(
            x[1, untouched], y[1, untouched], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        if name == visibly_bad:
            assert (~x[1, reach[name]].isfinite()).flatten(1).any(1).all(), f"{name} hides the bad row"


def test_every_run_gives_the_same_bits(monkeypatch):
    tiles(monkeypatch)
    tensors, options = make_case(**CASES["everything"], batch=2, seqlen_q=20)
    first, second = (run_kernels(tensors, options) for _ in range(2))
    for name, x, y in zip(NAMES, first, second, strict=True):
        assert torch.equal(x, y), name


def test_the_heads_of_a_group_add_up(monkeypatch):
    """Two query heads that are equal give twice the key and value gradient of one."""
    tiles(monkeypatch)
    tensors, options = make_case(heads=1, kv_heads=1, seqlen_q=20, seqlen_k=40)
    one = run_kernels(tensors, options)
    q, k, v, grad_out, grad_lse = tensors
    two = run_kernels([q.repeat(1, 1, 2, 1), k, v, grad_out.repeat(1, 1, 2, 1), grad_lse.repeat(1, 2, 1)], options)
    torch.testing.assert_close(two[3], 2 * one[3])
    torch.testing.assert_close(two[4], 2 * one[4])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["causal", "window", "alibi_causal", "table", "rotary", "everything"])
def test_on_a_gpu(name, dtype, head_dim):
    sizes = dict(seqlen_q=500, seqlen_k=777, head_dim=head_dim, dtype=dtype)
    if "lengths" in CASES[name]:
        sizes["lengths"] = [700, 333]
    tensors, options = make_case(**CASES[name] | sizes)
    check_against_oracle(tensors, options)
