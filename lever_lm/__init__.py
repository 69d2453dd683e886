"""lever_lm: learn which demonstrations to show a frozen vision-language model before a knowledge question."""

__version__ = "0.1.0"
__all__ = ["Pick", "Retriever", "load_policy"]


def __getattr__(name: str):
    """What is imported from here, when it is: `import lever_lm` alone loads no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'lever_lm' has no attribute {name!r}")
    import importlib

    home = "selectors.pointer.checkpoint" if name == "load_policy" else "evaluation.retriever"
    return getattr(importlib.import_module(f"lever_lm.{home}"), name)
