"""A comparison as a W&B report. Needs wandb-workspaces: `pip install 'lion-lightning[wandb-report]'`."""

from typing import Any

from lion_lightning.tracking.compare import Comparison, Incomparable
from lion_lightning.tracking.report import markdown_table, notes, tables, verdict
from lion_lightning.tracking.runs import AXES, STEP


def publish_report(comparison: Comparison, project: str | None) -> str:
    """Publish verdict, tables and curves of one group, with its runs grouped by optimizer.

    Args:
        comparison: What is reported.
        project: `entity/project`.

    Returns:
        A line with the address of the report.

    Raises:
        Incomparable: `project` is not of that form.
    """
    entity, _, name = (project or "").partition("/")
    if not (entity and name):
        raise Incomparable(f"a W&B report needs --wandb ENTITY/PROJECT to be published to, got {project!r}")
    import wandb_workspaces.reports.v2 as wr

    x_axes = [STEP, *(metric for axis in comparison.axes if (metric := AXES[axis]))]
    groups = [group for group in comparison.group.split(", ") if group]
    runset = wr.Runset(
        entity=entity,
        project=name,
        name=comparison.group or name,
        filters=f"Metric('Group') in {groups!r}" if groups else "",
        groupby=["config.optim.value.name"],  # where W&B keeps `optim.name`; workspaces translate, reports do not
    )
    result, cost = (
        wr.MarkdownBlock(text=f"{markdown_table(*rows)}\n\n{caption}") for caption, rows in tables(comparison)
    )
    panels = [*(_line_plot(comparison.goal.metric, x) for x in x_axes), _line_plot("train/loss", STEP)]
    lines: list[Any] = [*notes(comparison)]
    report = wr.Report(
        entity=entity,
        project=name,
        title=comparison.group or comparison.goal.metric,
        description=verdict(comparison),
        blocks=[
            wr.MarkdownBlock(text=verdict(comparison)),
            result,
            wr.PanelGrid(runsets=[runset], panels=panels),
            cost,
            *([wr.UnorderedList(items=lines)] if lines else []),
        ],
    )
    report.save()
    return f"W&B report: {report.url}"


def _line_plot(metric: str, x: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(
        title=metric, x=x, y=[metric], groupby_aggfunc="mean", groupby_rangefunc="stddev", smoothing_factor=0
    )
