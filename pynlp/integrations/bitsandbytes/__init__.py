"""Models of bitsandbytes on pynlp's kernels, on CPUs: `load_in_4bit=True`, PEFT and QLoRA, as they are written.

With pynlp installed, `import bitsandbytes` finds `register` by its entry point `bitsandbytes.backends` and calls it.
The environment variable PYNLP_BITSANDBYTES=0 leaves bitsandbytes as it is. What bitsandbytes does before that, on CPUs
with BF16 instructions, cannot be changed from here: it looks for a kernel on a model hub, and warns if there is none.

Example:
    >>> import bitsandbytes
    >>> import torch
    >>> from pynlp.integrations.bitsandbytes import register
    >>> register()  # where `import bitsandbytes` has not done so
    >>> layer = bitsandbytes.nn.Linear4bit(50, 30, quant_type="nf4").to("cpu")
    >>> x = torch.randn(3, 50, requires_grad=True)
    >>> layer(x).sum().backward()
"""

from pynlp.integrations.bitsandbytes.registration import register, unregister

__all__ = ["register", "unregister"]
