"""Run with the code of an arm: FLAGS SHAPE FOLDER, the first two as JSON. Prints as JSON what test_arms.py judges."""

import json
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import checkpoint
import export_hf
import inference
import model
import train
from support.cli import UserError
from support.runtime import sample_faster
from support.tracking import read_rows


def rows(config):
    """(step, loss, gradient norm) of each step, after training to the end."""
    train.train(config)
    read = read_rows(config.run_dir / "metrics.jsonl")
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read if row["kind"] == "train"]


def export(config, folder):
    """Why it is refused, or None."""
    try:
        export_hf.export(checkpoint.find_checkpoint(config.run_dir), folder)
    except UserError as error:
        return str(error)


def run_of(config, folder) -> dict:
    """Four steps; then the state that a kill after step 2 leaves, continued; sampled and exported."""
    found = {"rows": rows(config)}
    shutil.rmtree(config.run_dir / "step_00000004")
    found["continued"] = rows(config)
    trained, tokenizer = checkpoint.load_model(config.run_dir)
    found["text"] = inference.sample_text(trained, tokenizer, "The", inference.PRESETS["nucleus"], 8)[0]
    return found | {"export": export(config, folder / "hf")}


def with_large_weights(net):
    """Nothing is too small to matter, and logits are far above 15."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(std=3.0 if name in ("wte.weight", "lm_head") else 0.3)
            if p.dim() == 1:
                p.add_(1)
    return net


def gradients(net, loss) -> dict:
    named = dict(net.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, named.values())))


def numbers_of(net) -> dict:
    """The loss and its gradients beside those of plain autograd, and the two other ways to the logits."""
    idx, targets = torch.randint(net.config.valid_vocab_size, (2, 2, 16))
    targets[0, :3] = model.IGNORE
    model.LOSS_ROWS = 7  # several blocks, the last one not full
    logits = net(idx)
    loss = net(idx, targets)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=model.IGNORE, reduction="sum")
    ours, theirs = gradients(net, loss), gradients(net, plain)
    wrong = {name: ((g - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name, g in ours.items()}
    in_groups = sum(len(group["params"]) for group in net.parameter_groups(0.1))
    with torch.no_grad():
        whole, cache = net(idx[:1]), model.KVCache(net.config, 1)
        steps = torch.cat([net(one, cache=cache) for one in idx[:1].split(1, dim=1)], dim=1)
        fast = sample_faster(net, "float32")
        fast = fast.logits(fast.features(idx[:1]))
    return {
        "loss": loss.item(),
        "plain_loss": plain.item(),
        "gradients": wrong,
        "largest_logit": logits.abs().max().item(),
        "parameters": len(ours),
        "in_groups": in_groups,
        "cached": (steps - whole).abs().max().item(),
        "fast": (fast - whole).abs().max().item(),
    }


def main():
    flags, shape, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    train.plot_curves = lambda run_dir: None  # for speed
    found = run_of(train.parse(flags), folder)
    torch.manual_seed(0)
    net = model.GPT(model.GPTConfig(**shape)).eval()
    save_file({name: t.clone() for name, t in net.state_dict().items()}, folder / "first.safetensors")
    print(json.dumps(found | numbers_of(with_large_weights(net))))


if __name__ == "__main__":
    main()
