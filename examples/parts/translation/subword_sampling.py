"""Several segmentations of each text into subwords, of which training sees another one each time: BPE-dropout.

A merge is left out now and then, so that rare subwords, and the letters within frequent ones, are seen more often. The
library draws without a seed: what it drew is kept in a file, so that a training that is interrupted goes on with it.

Source: Provilkov et al., arXiv 1910.13267.
"""

from pathlib import Path

import torch
from parts.common.reports import write
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tqdm import tqdm

SHARE, VARIANTS = 0.1, 8  # of merges that are left out; segmentations of a text


def sample_segmentations(tokenizer: Tokenizer, texts: list[str], path: Path) -> None:
    """Writes `VARIANTS` segmentations of each text, all or nothing."""
    noisy = Tokenizer.from_str(tokenizer.to_str())
    noisy.encode_special_tokens = True
    noisy.model.dropout = SHARE
    tensors = {}
    for number in tqdm(range(VARIANTS), "Subword segmentations", leave=False):
        rows = [encoding.ids for encoding in noisy.encode_batch(texts)]
        tensors[f"{number}.lengths"] = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        tensors[f"{number}.ids"] = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    write(path, lambda part: save_file(tensors, part))


def load_segmentations(path: Path) -> list[list[list[int]]]:
    """Token ids `[variant][text]`, as they were written."""
    tensors = load_file(path)
    return [
        [row.tolist() for row in tensors[f"{number}.ids"].split(tensors[f"{number}.lengths"].tolist())]
        for number in range(VARIANTS)
    ]
