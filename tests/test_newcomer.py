"""What stopped a newcomer: runs that forget their flags, errors that come late or do not say what to do."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import prepare_fineweb
import train as train_module
from support.cli import UserError, run
from toy import as_flags, losses, trace, vals
from train import PRESETS, TrainConfig, lr_at, parse, problems, train


def refusal(argv, capsys) -> str:
    """The one line on which a command line ends."""
    assert run(lambda: train_module.main(argv)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


# --- a run knows its flags


def test_a_name_alone_continues_the_run(toy, capsys):
    """Bug: without its flags, a run went on with the defaults: another learning rate, or data of another project."""
    train(replace(toy, max_steps=8))
    name = ["--run_name", "toy", "--checkpoint_dir", toy.checkpoint_dir]
    assert parse(name) == replace(toy, max_steps=8)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("remembered preset gpt2-124m, ") and said.endswith(f"(from {toy.run_dir / 'run.json'})")
    assert f"data_dir {toy.data_dir}" in said and "max_steps 8" in said and "lr 0.003" in said
    assert train_module.main([*name, "--max_steps", "20"]) == 0
    train(replace(toy, run_name="whole", max_steps=20))
    assert [row[4] for row in trace(toy)] == [row[4] for row in trace(replace(toy, run_name="whole"))]
    assert parse([*name, "--lr", "1e-3", "--no_bias"]) == replace(toy, max_steps=20, lr=1e-3)


def test_min_lr_that_was_chosen_is_remembered_and_the_presets_own_is_not(tmp_path):
    """Bug: lowering --lr alone met "min_lr must not exceed lr", with a min_lr that nobody had given."""
    for name, config in (("own", TrainConfig(lr=1e-3, min_lr=1e-5)), ("presets", TrainConfig())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"config": asdict(config)}))
    there = ["--checkpoint_dir", str(tmp_path), "--lr", "3e-5", "--run_name"]
    assert parse([*there, "own"]).last_lr == 1e-5
    assert parse([*there, "presets"]).last_lr == pytest.approx(3e-6)


def test_a_fresh_name_and_a_preset_take_the_presets_values(toy, capsys):
    """Bug: flags of another run, or of an earlier experiment, in a run that names its own."""
    train(replace(toy, max_steps=2))
    there = ["--checkpoint_dir", toy.checkpoint_dir]
    assert parse(["--run_name", "fresh", *there]) == TrainConfig(run_name="fresh", checkpoint_dir=toy.checkpoint_dir)
    named = parse(["--preset", "demo", "--run_name", "toy", *there])
    assert named == TrainConfig("demo", run_name="toy", checkpoint_dir=toy.checkpoint_dir)
    assert "remembered" not in capsys.readouterr().out.split("changed")[-1].splitlines()[-1]


def test_eval_only_uses_the_runs_own_data(toy, capsys, monkeypatch):
    """Bug: a checkpoint was evaluated on the default data, or refused for it, unless all flags were given again."""
    train(replace(toy, max_steps=10))
    capsys.readouterr()
    for where in (toy.run_dir, toy.run_dir / "step_00000010"):
        assert train_module.main(["--eval_only", "--checkpoint", str(where)]) == 0
        assert f"step_00000010: validation loss {vals(toy)[10]:.4f}" in capsys.readouterr().out
    record = json.loads((toy.run_dir / "run.json").read_text())
    record["config"]["fsdp"] = True  # bug: a run of eight GPUs could not be evaluated on one
    (toy.run_dir / "run.json").write_text(json.dumps(record))
    monkeypatch.setenv("RANK", "1")
    assert not parse(["--eval_only", "--checkpoint", str(toy.run_dir)]).fsdp
    assert not capsys.readouterr().out, "rank 0 says what is remembered, for all"


@pytest.mark.parametrize("content, words", [
    ("{", "run.json"), ('{"config": []}', "no configuration in it"), ('{"config": {"lr": "fast"}}', "--lr is 'fast'"),
    ('{"config": {"preset": ["demo"]}}', "preset ['demo'] does not exist"),
])  # fmt: skip
def test_a_damaged_run_json_is_one_line(tmp_path, capsys, content, words):
    """Bug: KeyError or TypeError from whatever a file holds."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text(content)
    assert words in refusal(["--run_name", "old", "--checkpoint_dir", str(tmp_path)], capsys)


def test_flags_of_another_version_are_left_out(tmp_path):
    """Bug: TypeError for a flag that this version does not have."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text('{"config": {"gone": 1, "n_layer": 3}}')
    c = parse(["--run_name", "old", "--checkpoint_dir", str(tmp_path)])
    assert c == TrainConfig(n_layer=3, run_name="old", checkpoint_dir=str(tmp_path))


# --- configurations in Python


def test_a_preset_in_python_is_the_commands_preset():
    """Bug: TrainConfig(preset="demo") was GPT-2 124M under the demo's name, on 10B tokens."""
    assert TrainConfig(preset="demo") == PRESETS["demo"] == parse(["--preset", "demo"])
    assert TrainConfig("demo", n_layer=12) == parse(["--preset", "demo", "--n_layer", "12"])
    assert (TrainConfig("demo").data_dir, TrainConfig("demo", n_layer=12).n_layer) == ("demo_corpus", 12)
    assert TrainConfig() == PRESETS["gpt2-124m"] and replace(PRESETS["demo"], seed=1) == TrainConfig("demo", seed=1)
    with pytest.raises(UserError, match=r"preset 'dmo' does not exist; .*did you mean demo\?"):
        TrainConfig("dmo")
    with pytest.raises(TypeError, match="learning_rate"):
        TrainConfig(learning_rate=1.0)


def test_presets_have_their_figures():
    """Bug: a preset whose learning rate moves by a new default; its published numbers would no longer be its own."""
    rates = {name: (c.lr, float(f"{c.last_lr:.5g}"), c.max_steps) for name, c in PRESETS.items()}
    assert rates == {"gpt2-124m": (6e-4, 6e-5, 152_587), "fast-124m": (2.4e-3, 0, 76_294),
                     "gpt2-350m": (3e-4, 3e-5, 152_587), "gpt2-774m": (2.5e-4, 2.5e-5, 152_587),
                     "gpt2-1558m": (2e-4, 2e-5, 152_587),
                     "demo": (1e-2, 2.5e-4, 600), "small": (5e-3, 0, 600)}  # fmt: skip


def test_lr_alone_is_a_sweep():
    """Bug: --lr 3e-5 was refused, and --lr 1e-2 ended at 6e-5, because --min_lr stood still."""
    for lr in (1e-2, 1e-5):
        c = parse(["--lr", str(lr), "--max_steps", "10"])
        assert lr_at(9, c) == pytest.approx(lr / 10) and c.min_lr is None
        assert TrainConfig("demo", lr=lr).last_lr == lr / 10
    assert parse(["--lr", "1e-2", "--min_lr", "0"]).last_lr == 0
    assert problems(TrainConfig(lr=1e-3, min_lr=1e-2)) == ["--min_lr is 0.01; it must not exceed --lr (0.001)"]


def test_embed_lr_and_vector_lr_follow_lr(tmp_path):
    """Bugs: a rate of its own that stands still while --lr falls; a division by zero in place of a line."""
    c = TrainConfig(lr=2e-3, embed_lr=1e-2, vector_lr=0.0)
    assert (c.lr_scale(c.embed_lr), c.lr_scale(c.vector_lr), c.lr_scale(None)) == (5.0, 0.0, 1.0)
    assert PRESETS["gpt2-124m"].embed_lr is None and not problems(TrainConfig(lr=0.0))
    [problem] = problems(TrainConfig(lr=0.0, embed_lr=1e-3))
    assert "--embed_lr" in problem and "--lr must be above 0" in problem


def test_eval_only_finds_a_run_by_its_name(toy, capsys):
    """Bug: --checkpoint NAME was looked for under checkpoints/, whatever --checkpoint_dir said."""
    loss = train(replace(toy, max_steps=5))["val_loss"]
    capsys.readouterr()
    flags = ["--device", "cpu", "--dtype", "float32", "--checkpoint_dir", toy.checkpoint_dir]
    assert train_module.main(["--eval_only", "--checkpoint", "toy", *flags]) == 0
    assert f"validation loss {loss:.4f}" in capsys.readouterr().out


def test_paths_may_be_paths(toy):
    """Bug: a Path failed after set-up, when run.json was written."""
    paths = {k: Path(getattr(toy, k)) for k in ("data_dir", "checkpoint_dir")}
    c = replace(toy, max_steps=1, val_data_dir=Path(f"{toy.data_dir}_val"), **paths)
    assert isinstance(c.data_dir, str) and isinstance(c.val_data_dir, str)
    assert train(c)["step"] == 1 and len(losses(c)) == 1


# --- said before the work, with what to do


@pytest.mark.parametrize("flag", ["--run_name", "--sample_prompt", "--data_dir"])
def test_text_that_is_not_utf8_is_refused_before_any_work(flag, capsys, tmp_path, monkeypatch):
    """Bug: UnicodeEncodeError after set-up, from a byte of the command line that is no character."""
    monkeypatch.chdir(tmp_path)
    assert f"{flag} is 'a\\udcff'; it must be UTF-8 text" in refusal([flag, "a\udcff"], capsys)
    assert not list(tmp_path.iterdir())
    assert not problems(TrainConfig(sample_prompt="naïve 東京 🙂"))


@pytest.mark.parametrize("batch_size, world, words", [
    (7, 1, "batch_size 7 x block_size 1024 x 1 device(s) = 7,168; --batch_size could be 1, 2, 4, 8"),
    (48, 1, "--batch_size could be 8, 16, 32, 64"),
    (16, 3, "= 49,152; --total_batch_tokens could be 49152, 98304"),
])  # fmt: skip
def test_a_batch_that_does_not_divide_proposes_those_that_do(batch_size, world, words):
    """Bug: "does not divide", and the reader factorizes."""
    c = TrainConfig(batch_size=batch_size)
    [said] = problems(c, world)
    assert words in said
    for number in said.split("could be ")[1].split(", "):
        name = "batch_size" if "--batch_size could" in said else "total_batch_tokens"
        assert not problems(replace(c, **{name: int(number)}), world)


@pytest.mark.parametrize("argv, meant", [
    (["--batch-size", "4"], "--batch_size"), (["--trackr", "wandb"], "--tracker"), (["--preset", "demos"], "demo"),
    (["--optimizer", "moun"], "muon"), (["--norm", "rms_norm"], "rmsnorm"),
])  # fmt: skip
def test_a_wrong_flag_or_choice_says_what_may_be_meant(argv, meant, capsys):
    """Bug: a list of 50 flags, or of nothing."""
    assert f"did you mean {meant}?" in refusal(argv, capsys)


def test_a_prompt_longer_than_the_context_is_refused_before_the_first_step(toy):
    """Bug: ValueError at the first sample, at step 10,000 by default, and again at every start."""
    for long in (replace(toy, sample_prompt="word " * 40), replace(toy, block_size=8, val_tokens=64)):
        with pytest.raises(UserError, match=r"has \d+ tokens, and the context --block_size \d+; give a shorter one"):
            train(long)
        assert not (toy.run_dir / "metrics.jsonl").exists()
    assert train(replace(toy, sample_prompt="word " * 40, sample_interval=0, max_steps=1))["step"] == 1


def test_missing_hellaswag_is_said_before_the_first_step(toy, tmp_path):
    """Bug: a run that ends at its first evaluation, hours after its start."""
    with pytest.raises(UserError, match=r"none\.jsonl"):
        train(replace(toy, hellaswag_interval=1000, hellaswag_data=str(tmp_path / "none.jsonl")))
    assert not (toy.run_dir / "metrics.jsonl").exists()


# --- the schedule


@pytest.mark.parametrize("share, steps, warmup", [
    (0.29, 100, 29), (55 / 600, 600, 55), (0.06, 40, 2), (0.0, 100, 0), (0.06, 600, 36),
    (0.06, 152_587, 9155), (0.06, 76_294, 4578),
])  # fmt: skip
def test_the_warm_up_is_rounded_not_cut(share, steps, warmup):
    """Bug: 0.29 of 100 steps were 28, because 0.29 * 100 is 28.999999999999996."""
    c = TrainConfig(lr=1.0, min_lr=0.0, warmup_frac=share, max_steps=steps)
    assert lr_at(max(0, warmup - 1), c) == 1.0 and (warmup == 0 or lr_at(warmup, c) == 1.0)
    assert warmup < 2 or lr_at(warmup - 2, c) == (warmup - 1) / warmup


def test_as_flags_of_a_configuration_give_it_back(toy):
    """The other tests start processes with these flags: they must mean the same run."""
    assert parse(as_flags(toy)) == toy


def test_the_next_command_after_a_small_corpus_is_for_a_small_corpus(tmp_path, capsys):
    """Bug: whoever prepares a few MB and copies the printed line trains GPT-2's 124M parameters on a CPU."""
    facts = {"documents": 9, "text_bytes": 9, "shards": [], "skipped": {}, "replaced_surrogates": 0}
    directories = {split: tmp_path / split for split in ("train", "val")}
    for tokens, preset in ((500_000, "--preset small "), (5_000_000_000, "")):
        prepare_fineweb.summarize(directories, dict.fromkeys(directories, facts | {"tokens": tokens}))
        line = capsys.readouterr().out.splitlines()[-1]
        assert line == f"next: python train.py {preset}--data_dir {tmp_path}/train --val_data_dir {tmp_path}/val"
