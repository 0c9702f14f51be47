"""Greedy decoding of a translation model, 32 sentences at once, in tokens a second.

`python -m benchmarks.models.translation_decoding`.

The same weights (256 channels, 3 + 3 layers, 4 heads, 8,000 tokens, layer norm, GELU, learned positions, fp32) in
pynlp.decoding; in a plain loop of PyTorch's operations, with scaled_dot_product_attention and a cache; and converted
for CTranslate2, where that is installed. The weights are random, and the end symbol is never written, so sentences end
at their limit: all at 40 tokens, or each at its own length, and then the loop waits for the longest. All must write the
same tokens. Writes results/translation_decoding.json.
"""

import argparse
import importlib.util
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import machine, round_times, table, write_json
from pynlp.decoding import greedy
from pynlp.models import EncoderDecoder, TransformerConfig

VOCABULARY, CHANNELS, LAYERS, HEADS, LONGEST = 8000, 256, 3, 4, 64
BATCH, BEGIN, END = 32, 1, 2
PAUSES = {"CTranslate2": 0.3}  # seconds after which its threads no longer spin
SAME = 0.9  # of the sentences, at least: a tie that rounding decides changes all that follows


def make_model() -> EncoderDecoder:
    torch.manual_seed(0)
    config = TransformerConfig(
        VOCABULARY, CHANNELS, LAYERS, HEADS, ffn_dim=4 * CHANNELS, positions="learned", max_positions=LONGEST,
        norm="layer", activation="gelu",
    )  # fmt: skip
    model = EncoderDecoder(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that sentences differ
            if parameter.dim() == 2:
                parameter.normal_(std=CHANNELS**-0.5)
        model.embedding.weight[END] = 0
    return model


class PlainLoop:
    """Greedy decoding by hand in PyTorch: every projection, a cache in place, all rows until the last has ended."""

    def __init__(self, model: EncoderDecoder):
        self.model = model

    @torch.no_grad()
    def __call__(self, source: Tensor, lengths: Tensor, limits: Tensor) -> list[list[int]]:
        model, steps = self.model, int(limits.max())
        visible = (torch.arange(source.shape[1]) < lengths[:, None])[:, None, None]  # (B, 1, 1, S)
        x = model.embedding(source) + model.encoder.positions.weight[: source.shape[1]]
        for block in model.encoder.blocks:
            h = norm(block.attention_norm, x)
            q, k, v = (heads(getattr(block.attention, f"{n}_proj")(h)) for n in "qkv")
            x = x + block.attention.out_proj(merged(F.scaled_dot_product_attention(q, k, v, visible)))
            x = x + feed_forward(block, x)
        memory = norm(model.encoder.norm, x)
        blocks = model.decoder.blocks
        crossed = [[heads(getattr(b.cross_attention, f"{n}_proj")(memory)) for n in "kv"] for b in blocks]
        cache = torch.empty(len(blocks), 2, source.shape[0], HEADS, steps, CHANNELS // HEADS)
        token = torch.full((source.shape[0], 1), BEGIN)
        written = []
        ended = torch.zeros(source.shape[0], dtype=torch.bool)
        for step in range(steps):
            x = model.embedding(token) + model.decoder.positions.weight[step]
            for block, (k, v), own in zip(blocks, crossed, cache, strict=True):
                h = norm(block.attention_norm, x)
                q = heads(block.attention.q_proj(h))
                own[0, :, :, step] = heads(block.attention.k_proj(h))[:, :, 0]
                own[1, :, :, step] = heads(block.attention.v_proj(h))[:, :, 0]
                seen = own[:, :, :, : step + 1]
                x = x + block.attention.out_proj(merged(F.scaled_dot_product_attention(q, *seen)))
                q = heads(block.cross_attention.q_proj(norm(block.cross_attention_norm, x)))
                x = x + block.cross_attention.out_proj(merged(F.scaled_dot_product_attention(q, k, v, visible)))
                x = x + feed_forward(block, x)
            token = F.linear(norm(model.decoder.norm, x), model.output_weight)[:, -1].argmax(-1, keepdim=True)
            written.append(token)
            ended |= (token[:, 0] == END) | (step + 1 >= limits)
            if ended.all():
                break
        rows = torch.cat(written, dim=1).tolist()
        return [row[:limit] for row, limit in zip(rows, limits.tolist(), strict=True)]


def norm(module: torch.nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


def heads(x: Tensor) -> Tensor:
    """(B, S, E) as (B, H, S, D)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


def feed_forward(block: torch.nn.Module, x: Tensor) -> Tensor:
    h = norm(block.feed_forward_norm, x)
    return block.feed_forward.down_proj(F.gelu(block.feed_forward.up_proj(h)))


def convert(model: EncoderDecoder, folder: str) -> None:
    """Saves the model as CTranslate2 loads it."""
    from ctranslate2.specs import Activation, TransformerSpec

    def array(x: Tensor):
        return x.detach().numpy()

    def set_norm(spec, module: torch.nn.Module) -> None:
        spec.gamma, spec.beta = array(module.weight), array(module.bias)

    spec = TransformerSpec.from_config(LAYERS, HEADS, pre_norm=True, activation=Activation.GELU)
    for own, stack in ((spec.encoder, model.encoder), (spec.decoder, model.decoder)):
        embeddings = own.embeddings[0] if isinstance(own.embeddings, list) else own.embeddings
        embeddings.weight = array(model.embedding.weight)
        own.scale_embeddings = False
        own.position_encodings.encodings = array(stack.positions.weight)
        set_norm(own.layer_norm, stack.norm)
        for layer, block in zip(own.layer, stack.blocks, strict=True):
            set_norm(layer.self_attention.layer_norm, block.attention_norm)
            projections = (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj)
            layer.self_attention.linear[0].weight = array(torch.cat([p.weight for p in projections]))
            layer.self_attention.linear[1].weight = array(block.attention.out_proj.weight)
            set_norm(layer.ffn.layer_norm, block.feed_forward_norm)
            layer.ffn.linear_0.weight = array(block.feed_forward.up_proj.weight)
            layer.ffn.linear_1.weight = array(block.feed_forward.down_proj.weight)
            if stack is model.decoder:
                set_norm(layer.attention.layer_norm, block.cross_attention_norm)
                layer.attention.linear[0].weight = array(block.cross_attention.q_proj.weight)
                both = (block.cross_attention.k_proj.weight, block.cross_attention.v_proj.weight)
                layer.attention.linear[1].weight = array(torch.cat(both))
                layer.attention.linear[2].weight = array(block.cross_attention.out_proj.weight)
    spec.decoder.projection.weight = array(model.output_weight)
    names = [str(i) for i in range(VOCABULARY)]
    spec.register_source_vocabulary(names)
    spec.register_target_vocabulary(names)
    spec.config.bos_token = spec.config.decoder_start_token = str(BEGIN)
    spec.config.eos_token, spec.config.unk_token = str(END), "0"
    spec.validate()
    spec.save(folder)


class CTranslate2:
    """A converted model, run in a process of its own.

    Its threads and OpenMP's together are more than there are cores; then OpenMP's no longer spin while they wait for
    work, and all parallel work of PyTorch and of ours in that process takes nearly twice as long.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __call__(self, source: Tensor, lengths: Tensor, limit: int) -> list[list[int]]:
        """Translations of `limit` tokens each."""
        texts = [[str(i) for i in row[:n]] for row, n in zip(source.tolist(), lengths.tolist(), strict=True)]
        return self.process.submit(_translate, self.folder, torch.get_num_threads(), texts, limit).result()


def _translate(folder: str, threads: int, texts: list[list[str]], limit: int) -> list[list[int]]:
    limits = dict(max_decoding_length=limit, min_decoding_length=limit)
    results = _translator(folder, threads).translate_batch(texts, beam_size=1, max_batch_size=BATCH, **limits)
    return [[int(name) for name in result.hypotheses[0]] for result in results]


@cache
def _translator(folder: str, threads: int):
    import ctranslate2

    return ctranslate2.Translator(folder, device="cpu", compute_type="float32", intra_threads=threads)


def compare(name: str, calls: dict[str, Callable[[], list[list[int]]]]) -> dict:
    """A line of the table: whether all write the same tokens, and their times, taken in turns."""
    written = {who: call() for who, call in calls.items()}
    ours, peers = written["ours"], [who for who in calls if who != "ours"]
    same = {who: sum(map(list.__eq__, ours, written[who])) / BATCH for who in peers}
    row = {"sentences": name, "same": ", ".join(f"{who} {share:.0%}" for who, share in same.items())}
    if min(same.values()) < SAME:
        return row | {"tokens/s": "wrong", "time / ours": "-"}
    ratios, seconds = [], []
    for who in peers:  # one at a time, so that ours is never timed beside the other one's threads
        times = round_times({name: calls[name] for name in ("ours", who)}, 6.0, pause=PAUSES.get(who, 0.0))
        ratio = statistics.median(a / b for a, b in zip(times[who], times["ours"], strict=True))
        ratios.append(f"{who} {ratio:.2f}")
        seconds += times["ours"]
    return row | {
        "tokens/s": f"{sum(map(len, ours)) / statistics.median(seconds):.0f}",
        "time / ours": ", ".join(ratios),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    model = make_model()
    lengths = torch.randint(8, 49, (BATCH,), dtype=torch.int32)
    source = torch.randint(3, VOCABULARY, (BATCH, int(lengths.max())))
    plain, prefix = PlainLoop(model), torch.full((BATCH, 1), BEGIN)

    def ours(limits: Tensor) -> list[list[int]]:
        state = model.decoding_state(source, lengths, int(limits.max()) + 1)
        return [hypothesis.tokens for hypothesis in greedy(state, prefix, end=END, max_length=limits)]

    def calls(limits: Tensor) -> dict[str, Callable[[], list[list[int]]]]:
        return {"ours": lambda: ours(limits), "loop": lambda: plain(source, lengths, limits)}

    alike = calls(torch.full((BATCH,), 40))
    with TemporaryDirectory() as folder:
        if importlib.util.find_spec("ctranslate2") is None:
            print("CTranslate2 is not installed: pip install ctranslate2")
        else:
            convert(model, folder)
            converted = CTranslate2(folder)
            alike["CTranslate2"] = lambda: converted(source, lengths, 40)
        rows = [compare("all of 40 tokens", alike), compare("of 8 to 48 tokens", calls(lengths.long()))]
    print(table(rows))
    path = write_json("translation_decoding", {"machine": machine(), "cases": rows})
    print(f"\n{machine()}\nwritten: {path}")


if __name__ == "__main__":
    main()
