"""Low-rank adapters: a small product that trains beside a linear layer, whose weight stays as it is."""

import copy
import math

import torch
from torch import Tensor, nn

from pynlp.nn.linear import Linear, is_conv1d
from pynlp.nn.quantized_linear import QuantizedLinear, compute_dtype, dense_weight, relative_error
from pynlp.ops.common.checks import DTYPES, as_int, check_number, check_share


class LoRALinear(nn.Module):
    """`base(x) + scaling * dropout(x) @ lora_A.T @ lora_B.T`, of which lora_A and lora_B train and the base does not.

    It starts as the base layer, for lora_B is 0. Its state dict is the base's, under "base.", lora_A and lora_B, merged
    or not: `merge` makes a changed copy of the base and leaves the base alone, so nothing is lost in a checkpoint, and
    `unmerge` drops the copy, which gives every bit back. While merged both are in memory, lora_A and lora_B get no
    gradients, and the dropout is off.

    Args:
        base: A quantized layer of pynlp.nn, nn.Linear, `pynlp.nn.Linear`, or the Conv1D of transformers' GPT-2. Its
            parameters get requires_grad=False until `unload` gives it back.
        rank: Columns of lora_B, r.
        alpha: The adapter's weight: `scaling` is alpha / r.
        dropout: Share of the adapter's inputs that is set to 0 in training.
        rslora: Whether `scaling` is alpha / sqrt(r).
        dtype: The adapter's: by default the base's, fp32 where that is quantized. Inputs may have another.

    Attributes:
        lora_A: `(r, in_features)`; uniform within +-1 / sqrt(in_features) at the start.
        lora_B: `(out_features, r)`; 0 at the start.

    Raises:
        ValueError, TypeError: an argument is off; the message names it, and the base is unchanged.

    Source: Hu et al., arXiv 2106.09685, section 4.1; over quantized weights: Dettmers et al., arXiv 2305.14314; rslora:
        Kalajdzievski, arXiv 2312.03732.

    Example:
        >>> import torch
        >>> from pynlp.nn import Linear4bit, LoRALinear
        >>> layer = LoRALinear(Linear4bit(512, 256), rank=4)
        >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)
        3072
        >>> layer(torch.randn(3, 512)).shape
        torch.Size([3, 256])
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = shape_of(base)
        self.rank, self.alpha, self.dropout, self.rslora = as_int("rank", rank), alpha, dropout, rslora
        if self.rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank}")
        check_number("alpha", alpha)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha: expected a finite number, got {alpha}")
        check_share("dropout", dropout)
        if not isinstance(rslora, bool):
            raise TypeError(f"rslora: expected True or False, got {rslora!r}")
        if dtype is None:
            dtype = torch.float32 if isinstance(base, QuantizedLinear) else base.weight.dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype!r}")
        like = dict(device=base.weight.device, dtype=dtype)
        self.lora_A = nn.Parameter(torch.empty(self.rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, self.rank, **like))
        self.reset_parameters()
        self._trained = {name for name, p in base.named_parameters() if p.requires_grad}
        self.base = base.requires_grad_(False)
        self._set_merged(None)
        self.register_load_state_dict_post_hook(_merge_again)
        self.train(base.training)

    def reset_parameters(self) -> None:
        """Makes the adapter a new one."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def scaling(self) -> float:
        """The factor of the adapter's product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def merged(self) -> bool:
        """Whether forward is that of a base layer with the adapter in its weight."""
        return self._merged is not None

    @property
    def weight(self) -> Tensor:
        """The weight that the layer amounts to, in the base's layout and dtype, with its gradients, for who reads it.

        It is computed at every access, and knows of no dropout.
        """
        if self.merged:
            return dense_weight(self._merged)
        weight, update = dense_weight(self.base), self.scaling * (self.lora_B @ self.lora_A)
        return (weight + (update.T if is_conv1d(self.base) else update)).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base.bias

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the base has its inputs in."""
        return compute_dtype(self.base)

    def forward(self, x: Tensor) -> Tensor:
        """`(.., out_features)` of x `(.., in_features)`, in the dtype of the base's result."""
        if self.merged:
            return self._merged(x)
        y = self.base(x)
        dtype = torch.promote_types(x.dtype, self.lora_A.dtype)
        x = nn.functional.dropout(x, self.dropout, self.training).to(dtype)
        # Not torch.add's alpha, which torch 2.13's inductor drops where the other term is a product.
        inner = nn.functional.linear(x, self.lora_A.to(dtype)) * self.scaling
        return (y + nn.functional.linear(inner, self.lora_B.to(dtype))).to(y.dtype)

    def merge(self) -> float:
        """Put the adapter, as it is now, into the weight of a copy of the base, which forward then uses.

        A dense weight is rounded to its dtype once; a quantized one is quantized again, as the base was.

        Returns:
            What that costs: root mean square of the error of the copy's weight over that of the exact sum of the base's
            weight, as it is, and the adapter's; NaN on the meta device.

        Raises:
            ValueError: the sum is not finite; the layer is unchanged.

        Example:
            >>> import torch
            >>> from pynlp.nn import Linear8bit, LoRALinear
            >>> layer = LoRALinear(Linear8bit(64, 64))
            >>> _ = torch.nn.init.normal_(layer.lora_B, std=0.01)
            >>> layer.merge() < 0.02
            True
        """
        base = self.base
        with torch.inference_mode(False), torch.no_grad():
            dtype = torch.float32 if isinstance(base, QuantizedLinear) else base.weight.dtype
            wide = torch.promote_types(torch.promote_types(torch.float32, dtype), self.lora_A.dtype)
            exact = _dense(base, wide) + self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))
            weight = exact.to(dtype)
            if not weight.is_meta and not weight.isfinite().all():
                expected = f"expected finite values in {dtype}, got NaN or an infinity"
                raise ValueError(f"base.weight + scaling * lora_B @ lora_A: {expected}")
            merged = _with_weight(base, weight)
            self._set_merged(merged)
            if weight.is_meta:
                return float("nan")
            return relative_error(_dense(merged, wide), exact)

    def unmerge(self) -> None:
        """Go back to the base, which has the bits that it had, and the adapter beside it."""
        self._set_merged(None)

    def unload(self) -> nn.Module:
        """The base layer, or its copy with the adapter if that is merged; what trained before trains again.

        The adapter is not to be used after that.
        """
        layer = self._merged if self.merged else self.base
        for name, p in layer.named_parameters():
            if name in self._trained:
                p.requires_grad_(True)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """The adapter's options, for print."""
        more = ", rslora=True" * self.rslora + ", merged" * self.merged
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}{more}"

    def _set_merged(self, layer: nn.Module | None) -> None:
        self.__dict__["_merged"] = layer  # not a submodule, whose weights would be in state_dict and parameters

    def _apply(self, fn, recurse=True):
        """Moves all tensors, as every module does, and the merged layer's."""
        super()._apply(fn, recurse)
        if self.merged:
            self._merged._apply(fn, recurse)
        return self


def shape_of(base: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a layer that can have an adapter."""
    if isinstance(base, QuantizedLinear):
        return base.out_features, base.in_features
    is_linear = isinstance(base, Linear) or (isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward)
    if not is_linear and not is_conv1d(base):
        raise TypeError(
            "base: expected a quantized layer of pynlp.nn, nn.Linear or GPT-2's Conv1D, without a forward of its own, "
            f"got {type(base).__name__}"
        )
    weight = base._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight) or weight.dtype not in DTYPES:
        got = (
            "none" if weight is None else "one that is not there yet" if nn.parameter.is_lazy(weight) else weight.dtype
        )
        raise TypeError(f"base.weight: expected a parameter in float32, bfloat16, float16 or float64, got {got}")
    return tuple(weight.shape[::-1] if is_conv1d(base) else weight.shape)


def _dense(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of a linear layer of whatever kind."""
    if isinstance(layer, QuantizedLinear):
        return layer.dequantize(dtype)
    return (layer.weight.T if is_conv1d(layer) else layer.weight).to(dtype)


def _with_weight(base: nn.Module, weight: Tensor) -> nn.Module:
    """A layer like the base, of which it shares all but the weight, with this one (out, in)."""
    layer = copy.copy(base)
    for tensors in ("_parameters", "_buffers", "_modules"):
        layer.__dict__[tensors] = base.__dict__[tensors].copy()
    if isinstance(base, QuantizedLinear):
        layer._quantize(weight, **base._options())
        layer.dtype = base.dtype
    else:
        weight = weight.T.contiguous() if is_conv1d(base) else weight
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _merge_again(layer: LoRALinear, keys) -> None:
    """What a merged layer does when a state dict was loaded, so that it is of the weights that it has."""
    if layer.merged:
        layer.merge()
