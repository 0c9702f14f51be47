"""The names by which transformers finds the kernel, and models that are changed to use it."""

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.bloom.modeling_bloom import BloomPreTrainedModel
from transformers.models.falcon.modeling_falcon import FALCON_ATTENTION_CLASSES, FalconPreTrainedModel
from transformers.models.gpt_neo.modeling_gpt_neo import GPT_NEO_ATTENTION_CLASSES, GPTNeoPreTrainedModel
from transformers.models.gptj.modeling_gptj import GPTJ_ATTENTION_CLASSES, GPTJPreTrainedModel
from transformers.models.mpt.modeling_mpt import MptBlock, MptPreTrainedModel
from transformers.models.t5.modeling_t5 import T5PreTrainedModel

from pynlp.integrations.transformers.attention import attention_forward
from pynlp.integrations.transformers.experts import experts_forward
from pynlp.integrations.transformers.fused import (
    FUSED,
    FusedFalconAttention,
    FusedGPTJAttention,
    FusedGPTNeoAttention,
    refuse_alibi,
)
from pynlp.integrations.transformers.masks import NAME, structured_mask

PRETRAINED = (
    T5PreTrainedModel, BloomPreTrainedModel, MptPreTrainedModel, GPTNeoPreTrainedModel, GPTJPreTrainedModel,
    FalconPreTrainedModel,
)  # fmt: skip


def register() -> None:
    """Make `attn_implementation="pynlp"` and `experts_implementation="pynlp"` known to transformers.

    A second call does nothing.

    What the kernel cannot serve (a mask of one's own, a mask function other than transformers' causal, sliding-window,
    bidirectional and packed ones, gaps in the padding, `output_attentions=True`, a paged cache, head dimensions above
    256; padding under `torch.compile(fullgraph=True)`, which leaves no way to look at it) runs on transformers' own
    attention, with one warning that names the reason. So are experts with a gate other than SiLU's and GPT-OSS's, or
    with norms behind them; models that do not ask for an implementation of experts (Llama 4, JetMoe) run on their own.

    Example:
        >>> from pynlp.integrations.transformers import register
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> register()
        >>> config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
        >>> model = GPT2LMHeadModel._from_config(config, attn_implementation="pynlp")
        >>> model.config._attn_implementation
        'pynlp'
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, structured_mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    # The tables in which these three look for their attention when they are made.
    GPT_NEO_ATTENTION_CLASSES[NAME] = FusedGPTNeoAttention
    GPTJ_ATTENTION_CLASSES[NAME] = FusedGPTJAttention
    FALCON_ATTENTION_CLASSES[NAME] = FusedFalconAttention


def patch(model: nn.Module) -> nn.Module:
    """Let the kernel compute the attention of a T5, BLOOM, MPT, GPT-Neo, GPT-J or Falcon from now on.

    T5's relative bias, BLOOM's and MPT's ALiBi and their gradients are computed in the kernel. The model itself is
    changed; a second call does nothing. What the kernel cannot serve (see `register`) runs on the original modules,
    with one warning that names the reason.

    Args:
        model: One of the six of transformers, whichever its head, or a model that has one in it.

    Returns:
        The model.

    Raises:
        ValueError: no module of the model is the attention of one of the six, or it is that of a Falcon with ALiBi.

    Example:
        >>> from pynlp.integrations.transformers import patch
        >>> from transformers import T5Config, T5Model
        >>> config = T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=50)
        >>> model = patch(T5Model(config))
    """
    modules = [module for module in model.modules() if type(module) in FUSED or type(module) in FUSED.values()]
    if not modules:
        names = ", ".join(sorted(cls.__name__ for cls in FUSED if cls is not MptBlock))
        raise ValueError(
            f"model: expected one with a module of class {names}, got {type(model).__name__}; models that go through "
            f"transformers' AttentionInterface need register() and attn_implementation={NAME!r} instead"
        )
    for module in modules:
        if type(module) in FALCON_ATTENTION_CLASSES.values():
            refuse_alibi(module.config)
    register()
    for module in modules:
        module.__class__ = FUSED.get(type(module), type(module))
    for module in model.modules():
        if isinstance(module, PRETRAINED):
            module.config._attn_implementation = NAME
    return model
