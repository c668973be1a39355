"""Trains the small model that ships with the package, from a folder of books; knows nothing of Splitwise.

    python runs/train_bundled.py --books DIR [--work out/bundled]

Killed and started again with the same `--work`, it goes on from its last checkpoint. The finished model, in
Hugging Face form, is in `WORK/export`, its measured figures in `WORK/figures.json`.
"""

import argparse
import json
import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

END_OF_TEXT = "<|endoftext|>"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the books. A step sees `tokens_per_step` tokens."""

    seed: int = 1
    vocab_size: int = 4096
    d_model: int = 256
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    d_ff: int = 512
    context: int = 1024
    early_context: int = 256  # for the first 60 %: cheaper steps of more varied text
    held_out: float = 0.05  # the last part of each book
    steps: int = 5000
    minutes: float = 40.0  # the schedule ends at `steps` or `minutes`, whichever comes first
    tokens_per_step: int = 2048
    warmup_steps: int = 200
    peak_lr: float = 2e-3
    final_lr: float = 1e-4
    weight_decay: float = 0.1
    eval_every: int = 250
    patience: int = 6  # evaluations without a new best before the run stops

    def context_at(self, progress: float) -> int:
        return self.early_context if progress < 0.6 else self.context

    def lr_at(self, step: int, progress: float) -> float:
        """Linear warm-up over steps, then a cosine from `peak_lr` to `final_lr` over progress in [0, 1]."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return min(1.0, (step + 1) / self.warmup_steps) * (self.final_lr + (self.peak_lr - self.final_lr) * cosine)


# --- the text ---------------------------------------------------------------------------------------------


def read_book(path: Path) -> str:
    """The book's own text with `\\n` line ends, without Project Gutenberg's header, footer and last line."""
    text = path.read_text(encoding="utf-8-sig")
    body = re.split(r"\*\*\* (?:START|END) OF THIS PROJECT GUTENBERG EBOOK [^*]*\*\*\*", text)[1]
    return re.sub(r"\s*End of (?:the )?Project Gutenberg[^\n]*\s*$", "\n", body).lstrip()


def split_book(text: str, held_out: float) -> tuple[str, str]:
    """(training part, held-out end), cut at the first paragraph that begins in the last `held_out` of it."""
    cut = text.index("\n\n", round(len(text) * (1 - held_out))) + 2
    return text[:cut], text[cut:]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: all 256 bytes are in its alphabet, so any UTF-8 text goes through unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """The text's token ids after one end-of-text token: (1 + tokens,)."""
    return torch.tensor([tokenizer.eos_token_id, *tokenizer.backend_tokenizer.encode(text).ids])


# --- the measure ------------------------------------------------------------------------------------------


@torch.no_grad()
def bits(model: LlamaForCausalLM, ids: torch.Tensor, window: int, stride: int) -> float:
    """-log2 P(ids[1:] | ids[0]), every token once.

    Windows of `window` inputs begin every `stride` tokens; each scores the tokens no earlier window scored,
    so all but the first window's tokens see at least `window - stride` tokens before them.
    """
    nats, scored, last = 0.0, 0, len(ids) - 1
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        fresh = end - scored
        logits = model(ids[None, begin:end].to(DEVICE), use_cache=False, logits_to_keep=fresh).logits
        targets = ids[scored + 1 : end + 1].to(DEVICE)
        nats += functional.cross_entropy(logits[0].float(), targets, reduction="sum").item()
        scored = end
        if end == last:
            break
    return nats / math.log(2)


def measure_export(directory: Path, held: dict[str, str]) -> dict[str, float]:
    """Held-out bits per UTF-8 byte of the saved fp16 weights run in fp32: window = context, stride = half."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(DEVICE).eval()
    context = model.config.max_position_embeddings
    book_bits = {name: bits(model, encode(tokenizer, text), context, context // 2) for name, text in held.items()}
    book_bytes = {name: len(text.encode()) for name, text in held.items()}
    figures = {name: book_bits[name] / book_bytes[name] for name in held}
    return figures | {"all": sum(book_bits.values()) / sum(book_bytes.values())}


# --- the run ----------------------------------------------------------------------------------------------


class Training:
    """A model on its way: weights, optimizer, and where the run stands.

    A batch is drawn from the seed and the step's number alone, so a checkpoint needs no random state.
    """

    def __init__(self, recipe: Recipe, work: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.work = recipe, work
        self.model = LlamaForCausalLM(llama_config(recipe)).to(DEVICE)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        gains = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": gains, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            fused=True,
        )
        self.step, self.seconds, self.best, self.evals_since_best = 0, 0.0, math.inf, 0
        if (work / "checkpoint.pt").exists():
            self.resume()

    @property
    def progress(self) -> float:
        return max(self.step / self.recipe.steps, self.seconds / (60 * self.recipe.minutes))

    @property
    def finished(self) -> bool:
        return self.progress >= 1 or self.evals_since_best >= self.recipe.patience

    def resume(self) -> None:
        saved = torch.load(self.work / "checkpoint.pt", map_location=DEVICE)
        if saved["recipe"] != asdict(self.recipe):
            raise SystemExit(f"{self.work} holds a run of another recipe: give another --work, or remove it")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds, self.best, self.evals_since_best = saved["position"]
        print(f"resumed at step {self.step}", flush=True)

    def save(self) -> None:
        position = (self.step, self.seconds, self.best, self.evals_since_best)
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        unfinished = self.work / "checkpoint.unfinished"
        torch.save(states | {"position": position, "recipe": asdict(self.recipe)}, unfinished)
        unfinished.replace(self.work / "checkpoint.pt")

    def forward_backward(self, tokens: torch.Tensor) -> float:
        """One optimizer step on a random batch; the mean loss in nats per token."""
        context = self.recipe.context_at(self.progress)
        dice = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        rows = self.recipe.tokens_per_step // context
        starts = torch.randint(len(tokens) - context, (rows,), generator=dice)
        batch = torch.stack([tokens[s : s + context + 1] for s in starts.tolist()]).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = self.model(batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(self.step, self.progress)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def evaluate(self, held: list[torch.Tensor], held_bytes: int) -> None:
        """Held-out bits per byte, windows not overlapping (quick, a little high); exports a new best."""
        context = self.recipe.context_at(self.progress)
        with torch.autocast(DEVICE, torch.bfloat16):
            now = sum(bits(self.model, ids, context, context) for ids in held) / held_bytes
        self.evals_since_best += 1
        if now < self.best:
            self.best, self.evals_since_best = now, 0
            export(self.model, self.work / "export")
        print(f"step {self.step}: held-out {now:.4f} bits per byte, best {self.best:.4f}", flush=True)


def llama_config(recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_ff,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.d_model // recipe.num_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def export(model: LlamaForCausalLM, directory: Path) -> None:
    """fp16 weights and configuration, as `from_pretrained` reads them."""
    halved = LlamaForCausalLM(model.config).half()
    halved.load_state_dict(model.state_dict())
    halved.save_pretrained(directory)


def train(training: Training, tokens: torch.Tensor, held: list[torch.Tensor], held_bytes: int) -> None:
    recipe = training.recipe
    began = time.monotonic() - training.seconds
    while not training.finished:
        loss = training.forward_backward(tokens)
        training.seconds = time.monotonic() - began
        if training.step % 50 == 0:
            print(f"step {training.step}: loss {loss:.3f}, {training.seconds / 60:.1f} min", flush=True)
        if training.step % recipe.eval_every == 0 or training.progress >= 1:
            training.evaluate(held, held_bytes)
            training.seconds = time.monotonic() - began
            training.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of Project Gutenberg .txt files")
    parser.add_argument("--work", type=Path, default=Path("out/bundled"), help="checkpoint, export, figures")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--minutes", type=float, default=Recipe.minutes)
    arguments = parser.parse_args()
    disable_progress_bar()
    recipe, work = Recipe(steps=arguments.steps, minutes=arguments.minutes), arguments.work
    work.mkdir(parents=True, exist_ok=True)

    books = {path.stem: read_book(path) for path in sorted(arguments.books.glob("*.txt"))}
    parts = {name: split_book(text, recipe.held_out) for name, text in books.items()}
    held = {name: end for name, (_, end) in parts.items()}
    tokenizer = train_tokenizer([start for start, _ in parts.values()], recipe.vocab_size)
    tokenizer.model_max_length = recipe.context
    tokenizer.save_pretrained(work / "export")
    tokens = torch.cat([encode(tokenizer, start) for start, _ in parts.values()])

    training = Training(recipe, work)
    parameters = sum(p.numel() for p in training.model.parameters())
    print(f"{parameters} parameters, {len(tokens)} training tokens, on {DEVICE}", flush=True)
    held_bytes = sum(len(text.encode()) for text in held.values())
    train(training, tokens, [encode(tokenizer, text) for text in held.values()], held_bytes)

    figures = {
        "recipe": asdict(recipe),
        "parameters": parameters,
        "training_tokens": len(tokens),
        "held_out_bytes": held_bytes,
        "steps": training.step,
        "minutes": training.seconds / 60,
        "held_out_bits_per_byte": measure_export(work / "export", held),
    }
    (work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
