"""The PTX of integer codes, which Triton's interpreter leaves out: run here instruction by instruction."""

import re

import pytest
import torch

pytest.importorskip("triton")

from pynlp.kernels.quantization import integer_codes  # noqa: E402

DTYPES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
WORD = 2**32 - 1


def halves(word, dtype):
    """The two numbers of 32-bit words, in fp64."""
    return [(word >> shift & 0xFFFF).to(torch.int16).view(dtype).double() for shift in (0, 16)]


def packed(numbers, dtype):
    """32-bit words of two numbers each, which the dtype holds exactly."""
    for x in numbers:
        assert torch.equal(x.to(dtype).double(), x), "a result was rounded"
    low, high = (x.to(dtype).view(torch.int16).long() & 0xFFFF for x in numbers)
    return low | high << 16


def permuted(a, b, selector):
    both, result = a | b << 32, 0
    for i in range(4):
        place = selector >> 4 * i & 15
        assert place < 8, "signs are not replicated here"
        # Bytes are taken one by one: int64 has a sign.
        result |= (both >> 8 * place & 0xFF) << 8 * i
    return result


def run(text, inputs, outputs):
    """The first `outputs` operands after the PTX was run with the others, int64 tensors of 32-bit words."""
    registers = {f"${outputs + i}": x for i, x in enumerate(inputs)}

    def value(operand):
        return registers[operand] if operand in registers else torch.tensor(int(operand, 0))

    for line in re.findall(r"^([a-z].*);", text, re.MULTILINE):
        opcode, operands = line.split(" ", 1)
        target, *rest = operands.split(", ")
        if opcode == "prmt.b32":
            result = permuted(value(rest[0]), value(rest[1]), int(rest[2], 0))
        elif opcode == "lop3.b32":
            assert rest[3] == "0xEA"
            result = value(rest[0]) & value(rest[1]) | value(rest[2])
        elif opcode in ("and.b32", "xor.b32", "shr.u32", "mov.b32"):
            a, b = value(rest[0]), value(rest[-1])
            result = {"and": a & b, "xor": a ^ b, "shr": a >> b, "mov": a}[opcode[:3]]
        else:
            name, dtype = opcode.split(".")[0], DTYPES[opcode.split(".")[-1]]
            a, b, *c = (halves(value(x), dtype) for x in rest)
            result = packed(
                [x - y if name == "sub" else x * y + z for x, y, z in zip(a, b, *c or [b], strict=True)], dtype
            )
        registers[target] = result & WORD
    return [registers[f"${i}"] for i in range(outputs)]


def every_word(count=256):
    """Words of four bytes, (1024,), in which each byte is at each place; and their bytes."""
    place = torch.arange(1024)
    parts = torch.stack([(place * (2 * i + 1) + 77 * i) % count for i in range(4)])
    assert all(len(part.unique()) == count for part in parts)
    return sum(part << 8 * i for i, part in enumerate(parts)), parts


@pytest.mark.parametrize("zero", [None, -128, -7, 0, 127])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bytes_minus_zeros(dtype, zero):
    word, parts = every_word()
    codes = parts.to(torch.int8).double() - (zero or 0)
    inputs = [word]
    if dtype == torch.float16:
        text, shift = integer_codes._BYTES_FP16.value, 1152.0
    else:
        text, shift = (integer_codes._BYTES_BF16 if zero is None else integer_codes._BYTES_ZERO_BF16).value, 0.0
    if dtype == torch.float16 or zero is not None:
        inputs += [packed([torch.full((1024,), shift + (zero or 0), dtype=torch.float64)] * 2, dtype)] * 2
    results = [x for word in run(text, inputs, 2) for x in halves(word, dtype)]
    torch.testing.assert_close(torch.stack(results), codes, rtol=0, atol=0)


@pytest.mark.parametrize("zero", [-128, 0, 8, 127])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_of_bytes_minus_zeros(dtype, zero):
    word, parts = every_word()
    text, magic = integer_codes._HALVES_BF16.value, 128.0
    if dtype == torch.float16:
        text, magic = integer_codes._HALVES_FP16.value, 1024.0
    zeros = packed([torch.full((1024,), magic + zero, dtype=torch.float64)] * 2, dtype)
    for result, part in zip(run(text, [word, *[zeros] * 4], 4), parts, strict=True):
        first, second = halves(result, dtype)
        assert torch.equal(first, (part & 15).double() - zero)
        assert torch.equal(second, (part >> 4).double() - zero)


def test_halves_of_bytes_as_bytes():
    word, parts = every_word()
    results = run(integer_codes._HALVES_INT8.value, [word], 2)
    for i, part in enumerate(parts):
        pair = results[i // 2] >> 16 * (i % 2) & 0xFFFF
        assert torch.equal(pair & 0xFF, part & 15) and torch.equal(pair >> 8, part >> 4)
