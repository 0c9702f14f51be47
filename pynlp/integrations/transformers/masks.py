"""The mask of a forward pass as structure, in the terms of `pynlp.functional.attention`, instead of Sq x Sk numbers.

transformers asks for a mask once a forward pass, before the first layer. One that the kernel can serve comes to
attention as structure; any other one keeps a reason and is served as a dense mask.

Shapes: B batch, Sq queries, Sk keys, of which a static cache may not have written the last ones yet.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import _active_collector

from pynlp.backends import warn_once
from pynlp.integrations.transformers.structure import Structure, structure_of, with_padding

NAME = "pynlp"
PATCHED = "T5, BLOOM, MPT, GPT-Neo, GPT-J and Falcon"
WEIGHTS = "output_attentions=True asks for the weights"
aten = torch.ops.aten


def weights_collected(collected: dict | None) -> bool:
    """Whether transformers' hooks collect attention's weights, among what they collect, in this forward pass."""
    return collected is not None and any(name.endswith("attentions") for name in collected)


class Mask(Tensor):
    """A mask `(B, 1, Sq, Sk)` of which only the structure exists.

    It is a tensor because generate() and the models hand it on as one. Any operation on it gets the tensor that the
    model has for eager attention: 0 where a query sees a key, the dtype's lowest number where it does not; as booleans
    False and True.

    Args:
        shape: `(B, 1, Sq, Sk)`.
        dtype: The dtype that eager attention's mask would have.
        device: The device that it would be on.
        structure: The structure, or the reason why the kernel cannot serve this mask.
        make_dense: Makes the mask as booleans, True where a query sees a key.
    """

    structure: Structure | None
    reason: str | None

    @staticmethod
    def __new__(cls, shape, dtype, device, structure: Structure | str, make_dense: Callable[[], Tensor]):
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        mask.structure, mask.reason = (None, structure) if isinstance(structure, str) else (structure, None)
        mask._make_dense = make_dense
        # With a reason it will be needed, and it may be in a graph, which cannot keep it for the layer after.
        mask._dense = None if mask.reason is None else make_dense()
        return mask

    @property
    def dense(self) -> Tensor:
        """The mask as Sq x Sk booleans a row, True where a query sees a key."""
        if self._dense is not None:
            return self._dense
        dense = self._make_dense()
        if not torch.compiler.is_compiling():
            self._dense = dense
        return dense

    @property
    def eagers(self) -> Tensor:
        """The mask that the model has for eager attention."""
        return additive(self.dense, self.dtype)

    def refused(self, reason: str) -> "Mask":
        """The same mask with a reason, which is not the mask's, why the kernel cannot serve the call."""
        return Mask(self.shape, self.dtype, self.device, reason, lambda: self.dense)

    def __repr__(self, *, tensor_contents=None):
        return f"Mask({tuple(self.shape)}, {self.reason or self.structure})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is aten.detach.default:
            return args[0]
        if function is aten.alias.default:  # a view, which must be another tensor
            return args[0]._on(args[0].device, args[0].dtype)
        if function is aten._to_copy.default and kwargs.get("dtype", args[0].dtype) in (args[0].dtype, torch.bool):
            return args[0]._on(kwargs.get("device") or args[0].device, kwargs.get("dtype", args[0].dtype))
        warn_once(
            f"attn_implementation={NAME!r}: the model computes with its mask ({function}), so the mask of eager "
            f"attention is made, Sq x Sk numbers a row; pynlp.integrations.transformers.patch(model) knows {PATCHED}"
        )
        args, kwargs = tree_map_only(Mask, lambda mask: mask.eagers, (args, kwargs))
        return function(*args, **kwargs)

    def _on(self, device, dtype) -> "Mask":
        structure = self.reason or self.structure.to(device)
        return Mask(self.shape, dtype, device, structure, lambda: self.dense.to(device))


def additive(dense: Tensor, dtype: torch.dtype) -> Tensor:
    """Eager attention's mask of this dtype for one of booleans: added to scores, or as booleans True where hidden."""
    hidden = dense.logical_not()
    if dtype == torch.bool:
        return hidden
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)


def structured_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **kwargs,
) -> Tensor | None:
    """The mask function to register: transformers calls it once for each kind of layer in a forward pass.

    Args:
        q_offset, kv_offset: Positions of the first query and of the first key.
        mask_function: The keys that are seen, padding aside.
        attention_mask: Boolean `(B, positions)`, False where there is padding; positions beyond it are padding too.
        dtype: The dtype of eager attention's mask.
        The others: as in transformers.masking_utils.sdpa_mask.

    Returns:
        A `Mask`; where values cannot be looked at, in a graph that must not break or in fake tensors, what the model
        has for eager attention.
    """
    arguments = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, device=device,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        blind = in_one_graph()
    else:
        blind = any(is_tracing(x) for x in (attention_mask, q_offset) if isinstance(x, Tensor))
    if blind:
        mask = eager_mask(**arguments, dtype=dtype, **kwargs)
        simple = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
        if simple and mask is not None and attention_mask is None and not isinstance(q_offset, Tensor):
            # What needs no look is known all the same, and attention goes without the numbers.
            mask.structure = structure_of(batch_size, q_length, kv_length, q_offset - kv_offset, mask_function)
        return mask
    return _looked_at(arguments, dtype)


@torch.compiler.disable(reason="what it looks up on the device decides how attention is called")
def _looked_at(arguments: dict, dtype: torch.dtype) -> Mask:
    # A static cache's own counter has moved on by the time when somebody may ask for the dense mask.
    arguments["q_offset"] = int(arguments["q_offset"])
    batch, seqlen_q, seqlen_k, q_offset, kv_offset, function, attention_mask, _, device = arguments.values()
    structure = structure_of(batch, seqlen_q, seqlen_k, q_offset - kv_offset, function)
    if isinstance(structure, Structure) and attention_mask is not None:
        structure = with_padding(structure, attention_mask[:, kv_offset:])
    if weights_collected(_active_collector.get()):  # here it can be asked, where a graph goes on it cannot
        structure = WEIGHTS

    def make_dense() -> Tensor:
        return sdpa_mask(**arguments, allow_is_causal_skip=False)

    return Mask((batch, 1, seqlen_q, seqlen_k), dtype, torch.device(device), structure, make_dense)


@torch.compiler.assume_constant_result
def in_one_graph() -> bool:
    """Whether a call that Dynamo cannot trace is an error in what it traces now, as under fullgraph=True."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer = InstructionTranslator.current_tx()
        return bool(tracer.one_graph or tracer.error_on_graph_break)
    except (ImportError, AttributeError):  # no Dynamo: an export that cannot break either
        return True
