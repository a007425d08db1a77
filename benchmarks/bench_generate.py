"""How many tokens a second sampling gives, beside two other ways and the limit: python benchmarks/bench_generate.py

  ours          inference.generate, greedy, as the command line runs it
  transformers  its generate(), greedy, with its default cache, on the same weights in export_hf.py's names
  uncached      the whole context through the model for each token, logits of the last position (as nanoGPT samples)
  limit         the longer of two times: to read the weights, and the keys and values so far, once per token; or to
                compute 2 operations per weight and sequence. Which of the two it is stands beside it.

The limit's speeds are measured in the same run: reading, as the faster of two ways through 512 MB, a sum and a
product of a vector and a matrix of which each thread has its part; computing, as a product of two square matrices.
All take turns, so that a machine that slows down slows down all of them. What a token costs without a cache is a
second-degree polynomial of the context's length; so it is timed at the first, middle and last length only, and summed
by Simpson's rule. Without --checkpoint the model has GPT-2 124M's shape and random weights, which cost what trained
ones cost. `first` is the first turn's rate: on CUDA some libraries plan a shape when they see it for the first time.
"""

import copy
import statistics
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.cli import UserError, flag, one_line, parse, run  # isort: split

import torch
from bench_parts import in_turns

import export_hf
import inference
from checkpoint import load_model
from model import GPT, GPTConfig
from support.runtime import DTYPES, autocast, pick, sample_faster, versions

READ_BYTES = 2**29  # far more than caches hold
SIDE = 2048  # of the square matrices
READ_BYTES_CUDA, SIDE_CUDA = 3 * 2**30, 8192  # there a call takes 40 us that are not work


def hugging_face(model, dtype):
    """The same model in transformers, tried once; None, with a line, where it is not installed or fails."""
    try:
        theirs = in_their_names(model, dtype)
        transformers(theirs, [1], batch=1, new_tokens=2)
        return theirs
    except ImportError as error:
        print(f"transformers not installed ({one_line(error)})")
    except Exception as error:  # another version of it must not cost our rows
        traceback.print_exc()
        print(f"transformers failed ({type(error).__name__}: {one_line(error)})")
    return None


def in_their_names(model, dtype):
    """Our model as transformers' own class."""
    library = export_hf.transformers()
    values, state = export_hf.hf_config(model.config), export_hf.to_hf(model.state_dict(), model.config)
    config = library.AutoConfig.for_model(values.pop("model_type"), **values)
    theirs = library.AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(state | {export_hf.HEAD: state[export_hf.EMBEDDING]})
    theirs.generation_config.eos_token_id = None  # each sample gets its full length
    return theirs.to(model.wte.weight.device, DTYPES[dtype]).eval()


def ours(model, prompt, batch, new_tokens):
    """Ids of the first sample."""
    return [step[0] for step in inference.generate(model, prompt, inference.PRESETS["greedy"], new_tokens, batch)]


def transformers(theirs, prompt, batch, new_tokens):
    """Ids of the first sample."""
    idx = torch.tensor([prompt] * batch, device=theirs.device)
    with torch.autocast(theirs.device.type, enabled=False):  # its weights are in the right precision already
        out = theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False, max_new_tokens=new_tokens)
    return out[0, len(prompt) :].tolist()


def uncached(model, batch, length):
    """The next id after `length` tokens."""
    idx = torch.zeros(batch, length, dtype=torch.long, device=model.wte.weight.device)
    return model.logits(model.features(idx)[:, -1]).argmax(-1).tolist()


def ways(models, prompt, batch, new_tokens) -> dict:
    """name -> function: a whole sampling each; for `uncached`, the first, middle and last of its tokens."""
    plain, fast, theirs = models
    found = {"ours": lambda: ours(fast, prompt, batch, new_tokens)}
    if theirs is not None:
        found["transformers"] = lambda: transformers(theirs, prompt, batch, new_tokens)
    last = len(prompt) + new_tokens - 1  # length of the context from which the last token is drawn
    lengths = {"first": len(prompt), "middle": (len(prompt) + last) // 2, "last": last}
    return found | {name: lambda n=n: uncached(plain, batch, n) for name, n in lengths.items()}


def probes(device, dtype, tiny) -> dict:
    """What shows how fast the device is: name -> (function, bytes that it reads or operations that it computes)."""
    options = {"device": device, "dtype": DTYPES[dtype]}
    read, side = (READ_BYTES_CUDA, SIDE_CUDA) if device.type == "cuda" else (READ_BYTES, SIDE)
    read, side = (2**20, 64) if tiny else (read, side)
    parts = torch.get_num_threads() if device.type == "cpu" else 1
    rows = read // DTYPES[dtype].itemsize // 1024 // parts
    matrix, x = torch.randn(parts, 1024, rows, **options), torch.randn(1, 1024, **options)
    square = torch.randn(side, side, **options)

    def waiting(function):
        return lambda: function().flatten()[0].item()  # returns when the device is done

    return {
        "sum": (waiting(lambda: matrix.sum()), read),
        "product": (waiting(lambda: x @ matrix), read),
        "compute": (waiting(lambda: square @ square), 2 * side**3),
    }


def measure(models, speeds, prompt, batch, args) -> dict:
    """Rates by name, one for each turn: tokens/s of the ways, bytes/s or operations/s of the probes."""
    whole = ways(models, prompt, batch, args.new_tokens)
    for name, way in ways(models, prompt, batch, 4).items():  # warms up, `uncached` with the lengths that are timed
        whole[name]() if name in ("first", "middle", "last") else way()
    probe = {name: function for name, (function, _) in speeds.items()}
    seconds = in_turns(whole | probe, args.repeats)
    parts = zip(*(seconds.pop(name) for name in ("first", "middle", "last")))
    seconds["uncached"] = [args.new_tokens * (first + 4 * middle + last) / 6 for first, middle, last in parts]
    work = {name: size for name, (_, size) in speeds.items()}
    return {name: [work.get(name, batch * args.new_tokens) / s for s in turns] for name, turns in seconds.items()}


def limit(model, dtype, rates, prompt_tokens, batch, new_tokens):
    """(tokens/s that the device allows, what sets it: "reading" or "computing")."""
    c, size = model.config, DTYPES[dtype].itemsize
    cached = batch * sum(range(prompt_tokens, prompt_tokens + new_tokens))  # tokens whose key and value are read
    read = (new_tokens * model.num_parameters() + cached * 2 * c.n_layer * c.n_embd) * size
    speed = max(statistics.median(rates[name]) for name in ("sum", "product"))
    seconds = {
        "reading": read / speed,
        "computing": 2 * batch * new_tokens * model.num_parameters() / statistics.median(rates["compute"]),
    }
    binding = max(seconds, key=seconds.get)
    return batch * new_tokens / seconds[binding], binding


def table(rates, bound, batch) -> str:
    """The rows of one batch size."""
    middle, lines = statistics.median(rates["ours"]), []
    for name in ("ours", "transformers", "uncached"):
        if name in rates:
            each = rates[name]
            spread = f"{min(each):.1f}..{max(each):.1f}, {each[0]:.1f}"
            ratio = middle / statistics.median(each)
            lines.append(f"{batch:>5}  {name:<20}{statistics.median(each):>10.1f}  {spread:<24}{ratio:>8.2f}")
    lines.append(f"{batch:>5}  {f'limit ({bound[1]})':<20}{bound[0]:>10.1f}  {'':<24}{middle / bound[0]:>8.2f}")
    return "\n".join(lines)


@dataclass
class Config:
    new_tokens: int = flag(512, "per sample", at_least=1, unit="tokens")
    prompt_tokens: int = flag(16, "of the prompt", at_least=1, unit="tokens")
    batches: str = flag("1,16", "numbers of samples at a time", unit="n,n")
    repeats: int = flag(3, "turns", at_least=1)
    checkpoint: str | None = flag(None, "a run or one checkpoint; default: 124M, random weights", unit="folder")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps", unit="name")
    dtype: str = flag("auto", "of products", unit="name", choices=("auto", "float32", "bfloat16", "float16"))
    tiny: bool = flag(False, "one small layer and 8 tokens, to see whether everything runs")


def parse_args(argv) -> Config:
    args = parse(Config, argv, __doc__)
    args.new_tokens = 8 if args.tiny else args.new_tokens
    try:
        args.batches = [int(n) for n in args.batches.split(",")]
    except ValueError:
        raise UserError(f"--batches is {args.batches!r}; it must be numbers with commas between") from None
    if min(args.batches) < 1:
        raise UserError("--batches must be at least 1")
    return args


def load(args, device, dtype):
    """(model as it is, as inference.py's command line runs it, in transformers or None)."""
    torch.manual_seed(0)
    if args.checkpoint:
        plain = load_model(args.checkpoint, device)[0]
    else:
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 320, "valid_vocab_size": 300}
        plain = GPT(GPTConfig(**shape if args.tiny else {})).to(device).eval()
    most = plain.config.block_size
    if args.prompt_tokens + args.new_tokens > most:
        raise UserError(f"{args.prompt_tokens} + {args.new_tokens} tokens exceed the context of {most}")
    fast = sample_faster(copy.deepcopy(plain), dtype)
    return plain, fast, hugging_face(plain, dtype)


def spoken(rates) -> str:
    """One line: what the probes showed."""
    said = []
    for name, unit in (("sum", "GB"), ("product", "GB"), ("compute", "GFLOP")):
        each = [rate / 1e9 for rate in rates[name]]
        said.append(f"{name} {statistics.median(each):.1f} {unit}/s ({min(each):.1f}..{max(each):.1f})")
    return ", ".join(said)


def main(argv=None):
    args = parse_args(argv)
    device, dtype = pick(args.device, args.dtype)
    models, prompt = load(args, device, dtype), list(range(1, args.prompt_tokens + 1))
    where = f"{versions()['device_name']}, {torch.get_num_threads()} threads, {dtype}"
    size = f"{models[0].num_parameters() / 1e6:.0f}M parameters"
    print(f"{where}, {size}, {args.new_tokens} tokens after {len(prompt)}, {args.repeats} turns")
    print(f"{'batch':<5}  {'way':<20}{'tokens/s':>10}  {'min..max, first':<24}{'ours is':>8}")
    speeds, notes = probes(device, dtype, args.tiny), []
    with torch.inference_mode(), autocast(device, dtype):
        for batch in args.batches:
            rates = measure(models, speeds, prompt, batch, args)
            bound = limit(models[0], dtype, rates, len(prompt), batch, args.new_tokens)
            print(table(rates, bound, batch), flush=True)
            notes.append(spoken(rates))
        if models[2] is not None:
            both = zip(ours(models[1], prompt, 1, 8), transformers(models[2], prompt, 1, 8))
            notes.append(f"ours and transformers choose {sum(a == b for a, b in both)} of 8 tokens alike")
    print("uncached: its first, middle and last token were timed, the rest is Simpson's rule", *notes, sep="\n")


if __name__ == "__main__":
    sys.exit(run(main))
