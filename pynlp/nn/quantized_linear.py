"""The linear layer of a quantized weight as a module."""

import json
from typing import Self

import torch
from torch import Tensor, nn

from pynlp.ops.quantization.formats import QuantState4bit, dequantize_4bit, quantize_4bit
from pynlp.ops.quantization.linear import linear_4bit
from pynlp.reference.quantization.formats import FORMATS, NESTED_BLOCK, QUANT_TYPES

# The state's tensors: their names here, and those of bitsandbytes' checkpoints behind "weight.".
PARTS = {"absmax": "absmax", "nested_absmax": "nested_absmax", "nested_code": "nested_quant_map"}


class Linear4bit(nn.Module):
    """A linear layer whose weight is a constant in 4 bits; gradients are those of its input and of the bias.

    Its state dict is that of bitsandbytes' Linear4bit, which either can load ("mxfp4", which bitsandbytes does not
    have, is written alike); a dense weight in a state dict is quantized when it is loaded. `.to(dtype)` and `.half()`
    leave the weight and its scales as they are.

    Args:
        in_features, out_features, bias, device: As nn.Linear's; the new layer's weight, too, before it is quantized.
        quant_type, blocksize, double_quant: As `pynlp.functional.quantize_4bit`'s.
        dtype: Of the bias, and the default of `dequantize`.

    Attributes:
        weight: uint8, two codes a byte.
        state: What they mean.
        bias: `(out_features,)` or None; the only parameter.

    Example:
        >>> import torch
        >>> from pynlp.nn import Linear4bit
        >>> dense = torch.nn.Linear(512, 256)
        >>> layer = Linear4bit.from_linear(dense, double_quant=True)
        >>> sum(x.nbytes for x in layer.buffers()) / dense.weight.nbytes < 0.14
        True
        >>> layer(torch.randn(3, 512)).shape
        torch.Size([3, 256])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        blocksize: int | None = None,
        double_quant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.bias = dense.bias
        self._quantize(dense.weight, quant_type, blocksize, double_quant)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, quant_type: str = "nf4", blocksize: int | None = None, double_quant: bool = False
    ) -> Self:
        """A layer with the weight of a dense one, quantized, and its bias, which both share."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.bias = linear.bias
        layer._quantize(linear.weight, quant_type, blocksize, double_quant)
        return layer.train(linear.training)

    def _quantize(self, weight: Tensor, quant_type: str, blocksize: int | None, double_quant: bool) -> None:
        packed, state = quantize_4bit(weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
        self._set(packed, state)

    def _set(self, packed: Tensor, state: QuantState4bit) -> None:
        self.out_features, self.in_features = state.shape
        self.quant_type, self.blocksize, self.dtype = state.quant_type, state.blocksize, state.dtype
        self.register_buffer("weight", packed)
        for name in (*PARTS, "nested_offset"):
            self.register_buffer(name, getattr(state, name), persistent=False)

    @property
    def state(self) -> QuantState4bit:
        """What the codes in `weight` mean."""
        return QuantState4bit(
            self.quant_type,
            self.blocksize,
            (self.out_features, self.in_features),
            self.dtype,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.nested_code,
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(.., out_features)` of x `(.., in_features)`, in x's dtype."""
        return linear_4bit(x, self.weight, self.state, self.bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `(out_features, in_features)` as a dense tensor, of the quantized one's dtype by default."""
        return dequantize_4bit(self.weight, self.state, dtype=dtype)

    def extra_repr(self) -> str:
        """The sizes and the format, for print."""
        double = ", double_quant=True" if self.nested_absmax is not None else ""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"quant_type={self.quant_type!r}, blocksize={self.blocksize}{double}"
        )

    def _apply(self, fn, recurse=True):
        """Moves all tensors, as every module does; scales keep their dtype."""
        before = {name: getattr(self, name) for name in (*PARTS, "nested_offset")}
        super()._apply(fn, recurse)
        for name, x in before.items():
            moved = getattr(self, name)
            if x is not None and moved.dtype != x.dtype:
                setattr(self, name, x.to(moved.device))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        prefix += "weight."
        facts = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        for name, key in PARTS.items():
            if getattr(self, name) is not None:
                destination[prefix + key] = getattr(self, name)
        if self.nested_absmax is not None:
            facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
            facts["nested_offset"] = self.nested_offset.item()
        destination[f"{prefix}quant_map"] = _codes(self.quant_type).to(self.weight.device)
        written = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
        destination[prefix + _facts_key(self.quant_type)] = written

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        weight = state_dict.get(f"{prefix}weight")
        mine = [key for key in state_dict if key.startswith(f"{prefix}weight.")]
        device = self.weight.device
        if weight is not None and metadata.get("assign_to_params_buffers", False):
            device = weight.device
        try:
            if weight is not None and weight.is_floating_point() and not mine:
                self._load_dense(weight.to(device))
            elif weight is not None:
                parts = {key.removeprefix(f"{prefix}weight."): state_dict[key] for key in mine}
                self._load_packed(weight.to(device, copy=True), parts)
        except (ValueError, TypeError, KeyError) as error:
            errors.append(f"{prefix}weight: {error}")
        rest = {key: x for key, x in state_dict.items() if key not in mine}
        if weight is not None:
            rest[f"{prefix}weight"] = self.weight  # which is loaded
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)

    def _load_dense(self, weight: Tensor) -> None:
        if tuple(weight.shape) != self.state.shape:
            raise ValueError(f"expected shape {self.state.shape}, got {tuple(weight.shape)}")
        self._quantize(weight, self.quant_type, self.blocksize, self.nested_absmax is not None)

    def _load_packed(self, packed: Tensor, parts: dict[str, Tensor]) -> None:
        found = [name for name in QUANT_TYPES if _facts_key(name) in parts]
        if not found:
            raise ValueError("expected a dense weight, or a quant_state beside it, which tells what its codes mean")
        facts = json.loads(bytes(parts[_facts_key(found[0])].tolist()))
        if facts["quant_type"] != found[0]:
            raise ValueError(f"expected quant_type {found[0]!r}, got {facts['quant_type']!r}")
        if tuple(facts["shape"]) != self.state.shape:
            raise ValueError(f"expected shape {self.state.shape}, got {tuple(facts['shape'])}")
        if "quant_map" in parts and not torch.equal(parts["quant_map"].cpu().float(), _codes(found[0])):
            raise ValueError(f"expected quant_map to be {found[0]}'s codes, got others")
        if facts.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
            raise ValueError(f"expected nested_blocksize {NESTED_BLOCK}, got {facts['nested_blocksize']}")
        dtype = getattr(torch, facts["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"expected dtype to be one of torch's, got {facts['dtype']!r}")
        if "absmax" not in parts:
            raise ValueError("expected absmax, the blocks' scales, beside it")
        device = packed.device
        tensors = {name: parts[key].to(device, copy=True) for name, key in PARTS.items() if key in parts}
        if "nested_absmax" in tensors:
            tensors["nested_offset"] = torch.tensor(facts["nested_offset"], dtype=torch.float32, device=device)
        state = QuantState4bit(found[0], facts["blocksize"], tuple(facts["shape"]), dtype, **tensors)
        dequantize_4bit(packed.to("meta"), state._replace(**{name: x.to("meta") for name, x in tensors.items()}))
        self._set(packed, state)


def _facts_key(quant_type: str) -> str:
    """The key of what the codes mean, behind "weight."."""
    return f"quant_state.{'pynlp' if quant_type == 'mxfp4' else 'bitsandbytes'}__{quant_type}"


def _codes(quant_type: str) -> Tensor:
    return torch.tensor(FORMATS[QUANT_TYPES.index(quant_type)].codes)
