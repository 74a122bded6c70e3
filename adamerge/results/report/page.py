"""One file with everything in it: text, tables, figures, and the library that draws them."""

import base64
import gzip
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from adamerge import __version__
from adamerge.errors import InputError
from adamerge.results.report.blocks import Section
from adamerge.results.report.charts import Chart
from adamerge.system.files import atomic_path

_HERE = Path(__file__).parent


def write_page(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write a page, atomically.

    Raises:
        InputError: If a package of the extra ``report`` is missing.
        OSError: If the file cannot be written.
    """
    from adamerge.results.report.plotly_figures import figure

    charts = [block for section in sections for block in section.blocks if isinstance(block, Chart)]
    template = _template()
    text = template.render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        figures={chart.key: figure(chart) for chart in charts},
        version=__version__,
        css=_safe((_HERE / "page.css").read_text(encoding="utf-8")),
        javascript=_safe((_HERE / "page.js").read_text(encoding="utf-8")),
        plotly=_plotly() if charts else "",
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise _missing("jinja2") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["as_json"] = _as_json
    return environment.get_template("page.html")


@lru_cache(maxsize=1)
def _plotly() -> str:
    """Return plotly.js, compressed: 4.8 MB become 2."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise _missing("plotly") from error
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _missing(package: str) -> InputError:
    return InputError(f'A report needs the package {package}: pip install "adamerge[report]".')


def _safe(text: str) -> Any:
    """Mark a text of this package as one that needs no escaping."""
    import markupsafe

    return markupsafe.Markup(text)


def _finite(content: Any) -> Any:
    """Return figures with null for what is NaN or infinite, which JSON has not."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _as_json(content: Any) -> Any:
    """Return JSON that can end no script element and begin no comment."""
    text = json.dumps(_finite(content), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _safe(text)
