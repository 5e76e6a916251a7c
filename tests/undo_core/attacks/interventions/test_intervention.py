"""What all interventions share: the grid, the settings in a key, and the stage that tries a point."""

import dataclasses
from pathlib import Path

import pytest
from stage_kinds import NOWHERE

from undo_core.attacks import interventions
from undo_core.attacks.config import with_seed
from undo_core.attacks.interventions import INTERVENTIONS, Intervention, intervened
from undo_core.attacks.interventions.merge import Merge
from undo_core.cli.hints import of_types
from undo_core.pipeline.attacked_model import Attacked


@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_a_kind_is_a_frozen_dataclass_in_a_file_that_is_found(kind):
    own = INTERVENTIONS[kind]
    assert own.__module__ == f"{interventions.__name__}.{kind}" and own.__dataclass_params__.frozen
    assert own().trials() and (Path(interventions.__file__).parent / f"{kind}.py").is_file()
    for trial in own().trials():
        (point,) = own().at(trial).points().values()
        assert own().points()[trial.name] == point and own().at(trial).trials() == [trial]


def test_the_grid_is_every_combination_and_a_point_of_it_is_the_key():
    merge = with_seed(Merge(weights=[0.5, 0.25]), 7)
    assert merge.points() == {"weight-0.5": {"weights": 0.5}, "weight-0.25": {"weights": 0.25}}
    one = merge.at(merge.trials()[1])
    assert one == Merge(weights=[0.25], seed=7)
    assert one.settings() == {"kind": "merge", "weights": [0.25]}, "nothing is drawn, so that the seed is not in the key"
    stages = Attacked(merge, NOWHERE, NOWHERE, "merged", original=NOWHERE).stages()
    assert [stage.settings for stage in stages] == [{"attack": merge.at(trial).settings()} for trial in merge.trials()]
    assert [stage.title for stage in stages] == ["merged weight-0.5", "merged weight-0.25"]
    other = dataclasses.replace(merge, weights=[0.25, 0.75])
    assert Attacked(other, NOWHERE, NOWHERE, "", original=NOWHERE).stages()[0].key == stages[1].key


def test_points_that_nearly_agree_are_two():
    near = Merge(weights=[0.1234561, 0.1234562])
    assert list(near.points()) == ["weight-0.1234561", "weight-0.1234562"]
    assert [near.at(trial).weights for trial in near.trials()] == [[0.1234561], [0.1234562]]
    with pytest.raises(ValueError, match=r"^attack: got 2 points of the grid, wanted one"), intervened(None, near, None):
        pass


def test_a_kind_is_entered_once():
    with pytest.raises(TypeError, match=r"^kind: got merge in Other, which is that of Merge; wanted another"):

        class Other(Intervention):
            kind = "merge"

    with pytest.raises(TypeError, match=r"^kind: got none in Nameless, wanted a field such as"):

        class Nameless(Intervention):
            pass

    assert INTERVENTIONS["merge"] is Merge


def test_an_intervention_that_needs_the_original_says_so():
    with pytest.raises(ValueError, match=r"^kind: got merge, which needs the original model; wanted one \(--original\)"):
        Attacked(Merge(), NOWHERE, NOWHERE, "merged").stages()


@pytest.mark.parametrize("weights", [[], [0.5, 0.5], [-0.1], [1.5], [float("nan")]])
def test_weights_out_of_range_are_refused(weights):
    with pytest.raises(ValueError, match=r"^weights: got \[.*\], wanted different numbers from 0 to 1"):
        Merge(weights=weights)


UNION = """Parser key "attacks":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'a.A'>, <class 'b.B'>]
  Errors:
    - Problem with given class_path 'a.A':
        Parser key "kind":
          Expected a typing.Literal['finetune', 'lora']. Got value: {kind}
    - {second}
  Given value type: <class 'dict'>
  Given value: {{'kind': '{kind}'}}"""


def said_of(**parts: str) -> str:
    return of_types(" ".join(UNION.format(**parts).split()))


def test_an_error_of_the_parser_is_about_the_given_kind():
    second = "Problem with given class_path 'b.B': Option 'weigths' is not accepted"
    assert said_of(kind="merge", second=second) == f"attacks: {second}"
    second = (
        "Problem with given class_path 'b.B':\n  Parser key \"kind\":\n  Expected a typing.Literal['merge']. Got value: mrge"
    )
    said = said_of(kind="mrge", second=second)
    assert said == "attacks: kind: got mrge, wanted one of finetune, lora, merge; did you mean merge?"
    assert of_types("anything else") == "anything else"
