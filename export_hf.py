"""Writes a checkpoint as a folder that Hugging Face's transformers loads, and reads such a folder back.

    python export_hf.py --checkpoint checkpoints/demo --out_dir hf_demo          # verified, or not written
    python export_hf.py import hf_demo --out_dir checkpoints/from_hf             # also after fine-tuning

The folder needs no code of this repository, because two architectures of transformers compute exactly this model:
Starcoder2 with LayerNorm, Arcee with RMSNorm. Only the rows of q and k change their order: RoPE turns pairs of channels
(2i, 2i+1) here and (i, i + D/2) there. An export gets its name when a process that has transformers and nothing of this
repository has given our logits, our greedy tokens and our ids.

Shapes: C = n_embd channels, H heads, D = C/H channels per head, V ids, T tokens.
"""

import copy
import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from support.cli import UserError, flag, one_line, parse, range_problems, run  # isort: split

import torch
from safetensors import SafetensorError

import checkpoint
from checkpoint import CONFIG, MODEL
from model import GPT, GPTConfig
from support.files import read_json, sync_directory, write_json, write_whole
from support.runtime import DTYPES
from support.tracking import read_rows
from tokenizer import FILE as TOKENIZER
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent
READER = ROOT / "support" / "read_export.py"
INDEX = "model.safetensors.index.json"
ARCHITECTURES = {"layernorm": ("starcoder2", "Starcoder2ForCausalLM"), "rmsnorm": ("arcee", "ArceeForCausalLM")}
SIZES = {  # of config.json, and ours
    "vocab_size": "valid_vocab_size",
    "max_position_embeddings": "block_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LARGEST_SIZE = 2**24  # of any of SIZES; a larger one is an error or an attack
GPT2 = "e49e7a5320e540ba86d47c5db469e6491cc823d5cb7a269eb2c984f35380198c"  # fingerprint of GPT-2's vocabulary
TOLERANCE = 1e-4  # of logits: both compute the same float32 sums, in another order
GREEDY_TOKENS = 32  # that transformers generates with its own cache
STRINGS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  Two spaces,\n\n\ta tab, and it's what they've said: 'we'll see'. ",
    "Füße, naïve, 日本語, العربية, 🦊 e\u0301 x² + y² = 3.14159",
    "",
)

# ---------------------------------------------------------------------------------------
# The same model under other names.


def half_split(weight, n_head):
    """Puts the rows of q or k, (C, ...), in their order: channels 2i and 2i+1 of a head go to i and i + D/2."""
    heads = weight.unflatten(0, (n_head, -1))
    return torch.cat((heads[:, 0::2], heads[:, 1::2]), dim=1).flatten(0, 1)


def interleave(weight, n_head):
    """Puts the rows of q or k, (C, ...), in our order again: the inverse of `half_split`."""
    first, second = weight.unflatten(0, (n_head, -1)).chunk(2, dim=1)
    return torch.stack((first, second), dim=2).flatten(0, 2)


def modules(c: GPTConfig) -> dict[str, tuple]:
    """For each of our modules, the names of theirs that hold the same weights: three for c_attn, else one."""
    up, down = ("mlp.c_fc", "mlp.c_proj") if c.norm == "layernorm" else ("mlp.up_proj", "mlp.down_proj")
    names = {"wte": ("model.embed_tokens",), "ln_f": ("model.norm",)}
    for i in range(c.n_layer):
        ours, theirs = f"h.{i}.", f"model.layers.{i}."
        names[ours + "ln_1"] = (theirs + "input_layernorm",)
        names[ours + "attn.c_attn"] = tuple(f"{theirs}self_attn.{x}_proj" for x in "qkv")
        names[ours + "attn.c_proj"] = (theirs + "self_attn.o_proj",)
        names[ours + "ln_2"] = (theirs + "post_attention_layernorm",)
        names[ours + "mlp.c_fc"], names[ours + "mlp.c_proj"] = (theirs + up,), (theirs + down,)
    return names


def to_hf(state, c: GPTConfig) -> dict:
    """Our tensors under their names. The padding rows of the embedding are left out, so that no one can sample their
    ids. Starcoder2 has every bias; those that our model does not have are zeros."""
    theirs = {}
    for ours, parts in modules(c).items():
        for kind in ("weight", "bias"):
            t, weight = state.get(f"{ours}.{kind}"), state[f"{ours}.weight"]
            if t is None and c.norm == "layernorm" and ours != "wte":
                t = weight.new_zeros(len(weight))
            if t is None:
                continue
            t = t[: c.valid_vocab_size] if ours == "wte" else t
            for name, piece in zip(parts, t.chunk(len(parts))):
                in_rope = name.endswith(("q_proj", "k_proj"))
                theirs[f"{name}.{kind}"] = half_split(piece, c.n_head) if in_rope else piece
    return theirs


def from_hf(theirs, c: GPTConfig) -> dict:
    """Their tensors under our names. The padding rows of the embedding, which have no meaning, are zeros."""
    state = {}
    for ours, parts in modules(c).items():
        for kind in ("weight", "bias"):
            pieces = {name: theirs.get(f"{name}.{kind}") for name in parts}
            if kind == "bias" and (not c.bias or pieces[parts[0]] is None):
                continue
            state[f"{ours}.{kind}"] = torch.cat(
                [interleave(t, c.n_head) if n.endswith(("q_proj", "k_proj")) else t for n, t in pieces.items()]
            )
    valid = state["wte.weight"][: c.valid_vocab_size]
    state["wte.weight"] = torch.nn.functional.pad(valid, (0, 0, 0, c.vocab_size - c.valid_vocab_size))
    return state


def hf_config(c: GPTConfig) -> dict:
    """The keys of config.json that decide what transformers computes. None is left to the library's default."""
    values = {
        "model_type": ARCHITECTURES[c.norm][0],
        **{theirs: getattr(c, ours) for theirs, ours in SIZES.items()},
        "num_key_value_heads": c.n_head,
        "intermediate_size": 4 * c.n_embd,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": True,
    }
    if c.norm == "layernorm":
        return values | {"norm_epsilon": 1e-5, "use_bias": True, "sliding_window": None}
    biases = {"attention_bias": c.bias, "mlp_bias": c.bias}
    return values | biases | {"rms_norm_eps": 1e-5, "head_dim": c.n_embd // c.n_head}


# ---------------------------------------------------------------------------------------
# Export.


def export(path=None, out_dir=None, dtype="float32") -> dict:
    """Writes the checkpoint that `path` means (see checkpoint.find_checkpoint) as the new folder `out_dir`, by default
    hf_RUN. It appears complete and verified, by one rename, or not at all. Raises UserError.

    Returns what was measured, see `compare_with_transformers`, the "folder" and the model's "norm"."""
    path = checkpoint.find_checkpoint(path)
    out_dir = Path(out_dir or f"hf_{path.resolve().parent.name}")
    refuse_existing(out_dir)
    model, tokenizer = checkpoint.read_model(path)
    stored = rounded_to(model, dtype)
    temporary = out_dir.with_name(f"{checkpoint.LEFTOVER}{out_dir.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed export left it
    try:
        temporary.mkdir(parents=True)
        write_folder(temporary, stored, tokenizer, dtype)
        measured = compare_with_transformers(temporary, model, stored, tokenizer)
        write_whole(temporary / "README.md", card(path, model, tokenizer, dtype, measured).encode())
        sync_directory(temporary)
        os.rename(temporary, out_dir)
        sync_directory(out_dir.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out_dir} was not written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"folder": out_dir, "norm": model.config.norm, **measured}


def refuse_existing(out_dir):
    if os.path.lexists(out_dir):
        raise UserError(f"{out_dir} exists already; remove it or name another --out_dir")


def rounded_to(model, dtype):
    """A copy of the model, its weights rounded to `dtype`. UserError where a weight is too large for it."""
    rounded = copy.deepcopy(model)
    for name, p in rounded.named_parameters():
        p.data = p.data.to(DTYPES[dtype]).float()
        if not p.isfinite().all():
            raise UserError(f"{name} has values too large for {dtype}; use bfloat16 or float32")
    return rounded


def write_folder(folder, model, tokenizer, dtype):
    """Writes all files except the model card, and flushes them to the disk."""
    c, eot = model.config, {"bos_token_id": tokenizer.eot_token, "eos_token_id": tokenizer.eot_token}
    about = {"architectures": [ARCHITECTURES[c.norm][1]], "torch_dtype": dtype}
    about["rope_theta"] = c.rope_theta  # where transformers 4 looks for it
    write_json(folder / CONFIG, about | hf_config(c) | eot)
    write_json(folder / "generation_config.json", eot)
    plain = tokenizer.contents | {"post_processor": None}  # it could add tokens that `encode` never adds
    write_whole(folder / TOKENIZER, json.dumps(plain, ensure_ascii=False).encode())
    marker = tokenizer.backend.id_to_token(tokenizer.eot_token)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": marker,
        "eos_token": marker,
        "model_max_length": c.block_size,
        # transformers 4 adds token_type_ids, which a GPT does not have
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,  # by default transformers 4 removes spaces before punctuation
    }
    write_json(folder / "tokenizer_config.json", about)
    tensors = {n: t.to(DTYPES[dtype]).contiguous() for n, t in to_hf(model.state_dict(), c).items()}
    checkpoint.write_tensors(folder / MODEL, tensors, {"format": "pt"})  # transformers 4 asks for it


def compare_with_transformers(folder, model, stored, tokenizer) -> dict:
    """Compares what transformers makes of a folder with the model: tensors by name, ids of text, logits, greedy tokens.

    `stored` is our model with the weights that were written, `model` the one before they were rounded.
    Returns {"logits": largest difference to `stored`, "rounding": from `model` to `stored`, "bound"}.
    UserError names what differs, and by how much.
    """
    c, logits = model.config, folder / "logits.safetensors"
    ids = torch.randint(c.valid_vocab_size, (1, c.block_size), generator=torch.Generator().manual_seed(0))
    answers = ask_transformers(
        folder=str(folder.resolve()),
        ids=ids[0].tolist(),
        start=tokenizer.eot_token,
        new_tokens=max(1, min(GREEDY_TOKENS, c.block_size - 1)),
        texts=STRINGS,
        logits=str(logits.resolve()),
    )
    if "error" in answers:
        raise UserError(f"the export is refused by transformers ({answers['error']})")
    if answers["loading"]:
        raise UserError(f"transformers did not take over the tensors as they are: {', '.join(answers['loading'])}")
    compare_ids(tokenizer, answers)
    with checkpoint.open_tensors(logits) as f:
        theirs = f.get_tensor("logits")
    logits.unlink()
    with torch.inference_mode():
        measured = compare_logits(theirs, model, stored, ids)
        compare_greedy(torch.tensor([answers["greedy"]]), stored, measured["bound"])
    return measured


def ask_transformers(**questions) -> dict:
    """The answers of support/read_export.py, from a new process that finds nothing of this repository."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("the export is checked with transformers: pip install 'transformers>=5.23'")
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command, how = [sys.executable, "-P", str(READER)], {"capture_output": True, "text": True, "encoding": "utf-8"}
    done = subprocess.run(command, input=json.dumps(questions), env=environment, cwd=questions["folder"], **how)
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"the process that checks the export with transformers failed ({said})")
    return json.loads(done.stdout)


def compare_ids(tokenizer, answers):
    """UserError where a text becomes other ids, or ids another text."""
    for text, ids, decoded in zip(STRINGS, answers["ids"], answers["decoded"]):
        ours = tokenizer.encode(text)
        if ids != ours:
            raise UserError(f"the export's tokenizer gives {ids} for {text!r}, ours {ours}")
        if decoded != (back := tokenizer.decode(ours)):
            raise UserError(f"the export's tokenizer decodes {ours} to {decoded!r}, ours to {back!r}")
    if answers["eos"] != tokenizer.eot_token:
        raise UserError(f"the export ends text with id {answers['eos']}, ours with {tokenizer.eot_token}")


def compare_logits(theirs, model, stored, ids) -> dict:
    """Their logits (1, T, V) beside those of our models, over the whole context."""
    ours = stored(ids)
    if ours.shape != theirs.shape:
        raise UserError(f"the export has logits for {theirs.size(-1)} ids, the checkpoint for {ours.size(-1)}")
    worst = (ours - theirs).abs().max().item()
    rounding = (ours - model(ids)).abs().max().item()
    bound = TOLERANCE * max(1, ours.abs().max().item() / 10)  # float32 keeps 7 digits, so large logits differ more
    if not worst <= bound:  # NaN neither
        raise UserError(f"the export's logits differ from the checkpoint's by up to {worst:.3g}, allowed {bound:.1g}")
    return {"logits": worst, "rounding": rounding, "bound": bound}


def compare_greedy(ids, model, bound):
    """UserError unless each of their greedy `ids` (1, n) is our best one too, or as good as it within `bound`."""
    logits = model(ids[:, :-1])
    short = logits.amax(-1) - logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
    if short.max() > 2 * bound:
        first = int((short > 2 * bound).int().argmax())
        raise UserError(f"greedy token {first} of the export is not the checkpoint's: worse by {short.max():.3g}")


# ---------------------------------------------------------------------------------------
# The model card.


def card(path, model, tokenizer, dtype, measured) -> str:
    """README.md of the export: what the model is, how it was trained and what was measured at this checkpoint."""
    c, step, run_dir = model.config, read_json(path / checkpoint.MANIFEST).get("step"), path.resolve().parent
    count = model.num_parameters() - (c.vocab_size - c.valid_vocab_size) * c.n_embd
    facts = read_json(run_dir / "run.json") if (run_dir / "run.json").is_file() else {}
    rows = {row["kind"]: row for row in read_rows(run_dir / "metrics.jsonl") if row["step"] == step}
    sizes = f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, context {c.block_size:,} tokens"
    differs = f"logits differ by at most {measured['logits']:.1e} on random ids over the whole context"
    if dtype != "float32":
        differs += f"; before, rounding to {dtype} moved them by up to {measured['rounding']:.1e}"
    table = {
        "checkpoint": f"{run_dir.name}, step {step}",
        "parameters": f"{count:,} ({sizes}, {c.valid_vocab_size:,} token ids)",
        **results(rows),
        **training(facts),
        "export against checkpoint": differs,
    }
    return CARD.format(
        name=run_dir.name,
        architecture=ARCHITECTURES[c.norm][1],
        norm={"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[c.norm],
        dtype=dtype,
        table="\n".join(f"| {name} | {value} |" for name, value in table.items()),
        note=ARCEE_NOTE if c.norm == "rmsnorm" else "" if tokenizer.fingerprint() == GPT2 else LLAMA_CPP_NOTE,
    )


def results(rows) -> dict:
    """The measured numbers of the step from its rows, by kind; "not measured" stands for one that is not there."""
    val, score = rows.get("val", {}), rows.get("hellaswag", {})

    def shown(value, form):
        return "not measured" if value is None else form.format(value)

    table = {
        "tokens seen in training": shown(next(iter(rows.values()), {}).get("tokens"), "{:,}"),
        "validation loss": shown(val.get("loss"), "{:.4f} nats per token"),
        "validation perplexity": shown(val.get("perplexity"), "{:.2f}"),
        "validation bits per byte": shown(val.get("bits_per_byte"), "{:.4f}"),
        "HellaSwag examples": shown(score.get("examples"), "{:,} (chance is 25 %)"),
    }
    for name in [n for n in score if f"{n}_stderr" in score]:
        table[f"HellaSwag {name}"] = f"{100 * score[name]:.2f} % ± {100 * score[f'{name}_stderr']:.2f}"
    return table


def training(facts) -> dict:
    """What run.json says of the training. Of the data's path only the folder's name, because a path may hold the
    name of a person."""
    config, versions = facts.get("config", {}), facts.get("versions", {})
    names = ["preset", "max_steps", "total_batch_tokens", "lr", "embed_lr", "vector_lr", "min_lr", "schedule"]
    names += ["decay_frac"] * (config.get("schedule") == "linear") + ["weight_decay", "dropout", "seed"]
    settings = ", ".join(f"{name} {config[name]}" for name in names if config.get(name) is not None)
    data = f"`{Path(config['data_dir']).name}`" if config.get("data_dir") else None
    if data and facts.get("training_tokens"):
        data += f", {facts['training_tokens']:,} tokens"
    table = {
        "training data": data,
        "optimizer": config.get("optimizer"),
        "settings": settings,
        "dtype of products in training": facts.get("dtype"),
        "trained on": f"{versions['device_name']}, torch {versions['torch']}" if versions else None,
    }
    table = {name: value or "not recorded" for name, value in table.items()}
    if origin := facts.get("origin"):
        run = Path(origin["path"]).parent.name
        table["started from the weights of"] = f"{run}, step {origin['step']}, sha256 {origin['sha256']}"
    return table


CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A GPT with rotary position embeddings. It continues text; it was not taught to follow instructions. Stored as
`{architecture}` in {dtype}: pre-norm blocks with {norm}, multi-head attention, an MLP four times wider with GELU
(tanh), output head tied to the embedding.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_HUB_NAME")
model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_HUB_NAME")
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

In training each document began with the end-of-text token; the tokenizer adds none by itself. It reads the
marker's name inside a text as the marker, as transformers does; in training such text was plain text.
{note}"""
LLAMA_CPP_NOTE = """
llama.cpp's converter knows a tokenizer by the hash of the ids that it gives. It knows GPT-2's and refuses one of your
own until you add that hash to the converter.
"""
ARCEE_NOTE = """
transformers (and what runs on it) reads the activation from config.json. llama.cpp computes every Arcee model
with squared ReLU, so its output would be wrong, and vLLM's own Arcee refuses GELU.
"""

# ---------------------------------------------------------------------------------------
# Import.


def import_folder(folder, out_dir) -> Path:
    """Reads a folder that `export` wrote, also after fine-tuning; returns the checkpoint out_dir/step_00000000.

    transformers reads the folder. 16-bit weights become float32; the padding rows of the embedding become zeros.
    UserError names what differs where the folder holds another model than ours; it is raised where out_dir exists, too.
    """
    folder, out_dir = Path(folder), Path(out_dir)
    refuse_existing(out_dir)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; expected one with {CONFIG}, {MODEL} and {TOKENIZER}")
    config = read_hf_config(folder)
    tensors = read_hf_tensors(folder, config)
    tokenizer = load_tokenizer(folder)
    valid = tokenizer.vocab_size
    if valid > config.valid_vocab_size:
        raise UserError(f"{folder}: the tokenizer has {valid:,} ids, the embedding {config.valid_vocab_size:,} rows")
    config = dataclasses.replace(config, valid_vocab_size=valid, vocab_size=-(-valid // 64) * 64)
    if config.norm == "layernorm":  # biases that are all zero were added by `to_hf`
        config = dataclasses.replace(config, bias=any(t.any() for n, t in tensors.items() if n.endswith("bias")))
    model = GPT(config)
    model.load_state_dict(from_hf(tensors, config))
    identity = dataclasses.asdict(config) | {"tokenizer": tokenizer.fingerprint()}
    state = {"step": 0, "samples_seen": 0, "seconds": 0.0, "identity": identity, "config": {}, "scaler": None}
    tensors = {checkpoint.MODEL: model.state_dict(), checkpoint.OPTIMIZER: {}}
    return checkpoint.write_checkpoint(out_dir, 0, config, tensors, state, tokenizer)


def transformers():
    """The library, without its progress bars and advice."""
    import transformers as library

    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def read_hf_config(folder) -> GPTConfig:
    """Our configuration, from a config.json of exactly our model. UserError names every value that differs."""
    path, library = folder / CONFIG, transformers()
    try:
        found = library.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the library objects to
        raise UserError(f"{path}: refused by transformers ({one_line(error)})") from error
    norm = {model_type: norm for norm, (model_type, _) in ARCHITECTURES.items()}.get(found.model_type)
    if norm is None:
        types = ", ".join(model_type for model_type, _ in ARCHITECTURES.values())
        raise UserError(f"{path}: model_type is {found.model_type!r}, expected one of {types}")
    sizes, theta = {ours: getattr(found, theirs) for theirs, ours in SIZES.items()}, found.rope_parameters["rope_theta"]
    wrong = [f"{k} is {n!r}" for k, n in sizes.items() if type(n) is not int or not 0 < n <= LARGEST_SIZE]
    if type(theta) not in (int, float) or not 0 < theta <= LARGEST_SIZE:
        wrong.append(f"rope_theta is {theta!r}")
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)}; expected a number above 0, at most {LARGEST_SIZE:,}")
    rows = -(-sizes["valid_vocab_size"] // 64) * 64
    bias = norm == "layernorm" or found.attention_bias is True
    config = GPTConfig(**sizes, vocab_size=rows, dropout=0.0, bias=bias, norm=norm, rope_theta=float(theta))
    wrong = config.problems() or [
        f"{k} is {getattr(found, k)!r}, expected {v!r}" for k, v in hf_config(config).items() if getattr(found, k) != v
    ]
    if wrong:
        raise UserError(f"{path}: this is not our model: {'; '.join(wrong)}")
    return config


@torch.no_grad()
def read_hf_tensors(folder, config) -> dict[str, torch.Tensor]:
    """Tensors by name in float32. UserError names one that is missing, unexpected, of another shape or not finite, and
    a head that is not the embedding."""
    count = check_files(folder)
    if config.n_layer > count:  # transformers would build all the layers first
        raise UserError(f"{folder}: {CONFIG} says {config.n_layer:,} layers, the files hold {count} tensors")
    how = {"dtype": torch.float32, "use_safetensors": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    try:
        theirs, info = transformers().AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    except Exception as error:  # whatever the library objects to
        raise UserError(f"{folder}: refused by transformers ({one_line(error)})") from error
    wrong = [f"{name} is {list(a)}, expected {list(b)}" for name, a, b in info["mismatched_keys"]]
    wrong += [f"{name} is missing" for name in info["missing_keys"]]
    wrong += [f"{name} is not expected" for name in info["unexpected_keys"]]
    tensors = theirs.state_dict()
    wrong += [f"{name} holds NaN or Inf" for name, t in tensors.items() if not t.isfinite().all()]
    if not wrong and not tensors[HEAD].equal(tensors[EMBEDDING]):
        wrong = [f"{HEAD} is not the embedding; in our model they are one tensor"]
    if wrong:
        raise UserError(f"{folder} does not hold the model of its {CONFIG}: tensor {'; tensor '.join(sorted(wrong))}")
    return tensors


def check_files(folder) -> int:
    """The number of tensors in model.safetensors, or in the files that its index lists.

    UserError for what transformers accepts: a path that leads out of the folder, integers as weights. And for damaged
    files and pickles."""
    if (folder / MODEL).is_file():  # transformers reads it, also where an index of an earlier save is still there
        names = {MODEL}
    elif (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map")
        listed = list(listed.values()) if isinstance(listed, dict) else [listed]
        files = [p.name for p in folder.glob("*.safetensors")]
        if strange := [name for name in listed if name not in files]:
            raise UserError(f"{folder / INDEX}: weight_map does not list files of this folder ({strange[0]!r})")
        names = set(listed)
    else:
        pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        there = f"; {pickles[0]} is a pickle, which could run code and is not opened" if pickles else ""
        raise UserError(f"{folder}: found no {MODEL} and no {INDEX}{there}; save it with safetensors")
    count = 0
    for path in [folder / name for name in sorted(names)]:
        with checkpoint.open_tensors(path) as f:
            for name in f.keys():  # noqa: SIM118
                if (kind := f.get_slice(name).get_dtype()) not in ("F32", "BF16", "F16"):
                    raise UserError(f"{path}: tensor {name} is {kind}, expected F32, BF16 or F16")
                count += 1
    return count


# ---------------------------------------------------------------------------------------
# The command line.


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What is written where, or read back."""

    command: str = flag("export", "what to do", unit="command", choices=("export", "import"), positional=True)
    folder: str | None = flag(None, "of import: the Hugging Face folder", positional=True)
    checkpoint: str | None = flag(None, "a run or one checkpoint; default: newest under checkpoints/", unit="folder")
    out_dir: str | None = flag(None, "to be written; default: hf_<run>; of import: checkpoints/<folder>", unit="folder")
    dtype: str | None = flag(None, "of the weights written; default: float32", unit="name", choices=tuple(DTYPES))


def problems(c: ExportConfig) -> list[str]:
    found = range_problems(c)
    if c.command == "import":
        given = [f"--{n}" for n in ("checkpoint", "dtype") if getattr(c, n) is not None]
        found += [f"import takes no {', '.join(given)}"] if given else []
        if c.folder is None:
            found.append("import which folder? export_hf.py import FOLDER --out_dir checkpoints/NAME")
    elif c.folder is not None:
        found.append(f"export takes no folder ({c.folder}); use --checkpoint and --out_dir")
    return found


def main(argv=None):
    args = parse(ExportConfig, argv, __doc__, problems)
    if args.command == "import":
        out_dir = args.out_dir or Path(checkpoint.DEFAULT_DIR, Path(args.folder).resolve().name)
        print(import_folder(args.folder, out_dir))
        return
    done = export(args.checkpoint, args.out_dir, args.dtype or "float32")
    if done["norm"] == "rmsnorm":
        print(f"note: {' '.join(ARCEE_NOTE.split())}", file=sys.stderr)
    print(f"{done['folder']}: verified with transformers alone, logits differ by at most {done['logits']:.1e}")
    print(f"to publish it: hf upload USER/NAME {shlex.quote(str(done['folder']))}")
    model = shlex.quote(f"pretrained={done['folder']},dtype=float32")
    print(f"next: lm_eval run --model hf --model_args {model} --tasks hellaswag")  # the harness of hellaswag_eval.py


if __name__ == "__main__":
    sys.exit(run(main))
