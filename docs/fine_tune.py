"""Fine-tunes an exported model with transformers' Trainer, and saves it where `export_hf.py import` reads it.

    pip install accelerate                                           # Trainer needs it
    python docs/fine_tune.py small_hf small_hf_tuned more/*.txt      # exported folder, new folder, text files

It uses nothing of this repository, so it also runs where there is only transformers.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


def rows_of(files, tokenizer, length) -> list[dict]:
    """Rows of `length` ids. Each text begins with the end-of-text token, as in pre-training; a last part that is
    shorter is left out."""
    ids = []
    for file in files:
        ids += [tokenizer.bos_token_id, *tokenizer(Path(file).read_text(encoding="utf-8"), verbose=False)["input_ids"]]
    starts = range(0, len(ids) - length + 1, length)
    return [{"input_ids": ids[i : i + length], "labels": ids[i : i + length]} for i in starts]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exported", help="folder that export_hf.py has written")
    parser.add_argument("tuned", help="new folder")
    parser.add_argument("texts", nargs="+", help="text files")
    parser.add_argument("--max_steps", type=int, default=100, help="optimizer steps (100)")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.exported, dtype=torch.float32)  # also if stored in 16 bits
    tokenizer = AutoTokenizer.from_pretrained(args.exported)
    rows = rows_of(args.texts, tokenizer, model.config.max_position_embeddings)
    if not rows:
        parser.error(f"the texts are shorter than one context of {model.config.max_position_embeddings} tokens")
    how = TrainingArguments(
        args.tuned,
        max_steps=args.max_steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,  # 16 rows a step: with GPT-2's vocabulary all at once would take over 20 GB
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        learning_rate=5e-4,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model, how, train_dataset=rows)
    trainer.train()
    trainer.save_model(args.tuned)
    tokenizer.save_pretrained(args.tuned)


if __name__ == "__main__":
    main()
