from __future__ import annotations

import copy
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unveil.overrides import merge
from unveil.registry import UserError

BASE = {
    "optim": {"lr": 0.1, "betas": [0.9, 0.99]},
    "sampler": {"name": "blocks", "steps": 8, "rule": {"name": "lcr", "beta": 0.9}},
    "short": "lcr",
    "tasks": [{"task": {"name": "sudoku", "size": 4}, "weight": 1.0}],
    "log": None,
    "by_number": {1: {"x": 2}},
}


def merged(*overrides: str) -> dict:
    before = copy.deepcopy(BASE)
    result = merge(BASE, overrides)
    assert before == BASE, "merge changed its argument"
    return result


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a=3", 3),
        ("a=3e-4", 3e-4),
        ("a=1e-5", 1e-5),
        ("a='1e-5'", "1e-5"),
        ("a=null", None),
        ("a=true", True),
        ("a=[1, b]", [1, "b"]),
        ("a={b: 1, c: [2]}", {"b": 1, "c": [2]}),
        ("a=own.module:Class", "own.module:Class"),
        ("a=b=c", "b=c"),
        ('a=""', ""),
        ("a=${b}", "${b}"),
    ],
)
def test_values_are_yaml(override, value):
    assert merge({}, [override]) == {"a": value}


def test_paths_lead_through_mappings_lists_and_what_is_not_there_yet():
    assert merged("optim.lr=1")["optim"] == {"lr": 1, "betas": [0.9, 0.99]}
    assert merged("optim.betas.1=0.5")["optim"]["betas"] == [0.9, 0.5]
    assert merged("tasks.0.weight=2")["tasks"] == [{"task": {"name": "sudoku", "size": 4}, "weight": 2}]
    assert merged("log.wandb.project=x")["log"] == {"wandb": {"project": "x"}}
    assert merged("new.deep.key=1")["new"] == {"deep": {"key": 1}}
    assert merged("by_number.1.x=3")["by_number"] == {1: {"x": 3}}
    assert merged("optim={lr: 2}")["optim"] == {"lr": 2}
    assert merged("optim.lr=1", "optim.lr=2")["optim"]["lr"] == 2
    assert merged() == BASE


@pytest.mark.parametrize("change", ["sampler.rule.name=rcr", "sampler.rule=rcr"])
def test_another_name_drops_the_old_fields(change):
    assert merged(change)["sampler"] == {"name": "blocks", "steps": 8, "rule": {"name": "rcr"}}
    assert merged(change, "sampler.rule.beta=1")["sampler"]["rule"] == {"name": "rcr", "beta": 1}
    assert merged("sampler.rule.beta=1", change)["sampler"]["rule"] == {"name": "rcr", "beta": 1}


@pytest.mark.parametrize("same", ["sampler.rule.name=lcr", "sampler.rule=lcr"])
def test_the_same_name_keeps_the_fields(same):
    assert merged(same) == BASE
    assert merged("sampler.rule.beta=1", same)["sampler"]["rule"] == {"name": "lcr", "beta": 1}


def test_names_change_inside_lists_and_at_the_top():
    assert merged("tasks.0.task=countdown")["tasks"] == [{"task": {"name": "countdown"}, "weight": 1.0}]
    assert merge({"name": "lcr", "beta": 1}, ["beta=2", "name=rcr"]) == {"name": "rcr", "beta": 2}


def test_fields_without_a_name_belong_to_the_default_and_are_dropped_too():
    assert merge({"rule": {"beta": 1}}, ["rule.name=rcr"]) == {"rule": {"name": "rcr"}}
    assert merge({"rule": {"beta": 1}}, ["rule=rcr"]) == {"rule": "rcr"}


def test_a_bare_name_takes_fields():
    assert merged("short.beta=1")["short"] == {"name": "lcr", "beta": 1}
    assert merged("short.name=rcr")["short"] == {"name": "rcr"}
    assert merge({}, ["rule.beta=1", "rule=lcr"]) == {"rule": {"name": "lcr", "beta": 1}}


ORDER = [
    "sampler.rule.beta=0.1",
    "sampler.rule.name=rcr",
    "sampler.name=whole",
    "sampler.steps=3",
    "sampler={name: other, rule: lcr}",
]


@settings(max_examples=40, deadline=None)
@given(chosen=st.permutations(ORDER))
def test_the_order_of_overrides_does_not_matter(chosen):
    assert merged(*chosen)["sampler"] == {"name": "whole", "steps": 3, "rule": {"name": "rcr", "beta": 0.1}}


def test_an_outer_name_is_changed_before_inner_fields_are_set():
    changes = ["sampler.rule.beta=0.1", "sampler.name=whole"]
    for order in itertools.permutations(changes):
        assert merged(*order)["sampler"] == {"name": "whole", "rule": {"beta": 0.1}}


@pytest.mark.parametrize("override", ["foo", "=3", "a..b=1", ".a=1", "a.=1", "a b=1", "", "a =1"])
def test_a_malformed_override_is_named(override):
    with pytest.raises(UserError) as caught:
        merge({}, [override])
    assert str(caught.value) == f"override {override!r} should look like path.to.key=value"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a=", "override 'a=' has no value (write null, or '\"\"' for an empty string)"),
        ("a=#f00", "override 'a=#f00' has no value (write null, or '\"\"' for an empty string)"),
        ("a=[1", "override 'a=[1' cannot be read: line 2: did not find expected ',' or ']'"),
        ("a={b: 1, b: 2}", "override 'a={b: 1, b: 2}' cannot be read: line 1: found duplicate key b"),
        ("optim.lr.x=1", "optim.lr.x cannot be set: optim.lr is 0.1"),
        ("optim.lr.x.y=1", "optim.lr.x.y cannot be set: optim.lr is 0.1"),
        ("optim.betas.0.x=1", "optim.betas.0.x cannot be set: optim.betas.0 is 0.9"),
        ("tasks.1.weight=2", "tasks.1.weight cannot be set: tasks is a list with 1 entries (0 is the first)"),
        ("tasks.weight=2", "tasks.weight cannot be set: tasks is a list with 1 entries (0 is the first)"),
        ("tasks.-1=2", "tasks.-1 cannot be set: tasks is a list with 1 entries (0 is the first)"),
    ],
)
def test_what_cannot_be_set_is_one_line(override, message):
    with pytest.raises(UserError) as caught:
        merge(BASE, [override])
    assert str(caught.value) == message


def test_nothing_is_set_inside_an_interpolation():
    with pytest.raises(UserError, match=r"eval\.steps cannot be set: eval is '\$\{sampler\}'"):
        merge({"eval": "${sampler}"}, ["eval.steps=1"])
