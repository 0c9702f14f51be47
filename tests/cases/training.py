"""A small language model, sentences whose next token is mostly known from the last, and how it is trained on them."""

import csv
import random

import torch
import torch.nn.functional as F
from torch import nn

from pynlp.training import Batches, TrainingConfig, WarmupCosine, teacher_forcing

VOCABULARY, START, END = 13, 11, 12


class LanguageModel(nn.Module):
    """Each token from the one before."""

    def __init__(self, dropout=0.0, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, 16, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(16, VOCABULARY, dtype=dtype)

    def forward(self, tokens):
        return self.output(self.dropout(self.embedding(tokens)))


def make_sentences(count, seed=0):
    """Every token is three more than the one before, modulo 11, but for one in five."""
    draw = random.Random(seed)
    sentences = []
    for _ in range(count):
        sentence = [draw.randrange(11)]
        while len(sentence) < 1 + draw.randrange(12):
            sentence.append(draw.randrange(11) if draw.random() < 0.2 else (sentence[-1] + 3) % 11)
        sentences.append(sentence)
    return sentences


def make_batches(sentences, max_tokens=40):
    def collate(items):
        return teacher_forcing([sentences[item] for item in items], START, END, padding=0)

    return Batches([len(sentence) + 1 for sentence in sentences], max_tokens, collate)


def loss(model, batch):
    inputs, targets, lengths = batch
    logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), lengths.sum()


def make_config(steps=30, **changes):
    return TrainingConfig(steps, **{"learning_rate": 0.02, "schedule": WarmupCosine(5, 30), **changes})


def read_csv(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))
