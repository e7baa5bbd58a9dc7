"""Train the tiny Llama that the tests use: 6 layers, 0.26 M parameters, about 0.6 MB.

    python tests/data/make_tiny.py tests/data/tiny

Real weights matter: only on a trained model do dropped layers, wrong rotations and coarse
quantization cost something. Text: the licence texts (CC0) of the `spdx` package.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shortstack.text import open_corpus, token_windows

VOCAB, LENGTH, BATCH, STEPS, LEARNING_RATE = 512, 128, 16, 1800, 3e-3
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'"
    " + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(documents: tuple[str, ...]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    specials = [AddedToken(name, special=True, normalized=False) for name in SPECIALS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIALS[1],
        eos_token=SPECIALS[2],
        unk_token=SPECIALS[0],
        pad_token=SPECIALS[2],
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def train_model(windows: torch.Tensor) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    order = itertools.cycle(torch.randperm(len(windows)).split(BATCH))
    for step in range(STEPS):
        rate = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        batch = windows[next(order)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model


def main(out: Path) -> None:
    corpus = open_corpus("spdx")
    tokenizer = train_tokenizer(corpus.calibration)
    windows = token_windows(corpus.calibration, tokenizer.encode, LENGTH, 6000)
    model = train_model(torch.tensor(windows))
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(json.dumps({p.name: p.stat().st_size for p in sorted(out.iterdir())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
