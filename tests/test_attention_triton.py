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

if not GPU:
    for function in (attention.attention_forward_kernel, triton.language.sum):
        if type(function).__name__ != "InterpretedFunction":
            raise RuntimeError("Triton was imported before conftest.py chose its interpreter: set TRITON_INTERPRET=1")

# NumPy, which the interpreter computes with, warns of log2(0) and of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU: the kernels' machine code runs nowhere else")
GUARD = 64  # elements
NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_slopes", "grad_table")


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
    batch=None, seqlen_q=37, seqlen_k=70, heads=2, kv_heads=1, head_dim=20, window=(-1, -1), softcap=0.0, lengths=None,
    slopes=None, table=False, rotary_dim=0, interleaved=False, position_ids=False, offset=0, scale=None,
    max_distance=12, grad_lse=True, dtype=torch.float32, seed=0,
):  # fmt: skip
    """(q, k, v, grad_out, grad_lse) and the options of attention_forward, everything finite."""
    generator = torch.Generator().manual_seed(seed)
    if batch is None:
        batch = 2 if lengths or slopes == 2 or position_ids else 1

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    q = normal(batch, seqlen_q, heads, head_dim)
    k = normal(batch, seqlen_k, kv_heads, head_dim)
    v = normal(batch, seqlen_k, kv_heads, head_dim)
    grad_out = normal(batch, seqlen_q, heads, head_dim)
    grad = normal(batch, heads, seqlen_q).float() if grad_lse else None
    key_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    alibi = bias = buckets = cos = sin = positions = None
    if slopes:
        alibi = torch.rand((heads,) if slopes == 1 else (batch, heads), generator=generator).to(DEVICE) * 0.3
    if table:
        bias = torch.randn(8, heads, generator=generator).to(DEVICE)
        buckets = relative_position_buckets(8, max_distance, window[1] != 0, DEVICE)
    if rotary_dim:
        angle = torch.rand(seqlen_k + offset + 5, rotary_dim // 2, generator=generator).to(DEVICE) * 6
        cos, sin = angle.cos(), angle.sin()
        if position_ids:
            size = (batch, seqlen_k)
            positions = torch.randint(0, seqlen_k, size, generator=generator, dtype=torch.int32).to(DEVICE)
    options = [
        head_dim**-0.5 if scale is None else scale, *window, softcap, key_lengths, alibi, bias, buckets, cos, sin,
        positions, offset, interleaved,
    ]  # fmt: skip
    return [q, k, v, grad_out, grad], options


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def run_kernels(tensors, options, lengths=None):
    """The launchers on poisoned inputs and guarded outputs: (out, lse, *gradients)."""
    q, k, v, grad_out, grad_lse = [x if x is None else in_a_sea_of_nan(x) for x in tensors]
    for i, length in enumerate(lengths or ()):
        k[i, length:] = torch.nan
        v[i, length:] = torch.nan
    options = list(options)
    for i in (8, 9):  # cos, sin: rows that no key needs
        if options[i] is not None:
            options[i] = options[i].clone()
            options[i][k.shape[1] + options[11] :] = torch.nan
    allocations = GuardedAllocations()
    with allocations.active():
        out, lse = attention.attention_forward(q, k, v, *options)
        gradients = attention.attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, *options, options[5] is not None, options[6] is not None
        )
    allocations.check()
    return out, lse, *gradients


def oracle(tensors, options):
    """The same from the reference in fp64."""
    q, k, v, grad_out, grad_lse = map(double, tensors)
    options = list(map(double, options))
    out, lse = reference.attention_forward(q, k, v, *options)
    gradients = reference.attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, *options, options[5] is not None, options[6] is not None
    )
    return out, lse, *gradients


def plain_pytorch(tensors, options):
    """What PyTorch's own operators and autograd give in the inputs' dtype: their error is the measure."""
    q, k, v, grad_out, grad_lse = tensors
    scale, left, right, softcap, lengths, slopes, bias, buckets, cos, sin, positions, offset, interleaved = options
    dtype = q.dtype
    leaves = [x.detach().clone().requires_grad_() if x is not None else None for x in (q, k, v, slopes, bias)]
    q, k, v, slopes, bias = leaves
    turned_q, turned_k = q, k
    if cos is not None:
        key = torch.arange(k.shape[1], device=k.device)[None] + offset if positions is None else positions.long()
        place = torch.arange(q.shape[1], device=k.device) + k.shape[1] - q.shape[1]
        query = place[None] + offset if positions is None else key[:, place]
        turned_q = reference.rotate(q, cos[query], sin[query], interleaved)
        turned_k = reference.rotate(k, cos[key], sin[key], interleaved)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (turned_k, v))
    scores = turned_q.transpose(1, 2) @ keys.transpose(2, 3) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = reference.relative_distance(q.shape[1], k.shape[1], q.device)
    if slopes is not None:
        scores = scores - (slopes[..., None, None] * distance.abs()).to(dtype)
    if bias is not None:
        scores = scores + bias[reference.bucket_of(distance, buckets)].permute(2, 0, 1).to(dtype)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible = visible & (distance >= -left)
    if right >= 0:
        visible = visible & (distance <= right)
    if lengths is not None:
        visible = visible & (torch.arange(k.shape[1], device=q.device) < lengths[:, None, None, None])
    # Rows that see nothing would be NaN: they get a flat row that carries no weight.
    empty = ~visible.expand_as(scores).any(-1, keepdim=True)
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(empty, 0.0)
    out = (torch.softmax(scores, -1).masked_fill(empty, 0.0) @ values).transpose(1, 2)
    lse = torch.logsumexp(scores, -1).masked_fill(empty[..., 0], 0.0)
    loss = (out * grad_out).sum()
    if grad_lse is not None:
        loss = loss + (lse * grad_lse).sum()
    needed = [x for x in leaves if x is not None]
    gradients = iter(torch.autograd.grad(loss, needed))
    gradients = [next(gradients) if x is not None else torch.empty(0) for x in leaves]
    return out, lse.masked_fill(empty[..., 0], -torch.inf), *gradients


def largest_error(x, exact):
    """Of the finite values; what is infinite must be so in both."""
    assert x.shape == exact.shape
    if x.numel() == 0:
        return 0.0
    x, finite = x.double(), exact.isfinite()
    assert torch.equal(x[~finite], exact[~finite])
    return (x - exact)[finite].abs().max().item() if finite.any() else 0.0


def check_against_oracle(tensors, options, lengths=None):
    ours, exact, theirs = (
        run_kernels(tensors, options, lengths),
        oracle(tensors, options),
        plain_pytorch(tensors, options),
    )
    for name, x, e, p in zip(NAMES, ours, exact, theirs, strict=True):
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
    "everything": dict(
        heads=4, kv_heads=2, window=(33, 17), softcap=5.0, lengths=[66, 40], slopes=2, table=True, rotary_dim=12
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_match_the_reference(name, monkeypatch):
    tiles(monkeypatch)
    tensors, options = make_case(**CASES[name])
    check_against_oracle(tensors, options, CASES[name].get("lengths"))


@pytest.mark.parametrize(
    "name", ["plain", "causal_lengths", "alibi_causal", "table", "softcap", "rotary", "everything"]
)
def test_half_precision_is_as_good_as_pytorch(name, monkeypatch):
    tiles(monkeypatch)
    tensors, options = make_case(**CASES[name], dtype=torch.float16)
    ours = check_against_oracle(tensors, options, CASES[name].get("lengths"))
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
    check_against_oracle(tensors, options, CASES[name].get("lengths"))
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
    check_against_oracle(tensors, options, CASES[name].get("lengths"))


@pytest.mark.parametrize("name", ["causal", "table_and_alibi_window", "everything"])
def test_other_tiles_give_the_same(name, monkeypatch):
    tiles(monkeypatch, forward=(32, 16, 0), queries=(32, 32), keys=(32, 16))
    tensors, options = make_case(**CASES[name], seed=1)
    check_against_oracle(tensors, options, CASES[name].get("lengths"))


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
    gradients = attention.attention_backward(grad_out, grad_lse, q, k, v, out, lse, *options, True, True)
    for x, expected in zip(gradients, (q, k, v, options[5], options[6]), strict=True):
        assert x.shape == expected.shape and (x == 0).all()


def test_rows_that_see_nothing_are_zero_and_give_no_gradient(monkeypatch):
    tiles(monkeypatch)
    tensors, options = make_case(seqlen_q=40, seqlen_k=21, window=(-1, 0), slopes=1, lengths=[0, 15])
    out, lse, grad_q, grad_k, grad_v, *_ = check_against_oracle(tensors, options, [0, 15])
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
    first, second = (run_kernels(tensors, options, [66, 40]) for _ in range(2))
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
    check_against_oracle(tensors, options, sizes.get("lengths"))
