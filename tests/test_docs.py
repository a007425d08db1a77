"""The reading road names, links and quotes only what is there, and its figures show what the code does."""

import ast
import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import checkpoint
import compare
import report
from model import GPT, GPTConfig
from support.cli import run
from toy import ROOT, spread
from train import TrainConfig

DOCS = ROOT / "docs"
CHAPTERS = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("[0-9]-*.md"))}
FACTS = {path.stem: json.loads(path.read_text()) for path in (DOCS / "figures").glob("*.json")}
every_chapter = pytest.mark.parametrize("chapter", CHAPTERS)


def names_in(path) -> set[str]:
    """What a Python file defines: functions, classes, constants, and Class.method and Class.field."""
    names = set()

    def visit(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return names


def source_lines(text) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def blocks(text, language):
    """(what stands before it, the block) for each fenced block of a language."""
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S):
        yield text[: match.start()], match[1]


@every_chapter
def test_every_name_it_links_is_defined_in_that_file(chapter):
    """A function, class, constant or test that was renamed, moved or removed."""
    links = re.findall(r"\[`([^`]+)`\]\(([^)#]+\.py)\)", CHAPTERS[chapter])
    assert len(links) >= 8
    for name, target in links:
        path = (DOCS / target).resolve()
        assert path.is_file(), target
        assert name in names_in(path), f"{name} in {target}"


@every_chapter
def test_every_link_and_picture_leads_somewhere(chapter):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", CHAPTERS[chapter]) if "://" not in link]
    assert links and all((DOCS / link).exists() for link in links), links


@every_chapter
def test_quoted_code_is_in_the_source_line_by_line(chapter):
    """A quotation that the code has left behind: the lines of each block stand together in a file linked before it."""
    found = list(blocks(CHAPTERS[chapter], "python"))
    assert found
    for before, block in found:
        quoted = source_lines(block)
        files = {(DOCS / link).resolve() for link in re.findall(r"\]\(([^)#]+\.py)\)", before)}
        sources = [source_lines(path.read_text(encoding="utf-8")) for path in files]
        starts = ((lines, i) for lines in sources for i in range(len(lines)))
        assert any(lines[i : i + len(quoted)] == quoted for lines, i in starts), block


def flags_of(script) -> set[str]:
    if script.name == "train.py":
        return set(TrainConfig.__dataclass_fields__)
    if script.name == "compare.py":  # which passes on flags of its runs
        return {*TrainConfig.__dataclass_fields__, *compare.CompareConfig.__dataclass_fields__}
    text = script.read_text(encoding="utf-8")
    return set(re.findall(r'"--(\w+)"', text)) | set(re.findall(r"^    (\w+): [^=\n]+ = (?:flag|unset)\(", text, re.M))


@every_chapter
def test_every_flag_exists(chapter):
    """A command that a reader copies and that ends with exit code 2."""
    text = CHAPTERS[chapter]
    scripts = [*ROOT.glob("*.py"), *DOCS.glob("*.py"), *ROOT.glob("benchmarks/*.py")]
    anywhere = set().union(*map(flags_of, scripts))
    assert set(re.findall(r"`--(\w+)`", text)) <= anywhere
    for _, block in blocks(text, "sh"):
        for script, rest in re.findall(r"^python ([\w/.]+\.py)([^\n#]*)", block.replace("\\\n", ""), re.M):
            assert set(re.findall(r"--(\w+)", rest)) <= flags_of(ROOT / script), rest


@every_chapter
def test_formulas_survive_markdown(chapter):
    """GitHub takes the backslash from escaped punctuation before it sets a formula; each $ needs a partner."""
    text = re.sub(r"```.*?```", "", CHAPTERS[chapter], flags=re.S)
    formulas = re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", text, re.S)
    assert formulas
    for display, inline in formulas:
        assert not re.search(r"\\[^a-zA-Z]", display + inline), display + inline
    assert text.count("$") % 2 == 0


def test_figures_are_small_and_all_are_shown():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("docs/figures", "figures")
    text = "".join(CHAPTERS.values()) + readme
    shown = set(re.findall(r"!\[[^\]]{20,}\]\((figures/\w+\.png)\)", text))
    there = {f"figures/{path.name}" for path in (DOCS / "figures").glob("*.png")}
    assert shown == there and len(there) >= 7
    for name in there:
        body = (DOCS / name).read_bytes()
        width, _ = struct.unpack(">II", body[16:24])
        assert width >= 800 and len(body) <= 120_000, name


def test_the_text_quotes_what_was_measured():
    """Figures drawn again from another checkpoint, under a text that still tells of the old one."""
    first, last = (text for name, text in CHAPTERS.items() if name[0] in "14")
    decay, attention, loss = FACTS["decay"], FACTS["attention"], FACTS["loss"]
    said = [f"{decay[f'equal_at_{d}']:.2f} at {'distance ' * (d == 1)}{d:,}" for d in (1, 10, 100, 1000)]
    said += [f"at most {decay['largest_change_when_both_move_5000']:g}"]
    said += [f"{decay['trained_heads_that_prefer_near']} of its {decay['heads']} heads"]
    for head in (attention["nearest"], attention["farthest"]):
        said += [f"layer {head['layer']}, head {head['head']}"]
    said += [f"{attention['nearest']['weight_on_the_token_before']:.2f} of its weight"]
    for row in FACTS["context"]["rows"]:
        said += [f"{row['perplexity']:.1f}"]
    for reader in FACTS["longer"]["loss_minus_trained_by_position"]:
        some = [f"{row['perplexity']:.1f}" for row in FACTS["longer"]["rows"] if row["reader"] == reader]
        said += [f"| {reader} | {' | '.join(some)} |"]
    flat = " ".join(first.split())
    assert [words for words in said if words not in flat] == []
    assert f"= {loss['uniform']:.2f}" in last and f"begins at {loss['first']:.2f}" in last
    assert f"bends near {loss['frequencies']:.2f}" in last


def test_chapter_5_quotes_the_comparison_that_is_kept():
    """A table measured again, under a text that still tells of the old one; statistics told by hand and wrong."""
    text = CHAPTERS["5-is-it-better.md"]
    folder = ROOT / "benchmarks" / "results" / "comparisons" / "ideas"
    quoted = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith(("| ", "- "))]
    assert len(quoted) > 12 and [line for line in quoted if line not in text] == []
    rows = {row["arm"]: row for row in map(json.loads, (folder / "report.jsonl").read_text().splitlines())}
    base, qk = rows["base"]["values"], rows["qk-norm"]
    d = qk["difference"]
    flat = " ".join(text.replace("−", "-").split())
    said = ["{:.4f}, {:.4f} and {:.4f} with".format(*base.values())]
    said += ["{:.4f}, {:.4f} and {:.4f}. How".format(*(qk["values"][seed] - base[seed] for seed in base))]
    said += [
        f"$\\bar d = {d['mean']:.4f}$ and $s = {d['error']:.4f}$",
        f"of squared ReLU is {rows['relu2']['difference']['p']:.4f}",
    ]
    scatter = d["error"] * math.sqrt(3)
    said += [f"differences, {scatter:.4f}:"]
    for n in (2, 3, 5, 8):
        least = [report.smallest_shown(scatter / math.sqrt(n), n, k) for k in (1, 5)]
        said += ["| {} | {:.3f} | {:.3f} |".format(n, *least)]
    early, last = ([rows[arm]["curve"][1][i] for arm in ("base", "untied head")] for i in (1, -1))
    said += [f"ahead by {early[0] - early[1]:.3f} after {rows['base']['curve'][0][1]:,} tokens"]
    said += [f"behind by {last[1] - last[0]:.3f} at the end"]
    for arm in ("soft-cap", "qk-norm"):  # Welch's interval, without pairs
        unpaired = stats.ttest_ind(*(list(rows[a]["values"].values()) for a in (arm, "base")), equal_var=False)
        reach = np.ptp(unpaired.confidence_interval()) / 2
        said += [f"±{reach:.3f} to ±{(rows[arm]['difference']['high'] - rows[arm]['difference']['low']) / 2:.3f}"]
    folder = folder.with_name("optimizers")
    muon = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("- muon, lr=1e-2: ")]
    rows = {row["arm"]: row["mean"] for row in map(json.loads, (folder / "report.jsonl").read_text().splitlines())}
    ahead = [rows[f"adamw, lr={lr}"] - rows["muon, lr=1e-2"] for lr in ("1e-2", "4e-3")]
    said += [*muon, "by {:.2f}, and by {:.2f} of AdamW at 4e-3".format(*ahead)]
    assert len(muon) == 1 and [words for words in said if words not in flat] == []


# ---------------------------------------------------------------------------------------
# The figures.


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import figures

    return figures


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"block_size": 16, "vocab_size": 512, "valid_vocab_size": 512, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return spread(GPT(GPTConfig(**shape, dropout=0.0)))


def test_attention_shown_is_that_of_the_model(figures, model):
    """The weights, applied to v, must give what each Attention really put out."""
    got, made = [], []
    for block in model.h:
        block.attn.register_forward_hook(lambda module, args, y: got.append((module, args[0], y)))
    _, weights = figures.attention(model, torch.randint(512, (3, 16)))
    for (module, h, y), w in zip(got, weights, strict=True):
        v = module.c_attn(h).unflatten(-1, (3, 2, 8)).unbind(2)[2]
        made.append(module.c_proj(torch.einsum("bhqk,bkhd->bqhd", w, v).flatten(2)))
        torch.testing.assert_close(made[-1], y)
    assert torch.allclose(weights.sum(-1), torch.ones(())) and weights.triu(1).max() == 0


def test_means_by_distance(figures):
    """A matrix that holds the distance itself has the distance as its mean."""
    T = 8
    distance = (torch.arange(T)[:, None] - torch.arange(T)).float().expand(2, 3, 1, T, T)
    assert figures.by_distance_of(distance).tolist() == [[[0, 1, 2, 3]], [[0, 1, 2, 3]]]


def test_a_stretched_model_is_the_same_model_with_a_longer_table(figures, model):
    ids = torch.randint(512, (1, 16))
    with torch.no_grad():
        torch.testing.assert_close(figures.stretched(model, 64)(ids), model(ids))
        assert not torch.allclose(figures.stretched(model, 64, 0.25)(ids), model(ids), atol=1e-2)
    quarter = figures.stretched(model, 64, 0.25)
    torch.testing.assert_close(quarter.cos[::4], model.cos)  # position 4p counts as p
    torch.testing.assert_close(quarter.sin[::4], model.sin)


def test_losses_in_pieces_are_those_of_the_model(figures, model):
    """The same targets for every context: only what may be looked at changes."""
    x, y = torch.randint(512, (2, 3, 16)).unbind()
    whole = figures.token_losses(model, x, y, 16)
    half = figures.token_losses(model, x, y, 8)
    with torch.no_grad():
        assert whole.sum() == pytest.approx(float(model(x, y)), rel=1e-5)
        assert half[1, 8:].sum() == pytest.approx(float(model(x[1:2, 8:], y[1:2, 8:])), rel=1e-5)
    assert (abs(whole[:, :8] - half[:, :8]) < 1e-4).all() and (abs(whole[:, 8:] - half[:, 8:]) > 1e-3).any()


def test_missing_data_is_one_line(figures, capsys):
    assert run(lambda: figures.main(["--only", "context"])) == 2
    assert "--val_data_dir is missing" in capsys.readouterr().err


def test_every_figure_is_drawn_from_any_checkpoint(figures, model, tmp_path, corpus, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(figures, "WINDOWS", 2)
    monkeypatch.setattr(figures, "LONGER_WINDOWS", 3)
    monkeypatch.setattr(figures, "VECTORS", 10)
    monkeypatch.setattr(figures, "canvas", lambda height: figures.Figure((8, height), dpi=40))  # small, for speed
    optimizer = torch.optim.AdamW(model.parameters())
    tensors = checkpoint.snapshot(model, optimizer)
    model = GPT(GPTConfig(**vars(model.config) | {"block_size": 64}))
    checkpoint.write_checkpoint(tmp_path / "run", 1, model.config, tensors, {"step": 1}, byte_tokenizer)
    out = tmp_path / "out"
    data = str(Path(corpus).with_name("data_val"))
    flags = ["--checkpoint", str(tmp_path / "run"), "--val_data_dir", data, "--out_dir", str(out)]
    figures.main(flags)
    measured = {"decay.json", "attention.json", "context.json", "loss.json"}
    assert {p.name for p in out.iterdir()} == {f"{name}.png" for name in figures.FIGURES} | measured
    rows = json.loads((out / "context.json").read_text())["rows"]
    assert [r["context"] for r in rows if not r["interpolated"]] == [8 * 2**n for n in range(7)]
    assert all(r["perplexity"] == pytest.approx(math.exp(r["loss"]), rel=1e-2) for r in rows)
    config = GPTConfig(**vars(model.config) | {"block_size": 128, "rope_theta": 20_000.0})
    checkpoint.write_checkpoint(tmp_path / "further", 7, config, tensors, {"step": 7}, byte_tokenizer)
    both = ["--longer", str(tmp_path / "run"), str(tmp_path / "further")]
    figures.main([*flags, "--only", "longer", *both])
    longer = json.loads((out / "longer.json").read_text())
    readers = ["as trained at 64", "then 7 steps at 128, base 20,000"]
    assert [(r["reader"], r["context"]) for r in longer["rows"]] == [(n, c) for n in readers for c in (64, 128, 256)]
    assert longer["rows"][0]["loss_minus_trained"] == 0 != longer["rows"][3]["loss_minus_trained"]
    by_position = longer["loss_minus_trained_by_position"]["as trained at 64"]
    assert np.abs(by_position[: figures.BINS // 4]).max() < 1e-4 < np.abs(by_position[figures.BINS // 4 :]).max()
    assert all(str(tmp_path) not in p.read_text() for p in out.glob("*.json"))
