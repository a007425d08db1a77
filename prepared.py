"""The two folders of a preparation: what is there already, whether its recipe is the same, and who writes there.

The recipe is the source, the flags and the tokenizer. An unfinished preparation has it in pieces/plan.json, a finished
one in the manifest.json of each folder. So another recipe is refused before anything is written.
"""

import re
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from data_processing_fineweb import MANIFEST, find_shards
from support.cli import UserError
from support.files import locked, read_json, write_json
from tokenizer import load_tokenizer

DATASET, SUBSET = "HuggingFaceFW/fineweb-edu", "sample-10BT"  # what is prepared where nothing is named
PLAN, PICTURE, ANEW = "pieces/plan.json", "document_lengths.png", "begin anew with --restart"
OURS = re.compile(  # what this script writes into its two folders
    rf"fineweb_(train|val)_\d{{6,}}(_\d{{6,}})?\.npy|{MANIFEST}|{PICTURE}|pieces/(\d{{6,}}|plan)\.json"
    r"|tokenizer/tokenizer(_config)?\.json|(pieces/|tokenizer/)?\.[^/]+\.(tmp|unfinished)"
)


def describe_tokenizer(tokenizer) -> dict:
    facts = {key: getattr(tokenizer, key) for key in ("name", "vocab_size", "eot_token")}
    return facts | {"fingerprint": tokenizer.fingerprint()}


def differences(there, now, name=""):
    """The leaves in which two nested dicts differ, as text; a name (of a tokenizer) decides nothing."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in (there | now).keys() - {"name"}:
            yield from differences(there.get(key), now.get(key), f"{name} {key}")
    elif there != now:
        yield f"{name.strip()} there {there!r}, now {now!r}"


def refuse_other(directory, what, there, recipe):
    """UserError if the recipe there differs in anything."""
    source = there.get("source")
    if isinstance(source, dict) and source.get("dataset", "") is None:  # older manifests do not name the default
        there = there | {"source": source | {"dataset": DATASET, "subset": source.get("subset") or SUBSET}}
    found = sorted(set(differences({key: there.get(key) for key in recipe}, recipe)))
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(f"{directory}: {what}: {'; '.join(found[:5])}{more}. Name another --out_dir, or {ANEW}")


def already_prepared(directories, recipe) -> dict | None:
    """The manifests if both splits are complete, else None. UserError if one has another recipe. Nothing is written."""
    manifests = {}
    for split, directory in directories.items():
        if (directory / MANIFEST).exists():
            manifests[split] = find_shards(directory, split)[1]
            refuse_other(directory, "already holds shards of another recipe", manifests[split], recipe)
            refuse_damaged(directory / MANIFEST, manifests[split])
    return manifests if len(manifests) == len(directories) else None


def refuse_damaged(path, manifest):
    """UserError unless a manifest counts, as `finish` left it, what `summarize` tells."""
    skipped = manifest.get("skipped")
    counts = [manifest.get(key) for key in ("documents", "tokens", "text_bytes", "replaced_surrogates")]
    counts += skipped.values() if isinstance(skipped, dict) else [None]
    if not all(type(n) is int and n >= 0 for n in counts) or not manifest["tokens"]:
        raise UserError(f"{path}: its counts of documents and tokens are damaged; delete that folder, start again")


def read_plan(directories, recipe) -> dict | None:
    """The plan that an unfinished preparation of this recipe left; None if there is nothing to go on with. UserError
    if it was begun with another recipe, or its tokenizer was changed since."""
    path, kept = directories["train"] / PLAN, directories["train"] / "tokenizer"
    if not path.exists():
        return None
    plan = read_json(path)
    if any(path.parent.glob("[0-9]*.json")):
        refuse_other(directories["train"], "was begun with another recipe", plan, recipe)
    elif any(differences({key: plan.get(key) for key in recipe}, recipe)):
        return None  # and no piece is made yet that could be lost
    if any(differences(plan.get("tokenizer"), describe_tokenizer(load_tokenizer(kept)))):
        raise UserError(f"{kept}: changed since this preparation began; {ANEW}")
    return plan


def write_plan(directories, plan, tokenizer):
    """Empties the folders, saves the tokenizer in both, and last the plan."""
    remove_files(directories, lambda name: True)
    for directory in directories.values():
        (directory / "tokenizer").mkdir(parents=True, exist_ok=True)
        tokenizer.save(directory / "tokenizer")
    path = directories["train"] / PLAN
    path.parent.mkdir(exist_ok=True)
    write_json(path, plan)


@contextmanager
def only_writer(directories, seconds=0):
    """Context in which this process alone writes to the folders. UserError if another does, or if files of others are
    there."""
    for directory in directories.values():
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory}: a file; name another --out_dir")
        directory.mkdir(parents=True, exist_ok=True)
    taken = f"{directories['train']}: another process is preparing it"
    # a file that is open for writing: NFS keeps the lock of a folder within one host, and so is none between hosts
    with open(directories["train"] / ".lock", "a") as f, locked(f, lambda: taken, seconds):
        refuse_foreign(directories)
        yield


def files_in(directories) -> dict[Path, str]:
    """All files in both folders, and their names within them."""
    return {p: p.relative_to(d).as_posix() for d in directories.values() for p in sorted(d.rglob("*")) if p.is_file()}


def refuse_foreign(directories):
    """UserError if something is there that this script did not write, and so must not delete. Hidden files may be
    there: systems write them unasked, such as .DS_Store and .nfs0001."""
    foreign = [p for p, name in files_in(directories).items() if not OURS.fullmatch(name) and "/." not in f"/{name}"]
    if foreign:
        there = ", ".join(map(str, foreign[:5]))
        raise UserError(f"{there}: this script did not write that, and does not mix its files with others; name "
                        "another --out_dir")  # fmt: skip


def remove_files(directories, which):
    """Removes the files of ours whose names `which` accepts; manifests and facts before the shards that they count."""
    found = [(path, name) for path, name in files_in(directories).items() if OURS.fullmatch(name) and which(name)]
    for path, _ in sorted(found, key=lambda pair: (pair[1] != MANIFEST, not pair[1].startswith("pieces/"))):
        path.unlink()


def forget_pieces(directories):
    """Removes the facts of the pieces, which the manifests hold now."""
    shutil.rmtree(directories["train"] / "pieces", ignore_errors=True)  # or it is a medium that nobody can write to


def refuse_empty(c, manifests):
    train, val = manifests["train"]["documents"], manifests["val"]["documents"]
    skipped = Counter(manifests["train"]["skipped"]) + Counter(manifests["val"]["skipped"])
    why = f" (skipped: {', '.join(f'{n:,} {reason}' for reason, n in skipped.items())})" if skipped else ""
    if not val and c.val_files:
        raise UserError(f"--val_files hold no document to take{why}")
    if not train + val:
        raise UserError(f"the source holds no document to take{why}")
    if not val:
        raise UserError(f"none of the {train:,} documents went to validation, and their last parts are empty; raise "
                        f"--val_share, now {c.val_share:g}, or name validation files with --val_files")  # fmt: skip
    if not train:
        raise UserError(f"nothing is left to train on: {val:,} documents went to validation{why}; lower --val_share")
