"""What cannot be composed is one line that says which override, and what it may be instead."""

import pytest

from train.config_store import compose_run, expand_sweep
from train.errors import RunError

REFUSED = [
    ("parallel.schedule=gpip", ("parallel.schedule=gpip", "expected one of [gpipe, 1f1b, ")),
    ("parallel.pp=1.5", ("parallel.pp=1.5", "'float' could not be converted to Integer")),
    ("parallel.layers_per_stage=3", ("parallel.layers_per_stage=3", "int is not a ListConfig")),
    ("seed=null", ("seed=null", "'seed' is not Optional")),
    ("stages.pretrain_4k.parallel.ppp=3", ("stages.pretrain_4k.parallel.ppp", "'ppp' not in")),
    ("optimizer.lr_multipliers.x=2", ("use +optimizer.lr_multipliers.x=2", "is not in struct")),
    ("+parallel.zz=2", ("'ParallelConfig' object has no attribute 'zz'", "docs/configs.md")),
    ("precision=bf17", ("there is no precision/bf17; use bf16, fp16, fp32, ",)),
    ("model=3", ("must be a string or a list",)),
    ("model.num_layers=[1", ("model.num_layers=[1 cannot be read", "write key=value")),
    ("seed", ("seed cannot be read", "missing EQUAL", "write key=value")),
    ("seed=1,2", ("'seed=1,2'", "use key=[value1,value2]")),
    ("name=${nope}", ("name: Interpolation key 'nope' not found",)),
]


@pytest.mark.parametrize(("override", "said"), REFUSED)
def test_an_override_is_refused_in_one_line(override: str, said: tuple[str, ...]) -> None:
    with pytest.raises(RunError) as caught:
        compose_run(["recipe=smoke", override])
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.startswith("configuration: ")
    assert len(message.splitlines()) == 1
    for words in said:
        assert message.count(words) == 1, message
    for noise in ("object_type", "full_key", "https://", "search path"):
        assert noise not in message


def test_a_section_takes_no_key_so_none_is_proposed() -> None:
    with pytest.raises(RunError) as caught:
        compose_run(["recipe=smoke", "parallel.ppp=4"])
    assert (
        str(caught.value)
        == "configuration: Could not override 'parallel.ppp': Key 'ppp' not in 'ParallelConfig'"
    )


def test_a_sweep_that_cannot_be_read_names_its_override() -> None:
    with pytest.raises(RunError, match=r"configuration: seed=range\(1,3 cannot be read"):
        expand_sweep(["seed=range(1,3"])
