"""Values and texts of any kind, drawn by hypothesis."""

from hypothesis import strategies as st

ANYTHING = st.text(st.characters(), max_size=60)  # surrogates and controls among them
SOUND = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=20)  # PyYAML loses \x85
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    PLAIN | SOUND, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SOUND, inner, max_size=4), max_leaves=12
)
