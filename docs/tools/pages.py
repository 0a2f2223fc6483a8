"""Pages of the site that are made from other files: one for each method, policy and bridge, and those that lie beside docs/.

Methods are read without importing them: the docstring of a file is its method's card.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "src" / "foveate"
BESIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md", "changelog.md": "CHANGELOG.md"}
"""Pages by the files of the repository that they are."""
FOLDERS = ("reducers", "cache_policies", "bridges")
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_config(config: Any) -> Any:
    """Puts the pages of methods and bridges behind the overview of them all."""
    section = next(entry["Methods"] for entry in config["nav"] if "Methods" in entry)
    for folder in FOLDERS:
        section.append({folder.replace("_", " ").capitalize(): sorted(f"{folder}/{found[0]}.md" for _, found in methods(folder))})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, and whatever else of the repository a page links to."""
    for page, name in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for folder in FOLDERS:
        for path, (name, *rest) in methods(folder):
            files.append(File.generated(config, f"{folder}/{name}.md", content=card(folder, path.stem, *rest)))
    pages = [(file.src_uri, ROOT / BESIDE.get(file.src_uri, f"docs/{file.src_uri}"), file) for file in files.documentation_pages()]
    for _, path, file in pages:
        for target in linked(path, file.content_string):
            if files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links between files of the repository into links between pages."""
    here = page.file.src_uri
    path = ROOT / BESIDE.get(here, f"docs/{here}") if not here.startswith("benchmarks/") else ROOT / here

    def moved(match: re.Match[str]) -> str:
        target = place(path, match[1])
        if target is None:
            return match[0]
        return posixpath.relpath(target, posixpath.dirname(here) or ".") + (match[2] or "")

    return re.sub(r"\[([^\]]+)\]\(examples\)", r"\1", _LINK.sub(moved, markdown))


def place(path: Path, link: str) -> str | None:
    """Where on the site a link of a file of the repository leads; None for other addresses and for what is no file."""
    if "://" in link or link.startswith("mailto:"):
        return None
    target = (path.parent / link).resolve()
    if not target.is_file() or not target.is_relative_to(ROOT):
        return None
    name = target.relative_to(ROOT).as_posix()
    pages = {source: page for page, source in BESIDE.items()}
    return pages.get(name, name.removeprefix("docs/"))


def linked(path: Path, text: str) -> set[str]:
    """Files outside of docs/ that a page links to, by their places on the site."""
    found = (place(path, match[1]) for match in _LINK.finditer(text))
    return {target for target in found if target is not None and (ROOT / target).is_file()}


def methods(folder: str) -> list[tuple[Path, tuple[str, str, str]]]:
    """The files of a folder that hold a method, each with what `method` finds there."""
    found = ((path, method(path)) for path in sorted((SOURCE / folder).glob("*.py")))
    return [(path, one) for path, one in found if one is not None]


def method(path: Path) -> tuple[str, str, str] | None:
    """Name, class and docstring of the file of a method; None for a file without one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        for line in node.body if isinstance(node, ast.ClassDef) else ():
            names = [line.target] if isinstance(line, ast.AnnAssign) else line.targets if isinstance(line, ast.Assign) else []
            if any(isinstance(name, ast.Name) and name.id in ("name", "kind") for name in names) and isinstance(line.value, ast.Constant):
                return str(line.value.value), node.name, ast.get_docstring(tree) or ""
    return None


def card(folder: str, module: str, name: str, docstring: str) -> str:
    """The page of a method: its card, then its options."""
    first, _, rest = docstring.partition("\n\n")
    rest = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", rest)
    first = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", " ".join(first.split()))
    return f"# {name}\n\n{first}\n\n{rest}\n\n## Options\n\n::: foveate.{folder}.{module}.{name}\n"
