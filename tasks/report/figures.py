"""Which figures a report holds, in the order of its page."""

from tasks.report.cost_figures import COST_PLANS
from tasks.report.figure import Figure, LeftOut, Summary, drawn, left_out
from tasks.report.score_figures import SCORE_PLANS, TASK_PLANS
from tasks.report.selection_figures import SELECTION_PLANS
from tasks.report.sweep_figures import SWEEP_PLANS

RUN_PLANS = (SCORE_PLANS[0], *SELECTION_PLANS, *SCORE_PLANS[1:], *COST_PLANS, *TASK_PLANS)


def run_figures(summary: Summary) -> list[Figure]:
    """Return the figures of a run whose data the summary holds."""
    return drawn(RUN_PLANS, summary)


def run_left_out(summary: Summary) -> list[LeftOut]:
    """Return the figures of a run that cannot be drawn, and why."""
    return left_out(RUN_PLANS, summary)


def sweep_figures(summary: Summary) -> list[Figure]:
    """Return the figures of a sweep whose data the summary holds."""
    return drawn(SWEEP_PLANS, summary)


def sweep_left_out(summary: Summary) -> list[LeftOut]:
    """Return the figures of a sweep that cannot be drawn, and why."""
    return left_out(SWEEP_PLANS, summary)
