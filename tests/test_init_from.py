"""--init_from: a new run from the weights of another, on the road from pre-training over transformers and back."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import export_hf
import train as train_module
from data_processing_fineweb import ShardWriter
from support.cli import UserError, run
from support.files import read_json
from toy import ROOT, as_flags, bytes_only, losses, trace, vals
from train import parse, train


@pytest.fixture
def origin(toy):
    """Ten steps, with a checkpoint at each fifth."""
    c = replace(toy, run_name="origin", max_steps=10, keep_last=9, sample_interval=0)
    train(c)
    return c


@pytest.fixture
def tuned(toy, origin):
    """The flags of a run from the origin's weights: another optimizer, seed and rate."""
    return replace(toy, run_name="tuned", init_from=str(origin.run_dir), optimizer="muon", seed=1, lr=1e-3, min_lr=1e-4)


def test_a_new_run_starts_at_step_0_from_the_weights(origin, tuned):
    """Bugs: weights that are drawn anew after loading; step, schedule or optimizer state that come along."""
    train(replace(tuned, max_steps=10))
    assert vals(tuned)[0] == vals(origin)[10], "the same model on the same validation windows"
    step, _, _, rate, _, samples = trace(tuned)[0]
    assert (step, float.fromhex(rate), samples) == (1, 1e-3, 8), "its own schedule, and its own order from the start"
    newest = origin.run_dir / "step_00000010"
    sha = read_json(newest / "MANIFEST.json")["files"][checkpoint.MODEL]["sha256"]
    facts = {"path": str(newest), "sha256": sha, "step": 10}
    assert read_json(tuned.run_dir / "run.json")["origin"] == facts
    assert read_json(tuned.run_dir / "step_00000010" / checkpoint.STATE)["origin"] == facts


def test_one_checkpoint_or_the_best_of_a_run_can_be_the_origin(origin, tuned):
    """Bug: a path that sampling takes and training does not."""
    best = read_json(origin.run_dir / "best.json")["step"]
    for name, path, step in (("five", origin.run_dir / "step_00000005", 5), ("best", origin.run_dir / "best", best)):
        c = replace(tuned, run_name=name, init_from=str(path), max_steps=1)
        train(c)
        assert read_json(c.run_dir / "run.json")["origin"]["step"] == step
    train(replace(tuned, run_name="named", init_from="origin", max_steps=1))  # under --checkpoint_dir


def test_the_command_line_takes_the_architecture_from_the_origin(origin, tuned, capsys):
    """Bugs: a preset's sizes, which would need other weights; a flag that contradicts the weights and is ignored."""
    same = ["--preset", "demo", "--data_dir", tuned.data_dir, "--checkpoint_dir", tuned.checkpoint_dir]
    flags = [*same, "--init_from", str(origin.run_dir), "--device", "cpu", "--dtype", "float32", "--compile", "off"]
    c = parse(flags)
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size) == (2, 2, 32, 32) and c.dropout == 0 != origin.dropout
    c = parse([*flags, "--block_size", "64", "--rope_theta", "1e5", "--dropout", "0"])
    assert (c.block_size, c.rope_theta, c.dropout, c.n_embd) == (64, 1e5, 0.0, 32)
    for flag, value in (("n_layer", "3"), ("norm", "rmsnorm")):
        assert run(lambda given=(f"--{flag}", value): train_module.main([*flags, *given])) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"another {flag} (" in error and value in error
    assert run(lambda: train_module.main([*same, "--init_from", "nowhere"])) == 2
    assert "nowhere: does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("killed_at", [0, 20])
def test_a_run_from_an_origin_continues_to_the_same_bits_without_it(origin, tuned, killed_at):
    """Bugs: the origin's weights loaded again at a restart; an origin that must outlive its run; rows of an attempt
    from another origin that are kept."""
    tuned = replace(tuned, keep_last=9)
    train(tuned)
    whole = trace(tuned), vals(tuned)
    if killed_at:
        for path in checkpoint.steps(tuned.run_dir):
            if checkpoint.step_of(path) > killed_at:
                shutil.rmtree(path)
        shutil.rmtree(origin.run_dir)
    else:
        shutil.rmtree(tuned.run_dir)
        train(replace(tuned, init_from=str(origin.run_dir / "step_00000005"), max_steps=1))
        shutil.rmtree(tuned.run_dir / "step_00000001")
    assert parse(as_flags(tuned)) == tuned
    train(tuned)
    assert (trace(tuned), vals(tuned)) == whole
    assert read_json(tuned.run_dir / "run.json")["origin"]["step"] == 10
    train(replace(tuned, max_steps=41, init_from=None))  # it need not be named again
    assert read_json(tuned.run_dir / "run.json")["origin"]["step"] == 10


def test_another_origin_is_refused_at_a_restart(origin, tuned, toy):
    """Bug: a run whose run.json names weights that it did not begin with."""
    train(replace(tuned, max_steps=10))
    train(replace(tuned, max_steps=11, init_from=f"{tuned.init_from}/"))  # the same one, as Tab completes it
    with pytest.raises(UserError, match=r"began with the weights of .*origin/, not of .*step_00000005"):
        train(replace(tuned, init_from=str(origin.run_dir / "step_00000005")))
    with pytest.raises(UserError, match=r"began with the weights of its seed, not of .*tuned"):
        train(replace(origin, init_from=str(tuned.run_dir), max_steps=20))


def test_text_of_another_tokenizer_is_refused(origin, tuned, tmp_path, capsys):
    """Ids of another vocabulary are numbers without meaning; fine-tuning on them looks almost normal."""
    other = bytes_only()
    for name in ("other", "other_val"):
        writer = ShardWriter(tmp_path / name, other.vocab_size, 10_000)
        writer.add(np.random.default_rng(len(name)).integers(0, 250, 3000), 3000)
        writer.flush()
        facts = {"name": "other", "vocab_size": other.vocab_size, "fingerprint": other.fingerprint()}
        writer.close(tokenizer=facts)
        (tmp_path / name / "tokenizer").mkdir()
        other.save(tmp_path / name / "tokenizer")
    c = replace(tuned, data_dir=str(tmp_path / "other"))
    assert run(lambda: train_module.main(as_flags(c))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step_00000010 has tokenizer" in error and "prepare the text with" in error
    assert not checkpoint.steps(c.run_dir)


def test_the_tokenizer_comes_from_the_origin_where_the_data_has_none(origin, tuned, tmp_path, byte_tokenizer):
    """Bug: GPT-2's vocabulary taken for shards without a tokenizer, whose ids are the origin's."""
    for name in ("", "_val"):
        shutil.copytree(f"{tuned.data_dir}{name}", tmp_path / f"plain{name}")
        shutil.rmtree(tmp_path / f"plain{name}" / "tokenizer")
    c = replace(tuned, data_dir=str(tmp_path / "plain"), max_steps=10)
    train(c)
    assert vals(c)[0] == vals(origin)[10]
    shutil.rmtree(origin.run_dir)
    train(replace(c, max_steps=11))


def test_the_context_may_grow(origin, tuned):
    """Bug: tables of RoPE that belong to the weights, so that a longer context starts from nothing."""
    c = replace(tuned, block_size=64, rope_theta=40_000.0, batch_size=2, max_steps=20)
    train(c)
    config = checkpoint.load_model(c.run_dir)[0].config
    assert (config.block_size, config.rope_theta) == (64, 40_000.0)
    assert vals(c)[0] < np.log(512) - 0.1, "the weights came along"
    with pytest.raises(UserError, match="block_size"):
        train(replace(c, block_size=32, batch_size=4, max_steps=30))  # not half way


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_start_from_the_origin(origin, tuned, forks, fsdp):
    """Bug: weights loaded on one rank only, or into a sharded model as if it were whole."""
    tuned = replace(tuned, dropout=0.0, batch_size=2, max_steps=20)
    train(tuned)
    two = replace(tuned, run_name="two", fsdp=fsdp)
    forks.ranks(two)
    assert losses(two) == pytest.approx(losses(tuned), abs=1e-5)
    assert vals(two) == pytest.approx(vals(tuned), abs=1e-5)
    sums = [read_json(c.run_dir / "run.json")["origin"] for c in (two, tuned)]
    assert sums[0] == sums[1]
    weights = load_file(checkpoint.steps(two.run_dir)[0] / checkpoint.MODEL)
    ours = load_file(checkpoint.steps(tuned.run_dir)[0] / checkpoint.MODEL)
    for name, t in weights.items():
        torch.testing.assert_close(t, ours[name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_goes_to_transformers_is_tuned_there_and_comes_back(origin, tuned, tmp_path):
    """The whole road: pre-train here, export, fine-tune with transformers' Trainer, import, go on here.
    Bugs: a folder that Trainer saves and the import refuses; a model that comes back as another one; weights that were
    stored in 16 bits and are destroyed, because they are trained in 16 bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported, theirs, back, text = (tmp_path / name for name in ("exported", "theirs", "back", "text.txt"))
    export_hf.main(["--checkpoint", str(origin.run_dir), "--out_dir", str(exported), "--dtype", "float16"])
    text.write_text("the text of a narrow field, said again and again. " * 40)
    ids = torch.tensor(AutoTokenizer.from_pretrained(exported)(text.read_text())["input_ids"][: 36 * 32]).view(36, 32)

    def loss_of(folder):
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids, labels=ids).loss.item()

    script = ROOT / "docs" / "fine_tune.py"
    subprocess.run(
        [sys.executable, script, exported, theirs, text, "--max_steps", "60"], check=True, capture_output=True
    )
    after = loss_of(theirs)
    assert after < loss_of(exported) - 0.5

    export_hf.main(["import", str(theirs), "--out_dir", str(back)])
    ours, _ = checkpoint.load_model(back)
    with torch.no_grad():
        loss = ours(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
    assert loss.item() == pytest.approx(after, abs=1e-3), "the model that was tuned there"
    tuned = replace(tuned, init_from=str(back), max_steps=10)
    train(parse(as_flags(tuned)))  # the command line takes the architecture: tuning gave the norms biases
    assert read_json(tuned.run_dir / "run.json")["origin"]["path"] == str(back / "step_00000000")
    assert vals(tuned)[10] < vals(tuned)[0], "and it learns the other text again"
