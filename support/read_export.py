"""What transformers alone makes of an exported folder. export_hf.py starts this file as a process of its own:

    python -P support/read_export.py < questions.json > answers.json

The file imports nothing of this repository, and -P keeps the repository off Python's path. So another machine, which
has only the folder and transformers, gives the same answers.
"""

import contextlib
import json
import sys


def answer(folder, ids, start, new_tokens, texts, logits) -> dict:
    """Loads the model and the tokenizer of `folder` and uses them.

    Writes the logits (1, T, V) of the `ids` (T,) to the safetensors file `logits`. Returns, by name:
    loading  tensors that were missing, unexpected or of another shape
    greedy   the id `start` and the new_tokens most probable ids after it
    ids      the ids of each of the `texts`; decoded: the text of those ids again
    eos      the id that ends a text"""
    import torch
    import transformers
    from safetensors.torch import save_file

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model.eval()
    with torch.inference_mode():
        save_file({"logits": model(input_ids=torch.tensor([ids])).logits.contiguous()}, logits)
        prompt = torch.tensor([[start]])
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": new_tokens}
        greedy = model.generate(prompt, **options)[0].tolist()
    texts_ids = [tokenizer(text)["input_ids"] for text in texts]
    return {
        "loading": sorted(f"{name} ({kind})" for kind, names in info.items() for name in names),
        "greedy": greedy,
        "ids": texts_ids,
        "decoded": [tokenizer.decode(text_ids) for text_ids in texts_ids],
        "eos": tokenizer.eos_token_id,
    }


if __name__ == "__main__":
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers alone
            answers = answer(**json.load(sys.stdin))
    except Exception as error:  # whatever the library objects to
        answers = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answers))
