"""Several models on the same labelled images, compared with baselines that need no model or no training."""

import csv
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import check_limits
from ..console import count, say
from ..data import Pixels
from ..data.formats.files import printable
from ..data.labelled import check_place
from ..data.measure.inspection import perceptual_hash
from ..files import claim_folder, write_json
from ..runs.device import check_device
from ..runs.progress import ImageProgress
from .baselines import SHORTCUTS, hashes, near_duplicates, plain_baselines
from .budgets import budget_sizes, over_budgets
from .config import NEIGHBOURS, EvaluateConfig, Extraction, Scoring, Splitting
from .encoder import Encoder, open_encoder
from .extract import EXTRACTION, SCORING, choose_rows, extract_many, image_batches
from .figures import save_budgets, save_measures
from .labelled import Labelled, open_labelled
from .linear import Estimate, estimate, linear_probe, resampled, ridge
from .neighbours import capped, knn_scores
from .rank import rankme
from .verdict import mean_interval

FILES = ("evaluation.json", "evaluation.png")
BUDGET_FILES = ("budgets.csv", "budgets.png")
SHUFFLES = 5  # of the control
SHORTCUT = "warning: a shortcut"


def resampled_features(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, num_classes: int,
    scoring: Scoring = SCORING, device: str | torch.device = "cpu", groups: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The measures of `measure_features` except the rank, as values on all test images and on resamples.

    See `resampled`, also for the `groups` of the test images: values of several models on the same images give paired
    differences.
    """
    options: dict[str, Any] = {"num_classes": num_classes, "seed": scoring.seed}
    near = train.to(device), train_labels, test.to(device), scoring.k, scoring.temperature
    scores = {f"knn_{k}": votes for k, votes in knn_scores(*near, num_classes=num_classes).items()}
    scores["ridge"] = ridge(train, train_labels, test, **options)
    if scoring.probe:
        scores["probe"] = linear_probe(train, train_labels, test, device=device, **options)
    draws: dict[str, Any] = {"draws": scoring.draws, "seed": scoring.seed, "groups": groups}
    return {name: resampled(value, test_labels, **draws) for name, value in scores.items()}


def measure_features(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, **options: Any
) -> dict[str, Estimate]:
    """kNN, ridge, linear probe and rank of frozen features; `resampled_features` has the options.

    Features are `[N, D]`, labels int64 `[N]`, or 0 and 1 `[N, num_classes]` if images have several. kNN and the probe
    run on `device`. Returns `knn_10`, ... (`k` capped at N), `ridge`, `probe` and `rank`: accuracy 0 to 1, or mean
    average precision if images have several labels, and the `rankme` of the test features.
    """
    values, rank = resampled_features(train, train_labels, test, test_labels, **options), rankme(test)
    return {**{name: estimate(value) for name, value in values.items()}, "rank": Estimate(rank, rank, rank)}


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The results of `evaluate_models`, which also go to the folder --output if there is one."""
    files = FILES + (BUDGET_FILES if config.scoring.label_budgets else ())
    if config.data_dir != "demo":
        check_place(config.data_dir)
    folder = None if config.output is None else claim_folder(config.output, files, overwrite=config.overwrite)
    found = evaluate_models(
        config.models, config.data_dir, config.extraction, config.scoring, split=config.split,
        baselines=config.baselines, progress=True,
    )  # fmt: skip
    if folder is not None:
        write_json(folder / FILES[0], found, indent=2)
        save_measures(found, folder / FILES[1])
        if config.scoring.label_budgets:
            write_budgets(found, folder / BUDGET_FILES[0])
            save_budgets(found, folder / BUDGET_FILES[1])
    return found


def write_budgets(found: Mapping[str, Any], path: Path) -> None:
    """Writes the `budgets` of the results as a CSV, one row per model, number of images and measure."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["model", "images", "measure", "value", "low", "high"])
        for result in found["results"]:
            for budget in result.get("budgets", ()):
                for key, band in budget["measures"].items():
                    rows.writerow([result["model"], budget["images"], key, *(round(v, 5) for v in band.values())])


def evaluate_models(
    models: Sequence[str], data_dir: str | os.PathLike, extraction: Extraction = EXTRACTION,
    scoring: Scoring = SCORING, *, split: Splitting | None = None, baselines: bool = True, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measures the frozen features of each model, see `open_encoder`, on the same images, see `open_labelled`.

    `baselines` adds those of `plain_baselines`, the mean over several seeds of the first model's architecture with
    random weights, and as a control the first model with shuffled labels of the training images, see `over_shuffles`.
    Returns JSON values: `data`, `settings`, `notes` (sentences) and `results`, a list with `model`, `measures` (by
    name, `value`, `low` and `high`, see `measure_features`), `budgets` if `scoring` has some (see `over_budgets`), and
    `preprocessing`. Baselines have `baseline: true`; models have `images_per_second`, `against` (paired differences to
    the baselines, by measure, with `value`, `low` and `high` in points) and `verdict`, sentences.
    """
    if not models:
        raise ValueError("There are no models to evaluate.")
    split = split or Splitting()
    check_limits(extraction)
    note = partial(say, error=True) if progress else lambda line: None
    for device in extraction.devices:
        check_device(device)
    capped(scoring.k, 1)  # refuses k < 1 before any work

    @cache
    def labelled(in_chans: int, pixels: Pixels) -> Labelled:
        how: dict[str, Any] = {**asdict(split), "seed": scoring.seed}
        return open_labelled(data_dir, in_chans=in_chans, pixels=pixels, **how)

    encoders = [open_encoder(name, extraction.img_size, extraction.nodata, "cpu") for name in models]
    rows_of = choose_rows([encoder.model for encoder in encoders], extraction.all_stages)
    data = [labelled(encoder.in_chans, encoder.pixels) for encoder in encoders][0]
    groups = None if data.test.groups is None else int(data.test.groups.max()) + 1
    if groups == 1:
        raise ValueError(
            "The test images are of one group, which gives no interval; expected two groups or more. Raise "
            "--validation-share, or change --seed."
        )
    sizes = budget_sizes(scoring.label_budgets, data.train.labels)
    warned = [encoder.scale_warning(labelled(encoder.in_chans, encoder.pixels).train.source) for encoder in encoders]
    for line in [*data.describe(data_dir), *filter(None, warned)]:
        note(line)
    k = capped(scoring.k, len(data.train.labels))
    if max(scoring.k) > k[-1]:
        asked = f" (asked for {max(scoring.k)})" if tuple(scoring.k) != NEIGHBOURS else ""
        note(f"kNN: at most {k[-1]} neighbours, as many as there are training images{asked}")
    values: dict[str, dict[str, Tensor]] = {}  # resampled measures by model

    def extract(name: str, encoder: Encoder, columns: Sequence[Any]) -> tuple[list[Tensor], list[Tensor], float]:
        """Rows of the training and the test images by `columns`, networks or functions; and images per second."""
        parts = labelled(encoder.in_chans, encoder.pixels)[1:3]
        total = sum(len(part.labels) for part in parts)
        note(f"{name}: features of {total} images")
        start, how = time.perf_counter(), (encoder.transform, extraction.batch_size, extraction.workers)
        with closing(ImageProgress(total, enabled=progress)) as bar:
            train, test = (
                extract_many(
                    columns, image_batches(part.source, *how), devices=extraction.devices, amp=extraction.amp,
                    rows_of=rows_of, progress=bar.update,
                )
                for part in parts
            )  # fmt: skip
        return train, test, total / (time.perf_counter() - start)

    def score(
        name: str, rows: Sequence[tuple[Tensor, Tensor]], labels: Tensor, encoder: Encoder, more: Sequence[Tensor] = ()
    ) -> dict[str, Any]:
        """The entry of a model in `results`; measures are means over `rows`, features of one or of several seeds.

        Its budgets are means over `labels` and `more` orders of them, for which no probe is trained.
        """
        how: dict[str, Any] = {"num_classes": len(data.classes), "device": extraction.devices[0]}
        try:
            each = [
                resampled_features(
                    train, labels, test, data.test.labels, groups=data.test.groups, scoring=scoring, **how
                )
                for train, test in rows
            ]
            rank = sum(rankme(test) for _, test in rows) / len(rows)
            orders = [(labels, scoring), *((order, replace(scoring, probe=False)) for order in more)]
            curves = [
                over_budgets(train, order, test, data.test.labels, sizes, scoring=by, **how)
                for train, test in rows
                for order, by in orders
            ]
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from e
        values[name] = {key: torch.stack([one[key] for one in each]).mean(0) for key in each[0]}
        found = {key: estimate(value) for key, value in values[name].items()} | {"rank": Estimate(rank, rank, rank)}
        entry = {
            "model": name, "measures": {key: value._asdict() for key, value in found.items()},
            "features": rows[0][0].shape[1],
            "preprocessing": {**encoder.settings, "pixels": encoder.pixels.record()},
        }  # fmt: skip
        if len(rows) > 1:
            entry["seeds"] = {key: [float(one[key][0]) for one in each] for key in each[0]}
        return entry | ({"budgets": mean_curve(curves)} if sizes else {})

    results: list[dict[str, Any]] = []
    if baselines:
        base, labels = encoders[0], data.train.labels
        plain = plain_baselines(data.train.source, base.transform)
        seeds = range(scoring.seed, scoring.seed + scoring.random_seeds)
        columns: list[Any] = [*plain.values(), *map(base.with_random_weights, seeds)]
        grouped = split.groups or split.group_by
        near = None if grouped else perceptual_hash()
        if not grouped and near is None:
            note("Not searching for near duplicates across the split: run `pip install imagehash`.")
        rows = [*zip(*extract("baselines", base, columns + ([partial(hashes, near)] if near else []))[:2], strict=True)]
        if near:
            alike = near_duplicates(*rows.pop())
            if alike:
                name = printable(data.test.source.name(alike[0]))
                note(
                    f"warning: {len(alike)} of {len(data.test.labels)} test images look like a training image, such as "
                    f"{name}. If they show one patient, slide or video: --groups or --group-by."
                )
        results += [score(name, [row], labels, base) for name, row in zip(plain, rows, strict=False)]
        architecture = getattr(base.model, "pretrained_cfg", {}).get("architecture", type(base.model).__name__)
        results.append(score(f"{architecture}, random weights", rows[len(plain) :], labels, base))
    compared = list(values)
    for i, (name, encoder) in enumerate(zip(models, encoders, strict=True)):
        train, test, rate = extract(name, encoder, [encoder.model])
        rows = [(train[0], test[0])]
        if baselines and i == 0:  # the control takes the features of the first model
            shuffled = shuffles(data.train.labels, scoring.seed)
            control = score(f"{name}, shuffled labels", rows, shuffled[0], encoder, shuffled[1:])
            how: dict[str, Any] = {"num_classes": len(data.classes), "scoring": replace(scoring, probe=False, draws=1)}
            parts = (train[0], test[0], data.test.labels)
            found = over_shuffles(parts, shuffled, **how, device=extraction.devices[0])
            control["measures"] |= {key: value._asdict() for key, value in found.items()}
            results.append(control)
        results.append(score(name, rows, data.train.labels, encoder) | {"images_per_second": round(rate, 1)})
    for one in results:
        if "images_per_second" not in one:
            one["baseline"] = True
        elif compared:
            own, name = values[one["model"]], one["model"]
            gains = {
                base: {key: estimate(100 * (own[key] - of)) for key, of in values[base].items()} for base in compared
            }
            one["against"] = {base: {key: g._asdict() for key, g in of.items()} for base, of in gains.items()}
            one["verdict"] = [*verdict(name, gains), *warnings_of(name, gains, results, data.chance)]
    about = {
        "place": os.fspath(data_dir), "classes": data.classes, "train_images": len(data.train.labels),
        "test_images": len(data.test.labels), "test_groups": groups, "several_labels": data.several,
        "chance": data.chance,
    }  # fmt: skip
    settings = asdict(scoring) | {"k": k, "device": extraction.devices[0], "amp": extraction.amp} | asdict(split)
    settings["all_stages"] = extraction.all_stages
    notes = too_easy(results, about["test_images"])
    if extraction.all_stages:
        notes.append("Features are the mean and standard deviation of each stage's map.")
    elif any(line.startswith(SHORTCUT) for one in results for line in one.get("verdict", ())):
        notes.append("The mean of the last map may hide what a model has learned: try --all-stages.")
    return {"data": about, "settings": settings, "results": results, "notes": notes}


def shuffles(labels: Tensor, seed: int) -> list[Tensor]:
    """The labels in several random orders."""
    generator = torch.Generator().manual_seed(seed)
    return [labels[torch.randperm(len(labels), generator=generator)] for _ in range(SHUFFLES)]


def over_shuffles(parts: tuple[Tensor, Tensor, Tensor], shuffled: Sequence[Tensor], **how: Any) -> dict[str, Estimate]:
    """Mean of kNN and ridge over shuffled labels of the training images, with the 95 % interval of that mean.

    `parts` are features of the training and of the test images, and the labels of these. One shuffle tells little: all
    test images of a class that the features know get the same wrong label.
    """
    train, test, answers = parts
    each = [resampled_features(train, labels, test, answers, **how) for labels in shuffled]
    return {key: Estimate(*mean_interval([float(one[key][0]) for one in each])) for key in each[0]}


def mean_curve(curves: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The mean of several results of `over_budgets`, and their lowest and highest values."""
    found = []
    for budgets in zip(*curves, strict=True):
        bands = {
            key: [one["measures"][key] for one in budgets if key in one["measures"]] for key in budgets[0]["measures"]
        }
        measures = {
            key: {
                "value": sum(band["value"] for band in of) / len(of), "low": min(band["low"] for band in of),
                "high": max(band["high"] for band in of),
            }
            for key, of in bands.items()
        }  # fmt: skip
        found.append({"images": budgets[0]["images"], "measures": measures})
    return found


def too_easy(results: Sequence[Mapping[str, Any]], images: int) -> list[str]:
    """A sentence if a model or baseline has all test images right."""
    names = [one["model"] for one in results if any(of["value"] == 1 for key, of in one["measures"].items()
             if key != "rank")]  # fmt: skip
    if not names:
        return []
    few = f"{count(images, 'test image')} {'is' if images == 1 else 'are'} too few or too easy to tell models apart"
    return [f"{few}: {', '.join(names)} {'have' if len(names) > 1 else 'has'} all of them right."]


def headline(keys: Iterable[str]) -> list[str]:
    """The measures that verdicts name: kNN with the fewest neighbours, and ridge."""
    return [next(key for key in keys if key.startswith("knn_")), "ridge"]


def verdict(name: str, gains: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    """One sentence per headline measure: which baselines the model is above, with paired 95 % intervals in points."""
    lines = []
    for key in headline(next(iter(gains.values()))):
        groups: dict[str, list[str]] = {"above": [], "below": [], "no difference shown to": []}
        for base, of in gains.items():
            gain = of[key]
            word = "above" if gain.low > 0 else "below" if gain.high < 0 else "no difference shown to"
            groups[word].append(f"{base} ({gain.value:+.1f}, {gain.low:+.1f} to {gain.high:+.1f})")
        said = "; ".join(f"{word} {', '.join(bases)}" for word, bases in groups.items() if bases)
        lines.append(f"{name}, {key.replace('knn_', 'kNN ')}: {said}")
    return lines


def warnings_of(
    name: str, gains: Mapping[str, Mapping[str, Estimate]], results: Sequence[Mapping[str, Any]], chance: float
) -> list[str]:
    """Warnings about shortcuts that do as well as the model, and about shuffled labels that are above chance."""
    measures, lines = {one["model"]: one["measures"] for one in results}, []
    named = headline(next(iter(gains.values())))
    for base in SHORTCUTS:
        keys = [key for key in named if gains[base][key].low <= 0 and measures[base][key]["low"] > chance]
        if keys:
            shown = " and ".join(
                f"{key.replace('knn_', 'kNN ')} {100 * measures[base][key]['value']:.1f} %" for key in keys
            )
            better = [key for key in keys if gains[base][key].high < 0]
            word = "as good as" if not better else "better than" if better == keys else "at least as good as"
            lines.append(
                f"{SHORTCUT} is {word} {name}: {base} alone has {shown} (chance {100 * chance:.1f} %). "
                "The classes may differ in colour, exposure or background rather than in what they show."
            )
    control = measures.get(f"{name}, shuffled labels", {})
    for key in [key for key in named if control and control[key]["low"] > chance]:
        lines.append(
            f"warning: {name} with shuffled training labels has {100 * control[key]['value']:.1f} % "
            f"({key.replace('knn_', 'kNN ')}), above chance ({100 * chance:.1f} %): the split is not sound."
        )
    return lines
