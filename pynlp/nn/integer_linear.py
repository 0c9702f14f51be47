"""Linear layers of weights that are integers, as modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pynlp.nn.quantized_linear import QuantizedLinear
from pynlp.ops.quantization.int4 import QuantStateInt4, dequantize_int4, int4_linear, quantize_int4
from pynlp.ops.quantization.int8 import (
    QuantStateInt8,
    check_threshold,
    dequantize_int8,
    int8_dynamic_linear,
    int8_linear,
    quantize_int8,
)
from pynlp.ops.quantization.integers import check_activations


class IntegerLinear(QuantizedLinear):
    """What layers of integers share: codes, and a scale for the tensor, each row or each group of values in a row."""

    PARTS = ("scale", "zero_point", "minimum")
    CODES = "weight.codes"  # a dense layer would take codes of this dtype and shape for its weight
    BITS: int
    QUANTIZE: Callable
    DEQUANTIZE: Callable

    def _quantize(self, weight: Tensor, **options) -> None:
        self._set(*type(self).QUANTIZE(weight, **options))

    def _set(self, codes: Tensor, state: QuantStateInt8 | QuantStateInt4) -> None:
        super()._set(codes, state)
        self.group_size = state.group_size

    def _options(self) -> dict[str, Any]:
        scheme = "symmetric" if self.zero_point is None and self.minimum is None else "affine"
        if self.scale.shape[0] != self.out_features:
            return dict(scheme=scheme, granularity="tensor")
        if self.group_size == max(1, self.in_features):
            return dict(scheme=scheme, granularity="channel")
        return dict(scheme=scheme, granularity="group", group_size=self.group_size)

    @property
    def state(self) -> QuantStateInt8 | QuantStateInt4:
        """What the codes in `weight` mean."""
        return self._state(self.group_size, self.dtype, self.scale, self.zero_point, self.minimum)

    def _state(self, group_size: int, dtype: torch.dtype, *parts: Tensor | None) -> QuantStateInt8 | QuantStateInt4:
        if self.BITS == 8:
            return QuantStateInt8(group_size, dtype, *parts)
        return QuantStateInt4(group_size, self.in_features, dtype, *parts)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `(out_features, in_features)` as a dense tensor, of the quantized one's dtype by default."""
        return type(self).DEQUANTIZE(self.weight, self.state, dtype=dtype)

    def extra_repr(self) -> str:
        """The sizes and the scheme, for print."""
        options = ", ".join(f"{name}={value!r}" for name, value in (self._options() | self._more()).items())
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {options}"

    def _more(self) -> dict[str, Any]:
        """What the layer is told beside how to quantize."""
        return {}

    def _written(self) -> dict[str, Tensor]:
        parts = {f"weight.{name}": getattr(self, name) for name in self.PARTS}
        parts[f"weight.quant_state.pynlp__int{self.BITS}"] = self._facts(group_size=self.group_size)
        return {key: x for key, x in parts.items() if x is not None}

    def _read(self, codes: Tensor, parts: dict[str, Tensor]) -> None:
        key = f"weight.quant_state.pynlp__int{self.BITS}"
        if self.BITS == 8 and "SCB" in parts:  # bitsandbytes': the rows' largest magnitudes
            state = self._state(max(1, self.in_features), self.compute_dtype, parts["SCB"].float()[:, None] / 127)
        elif key in parts:
            facts, dtype = self._read_facts(parts[key])
            if not isinstance(facts.get("group_size"), int) or facts["group_size"] < 1:
                raise ValueError(f"expected group_size to be a positive int, got {facts.get('group_size')!r}")
            if "weight.scale" not in parts:
                raise ValueError("expected scale beside it")
            state = self._state(facts["group_size"], dtype, *(parts.get(f"weight.{name}") for name in self.PARTS))
        else:
            beside = "a quant_state or SCB" if self.BITS == 8 else f"a quant_state of int{self.BITS}"
            raise ValueError(f"expected a dense weight, or {beside} beside it, which tells what codes mean")
        expected = self.out_features, self.in_features if self.BITS == 8 else (self.in_features + 1) // 2
        if tuple(codes.shape) != expected:
            raise ValueError(f"expected shape {expected}, got {tuple(codes.shape)}")
        on_meta = {name: x.to("meta") for name in self.PARTS if (x := getattr(state, name)) is not None}
        type(self).DEQUANTIZE(codes.to("meta"), state._replace(**on_meta))  # which checks that they fit each other
        self._set(codes, state)


class Linear8bit(IntegerLinear):
    """A linear layer whose weight is a constant in 8 bits; gradients are those of its input and of the bias.

    It loads state dicts of its own, of dense layers, and of bitsandbytes' Linear8bitLt. `.to(dtype)` and `.half()`
    leave the weight and its scales as they are.

    Args:
        in_features, out_features, bias, device: As nn.Linear's; the new layer's weight, too, before it is quantized.
        scheme, granularity, group_size: As `pynlp.functional.quantize_int8`'s.
        dtype: Of the bias, and the default of `dequantize`.

    Attributes:
        weight: int8 `(out_features, in_features)`.
        state: What its codes mean.
        bias: `(out_features,)` or None; the only parameter.

    Example:
        >>> import torch
        >>> from pynlp.nn import Linear8bit
        >>> layer = Linear8bit.from_linear(torch.nn.Linear(512, 256), scheme="affine", granularity="group")
        >>> layer(torch.randn(3, 512)).shape
        torch.Size([3, 256])
    """

    BITS, QUANTIZE, DEQUANTIZE = 8, quantize_int8, dequantize_int8

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: str = "symmetric",
        granularity: str = "channel",
        group_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        options = dict(scheme=scheme, granularity=granularity, group_size=group_size)
        self._init(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), options)

    def forward(self, x: Tensor) -> Tensor:
        """`(.., out_features)` of x `(.., in_features)`, in x's dtype."""
        return int8_linear(x, self.weight, self.state, self.bias)

    def bitsandbytes_state_dict(self) -> dict[str, Tensor]:
        """The state dict of bitsandbytes' Linear8bitLt with this weight.

        Raises:
            ValueError: the codes are not symmetric with a scale a row, the only ones that it has.
        """
        if self._options() != dict(scheme="symmetric", granularity="channel"):
            raise ValueError(f"bitsandbytes' layers have symmetric codes with a scale a row, got {self.extra_repr()}")
        state = {"weight": self.weight, "SCB": self.scale[:, 0].float() * 127}
        state["weight_format"] = torch.tensor(0, dtype=torch.uint8)  # rows
        return state if self.bias is None else state | {"bias": self.bias.detach()}


class Linear8bitDynamic(Linear8bit):
    """A linear layer in integers: a constant weight in 8 bits, and inputs that are rounded to 8 bits on the fly.

    It loads what Linear8bit loads. Gradients are those of the input as it was, and of the bias.

    Args:
        in_features, out_features, bias, scheme, granularity, group_size, device, dtype: As Linear8bit's.
        outlier_threshold: As `pynlp.functional.int8_dynamic_linear`'s. 6.0 makes it the layer of LLM.int8().

    Example:
        >>> import torch
        >>> from pynlp.nn import Linear8bitDynamic
        >>> layer = Linear8bitDynamic.from_linear(torch.nn.Linear(512, 256), outlier_threshold=6.0)
        >>> layer(torch.randn(3, 512)).shape
        torch.Size([3, 256])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: str = "symmetric",
        granularity: str = "channel",
        group_size: int | None = None,
        outlier_threshold: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        options = dict(scheme=scheme, granularity=granularity, group_size=group_size)
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._init(dense, options | dict(outlier_threshold=outlier_threshold))

    def _init(self, dense: nn.Linear, options: dict[str, Any]) -> None:
        self.outlier_threshold = options.pop("outlier_threshold", None)
        check_threshold(self.outlier_threshold)
        super()._init(dense, options)

    def forward(self, x: Tensor) -> Tensor:
        """`(.., out_features)` of x `(.., in_features)`, in x's dtype."""
        return int8_dynamic_linear(x, self.weight, self.state, self.bias, outlier_threshold=self.outlier_threshold)

    def _more(self) -> dict[str, Any]:
        return {} if self.outlier_threshold is None else dict(outlier_threshold=self.outlier_threshold)


class LinearInt4(IntegerLinear):
    """A linear layer whose weight is a constant in 4 bits, at even distances; the format of GPTQ, AWQ and GGUF's Q4.

    Gradients are those of its input and of the bias. It loads state dicts of its own and of dense layers. `.to(dtype)`
    and `.half()` leave the weight and its scales as they are. At equal size Linear4bit's "nf4" loses less without
    calibration.

    Args:
        in_features, out_features, bias, device: As nn.Linear's; the new layer's weight, too, before it is quantized.
        scheme, granularity, group_size: As `pynlp.functional.quantize_int4`'s.
        activations: As `pynlp.functional.int4_linear`'s: "int8" rounds inputs, too.
        dtype: Of the bias, and the default of `dequantize`.

    Attributes:
        weight: uint8 `(out_features, ceil(in_features / 2))`, two codes a byte.
        state: What its codes mean.
        bias: `(out_features,)` or None; the only parameter.

    Example:
        >>> import torch
        >>> from pynlp.nn import LinearInt4
        >>> layer = LinearInt4.from_linear(torch.nn.Linear(512, 256), group_size=32)
        >>> layer(torch.randn(3, 512)).shape
        torch.Size([3, 256])
    """

    BITS, QUANTIZE, DEQUANTIZE = 4, quantize_int4, dequantize_int4

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: str = "affine",
        granularity: str = "group",
        group_size: int | None = None,
        activations: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        options = dict(scheme=scheme, granularity=granularity, group_size=group_size, activations=activations)
        self._init(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), options)

    def _init(self, dense: nn.Linear, options: dict[str, Any]) -> None:
        self.activations = options.pop("activations", None)
        check_activations(self.activations)
        super()._init(dense, options)

    def forward(self, x: Tensor) -> Tensor:
        """`(.., out_features)` of x `(.., in_features)`, in x's dtype."""
        return int4_linear(x, self.weight, self.state, self.bias, activations=self.activations)

    def _more(self) -> dict[str, Any]:
        return {} if self.activations is None else dict(activations=self.activations)
