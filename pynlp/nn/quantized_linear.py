"""Linear layers of quantized weights as modules: what they share, and those whose codes of 4 bits are looked up."""

import json
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from pynlp.ops.quantization.formats import QuantState4bit, dequantize_4bit, quantize_4bit
from pynlp.ops.quantization.linear import linear_4bit
from pynlp.reference.quantization.formats import FORMATS, NESTED_BLOCK, QUANT_TYPES


class QuantizedLinear(nn.Module):
    """What the quantized layers share: a constant weight, whose codes and scales keep their dtypes.

    A subclass quantizes (`_quantize`), and writes and reads what is beside `weight` in a state dict (`_written`,
    `_read`).

    Attributes:
        compute_dtype: The dense weight's, and what `.to(dtype)` makes of it: that of inputs, as far as a layer can say.
    """

    PARTS: tuple[str, ...] = ()  # names of the state's tensors
    CODES = "weight"  # the codes' name in a state dict

    def _init(self, dense: nn.Linear, options: dict[str, Any]) -> None:
        self.bias = dense.bias
        self.out_features, self.in_features = dense.weight.shape
        self.compute_dtype = dense.weight.dtype
        self._quantize(dense.weight, **options)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> Self:
        """A layer with the weight of a dense one, quantized, and its bias, which both share.

        Args:
            options: Those of the class that tell how to quantize.
        """
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise TypeError(f"linear: expected a dense nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._init(linear, options)
        return layer.train(linear.training)

    def _set(self, codes: Tensor, state: NamedTuple) -> None:
        self.dtype = state.dtype
        self.register_buffer("weight", codes, persistent=self.CODES == "weight")
        for name in self.PARTS:
            self.register_buffer(name, getattr(state, name), persistent=False)

    def _apply(self, fn, recurse=True):
        """Moves all tensors, as every module does; those of the state keep their dtype."""
        before = {name: getattr(self, name) for name in self.PARTS}
        super()._apply(fn, recurse)
        for name, x in before.items():
            moved = getattr(self, name)
            if x is not None and moved.dtype != x.dtype:
                setattr(self, name, x.to(moved.device))
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.weight.device)).dtype
        return self

    def _facts(self, **more) -> Tensor:
        """What is not a tensor as JSON in bytes, as bitsandbytes writes it."""
        facts = {"dtype": str(self.dtype).removeprefix("torch."), "shape": [self.out_features, self.in_features]}
        return torch.tensor(list(json.dumps(facts | more).encode()), dtype=torch.uint8)

    def _read_facts(self, written: Tensor) -> tuple[dict[str, Any], torch.dtype]:
        try:
            facts = json.loads(bytes(written.tolist()))
        except ValueError:
            raise ValueError("expected JSON in the quant_state beside it, got damaged bytes") from None
        if not isinstance(facts, dict) or not {"dtype", "shape"} <= facts.keys():
            raise ValueError("expected dtype and shape in the quant_state beside it")
        if tuple(facts["shape"]) != (self.out_features, self.in_features):
            raise ValueError(f"expected shape {(self.out_features, self.in_features)}, got {tuple(facts['shape'])}")
        dtype = getattr(torch, str(facts["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"expected dtype to be one of torch's, got {facts['dtype']!r}")
        return facts, dtype

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, x in {self.CODES: self.weight, **self._written()}.items():
            destination[f"{prefix}{key}"] = x

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        own = {key.removeprefix(prefix): x for key, x in state_dict.items() if key.startswith(prefix)}
        weight, bias = own.pop("weight", None), own.pop("bias", None)
        weight = own.pop(self.CODES, None) if weight is None else weight
        if weight is not None:
            assigned = metadata.get("assign_to_params_buffers", False)
            device = weight.device if assigned else self.weight.device
            try:
                if weight.is_floating_point() and not any(key.startswith("weight.quant_state.") for key in own):
                    if tuple(weight.shape) != (self.out_features, self.in_features):
                        raise ValueError(
                            f"expected shape {(self.out_features, self.in_features)}, got {tuple(weight.shape)}"
                        )
                    self._quantize(weight.to(device), **self._options())
                else:
                    parts = {key: x.to(device, copy=not assigned) for key, x in own.items()}
                    self._read(weight.to(device, copy=not assigned), parts)
            except (ValueError, TypeError, KeyError) as error:
                errors.append(f"{prefix}weight: {error}")
        if weight is None and strict:
            missing.append(f"{prefix}{self.CODES}")
        rest = {f"{prefix}weight": self.weight} if self.CODES == "weight" else {}  # which is loaded
        if bias is not None:
            rest[f"{prefix}bias"] = bias
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)


class Linear4bit(QuantizedLinear):
    """A linear layer whose weight is a constant in 4 bits; gradients are those of its input and of the bias.

    Its state dict is that of bitsandbytes' Linear4bit ("mxfp4", which bitsandbytes does not have, is written alike). It
    loads theirs, and `bitsandbytes.nn.Params4bit.from_prequantized` loads its own; a dense weight in a state dict is
    quantized when it is loaded. `.to(dtype)` and `.half()` leave the weight and its scales as they are.

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

    PARTS = ("absmax", "nested_absmax", "nested_offset", "nested_code")
    KEYS = {"absmax": "absmax", "nested_absmax": "nested_absmax", "nested_code": "nested_quant_map"}  # bitsandbytes'

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
        options = dict(quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
        self._init(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), options)

    def _quantize(self, weight: Tensor, **options) -> None:
        self._set(*quantize_4bit(weight, **options))

    def _set(self, codes: Tensor, state: QuantState4bit) -> None:
        super()._set(codes, state)
        self.quant_type, self.blocksize = state.quant_type, state.blocksize

    def _options(self) -> dict[str, Any]:
        double = self.nested_absmax is not None
        return dict(quant_type=self.quant_type, blocksize=self.blocksize, double_quant=double)

    @property
    def state(self) -> QuantState4bit:
        """What the codes in `weight` mean."""
        shape = self.out_features, self.in_features
        return QuantState4bit(
            self.quant_type, self.blocksize, shape, self.dtype, *(getattr(self, name) for name in self.PARTS)
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

    def _written(self) -> dict[str, Tensor]:
        facts = {"quant_type": self.quant_type, "blocksize": self.blocksize}
        parts = {f"weight.{key}": getattr(self, name) for name, key in self.KEYS.items()}
        parts["weight.quant_map"] = _codes(self.quant_type).to(self.weight.device)
        if self.nested_absmax is not None:
            offset = 0.0 if self.nested_offset.is_meta else self.nested_offset.item()
            facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        parts[_facts_key(self.quant_type)] = self._facts(**facts)
        return {key: x for key, x in parts.items() if x is not None}

    def _read(self, packed: Tensor, parts: dict[str, Tensor]) -> None:
        found = [name for name in QUANT_TYPES if _facts_key(name) in parts]
        if not found:
            raise ValueError("expected a dense weight, or a quant_state beside it, which tells what its codes mean")
        packed = packed.contiguous().view(torch.uint8).view(-1, 1)  # of bitsandbytes' quant_storage
        facts, dtype = self._read_facts(parts[_facts_key(found[0])])
        if facts.get("quant_type") != found[0]:
            raise ValueError(f"expected quant_type {found[0]!r}, got {facts.get('quant_type')!r}")
        codes = parts.get("weight.quant_map")
        if codes is not None and not torch.equal(codes.cpu().float(), _codes(found[0])):
            raise ValueError(f"expected quant_map to be {found[0]}'s codes, got others")
        if facts.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
            raise ValueError(f"expected nested_blocksize {NESTED_BLOCK}, got {facts['nested_blocksize']}")
        if "weight.absmax" not in parts:
            raise ValueError("expected absmax, the blocks' scales, beside it")
        tensors = {name: parts[f"weight.{key}"] for name, key in self.KEYS.items() if f"weight.{key}" in parts}
        if "nested_absmax" in tensors:
            tensors["nested_offset"] = torch.tensor(facts["nested_offset"], dtype=torch.float32, device=packed.device)
        state = QuantState4bit(found[0], facts["blocksize"], tuple(facts["shape"]), dtype, **tensors)
        on_meta = {name: x.to("meta") for name, x in tensors.items()}
        dequantize_4bit(packed.to("meta"), state._replace(**on_meta))  # which checks that they fit each other
        self._set(packed, state)


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as a dense tensor, where a quantized one may stand in its place."""
    return layer.dequantize(layer.compute_dtype) if isinstance(layer, QuantizedLinear) else layer.weight


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype that a linear layer, dense or quantized, has its inputs in."""
    dtype = getattr(layer, "compute_dtype", None)
    return layer.weight.dtype if dtype is None else dtype


def relative_error(x: Tensor, exact: Tensor) -> float:
    """The root mean square of the error of x over that of what is exact."""
    size = torch.linalg.vector_norm(exact)
    return 0.0 if size == 0 else (torch.linalg.vector_norm(x - exact) / size).item()


def _facts_key(quant_type: str) -> str:
    """The key of what the codes mean."""
    return f"weight.quant_state.{'pynlp' if quant_type == 'mxfp4' else 'bitsandbytes'}__{quant_type}"


def _codes(quant_type: str) -> Tensor:
    return torch.tensor(FORMATS[QUANT_TYPES.index(quant_type)].codes)
