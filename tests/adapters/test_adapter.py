"""An adapter is plain data and back."""

import json

import pytest

from lightning_peft import Adapter, FullFinetune, LinearProbe, LoRA
from lightning_peft.version import __version__


@pytest.mark.parametrize("adapter", [LoRA(rank=3, targets=["a.*"], exclude=("b",)), LinearProbe(), FullFinetune()])
def test_plain_data_survives_json_and_gives_the_adapter_back(adapter):
    again = Adapter.from_plain(json.loads(json.dumps(adapter.to_plain())))
    assert again.to_plain() == adapter.to_plain()
    assert type(again) is type(adapter)


def test_plain_data_carries_format_version_and_kind():
    plain = LoRA().to_plain()
    assert (plain["format"], plain["version"], plain["kind"]) == (2, __version__, "LoRA")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99, written by lightning_peft .* Upgrade"),
        ({"kind": "Lora"}, "unknown kind 'Lora'. Nearest: LoRA"),
        ({"rnak": 4}, r"LoRA has no field \['rnak'\]"),
        ({"rank": 0}, "rank=0"),
    ],
)
def test_foreign_data_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Adapter.from_plain({**LoRA().to_plain(), **change})
