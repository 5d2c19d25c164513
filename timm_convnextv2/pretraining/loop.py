"""`PretrainRun`: what pretraining adds to the loop in `runs.loop`: batches of masked images, measures, exports."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint import export_encoder
from ..console import invocation
from ..data import Pixels
from ..models import FCMAE
from ..report.html import write_report
from ..report.images import save_loss_curve
from ..report.kinds import verdict
from ..report.next_steps import next_commands
from ..report.run import read_run
from ..runs.errors import NotFiniteError, attempt
from ..runs.loop import Run
from ..runs.trainer import Bad
from .batches import Batches
from .measures import Best, Measure, measure_epoch
from .messages import how_made, how_measured, outcome
from .replay import write_record

# What pretraining writes into its folder beside `folder.WRITTEN`
WRITTEN = ("loss.png", "encoder", "encoder-best", "reconstructions", "collapse.csv", "probe.json", "neighbours")
WRITTEN += ("bad-step-*",)


@dataclass(kw_only=True)
class PretrainRun(Run):
    """A run of pretraining."""

    data: Batches
    measures: list[Measure] = field(default_factory=list)  # run between epochs, on rank 0
    best: Best | None = None  # the best value so far of the measure that --keep-best names

    product = "encoder"
    remedy = "a lower --lr-base; or skip such updates: --max-bad-steps N"

    def done(self) -> str:
        """What was learned, where the encoder is, the commands that come next, and what the probe found."""
        result = f"{verdict(read_run(self.folder.path)).text}\n" if self.world.primary else ""
        lines = super().done(), next_commands(self.settings, self.folder.path, self.plan.epochs)
        return result + "\n".join(filter(None, (*lines, outcome(self.folder.path))))

    def batches(self, epoch: int, start_batch: int) -> Iterator:
        """The batches `(images, masks, bad)` of an epoch."""
        return self.data.iterate(epoch, start_batch)

    def counts(self) -> dict[str, float]:
        """The images that could not be decoded so far."""
        return {"bad_images": len(self.progress.bad_images)}

    def named(self, bad: Bad) -> list[tuple[str, str]]:
        """Names of undecodable images instead of their indices."""
        return self.data.named(bad)

    def measure(self, epoch: int) -> dict[str, float | str]:
        """Runs the measures that are due, and keeps the best encoder."""
        if not self.world.primary:
            return {}
        encoder, note = self.trainer.averaged.encoder, self.bar.note
        measured = measure_epoch(self.measures, epoch, self.plan.epochs, encoder, note)
        if self.best is not None and self.best.improves(measured):
            act = partial(self.export_to, self.folder.path / "encoder-best", self.trainer.averaged)
            attempt("the export of the best encoder", act, note)
        return measured

    def export(self) -> str:
        """Exports the encoder, and draws the loss curve."""
        average = self.trainer.state().state_dict_ema
        act = partial(self.export_to, self.folder.path / self.product, self.trainer.model, average)
        failed = attempt("the export of the encoder", act, self.bar.note)
        if self.folder.summary.exists():
            draw = partial(save_loss_curve, self.folder.summary, self.folder.path / "loss.png")
            attempt("the loss curve", draw, self.bar.note)
        return failed

    def export_to(self, folder: Path, model: FCMAE, state_dict: dict[str, Any] | None = None) -> None:
        """Exports the encoder of a model, with how it was made; with the weights in `state_dict` if there is one."""
        of = self.settings
        info = {**how_made(of, self.progress, self.plan), **how_measured(self.folder.path)}
        about = dict(mean=of["mean"], std=of["std"], license=of["license"] or None, pixels=Pixels.from_record(of))
        export_encoder(model, folder, state_dict=state_dict, info=info, **about)

    def report(self) -> None:
        """Writes report.html."""
        write_report([self.folder.path], self.folder.path / "report.html")

    def record_bad_step(self, error: NotFiniteError, weights: bool) -> str:
        """Writes `bad-step-*.json`, from which --replay repeats the forward of the update."""
        if not self.world.primary:
            return ""
        epoch, update = divmod(error.number, self.plan.updates_per_epoch)
        accum, images, name_of = self.trainer.learning.grad_accum_steps, [], self.data.name_of
        for rank in range(self.world.size):
            indices = self.data.indices(epoch, update * accum, accum, rank, self.world.size)
            images.append(None if indices is None or name_of is None else [(i, name_of(i)) for i in indices])
        model = self.trainer.model if weights else None
        try:
            path = write_record(self.folder.path, error, self.settings, (epoch, update), images, model)
        except OSError as e:
            return f"the record that repeats it could not be written ({e})"
        return str(path)

    def repeat(self, record: str) -> str:
        """The command that repeats the forward of an update."""
        command = shlex.join([*invocation("pretrain"), "--replay", record])
        return f" To find where it begins:\n  {command}"
