from __future__ import annotations

import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field

from unveil.overrides import merge
from unveil.recipe import RecipeError, build, dump, load, to_yaml
from unveil.registry import Plugin, UserError
from unveil.samplers.schedules import Power, Schedule


class Rule(Plugin, ABC, family="rule"):
    @abstractmethod
    def pick(self) -> int: ...


@dataclass(kw_only=True)
class LowConfidence(Rule, name="lcr"):
    threshold: float = 0.5
    beta: float = 0.04

    def pick(self) -> int:
        return 1


@dataclass(kw_only=True)
class Remask(Rule, name="rcr"):
    beta: float = 0.1
    order: Literal["on", "off"] = "off"

    def __post_init__(self) -> None:
        if self.beta > 1:
            raise UserError(f"beta {self.beta} is too strong\nfor {self.order}")

    def pick(self) -> int:
        return 2


class Unfinished(Rule, name="unfinished"):
    """Without the decorator."""


class Colour(Enum):
    RED = "red"


@dataclass(kw_only=True)
class Sampler:
    steps: Annotated[int, Field(gt=0)] = 8
    rule: Rule = field(default_factory=lambda: LowConfidence(threshold=0.9))


@dataclass(kw_only=True)
class Optim:
    lr: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "flat"] = "flat"
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}, it must not be negative")


@dataclass(kw_only=True)
class Entry:
    rule: Rule
    weight: float = 1.0


@dataclass(kw_only=True)
class Train:
    optim: Optim
    sampler: Sampler = field(default_factory=lambda: Sampler(steps=3))
    entries: Annotated[list[Entry], Field(max_length=2)] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    decoders: dict[str, Sampler] = field(default_factory=dict)
    extra: Rule | None = None
    fixed: Remask | None = None
    level: Literal[1, 2] = 1
    clip: float | Literal["auto"] | None = None
    label: float | str = ""
    title: str = "run"
    debug: bool = False
    lengths: list[int] = field(default_factory=list)
    out: Path = Path("runs")
    colour: Colour = Colour.RED
    tags: set[str] = field(default_factory=set)
    free: dict[str, list[float]] = field(default_factory=dict)
    total: int = field(init=False, default=7)


GOOD = {"optim": {"lr": 1}}
RULES = "allowed: lcr, rcr, unfinished"


def problems(data: dict, cls: type = Train, where: str = "") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        build(cls, data, where)
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems


def test_a_full_recipe_is_built():
    recipe = build(
        Train,
        {
            "optim": {"lr": "5e-4", "betas": [0, "1e-5"], "warmup": 3.0},
            "sampler": {"steps": 4, "rule": {"name": "rcr", "beta": 0.2}},
            "entries": [{"rule": "lcr", "weight": 2}, {"rule": {"name": "rcr"}}],
            "rules": ["rcr", {"name": "lcr", "beta": 1}],
            "decoders": {"fast": {"steps": 1}, "slow": {"rule": "rcr"}},
            "extra": {"name": "lcr"},
            "fixed": {"beta": 0.3},
            "level": 2,
            "clip": "auto",
            "label": "1e-5",
            "title": "5e-4",
            "debug": True,
            "lengths": [1, 2.0],
            "out": "a/b",
            "colour": "red",
            "tags": ["x"],
            "free": {"a": [1, "2e3"]},
        },
    )
    expected = Train(
        optim=Optim(lr=5e-4, betas=(0.0, 1e-5), warmup=3),
        sampler=Sampler(steps=4, rule=Remask(beta=0.2)),
        entries=[Entry(rule=LowConfidence(), weight=2.0), Entry(rule=Remask())],
        rules=[Remask(), LowConfidence(beta=1.0)],
        decoders={"fast": Sampler(steps=1), "slow": Sampler(rule=Remask())},
        extra=LowConfidence(),
        fixed=Remask(beta=0.3),
        level=2,
        clip="auto",
        label="1e-5",
        title="5e-4",
        debug=True,
        lengths=[1, 2],
        out=Path("a/b"),
        tags={"x"},
        free={"a": [1.0, 2000.0]},
    )
    assert recipe == expected
    assert type(recipe.optim.warmup) is int
    assert type(recipe.lengths[1]) is int
    assert type(recipe.entries[0].weight) is float


def test_missing_keys_take_the_default_of_the_field_and_not_of_its_class():
    recipe = build(Train, {**GOOD, "sampler": {"rule": {"beta": 0.7}}})
    assert recipe.sampler == Sampler(steps=3, rule=LowConfidence(threshold=0.9, beta=0.7))
    # Named the same: the default stands. Named otherwise: nothing of it is left.
    assert build(Sampler, {"rule": "lcr"}).rule == LowConfidence(threshold=0.9)
    assert build(Sampler, {"rule": "rcr"}).rule == Remask()
    # No default stands behind the entries of a list.
    assert build(Train, {**GOOD, "rules": ["lcr"]}).rules == [LowConfidence()]
    first, second = build(Train, GOOD), build(Train, GOOD)
    assert first == second
    assert first.sampler is not second.sampler


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"optim": {}}, "optim.lr: required, but missing"),
        ({}, "optim: required, but missing"),
        ({"optim": None}, "optim: should be a mapping, got None"),
        ({"optim": {"lr": -1}}, "optim.lr: should be greater than 0, got -1"),
        ({"optim": {"lr": "-1e-3"}}, "optim.lr: should be greater than 0, got '-1e-3'"),
        ({"optim": {"lr": "fast"}}, "optim.lr: should be a valid number, got 'fast'"),
        ({"optim": {"lr": True}}, "optim.lr: should be a valid number, got True"),
        ({"optim": {"lr": float("nan")}}, "optim.lr: should be a finite number, got nan"),
        ({"optim": {"lr": float("inf")}}, "optim.lr: should be a finite number, got inf"),
        ({"optim": {"lr": 1, "warmup": True}}, "optim.warmup: should be a valid integer, got True"),
        ({"optim": {"lr": 1, "warmup": 1.5}}, "optim.warmup: should be a valid integer, got 1.5"),
        ({"optim": {"lr": 1, "warmup": "3"}}, "optim.warmup: should be a valid integer, got '3'"),
        ({"optim": {"lr": 1, "warmup": -2}}, "optim: warmup is -2, it must not be negative"),
        (
            {"optim": {"lr": 1, "schedule": "cosin"}},
            "optim.schedule: should be 'cosine' or 'flat', got 'cosin'",
        ),
        ({"optim": {"lr": 1, "betas": [0.9, "x"]}}, "optim.betas.1: should be a valid number, got 'x'"),
        (
            {"sampler": {"stepz": 4}},
            "sampler.stepz: unknown key, did you mean 'steps'? (allowed: rule, steps)",
        ),
        ({"sampler": 3}, "sampler: should be a mapping, got 3"),
        (
            {"sampler": {"rule": {"name": "rcrr"}}},
            f"sampler.rule.name: no rule is called 'rcrr', did you mean 'rcr'? ({RULES})",
        ),
        ({"extra": {"beta": 1}}, f"extra.name: required, but missing ({RULES})"),
        ({"extra": {"name": True}}, "extra.name: should be a string, got True"),
        ({"extra": 3}, "extra: should be a name or a mapping with a name, got 3"),
        (
            {"extra": {"name": "rcr", "threshold": 1}},
            "extra.threshold: unknown key (allowed: beta, order)",
        ),
        (
            {"extra": {"name": "rcr", "order": True}},
            "extra.order: should be 'on' or 'off' (YAML reads yes, no, on and off as truth values"
            " unless they are quoted), got True",
        ),
        ({"extra": {"name": "rcr", "beta": 2}}, "extra: beta 2.0 is too strong for off"),
        (
            {"extra": "unfinished"},
            "extra.name: 'unfinished' cannot be used: it should be a @dataclass without abstract methods",
        ),
        ({"fixed": "lcr"}, "fixed.name: 'lcr' is not a Remask"),
        ({"entries": {"rule": "lcr"}}, "entries: should be a list, got {'rule': 'lcr'}"),
        ({"entries": [{"weight": 1}]}, "entries.0.rule: required, but missing"),
        ({"rules": ["lcr", 1]}, "rules.1: should be a name or a mapping with a name, got 1"),
        ({"decoders": ["a"]}, "decoders: should be a mapping, got ['a']"),
        ({"decoders": {"a": {"steps": 0}}}, "decoders.a.steps: should be greater than 0, got 0"),
        ({"decoders": {1: {"steps": 1}}}, "decoders.1: should be a valid string, got 1"),
        ({"level": True}, "level: should be 1 or 2, got True"),
        ({"level": 3}, "level: should be 1 or 2, got 3"),
        ({"clip": "never"}, "clip: should be a valid number or 'auto', got 'never'"),
        ({"debug": 1}, "debug: should be a valid boolean, got 1"),
        ({"debug": "true"}, "debug: should be a valid boolean, got 'true'"),
        ({"title": 0.5}, "title: should be a valid string, got 0.5"),
        ({"lengths": [1, True]}, "lengths.1: should be a valid integer, got True"),
        ({"free": {"a": [1], "b": 3}}, "free.b: should be a valid list, got 3"),
        ({"colour": "green"}, "colour: should be 'red', got 'green'"),
    ],
)
def test_every_mistake_is_one_line_that_names_the_key(data, line):
    assert problems({**GOOD, **data} if data else data) == [line]


def test_unknown_keys_at_the_top_may_be_numbers_or_computed_fields():
    for key in (3, "total"):
        (line,) = problems({**GOOD, key: 8})
        assert line.startswith(f"{key}: unknown key")
        assert line.endswith(
            "(allowed: clip, colour, debug, decoders, entries, extra, fixed, free, label, lengths,"
            " level, optim, out, rules, sampler, tags, title)"
        )


def test_all_problems_are_collected_in_the_order_of_the_fields():
    optim, entries = {"lr": 0, "warmup": "x"}, [1, {"rule": "rcr"}]
    data = {"optim": optim, "sampler": {"rule": "none"}, "entries": entries, "lvl": 1}
    paths = [line.split(":")[0] for line in problems(data, where="job")]
    assert paths == ["job.lvl", "job.optim.lr", "job.optim.warmup", "job.sampler.rule.name", "job.entries.0"]


def test_a_constraint_on_a_list_of_parts_is_checked():
    lines = problems({**GOOD, "entries": [{"rule": "lcr"}] * 3})
    assert len(lines) == 1
    assert lines[0].startswith("entries: ") and "at most 2 items" in lines[0]


def test_the_root_can_be_a_plugin_family_and_its_name_must_exist():
    assert build(Rule, {"name": "rcr", "beta": 0.5}) == Remask(beta=0.5)
    assert problems({"name": "x"}, Rule, "rule") == [f"rule.name: no rule is called 'x' ({RULES})"]
    assert problems({"optim": 3}, Remask) == ["optim: unknown key (allowed: beta, order)"]
    assert problems([], Train) == ["recipe: should be a mapping, got []"]


def test_a_long_value_is_cut():
    (line,) = problems({**GOOD, "optim": "x" * 500})
    assert len(line) < 120


@dataclass(kw_only=True)
class Named:
    name: str = "x"


@dataclass(kw_only=True)
class TwoKinds:
    part: Optim | Sampler


def test_a_class_that_no_recipe_can_express_is_the_programmers_mistake():
    with pytest.raises(TypeError, match="reserved"):
        build(Named, {})
    with pytest.raises(TypeError, match="part: parts can be"):
        build(TwoKinds, {"part": {"lr": 1}})


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(
        "from dataclasses import dataclass\n"
        f"from {Rule.__module__} import Rule\n"
        "@dataclass(kw_only=True)\n"
        "class Mine(Rule):\n"
        "    strength: int = 1\n"
        "    def pick(self): return 3\n"
        "@dataclass(kw_only=True)\n"
        "class Half(Rule):\n"
        "    pass\n"
        "@dataclass(kw_only=True)\n"
        "class Stranger:\n"
        "    pass\n"
        "base = Rule\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_rules", None)


def test_a_users_own_class_is_reached_by_module_and_class(own_module):
    data = {**GOOD, "extra": {"name": "own_rules:Mine", "strength": 4}}
    recipe = build(Train, data)
    assert (type(recipe.extra).__name__, recipe.extra.strength, recipe.extra.pick()) == ("Mine", 4, 3)
    assert dump(recipe)["extra"] == {"name": "own_rules:Mine", "strength": 4}
    assert build(Train, dump(recipe)) == recipe


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("own_rules:Gone", "cannot be imported"),
        ("no_such_module:Mine", "cannot be imported"),
        ("own_rules:Stranger", "is not a rule"),
        ("own_rules:Half", "without abstract methods"),
        ("own_rules:base", "without abstract methods"),
    ],
)
def test_a_wrong_path_to_an_own_class_is_one_line(own_module, name, reason):
    (line,) = problems({**GOOD, "extra": name})
    assert line.startswith("extra.name: ") and repr(name) in line and reason in line


@dataclass(kw_only=True)
class Duty(Plugin, family="duty"):
    """A family whose base is a dataclass itself."""


def test_the_base_of_a_family_is_no_plugin():
    path = f"{__name__}:Duty"
    reason = "cannot be used: it should be a @dataclass without abstract methods"
    assert problems({"name": path}, Duty) == [f"name: {path!r} {reason}"]


def test_dump_writes_short_names_only_for_plugins_of_the_package():
    assert dump(Power(k=3.0)) == {"name": "power", "k": 3.0}
    assert build(Schedule, dump(Power(k=3.0))) == Power(k=3.0)
    assert dump(Remask()) == {"name": f"{__name__}:Remask", "beta": 0.1, "order": "off"}
    with pytest.raises(TypeError):
        dump(Remask)


def rules() -> st.SearchStrategy:
    small = st.floats(-1, 1)
    return st.builds(LowConfidence, threshold=small, beta=small) | st.builds(
        Remask, beta=small, order=st.sampled_from(["on", "off"])
    )


def trains() -> st.SearchStrategy:
    finite = st.floats(allow_nan=False, allow_infinity=False)
    optims = st.builds(
        Optim,
        lr=finite.filter(lambda x: x > 0),
        schedule=st.sampled_from(["cosine", "flat"]),
        betas=st.tuples(finite, finite),
        warmup=st.integers(0),
    )
    samplers = st.builds(Sampler, steps=st.integers(1, 2**70), rule=rules())
    # OmegaConf takes ??? for a value that is still missing, and there is no way to quote it.
    odd = ["5e-4", "on", "null", "~", "12:30", "a: b", "${x}", "\\${", "#"]
    words = (st.text() | st.sampled_from(odd)).filter(lambda text: text != "???")
    return st.builds(
        Train,
        optim=optims,
        sampler=samplers,
        entries=st.lists(st.builds(Entry, rule=rules(), weight=finite), max_size=2),
        rules=st.lists(rules(), max_size=2),
        decoders=st.dictionaries(words, samplers, max_size=2),
        extra=st.none() | rules(),
        fixed=st.none() | st.just(Remask(beta=0.3)),
        clip=st.none() | finite | st.just("auto"),
        label=words | finite,
        title=words,
        debug=st.booleans(),
        lengths=st.lists(st.integers()),
        tags=st.sets(words, max_size=3),
        free=st.dictionaries(words, st.lists(finite, max_size=2), max_size=2),
    )


@settings(max_examples=60, deadline=None)
@given(recipe=trains())
@example(recipe=Train(optim=Optim(lr=1.0), title="\\\\${a} $${b} ${c"))
def test_dump_and_yaml_are_inverses_of_build(tmp_path_factory, recipe):
    data = dump(recipe)
    assert build(Train, data) == recipe
    file = tmp_path_factory.mktemp("recipe", numbered=True) / "recipe.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8", newline="")
    assert load(file) == data


def test_yaml_keeps_the_order_of_the_fields():
    keys = [line.split(":")[0] for line in to_yaml(build(Train, GOOD)).splitlines() if line[0].isalpha()]
    assert keys[:4] == ["optim", "sampler", "entries", "rules"]
    assert "lr: 1.0" in to_yaml(build(Train, GOOD)).splitlines()[1]


def write(folder: Path, text: str) -> Path:
    file = folder / "r.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_load_reads_numbers_and_resolves_interpolation_after_the_overrides(tmp_path):
    file = write(tmp_path, "a: 5e-4\nb: 1e-5\nc: '1e-5'\nd: ${e.f}\ne: {f: 3}\n")
    assert load(file) == {"a": 5e-4, "b": 1e-5, "c": "1e-5", "d": 3, "e": {"f": 3}}
    assert load(str(file), ["e.f=4", "a=${d}"]) == {"a": 4, "b": 1e-5, "c": "1e-5", "d": 4, "e": {"f": 4}}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1, 2\n", ", line 3: did not find expected ',' or ']'"),
        ("a: 1\nb: 2\na: 3\n", ", line 3: found duplicate key a"),
        ("a:\n  b: 1\n  b: 2\n", ", line 3: found duplicate key b"),
        ("- 1\n", ": the top level should be a mapping (key: value)"),
        ("word\n", ": the top level should be a mapping (key: value)"),
        ("", ": the top level should be a mapping (key: value)"),
        ("a: ${b}\n", ": a: Interpolation key 'b' not found"),
        ("a:\n  b: ???\n", ": a.b: Missing mandatory value: b"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, text, line):
    file = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load(file)
    assert str(caught.value) == f"{file}{line}"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            load(path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4")
    with pytest.raises(UserError, match=r"latin.yaml: not a text file"):
        load(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match=r"control\.yaml, not YAML"):
        (tmp_path / "control.yaml").write_bytes(b"a: \x01")
        load(tmp_path / "control.yaml")


def test_a_changed_plugin_name_drops_the_old_fields_down_to_the_built_class(tmp_path):
    file = write(tmp_path, "optim: {lr: 1}\nsampler:\n  rule: {name: lcr, beta: 0.9}\n")
    rule = build(Train, load(file, ["sampler.rule.name=rcr"])).sampler.rule
    assert rule == Remask(beta=0.1)
    rule = build(Train, load(file, ["sampler.rule=rcr", "sampler.rule.beta=0.2"])).sampler.rule
    assert rule == Remask(beta=0.2)
    rule = build(Train, merge(load(file), ["sampler.rule.name=lcr"])).sampler.rule
    assert rule == LowConfidence(threshold=0.9, beta=0.9)


def test_importing_the_module_does_not_import_torch():
    code = (
        "import sys, unveil.recipe, unveil.recipe_keys\nsys.exit(not {'torch', 'transformers'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
