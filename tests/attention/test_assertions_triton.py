"""What kernels assert about lengths, starts, pages and positions, in Triton's interpreter."""

import dataclasses

import pytest
import torch
import triton.runtime.interpreter as interpreter
from cases.triton import GPU
from pynlp.kernels.attention import decode_launch
from pynlp.kernels.common import checks
from triton.runtime.errors import InterpreterError

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(GPU, reason="needs a GPU to be absent: an assertion that fails ends its use"),
]


@pytest.fixture(autouse=True)
def assertions(monkeypatch):
    """The interpreter leaves them out, unless it debugs."""
    options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [1, 1023, 1024, 1025])
def test_a_range(count, dtype):
    x = torch.arange(count).to(dtype)
    checks.assert_range(x, 0, count - 1, "in range")
    checks.assert_range(x[::2], 0, count - 1, "in range")
    for low, high in ((0, count - 2), (1, count)):
        with pytest.raises(InterpreterError, match="in range"):
            checks.assert_range(x, low, high, "in range")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("starts", "total", "padded", "longest", "message"),
    [
        ([0], 0, False, None, None),
        ([0, 3, 3, 7], 7, False, None, None),
        ([0, 3, 3, 7], 9, True, 4, None),
        ([1, 3, 7], 7, False, None, "starts"),
        ([0, 3, 7], 9, False, None, "starts"),
        ([0, 3, 11], 9, True, None, "starts"),
        ([0, 5, 3, 7], 7, False, None, "starts"),
        ([0, 3, 7], 7, False, 3, "longest"),
        ([0, *range(1500), 1498, 1500], 1500, False, None, "starts"),
        ([0, *range(1500), 1500], 1500, False, 1, None),
    ],
)
def test_starts(starts, total, padded, longest, message, dtype):
    x = torch.tensor(starts, dtype=dtype)
    if message is None:
        checks.assert_starts(x, total, padded, longest, "starts", "longest")
    else:
        with pytest.raises(InterpreterError, match=message):
            checks.assert_starts(x, total, padded, longest, "starts", "longest")


@pytest.mark.parametrize(
    ("queries", "keys", "offset", "positions", "message"),
    [
        ([0, 2, 5], [0, 2, 5], 0, 3, None),
        ([0, 2, 5], [0, 2, 5], 0, 2, "last"),
        ([0, 2, 5], [0, 2, 5], 7, 10, None),
        ([0, 2, 5], [0, 2, 5], 7, 9, "last"),
        ([0, 3, 5], [0, 2, 5], 0, 9, "first"),
        ([0, 3, 5], [0, 2, 5], 1, 9, None),
    ],
)
def test_positions_of_packed_sequences(queries, keys, offset, positions, message):
    arguments = int32(*queries), int32(*keys), offset, positions, "first", "last"
    if message is None:
        checks.assert_positions(*arguments)
    else:
        with pytest.raises(InterpreterError, match=message):
            checks.assert_positions(*arguments)


@pytest.mark.parametrize(
    ("lengths", "pages", "positions", "message"),
    [
        ((0, 9), (0, 1, 2, 3, 4, 5), 10, None),
        ((0, 12), (0, 1, 2, 3, 4, 5), 99, "cache_lengths"),
        ((-1, 9), (0, 1, 2, 3, 4, 5), 99, "cache_lengths"),
        ((0, 9), (0, 1, 2, 3, 4, 5), 9, "rotary"),
        ((0, 9), (0, -7, -7, 3, 4, 6), 99, "block_table"),
        ((0, 9), (-1, 1, 2, 3, 4, 5), 99, "block_table"),
        ((0, 9), (0, 1, 2, 9, 4, 5), 99, "block_table"),
        ((0, 5), (0, -7, -7, 3, 4, -7), 99, None),  # pages that are not needed
    ],
)
def test_appending(lengths, pages, positions, message):
    """Two entries of up to three pages of four keys; one key more for each."""
    k_cache, v_cache = torch.zeros(2, 6, 4, 1, 16)
    k, v, tables = torch.ones(2, 1, 1, 16), torch.ones(2, 1, 1, 16), torch.ones(2, positions, 8)
    table = int32(*pages).view(2, 3)

    def append():
        decode_launch.attention_append(k, v, k_cache, v_cache, int32(*lengths), table, *tables, 0, False)

    if message is None:
        append()
        assert v_cache.sum() == 32
    else:
        with pytest.raises(InterpreterError, match=message):
            append()


@pytest.mark.parametrize(
    ("lengths", "pages", "positions", "message"),
    [
        ((1, 9), (0, 1, 2, 3, 4, 5), 9, None),
        ((1, 13), (0, 1, 2, 3, 4, 5), 99, "cache_lengths"),
        ((1, 9), (0, 1, 2, 3, 4, 5), 8, "rotary: expected tables"),
        ((0, 9), (0, 1, 2, 3, 4, 5), 9, "rotary_offset"),  # of the query before key 0
        ((1, 9), (0, 1, 2, 3, 4, 6), 99, "block_table"),
    ],
)
def test_decoding_without_new_keys(lengths, pages, positions, message):
    k_cache, v_cache = torch.zeros(2, 6, 4, 1, 16)
    q, tables, table = torch.ones(2, 1, 1, 16), torch.ones(2, positions, 8), int32(*pages).view(2, 3)

    def decode():
        decode_launch.attention_decode(
            q,
            k_cache,
            v_cache,
            int32(*lengths),
            0,
            table,
            1.0,
            -1,
            -1,
            0.0,
            None,
            None,
            None,
            None,
            *tables,
            0,
            False,
            1,
        )

    if message is None:
        decode()
    else:
        with pytest.raises(InterpreterError, match=message):
            decode()


def test_a_cache_without_room():
    """Lengths are asserted where there is nothing to read, too."""
    q, cache, none = torch.ones(2, 1, 1, 16), torch.zeros(2, 0, 1, 16), [None] * 6
    for lengths, is_right in (((0, 0), True), ((5, -3), False)):
        options = 0, None, 1.0, -1, -1, 0.0, *none, 0, False, 0
        if is_right:
            assert (decode_launch.attention_decode(q, cache, cache, int32(*lengths), *options)[0] == 0).all()
        else:
            with pytest.raises(InterpreterError, match="cache_lengths"):
                decode_launch.attention_decode(q, cache, cache, int32(*lengths), *options)
