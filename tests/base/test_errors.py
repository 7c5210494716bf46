from __future__ import annotations

import inspect

from glasshouse.base import errors
from glasshouse.base.errors import GlasshouseError, suggest


def test_every_error_kind_has_its_own_exit_code_and_its_special_cases_share_it() -> None:
    kinds = [k for _, k in inspect.getmembers(errors, inspect.isclass) if issubclass(k, GlasshouseError)]
    codes = {k.__name__: k.exit_code for k in kinds if k.__base__ in (GlasshouseError, Exception)}
    assert len(set(codes.values())) == len(codes) >= 12
    assert errors.Halt.exit_code == errors.TrainingError.exit_code
    assert 0 not in codes.values()
    assert errors.RecipeError.exit_code == errors.UsageError.exit_code == 2


def test_a_near_name_is_suggested_and_a_far_one_is_not() -> None:
    assert suggest("stesp", ["steps", "seed"]) == " Did you mean 'steps'?"
    assert suggest("Steps", ["steps"]) == " Did you mean 'steps'?"
    assert suggest("zebra", ["steps", "seed"]) == ""
    assert suggest("x", []) == ""
