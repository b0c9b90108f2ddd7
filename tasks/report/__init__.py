"""The report of a run or a sweep: its figures, and one self-contained HTML page."""

from tasks.report.figure import Figure, LeftOut, Table
from tasks.report.figures import run_figures, run_left_out, sweep_figures, sweep_left_out
from tasks.report.page import run_page, sweep_page

__all__ = [
    "Figure",
    "LeftOut",
    "Table",
    "run_figures",
    "run_left_out",
    "run_page",
    "sweep_figures",
    "sweep_left_out",
    "sweep_page",
]
