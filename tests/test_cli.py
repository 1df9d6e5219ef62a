"""The command line teaches: a line of help for every option, the nearest for a misspelt one."""

import re
from dataclasses import dataclass, fields

import pytest

import sample
import train_clip
import train_dvae
import train_prior
from clip import CLIPConfig
from dvae import DVAEConfig
from engine.cli import comments_of
from tests.scripts import call
from train_clip import CLIPTraining
from train_dvae import DVAETraining
from train_prior import PriorTraining
from transformer import TransformerConfig

SCRIPTS = (train_dvae, train_prior, train_clip, sample)
CONFIGS = (DVAEConfig, DVAETraining, TransformerConfig, PriorTraining, CLIPConfig, CLIPTraining)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def help_of(module, *args):
    """{option: its line of help} as -h prints it."""
    code, out, err = call(module, *args, "-h")
    assert (code, err) == (0, "")
    return dict(re.findall(r"^  (?:-\w.*?, )?(--[\w-]+).*?  +(\S.*)$", out, re.MULTILINE))


@pytest.mark.parametrize("module", SCRIPTS)
def test_every_option_has_a_line_of_help(module):
    code, out, _ = call(module, "-h")
    options = set(re.findall(r"(?<=[\[| ])--?[a-z][\w-]*", out[: out.index("\n\n")]))
    assert code == 0 and len(options) > 12
    short = {"-h": "--help", "-o": "--out", "--no-filters": "--filters"}  # on one line
    assert {short.get(name, name) for name in options} <= help_of(module).keys()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_field_says_what_it_is_and_whose(config):
    """In the comment behind it: the paper's section, or that the paper does not give it."""
    comments = comments_of(config)
    assert comments.keys() == {field.name for field in fields(config)}
    for name, comment in comments.items():
        if name not in ("log_every", "eval_every"):
            assert re.search(r"\(.*\d.*\)|paper|our reading|not given", comment), name


@dataclass
class Example:
    share: float = 0.5  # a share: 50% (A.1)
    count: int = 3_000_000  # a # number


def test_comments_become_help():
    assert comments_of(Example) == {"share": "a share: 50% (A.1)", "count": "a # number"}


def test_the_values_are_those_of_the_preset_that_is_named():
    papers, tiny = help_of(train_dvae), help_of(train_dvae, "--tiny")
    assert papers["--lr-steps"] == "updates of that half cosine (A.2); default 1_200_000"
    assert tiny["--lr-steps"] == papers["--lr-steps"] + ", tiny 17_000"
    assert papers["--beta1"] == tiny["--beta1"]  # tiny says nothing of it
    assert help_of(train_prior, "--preset=small")["--n-layer"].endswith("default 64, small 12")
    assert int("1_200_000") == DVAETraining().lr_steps  # as shown it may be typed


@pytest.mark.parametrize(
    "args, meant",
    [
        ("--n_hidd 4", "--n-hid"),
        ("--kl-wieght=2", "--kl-weight"),
        ("--preset tinny", "tiny"),
        ("--small", "--preset small"),
        ("--zzzzzz", None),
    ],
)
def test_a_misspelt_name_gets_the_nearest(args, meant):
    code, out, err = call(train_dvae, *args.split())
    assert (code, out) == (2, "") and err.startswith("train_dvae.py: ") and err.count("\n") == 1
    found = re.search(r"; did you mean (.*)\?\n", err)
    assert (found and found[1]) == meant


def test_a_field_can_be_spelt_with_underscores():
    for option in ("--n_hid", "--n-hid"):
        code, _, err = call(train_dvae, "--tiny", option, "7")
        assert code == 2 and "n_hid must be a multiple of 4" in err
