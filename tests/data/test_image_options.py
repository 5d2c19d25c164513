"""Options on images: the record of pixels that they make, and what they refuse."""

import json
import math

import pytest

from timm_convnextv2.commands.base import own_options
from timm_convnextv2.config import add_options, build, words_given
from timm_convnextv2.console import CommandParser
from timm_convnextv2.data import PixelOptions, Pixels, create_source


def parse(text):
    parser = CommandParser(prog="x")
    add_options(parser, PixelOptions)
    return build(PixelOptions, words_given(parser, text.split()))


@pytest.mark.parametrize(
    "text, pixels",
    [
        ("", Pixels()),
        ("--nodata -1.7e-2 --divide 255", Pixels(-0.017, 255.0)),
        ("--clip-low 0 --clip-high 1 2 3", Pixels(clip_low=(0.0,), clip_high=(1.0, 2.0, 3.0))),
        ("--dicom-window file", Pixels(dicom_window="file")),
        ("--dicom-window 40 80", Pixels(dicom_window=(40.0, 80.0))),
        ("--pages first", Pixels(page=0)),
        ("--pages 3", Pixels(page=3)),
        ("--pages channels", Pixels(page="channels")),
    ],
)
def test_options_make_the_record_and_back(text, pixels):
    assert parse(text).to_pixels(3) == pixels == PixelOptions.of(pixels).to_pixels(3)


@pytest.mark.parametrize(
    "pixels, text",
    [
        *((Pixels(nodata, 2.0, (0.0, 1.0), (1.0, 2.0)), "clipped") for nodata in (None, -9999.0, math.nan, -math.inf)),
        (Pixels(dicom_window="file", page=3), "DICOM in the window"),
        (Pixels(dicom_window=(40.0, 400.0), page="channels"), "DICOM in the window"),
        (Pixels(standardize="image"), "each image to mean 0"),
    ],
)
def test_the_record_comes_back_from_json(pixels, text):
    again = Pixels.from_record(json.loads(json.dumps(pixels.record(), allow_nan=False)))
    assert repr(again) == repr(pixels) and text in str(pixels) and pixels.plain == (pixels.dicom_window is not None)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (Pixels(dicom_window=(40.0,)), "a centre and a width above 0"),
        (Pixels(standardize="pixel"), "'channel' or 'image', got 'pixel'"),
    ],
)
def test_a_record_that_no_option_makes_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        create_source("absent", pixels=wrong)


@pytest.mark.parametrize("text", ["--pages all", "--pages 0 2"])
def test_several_pages_are_no_part_of_the_record(text):
    assert parse(text).to_pixels() == Pixels()


@pytest.mark.parametrize(
    "text, words",
    [
        ("--clip-percentiles 99 1", "--clip-percentiles 99 1"),
        ("--clip-percentiles 1 101", "--clip-percentiles 1 101"),
        ("--dicom-window 40", "--dicom-window .* 40"),
        ("--dicom-window file 80", "--dicom-window .* file 80"),
        ("--pages 0 all", "--pages .* 0 all"),
        ("--pages -2", "--pages .* -2"),
        ("--clip-low 0 --clip-high 1 2", "clip_high has 2 values for 3 channels"),
        ("--clip-low 0", "come in pairs"),
        ("--clip-low 0 --clip-high 0", "out of order in channel 1"),
        ("--divide -1", "above 0, got -1"),
        ("--dicom-window 40 -1", "above 0"),
        ("--dicom-window file --divide 2", "0 to 1"),
    ],
)
def test_wrong_words_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text).to_pixels(3)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("a b", ["a", "b"]),
        ("--img-size 8 a", ["a"]),
        ("a --workers 0 b", ["a", "b"]),
        ("--show-bands 4 3 2 a", ["a"]),
        ("-j0 a --overwrite b", ["a", "b"]),
        ("--data-dir a b", ["a", "b"]),
        ("-- a", ["a"]),
        ("", None),
    ],
)
def test_images_are_words_anywhere_or_data_dir(words, expected):
    assert own_options("check", words.split())[0].get("data_dir") == expected


def test_images_are_given_once():
    with pytest.raises(ValueError, match="'a' and --data-dir 'b c' exclude each other"):
        own_options("check", ["a", "--data-dir", "b", "c"])
