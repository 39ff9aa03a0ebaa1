"""Train the embedded model: `python -m tl_nodeprune.toy.train OUT_DIR`. About 15 minutes on two CPU cores, fixed seed.

A GPT-2-shaped transformer (3 layers, 4 heads, d_model 96) on the sentences of `tl_nodeprune.prompts.tasks`, as a language model with
extra weight on the answer. One prompt in ten, chosen by its text, is never trained on: `held_out` tells which.
"""

from __future__ import annotations

import argparse
import random
import zlib
from pathlib import Path

import safetensors.torch
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import trange
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tl_nodeprune.circuit import files
from tl_nodeprune.prompts import tasks
from tl_nodeprune.toy import CONFIG, special_tokens

STEPS, BATCH, RATE, SEED = 4000, 192, 2e-3, 0
ANSWER_WEIGHT = 5.0


def held_out(row: tasks.Row) -> bool:
    """Whether a prompt belongs to the tenth that is kept for testing."""
    return zlib.crc32(row[0].encode()) % 10 == 0


def draw(rng: random.Random, task: str, *, test: bool) -> tasks.Row:
    """A random prompt of a task from the training or the test side."""
    while held_out(row := tasks.ROWS[task](rng, tasks.Words())) != test:
        pass
    return row


def build_tokenizer() -> Tokenizer:
    """Words, punctuation and two-digit groups, each one token: the vocabulary is every token of 21,000 sentences."""
    rng, split = random.Random(SEED), pre_tokenizers.Split(Regex(r"\d\d|[A-Za-z']+|[^\sA-Za-z\d]"), "removed", invert=True)
    words = {word for task in tasks.ROWS for _ in range(7000) for text in sentence(tasks.ROWS[task](rng, tasks.Words()), rng)
             for word, _ in split.pre_tokenize_str(text)}
    words |= {f"{year:02d}" for year in range(100)}
    vocabulary = [*special_tokens().values(), *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentence(row: tasks.Row, rng: random.Random) -> tuple[str, str]:
    """A prompt and the answer to train on, one of the right ones."""
    clean, _, answer, _ = row
    return clean, answer if isinstance(answer, str) else rng.choice(answer)


def batch_of(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Token ids [batch pos] and loss weights [batch pos], padding 0."""
    rows = [sentence(draw(rng, rng.choice(list(tasks.ROWS)), test=False), rng) for _ in range(BATCH)]
    ids = [tokenizer.encode(clean + answer) for clean, answer in rows]
    width = max(map(len, ids))
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
    weights = torch.tensor([[1.0] * (len(row) - 1) + [ANSWER_WEIGHT] + [0.0] * (width - len(row)) for row in ids], dtype=torch.float32)
    return tokens, weights


def train(out: Path) -> None:
    """Train and write model.safetensors, tokenizer.json and tokenizer_config.json into `out`."""
    torch.manual_seed(SEED)
    tokenizer, rng = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), **special_tokens()), random.Random(SEED + 1)
    model = GPT2LMHeadModel(CONFIG(vocab_size=len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.05)
    for step in (bar := trange(STEPS)):
        tokens, weights = batch_of(tokenizer, rng)
        logits = model(tokens).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (loss * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    weights_out = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    files.write(out / "model.safetensors", safetensors.torch.save(weights_out, {"format": "pt"}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("out", type=Path, help="folder for its files")
    train(parser.parse_args().out)
