"""arms/: each patch applies to the present code, trains, continues and samples, and says the truth on its export."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import compare
from compare import Arm
from model import GPT, GPTConfig
from support.cli import UserError
from toy import ROOT, as_flags, losses
from train import train

PATCHES = {path.stem: path for path in sorted((ROOT / "arms").glob("*.patch"))}
EXPORTED = {"relu2", "zero_init"}  # of the others, transformers has no model
READ_BY_ALL = {"zero_init"}  # only its first weights differ
ZERO = re.compile(r"c_proj\.weight$")  # what zero_init sets to zero
SHAPE = dict(block_size=16, vocab_size=64, valid_vocab_size=60, n_layer=2, n_head=2, n_embd=32, dropout=0.0)

CHILD = ROOT / "tests" / "children" / "try_arm.py"


def test_there_are_five():
    assert len(PATCHES) == 5


@pytest.mark.parametrize("name", PATCHES)
def test_each_applies_to_the_code_and_says_what_it_is(name, tmp_path, monkeypatch):
    """An edit of the model that leaves a patch behind; and a patch that holds only while no line above it moves."""
    text = PATCHES[name].read_text(encoding="utf-8")
    head = text[: text.index("diff --git")]
    assert re.search(r"^Source: .*(arXiv \d{4}\.\d{5}|nanochat)", head, re.M) and len(head) > 200
    said = re.search(r"^Export: (not )?possible", head, re.M)
    assert (said[1] is None) == (name in EXPORTED)
    compare.copy_code(Arm(name, code=str(PATCHES[name])), tmp_path / "now", ROOT)
    changed = set(re.findall(r"^\+\+\+ b/(.*)", text, re.M))
    files = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in compare.sources(ROOT)}
    differ = {f for f, old in files.items() if (tmp_path / "now" / f).read_text(encoding="utf-8") != old}
    assert differ == changed and changed <= {"model.py", "support/runtime.py", "export_hf.py"}
    for f in changed:  # a person has added forty lines at the top
        (tmp_path / "later" / f).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "later" / f).write_text("#\n" * 40 + files[f], encoding="utf-8")
    compare.git("apply", str(PATCHES[name]), cwd=tmp_path / "later", ceiling=tmp_path)
    for f in changed:
        assert (tmp_path / "later" / f).read_text().removeprefix("#\n" * 40) == (tmp_path / "now" / f).read_text()


def in_a_child(name, config, tmp_path) -> dict:
    """What children/try_arm.py finds with the code of an arm."""
    code = tmp_path / "code"
    compare.copy_code(Arm(name, code=str(PATCHES[name])), code, ROOT)
    flags, shape = json.dumps(as_flags(config)), json.dumps(SHAPE)
    env = os.environ | {"PYTHONPATH": f"{code}{os.pathsep}{os.environ['PYTHONPATH']}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CHILD), flags, shape, str(tmp_path)]
    done = subprocess.run(command, cwd=code, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def base_losses(toy, made_once):
    """Of the toy run with the code as it is, four steps."""
    if "losses of four steps" not in made_once:
        config = four_steps(replace(toy, run_name="base"))
        train(config)
        made_once["losses of four steps"] = losses(config)
    return made_once["losses of four steps"]


def four_steps(config):
    return replace(config, max_steps=4, eval_interval=2, sample_interval=2, save_interval=2, optimizer="muon")


@pytest.mark.slow
@pytest.mark.parametrize("name", PATCHES)
def test_each_trains_continues_samples_and_is_exported_or_refused(name, toy, base_losses, tmp_path):
    """A patch that changes nothing; a loss whose gradient is another function's; a matrix that no optimizer moves or
    no checkpoint holds; an export that is another model; code of the base that takes the checkpoint for its own."""
    config = four_steps(toy)
    found = in_a_child(name, config, tmp_path)
    assert [step for step, *_ in found["rows"]] == [1, 2, 3, 4] and found["continued"] == found["rows"]
    assert all(0 < loss < 7 and norm > 0 for _, loss, norm in found["rows"])
    differences = [abs(loss - base) for (_, loss, _), base in zip(found["rows"], base_losses, strict=True)]
    assert max(differences) > 1e-5  # equal code gives 0
    assert found["text"]
    assert found["loss"] == pytest.approx(found["plain_loss"], rel=1e-5) and max(found["gradients"].values()) < 1e-4
    capped, largest = name == "logit_softcap", found["largest_logit"]
    assert 14.9 < largest <= 15 if capped else largest > 20, "weights too small to test the cap"
    assert found["parameters"] == found["in_groups"], "a parameter that no optimizer moves, or that two do"
    assert found["cached"] < 1e-4 and found["fast"] < 1e-4
    assert (found["export"] is None) == (name in EXPORTED)
    assert name in EXPORTED or "the export's logits differ from the checkpoint's" in found["export"]
    if name in READ_BY_ALL:
        checkpoint.load_model(config.run_dir)
    else:
        with pytest.raises(UserError, match=r"unknown keys|lm_head"):
            checkpoint.load_model(config.run_dir)
    begins_as_the_base(name, load_file(tmp_path / "first.safetensors"))


def begins_as_the_base(name, theirs):
    """Arms of one seed begin with the same weights, so that their differences are paired."""
    torch.manual_seed(0)
    ours = GPT(GPTConfig(**SHAPE)).state_dict()
    assert theirs.keys() - ours.keys() == ({"lm_head"} if name == "untied_head" else set())
    for weight, t in ours.items():
        zero = name == "zero_init" and ZERO.search(weight)
        assert torch.equal(theirs[weight], torch.zeros_like(t) if zero else t), weight
