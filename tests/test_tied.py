"""Who shares a weight with whom."""

from torch import nn

from lightning_peft.tied import tied_weights


def test_equal_values_are_not_tied_and_several_owners_name_each_other():
    net = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"})
    net["d"].load_state_dict(net["a"].state_dict())
    assert tied_weights(net) == {}
    net["b"].weight = net["c"].weight = net["a"].weight
    assert tied_weights(net) == {"a": ["b", "c"], "b": ["a", "c"], "c": ["a", "b"]}


def test_a_module_under_two_names_is_one_module():
    layer = nn.Linear(4, 4)
    assert tied_weights(nn.ModuleDict({"first": layer, "second": layer})) == {}
