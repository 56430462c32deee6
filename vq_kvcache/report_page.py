"""stub"""

from typing import Any


def page(report: dict[str, Any]) -> str:
    """stub"""
    return "x"
