"""Other libraries' products with quantized weights, as calls of x: those that are installed.

`pip install 'pynlp-kernels[peers]'` has all of them; those that are missing are told once and left out.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from pynlp.functional import QuantState4bit, QuantStateInt4


@cache
def installed(*packages: str) -> bool:
    """Whether all are; the first time, what is missing is told."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
    return not missing


@cache
def bitsandbytes():
    """bitsandbytes' functions on its own kernels, without what its import says."""
    os.environ["PYNLP_BITSANDBYTES"] = "0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes

    return bitsandbytes


def bitsandbytes_state(packed: Tensor, state: QuantState4bit) -> tuple[Tensor, object]:
    """Codes and state of ours as bitsandbytes takes them."""
    functional = bitsandbytes().functional
    code = functional.get_4bit_type(state.quant_type, device="cpu")
    theirs = functional.QuantState(
        state.absmax, torch.Size(state.shape), code, state.blocksize, state.quant_type, state.dtype
    )
    return packed.t(), theirs


def fbgemm(weight: Tensor) -> nn.Module:
    """PyTorch's dynamically quantized layer: weights and rows of x in 8 bits."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, torch.qint8)


def torch_int4(codes: Tensor, state: QuantStateInt4) -> Callable[[Tensor], Tensor]:
    """PyTorch's packed op, in which a value is (code - 8) * scale + zero."""
    plain = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1).int()
    zero = (8 - state.zero_point.float()) * state.scale
    both = torch.stack([state.scale.T, zero.T], dim=2).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(plain, 1)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, state.group_size, both)


def torchao_linear(weight: Tensor, config) -> nn.Module:
    """A layer that torchao quantized, by a configuration of torchao.quantization."""
    from torchao.quantization import quantize_

    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, config)
    return model


def onnx_int4(codes: Tensor, state: QuantStateInt4, accuracy_level: int) -> Callable[[Tensor], Tensor]:
    """ONNX Runtime's MatMulNBits. Levels of accuracy: 1 computes in fp32, 4 rounds x to 8 bits."""
    rows, columns = codes.shape[0], state.columns
    zeros = state.zero_point.to(torch.uint8)
    zeros = nn.functional.pad(zeros, (0, zeros.shape[1] % 2))
    constants = {
        "B": codes.view(rows, -1, state.group_size // 2),
        "scales": state.scale.flatten(),
        "zero_points": (zeros[:, ::2] | zeros[:, 1::2] << 4).flatten(),
    }
    options = dict(K=columns, N=rows, bits=4, block_size=state.group_size, accuracy_level=accuracy_level)
    return _onnx_node("MatMulNBits", constants, options, columns)


def onnx_nf4(packed: Tensor, state: QuantState4bit) -> Callable[[Tensor], Tensor]:
    """ONNX Runtime's MatMulBnb4."""
    rows, columns = state.shape
    constants = {"B": packed.flatten(), "absmax": state.absmax}
    options = dict(K=columns, N=rows, block_size=state.blocksize, quant_type=1)
    return _onnx_node("MatMulBnb4", constants, options, columns)


def _onnx_node(name: str, constants: dict[str, Tensor], options: dict, columns: int) -> Callable[[Tensor], Tensor]:
    """A model of one of ONNX Runtime's own nodes, on as many threads as PyTorch has."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(name, ["A", *constants], ["Y"], domain="com.microsoft", **options)
    graph = helper.make_graph(
        [node], name,
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["rows", columns])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["rows", options["N"]])],
        [numpy_helper.from_array(x.contiguous().numpy(), key) for key, x in constants.items()],
    )  # fmt: skip
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=8)
    set_up = onnxruntime.SessionOptions()
    set_up.intra_op_num_threads = torch.get_num_threads()
    set_up.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would wait beside PyTorch's
    session = onnxruntime.InferenceSession(model.SerializeToString(), set_up)
    return lambda x: torch.from_numpy(session.run(None, {"A": x.numpy()})[0])
