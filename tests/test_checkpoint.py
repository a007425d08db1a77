"""Checkpoints: whole or not there, verified, and nothing in them can run code or surprise the loader."""

import ast
import json
import os
import re
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import hellaswag_eval
import inference
import train as train_module
from model import GPT, GPTConfig
from support.cli import UserError
from support.files import read_json, sha256
from toy import as_flags
from train import train

ROOT = Path(__file__).parent.parent


def save(directory, step, model, optimizer, state, tokenizer):
    tensors = checkpoint.snapshot(model, optimizer)
    return checkpoint.write_checkpoint(directory, step, model.config, tensors, state, tokenizer)


def build(seed=0):
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(block_size=8, vocab_size=576, valid_vocab_size=512, n_layer=1, n_head=1, n_embd=8, dropout=0.0)
    )
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), fused=True)
    return model, optimizer


def one_step(model, optimizer):
    ids = torch.arange(8)[None]
    model(ids, ids).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def run_dir(tmp_path, byte_tokenizer):
    """A run with the checkpoints of steps 1, 2 and 3."""
    model, optimizer = build()
    for step in (1, 2, 3):
        one_step(model, optimizer)
        save(tmp_path / "run", step, model, optimizer, {"step": step}, byte_tokenizer)
    return tmp_path / "run"


def reseal(path):
    """Writes a manifest that agrees with the files: what is then refused is refused for its content."""
    names = [p.name for p in path.iterdir() if p.name != checkpoint.MANIFEST]
    files = {n: {"size": (path / n).stat().st_size, "sha256": checkpoint.sha256(path / n)} for n in names}
    (path / checkpoint.MANIFEST).write_text(json.dumps({"format_version": 1, "files": files}))


def test_weights_and_optimizer_come_back_bit_for_bit(run_dir):
    """A momentum that is lost or attached to another parameter shows only later, as a worse run."""
    model, optimizer = build()
    for _ in range(3):
        one_step(model, optimizer)
    loaded, its_optimizer = build(seed=1)
    checkpoint.load_training(checkpoint.newest(run_dir), loaded, its_optimizer)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
        one_step(model, optimizer), one_step(loaded, its_optimizer)


def test_inference_needs_neither_optimizer_nor_state_nor_flags(run_dir, byte_tokenizer):
    path = run_dir / "step_00000003"
    (path / checkpoint.OPTIMIZER).unlink()
    (path / checkpoint.STATE).unlink()
    model, tokenizer = checkpoint.load_model(run_dir)
    assert not model.training and tokenizer.fingerprint() == byte_tokenizer.fingerprint()
    assert torch.equal(model.wte.weight, load_file(path / checkpoint.MODEL)["wte.weight"])


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "no manifest"])
@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.CONFIG])
def test_a_bad_newest_is_named_and_the_one_before_is_used(run_dir, capsys, damage, name):
    file = run_dir / "step_00000003" / (checkpoint.MANIFEST if damage == "no manifest" else name)
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    assert checkpoint.newest(run_dir).name == "step_00000002"
    assert str(file) in capsys.readouterr().err
    with pytest.raises(UserError, match=file.name):
        checkpoint.verify(file.parent)


def test_all_bad_is_an_error_and_none_is_a_fresh_start(run_dir, tmp_path):
    """A silent start from scratch would overwrite what a person could still rescue."""
    for path in checkpoint.steps(run_dir):
        (path / checkpoint.MODEL).write_bytes(b"")
    with pytest.raises(UserError, match="none of its 3 checkpoints"):
        checkpoint.newest(run_dir)
    assert checkpoint.newest(tmp_path / "new") is None


def test_a_moved_run_loads(run_dir, tmp_path):
    """An absolute path inside would point to where the run once was."""
    shutil.move(run_dir, tmp_path / "elsewhere")
    assert checkpoint.find_checkpoint(tmp_path / "elsewhere").name == "step_00000003"
    everything = b"".join(p.read_bytes() for p in (tmp_path / "elsewhere").rglob("*.json"))
    assert str(run_dir).encode() not in everything


def test_newest_run_is_found_without_a_name(run_dir, tmp_path, monkeypatch, byte_tokenizer):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint under checkpoints/"):
        checkpoint.find_checkpoint()
    model, optimizer = build()
    for i, name in enumerate(("older", "newer")):
        path = save(Path("checkpoints") / name, 9 - i, model, optimizer, {}, byte_tokenizer)
        os.utime(path, (1e9 + i, 1e9 + i))
    assert checkpoint.find_checkpoint() == Path("checkpoints/newer/step_00000008")


def test_a_checkpoint_by_its_runs_name_and_by_best_and_latest(run_dir, tmp_path, monkeypatch):
    """Where a checkpoint is asked for, people type what they know: the run's name, best, latest."""
    shutil.move(run_dir, tmp_path / "checkpoints" / "mine")
    monkeypatch.chdir(tmp_path)
    run = Path("checkpoints/mine")
    checkpoint.point(run, "best", 2, loss=1.0)
    expected = {"mine": 3, "mine/latest": 3, "mine/best": 2, "mine/step_00000001": 1}
    for name, step in expected.items():
        for path in (name, f"checkpoints/{name}", Path("checkpoints", name).absolute()):
            assert checkpoint.find_checkpoint(path).name == f"step_{step:08d}", path
    (tmp_path / "mine").mkdir()  # a folder of that name that is no run, such as its data
    assert checkpoint.find_checkpoint("mine/best").name == "step_00000002"
    assert checkpoint.load_model("mine")[0].config.n_layer == 1
    for hint in (
        '{"checkpoint": "../mine/step_00000001"}',
        '{"checkpoint": 3}',
        '{"checkpoint": "step_00000009"}',
        "{}",
    ):
        (run / "best.json").write_text(hint)
        with pytest.raises(UserError, match=r"best\.json: names no checkpoint that is there"):
            checkpoint.find_checkpoint("mine/best")
    (run / "best.json").unlink()
    with pytest.raises(UserError, match=r"best\.json: cannot be read"):
        checkpoint.find_checkpoint("mine/best")
    with pytest.raises(UserError, match="yours: does not exist; expected a run's directory or name"):
        checkpoint.find_checkpoint("yours")


def test_a_start_hashes_the_weights_once(toy, scenes, tmp_path, monkeypatch):
    """Bug: gigabytes read three times before the first step or the first word, and once more by each process."""
    train(replace(toy, max_steps=5))
    for name in ("plain", "plain_val"):  # without a tokenizer, so that the one of --init_from is looked for too
        shutil.copytree(f"{toy.data_dir}{name.removeprefix('plain')}", tmp_path / name)
        shutil.rmtree(tmp_path / name / "tokenizer")
    hashed, weights = [], toy.run_dir / "step_00000005" / checkpoint.MODEL
    monkeypatch.setattr(checkpoint, "sha256", lambda path: hashed.append(path) or sha256(path))
    run, how = str(toy.run_dir), ["--device", "cpu", "--dtype", "float32"]
    other = as_flags(replace(toy, run_name="other", max_steps=6))
    again = as_flags(replace(toy, run_name="again", max_steps=6, data_dir=str(tmp_path / "plain")))
    for name, main, flags in (
        ("init_from", train_module.main, [*again, "--init_from", run]),
        ("resume", train_module.main, [*other, "--resume", str(weights.parent)]),
        ("eval_only", train_module.main, [*how, "--eval_only", "--checkpoint", run, "--compile", "off"]),
        ("inference", inference.main, [*how, "--checkpoint", run, "--max_new_tokens", "1", "--prompt", "a"]),
        ("hellaswag", hellaswag_eval.main, [*how, "--checkpoint", run, "--data", scenes, "--limit", "1"]),
    ):  # fmt: skip
        hashed.clear()
        assert not main(flags), name
        assert hashed.count(weights) == 1, name


def test_a_config_that_is_older_than_a_field_of_it_is_read(run_dir):
    """A new field of GPTConfig must not make old checkpoints unreadable: what is missing has its default."""
    path = run_dir / "step_00000003"
    config = read_json(path / checkpoint.CONFIG)
    del config["rope_theta"]
    (path / checkpoint.CONFIG).write_text(json.dumps(config))
    reseal(path)
    assert checkpoint.load_model(path)[0].config.rope_theta == GPTConfig().rope_theta


def test_rotation_keeps_the_newest_and_the_best(run_dir):
    checkpoint.remove_old(run_dir, keep_last=1, best_step=1)
    assert [p.name for p in checkpoint.steps(run_dir)] == ["step_00000003", "step_00000001"]
    assert read_json(run_dir / "latest.json")["step"] == 3


def test_leftovers_of_a_killed_save_are_never_considered(run_dir, byte_tokenizer):
    shutil.copytree(run_dir / "step_00000003", run_dir / f"{checkpoint.LEFTOVER}step_00000004")
    assert checkpoint.newest(run_dir).name == "step_00000003"
    checkpoint.verify(save(run_dir, 4, *build(), {}, byte_tokenizer))  # as an import that is started again
    shutil.copytree(run_dir / "step_00000004", run_dir / f"{checkpoint.LEFTOVER}step_00000005")
    checkpoint.clean(run_dir)
    assert not list(run_dir.glob(f"{checkpoint.LEFTOVER}*"))


@pytest.mark.parametrize("victim", ["save_file", "fsync", "rename"])
def test_a_full_disk_leaves_no_trace_and_says_how_much_is_needed(run_dir, monkeypatch, byte_tokenizer, victim):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = sorted(p.name for p in run_dir.iterdir())
    monkeypatch.setattr(*((checkpoint, victim) if victim == "save_file" else (os, victim)), full)
    with pytest.raises(UserError, match=r"No space left.* needs about [\d,]+ bytes and [\d,]+ are free"):
        save(run_dir, 4, *build(), {}, byte_tokenizer)
    monkeypatch.undo()
    assert sorted(p.name for p in run_dir.iterdir()) == before
    checkpoint.verify(run_dir / "step_00000003")


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_files_follow_the_umask(tmp_path, byte_tokenizer):
    """safetensors writes 0600, which locks out the group that shares the disk."""
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1, *build(), {}, byte_tokenizer)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {0o640}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("ln_f.weight"), "ln_f.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is not expected"),
        (lambda t: t.update({"ln_f.weight": torch.ones(9)}), r"ln_f.weight is F32 \[9\], expected F32 \[8\]"),
        (lambda t: t.update({"ln_f.weight": torch.ones(8).half()}), r"ln_f.weight is F16"),
        (lambda t: t["ln_f.weight"].fill_(float("nan")), "ln_f.weight holds NaN"),
        (lambda t: t["ln_f.weight"].fill_(float("inf")), "ln_f.weight holds NaN or Inf"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(run_dir, change, words):
    path = run_dir / "step_00000003"
    tensors = load_file(path / checkpoint.MODEL)
    change(tensors)
    save_file(tensors, path / checkpoint.MODEL)
    reseal(path)
    with pytest.raises(UserError, match=words):
        checkpoint.load_model(path)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("n_layer", "12", "n_layer is '12', expected int"),
        ("n_head", 3, "does not divide"),
        ("surprise", 1, "surprise"),
        ("norm", "batchnorm", "batchnorm"),
    ],
)
def test_a_wrong_config_is_refused(run_dir, key, value, words):
    path = run_dir / "step_00000003"
    (path / checkpoint.CONFIG).write_text(json.dumps(read_json(path / checkpoint.CONFIG) | {key: value}))
    reseal(path)
    with pytest.raises(UserError, match=words):
        checkpoint.load_model(path)


def test_other_peoples_checkpoints_are_recognised_and_not_opened(tmp_path):
    """A pickle runs code when it is opened; a Hugging Face folder is merely not ours."""
    fired = tmp_path / "fired"

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(fired),))

    torch.save({"model": Payload()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="pickle of another project"):
        checkpoint.find_checkpoint(tmp_path / "ckpt.pt")
    assert not fired.exists()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="Hugging Face"):
        checkpoint.find_checkpoint(tmp_path / "hf")


def test_nothing_in_the_source_opens_pickles_or_runs_text():
    """torch.load's own protection can be switched off from outside: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1."""
    calls = re.compile(r"\b(pickle|torch\.load|weights_only\s*=\s*False|allow_pickle\s*=\s*True)\b|\b(eval|exec)\(")
    sources = [p for folder in (ROOT, ROOT / "support", ROOT / "benchmarks") for p in folder.glob("*.py")]
    assert len(sources) > 12
    for path in sources:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        code = ast.unparse(without_text(tree))  # comments and sentences may name what the code must not do
        assert not (found := calls.search(re.sub(r"\.eval\(", ".evaluation_mode(", code))), f"{path.name}: {found}"


def without_text(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return tree


def test_manifest_cannot_point_outside(run_dir):
    path = run_dir / "step_00000003"
    manifest = read_json(path / checkpoint.MANIFEST)
    there = run_dir / "step_00000002" / checkpoint.MODEL
    manifest["files"][f"../{there.parent.name}/{there.name}"] = {"size": there.stat().st_size, "sha256": sha256(there)}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"\.\./step_00000002/model.*listed in MANIFEST.json, but not there"):
        checkpoint.verify(path)


def test_command_line_verifies_a_run(run_dir, capsys):
    checkpoint.main(["verify", str(run_dir)])
    assert capsys.readouterr().out.count("whole") == 3
