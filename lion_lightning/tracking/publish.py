"""A comparison as a W&B report, and a saved workspace for its project.

Needs wandb-workspaces: `pip install 'lion-lightning[wandb-report]'`.
"""

from typing import Any

from lion_lightning.tracking.compare import Comparison
from lion_lightning.tracking.report import captions, cost_rows, markdown_table, result_rows, unfinished_lines, verdict
from lion_lightning.tracking.runs import AXES, STEP
from lion_lightning.tracking.variants import Incomparable

BY_OPTIMIZER = "optim.name"
# The workspace: a section for each of these, in this order, with the metrics that the runs have.
SECTIONS = {
    "Result": ("val/",),
    "Training": ("train/", "lr-"),
    "Guard": ("guard/", "lion/"),
    "Cost": ("perf/", "data/"),
}


def publish_report(comparison: Comparison, project: str | None) -> str:
    """Save the report to `entity/project` and return its address.

    Raises:
        Incomparable: no project to publish to.
    """
    report = build_report(comparison, *_entity_and_project(project))
    report.save()
    return f"W&B report: {report.url}"


def publish_workspace(comparison: Comparison, project: str | None) -> str:
    """Save the workspace to `entity/project` and return its address."""
    workspace = build_workspace(comparison, *_entity_and_project(project))
    workspace.save()
    return f"W&B workspace: {workspace.url}"


def build_report(comparison: Comparison, entity: str, project: str) -> Any:
    """Verdict, tables and curves of one group, its runs put together by optimizer; nothing is sent."""
    import wandb_workspaces.reports.v2 as wr

    result, cost = captions(comparison)
    x_axes = [STEP, *(name for axis in comparison.axes if (name := AXES[axis]))]
    panels = [_line_plot(wr, comparison.goal.metric, x) for x in x_axes] + [_line_plot(wr, "train/loss", STEP)]
    runset = wr.Runset(
        entity=entity,
        project=project,
        name=comparison.group or project,
        filters=_filters(comparison),
        groupby=["config.optim.value.name"],  # where W&B keeps `optim.name`; workspaces translate, reports do not
    )
    notes: list[Any] = [*unfinished_lines(comparison), *comparison.remarks]
    return wr.Report(
        entity=entity,
        project=project,
        title=comparison.group or comparison.goal.metric,
        description=verdict(comparison),
        blocks=[
            wr.MarkdownBlock(text=verdict(comparison)),
            wr.MarkdownBlock(text=f"{markdown_table(*result_rows(comparison))}\n\n{result}."),
            wr.PanelGrid(runsets=[runset], panels=panels),
            wr.MarkdownBlock(text=f"{markdown_table(*cost_rows(comparison))}\n\n{cost}."),
            *([wr.UnorderedList(items=notes)] if notes else []),
        ],
    )


def build_workspace(comparison: Comparison, entity: str, project: str) -> Any:
    """A section for results, training, guard and cost, with the metrics that the runs have; nothing is sent."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    logged = sorted(frozenset().union(*(run.metrics for run in comparison.runs)))
    sections = []
    for name, prefixes in SECTIONS.items():
        metrics = [metric for metric in logged if metric.startswith(prefixes) and metric not in AXES.values()]
        panels = [_line_plot(wr, metric, STEP) for metric in metrics]
        if panels:
            sections.append(ws.Section(name=name, panels=panels, is_open=name in ("Result", "Training")))
    return ws.Workspace(
        entity=entity,
        project=project,
        name="lion_lightning",
        sections=sections,
        runset_settings=ws.RunsetSettings(groupby=[ws.Config(BY_OPTIMIZER)]),
    )


def _line_plot(wr: Any, metric: str, x: str) -> Any:
    return wr.LinePlot(
        title=metric, x=x, y=[metric], groupby_aggfunc="mean", groupby_rangefunc="stddev", smoothing_factor=0
    )


def _filters(comparison: Comparison) -> str:
    groups = [group for group in comparison.group.split(", ") if group]
    return f"Metric('Group') in {groups!r}" if groups else ""


def _entity_and_project(project: str | None) -> tuple[str, str]:
    entity, slash, name = (project or "").partition("/")
    if not (entity and slash and name):
        raise Incomparable(f"a W&B report needs --wandb ENTITY/PROJECT to be published to, got {project!r}")
    return entity, name
