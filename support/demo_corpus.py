"""The text of a small corpus that needs no network: what every CPython says about itself.

About 2 MB of English for people who program, the same for the same installation of Python: the language
reference that help() shows, and the standard library's docstrings. prepare_fineweb.py makes shards of it.
"""

import ast
import sysconfig
import warnings
from pathlib import Path

NOT_FOR_READERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
NOT_EVERYWHERE = {"distutils", "idlelib", "lib2to3"}  # some versions or systems lack them


def help_topics():
    """The parts of the language reference that help() shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems pack it separately
        return []
    return [topics[name].strip() for name in sorted(topics)]


def library_docstrings():
    """One text per module of the standard library: what help() would say of its public names."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py")):
        names = path.relative_to(root).with_suffix("").parts
        if (NOT_FOR_READERS | NOT_EVERYWHERE) & set(names) or any(map(is_private, names)):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # about old-fashioned escapes in other people's strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        name = ".".join(part for part in names if part != "__init__")
        texts.append("\n\n".join(docstrings(tree, name)))
    return [text for text in texts if text]


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def docstrings(node, name):
    """Headings and docstrings of a module, class or function and all public ones in it, in source order."""
    is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    if isinstance(node, (ast.Module, ast.ClassDef)) or is_function:
        text = ast.get_docstring(node)  # indentation removed, as inspect.cleandoc does
        if text:
            yield f"{name}({ast.unparse(node.args)})" if is_function else name
            yield text
    for child in ast.iter_child_nodes(node):
        inner = getattr(child, "name", None)
        if isinstance(child, ast.stmt) and not is_private(inner or ""):
            yield from docstrings(child, f"{name}.{inner}" if inner else name)
