"""The figures of the reading road, each drawn by the code that it is about.

    python docs/figures.py --checkpoint checkpoints/edu-10m --val_data_dir edu_corpus_val
    python docs/figures.py --only rope schedule order        # those that need neither
    python docs/figures.py --only longer --longer ORIGIN RUN RUN --val_data_dir edu_2k_val

Every curve is computed or measured, none is drawn by hand. The rotation is `model.rotate`, the schedule
`train.lr_at`, the order `FineWebDataLoader`, the attention that of a trained checkpoint. Measured values are in
NAME.json beside NAME.png, and the chapters quote them. Beside plot_run.py, only this file imports matplotlib.

Shapes: B rows, T tokens, H heads, D channels per head, L layers.
"""

import io
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.cli import UserError, flag, parse, run  # isort: split

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

from checkpoint import MANIFEST, find_checkpoint, load_model
from data_processing_fineweb import FineWebDataLoader, FineWebDataset
from model import GPT, GPTConfig, rope_angles, rotate
from plot_run import CIRCLE, COLORS, GREY, marked, noisy, number, read_metrics
from support.files import read_json, write_json, write_whole
from train import PRESETS, lr_at

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, PINK = COLORS[:4]
METRICS = HERE.parent / "benchmarks" / "results" / "edu-10m" / "metrics.jsonl"
KILLED = HERE.parent / "benchmarks" / "results" / "killed.json"
SENTENCE = "The water in the river is cold, and the water in the lake is warm, but the water in the sea is"
ROWS = 512  # of logits alive at once
VECTORS = 500  # of random content
WINDOWS = 20  # of validation text, for each measurement
PALETTE = 256  # colours of a picture: a third of the bytes, and hardly a difference to see
BINS = 32  # of positions
LONGEST = 8  # contexts are measured up to so many times the trained one
LONGER, LONGER_WINDOWS = 4, 80  # the same for models that were trained further, and windows of that length

# ---------------------------------------------------------------------------------------
# Paper.


def canvas(height) -> Figure:
    """Eight inches wide; on a white ground, so that it reads on a dark page as well."""
    return Figure(figsize=(8, height), dpi=150, facecolor="white", layout="constrained")


def tidy(ax, x=None, y=None, title=None):
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize=10, loc="left")
    ax.grid(color="#E5E5E5", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def powers_of_two(ax, values):
    """A logarithmic axis with these values written out."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, [f"{value:,}" for value in values])
    ax.xaxis.set_minor_formatter(NullFormatter())


# ---------------------------------------------------------------------------------------
# RoPE.


def turned(x, positions, theta):
    """x (..., D), the same at every position, as `rotate` leaves it there: (T, ..., D)."""
    angles = rope_angles(positions, x.size(-1), theta)
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]  # as GPT.__init__ keeps them
    x = x.reshape(1, 1, -1, x.size(-1)).expand(1, len(positions), -1, -1)
    return rotate(x, cos, sin)[0].squeeze(1)


def draw_rope(args):
    """Pairs of one head, each starting along its first axis: where they point at the first positions, and later."""
    config = GPTConfig()
    D = config.n_embd // config.n_head
    x = torch.zeros(D)
    x[0::2] = 1
    pairs = turned(x, torch.arange(129), config.rope_theta).unflatten(-1, (-1, 2)).numpy()  # (T, D/2, 2)
    fig = canvas(5)
    grid = fig.add_gridspec(2, 3, height_ratios=[1.25, 1])
    for column, (pair, color) in enumerate(zip((0, 4, 8), (BLUE, ORANGE, GREEN))):
        ax = fig.add_subplot(grid[0, column], aspect="equal")
        tidy(ax, "first channel", "second channel" if column == 0 else None)
        ax.set_title(f"pair {pair}: {config.rope_theta ** (-2 * pair / D):.3g} rad per token", fontsize=10)
        ax.plot(*np.exp(1j * np.linspace(0, 2 * math.pi, 100)).view(float).reshape(-1, 2).T, color="#CCCCCC", zorder=1)
        for position, (a, b) in enumerate(pairs[:7, pair]):
            how = {"arrowstyle": "->", "color": color, "alpha": 1 - 0.1 * position, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", (a, b), (0, 0), arrowprops=how)
            if position % (3 if pair == 8 else 1) == 0:  # where there is room
                ax.text(1.2 * a, 1.2 * b, position, ha="center", va="center", fontsize=9)
        ax.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    ax = fig.add_subplot(grid[1, :])
    tidy(ax, "position (tokens)", "first channel", "the same and a slower pair, further on")
    for pair, color in zip((0, 4, 8, 16), (BLUE, ORANGE, GREEN, PINK)):
        wave = 2 * math.pi * config.rope_theta ** (2 * pair / D)
        ax.plot(pairs[:, pair, 0], color=color, linewidth=1.4, label=f"pair {pair}, once around in {wave:.3g} tokens")
    ax.legend(fontsize=9, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.32))
    return fig, None


def draw_decay(args):
    """q·k by distance: of equal content, where only the rotation speaks; and in the heads of a trained model."""
    config, distances = GPTConfig(), torch.arange(1024)
    D = config.n_embd // config.n_head
    x = torch.randn(VECTORS, D, generator=torch.Generator().manual_seed(0))
    x /= x.norm(dim=-1, keepdim=True)
    k = turned(x, distances, config.rope_theta)  # (T, VECTORS, D): q = x stays at position 0
    equal = torch.einsum("nd,tnd->tn", x, k).numpy()
    other = torch.einsum("nd,tnd->tn", x.roll(1, 0), k).numpy()
    fig = canvas(3.6)
    left, right = fig.subplots(1, 2)
    tidy(left, "distance (tokens)", "q · k, both of length 1", f"random content, D = {D}")
    for dots, color, name in ((equal, BLUE, "k = q but for the rotation"), (other, ORANGE, "k unlike q")):
        low, middle, high = np.quantile(dots, (0.1, 0.5, 0.9), axis=1)
        left.fill_between(np.arange(len(low)), low, high, color=color, alpha=0.2, linewidth=0)
        left.plot(middle, color=color, linewidth=1.2, label=name)
    left.legend(fontsize=9, frameon=False)
    shift = turned(x, distances + 5000, config.rope_theta)
    moved = torch.einsum("nd,tnd->tn", shift[0], shift).numpy()
    facts = {f"equal_at_{d}": round(float(np.median(equal[d])), 3) for d in (0, 1, 10, 100, 1000)}
    facts["largest_change_when_both_move_5000"] = float(f"{np.abs(moved - equal).max():.1g}")

    model, _, x, _ = trained(args)
    flat = by_distance_of(attention(model, x)[0])  # (L, H, distances)
    flat = flat.reshape(-1, flat.shape[-1])  # (L·H, distances)
    flat = flat - flat.mean(1, keepdims=True)
    tidy(right, "distance (tokens)", "q · k / √D, less the head's mean", f"{args.name}: {len(flat)} heads")
    right.plot(flat.T, color=BLUE, linewidth=0.6, alpha=0.35)
    right.plot(flat.mean(0), color="black", linewidth=1.6, label="mean of the heads")
    right.legend(fontsize=9, frameon=False)
    facts["trained_mean_nearest_minus_farthest"] = round(float(flat.mean(0)[:4].mean() - flat.mean(0)[-32:].mean()), 3)
    facts["trained_heads_that_prefer_near"] = int((flat[:, :4].mean(1) > flat[:, -32:].mean(1)).sum())
    return fig, facts | {"heads": len(flat), "checkpoint": args.name, "windows": WINDOWS}


# ---------------------------------------------------------------------------------------
# A trained model.


def trained(args):
    """(model, tokenizer, x, y): the checkpoint and WINDOWS windows (WINDOWS, T) spread over the validation text."""
    model, tokenizer = load_model(args.checkpoint)
    data = FineWebDataset(args.val_data_dir, model.config.block_size, "val", tokenizer.vocab_size)
    x, y = data.rows(np.linspace(0, data.n_windows - 2, WINDOWS).astype(int))
    return model, tokenizer, torch.from_numpy(x), torch.from_numpy(y)


@torch.no_grad()
def attention(model, x):
    """(scores, weights), each (L, B, H, T, T): q·k/√D of all pairs, and its softmax over what a query may see.

    Made from the very inputs that each Attention of the model gets for x (B, T), by the steps of its own forward."""
    scores = []

    def look(module, args):
        h, cos, sin = args[:3]
        q, k, _ = module.c_attn(h).unflatten(-1, (3, module.n_head, -1)).unbind(2)  # (B, T, H, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scores.append(torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.size(-1)))

    hooks = [block.attn.register_forward_pre_hook(look) for block in model.h]
    try:
        model.features(x)
    finally:
        for hook in hooks:
            hook.remove()
    scores = torch.stack(scores)
    future = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
    return scores, scores.masked_fill(future, -math.inf).softmax(-1)


def by_distance_of(matrices):
    """(L, B, H, T, T) -> (L, H, T/2): the mean at each distance below T/2, over the queries that have all of them."""
    T = matrices.size(-1)
    query = torch.arange(T // 2, T)[:, None]
    at = matrices[:, :, :, query, query - torch.arange(T // 2)]  # (L, B, H, T/2 queries, T/2 distances)
    return at.mean((1, 3)).numpy()


def draw_attention(args):
    """Two heads of one model on one sentence, the one that looks nearest and the one that looks farthest; and how
    much weight they give to each distance."""
    model, tokenizer, x, _ = trained(args)
    near = by_distance_of(attention(model, x)[1])  # (L, H, distances)
    nearest = np.unravel_index(near[:, :, 1].argmax(), near.shape[:2])
    far = (near * np.arange(near.shape[2])).sum(2) / near.sum(2)
    farthest = np.unravel_index(far.argmax(), far.shape)
    ids = tokenizer.encode(SENTENCE)
    words = [tokenizer.decode([i]).strip() for i in ids]
    weights = attention(model, torch.tensor([ids]))[1][:, 0].numpy()  # (L, H, T, T)
    fig = canvas(6.4)
    grid = fig.add_gridspec(2, 2, height_ratios=[1.55, 1])
    chosen = {"nearest": nearest, "farthest": farthest}
    for column, (layer, head) in enumerate(chosen.values()):
        ax = fig.add_subplot(grid[0, column])
        image = ax.imshow(weights[layer, head], cmap="Blues", vmin=0, vmax=1)
        ax.set_title(f"layer {layer}, head {head}", fontsize=10)
        ax.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
        ax.set_yticks(range(len(words)), words, fontsize=8)
        ax.set_xlabel("token looked at")
        ax.set_ylabel("token that looks" if column == 0 else None)
    fig.colorbar(image, ax=fig.axes, label="attention weight", shrink=0.8)
    ax = fig.add_subplot(grid[1, :])
    title = f"{WINDOWS} windows of validation text"
    tidy(ax, "distance to the token looked at (tokens)", "mean attention weight", title)
    for (layer, head), color in zip(chosen.values(), (BLUE, ORANGE)):
        ax.plot(near[layer, head], color=color, linewidth=1.4, label=f"layer {layer}, head {head}")
    ax.plot(near.mean((0, 1)), color="black", linewidth=1.4, linestyle="--", label="mean of all heads")
    ax.set_yscale("log")
    ax.set_xscale("symlog", linthresh=1, linscale=0.5, base=2)
    ticks = [0, *(2**n for n in range(near.shape[2].bit_length()))]
    ax.set_xticks(ticks, map(str, ticks))
    ax.set_xlim(0, near.shape[2])
    ax.legend(fontsize=9, frameon=False)
    facts = {}
    for name, (layer, head) in chosen.items():
        at = {"layer": int(layer), "head": int(head), "mean_distance": round(float(far[layer, head]), 1)}
        facts[name] = at | {"weight_on_the_token_before": round(float(near[layer, head, 1]), 3)}
    return fig, facts | {"checkpoint": args.name, "windows": WINDOWS}


def stretched(model, block_size, scale=1.0) -> GPT:
    """The same weights with a longer context, in which position p counts as p times `scale` (position interpolation,
    Chen et al. 2023). RoPE has no parameters, so nothing is missing; only the table of rotations is made anew."""
    config = replace(model.config, block_size=block_size)
    longer = GPT(config)
    longer.load_state_dict(model.state_dict())
    positions = torch.arange(block_size, dtype=torch.float64) * scale
    angles = rope_angles(positions, config.n_embd // config.n_head, config.rope_theta)
    longer.cos, longer.sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
    return longer.eval()


@torch.no_grad()
def token_losses(model, x, y, context):
    """-log p in nats of every target of x, y (B, T), read in pieces of `context` tokens that see nothing before
    them: (B, T). The targets are the same whatever the context."""
    pieces = x.view(-1, context).split(max(1, 4096 // context))
    h = torch.cat([model.features(piece).flatten(0, 1) for piece in pieces])  # (B·T, C)
    rows = zip(h.split(ROWS), y.flatten().split(ROWS))
    nats = [F.cross_entropy(model.logits(some), target, reduction="none") for some, target in rows]
    return torch.cat(nats).view_as(x).double().numpy()


def measure_context(model, data) -> dict:
    """Losses of the same targets for every context, and, in the longest, for every position."""
    T, longest = model.config.block_size, LONGEST * model.config.block_size
    x, y = map(torch.from_numpy, data.rows(np.linspace(0, data.n_windows - 2, WINDOWS).astype(int)))
    trained, rows, by_position = token_losses(model, x, y, T), [], {}
    for context in (T // 8 * 2**n for n in range(3 + LONGEST.bit_length())):
        for interpolated in (False, True) if context > T else (False,):
            reader = stretched(model, max(context, T), T / context if interpolated else 1.0)
            nats = token_losses(reader, x, y, context)
            change = (nats - trained).mean(1)  # of each window: the text's own difficulty cancels out
            row = {"context": context, "interpolated": interpolated, "loss": round(float(nats.mean()), 4)}
            row |= {"perplexity": round(math.exp(nats.mean()), 1), "loss_minus_trained": round(float(change.mean()), 4)}
            rows.append(row | {"stderr": round(float(change.std(ddof=1) / math.sqrt(len(change))), 4)})
            if context == longest:
                bins = (nats - trained).reshape(len(nats), BINS, -1).mean((0, 2))
                by_position["interpolated" if interpolated else "as trained"] = bins.round(4).tolist()
    facts = {"trained_context": T, "windows": WINDOWS, "targets": trained.size, "rows": rows}
    return facts | {"loss_minus_trained_by_position": by_position}


def draw_context(args):
    """Perplexity of the same text, read with ever longer contexts; and where in the longest one it goes wrong."""
    model, tokenizer = load_model(args.checkpoint)
    T = model.config.block_size
    facts = measure_context(model, FineWebDataset(args.val_data_dir, LONGEST * T, "val", tokenizer.vocab_size))
    return picture_of_context(facts), {"checkpoint": args.name} | facts


def picture_of_context(facts) -> Figure:
    T, rows = facts["trained_context"], facts["rows"]
    fig = canvas(3.8)
    left, right = fig.subplots(1, 2)
    tidy(left, "context (tokens)", "validation perplexity", "the same text, read in pieces of this length")
    tidy(right, "position (tokens)", f"loss, less that in pieces of {T} (nats)", f"in a context of {LONGEST * T:,}")
    for interpolated, color, name in ((False, BLUE, "as trained"), (True, ORANGE, "interpolated")):
        some = [row for row in rows if row["interpolated"] == interpolated]
        left.plot([r["context"] for r in some], [r["perplexity"] for r in some], color=color, **CIRCLE)
        change = facts["loss_minus_trained_by_position"][name]
        where = LONGEST * T / BINS * (np.arange(BINS) + 0.5)
        right.plot(where, change, color=color, label=f"positions {name}", linewidth=1.4)
    powers_of_two(left, sorted({row["context"] for row in rows}))
    right.axhline(0, color=GREY, linewidth=1)
    right.xaxis.set_major_formatter(FuncFormatter(lambda position, _: f"{position:,.0f}"))
    for ax in (left, right):
        ax.axvline(T, color=GREY, linewidth=1, linestyle=":")
    where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
    left.annotate("trained length", (T, 0.97), (-4, 0), fontsize=9, color=GREY, ha="right", **where)
    right.legend(fontsize=9, frameon=False)
    return fig


def name_of_reader(model, step, trained) -> str:
    """What a line of the figure is called: the origin, or how a run went on from it."""
    c = model.config
    if step is None:
        return f"as trained at {trained:,}"
    return f"then {step:,} steps at {c.block_size:,}" + (f", base {c.rope_theta:,.0f}" if c.rope_theta != 1e4 else "")


def measure_longer(origin, runs, tokenizer, val_data_dir) -> dict:
    """Losses of the same targets, read by a model and by the runs that --init_from has started from it, for contexts
    of one, two and four times the model's; and, in the longest, for every position."""
    T = origin.config.block_size
    data = FineWebDataset(val_data_dir, LONGER * T, "val", tokenizer.vocab_size)
    x, y = map(torch.from_numpy, data.rows(np.linspace(0, data.n_windows - 2, LONGER_WINDOWS).astype(int)))
    trained, rows, by_position = token_losses(origin, x, y, T), [], {}
    for model, step in ((origin, None), *runs):
        name = name_of_reader(model, step, T)
        for context in (T * 2**n for n in range(LONGER.bit_length())):
            nats = token_losses(stretched(model, context), x, y, context)
            change = (nats - trained).mean(1)  # of each window: the text's own difficulty cancels out
            row = {"reader": name, "context": context, "loss": round(float(nats.mean()), 4)}
            row |= {"perplexity": round(math.exp(nats.mean()), 1), "loss_minus_trained": round(float(change.mean()), 4)}
            rows.append(row | {"stderr": round(float(change.std(ddof=1) / math.sqrt(len(change))), 4)})
        by_position[name] = (nats - trained).reshape(len(nats), BINS, -1).mean((0, 2)).round(4).tolist()
    facts = {"trained_context": T, "windows": len(x), "targets": trained.size, "rows": rows}
    return facts | {"loss_minus_trained_by_position": by_position}


def draw_longer(args):
    """What a little training at a longer context changes: the origin, and the runs that went on from it."""
    origin, tokenizer = load_model(args.longer[0])
    paths = [find_checkpoint(path) for path in args.longer[1:]]
    runs = [(load_model(path)[0], read_json(path / MANIFEST)["step"]) for path in paths]
    facts = measure_longer(origin, runs, tokenizer, args.val_data_dir)
    return picture_of_longer(facts), facts


def picture_of_longer(facts) -> Figure:
    T = facts["trained_context"]
    fig = canvas(4.2)
    left, right = fig.subplots(1, 2)
    tidy(left, "context (tokens)", "validation perplexity", "the same text, read in pieces of this length")
    title = f"in a context of {LONGER * T:,}"
    tidy(right, "position (tokens)", f"loss, less the origin's in pieces of {T} (nats)", title)
    where = LONGER * T / BINS * (np.arange(BINS) + 0.5)
    for (name, change), color in zip(facts["loss_minus_trained_by_position"].items(), COLORS):
        some = [row for row in facts["rows"] if row["reader"] == name]
        left.plot([r["context"] for r in some], [r["perplexity"] for r in some], color=color, label=name, **CIRCLE)
        right.plot(where, change, color=color, linewidth=1.4)
    powers_of_two(left, sorted({row["context"] for row in facts["rows"]}))
    right.axhline(0, color=GREY, linewidth=1)
    right.axvline(T, color=GREY, linewidth=1, linestyle=":")
    fig.legend(fontsize=9, frameon=False, ncols=2, loc="outside lower center")
    return fig


# ---------------------------------------------------------------------------------------
# Training.


def draw_schedule(args):
    c = PRESETS["gpt2-124m"]
    steps = np.unique(np.linspace(0, c.max_steps - 1, 2000).astype(int))
    warmup = int(c.warmup_frac * c.max_steps)
    fig = canvas(3.2)
    ax = fig.subplots()
    tidy(ax, "optimizer step", "learning rate")
    ax.plot(steps, [lr_at(int(step), c) for step in steps], color=BLUE, linewidth=1.6)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.4f}"))
    ax.xaxis.set_major_formatter(FuncFormatter(number))
    ax.set_ylim(0, 1.15 * c.lr)
    ax.axvline(warmup, color=GREY, linewidth=1, linestyle=":")
    ax.annotate(f"warm-up: {warmup:,} steps", (warmup, 0.1 * c.lr), (6, 0), textcoords="offset points", fontsize=9)
    ax.annotate(f"peak: {c.lr:.5f}", (warmup, c.lr), (6, 5), textcoords="offset points", fontsize=9)
    last = {"textcoords": "offset points", "ha": "right", "fontsize": 9}
    ax.annotate(f"last step: {c.last_lr:.5f}", (c.max_steps, c.last_lr), (0, 26), **last)
    top = ax.secondary_xaxis("top", functions=(lambda s: s * c.total_batch_tokens, lambda t: t / c.total_batch_tokens))
    top.set_xlabel("training tokens")
    top.xaxis.set_major_formatter(FuncFormatter(number))
    return fig, None


def draw_order(args):
    """Which window is read when, over two epochs; and which device reads which rows of one global batch."""
    W, rows, seed = 100, 16, 1337
    data = SimpleNamespace(n_windows=W)
    loaders = {(world, B): [FineWebDataLoader(data, B, rows, seed, rank=k, world=world) for k in range(world)]
               for world, B in ((1, 4), (2, 4), (2, 2), (4, 4))}  # fmt: skip
    one = loaders[1, 4][0]
    order = np.concatenate([one.windows(start) for start in range(0, 2 * W, rows)])[: 2 * W]
    fig = canvas(5.6)
    top, below = fig.subplots(2, 1, height_ratios=[1.2, 1])
    tidy(top, "samples seen", "window read", f"{W} windows, shuffled anew for each epoch; grey: a global batch of both")
    top.scatter(range(2 * W), order, s=9, color=np.where(np.arange(2 * W) < W, BLUE, ORANGE))
    top.axvline(W - 0.5, color=GREY, linewidth=1, linestyle=":")
    straddling = W // rows * rows
    top.axvspan(straddling - 0.5, straddling + rows - 0.5, color="#DDDDDD", linewidth=0, zorder=0)
    top.set_xlim(-2, 2 * W + 1)
    windows = one.windows(straddling)
    for line, ((_, B), ranks) in enumerate(loaders.items()):
        for k, loader in enumerate(ranks):
            for i, r in enumerate(loader.mine):
                below.barh(line, 1, 0.8, left=r, color=COLORS[k], alpha=0.35, edgecolor="white")
                below.text(r + 0.5, line, windows[r], ha="center", va="center", fontsize=9)
                if i % B == 0 and k == 0 and r:
                    below.plot([r, r], [line - 0.42, line + 0.42], color="black", linewidth=2)
    names = [f"{w} device{'s' * (w > 1)} × {B} rows" for w, B in loaders]
    below.set_yticks(range(len(names)), names)
    below.invert_yaxis()
    below.set_xlim(0, rows)
    below.set_xticks(np.arange(rows) + 0.5, map(str, range(rows)))
    below.set_xlabel("row of the global batch; the number in it is its window, the colour its device,\n"
                     "a black line the end of a micro-step")  # fmt: skip
    below.spines[:].set_visible(False)
    below.tick_params(length=0)
    return fig, None


def draw_loss(args):
    """Loss against tokens, from the first step on, and two models that need no training to compare it with."""
    r = {"color": BLUE, "dash": "-", **read_metrics(args.metrics)}
    tokens, losses = r["train"]["tokens"], r["train"]["loss"]
    V = GPTConfig().valid_vocab_size
    guesses = {f"every token alike: ln {V:,} = {math.log(V):.2f}": math.log(V)}
    facts = {"run": args.metrics.parent.name, "uniform": round(math.log(V), 3)}
    data = FineWebDataset(args.val_data_dir, 1, "val")
    share = np.bincount(data.tokens(0, data.n_tokens)) / data.n_tokens
    entropy = float(-(share[share > 0] * np.log(share[share > 0])).sum())
    guesses[f"frequencies alone: {entropy:.2f}"] = facts["frequencies"] = round(entropy, 3)
    fig = canvas(3.6)
    ax = fig.subplots()
    tidy(ax, "training tokens", "loss (nats per token)")
    noisy(ax, r, tokens, losses)
    seen = r["val"]["tokens"] > 0  # a logarithmic axis has no 0
    marked(ax, r, r["val"]["tokens"][seen], r["val"]["loss"][seen], line="none")
    for name, value in guesses.items():
        ax.axhline(value, color=GREY, linewidth=1, linestyle="--")
        ax.annotate(name, (1, value), (-2, 4), ("axes fraction", "data"), "offset points", ha="right", fontsize=9)
    ax.plot([], [], color=BLUE, label=f"{facts['run']}, training")
    ax.plot([], [], color=BLUE, linestyle="none", label="validation", **CIRCLE)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(number))
    ax.legend(fontsize=9, frameon=False, loc="lower left")
    first = r["val"]["loss"][0]
    return fig, facts | {"first": round(float(first), 3), "last": round(float(r["val"]["loss"][-1]), 3)}


def draw_killed(args):
    """One run killed again and again, on the same run undisturbed; see benchmarks/killed_run.py."""
    facts = read_json(args.killed)
    fig = canvas(3.4)
    ax = fig.subplots()
    tidy(ax, "training step", "training loss (nats per token)")
    ax.plot(*zip(*facts["undisturbed"]), color="#C8C8C8", linewidth=6, label="undisturbed run")
    starts = [start for start in facts["starts"] if start]
    kills = [start[-1] for start in starts[:-1]]
    for i, start in enumerate(starts):
        label = "killed run, its starts in two colours by turns" if i == 0 else None
        ax.plot(*zip(*start), color=(BLUE, ORANGE)[i % 2], linewidth=1.2, label=label)
    label = f"{len(facts['starts']) - 1} times SIGKILL"
    ax.plot(*zip(*kills), color="black", linestyle="none", marker="x", markersize=6, label=label)
    ax.set_title("Every loss of both runs is equal to the last bit", fontsize=10, loc="left")
    ax.legend(fontsize=9, frameon=False)
    return fig, None


def save(fig, path) -> int:
    """Writes a PNG of at most PALETTE colours; returns its size in bytes."""
    large, small = io.BytesIO(), io.BytesIO()
    fig.savefig(large, format="png")
    Image.open(large).convert("RGB").quantize(PALETTE).save(small, "png", optimize=True)
    write_whole(path, small.getvalue())
    return len(small.getvalue())


FIGURES = {
    "rope": draw_rope,
    "decay": draw_decay,
    "attention": draw_attention,
    "schedule": draw_schedule,
    "order": draw_order,
    "loss": draw_loss,
    "context": draw_context,
    "killed": draw_killed,
}


@dataclass
class FiguresConfig:
    checkpoint: str | None = flag(None, "a run or one checkpoint; default: newest under checkpoints/", unit="folder")
    val_data_dir: str | None = flag(None, "validation shards with the checkpoint's tokenizer", unit="folder")
    metrics: Path = flag(METRICS, "metrics.jsonl of the loss; default: edu-10m's", unit="file")
    longer: tuple[str, ...] = flag((), "a run, and runs that --init_from has started from it", unit="folder")
    killed: Path = flag(KILLED, "what benchmarks/killed_run.py wrote; default: the demo's", unit="file")
    only: tuple[str, ...] = flag(
        tuple(FIGURES), "figures; longer needs --longer", unit="name", choices=(*FIGURES, "longer")
    )
    out_dir: Path = flag(HERE / "figures", "where they go; default: docs/figures", unit="folder")
    name: str = ""  # of the checkpoint, once it is found


def main(argv=None):
    args = parse(FiguresConfig, argv, __doc__)
    if args.val_data_dir is None and {"decay", "attention", "context", "longer", "loss"} & {*args.only}:
        raise UserError(
            "--val_data_dir is missing; decay, attention, context, longer and loss are measured on its shards"
        )
    if "longer" in args.only and len(args.longer) < 2:
        raise UserError(
            "--longer is missing; the figure longer needs a run, and runs that --init_from has started from it"
        )
    if {"decay", "attention", "context"} & {*args.only}:
        path = find_checkpoint(args.checkpoint).resolve()
        args.name = f"{path.parent.name}/{path.name}"
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        fig, facts = draw_longer(args) if name == "longer" else FIGURES[name](args)
        print(f"{args.out_dir / name}.png: {save(fig, args.out_dir / f'{name}.png'):,} bytes")
        if facts:
            write_json(args.out_dir / f"{name}.json", facts)


if __name__ == "__main__":
    sys.exit(run(main))
