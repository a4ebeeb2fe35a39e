"""Reports: a Plan and its Timeline as one HTML file that opens offline. Importing this loads no plotly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reports.page import page_html, write_report

__all__ = ["page_html", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import reports.page

    return getattr(reports.page, name)


def __dir__() -> list[str]:
    return sorted(__all__)
