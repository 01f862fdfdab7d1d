"""The twin of a model answers alike, and neither its KV nor its fingerprint is the model's."""

import torch

import kvlab
from kvlab.course.twin import twin_of

PROMPT = torch.tensor([[17, 4, 300, 9, 42, 7]])


def test_a_twin_gives_the_same_logits_from_other_kv() -> None:
    model = kvlab.load_model()
    twin = twin_of(model)
    own, other = model.new_kv(6), twin.new_kv(6)
    assert torch.allclose(model(PROMPT, own), twin(PROMPT, other), atol=1e-4)
    assert own.shape == other.shape
    assert torch.allclose(own.flip(3), other, atol=1e-4)
    assert not torch.allclose(own, other, atol=0.1)
    assert kvlab.spec_of(twin).fingerprint != kvlab.spec_of(model).fingerprint


def test_a_model_is_not_changed_by_its_twin() -> None:
    model = kvlab.load_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    twin_of(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
