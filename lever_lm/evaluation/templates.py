"""The templates of the report page and the model card, filled."""

from collections.abc import Callable

from lever_lm.utils.terminal import printable


def render(name: str, filters: dict[str, Callable], /, **values) -> str:
    """Return a template of lever_lm/templates, filled. In HTML every text is escaped, and no character steers."""
    import jinja2

    html = ".html" in name
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lever_lm"),
        autoescape=html,
        finalize=(lambda value: printable(value) if type(value) is str else value) if html else None,  # not of Markup
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(name).render(**values)
