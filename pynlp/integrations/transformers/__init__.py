"""Models of Hugging Face transformers on `pynlp.functional.attention` and, with experts, on `moe_mlp`.

`register()` once, then any model that goes through transformers' AttentionInterface takes
`attn_implementation="pynlp"`, at loading or by `model.set_attn_implementation("pynlp")`. `patch(model)` is for those
that add a dense bias to their scores or have attention of their own: T5, BLOOM, MPT; GPT-Neo, GPT-J, Falcon. Models
with experts take `experts_implementation="pynlp"` likewise, or `model.set_experts_implementation("pynlp")`.

Example:
    >>> import torch
    >>> from pynlp.integrations.transformers import register
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> register()
    >>> config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    >>> model = LlamaForCausalLM._from_config(config, attn_implementation="pynlp")  # or from_pretrained(.., the same)
    >>> model(torch.ones(1, 5, dtype=torch.long)).logits.shape
    torch.Size([1, 5, 50])
"""

import sys

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        f"pynlp.integrations.transformers needs transformers: {sys.executable} -m pip install 'transformers>=5.20'"
    ) from error

from pynlp.integrations.transformers.masks import NAME, Mask
from pynlp.integrations.transformers.patch import patch, register
from pynlp.integrations.transformers.quantization import PynlpConfig

__all__ = ["NAME", "Mask", "PynlpConfig", "patch", "register"]
