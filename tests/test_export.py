"""The export: transformers computes our model, an export that it does not is refused, and the way back.

Weights, biases and norms here are large and random: a norm of ones or a bias of zeros hides a swapped name.
"""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

import checkpoint
import export_hf
import inference
from model import GPT, GPTConfig
from support import read_export
from support.cli import UserError
from tokenizer import TextTokenizer, load_tokenizer
from toy import spread

KINDS = [("layernorm", False), ("layernorm", True), ("rmsnorm", False), ("rmsnorm", True)]
VALID = 515  # ids of the tokenizer; rows 515 to 575 of the embedding are padding
ROOT = Path(__file__).parent.parent


def build(seed=0, **changes):
    """A tiny model with padding rows, in which nothing is zero, one or too small to matter."""
    torch.manual_seed(seed)
    sizes = {"block_size": 64, "vocab_size": 576, "valid_vocab_size": VALID, "n_layer": 2, "n_head": 4, "n_embd": 32}
    return spread(GPT(GPTConfig(**sizes | {"dropout": 0.1, "rope_theta": 500.0} | changes)))


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    """The 512 ids that every test shares and three more, so that the embedding has padding rows."""
    backend = Tokenizer.from_str(byte_tokenizer.backend.to_str())
    backend.add_special_tokens(["<|a|>", "<|b|>", "<|c|>"])
    return TextTokenizer(backend, "byte")


@pytest.fixture(autouse=True)
def same_process(request, monkeypatch):
    """Speed: transformers is asked in this process, but not in slow tests and in those of the process itself."""

    def ask(**questions):
        try:
            return json.loads(json.dumps(read_export.answer(**questions)))
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    if not request.node.get_closest_marker("slow") and "fresh_process" not in request.fixturenames:
        monkeypatch.setattr(export_hf, "ask_transformers", ask)


@pytest.fixture
def fresh_process():
    """For tests in which transformers is asked as it is for a user."""


def save(run_dir, model, tokenizer, step=7):
    tensors = {checkpoint.MODEL: model.state_dict(), checkpoint.OPTIMIZER: {}}
    return checkpoint.write_checkpoint(run_dir, step, model.config, tensors, {"step": step}, tokenizer)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A checkpoint of the default kind."""
    return save(tmp_path / "run", build(), tokenizer)


@pytest.fixture
def exported(saved, tmp_path):
    """Its export, made without the verification, which has tests of its own."""
    model, tokenizer = checkpoint.load_model(saved)
    (tmp_path / "hf").mkdir()
    export_hf.write_folder(tmp_path / "hf", model, tokenizer, "float32")
    return tmp_path / "hf"


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_ids(*shape, high=VALID):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


def valid_rows(model):
    """The tensors that mean something: all, less the padding rows of the embedding."""
    state = model.state_dict()
    return state | {"wte.weight": state["wte.weight"][: model.config.valid_vocab_size]}


def same(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# ---------------------------------------------------------------------------------------
# Out.


@pytest.mark.parametrize("norm, bias", KINDS)
@torch.no_grad()
def test_transformers_gives_our_logits_and_our_greedy_tokens(tmp_path, tokenizer, norm, bias):
    """Guards the mapping as a user meets it: AutoModel, whole context, and generation with its own cache."""
    model = build(norm=norm, bias=bias)
    export_hf.export(save(tmp_path / "run", model, tokenizer), tmp_path / "hf")
    theirs, idx, eot = load(tmp_path / "hf"), random_ids(3, 64), tokenizer.eot_token
    ours, logits = model(idx), theirs(idx).logits
    assert ours.std() > 0.3, "the comparison needs logits of some size"
    assert logits.shape == (3, 64, VALID), "padding ids must not exist"
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-4)
    greedy = inference.generate(model, [eot, 5], inference.PRESETS["greedy"], 50)
    out = theirs.generate(torch.tensor([[eot, 5]]), do_sample=False, max_new_tokens=50)
    assert out[0, 2:].tolist() == [ids[0] for ids in greedy]


def test_no_tensor_is_left_to_chance(exported):
    """A tensor under a name that transformers does not know is dropped, and the place it was for is initialised."""
    _, info = load_with_info(exported)
    assert not any(info.values())
    names = load_file(exported / "model.safetensors")
    assert export_hf.HEAD not in names, "the head is the embedding, and is not stored twice"


def load_with_info(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


def change_config(**changes):
    original = export_hf.hf_config
    return lambda *args: original(*args) | changes


def change_tensors(change):
    original = export_hf.to_hf
    return lambda state, c: change(original(state, c))


def swapped(tensors):
    """As if the two norms of the first block were confused."""
    a, b = (f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention"))
    return tensors | {a: tensors[b], b: tensors[a]}


FAULTS = {
    "q and k not permuted": ("half_split", lambda weight, n_head: weight, "logits differ from the checkpoint's by"),
    "norms swapped": ("to_hf", change_tensors(swapped), "logits differ"),
    "one tensor missing": (
        "to_hf",
        change_tensors(lambda t: {n: x for n, x in t.items() if n != "model.layers.1.mlp.c_fc.bias"}),
        r"model.layers.1.mlp.c_fc.bias \(missing_keys\)",
    ),
    "an unknown tensor": (
        "to_hf",
        change_tensors(lambda t: t | {"extra": torch.ones(1)}),
        r"extra \(unexpected_keys\)",
    ),
    "theta": ("hf_config", change_config(rope_parameters={"rope_type": "default", "rope_theta": 400.0}), "logits"),
    "eps": ("hf_config", change_config(norm_epsilon=1e-3), "logits"),
    "GELU by erf": ("hf_config", change_config(hidden_act="gelu"), "logits"),
    "sliding window": ("hf_config", change_config(sliding_window=32), "logits"),
    "no such activation": ("hf_config", change_config(hidden_act="gelu_tahn"), "refused by transformers"),
    "greedy tokens": ("compare_logits", lambda *_: {"bound": -1.0, "logits": 0, "rounding": 0}, "greedy token 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_export_is_refused_and_nothing_is_left(saved, tmp_path, monkeypatch, fault):
    """Guards the verification: each way to be wrong is found in the written files, before the folder has its name."""
    name, broken, message = FAULTS[fault]
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(export_hf, name, broken)
    with pytest.raises(UserError, match=message):
        export_hf.export(saved, tmp_path / "hf")
    assert sorted(tmp_path.iterdir()) == before


def test_padding_rows_in_the_export_are_refused(saved, tmp_path, monkeypatch):
    """With the padded vocabulary transformers could sample ids that no tokenizer knows."""
    padded = dataclasses.replace(build().config, valid_vocab_size=576)
    config, tensors = export_hf.hf_config, export_hf.to_hf
    monkeypatch.setattr(export_hf, "hf_config", lambda c, *rest: config(padded, *rest))
    monkeypatch.setattr(export_hf, "to_hf", lambda state, c: tensors(state, padded))
    with pytest.raises(UserError, match="logits for 576 ids, the checkpoint for 515"):
        export_hf.export(saved, tmp_path / "hf")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_16_bit_weights_are_ours_rounded_and_nothing_else(saved, tmp_path, dtype):
    """Guards the mapping as sharply as in float32; how far rounding itself moves the logits is said beside it."""
    measured = export_hf.export(saved, tmp_path / "hf", dtype)
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as f:
        assert {f.get_slice(name).get_dtype() for name in f.keys()} == {dtype.replace("float", "F").upper()}  # noqa: SIM118
    model, idx = build(), random_ids(2, 64)
    rounding = (export_hf.rounded_to(model, dtype)(idx) - model(idx)).abs().max()
    assert measured["logits"] < 1e-4 < 1e-3 < measured["rounding"] < 4 * rounding
    assert f"rounding to {dtype} moved them" in (tmp_path / "hf" / "README.md").read_text()


def test_weights_too_large_for_float16_are_refused(tmp_path, tokenizer):
    """65,504 is float16's largest number; what lies beyond would be written as infinite."""
    model = build()
    model.h[1].mlp.c_fc.weight.data[0, 0] = 7e4
    path = save(tmp_path / "run", model, tokenizer)
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.weight has values too large for float16"):
        export_hf.export(path, tmp_path / "hf", "float16")
    export_hf.export(path, tmp_path / "hf", "bfloat16")


def test_an_existing_folder_is_never_touched(saved, tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_hf.export(saved, tmp_path / "hf")
    with pytest.raises(UserError, match="exists already"):
        export_hf.import_folder(saved, tmp_path / "hf")


def test_a_full_disk_leaves_nothing(saved, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"hf was not written .*No space left"):
        export_hf.export(saved, tmp_path / "hf")
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_killed_export_left_is_cleaned(saved, tmp_path):
    leftover = tmp_path / f"{checkpoint.LEFTOVER}hf"
    leftover.mkdir()
    (leftover / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    export_hf.export(saved, tmp_path / "hf")
    assert not leftover.exists() and not (tmp_path / "hf" / "model.safetensors.index.json").exists()


def test_files_follow_the_umask(exported):
    """safetensors alone writes 0600, which nobody else on the machine can load."""
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1


# ---------------------------------------------------------------------------------------
# The process that has transformers and nothing of this repository.


def test_a_process_without_our_code_checks_the_export(saved, tmp_path, fresh_process, monkeypatch):
    """Bugs: an export that is right only beside this code; one that this process refuses and that is kept."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]))
    assert export_hf.export(saved.parent, tmp_path / "hf")["logits"] < 1e-4  # a run, and not its checkpoint
    spoiled = change_tensors(swapped)
    monkeypatch.setattr(export_hf, "to_hf", spoiled)
    with pytest.raises(UserError, match="logits differ"):
        export_hf.export(saved, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_nothing_of_ours_can_be_imported_there(tmp_path, fresh_process, monkeypatch):
    """Bug: `import model` works for whoever starts Python in the checkout, and nowhere else."""
    names = sorted(path.stem for path in ROOT.glob("*.py"))
    script = "import importlib.util as u, json; print(json.dumps([n for n in NAMES if u.find_spec(n)]))"
    (tmp_path / "names.py").write_text(script.replace("NAMES", repr([*names, "support"])))
    monkeypatch.setattr(export_hf, "READER", tmp_path / "names.py")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    assert len(names) > 10 and export_hf.ask_transformers(folder=str(tmp_path)) == []


@pytest.mark.parametrize("script, message", [("exit(3)", "exit code 3"), ("1 / 0", "ZeroDivisionError")])
def test_a_process_that_fails_is_one_line(saved, tmp_path, fresh_process, monkeypatch, script, message):
    """A process that was killed for its memory has nothing to say."""
    (tmp_path / "fails.py").write_text(script)
    monkeypatch.setattr(export_hf, "READER", tmp_path / "fails.py")
    with pytest.raises(UserError, match=f"checks the export with transformers failed .*{message}"):
        export_hf.export(saved, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


# ---------------------------------------------------------------------------------------
# The tokenizer.


def auto_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_auto_tokenizer_gives_our_ids_and_our_text(exported, tokenizer):
    """Guards the spaces that transformers once removed before punctuation, and the marker's id."""
    theirs = auto_tokenizer(exported)
    for text in (*export_hf.STRINGS, "A , b . c ! it 's n't", "\n\n  x"):
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == tokenizer.decode(ids) == text
    assert theirs.clean_up_tokenization_spaces is False, "transformers 4 would obey it"
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot_token
    names = json.loads((exported / "tokenizer_config.json").read_text())["model_input_names"]
    assert names == list(theirs("a")) == ["input_ids", "attention_mask"], "transformers 4 would add token_type_ids"
    assert theirs.model_max_length == 64 and len(theirs) == VALID


def test_a_tokenizer_that_adds_tokens_adds_none_in_the_export(tmp_path, tokenizer):
    """Many tokenizer.json put a marker before each text; our encode never does, so the model has not seen it so."""
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    eot = ("<|endoftext|>", tokenizer.eot_token)
    backend.post_processor = processors.TemplateProcessing(single=f"{eot[0]} $A", special_tokens=[eot])
    export_hf.export(save(tmp_path / "run", build(), TextTokenizer(backend, "adding")), tmp_path / "hf")
    assert auto_tokenizer(tmp_path / "hf")("a b")["input_ids"] == tokenizer.encode("a b")


def test_another_vocabulary_in_the_export_is_refused(saved, tmp_path, monkeypatch):
    """Guards the comparison of ids: the same model with other merges would speak nonsense."""
    write = export_hf.write_folder

    def spoiled(folder, *args):
        write(folder, *args)
        values = json.loads((folder / "tokenizer.json").read_text())
        values["model"]["merges"] = values["model"]["merges"][:100]
        (folder / "tokenizer.json").write_text(json.dumps(values))

    monkeypatch.setattr(export_hf, "write_folder", spoiled)
    with pytest.raises(UserError, match="the export's tokenizer gives"):
        export_hf.export(saved, tmp_path / "hf")


def test_gpt2s_tokenizer_gives_the_same_ids_of_real_text(test_data, tmp_path):
    """The vocabulary that people train with, on documents of the corpus."""
    import pyarrow.parquet as pq

    tokenizer = load_tokenizer(test_data / "gpt2_tokenizer")
    model = build(vocab_size=50304, valid_vocab_size=50257, n_layer=1, n_head=1, n_embd=8)
    export_hf.export(save(tmp_path / "run", model, tokenizer), tmp_path / "hf")
    theirs = auto_tokenizer(tmp_path / "hf")
    for text in pq.read_table(test_data / "corpus" / "val" / "00000.parquet", columns=["text"])["text"][:5].to_pylist():
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == 50256
    assert "llama.cpp" not in (tmp_path / "hf" / "README.md").read_text()


# ---------------------------------------------------------------------------------------
# Back.


@pytest.mark.parametrize("norm, bias", KINDS)
def test_export_and_import_give_the_same_tensors(tmp_path, tokenizer, norm, bias):
    """Bit for bit, but for the padding rows, which mean nothing and come back as zeros; a second export is
    the same file to the byte."""
    model = build(norm=norm, bias=bias)
    export_hf.export(save(tmp_path / "run", model, tokenizer), tmp_path / "hf")
    path = export_hf.import_folder(tmp_path / "hf", tmp_path / "back")
    checkpoint.verify(path)
    back, its_tokenizer = checkpoint.load_model(tmp_path / "back")
    assert back.config == dataclasses.replace(model.config, dropout=0.0)
    assert same(valid_rows(back), valid_rows(model)) and not back.wte.weight[VALID:].any()
    assert its_tokenizer.fingerprint() == tokenizer.fingerprint()
    export_hf.export(path, tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm, bias", [("layernorm", False), ("rmsnorm", True)])
@torch.no_grad()
def test_what_transformers_saves_after_fine_tuning_comes_back(tmp_path, tokenizer, norm, bias, dtype):
    """Guards against reading only our own writing: its config.json, its shards with an index, its 16-bit weights."""
    export_hf.export(save(tmp_path / "run", build(norm=norm, bias=bias), tokenizer), tmp_path / "hf")
    theirs = load(tmp_path / "hf").to(dtype)
    for p in theirs.parameters():
        p.add_(torch.randn_like(p) * 0.05)
    theirs.save_pretrained(tmp_path / "tuned", max_shard_size="40KB")
    auto_tokenizer(tmp_path / "hf").save_pretrained(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").is_file()
    export_hf.import_folder(tmp_path / "tuned", tmp_path / "back")
    back, its_tokenizer = checkpoint.load_model(tmp_path / "back")
    assert back.config.bias, "fine-tuning gave the zero biases values"
    idx = random_ids(2, 64)
    torch.testing.assert_close(back(idx), load(tmp_path / "tuned")(idx).logits, rtol=0, atol=1e-4)
    assert its_tokenizer.fingerprint() == tokenizer.fingerprint()


def test_configs_of_transformers_4_are_read(exported, tmp_path):
    """It writes rope_theta beside the rest, and leaves out what is its default."""
    values = json.loads((exported / "config.json").read_text())
    for name in ("rope_parameters", "tie_word_embeddings", "sliding_window"):
        del values[name]
    (exported / "config.json").write_text(json.dumps(values | {"rope_scaling": None}))
    export_hf.import_folder(exported, tmp_path / "back")
    assert checkpoint.load_model(tmp_path / "back")[0].config.rope_theta == 500.0


FOREIGN = {
    "model_type": "llama",
    "hidden_act": "relu2",
    "norm_epsilon": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "use_bias": False,
    "vocab_size": "515",
    "num_hidden_layers": 10**400,
    "num_attention_heads": 5,
    "hidden_size": None,
    "max_position_embeddings": 0,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0},
    "rope_theta": "500",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_model_is_refused_by_the_name_of_what_differs(exported, tmp_path, name):
    values = json.loads((exported / "config.json").read_text())
    if name == "rope_theta":
        del values["rope_parameters"]
    (exported / "config.json").write_text(json.dumps(values | {name: FOREIGN[name]}))
    ours = export_hf.SIZES.get(name, name)
    with pytest.raises(UserError, match=rf"\b({ours}|{name})\b") as error:
        export_hf.import_folder(exported, tmp_path / "back")
    assert "\n" not in str(error.value) and not (tmp_path / "back").exists()


def test_more_layers_than_tensors_are_refused_at_once(exported, tmp_path):
    """A model of a million layers would be built, and the memory be gone, before its tensors are found missing."""
    values = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 10**6}))
    with pytest.raises(UserError, match="1,000,000 layers, the files hold"):
        export_hf.import_folder(exported, tmp_path / "back")


def test_all_differences_come_at_once(exported, tmp_path):
    values = json.loads((exported / "config.json").read_text()) | {"hidden_act": "silu", "use_bias": False}
    (exported / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="hidden_act is 'silu', expected 'gelu_pytorch_tanh'; use_bias is False"):
        export_hf.import_folder(exported, tmp_path / "back")


def test_no_junk_in_a_config_ends_in_a_traceback(exported, tmp_path):
    """Any JSON may stand in a stranger's file; each value of each key is taken or refused, and 10^400 is a number."""
    values, taken = json.loads((exported / "config.json").read_text()), set()
    for name in values:
        for i, junk in enumerate((None, [], {}, {"x": 1}, "x", "", True, -1, 2**40, 10**400, 1e999, float("nan"))):
            (exported / "config.json").write_text(json.dumps(values | {name: junk}))
            try:
                export_hf.import_folder(exported, tmp_path / f"{name}{i}")
                taken.add(name)
            except UserError as error:
                assert "\n" not in str(error)
    spare = {"rope_theta", "torch_dtype", "architectures", "bos_token_id", "eos_token_id"}
    assert taken == spare | {"rope_parameters", "sliding_window", "use_bias", "tie_word_embeddings"}


BIAS, NORM = "model.layers.1.mlp.c_fc.bias", "model.norm.weight"
DAMAGE = {
    "missing": (lambda t: t.pop(BIAS), f"tensor {BIAS} is missing"),
    "extra": (lambda t: t.update(extra=torch.ones(2)), "tensor extra is not expected"),
    "shape": (lambda t: t.update({NORM: torch.ones(33)}), rf"tensor {NORM} is \[33\], expected \[32\]"),
    "dtype": (lambda t: t.update({NORM: torch.ones(32).long()}), rf"tensor {NORM} is I64"),
    "NaN": (lambda t: t[BIAS].fill_(float("nan")), f"tensor {BIAS} holds NaN"),
    "untied": (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}), "lm_head.weight is not the"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_tensor_is_refused_by_name(exported, tmp_path, damage):
    change, message = DAMAGE[damage]
    tensors = load_file(exported / "model.safetensors")
    change(tensors)
    save_file(tensors, exported / "model.safetensors")
    with pytest.raises(UserError, match=message):
        export_hf.import_folder(exported, tmp_path / "back")


def test_a_head_stored_beside_the_equal_embedding_is_read(exported, tmp_path):
    """Some tools write the tied tensor twice."""
    tensors = load_file(exported / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, exported / "model.safetensors")
    model, _ = checkpoint.load_model(export_hf.import_folder(exported, tmp_path / "back"))
    assert torch.equal(model.wte.weight[: len(tensors["lm_head.weight"])], tensors["lm_head.weight"])


@pytest.mark.parametrize("where", ["../outside.safetensors", "/etc/passwd", "model.bin", 3, None])
def test_an_index_may_only_name_safetensors_of_its_folder(exported, tmp_path, where):
    """A path that leads out of the folder, or to a pickle, is not followed."""
    (tmp_path / "outside.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    index = {"weight_map": {"model.norm.weight": where}}
    (exported / "model.safetensors").unlink()
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="weight_map does not list files of this folder"):
        export_hf.import_folder(exported, tmp_path / "back")


def test_an_index_of_an_earlier_save_is_not_read(exported, tmp_path):
    """Bug: the check read the files of the index, and transformers loaded model.safetensors, which is beside it."""
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    export_hf.import_folder(exported, tmp_path / "back")
    tensors = load_file(exported / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(tensors["model.norm.weight"].shape, dtype=torch.int8)
    save_file(tensors, exported / "good.safetensors")
    os.rename(exported / "good.safetensors", exported / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight is I8, expected F32"):
        export_hf.import_folder(exported, tmp_path / "again")


def test_pickles_are_never_opened(exported, tmp_path):
    """The payload of a pickle runs when it is loaded."""

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "payload-ran"),))

    (exported / "model.safetensors").unlink()
    torch.save(Payload(), exported / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which could run code and is not opened"):
        export_hf.import_folder(exported, tmp_path / "back")
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_cut_or_missing_file_is_named(exported, tmp_path, name):
    content = (exported / name).read_bytes()
    (exported / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name):
        export_hf.import_folder(exported, tmp_path / "back")
    (exported / name).unlink()
    with pytest.raises(UserError, match=name):
        export_hf.import_folder(exported, tmp_path / "back")


def test_more_ids_than_rows_are_refused_and_spare_rows_dropped(exported, tmp_path):
    """Embedding and tokenizer may disagree after fine-tuning: ids without a row would crash, rows without an id
    could be sampled."""
    config, weights = json.loads((exported / "config.json").read_text()), load_file(exported / "model.safetensors")
    for rows in (500, 520):
        embedding = torch.nn.functional.pad(weights["model.embed_tokens.weight"], (0, 0, 0, rows - VALID), value=1.0)
        save_file(weights | {"model.embed_tokens.weight": embedding.contiguous()}, exported / "model.safetensors")
        (exported / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
        if rows < VALID:
            with pytest.raises(UserError, match="the tokenizer has 515 ids, the embedding 500 rows"):
                export_hf.import_folder(exported, tmp_path / "back")
    export_hf.import_folder(exported, tmp_path / "back")
    back, _ = checkpoint.load_model(tmp_path / "back")
    assert same(valid_rows(back), valid_rows(build()))


# ---------------------------------------------------------------------------------------
# The model card.


def test_the_card_carries_the_numbers_of_this_step(saved, tmp_path):
    """Guards against numbers of another step: the run went on after this checkpoint and became better."""
    rows = [
        {"kind": "val", "step": 7, "tokens": 3584, "loss": 5.25, "perplexity": 190.57, "bits_per_byte": 1.7123},
        {"kind": "hellaswag", "step": 7, "tokens": 3584, "completion_acc": 0.2811, "completion_acc_stderr": 0.0045},
        {"kind": "val", "step": 8, "tokens": 4096, "loss": 4.99, "perplexity": 146.94, "bits_per_byte": 1.6},
    ]
    rows[1] |= {"examples": 10042, "harness_acc_norm": 0.3012, "harness_acc_norm_stderr": 0.0046}
    lines = "".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "st'
    (saved.parent / "metrics.jsonl").write_text(lines)
    facts = {"config": {"lr": 0.0006, "data_dir": "/home/somebody/edu_fineweb10B", "optimizer": "muon"}}
    facts["config"] |= {"embed_lr": 0.0003, "vector_lr": None, "schedule": "linear", "decay_frac": 0.3}
    facts |= {"dtype": "bfloat16", "training_tokens": 9_953_989_344}
    facts["origin"] = {"path": "/home/somebody/runs/first/step_00000600", "sha256": "ab12", "step": 600}
    (saved.parent / "run.json").write_text(json.dumps(facts))
    export_hf.export(saved, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    expected = (
        "run, step 7",
        "3,584",
        "5.2500",
        "190.57",
        "1.7123",
        "28.11 % ± 0.45",
        "30.12 % ± 0.46",
        "10,042",
        "lr 0.0006, embed_lr 0.0003, schedule linear, decay_frac 0.3",
        "| started from the weights of | first, step 600, sha256 ab12 |",
    )
    expected += ("`edu_fineweb10B`, 9,953,989,344 tokens", "| optimizer | muon |", "in training | bfloat16 |")
    assert not [text for text in (*expected, "Starcoder2ForCausalLM") if text not in card]
    assert not [text for text in ("4.99", "146.94", "not measured", "somebody", "Arcee") if text in card]
    assert f"{valid_count(build()):,} (2 layers" in card
    assert "refuses one of your\nown until" in card, "llama.cpp knows GPT-2's tokenizer, not this one"


def valid_count(model):
    return sum(t.numel() for t in valid_rows(model).values())


def test_the_card_says_what_was_not_measured(tmp_path, tokenizer):
    """A number that is not there must not be made up; and RMSNorm comes with its warning."""
    export_hf.export(save(tmp_path / "run", build(norm="rmsnorm"), tokenizer), tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.count("| not measured |") == 5 and "llama.cpp computes every Arcee" in card
    assert card.startswith("---\nlibrary_name: transformers\n")


# ---------------------------------------------------------------------------------------
# The command line, and the hub.


def test_the_warning_that_comes_with_rmsnorm_is_also_printed(tmp_path, tokenizer, capsys):
    """llama.cpp would run such a model without a word, with another activation."""
    path = save(tmp_path / "run", build(norm="rmsnorm"), tokenizer)
    export_hf.main(["--checkpoint", str(path), "--out_dir", str(tmp_path / "hf")])
    out, err = capsys.readouterr()
    assert "llama.cpp computes every Arcee model" in err and err.count("\n") == 1
    assert [line.split()[0] for line in out.splitlines()] == [f"{tmp_path / 'hf'}:", "to", "next:"]


def test_both_ways_on_the_command_line(saved, tmp_path, monkeypatch, capsys):
    """Guards the defaults: the newest checkpoint, hf_<run>, and checkpoints/<folder> on the way back."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    saved.parent.rename(tmp_path / "checkpoints" / "tiny")
    export_hf.main([])
    assert "hf_tiny: verified with transformers alone, logits differ by at most" in capsys.readouterr().out
    export_hf.main(["import", "hf_tiny"])
    assert capsys.readouterr().out == "checkpoints/hf_tiny/step_00000000\n"
    assert same(valid_rows(checkpoint.load_model(Path("checkpoints/hf_tiny"))[0]), valid_rows(build()))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["import"], "import which folder"),
        (["import", "x", "--dtype", "float16", "--checkpoint", "a"], "import takes no --checkpoint, --dtype"),
        (["import", "no_such"], "no_such: not a folder"),
        (["export", "x"], "export takes no folder"),
        (["--dtype", "int8"], "int8.*one of float32, bfloat16, float16"),
        (["--checkpoint", "no_such"], "no_such: does not exist"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        export_hf.main(argv)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------
# GGUF.


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_gguf_has_a_name_for_every_tensor(norm):
    """Guards the road to llama.cpp: its converter stops at the first tensor whose name it cannot map."""
    gguf = pytest.importorskip("gguf")
    model = build(norm=norm)
    arch = gguf.MODEL_ARCH.STARCODER2 if norm == "layernorm" else gguf.MODEL_ARCH.ARCEE
    names = gguf.get_tensor_name_map(arch, model.config.n_layer)
    theirs = export_hf.to_hf(model.state_dict(), model.config)
    mapped = [names.get_name(name, try_suffixes=(".weight", ".bias")) for name in theirs]
    assert None not in mapped and len(set(mapped)) == len(theirs)
