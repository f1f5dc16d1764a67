"""What options= and mode= may say, and the errors that say what is allowed."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from ctrlcompile import Budget
from ctrlcompile.options import MODES, Options, inductor_patches, parse

GUIDE = Path(__file__).parent.parent / "docs" / "guide.md"


def test_no_options_gate_with_every_block_active_and_no_controller():
    for nothing in (None, {}):
        options = parse(nothing)
        assert (options.budget, options.total_steps, options.exclude, options.strict) == (None, None, (), False)
        assert options.block == "auto"


def test_given_values_arrive():
    options = parse(
        {"budget": 0.3, "total_steps": torch.tensor(70), "block": [8, 16], "exclude": ["*.head.*"], "strict": True}
    )
    assert options.budget == Budget(flops=0.3) == parse({"budget": Budget(flops=0.3)}).budget
    assert (options.total_steps, options.block, options.exclude) == (70, (8, 16), ("*.head.*",))
    assert options.strict
    assert parse({"block": 16}).block == (16, 16)
    for mode in ("never", "auto", bool):
        assert parse({"respecialize": mode}).respecialize == mode


def test_an_unknown_option_is_refused_with_the_list_of_those_that_exist():
    with pytest.raises(ValueError, match=r"'buget'.*'ctrlprune'.*budget.*total_steps.*block.*exclude.*strict"):
        parse({"buget": 0.4})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0}, ValueError, r"got 0; allowed is 0 < budget <= 1"),
        ({"budget": -0.1}, ValueError, r"got -0\.1; allowed"),
        ({"budget": 40}, ValueError, r"got 40; allowed.*for 40 % pass 0\.4"),
        ({"budget": float("nan")}, ValueError, r"got nan; allowed"),
        ({"budget": "0.4"}, TypeError, r"got '0\.4' of type str"),
        ({"budget": 0.4, "total_steps": 0}, ValueError, r"total_steps.*above 0; got 0"),
        ({"budget": 0.4, "total_steps": -3}, ValueError, r"total_steps.*above 0; got -3"),
        ({"budget": 0.4, "total_steps": 10.0}, TypeError, r"total_steps.*an int; got 10\.0"),
        ({"budget": 0.4, "total_steps": True}, TypeError, r"total_steps.*got True"),
        ({"total_steps": 10}, ValueError, r"budget"),
        ({"block": 12}, ValueError, r"multiples of 8 from 8 to 128; got \(12, 12\)"),
        ({"block": "large"}, ValueError, r"\"auto\", an int or a pair.*got 'large'"),
        ({"exclude": "head.weight"}, TypeError, r"list of name patterns.*got 'head\.weight'"),
        ({"exclude": [3]}, TypeError, r"list of name patterns"),
        ({"exclude": 3}, TypeError, r"list of name patterns"),
        ({"log": "runs/a"}, ValueError, r"log keeps what a budget's controller decides"),
        ({"budget": 0.4, "log": 3}, TypeError, r"log is the folder .* got 3"),
        ({"budget": 0.4, "log": __file__}, ValueError, r"log: cannot be written, .*test_options\.py"),
        ({"strict": "yes"}, TypeError, r"True or False; got 'yes'"),
        ({"respecialize": "always"}, ValueError, r"\"auto\", \"never\" or a callable; got 'always'"),
        ({"respecialize": False}, TypeError, r"yes or no to each Proposal; got False"),
    ],
)
def test_a_wrong_value_is_refused_where_it_comes_in(options, error, message):
    with pytest.raises(error, match=message):
        parse(options)


def test_a_wrong_option_reaches_the_user_through_torch_compile():
    model = torch.compile(nn.Linear(64, 64), backend="ctrlprune", options={"blok": 8})
    with pytest.raises(Exception, match=r"unknown option 'blok' for backend 'ctrlprune'; it takes \['budget'"):
        model(torch.randn(2, 64))


def test_allowed_modes_are_settings_of_inductor_without_cuda_graphs():
    known = torch._inductor.config.get_config_copy()
    for mode in MODES:
        patches = inductor_patches(mode)
        assert set(patches) <= set(known)
        assert not patches.get("triton.cudagraphs")
    assert inductor_patches("max-autotune")["max_autotune"] is True
    assert inductor_patches(None) == inductor_patches("default") == {}


@pytest.mark.parametrize("mode", ["reduce-overhead", "fastest"])
def test_a_refused_mode_names_those_that_work(mode):
    with pytest.raises(ValueError, match=rf"mode '{mode}'.*max-autotune-no-cudagraphs.*CUDA graph"):
        inductor_patches(mode)


def test_the_guide_has_a_row_for_every_option_with_its_default():
    (table,) = re.findall(r"^\| option \|.*\n\|[- |]+\n((?:\|.*\n)+)", GUIDE.read_text(), re.M)
    rows = [[cell.strip(" `") for cell in row.split("|")] for row in table.splitlines()]
    assert {row[1]: ast.literal_eval(row[3]) for row in rows} == {
        field.name: field.default for field in dataclasses.fields(Options)
    }
