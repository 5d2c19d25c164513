"""Words of a command line that all commands read alike."""

import pytest

from timm_convnextv2.commands.base import parser_of


@pytest.mark.parametrize(
    "word, number",
    [
        ("-1.7e-2", -0.017), ("-1e-05", -1e-5), ("-1E5", -1e5), ("-.5e+1", -5), ("-3.", -3), ("-2", -2), ("-0.5", -0.5),
    ],
)  # fmt: skip
def test_negative_numbers_are_values(word, number):
    args = parser_of("pretrain").parse_args(["--mean", word, "0.5", word, "-b", "4", "--std", "1", "2", "3"])
    assert args.mean == [number, 0.5, number] and args.batch_size == 4 and args.std == [1, 2, 3]


@pytest.mark.parametrize("word", ["-x", "-e5", "-1e", "-1.2.3", "--5"])
def test_other_words_are_still_options(word):
    with pytest.raises(ValueError):
        parser_of("pretrain").parse_args(["--mean", word])
