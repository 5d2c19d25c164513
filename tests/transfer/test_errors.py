"""A file that breaks while a run reads it: one message that names it, and nothing that was made is lost."""

import pickle

import pytest
import torch
from helpers import assert_same
from tiny import BACKBONE, DETECTOR, SEGMENTER, SHORT, tiny_detector

from timm_convnextv2.commands.main import main
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.data.formats.errors import ImageError, MissingPackageError, UnreadableError, naming
from timm_convnextv2.transfer.detection.coco import DetectionSamples
from timm_convnextv2.transfer.segmentation.masks import TrainSamples

TASKS = {
    "detect": (DetectionSamples, [*DETECTOR, "--warmup-updates", "1"]),
    "segment": (TrainSamples, SEGMENTER),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("d") / "d", size=32, train=8, validation=8, coco=True, masks=True)


@pytest.mark.parametrize("task, workers", [("detect", 0), ("segment", 2)])
def test_the_run_ends_with_its_name_and_continues_bit_for_bit(data, tmp_path, capfd, monkeypatch, task, workers):
    samples, options = TASKS[task]
    words = [task, "train", *BACKBONE, *SHORT, *options, "--data-dir", str(data), "--output", str(tmp_path)]
    words += ["-b", "2", "--eval-interval", "9", "-j", str(workers)]
    assert main([*words, "--experiment", "whole"]) == 0
    read = samples.__getitem__

    def broken(self, key):  # in the second epoch
        place = data / "train/images/00003.png"
        if key[0] == 1 and key[1] == 3:
            place = tmp_path / "torn.png"
            place.write_bytes(b"torn")
        images = self.coco.images if task == "detect" else self.data.source.paths
        before = images[3]
        images[3] = before._replace(path=str(place)) if task == "detect" else str(place)
        try:
            return read(self, key)
        finally:
            images[3] = before

    monkeypatch.setattr(samples, "__getitem__", broken)
    capfd.readouterr()
    assert main([*words, "--experiment", "run"]) == 1
    err = capfd.readouterr().err
    name = "The image 00003.png (id 4)" if task == "detect" else f"The image {tmp_path / 'torn.png'} with its mask"
    assert f"error: {name} cannot be used: " in err and err.count("error:") == 1 and "Traceback" not in err
    assert "--experiment run --resume auto" in err
    progress = torch.load(tmp_path / "run/last.pth.tar", weights_only=True)["progress"]
    assert progress["epoch"] == 1 and f"last.pth.tar (after epoch 1, and update {progress['update']}" in err
    monkeypatch.undo()
    assert main([*words, "--experiment", "run", "--resume", "auto"]) == 0
    whole, parts = (torch.load(tmp_path / n / "last.pth.tar", weights_only=True) for n in ("whole", "run"))
    assert_same(whole["state_dict"], parts["state_dict"])


def test_an_image_that_eval_cannot_read(data, tmp_path, capsys, monkeypatch):
    from timm_convnextv2.transfer import export_detector

    names = (data / "classes.txt").read_text().split()[1:]
    export_detector(tiny_detector(boxes_only=True, img_size=32), tmp_path, classes=names)

    def gone(*_):
        raise OSError("gone")

    monkeypatch.setattr("timm_convnextv2.transfer.detection.coco.load_image", gone)
    words = ["detect", "eval", "--model", str(tmp_path), "--data-dir", str(data), "-j", "2", "--device", "cpu"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err == "timm-convnextv2 detect eval: error: The image 00000.png (id 1) cannot be used: gone\n"


def test_what_is_no_fault_of_the_file():
    for error in (ImageError("is\ntorn"), OSError("gone")):
        with pytest.raises(UnreadableError, match="^x cannot be used: (is torn|gone)$"), naming("x"):
            raise error
    with pytest.raises(MissingPackageError), naming("x"):
        raise MissingPackageError("tifffile")
    error = pickle.loads(pickle.dumps(UnreadableError("Caught UnreadableError in worker\n  a: UnreadableError: x y\n")))
    assert str(error) == "x y"
