"""Quantization of transformers' models while they are loaded, by `quantization_config=PynlpConfig(..)`."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pynlp.nn.lora import LoRALinear
from pynlp.nn.quantized_linear import QuantizedLinear
from pynlp.quantize import Report, quantize_
from pynlp.quantize.model import check_names, choose

METHOD = "pynlp"  # the quant_method in a config.json


@register_quantization_config(METHOD)
class PynlpConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model whose linear layers are quantized as `pynlp.quantize.quantize_` does it.

    `from_pretrained` quantizes a dense checkpoint on one device after loading it. What `save_pretrained` then writes is
    loaded as it is, code by code: `import pynlp.integrations.transformers` before. A model that `quantize_` has
    quantized is saved for that, too, after `model.config.quantization_config = PynlpConfig(..)` of the same arguments.

    Args:
        how, skip, options: As `quantize_`'s.

    Attributes:
        quant_method: "pynlp", by which transformers finds this class.

    Raises:
        ValueError, TypeError: as `quantize_`. So does loading: a pattern in skip that fits no layer, no layer to
            quantize, more than one device, a checkpoint without a layer's codes or with parts of them.

    Example:
        >>> from pathlib import Path
        >>> from pynlp.integrations.transformers import PynlpConfig
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
        >>> GPT2LMHeadModel(config).save_pretrained(Path("dense"))
        >>> how = PynlpConfig("nf4", skip=["*.attn.c_attn"])
        >>> model = GPT2LMHeadModel.from_pretrained(Path("dense"), quantization_config=how)
        >>> model.transformer.h[0].mlp.c_fc
        Linear4bit(32, 128, bias=True, quant_type='nf4', blocksize=64)
        >>> model.save_pretrained(Path("small"))
        >>> again = GPT2LMHeadModel.from_pretrained(Path("small"))
    """

    def __init__(self, how: str = "nf4", skip: Sequence[str] = (), quant_method: str = METHOD, **options):
        if quant_method != METHOD:
            raise ValueError(f"quant_method: expected {METHOD!r}, got {quant_method!r}")
        check_names("skip", skip)
        self.quant_method, self.how, self.skip, self.options = METHOD, how, list(skip), options
        self.layer(nn.Linear(32, 1, bias=False, device="meta"))  # which refuses what is off

    def layer(self, dense: nn.Module) -> QuantizedLinear:
        """The quantized layer in place of a dense one."""
        parent = nn.Sequential(dense)
        quantize_(parent, self.how, **self.options)
        return parent[0]

    def to_dict(self) -> dict[str, Any]:
        """What a config.json says, of which `PynlpConfig(**it)` is made again."""
        return {"quant_method": self.quant_method, "how": self.how, "skip": list(self.skip), **self.options}


@register_quantizer(METHOD)
class PynlpQuantizer(HfQuantizer):
    """How transformers quantizes a dense checkpoint, or loads a quantized one; see PynlpConfig.

    Attributes:
        report: What `quantize_` lost and saved; None of a checkpoint that was quantized before.
    """

    quantization_config: PynlpConfig
    report: Report | None = None

    def __init__(self, quantization_config: PynlpConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        layer = quantization_config.layer(nn.Linear(32, 1, bias=False, device="meta"))
        self.keys = sorted({"weight", *layer.state_dict()}, key=len, reverse=True)  # in place of a weight's
        self.found: dict[str, dict[str, Tensor]] = {}  # the tensors of quantized layers, by the layers' names

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What the tensors of a quantized checkpoint go through on their way to the model."""
        return [WeightConverter(list(self.keys), "weight", [Collect(self)])] if self.pre_quantized else []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        places = set((getattr(model, "hf_device_map", None) or {}).values())
        if len(places) > 1:
            raise ValueError(f"device_map: expected one device, got {', '.join(sorted(map(str, places)))}")
        config = self.quantization_config
        if not self.pre_quantized:
            self.report = quantize_(model, config.how, skip=config.skip, **config.options)
            return model
        for name in list(self.found):
            model.set_submodule(name, self._layer(name, model.get_submodule(name)))
        # Saving takes the names as they are; transformers' way back would fit parts of weights to patterns of others.
        model._weight_conversions = [x for x in model._weight_conversions if not _collects(x)]
        names = [name for name, _ in model.named_modules()]
        chosen, _ = choose(model, [x for x in config.skip if any(fnmatchcase(name, x) for name in names)])
        if chosen:
            raise ValueError(f"checkpoint: expected quantized weights of {', '.join(chosen)}, got none")
        return model

    def _layer(self, name: str, dense: nn.Module) -> QuantizedLinear:
        """The quantized layer in place of one whose weight was left on the meta device."""
        layer = self.quantization_config.layer(dense)
        parts = self.found.pop(name)
        if any(x.is_floating_point() for key, x in parts.items() if key in ("weight", layer.CODES)):
            raise ValueError(f"checkpoint: expected codes as {name}.weight, got a dense weight beside parts of others")
        if layer.bias is not None:
            parts["bias"] = layer.bias  # loaded before
        try:
            layer.load_state_dict(parts, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"checkpoint: expected the parts of {name}, a quantized layer, got others: {error}"
            ) from None
        return layer

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, Any]]:
        """Nothing but the model's own state, as long as loading it gives the model again.

        Raises:
            ValueError: it has adapters, or layers that are quantized otherwise than its configuration says.
        """
        cls = type(self.quantization_config.layer(nn.Linear(32, 1, bias=False, device="meta")))
        for name, layer in model.named_modules():
            if isinstance(layer, LoRALinear):
                raise ValueError(
                    f"model: expected no adapters, which save_adapters writes and remove_adapters takes out, got {name}"
                )
            if isinstance(layer, QuantizedLinear) and type(layer) is not cls:
                raise ValueError(
                    f"model: expected {cls.__name__}s, as its quantization_config says, got {type(layer).__name__} "
                    f"as {name}"
                )
        return None, {}

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` can save the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether what is not quantized can be trained, adapters among it."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` takes the model."""
        return True


class Collect(ConversionOps):
    """Keeps a quantized layer's tensors for the quantizer; a dense weight goes on to the model, in its dtype."""

    def __init__(self, hf_quantizer: PynlpQuantizer):
        self.hf_quantizer = hf_quantizer  # which also tells transformers to cast nothing itself

    def __deepcopy__(self, memo):
        """The same: transformers copies it for each weight, and all are to be kept in one place."""
        return self

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        *args,
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str],
        **kwargs,
    ) -> dict[str, Tensor]:
        """What the model is to load: a dense weight, or nothing."""
        parts = {name: tensors[0] for name, tensors in input_dict.items()}
        weight = model.get_parameter_or_buffer(full_layer_name)
        if parts.keys() == {"weight"} and parts["weight"].is_floating_point():
            return {"weight": parts["weight"].to(weight.dtype)}
        self.hf_quantizer.found[full_layer_name.removesuffix(".weight")] = parts
        weight._is_hf_initialized = True
        missing_keys.discard(full_layer_name)
        return {}


def _collects(conversion: object) -> bool:
    return isinstance(conversion, WeightConverter) and any(isinstance(x, Collect) for x in conversion.operations)
