"""The templates of the report page, its charts and the model card, filled."""

from collections.abc import Callable
from functools import cache

from lever_lm.utils.terminal import printable


def render(name: str, filters: dict[str, Callable], /, **values) -> str:
    """Return a template of lever_lm/templates, filled. In markup every text is escaped, and no character steers."""
    environment = _environment(".md" not in name)
    environment.filters |= filters
    return environment.get_template(name).render(**values)


@cache
def _environment(markup: bool):
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("lever_lm"),
        autoescape=markup,
        finalize=(lambda value: printable(value) if type(value) is str else value) if markup else None,  # not of Markup
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
