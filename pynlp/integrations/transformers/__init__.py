"""Models of Hugging Face transformers on `pynlp.functional.attention`.

`register()` once, then any model that goes through transformers' AttentionInterface takes
`attn_implementation="pynlp"`, at loading or by `model.set_attn_implementation("pynlp")`. `patch(model)` is for those
that add a dense bias to their scores or have attention of their own: T5, BLOOM, MPT; GPT-Neo, GPT-J, Falcon.
"""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError("pynlp.integrations.transformers needs transformers: pip install 'transformers>=5.20'") from error

from pynlp.integrations.transformers.masks import NAME, Mask
from pynlp.integrations.transformers.patch import patch, register

__all__ = ["NAME", "Mask", "patch", "register"]
