"""What each key of the config means."""

import ast
import dataclasses

from lever_lm.config.schema import Config
from lever_lm.utils.paths import PACKAGE


def key_docs() -> dict[str, str]:
    """Dotted key, or section, → what config.py says of it: the comment of a field, the docstring of a section."""
    source = (PACKAGE / "config" / "schema.py").read_text(encoding="utf-8")
    lines, sections = source.splitlines(), {one.type.__name__: one.name for one in dataclasses.fields(Config)}
    docs = {}
    for node in ast.parse(source).body:
        name = getattr(node, "name", None)
        if name in sections:
            docs[sections[name]] = ast.get_docstring(node)  # `python -OO` leaves __doc__ out
        if name in sections or name == "Config":
            prefix = f"{sections[name]}." if name in sections else ""
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and (said := lines[item.lineno - 1].partition("  # ")[2]):
                    docs[f"{prefix}{item.target.id}"] = said
    return docs
